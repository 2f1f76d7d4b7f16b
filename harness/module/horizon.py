"""The length of a training in the turns of a learning-rate scheduler, however that length is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from harness.support.lightning_private import training_loader

__all__ = ["HORIZON", "Pace", "Progress", "TrainingLength", "batches_of_epoch"]

HORIZON = "horizon"
"""Value of a scheduler's argument that stands for the length of the training, such as ``T_max: horizon``."""


@dataclass(frozen=True)
class Progress:
    """Epochs, batches and steps that a training has made.

    Attributes:
        epochs: complete ones.
        batches: of the epoch in progress.
        steps: of the optimizer, since the beginning.
    """

    epochs: int = 0
    batches: int = 0
    steps: int = 0

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Progress:
        """Progress of the training that a checkpoint of Lightning is of."""
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
        done = int(epochs["processed"])
        in_progress = int(batches["current"]["processed"]) if epochs["started"] > done else 0
        if in_progress and batches.get("is_last_batch"):  # only the validation was left
            done, in_progress = done + 1, 0
        return cls(done, in_progress, int(checkpoint["global_step"]))


@dataclass(frozen=True)
class Pace:
    """Moments at which Lightning lets a scheduler take a turn.

    Attributes:
        interval: ``epoch`` or ``step``.
        frequency: epochs, or batches, between turns.
    """

    interval: str = "epoch"
    frequency: int = 1

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Pace:
        """Pace of Lightning's dictionary of a scheduler."""
        return cls(str(options.get("interval", "epoch")), int(options.get("frequency", 1)))

    def turns(self, epoch: int, batches: range, num_batches: int, accumulate: int) -> int:
        """Turns within some batches of an epoch, whose numbers count from 0."""
        if self.interval == "epoch":
            return int(num_batches - 1 in batches and (epoch + 1) % self.frequency == 0)
        if accumulate == self.frequency == 1:
            return len(batches)
        ends = (number + 1 for number in batches if (number + 1) % accumulate == 0 or number + 1 == num_batches)
        return sum(number % self.frequency == 0 for number in ends)


@dataclass(frozen=True)
class TrainingLength:
    """Length of a training; the first limit that is reached counts.

    Args:
        max_epochs: None or -1 for no limit.
        max_steps: -1 for no limit.
        accumulate_in: batches of an optimizer step in an epoch of some number.
        num_batches: of an epoch; None if the data has no length.
    """

    max_epochs: int | None
    max_steps: int
    accumulate_in: Callable[[int], int]
    num_batches: Callable[[], int | None]

    @classmethod
    def of(cls, trainer: Trainer) -> TrainingLength:
        """Length of a trainer's training."""

        def accumulate_in(epoch: int) -> int:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            scheduled = [each for each in callbacks if isinstance(each, GradientAccumulationScheduler)]
            found = scheduled[0].get_accumulate_grad_batches(epoch) if scheduled else trainer.accumulate_grad_batches
            return int(found)

        return cls(trainer.max_epochs, trainer.max_steps, accumulate_in, lambda: batches_of_epoch(trainer))

    def turns_left(self, pace: Pace, done: Progress) -> int:
        """Turns of a scheduler from some progress to the end.

        Raises:
            ValueError: the training has no such length, or the data has none.
        """
        max_epochs, max_steps = self._limits()
        if max_steps is None and pace.interval == "epoch":  # the data need not be asked
            return int(max_epochs // pace.frequency) - done.epochs // pace.frequency
        number = self._num_batches(pace, max_steps is not None)
        epoch, first, steps, turns = done.epochs, done.batches, done.steps, 0
        cache: dict[tuple[int, int, int], int] = {}
        while epoch < max_epochs and (max_steps is None or steps < max_steps):
            if number < 1:
                break
            accumulate = self.accumulate_in(epoch)
            last = number
            if max_steps is not None:
                last = min(number, (first // accumulate + max_steps - steps) * accumulate)
            steps += math.ceil(last / accumulate) - first // accumulate
            if pace.interval == "epoch":
                turns += (epoch + 1) % pace.frequency == 0  # also of an epoch that max_steps cuts
            else:
                key = first, last, accumulate
                if key not in cache:
                    cache[key] = pace.turns(epoch, range(first, last), number, accumulate)
                turns += cache[key]
            epoch, first = epoch + 1, 0
        return turns

    def turns_done(self, pace: Pace, done: Progress) -> int:
        """Turns that a scheduler of this pace would have taken by some progress, with the batches of now."""
        if pace.interval == "epoch":
            return done.epochs // pace.frequency
        if pace.frequency == 1:
            return done.steps
        number = self._num_batches(pace, False)
        whole = sum(pace.turns(0, range(number), number, self.accumulate_in(epoch)) for epoch in range(done.epochs))
        return whole + pace.turns(0, range(done.batches), number, self.accumulate_in(done.epochs))

    def _limits(self) -> tuple[float, int | None]:
        """Most epochs, perhaps without end, and most steps.

        Raises:
            ValueError: neither has an end.
        """
        epochs, steps = self.max_epochs, self.max_steps
        max_epochs = math.inf if epochs in (None, -1) else float(epochs)  # type: ignore[arg-type]
        max_steps = None if steps == -1 else int(steps)
        if max_steps is None and math.isinf(max_epochs):
            raise ValueError(
                f"The learning-rate scheduler has an argument `{HORIZON}`, the length of the training, but max_epochs "
                f"is {epochs} and max_steps is not set (a time limit is no length): there is no end to reckon with. "
                f"Set max_epochs or +trainer.max_steps, or give the argument a number, such as "
                f"lr_scheduler.scheduler.T_max=100, or choose lr_scheduler=plateau or lr_scheduler=none."
            )
        return max_epochs, max_steps

    def _num_batches(self, pace: Pace, by_steps: bool) -> int:
        number = self.num_batches()
        if number is None:
            cause = "max_steps" if by_steps else f"interval: {pace.interval}"
            raise ValueError(
                f"The learning-rate scheduler has an argument `{HORIZON}`, the length of the training, which depends "
                f"on the number of batches of an epoch ({cause}), but the training data has no length. Give the "
                f"argument a number, such as lr_scheduler.scheduler.T_max=1000, or set trainer.limit_train_batches to "
                f"a whole number."
            )
        return number


def batches_of_epoch(trainer: Trainer) -> int | None:
    """Training batches of a rank in an epoch, with ``limit_train_batches``; None if the data has no length."""
    if trainer.num_training_batches and math.isfinite(trainer.num_training_batches):
        return int(trainer.num_training_batches)
    limit = trainer.limit_train_batches
    try:
        length: float = len(training_loader(trainer))
    except (TypeError, NotImplementedError, AttributeError):  # it has none, or is not known yet
        return limit if isinstance(limit, int) and limit > 0 else None
    return int(min(length, limit)) if isinstance(limit, int) else int(length * limit)
