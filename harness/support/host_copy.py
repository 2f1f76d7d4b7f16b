"""Copy of a state in the memory of the host, which a training may go on beside."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HostCopy"]


class HostCopy:
    """Copy of nested dictionaries, lists and tuples with their tensors, as it is now.

    Tensors that share memory share it in the copy: a file of it is as large as one of the state itself. Those of a GPU
    are copied to pinned memory behind the work that the GPU has been given; the host does not wait for them before
    :meth:`arrived`. Later work on the same stream may change the state.

    Args:
        state: numbers, texts, tensors, and containers of them; other objects are copied by ``copy.deepcopy``.
    """

    def __init__(self, state: Any) -> None:
        self._copied: dict[int, tuple[Any, Any]] = {}  # original, which keeps its id its own, and copy
        self._storages: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}  # by device, address and size
        self._devices: set[torch.device] = set()
        with torch.inference_mode(False), torch.no_grad():  # a validation may be going on
            self._state = self._copy(state)
        self._copied, self._storages = {}, {}
        self._events = [torch.cuda.current_stream(device).record_event() for device in self._devices]

    def arrived(self) -> Any:
        """The copy, once all of it is there."""
        for event in self._events:
            event.synchronize()
        return self._state

    def _copy(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if id(value) not in self._copied:
            self._copied[id(value)] = value, self._made(value)
        return self._copied[id(value)][1]

    def _made(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            made = copy.copy(value)  # with what a dictionary of its own kind has beside its entries
            for key, entry in value.items():
                made[key] = self._copy(entry)
            return made
        if type(value) in (list, tuple):
            return type(value)(self._copy(entry) for entry in value)
        return copy.deepcopy(value)

    def _tensor(self, value: Tensor) -> Tensor:
        is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized
        if not is_plain or value.device.type not in ("cpu", "cuda") or value.is_conj() or value.is_neg():
            copied = value.detach().cpu()
            return copied.clone() if value.device.type == "cpu" else copied
        whole = value.untyped_storage()
        if not whole.nbytes():
            return value.detach().to("cpu", copy=True)
        place = value.device, whole.data_ptr(), whole.nbytes()
        if place not in self._storages:
            on_gpu = value.is_cuda
            bytes_there = torch.empty(whole.nbytes(), dtype=torch.uint8, pin_memory=on_gpu).untyped_storage()
            bytes_there.copy_(whole, non_blocking=on_gpu)
            self._storages[place] = bytes_there
            if on_gpu:
                self._devices.add(value.device)
        there = self._storages[place]
        return torch.empty(0, dtype=value.dtype).set_(there, value.storage_offset(), value.size(), value.stride())
