"""How ranks share a training: what each Lightning strategy needs so that results stay exact."""

from __future__ import annotations

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from harness.distributed import join, launched_ranks

__all__ = ["AccumulatesInWindows", "auto_strategy", "connect", "data_parallel"]


def auto_strategy(**options: Any) -> Strategy | str:
    """DDP where a launcher has started several ranks, one device otherwise."""
    return data_parallel(**options) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "auto"


def data_parallel(**options: Any) -> Strategy:
    """DDP for force fields.

    Buffers (energy shifts, basis functions) are the same on all ranks and never change, so that sending them before
    every forward pass would only cost time. Gradients live in DDP's buckets.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    # the name of the option from torch 2.13 on, and before
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(**{sync_buffers: False, "gradient_as_bucket_view": True, **options})


def connect(trainer: Trainer) -> None:
    """Make the process group that the trainer's strategy would make, in a way that restarts of the ranks do not upset.

    See :func:`harness.distributed.join`. Strategies take a group that is there as it is.
    """
    strategy: Any = trainer.strategy
    if launched_ranks() == 1 or not hasattr(strategy, "_get_process_group_backend"):
        return
    device = strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join(strategy._get_process_group_backend(), strategy._timeout, device)


class AccumulatesInWindows:
    """To be put before ``DeepSpeedStrategy``: steps of several micro-batches that end where Lightning's end.

    DeepSpeed counts micro-batches across epochs and steps at every k-th, so that the last step of an epoch would go on
    in the next one while Lightning counts anew, and it divides the loss by k once more, after Lightning. Here Lightning
    says where a step ends, also a shorter last one, and the loss is divided once.

    Example:
        >>> from lightning.pytorch.strategies import DeepSpeedStrategy
        >>> class WindowedDeepSpeed(AccumulatesInWindows, DeepSpeedStrategy): ...
    """

    handles_gradient_accumulation = False
    """Lightning steps at the end of a window, as without DeepSpeed."""

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """Nothing: DeepSpeed is told the end of a step, and its ``no_sync`` refuses ZeRO 2."""
        return nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass, whose gradients DeepSpeed keeps for itself until the last micro-batch of the step."""
        engine, trainer = self.model, self.lightning_module.trainer  # type: ignore[attr-defined]
        engine.set_gradient_accumulation_boundary(not trainer.fit_loop._should_accumulate())
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Backward pass of a loss that is not divided again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)  # type: ignore[misc]
