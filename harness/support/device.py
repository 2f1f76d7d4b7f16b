"""Numbers between host and device, without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DelayedScalar", "to_device"]


class DelayedScalar:
    """A number of each step on the host: on a CPU that of this step, on a GPU that of the step before.

    Args:
        delayed: :meth:`read` gives the number before the newest one; None for True on a GPU and False on a CPU.
    """

    def __init__(self, delayed: bool | None = None) -> None:
        self.delayed = delayed
        self._sent: list[tuple[Tensor, torch.cuda.Event | None]] = []  # the newest two

    @property
    def is_delayed(self) -> bool:
        """True if :meth:`read` gives the number before the newest one."""
        return bool(self._sent) and self._sent[-1][1] is not None if self.delayed is None else self.delayed

    def send(self, number: Tensor) -> None:
        """Start to copy a step's number, ``[1]`` float64 without a graph, which must not change any more."""
        arrived = None
        if number.is_cuda:
            number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._sent = [*self._sent[-1:], (number, arrived)]

    def read(self) -> float:
        """The newest number that need not be waited for; 0 before there is one."""
        if self.is_delayed:
            # of the step before: it has long arrived, unless the host runs ahead of the device
            return _on_host(*self._sent[0]) if len(self._sent) > 1 else 0.0
        return self.wait()

    def wait(self) -> float:
        """The newest number, for which the host waits until the device has come to it; 0 before there is one."""
        return _on_host(*self._sent[-1]) if self._sent else 0.0

    def forget(self) -> None:
        """Drop the numbers that were sent."""
        self._sent = []


def _on_host(number: Tensor, arrived: torch.cuda.Event | None) -> float:
    if arrived is not None:
        arrived.synchronize()
    return float(number.numpy()[0])


def to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host as a float64 tensor, ``[len(numbers)]``, on a device; the host does not wait for the copy."""
    with torch.inference_mode(False):  # it may outlive this step, and training saves it for backward
        vector = torch.tensor(numbers, dtype=torch.float64)
        if device.type == "cuda":
            return vector.pin_memory().to(device, non_blocking=True)
        return vector.to(device)
