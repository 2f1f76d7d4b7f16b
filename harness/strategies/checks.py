"""Refuse strategies and precisions that cannot train forces exactly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from harness.strategies.deepspeed import ZeroStrategy

__all__ = ["check_strategy"]


def check_strategy(
    strategy: Strategy | str, accelerator: str, precision: str, callbacks: Iterable[Callback] = ()
) -> None:
    """Refuse a strategy or precision that cannot train forces, or not exactly, before any training.

    Args:
        strategy: of the trainer.
        accelerator: ``cpu``, ``cuda``, ``gpu`` or ``auto``.
        precision: of the trainer.
        callbacks: of the trainer.

    Raises:
        ValueError: with the reason and an alternative.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "Lightning's FSDPStrategy (FSDP1) is not for force fields: it flattens parameters into buffers that it "
            "frees behind the forward pass, in which forces are derived and which their loss goes through once more. "
            "Expected FSDP2: strategy=fsdp, or harness.strategies.choices.fully_sharded()."
        )
    if type(strategy) is DeepSpeedStrategy:  # a subclass may have mended these
        raise ValueError(
            "Lightning's DeepSpeedStrategy rounds energies to float32, does not shard models that derive forces (stage "
            "3), and writes folders that are unpickled without restrictions. Expected strategy=deepspeed_zero2, or "
            "harness.strategies.choices.deep_speed(stage=2)."
        )
    if isinstance(strategy, ZeroStrategy) and strategy.needs_cuda and on_cpu:
        raise ValueError(
            "DeepSpeed's strategies need CUDA GPUs, found accelerator=cpu. Choose strategy=ddp or strategy=fsdp there."
        )
    _check_precision(strategy, on_cpu, precision)
    if isinstance(strategy, ModelParallelStrategy | ZeroStrategy):
        averaging = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
        if averaging:
            raise ValueError(
                f"{averaging[0]} copies the whole model, but {type(strategy).__name__} splits it, or its master "
                f"weights, over the ranks. Leave the callback out, or choose strategy=ddp."
            )


def _check_precision(strategy: Strategy | str, on_cpu: bool, precision: str) -> None:
    if precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
        raise ValueError(
            f"trainer.precision={precision} would round positions and labels too. Expected 32-true, 64-true, or "
            f"bf16-mixed, which rounds within the layers of the network only."
        )
    if precision in ("16-mixed", "16") and on_cpu:
        raise ValueError(
            "trainer.precision=16-mixed needs a GPU: on CPUs Lightning would use bf16-mixed instead. Expected "
            "bf16-mixed, 32-true or 64-true there."
        )
    if isinstance(strategy, ZeroStrategy) and precision not in ("32-true", "32"):
        raise ValueError(
            f"trainer.precision={precision} with DeepSpeed: it keeps its weights in float32, and in lower precision "
            f"casts the whole model, positions included. Expected 32-true; for {precision} choose strategy=ddp."
        )
    if isinstance(strategy, ModelParallelStrategy) and precision not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise ValueError(
            f"trainer.precision={precision} with FSDP: Lightning's ModelParallelStrategy does not have it. Expected "
            f"32-true or bf16-mixed; for {precision} choose strategy=ddp."
        )
