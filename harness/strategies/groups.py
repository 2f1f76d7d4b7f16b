"""Ranks of a strategy: connect them, and find those that share a batch."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from harness.distributed import (
    ProcessGroup,
    data_parallel_size,
    join,
    launched_rank,
    launched_ranks,
    rank_in_group,
)
from harness.support.lightning_private import parallel_sizes, process_group_settings

__all__ = [
    "connect",
    "data_parallel_group",
    "data_parallel_ranks",
    "is_on_gpu",
    "launched_data_parallel_ranks",
    "splits_parameters",
]


def connect(trainer: Trainer) -> None:
    """Make the process group that the trainer's strategy would make, in a way that restarts of the ranks do not upset.

    See :func:`harness.distributed.join`. Strategies take a group that is there as it is.
    """
    strategy = trainer.strategy
    settings = process_group_settings(strategy)
    if launched_ranks() == 1 or settings is None:
        return
    device = strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join(*settings, device)


def splits_parameters(strategy: Strategy) -> bool:
    """True if a rank holds only a part of every parameter."""
    if isinstance(strategy, DeepSpeedStrategy):
        return bool(strategy.zero_stage_3)
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def data_parallel_group(strategy: Strategy) -> ProcessGroup | None:
    """The ranks that share a batch with this one, if the strategy splits the world; None for all of them."""
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    mesh = strategy.device_mesh["data_parallel"]
    return None if mesh.size() == strategy.world_size else mesh.get_group()


def data_parallel_ranks(trainer: Trainer | None) -> tuple[int, int]:
    """Number of this rank among those that share a batch, and how many they are.

    Args:
        trainer: the trainer; without one, all ranks of the process group share a batch.
    """
    ranks = None if trainer is None else getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return (ranks["rank"], ranks["num_replicas"]) if ranks else (rank_in_group(), data_parallel_size())


def is_on_gpu(trainer: Trainer | None) -> bool:
    """True if the trainer's device is a GPU; False without a trainer."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def launched_data_parallel_ranks(strategy: Strategy) -> tuple[int, int] | None:
    """Number of this rank among those that will share a batch, and how many they will be, before there is a group.

    None if the ranks cannot be divided into groups of the strategy's size, which it refuses by itself.
    """
    # ranks that work on the same part of a batch
    same_batch = parallel_sizes(strategy)[1] if isinstance(strategy, ModelParallelStrategy) else 1
    if not isinstance(same_batch, int) or launched_ranks() % same_batch:
        return None
    return launched_rank() // same_batch, launched_ranks() // same_batch
