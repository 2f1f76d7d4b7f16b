"""Scheduled coefficients move with the training: by epoch, by step, or by the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from harness.metrics import WEIGHTED_SUM, MetricsManager
from harness.module.horizon import Pace, Progress, TrainingLength
from harness.module.learning_rates import WarmUp
from harness.schedules import Interval, unreached
from harness.support.log_keys import LogKeys

__all__ = [
    "ScheduleFollower",
    "check_length",
    "epoch_of",
    "relative_learning_rate",
    "text_of_unreached",
    "warn_of_long_warm_up",
    "warn_of_monitors",
    "warn_of_unreached",
]

Position = tuple[float, float | None]
"""Epoch, and learning rate relative to that of the start; None where it is not known."""


class ScheduleFollower:
    """Moves managers with a schedule to the position of the training.

    Attributes:
        position: that the weights of the model are of. A test follows it, since it may load those of any epoch.
    """

    def __init__(self) -> None:
        self.position: Position = (0.0, None)
        self._warned_of_rate = False

    def mark(self, trainer: Trainer, managers: Sequence[MetricsManager]) -> None:
        """Make the trainer's epoch and learning rate the :attr:`position`.

        Args:
            trainer: in a training.
            managers: those of the training, for the warning of a rate that rises.
        """
        self.position = float(trainer.current_epoch), self._rate(trainer, managers)

    def follow_training(self, trainer: Trainer, managers: Sequence[MetricsManager], batch_idx: int) -> None:
        """Move managers to the epoch, or the part of it before this batch; never between micro-batches of a step."""
        for manager in managers:
            schedule = manager.schedule
            if schedule is None or batch_idx % trainer.accumulate_grad_batches:
                continue
            epoch = epoch_of(trainer, batch_idx, manager)
            # a checkpoint in mid-epoch has the learning rate that the epoch began with
            if batch_idx == 0 or manager.position[0] != epoch:
                manager.move_to(epoch, self._rate(trainer, managers) if schedule.needs_learning_rate else None)

    def follow_evaluation(
        self, trainer: Trainer, managers: Iterable[nn.Module], training: Sequence[MetricsManager]
    ) -> None:
        """Move managers of a validation or test to the position of the weights.

        Args:
            trainer: of the validation or test.
            managers: those of its sets.
            training: those of the training.
        """
        for manager in managers:
            if isinstance(manager, MetricsManager) and manager.schedule is not None:
                if trainer.state.fn == TrainerFn.FITTING:
                    self.mark(trainer, training)
                manager.move_to(*self.position)

    def _rate(self, trainer: Trainer, managers: Sequence[MetricsManager]) -> float:
        """Learning rate relative to that of the start; warns, once, of one that rises and that a schedule follows."""
        ratio, start = relative_learning_rate(trainer)
        followed = any(manager.schedule is not None and manager.schedule.needs_learning_rate for manager in managers)
        if ratio > 1 + 1e-6 and followed and not self._warned_of_rate:
            self._warned_of_rate = True
            rank_zero_warn(
                f"The learning rate is {ratio:g} times that which the schedule of the coefficients starts with "
                f"({start:g}): coefficients that follow it leave the range from `start` to `limit`, and are cut off at "
                f"0. Use a learning rate that does not rise above its beginning, or a schedule of epochs."
            )
        return ratio


def epoch_of(trainer: Trainer, batch_idx: int, manager: MetricsManager) -> float:
    """Epoch of a batch's optimizer step, with the part before it where the manager's schedule moves by step."""
    epoch = float(trainer.current_epoch)
    if manager.schedule_interval == "epoch":
        return epoch
    return epoch + (batch_idx - batch_idx % trainer.accumulate_grad_batches) / trainer.num_training_batches


def relative_learning_rate(trainer: Trainer) -> tuple[float, float | None]:
    """Learning rate of the first group of parameters divided by that of the start, and that of the start.

    The ratio is 1 for an optimizer that has no learning rate.
    """
    optimizer = trainer.optimizers[0]
    group = optimizer.param_groups[0]
    start = group.get("initial_lr") or getattr(optimizer, "defaults", {}).get("lr")
    return (float(group["lr"]) / float(start) if start and "lr" in group else 1.0), start


def check_length(trainer: Trainer, managers: Iterable[MetricsManager]) -> None:
    """Refuse a schedule by step for training data without a length.

    Raises:
        ValueError: parts of an epoch are not known.
    """
    by_step = any(manager.schedule is not None and manager.schedule_interval == "step" for manager in managers)
    if by_step and not math.isfinite(trainer.num_training_batches):
        raise ValueError(
            "A schedule with `interval: step` needs to know how many batches an epoch has, and the training data "
            "has no length. Use `interval: epoch`, or limit_train_batches with a whole number."
        )


def warn_of_unreached(trainer: Trainer, managers: Iterable[MetricsManager]) -> None:
    """Warn of what a schedule has after the end of the training."""
    number = trainer.max_epochs
    for manager in managers:
        if manager.schedule is not None and number is not None and number > 0:
            late = unreached(manager.schedule, number, manager.schedule_interval)
            if late:
                rank_zero_warn(text_of_unreached(late, number, manager.schedule_interval))


def text_of_unreached(late: Sequence[float], number: int, interval: Interval) -> str:
    """Sentence about what a schedule has after the last time that a training looks at it.

    Args:
        late: epochs that the schedule names.
        number: of epochs of the training.
        interval: at which the training moves on along the schedule.
    """
    end = f"begins at epoch {number - 1}" if interval == "epoch" else "ends"
    return (
        f"What the schedule has at epoch {', '.join(f'{epoch:g}' for epoch in late)} never comes: the last of "
        f"{number} epochs (max_epochs) {end}."
    )


def warn_of_long_warm_up(trainer: Trainer, warm_up: WarmUp | None) -> None:
    """Warn of a warm-up that the training ends within."""
    if warm_up is None:
        return
    try:
        length = TrainingLength.of(trainer).turns_left(Pace(warm_up.interval, 1), Progress())
    except ValueError:  # of data without a length
        return
    if length <= warm_up.length:
        rank_zero_warn(
            f"The training has {length} {warm_up.interval}s, the warm-up {warm_up.length}: the learning rate does not "
            f"reach its full value. Expected less, such as lr_scheduler.warm_up.length={max(1, length // 10)}."
        )


def warn_of_monitors(stages: Mapping[str, MetricsManager], monitors: Iterable[object]) -> None:
    """Warn of monitored sums whose coefficients move with a schedule, so that their meaning changes.

    Args:
        stages: managers by the stage of their log keys.
        monitors: keys of epoch values that callbacks and learning-rate schedulers follow.
    """
    monitored = {str(key) for key in monitors if key}
    for stage, manager in stages.items():
        if manager.schedule is None:
            continue
        keys = LogKeys(stage)
        weighted = {
            entry.name
            for entry in manager.entries.values()
            if not manager.type_weights.keys().isdisjoint(entry.type_keys(manager.type_names))
        }
        sums = keys.keys((WEIGHTED_SUM, *weighted))
        for key in sorted(monitored.intersection(sums)):
            rank_zero_warn(
                f"{key} is monitored, and the schedule of its components changes its meaning in training: "
                f"the best checkpoint, early stopping or learning rate would follow the coefficients as much as "
                f"the errors. Monitor a component such as {keys.key(next(iter(manager)))}, or leave the schedule out."
            )
