"""A training step as callbacks see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from harness.fields import Batch
from harness.metrics import RunningStep, Values, Weighting, Window
from harness.support.device import to_device

__all__ = [
    "LearntWeighting",
    "Step",
    "StepObserver",
    "StepSums",
    "StepSumsOfAll",
    "current_step",
    "is_nth_step",
    "is_nth_step_done",
]


@dataclass(frozen=True)
class Step:
    """A training step, between its forward and its backward pass.

    Attributes:
        batch: input of the model, and labels.
        predictions: output of the model, with their graph.
        running: values of the loss, whose sums may still be on their way to all ranks.
        batch_idx: number of the batch in its epoch.
        is_whole: True if the batch is all of an optimizer step, or the last of its micro-batches.
        window: accumulation window of the step; of one micro-batch if the batch is all of it.
    """

    batch: Batch
    predictions: Mapping[str, Tensor]
    running: RunningStep
    batch_idx: int
    is_whole: bool
    window: Window

    @property
    def own(self) -> Values:
        """Values of the loss that this rank's backward pass starts from, with their graph; nothing is waited for.

        Their gradients are this rank's parts of those of the whole. Their numbers are the part of this rank's rows too,
        but where the loss is not linear in its sums (:meth:`harness.metrics.MetricsManager.announces`).
        """
        return self.running.own

    @property
    def values(self) -> Values:
        """Values of the loss, merged over the ranks, with their graph.

        The backward pass waits for all ranks' forward pass then. ``running.value()`` gives them later without a wait,
        such as in ``on_train_batch_end``.
        """
        return self.running.value()


@runtime_checkable
class StepObserver(Protocol):
    """A callback that is shown every training step before its backward pass; it must not change it."""

    def on_train_values(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        """Look at a step."""


@runtime_checkable
class StepSums(Protocol):
    """A callback with numbers of every training batch that are summed over the ranks.

    The sum is part of the loss's all-reduce, so it costs no collective of its own, and the host does not wait. It is
    handed over after the backward pass of the step, a sum for each of its micro-batches. Every rank has the same
    callbacks, and they have the same ``num_step_sums`` on every rank, whatever the data.
    """

    num_step_sums: int
    """Number of the numbers."""

    def step_numbers(self, batch: Batch) -> list[float]:
        """``num_step_sums`` numbers of this rank for a batch, known to the host: flags, shapes."""

    def on_step_sums(self, sums: Tensor) -> None:
        """Take the sums over the ranks: float64 ``[num_step_sums]`` on the device, not to be changed."""


class StepSumsOfAll:
    """The numbers of all :class:`StepSums` among callbacks, as one vector with one copy to the device.

    Args:
        callbacks: of the trainer, in the same order on every rank.
    """

    def __init__(self, callbacks: Iterable[Any] = ()) -> None:
        self._callbacks = [callback for callback in callbacks if isinstance(callback, StepSums)]

    def collect(self, batch: Batch, device: torch.device) -> Tensor | None:
        """Numbers of this rank: float64 ``[sum of num_step_sums]``; None if no callback has any.

        Raises:
            ValueError: a callback has another number of them than it has announced.
        """
        if not self._callbacks:
            return None
        numbers: list[float] = []
        for callback in self._callbacks:
            found = callback.step_numbers(batch)
            if len(found) != callback.num_step_sums:
                raise ValueError(
                    f"{type(callback).__name__}.step_numbers returned {len(found)} numbers, expected as many as its "
                    f"num_step_sums, {callback.num_step_sums}, for every batch: all ranks send vectors of one length."
                )
            numbers += found
        return to_device(numbers, device)

    def deliver(self, sums: Tensor | None) -> None:
        """Hand each callback the sums of its numbers."""
        if sums is None:
            return
        parts = torch.split(sums, [callback.num_step_sums for callback in self._callbacks])
        for callback, part in zip(self._callbacks, parts, strict=True):
            callback.on_step_sums(part)


@runtime_checkable
class LearntWeighting(Weighting, Protocol):
    """A weighting with parameters that the optimizer moves."""

    def objective(self, values: Values) -> Tensor:
        """Float64 scalar whose gradient teaches the parameters; none of it reaches the model."""


def current_step(trainer: Trainer) -> int:
    """Number of the optimizer step that is being made, counted from 1."""
    return trainer.global_step + 1


def is_nth_step(trainer: Trainer, number: int | None) -> bool:
    """True within every n-th optimizer step, counted from 1; False if ``number`` is 0 or None."""
    return bool(number) and current_step(trainer) % number == 0  # type: ignore[operator]


def is_nth_step_done(trainer: Trainer, number: int | None) -> bool:
    """True after every n-th optimizer step, as in ``on_train_batch_end``; False if ``number`` is 0 or None."""
    return bool(number) and trainer.global_step % number == 0  # type: ignore[operator]
