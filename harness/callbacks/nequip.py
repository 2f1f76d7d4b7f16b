"""Callbacks that change or log the coefficients of a loss, with the arguments of NequIP's callbacks.

They work on any module whose ``loss`` is a manager with ``set_coeffs`` and ``entries``: :class:`ForceFieldModule
<harness.module.lightning.ForceFieldModule>`, ``NequIPLightningModule``, or your own. Where the manager is this
package's, ``schedule=`` on the loss does the same and more, see :mod:`harness.schedules`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from harness.metrics import MetricsManager, RunningStep
from harness.module import ForceFieldModule, LogKeys, Step, is_nth_step_done, log_to_all, logged_step
from harness.module.coefficient_control import loss_of, refuse_other_controllers
from harness.schedules import PiecewiseConstant
from harness.support.checks import whole_number
from harness.support.lightning_private import last_step_of_epoch
from harness.support.log_keys import TRAIN_LOSS, Level
from harness.support.text import did_you_mean

__all__ = ["LinearLossCoefficientScheduler", "LossCoefficientMonitor", "LossCoefficientScheduler"]


class _EpochScheduler(Callback, ABC):
    """Sets coefficients with the first batch of an epoch that this process sees.

    Not with the hook for the start of an epoch, which Lightning leaves out when it goes on in the middle of one.
    """

    controls_coefficients = True

    def __init__(self) -> None:
        self._epoch: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the names, and that nothing else moves the coefficients."""
        self.check_job(trainer, pl_module, stage)
        if stage == "fit":
            self._epoch = None

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse names that the loss does not have, and another part that moves the coefficients.

        Raises:
            TypeError, ValueError: with the valid names.
        """
        if stage == "fit":
            refuse_other_controllers(self, trainer, pl_module)
            self._check_loss(trainer, loss_of(pl_module))

    @abstractmethod
    def _check_loss(self, trainer: Trainer, loss: Any) -> None:
        """Refuse names that the loss does not have, or, where it would drop them, that are left out."""

    @abstractmethod
    def coeffs_at(self, epoch: int) -> dict[str, float]:
        """Coefficients of an epoch; empty where they do not change."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the coefficients of the epoch, once."""
        if trainer.current_epoch != self._epoch:
            self._epoch = trainer.current_epoch
            coeffs = self.coeffs_at(self._epoch)
            if coeffs:
                loss_of(pl_module).set_coeffs(coeffs)


class LossCoefficientScheduler(_EpochScheduler):
    """Changes coefficients of the loss at given epochs: a step function of the epoch.

    A component that is not named keeps its coefficient; the manager of NequIP would drop it from the loss, and there
    all of them have to be named. All are normalised to sum to 1, unless the loss takes them as given. What holds
    depends on the epoch alone, so that a restart at any epoch is right.

    Args:
        schedule: ``{epoch: {component: coefficient}}``.

    Raises:
        ValueError: an epoch or coefficient below 0; when training starts, an unknown component, with the valid ones.

    After NequIP's callback of the same name (https://nequip.readthedocs.io).
    """

    def __init__(self, schedule: Mapping[int, Mapping[str, float]]) -> None:
        super().__init__()
        self.schedule = PiecewiseConstant(cast(Any, schedule))

    def _check_loss(self, trainer: Trainer, loss: Any) -> None:
        _check_names(loss, self.schedule.names)

    def coeffs_at(self, epoch: int) -> dict[str, float]:
        """Coefficients that the milestones so far have set."""
        return self.schedule(epoch)


