"""Monitored values: of an epoch, there when they are asked for, and numbers.

Whoever looks at one does so at a moment of its own: a ``ReduceLROnPlateau`` when it is stepped, ``EarlyStopping`` and
``ModelCheckpoint`` after a validation or at the end of a training epoch. :func:`check_monitors` refuses before the
start what can be known then; :class:`MonitorGuard` ends a training whose monitored value turns out to be NaN.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig

from harness.fields import labels_of
from harness.metrics import MetricsManager
from harness.metrics.components import WEIGHTED_SUM, MetricEntry
from harness.module import ForceFieldModule
from harness.support.lightning_private import saves_at_end_of_epoch, stops_at_end_of_epoch
from harness.support.log_keys import TRAIN_LOSS, TRAINING_STAGES, LogKeys
from harness.support.warn import OneWarning, is_rank_zero

if TYPE_CHECKING:
    from harness.job.build import Job

__all__ = ["MonitorError", "MonitorGuard", "check_monitors", "missing_labels", "monitored"]


def monitored(config: DictConfig, callbacks: list[Callback]) -> dict[str, str]:
    """Keys of the monitored values, by the setting or the callback that names them."""
    keys = {"monitor": config.monitor, "lr_scheduler.monitor": (config.lr_scheduler or {}).get("monitor")}
    keys |= {f"objectives[{number}]": key for number, key in enumerate(config.get("objectives") or [])}
    keys |= {f"the monitor of {type(callback).__name__}": getattr(callback, "monitor", None) for callback in callbacks}
    return {where: key for where, key in keys.items() if isinstance(key, str) and key}


# --- before the start ---


def check_monitors(job: Job) -> None:
    """Refuse to monitor a value that nothing logs, that is NaN for want of data, or that is not there when asked for.

    Raises:
        ValueError: with the value, the reason and the likely fix.
    """
    monitors = monitored(job.config, job.callbacks)
    _check_names(job.module, monitors)
    for where, key in monitors.items():
        found = LogKeys.of_error(key)
        if found is not None:
            _check_data(job, where, key, *found)
    if job.config.train:
        schedule = _Schedule.of(job.trainer, job.datamodule)
        for where, key in monitors.items():
            _check_validation(schedule, where, key)
        for asked in _asked(job.config, job.callbacks, schedule):
            asked.check(schedule)


def _check_names(module: ForceFieldModule, monitors: Mapping[str, str]) -> None:
    managers = {LogKeys(stage): each for stage, each in module.managers.items() if not stage.startswith("test")}
    valid = [keys.key(name) for keys, manager in managers.items() for name in manager.value_names]
    for where, monitor in monitors.items():
        is_error = LogKeys.of_error(monitor) is not None
        is_contribution = LogKeys(TRAIN_LOSS, section="contribution").name_in(monitor) is not None  # is not monitored
        if (is_error or is_contribution) and monitor not in valid:
            close = difflib.get_close_matches(monitor, valid, n=3, cutoff=0.3)
            raise ValueError(
                f"{where} is {monitor}, which is not among the values of an epoch. Did you mean {' or '.join(close)}? "
                f"They begin with {', '.join(keys.prefix for keys in managers)}."
            )


def _check_data(job: Job, where: str, key: str, keys: LogKeys, name: str) -> None:
    """Refuse a value of labels, or of an atom type, that its set does not have: it would be NaN in every epoch."""
    manager, data_set = job.module.managers.get(keys.stage), _set_of(keys.stage)
    if not isinstance(manager, MetricsManager) or data_set is None:
        return
    entry = next(
        (each for each in manager.entries.values() if name in (each.name, *each.value_keys(manager.type_names))), None
    )
    if entry is None:
        return
    labels, instead = labels_of(entry.field), f"Monitor a value that has data, such as {keys.key(WEIGHTED_SUM)}."
    for label in labels:
        missing, total = missing_labels(job.datamodule, data_set, manager, entry).get(label, (0, 1))
        if not total:
            raise ValueError(
                f"{where} is {key}, which would be NaN: all frames of {data_set} have the weight 0 for {label}. Look "
                f"at data.weights and the weights in the files, or give the component weights: false. {instead}"
            )
        if missing == total:
            raise ValueError(
                f"{where} is {key}, which would be NaN: none of the {total} frames of {data_set} has {label}. Are the "
                f"label keys right (data.keys)? {instead}"
            )
        if missing and not entry.ignore_nan:
            raise ValueError(
                f"{where} is {key}, which would be NaN: {missing} of the {total} frames of {data_set} have no {label} "
                f"or gaps in it, and the component does not leave them out. Give it ignore_nan: true. {instead}"
            )
    label = labels[0] if len(labels) == 1 else ""
    labelled = _ask(job.datamodule, "labelled_types", data_set).get(label)
    if labelled is None or name not in entry.type_keys(manager.type_names):
        return
    type_name = dict(zip(entry.type_keys(manager.type_names), manager.type_names, strict=True))[name]
    if type_name not in labelled:
        raise ValueError(
            f"{where} is {key}, which would be NaN: no frame of {data_set} has {label} of {type_name}; there are "
            f"{label} of {', '.join(sorted(labelled))}. Put frames with {type_name} into {data_set}. {instead}"
        )


def missing_labels(
    datamodule: Any, data_set: str, manager: MetricsManager, entry: MetricEntry
) -> Mapping[str, tuple[int, int]]:
    """Number of frames without a label or with gaps in it, and of all frames that a component counts, by field.

    Frames whose weight for the label is 0 do not count, unless the component takes no weights.

    Args:
        datamodule: of a mixture if it has a method ``missing_labels_by_set``, which answers for each set by its name.
        data_set: ``train``, ``val0``, …
        manager: with the names of the sets.
        entry: the component.
    """
    options = {"weighted": False} if entry.weights == "nowhere" else {}
    if entry.sets is None or not hasattr(datamodule, "missing_labels_by_set"):
        return _ask(datamodule, "missing_labels", data_set, **options)
    chosen = [manager.names.sets[index] for index in entry.sets]
    by_set = datamodule.missing_labels_by_set(data_set, **options)
    found: dict[str, tuple[int, int]] = {}
    for label, (missing, total) in (item for name in chosen if name in by_set for item in by_set[name].items()):
        before = found.get(label, (0, 0))
        found[label] = before[0] + missing, before[1] + total
    return found


def _set_of(stage: str) -> str | None:
    return "train" if stage in TRAINING_STAGES else stage if stage.startswith("val") else None


def _ask(datamodule: Any, method: str, data_set: str, **options: Any) -> Mapping[str, Any]:
    """Answer of a data module; empty if it has no such method, as one of the user's own may not."""
    return getattr(datamodule, method)(data_set, **options) if hasattr(datamodule, method) else {}


