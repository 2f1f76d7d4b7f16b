"""The devices that a test runs on, and the places where a host would wait for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from support.step_cost import Operators
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def nothing_is_waited_for(device: str) -> Iterator[None]:
    """An error where the host waits for a GPU; on a CPU, where it would wait for one."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with Operators() as operators:
            yield
        assert operators.waits == []


def moved(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """A batch on a device; leaves that want gradients stay leaves."""
    return {
        name: value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
