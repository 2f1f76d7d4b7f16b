"""How ranks share a training: what each Lightning strategy needs so that results stay exact."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy

__all__ = ["auto_strategy", "data_parallel"]


def auto_strategy(**options: Any) -> Strategy | str:
    """DDP where a launcher has started several ranks, one device otherwise."""
    return data_parallel(**options) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "auto"


def data_parallel(**options: Any) -> Strategy:
    """DDP for force fields.

    Buffers (energy shifts, basis functions) are the same on all ranks and never change, so that sending them before
    every forward pass would only cost time. Gradients live in DDP's buckets.
    """
    return DDPStrategy(**{"broadcast_buffers": False, "gradient_as_bucket_view": True, **options})