class LinearLossCoefficientScheduler(_EpochScheduler):
    r"""Moves coefficients linearly from their values at one epoch to others, over a number of epochs.

    With the coefficients :math:`c_k` that hold at ``start_epoch`` :math:`s`, the final ones :math:`f_k` (both are
    normalised, unless the loss takes them as given), and the number :math:`n` of transition epochs

    .. math:: c_k(e) = c_k + \min\Big(1, \frac{e - s}{n}\Big)\,(f_k - c_k), \qquad e \ge s

    Several of them make several stages, each of which begins with what the one before has led to. What holds depends on
    the epoch alone: there is no state.

    Args:
        final_coeffs: ``{component: coefficient}``, in the end.
        transition_epochs: number of epochs from the old to the new ones, at least 1.
        start_epoch: last epoch with the old coefficients.

    Raises:
        ValueError: a number out of range; when training starts, an unknown component, or stages that overlap.

    After NequIP's callback of the same name (https://nequip.readthedocs.io).
    """

    counts_once = True

    def __init__(self, final_coeffs: Mapping[str, float], transition_epochs: int, start_epoch: int = 0) -> None:
        super().__init__()
        for name, value, least in (("transition_epochs", transition_epochs, 1), ("start_epoch", start_epoch, 0)):
            whole_number(f"`{name}`", value, least)
        checked = PiecewiseConstant({start_epoch: final_coeffs})(start_epoch)
        total = sum(checked.values())
        if not total > 0:
            raise ValueError(f"`final_coeffs` are all 0, found {checked}; at least one must be above 0.")
        self.final_coeffs = {name: coeff / total for name, coeff in checked.items()}
        self._given = checked
        self.transition_epochs = transition_epochs
        self.start_epoch = start_epoch
        self._initial: dict[str, float] | None = None
        self._as_given = False
        self._stages: list[LinearLossCoefficientScheduler] = []

    @property
    def state_key(self) -> str:
        """Key in checkpoints, with the stage: several of these callbacks may be in one training."""
        return f"{type(self).__qualname__}_{self.start_epoch}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the stages; keep the coefficients that they start from."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._initial is None:
            names = dict.fromkeys(name for each in self._stages for name in each.final_coeffs)
            configured = {name: entry.coeff for name, entry in loss_of(pl_module).entries.items()}
            self._initial = {name: coeff for name, coeff in configured.items() if coeff is not None}
            self._initial |= {name: 0.0 for name in names if name not in self._initial}

    def _check_loss(self, trainer: Trainer, loss: Any) -> None:
        """Refuse names that the loss does not have, and stages that overlap."""
        self._as_given = isinstance(loss, MetricsManager) and loss.normalisation == "as_given"
        found = [each for each in _callbacks(trainer) if isinstance(each, LinearLossCoefficientScheduler)]
        self._stages = sorted(found, key=lambda stage: stage.start_epoch)
        for before, after in zip(self._stages, self._stages[1:], strict=False):
            if after.start_epoch < before.start_epoch + before.transition_epochs:
                raise ValueError(
                    f"Two stages of LinearLossCoefficientScheduler overlap: one goes from epoch "
                    f"{before.start_epoch} to {before.start_epoch + before.transition_epochs}, and one starts at "
                    f"{after.start_epoch}. Start it later, or shorten the first."
                )
        names = dict.fromkeys(name for each in self._stages for name in each.final_coeffs)
        _check_names(loss, tuple(names), whole=False)

    def coeffs_at(self, epoch: int) -> dict[str, float]:
        """Coefficients that the stages so far have led to; the first of the callbacks sets them for all."""
        if self._stages[0] is not self or epoch <= self.start_epoch:
            return {}
        current = dict(self._initial or {})
        for stage in self._stages:
            done = min(max(epoch - stage.start_epoch, 0) / stage.transition_epochs, 1.0)
            for name, final in (stage._given if self._as_given else stage.final_coeffs).items():
                current[name] += done * (final - current[name])
        return current


class LossCoefficientMonitor(Callback):
    """Logs the coefficients of the loss as ``loss_coeff/{component}``, every so many epochs or batches.

    :class:`~harness.module.ForceFieldModule` logs them by itself: at all epochs under this key, and on the steps that
    the trainer logs as ``loss_coeff_step/{component}``. There the callback adds further batches, under the latter.

    Args:
        interval: ``epoch`` or ``batch``.
        frequency: number of intervals from one to the next, at least 1.

    Raises:
        ValueError: another interval, or a frequency below 1.

    After NequIP's callback of the same name (https://nequip.readthedocs.io).
    """

    def __init__(self, interval: Literal["epoch", "batch"], frequency: int) -> None:
        if interval not in ("epoch", "batch"):
            raise ValueError(f"`interval` is epoch or batch, found {interval!r}.")
        whole_number("`frequency`", frequency)
        self.interval = interval
        self.frequency = frequency
        self._step = 0
        self._used: RunningStep | None = None

    def on_train_values(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        """Keep the coefficients of the step; learnt ones change with the optimizer's step."""
        self._used = step.running

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the coefficients that the batch was trained with."""
        is_step, self._step = trainer.global_step != self._step, trainer.global_step
        if self.interval == "batch" and is_step and is_nth_step_done(trainer, self.frequency):
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
            logged_already = isinstance(pl_module, ForceFieldModule) and is_nth_step_done(trainer, every)
            if not logged_already:
                self._log(trainer, pl_module, logged_step(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the coefficients that the epoch ends with."""
        due = self.interval == "epoch" and trainer.current_epoch % self.frequency == 0
        if due and not isinstance(pl_module, ForceFieldModule):
            self._log(trainer, pl_module, last_step_of_epoch(trainer))

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        loss = loss_of(pl_module)
        if isinstance(loss, MetricsManager):
            own = loss.effective_coeffs() if self._used is None else self._used.value().to_report().coeffs
            coeffs: dict[str, float] = own | loss.type_weights
        else:
            coeffs = {name: entry.coeff for name, entry in loss.entries.items() if entry.coeff is not None}
        level: Level = "step" if isinstance(pl_module, ForceFieldModule) else "epoch"
        log_to_all(trainer, LogKeys(TRAIN_LOSS, level, "coefficient").row(coeffs), step)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _check_names(loss: Any, names: tuple[str, ...], whole: bool = True) -> None:
    """Refuse names that the loss does not have; with ``whole``, all of a loss that would drop the others."""
    valid = list(loss.entries)
    if isinstance(loss, MetricsManager):
        valid += [key for entry in loss.entries.values() for key in entry.type_keys(loss.type_names)]
    unknown = [name for name in names if name not in valid]
    if unknown:
        meant = did_you_mean(unknown[0], valid)
        listed = ", ".join(map(repr, unknown))
        raise ValueError(f"The loss has no component {listed}. {meant}Valid names: {', '.join(valid)}.")
    if whole and not isinstance(loss, MetricsManager):
        dropped = [name for name, entry in loss.entries.items() if entry.coeff is not None and name not in names]
        if dropped:
            raise ValueError(
                f"The schedule does not name {', '.join(dropped)}, and {type(loss).__module__}.{type(loss).__name__} "
                f"drops components that are not named from the loss. Name all of them at every epoch."
            )
