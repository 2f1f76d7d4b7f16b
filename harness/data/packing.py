"""Batches on their way from the worker of a data loader: one buffer for all fields.

A worker hands a tensor over by a shared-memory file of its own, so that a batch costs by the number of its tensors and
hardly by their size. Packed, there is one; what the training loop gets are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ["PackedBatch", "pack_in_worker", "unpacked"]

_ALIGNMENT = 64  # bytes, a line of the cache; more than any dtype needs

_Layout = tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
"""Name, dtype, shape and first byte of each field."""


class PackedBatch(dict[str, Tensor]):
    """A batch whose fields are views of one buffer, and which travels as that buffer; unpickled, it is a ``dict``."""

    def __init__(self, buffer: Tensor, layout: _Layout) -> None:
        super().__init__(unpacked(buffer, layout))
        self._packed = buffer, layout

    def __reduce__(self) -> tuple[Callable[..., dict[str, Tensor]], tuple[Tensor, _Layout]]:
        return unpacked, self._packed


def unpacked(buffer: Tensor, layout: _Layout) -> dict[str, Tensor]:
    """Fields of a batch as views of its buffer.

    Args:
        buffer: uint8 ``[num_bytes]``.
        layout: name, dtype, shape and first byte of each field.
    """
    return dict(_views(buffer, layout))


def _views(buffer: Tensor, layout: _Layout) -> Iterator[tuple[str, Tensor]]:
    for name, dtype, shape, start in layout:
        num_bytes = dtype.itemsize * math.prod(shape)
        yield name, buffer[start : start + num_bytes].view(dtype).view(shape)


def pack_in_worker(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch; in a worker of a data loader a copy of it in one buffer."""
    if get_worker_info() is None:
        return batch
    layout, end = [], 0
    for name, tensor in batch.items():
        layout.append((name, tensor.dtype, tuple(tensor.shape), end))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = PackedBatch(torch.empty(end, dtype=torch.uint8), tuple(layout))
    for name, tensor in batch.items():
        packed[name].copy_(tensor)
    return packed
