"""A training step as callbacks and loggers see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from harness.fields import Batch
from harness.metrics import (
    Values,
    Weighting,
    Window,
)

__all__ = ["AxesLogger", "Step", "StepObserver", "logged_step"]


@dataclass(frozen=True)
class Step:
    """A training step, between its forward and its backward pass.

    Attributes:
        batch: what the model has seen.
        predictions: what it has made of it, with their graph.
        values: of the loss, with their graph, merged over the ranks.
        batch_idx: number of the batch in its epoch.
        is_whole: whether the batch is all of a step of the optimizer, or the last of its micro-batches.
        window: accumulation window of the step; of one micro-batch if the batch is all of it.
    """

    batch: Batch
    predictions: Mapping[str, Tensor]
    values: Values
    batch_idx: int
    is_whole: bool
    window: Window


@runtime_checkable
class StepObserver(Protocol):
    """A callback that is shown every training step before its backward pass; it must not change it."""

    def on_train_values(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        """Look at a step."""


@runtime_checkable
class AxesLogger(Protocol):
    """A logger that wants to know beforehand which values belong to epochs and which to steps."""

    def define_axes(self, epoch: list[str], step: list[str], minimised: list[str]) -> None:
        """Take note of names; of those in ``minimised``, smaller is better."""


@runtime_checkable
class LearntWeighting(Weighting, Protocol):
    """A weighting with parameters that the optimizer moves."""

    def objective(self, values: Values) -> Tensor:
        """Float64 scalar whose gradient teaches the parameters; none of it reaches the model."""


def logged_step(trainer: Trainer) -> int:
    """The step that a trainer logs values of an epoch with: in a training, that of the last batch before them."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