# --- when values are there, and when they are asked for ---


@dataclass(frozen=True)
class _Schedule:
    """Moments of validations, counted in training batches.

    Attributes:
        num_batches: of an epoch; None if it is not known.
        first: batches before the first validation; None if there is none, infinite if it is not known.
        setting: that the first validation follows from.
        only_at_the_end: each validation is at the end of an epoch, and each epoch has one.
    """

    num_batches: int | None
    first: float | None
    setting: str
    only_at_the_end: bool

    @classmethod
    def of(cls, trainer: Trainer, datamodule: Any) -> _Schedule:
        made: Any = trainer
        every, interval = made.check_val_every_n_epoch, made.val_check_interval
        number = _num_batches(made, datamodule)
        only_at_the_end = every == 1 and interval == 1.0
        if made.limit_val_batches == 0:
            return cls(number, None, "trainer.limit_val_batches=0", only_at_the_end)
        if every is not None and made.max_epochs is not None and 0 < made.max_epochs < every:
            setting = f"trainer.check_val_every_n_epoch={every} and max_epochs={made.max_epochs}"
            return cls(number, None, setting, only_at_the_end)
        setting = f"trainer.check_val_every_n_epoch={every}"
        if interval != 1.0:
            setting += f" and trainer.val_check_interval={interval}"
        if number is None or not isinstance(interval, int | float):
            return cls(number, math.inf if every != 1 else None if number == 0 else 0, setting, only_at_the_end)
        within = interval if isinstance(interval, int) else max(1, int(interval * number))
        return cls(number, within if every is None else (every - 1) * number + within, setting, only_at_the_end)


