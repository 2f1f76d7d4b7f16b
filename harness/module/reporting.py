"""Rows of values for all loggers of a trainer: those of a step, those of an epoch, and their axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer

from harness.metrics import WEIGHTED_SUM, MetricsManager, Report
from harness.support.lightning_private import logged_step
from harness.support.log_keys import TRAIN_LOSS, TRAIN_METRIC, TRAINING_STAGES, LogKeys

__all__ = [
    "AxesLogger",
    "SparseLogger",
    "define_axes",
    "define_axes_of_stages",
    "epoch_row",
    "leave_out",
    "log_to_all",
    "step_row",
    "types_with_data",
]


@runtime_checkable
class AxesLogger(Protocol):
    """A logger that draws values of epochs against the epoch, and values of steps against the step."""

    def define_axes(self, epoch: list[str], step: list[str], minimised: list[str]) -> None:
        """Take keys of values before any is logged; for those in ``minimised``, smaller is better."""


@runtime_checkable
class SparseLogger(Protocol):
    """A logger whose rows need not have the same names."""

    def leave_out(self, names: Iterable[str]) -> None:
        """Take keys of values without data, which are NaN: none of them is logged as long as it is NaN."""


def types_with_data(report: Report, manager: MetricsManager) -> list[str]:
    """Atom types that any per-type component of a report has data of, in the order of the manager."""
    entries = [entry for entry in manager.entries.values() if entry.per_type]
    keys = zip(*(entry.type_keys(manager.type_names) for entry in entries), strict=True)
    return [name for name, own in zip(manager.type_names, keys, strict=False) if any(_has_data(report, k) for k in own)]


def _has_data(report: Report, key: str) -> bool:
    # a maximum has no count of its own
    return report.counts[key] > 0 if key in report.counts else not math.isnan(report.values.get(key, math.nan))


def leave_out(trainer: Trainer, keys: LogKeys, report: Report, manager: MetricsManager) -> None:
    """Hand every :class:`SparseLogger` the values of atom types that a report has no data of.

    A universal model knows 89 types, of which the data may have two.

    Args:
        trainer: whose loggers are asked.
        keys: of the stage.
        report: of the step or epoch.
        manager: that it is of.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, SparseLogger)]
    if not loggers:
        return
    present = set(types_with_data(report, manager))
    absent = [name for name in manager.type_names if name not in present]
    names = [key for entry in manager.entries.values() if entry.per_type for key in entry.type_keys(absent)]
    for logger in loggers:
        logger.leave_out(keys.keys(names))


def log_to_all(trainer: Trainer, values: Mapping[str, Any], step: int | None = None, epoch: int | None = None) -> None:
    """Log one row to every logger of a trainer; ranks other than 0 do nothing.

    Args:
        trainer: whose loggers get the row.
        values: by log key.
        step: of the row, :func:`~harness.support.lightning_private.logged_step` if not given.
        epoch: a column of the row, the current one if not given.
    """
    if not trainer.is_global_zero:
        return
    row = {**values, "epoch": trainer.current_epoch if epoch is None else epoch}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=logged_step(trainer) if step is None else step)


def define_axes(
    trainer: Trainer, epoch: Sequence[str] = (), step: Sequence[str] = (), minimised: Sequence[str] = ()
) -> None:
    """Hand keys of values to the loggers that are an :class:`AxesLogger`, before any value is logged."""
    for logger in trainer.loggers:
        if isinstance(logger, AxesLogger):
            logger.define_axes(epoch=list(epoch), step=list(step), minimised=list(minimised))


def step_row(report: Report, loss: MetricsManager, train_metrics: Report | None = None) -> dict[str, float]:
    """Errors, coefficients and contributions of the loss in a step, and errors of the train metrics.

    Args:
        report: of the loss.
        loss: its manager.
        train_metrics: report of these in the same step.
    """
    row = LogKeys(TRAIN_LOSS, "step").row(report.values)
    row |= LogKeys(TRAIN_LOSS, "step", "coefficient").row(report.coeffs | loss.type_weights)
    row |= LogKeys(TRAIN_LOSS, "step", "contribution").row(report.contributions)
    if train_metrics is not None:
        row |= LogKeys(TRAIN_METRIC, "step").row(train_metrics.values)
    return row


def epoch_row(stage: str, report: Report, manager: MetricsManager) -> dict[str, float]:
    """Errors of a stage in an epoch; contributions, and coefficients of the loss and of schedules.

    Args:
        stage: of the log keys.
        report: of the epoch.
        manager: that it is of.
    """
    row = LogKeys(stage).row(report.values)
    if stage == TRAIN_METRIC:
        return row
    if stage == TRAIN_LOSS or manager.schedule is not None:
        row |= LogKeys(stage, section="coefficient").row(report.coeffs | manager.type_weights)
    return row | LogKeys(stage, section="contribution").row(report.contributions)


def define_axes_of_stages(trainer: Trainer, stages: Mapping[str, MetricsManager], callbacks: Sequence[Any]) -> None:
    """Define which keys belong to epochs and which to steps, and which values are better if smaller.

    Args:
        trainer: whose loggers draw the values.
        stages: managers by the stage of their log keys.
        callbacks: of the trainer; those that control coefficients have ``controls_coefficients = True``.
    """
    controlled = any(getattr(callback, "controls_coefficients", False) for callback in callbacks)
    epoch: list[str] = []
    step: list[str] = []
    minimised: set[str] = set()
    for stage, manager in stages.items():
        weights = (*manager.ever_weighted, *manager.type_weights)
        errors = LogKeys(stage).keys(manager.value_names)
        epoch += errors
        if stage in TRAINING_STAGES:
            step += LogKeys(stage, "step").keys(manager.value_names)
        if stage == TRAIN_LOSS:
            step += LogKeys(stage, "step", "contribution").keys(manager.ever_weighted)
            step += LogKeys(stage, "step", "coefficient").keys(weights)
        if stage != TRAIN_METRIC:
            epoch += LogKeys(stage, section="contribution").keys(manager.ever_weighted)
            if stage == TRAIN_LOSS or manager.schedule is not None:
                epoch += LogKeys(stage, section="coefficient").keys(weights)
        unordered = {
            name
            for entry in manager.entries.values()
            if entry.metric.higher_is_better
            for name in (entry.name, *entry.value_keys(manager.type_names))
        }
        moves = manager.schedule is not None or manager.weighting is not None
        if moves or (controlled and stage == TRAIN_LOSS):  # sums of coefficients that move: their least says nothing
            unordered.add(WEIGHTED_SUM)
        minimised.update(set(errors).difference(LogKeys(stage).keys(unordered)))
    define_axes(trainer, epoch=sorted(epoch), step=sorted(step), minimised=sorted(minimised))
