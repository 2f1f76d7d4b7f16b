"""The checkpoint with the best monitored value, of a run and of the one that it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from harness.module import ForceFieldModule
from harness.strategies import load_weights

__all__ = ["best_before", "best_checkpoint", "load_checkpoint"]


def _monitoring(trainer: Trainer) -> ModelCheckpoint | None:
    """The first callback that keeps checkpoints by a monitored value."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, ModelCheckpoint) and each.monitor), None)


def best_before(trainer: Trainer, resumed_from: str | None) -> dict[str, Any]:
    """State of the callback that monitors, in the checkpoint that a run continues; empty without one.

    Read it before the training: rank 0 moves the checkpoint while other ranks go on.
    """
    monitoring = _monitoring(trainer)
    if monitoring is None or not resumed_from:
        return {}
    checkpoint = torch.load(resumed_from, weights_only=True, map_location="cpu")
    return checkpoint["callbacks"].get(monitoring.state_key, {})  # type: ignore[no-any-return]


def best_checkpoint(trainer: Trainer, before: dict[str, Any]) -> str | None:
    """Path of the best checkpoint of this run or the one before; None if nothing is monitored, or no file is left.

    Args:
        trainer: of this run.
        before: what :func:`best_before` has read.
    """
    monitoring = _monitoring(trainer)
    if monitoring is None:
        return None
    candidates = [
        (monitoring.best_model_score, monitoring.best_model_path),
        (before.get("best_model_score"), before.get("best_model_path", "")),
    ]
    # a full disk may have kept it from being written
    found = [(float(score), path) for score, path in candidates if score is not None and Path(path).is_file()]
    return (min if monitoring.mode == "min" else max)(found)[1] if found else None


def load_checkpoint(module: ForceFieldModule, path: str) -> None:
    """Load the weights of a checkpoint into a module that may be split over the ranks.

    The trainer would let a callback that averages weights put back those that are not averaged.
    """
    checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    module.on_load_checkpoint(checkpoint)
    load_weights(module, checkpoint["state_dict"])