def _num_batches(trainer: Any, datamodule: Any) -> int | None:
    """Training batches of an epoch on each rank; None if they are not known before the start."""
    number: int | None = None
    with suppress(Exception):  # of a data module that is not ours, or wants more than there is before the start
        number = len(datamodule.train_dataloader())
    limit = trainer.limit_train_batches
    if number is None:
        return limit if isinstance(limit, int) else None
    return min(limit, number) if isinstance(limit, int) else int(limit * number)


def _check_validation(schedule: _Schedule, where: str, key: str) -> None:
    found = LogKeys.of_error(key)
    if found is not None and found[0].stage not in TRAINING_STAGES and schedule.first is None:
        raise ValueError(
            f"{where} is {key}, but there is no validation with {schedule.setting}. Change that, or monitor a value of "
            f"the training, such as monitor={LogKeys(TRAIN_LOSS).key(WEIGHTED_SUM)}."
        )


@dataclass(frozen=True)
class _Asked:
    """The first time that somebody asks for a monitored value.

    Attributes:
        who: for the message.
        key: of the value.
        batches: training batches before that; None if it is after the first validation, whenever that is.
        is_last: it is at the end of an epoch, after the values of the training.
        fix: a setting that helps where the value comes later.
    """

    who: str
    key: str
    batches: float | None
    is_last: bool
    fix: str

    def check(self, schedule: _Schedule) -> None:
        """Refuse if the value is not there by then."""
        found = LogKeys.of_error(self.key)
        if found is None or schedule.first is None or schedule.num_batches is None:
            return
        asked = schedule.first if self.batches is None else self.batches
        if found[0].stage not in TRAINING_STAGES:
            is_there, since = schedule.first <= asked, f"the first validation ({schedule.setting})"
        else:
            of_first_epoch = schedule.num_batches
            is_there = asked > of_first_epoch or (asked == of_first_epoch and self.is_last)
            since = "the end of the first epoch"
        if not is_there:
            raise ValueError(
                f"{self.who} is asked for {self.key} after {asked:g} batches, and that is there only after {since}: an "
                f"epoch has {schedule.num_batches} batches. {self.fix}"
            )


def _asked(config: DictConfig, callbacks: list[Callback], schedule: _Schedule) -> Iterator[_Asked]:
    """First moments at which scheduler and callbacks ask for values, as Lightning has them."""
    scheduler: Any = config.lr_scheduler or {}
    batches = schedule.num_batches
    if batches is None:
        return
    target = str((scheduler.get("scheduler") or {}).get("_target_", "")) if "scheduler" in scheduler else ""
    if target.endswith("ReduceLROnPlateau") and scheduler.get("monitor") and scheduler.get("strict", True):
        by_step, frequency = scheduler.get("interval", "epoch") == "step", int(scheduler.get("frequency", 1))
        least = math.ceil((schedule.first or 0) / (1 if by_step else max(batches, 1)))
        is_validation = (LogKeys.of_error(scheduler.monitor) or (LogKeys(TRAIN_LOSS),))[0].stage not in TRAINING_STAGES
        yield _Asked(
            "The learning-rate scheduler",
            scheduler.monitor,
            frequency * (1 if by_step else batches),
            not by_step,
            f"Ask less often, with +lr_scheduler.frequency={least}, or validate earlier."
            if is_validation
            else "Use lr_scheduler.interval=epoch.",
        )
    for callback in callbacks:
        key = getattr(callback, "monitor", None)
        at_end: bool | None
        if isinstance(callback, EarlyStopping) and key and callback.strict:
            at_end = stops_at_end_of_epoch(callback)
        elif isinstance(callback, ModelCheckpoint) and key:
            at_end = saves_at_end_of_epoch(callback)
            if at_end is not False and (at_end or schedule.only_at_the_end):  # then it waits, or leaves one out
                continue
        else:
            continue
        at_end = schedule.only_at_the_end if at_end is None else at_end
        name = type(callback).__name__
        fix = f"Monitor a value of validation, or validate with trainer.val_check_interval=1.0 in each epoch ({name})."
        if at_end:
            fix = f"Leave out check_on_train_epoch_end of {name}, which then looks after each validation."
        yield _Asked(name, key, batches if at_end else None, at_end, fix)


