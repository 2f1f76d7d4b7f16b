"""Numbers between host and device, without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["DelayedScalar", "SentNumbers", "to_device"]


class SentNumbers:
    """Numbers of a device on their way to the host: the copy begins at once, and only :meth:`read` waits for it.

    Read once the work that follows has been handed to the device, they cost it no pause.

    Args:
        numbers: any shape, without a graph; they must not change any more.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.is_late = numbers.is_cuda
        """False if the numbers are on the host already."""
        if self.is_late:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        self._numbers = numbers

    def read(self) -> Any:
        """The numbers, as lists of the tensor's shape; the host waits until the device has come to them."""
        if self.is_late:
            self._arrived.synchronize()
        return self._numbers.tolist()


class DelayedScalar:
    """A number of each step on the host: on a CPU that of this step, on a GPU that of the step before.

    Args:
        delayed: :meth:`read` gives the number before the newest one; None for True on a GPU and False on a CPU.
    """

    def __init__(self, delayed: bool | None = None) -> None:
        self.delayed = delayed
        self._sent: list[SentNumbers] = []  # the newest two

    @property
    def is_delayed(self) -> bool:
        """True if :meth:`read` gives the number before the newest one."""
        return bool(self._sent) and self._sent[-1].is_late if self.delayed is None else self.delayed

    def send(self, number: Tensor) -> None:
        """Start to copy a step's number, ``[1]`` float64 without a graph, which must not change any more."""
        self._sent = [*self._sent[-1:], SentNumbers(number)]

    def read(self) -> float:
        """The newest number that need not be waited for; 0 before there is one."""
        if self.is_delayed:
            # of the step before: it has long arrived, unless the host runs ahead of the device
            return float(self._sent[0].read()[0]) if len(self._sent) > 1 else 0.0
        return self.wait()

    def wait(self) -> float:
        """The newest number, for which the host waits until the device has come to it; 0 before there is one."""
        return float(self._sent[-1].read()[0]) if self._sent else 0.0

    def forget(self) -> None:
        """Drop the numbers that were sent."""
        self._sent = []


def to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host as a float64 tensor, ``[len(numbers)]``, on a device; the host does not wait for the copy."""
    with torch.inference_mode(False):  # it may outlive this step, and training saves it for backward
        vector = torch.tensor(numbers, dtype=torch.float64)
        if device.type == "cuda":
            return vector.pin_memory().to(device, non_blocking=True)
        return vector.to(device)
