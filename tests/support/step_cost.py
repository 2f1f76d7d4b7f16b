"""Operators and collectives of a step, counted."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "scatter",
]


@contextmanager
def counted_collectives():
    """Counts what passes through ``torch.distributed``, and lets it pass."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name, *args, **kwargs):
        operation = kwargs.get("op", args[1] if name == "all_reduce" and len(args) > 1 else None)
        counts[name if operation is None else str(operation).rsplit(".", 1)[-1]] += 1
        return originals[name](*args, **kwargs)

    for name in COLLECTIVES:
        setattr(dist, name, partial(counting, name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


WAITS = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "item", "is_nonzero", "equal"),
        *("nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount"),  # for the shape of their result
    )
}


class Operators(TorchDispatchMode):
    """Every aten operator of a block, and those among them that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        self.names[name] += 1
        if name in WAITS or (name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None):
            self.waits.append(name)
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::masked_select"):
            indices = [index for index in args[1] if index is not None] if name != "aten::masked_select" else args[1:]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.waits.append(f"{name} with a mask")
        return func(*args, **(kwargs or {}))