# --- in the training ---


class MonitorError(ValueError):
    """A monitored value is NaN; raised on all ranks alike, with the same message."""

    on_all_ranks = True


class MonitorGuard(Callback):
    """Ends a training whose monitored value is NaN: no epoch would be better than another.

    That is an error after the first validation, or the first epoch for a value of the training. Where a value has been
    a number before, one warning says so, unless ``EarlyStopping`` would take it for an ordinary end. It is the first of
    the callbacks, so that none has acted on the value; a loss that is NaN has been reported by the guard of the step.

    Args:
        monitors: keys by the setting or callback that names them, see :func:`monitored`.

    Raises:
        MonitorError: on all ranks, which hold the same values.
    """

    def __init__(self, monitors: Mapping[str, str]) -> None:
        self.monitors = dict(monitors)
        self._numbers: set[str] = set()
        self._warn = OneWarning()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at monitored values of validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = {key: float(value) for key, value in trainer.callback_metrics.items() if key in self._keys(False)}
            self._look(trainer, values, "the validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at monitored values of the training."""
        if keys := self._keys(True):
            reports = cast(ForceFieldModule, pl_module).training_so_far()
            values: dict[str, float] = {}
            for stage, report in reports.items():
                values |= LogKeys(stage).row(report.values)
            self._look(trainer, {key: value for key, value in values.items() if key in keys}, "the training")

    def _keys(self, of_training: bool) -> set[str]:
        found = {key: LogKeys.of_error(key) for key in self.monitors.values()}
        return {key for key, of in found.items() if of and (of[0].stage in TRAINING_STAGES) == of_training}

    def _look(self, trainer: Trainer, values: Mapping[str, float], what: str) -> None:
        for where, key in self.monitors.items():
            value = values.get(key, 0.0)
            ends = not math.isfinite(value) and _would_stop(trainer, key)
            if not (ends or math.isnan(value)):
                if key in values:
                    self._numbers.add(key)
                continue
            text = f"{where} is {key}, which is {value} in {what} of epoch {trainer.current_epoch}"
            if ends or key not in self._numbers:
                raise MonitorError(
                    f"{text}: no epoch can be told to be better than another. Either the set has no data for it "
                    f"(labels, or atoms of the type), or the predictions are not finite. Monitor a value that has "
                    f"data, such as {_weighted_sum_beside(key)}, or try a lower learning rate."
                )
            if is_rank_zero():
                self._warn(f"{text}; it was a number before. This epoch does not count as the best.")

    def state_dict(self) -> dict[str, Any]:
        """Keys of the values that have been numbers."""
        return {"numbers": sorted(self._numbers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up those of a checkpoint."""
        self._numbers = set(state_dict["numbers"])


def _weighted_sum_beside(key: str) -> str:
    found = LogKeys.of_error(key)
    return (found[0] if found else LogKeys("val0")).key(WEIGHTED_SUM)


def _would_stop(trainer: Trainer, key: str) -> bool:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(each, EarlyStopping) and each.monitor == key and each.check_finite for each in callbacks)
