"""The place of a batch in its optimizer step, under ``accumulate_grad_batches``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from harness.fields import UPCOMING_LABELS, Batch
from harness.metrics import MetricsManager, Window

__all__ = ["Accumulation"]


class Accumulation:
    """Keeps the accumulation window of the step in progress.

    Args:
        callbacks: of the trainer, of which :class:`GradientAccumulationScheduler` changes ``accumulate_grad_batches``.
    """

    def __init__(self, callbacks: Iterable[Any] = ()) -> None:
        self._schedules = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
        self._window: Window | None = None  # of the step in progress, if it has several micro-batches

    def check(self, trainer: Trainer, loss: MetricsManager) -> None:
        """Refuse a loss or a strategy that cannot accumulate gradients exactly, if any epoch accumulates them.

        Raises:
            ValueError: with the component, or the strategy.
        """
        scheduled = [k for schedule in self._schedules for k in schedule.scheduling.values()]
        if max(trainer.accumulate_grad_batches, *scheduled, 1) == 1:
            return
        loss.check_accumulation()
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(trainer.strategy).__name__} counts micro-batches by itself: the last step of an epoch "
                f"would go on in the next, and losses be divided twice. Use a strategy with "
                f"harness.strategies.deepspeed.AccumulatesInWindows, such as class Mine(AccumulatesInWindows, "
                f"{type(trainer.strategy).__name__}), or accumulate_grad_batches=1."
            )

    def apply_schedule(self, trainer: Trainer) -> None:
        """Set ``accumulate_grad_batches`` of the current epoch; after a restart in mid-epoch Lightning does not."""
        for schedule in self._schedules:
            trainer.accumulate_grad_batches = schedule.get_accumulate_grad_batches(trainer.current_epoch)

    def place(self, trainer: Trainer, loss: MetricsManager, batch: Batch, batch_idx: int) -> tuple[Batch, Window]:
        """Batch without the labels of upcoming micro-batches, and the accumulation window of its step.

        Raises:
            ValueError: the data loader has not announced the micro-batches of the step.
        """
        following = batch.get(UPCOMING_LABELS) if isinstance(batch, Mapping) else None
        if following is not None:
            batch = {name: value for name, value in batch.items() if name != UPCOMING_LABELS}
        k = trainer.accumulate_grad_batches
        if k == 1:
            self._window = None
            return batch, loss.window([batch] if loss.announces(batch) else None)
        # The trainer's steps end at multiples of k and with the epoch, wherever this training began.
        num_left = int(min(k - batch_idx % k, trainer.num_training_batches - batch_idx))
        in_progress = self._window is not None and batch_idx % k != 0
        if following is not None and not in_progress:
            self._window = loss.window([batch, *following][:num_left])
        window = self._window
        num_announced = 0 if window is None else window.num_micro_batches - window.num_done
        if math.isfinite(trainer.num_training_batches):
            as_expected = num_announced == num_left
        else:  # it is the loader that knows where the last step ends
            as_expected = 0 < num_announced <= num_left
        if window is None or not as_expected or (following is not None and in_progress):
            found = "nothing" if following is None else f"a step of {len(following) + 1} micro-batches"
            raise ValueError(
                f"Batch {batch_idx} is one of accumulate_grad_batches={k} micro-batches, with {num_left} to come in "
                f"its step, but the data loader has announced {found}. The gradient needs the number of labels of a "
                f"step before its first backward pass. Give the trainer a loader that looks ahead: "
                f"harness.data.look_ahead(loader, {k}). The data modules of harness.data do so by themselves, given "
                f"as `datamodule=` rather than as their loaders."
            )
        return batch, window

    def warn_of_unfinished_step(self) -> None:
        """Warn of a checkpoint that is made between the micro-batches of a step."""
        if self._window is not None and not self._window.is_complete:
            rank_zero_warn(
                f"A checkpoint is made in the middle of a step, after {self._window.num_done} of its "
                f"{self._window.num_micro_batches} micro-batches: a run that continues from it makes a step of the "
                f"others alone. Save at the end of a step."
            )
