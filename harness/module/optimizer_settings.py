"""Settings that an optimizer steps with: its own and its scheduler's, under a warm-up and the stage of a schedule.

They replace the groups' settings while the optimizer steps, and are taken back behind the step. So the scheduler takes
its turns undisturbed, and a checkpoint has nothing of them: what holds is a function of the epoch and the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import LBFGS, Optimizer

from harness.module.bounds import wrong_settings
from harness.module.learning_rates import WarmUp
from harness.schedules import NO_SETTINGS, Schedule, Settings

__all__ = ["OptimizerSettings", "check_averaging", "ignores_loss"]

_FIXED = ("params", "initial_lr", "name", "foreach", "fused", "capturable", "differentiable", "maximize")


class OptimizerSettings:
    """Settings of an optimizer's groups at a position of the training.

    Args:
        warm_up: factor of the learning rates at the beginning; None for none.
        schedule: whose stages have settings; None for none.
        groups: settings of the groups of parameters as they were asked for.
        defaults: settings that the optimizer was given for all groups.

    Raises:
        ValueError: a stage has a setting that the optimizer does not have, or cannot take up within a training.
    """

    def __init__(
        self,
        warm_up: WarmUp | None = None,
        schedule: Schedule | None = None,
        groups: Sequence[Mapping[str, Any]] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.warm_up = warm_up
        self._schedule = schedule
        self._groups = groups
        self._own_values = defaults or {}
        self._own: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._check()

    def _check(self) -> None:
        schedule = self._schedule
        valid = [name for name in self._own_values if name not in _FIXED]
        amsgrad = self._own_values.get("amsgrad", False)
        for epoch in () if schedule is None else (0.0, *schedule.breakpoints):
            settings = self.stage(epoch).optimizer
            rest = {name: value for name, value in settings.items() if name != "lr"}  # 0 is one for a stage
            wrong = wrong_settings(Optimizer, rest, "schedule: optimizer")
            if wrong:
                raise ValueError(f"{' '.join(wrong)} (of the stage at epoch {epoch:g})")
            for name, value in settings.items():
                where = f"schedule: the stage at epoch {epoch:g} has {name}={value}"
                if name not in valid:
                    raise ValueError(
                        f"{where}, which the optimizer does not have, or cannot change within a training. Valid names: "
                        f"{', '.join(valid)}."
                    )
                if name != "lr" and self._groups and all(self._is_own(group, name) for group in self._groups):
                    raise ValueError(
                        f"{where}, but every group of parameters has a {name} of its own, which it keeps. Give the "
                        f"groups that a stage is to change theirs by optimizer.{name}."
                    )
            before, amsgrad = amsgrad, settings.get("amsgrad", self._own_values.get("amsgrad", False))
            if amsgrad and not before:
                raise ValueError(
                    f"schedule: from epoch {epoch:g} on, amsgrad=True comes after steps without it, of which the "
                    f"largest second moments are not known. A stage can switch AMSGrad off, not on."
                )

    def _is_own(self, group: Mapping[str, Any], name: str) -> bool:
        """True if a group has another value of a setting than the optimizer has for all."""
        own, default = (
            tuple(each) if isinstance(each, list) else each for each in (group.get(name), self._own_values[name])
        )
        return bool(own != default)

    def stage(self, epoch: float) -> Settings:
        """Settings of the schedule's stage at an epoch."""
        return NO_SETTINGS if self._schedule is None else self._schedule.settings(epoch)

    def apply(self, optimizer: Optimizer, epoch: float, step: int) -> None:
        """Give the groups the settings of a position, until :meth:`take_back`.

        A learning rate of a stage is that of all groups, times the factor by which a group's differs from the
        optimizer's. Any other setting is that of the groups that have none of their own.

        Args:
            optimizer: whose groups are changed.
            epoch: with the part of it that is done, where the schedule moves by step.
            step: of the optimizer, from 0.
        """
        self.take_back()
        settings = self.stage(epoch).optimizer
        factor = 1.0 if self.warm_up is None else self.warm_up.factor(int(epoch), step)
        for group, asked in zip(optimizer.param_groups, self._groups, strict=False):
            changed = {name: value for name, value in settings.items() if not self._is_own(asked, name)}
            if "lr" in settings:
                base = self._own_values["lr"]
                changed["lr"] = settings["lr"] * (float(asked["lr"]) / float(base) if base else 1.0)
            if factor != 1 and "lr" in group:
                changed["lr"] = changed.get("lr", group["lr"]) * factor
            self._own.append((group, {name: group[name] for name in changed}))
            group.update(changed)

    def take_back(self) -> None:
        """Give the groups back what they had before :meth:`apply`."""
        for group, own in self._own:
            group.update(own)
        self._own = []

    @contextmanager
    def in_effect(self, optimizer: Optimizer, epoch: float, step: int) -> Iterator[None]:
        """Let the groups have the settings of a position for a while."""
        self.apply(optimizer, epoch, step)
        try:
            yield
        finally:
            self.take_back()


def check_averaging(schedule: Schedule | None, callbacks: Sequence[object]) -> None:
    """Refuse a stage with averaged weights in a training that averages none.

    Raises:
        ValueError: no callback takes the decay of a stage.
    """
    if schedule is None or any(getattr(callback, "follows_stages", False) for callback in callbacks):
        return
    for epoch in (0.0, *schedule.breakpoints):
        decay = schedule.settings(epoch).average_decay
        if decay is not None:
            raise ValueError(
                f"schedule: the stage at epoch {epoch:g} has average_decay={decay:g}, but no callback of this training "
                f"averages weights by it. Add harness.callbacks.ExponentialMovingAverage: callbacks=[default,ema]."
            )


def ignores_loss(optimizer: Optimizer) -> bool:
    """True for optimizers of torch but LBFGS: they look at gradients alone, and others may read the loss."""
    return type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, LBFGS)
