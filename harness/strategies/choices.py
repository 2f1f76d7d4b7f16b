"""Strategies that ``conf/strategy`` names, and the plugins of a cluster."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from harness.distributed import launched_ranks
from harness.strategies.deepspeed import ZeroStrategy
from harness.strategies.flat import FlatStrategy
from harness.strategies.fsdp import FullyShardedStrategy

__all__ = [
    "auto_strategy",
    "cluster_plugins",
    "data_parallel",
    "deep_speed",
    "flat_data_parallel",
    "fully_sharded",
    "single_device",
]


def auto_strategy(compiled: bool = False, **options: Any) -> Strategy | str:
    """DDP where a launcher has started several ranks, one device otherwise.

    Args:
        compiled: True for a model with compiled parts, whose gradients :func:`flat_data_parallel` sends in the place of
            DDP. ``harness-train`` looks at its model.
        options: of the strategy, such as ``timeout``.
    """
    if launched_ranks() == 1:
        return "auto"
    return flat_data_parallel(**options) if compiled else data_parallel(**options)


def single_device(**options: Any) -> str:
    """One device and no process group.

    Args:
        options: such as ``timeout``, which nothing waits for here.

    Raises:
        ValueError: a launcher has started several ranks: each would train on its own and write the same files.
    """
    if launched_ranks() > 1:
        raise ValueError(
            f"strategy=single is for one process, but {launched_ranks()} ranks have been started: each would train all "
            f"of the data on its own. Start it without torchrun, or choose strategy=ddp."
        )
    return "auto"


def data_parallel(**options: Any) -> Strategy:
    """DDP for force fields: every rank holds the whole model and the whole optimizer.

    Buffers (energy shifts, basis functions) are the same on all ranks and never change, so that sending them before
    every forward pass would only cost time. Gradients live in DDP's buckets.

    Args:
        options: of Lightning's ``DDPStrategy`` and torch's ``DistributedDataParallel``, such as ``static_graph`` and
            ``timeout``.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    # the name of the option from torch 2.13 on, and before
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(**{sync_buffers: False, "gradient_as_bucket_view": True, **options})


def flat_data_parallel(**options: Any) -> FlatStrategy:
    """Data parallelism without DDP's hooks in the backward pass, for compiled models.

    Args:
        options: of Lightning's ``DDPStrategy``, such as ``timeout``, but none of ``DistributedDataParallel``.
    """
    return FlatStrategy(**options)


def fully_sharded(**options: Any) -> FullyShardedStrategy:
    """FSDP2 for force fields: parameters, gradients and optimizer states are split over the ranks.

    Args:
        options: of Lightning's ``ModelParallelStrategy``, such as ``timeout``, and ``tensor_parallel_size`` for groups
            of ranks that work on the same batch.
    """
    return FullyShardedStrategy(**options)


def deep_speed(stage: int = 2, **options: Any) -> ZeroStrategy:
    """DeepSpeed's ZeRO for force fields.

    Args:
        stage: parts that are split over the ranks: 1 the optimizer's states, 2 the gradients too, 3 the parameters too.
        options: of Lightning's ``DeepSpeedStrategy``, such as ``timeout``.

    Raises:
        ValueError: DeepSpeed is not installed, or there is no such stage.
    """
    return ZeroStrategy(stage=stage, **options)


def cluster_plugins() -> list[ClusterEnvironment]:
    """Plugin of the cluster for the trainer: ranks are those of torch's variables, whoever has started them.

    Lightning would look for launchers of its own choice. In a job of SLURM it would take the script of the job for one
    of its tasks, and requeue the job on SIGUSR1, beside a checkpoint of its own that a restart prefers to any other.
    Here :func:`~harness.distributed.take_ranks` finds the ranks, :class:`~harness.callbacks.ResumeCheckpoint` saves,
    and ``launch/slurm.sbatch`` puts the job back into the queue.
    """
    return [TorchElasticEnvironment() if launched_ranks() > 1 else LightningEnvironment()]
