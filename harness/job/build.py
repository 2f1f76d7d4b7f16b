"""Parts of a job, each made once from its section of the config; nothing is written or sent."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from filelock import FileLock
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.console import Console

from harness.config.builders import build as build_section
from harness.config.builders import build_part
from harness.distributed import START_LIMIT, launched_rank
from harness.job.best import ComparableScores
from harness.job.failures import TrainingPosition
from harness.job.made_with import MadeWith, RecordedStatistics, made_with
from harness.job.match import Start, types_of_checkpoint
from harness.job.monitors import MonitorGuard, monitored
from harness.job.recorded_model import ReferenceChoice
from harness.job.trainer import make_strategy, make_trainer, withheld
from harness.metrics import MetricsManager
from harness.module import ForceFieldModule, freeze
from harness.schedules import Interval, Schedule, as_schedule, check_interval
from harness.support.configs import take_out

__all__ = ["Job", "build", "build_module", "follow_schedule", "read_schedule", "time_limit"]


_SHIFTS = "statistics.energy_shifts"
"""Source of a model's fitted reference energies in ``needs``."""


@dataclass
class Job:
    """Parts of a training on this rank."""

    config: DictConfig
    console: Console
    """Console that prints on rank 0 only."""
    datamodule: LightningDataModule
    """Data module, set up."""
    module: ForceFieldModule
    callbacks: list[Callback]
    """As configured; those that have no use, such as a progress bar that is switched off, are not in the trainer."""
    loggers: list[Logger]
    trainer: Trainer
    position: TrainingPosition
    """Callback that knows epoch and step; also among ``trainer.callbacks``."""
    device_notes: list[logging.LogRecord]
    """Lines of Lightning about the devices, printed once the job starts."""
    resume_from: str | None = None
    """Checkpoint of an interrupted run in the same output directory."""
    notes: list[str] = field(default_factory=list)
    """Lines about the checkpoint that it goes on from or tests, printed once the job starts."""
    parameters: list[str] = field(default_factory=list)
    """Lines about the numbers of trained and frozen parameters and their groups, printed once the job starts."""
    references: ReferenceChoice = "keep"
    """Reference energies that the model is given where a training starts from the weights of a checkpoint."""
    lock: FileLock | None = None
    """Of the output directory, on rank 0, for the life of the process."""


def build(config: DictConfig) -> Job:
    """Make all parts of a job; :func:`harness.job.preflight.check` says whether they can work together.

    Global random states are seeded, since weights are drawn.

    Raises:
        ValueError, TypeError, KeyError: a part that cannot be made of its section.
        hydra.errors.InstantiationException: likewise.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)
    start = Start.of(config)
    record = None if start is None else made_with(start.path)
    datamodule = _build_data(config)
    statistics = _statistics(record, datamodule)
    if hasattr(datamodule, "model_statistics") and isinstance(statistics, RecordedStatistics):
        vars(datamodule)["model_statistics"] = statistics
    if hasattr(datamodule, "reference_setting"):
        vars(datamodule)["reference_setting"] = _reference_setting(config.model)
    module = build_module(config, datamodule, statistics)
    callbacks: list[Callback] = _parts(config.callbacks, "callbacks")
    adaptive = build_part(config.adaptive, "adaptive") if config.adaptive else None
    if isinstance(adaptive, Callback):
        callbacks.append(adaptive)
    elif adaptive is not None:
        module.loss.weigh_by(adaptive)
    loggers: list[Logger] = _parts(config.logger, "logger")
    position = TrainingPosition()
    with withheld() as device_notes:
        own = [position, MadeWith(config, datamodule, statistics), ComparableScores(config, datamodule)]
        guard = MonitorGuard(monitored(config, callbacks))  # first: before a callback acts on a value
        trainer = make_trainer(config, make_strategy(config, module.model), [guard, *callbacks, *own], loggers)
    vars(trainer)["datamodule"] = datamodule  # as fit() and test() set it; here so that checks find it
    return Job(config, _console(), datamodule, module, callbacks, loggers, trainer, position, device_notes)


def _parts(group: DictConfig | None, name: str) -> list[Any]:
    """Objects of the sections of a group, but for those that are null."""
    sections: dict[str, Any] = dict(group.items()) if group else {}  # type: ignore[arg-type]
    return [build_part(section, f"{name}.{key}") for key, section in sections.items() if section]


def _console() -> Console:
    console = Console(quiet=launched_rank() != 0)
    if not console.is_terminal:
        console.width = 140  # a log file has room for every column
    return console


def _build_data(config: DictConfig) -> LightningDataModule:
    """The data module, set up; with the types of a checkpoint that the job goes on from or tests."""
    types = types_of_checkpoint(config)
    datamodule: LightningDataModule = instantiate(config.data, **types)
    try:
        datamodule.setup("fit")
    except ValueError as error:
        if not types or "type names" not in str(error):
            raise
        raise ValueError(f"{error}. These are the types of {Start.of(config)}, whose model has no others.") from error
    return datamodule


def _statistics(record: dict[str, Any] | None, datamodule: LightningDataModule) -> Any:
    """Statistics that the model is built of: those of the checkpoint, whose model it is, or those of the data."""
    now = getattr(datamodule, "statistics", None)
    recorded = (record or {}).get("statistics")
    return RecordedStatistics(recorded, now) if recorded else now


def _reference_setting(section: DictConfig) -> str | None:
    """Setting of a model's section that takes reference energies in eV by type; None without one."""
    needs = section.get("needs")
    asked = [str(name) for name, source in needs.items() if source == _SHIFTS] if isinstance(needs, DictConfig) else []
    known = [name for name in ("energy_shifts", "per_type_energy_shifts") if name in section]
    return next((f"model.{name}" for name in (*known, *asked)), None)


def build_module(config: DictConfig, datamodule: LightningDataModule, statistics: Any = None) -> ForceFieldModule:
    """The Lightning module of a config; type names, number of sets and statistics come from the data.

    Args:
        config: the whole configuration.
        datamodule: set up.
        statistics: of the training set that the model is built of; those of ``datamodule`` if None.
    """
    type_names = getattr(datamodule, "type_names", None)
    set_names = list(getattr(datamodule, "set_names", None) or ()) or None
    statistics = getattr(datamodule, "statistics", None) if statistics is None else statistics
    names = None if type_names is None else list(type_names)
    model = build_section(config.model, {"statistics": statistics, "type_names": names, "set_names": set_names})
    module = ForceFieldModule(
        model=model,
        loss=config.loss,
        train_metrics=config.train_metrics,
        val_metrics=config.val_metrics,
        test_metrics=config.test_metrics,
        optimizer=config.optimizer,
        lr_scheduler=instantiate(config.lr_scheduler) if config.lr_scheduler else None,
        type_names=type_names,
        num_val_sets=len(getattr(datamodule, "val_sets", [None])),
        num_test_sets=len(getattr(datamodule, "test_sets", [None])),
        group_names=getattr(datamodule, "group_names", None),
        set_names=set_names,
        labelled_sets=_labelled_sets(datamodule),
    )
    freeze(module.model, config.get("freeze") or [])
    if config.schedule:
        follow_schedule(module.loss, *read_schedule(config.schedule))
    return module


def _labelled_sets(datamodule: LightningDataModule) -> Mapping[str, Collection[str]] | None:
    """Data sets of a mixture that have a label in any training frame, by field; None for other data."""
    return datamodule.labelled_sets("train") if hasattr(datamodule, "labelled_sets") else None


def read_schedule(section: DictConfig) -> tuple[Schedule, Interval]:
    """The schedule of a config's section, and its ``interval``: an argument of what follows, not of the schedule."""
    arguments, interval = take_out(section, "interval", "epoch")
    return as_schedule(instantiate(arguments)), check_interval(interval, "schedule.interval")


def follow_schedule(loss: MetricsManager, schedule: Schedule, interval: Interval = "epoch") -> None:
    """Let the schedule of a config drive the loss, unless it has neither coefficients nor other settings.

    Raises:
        ValueError: the loss has a schedule of its own.
    """
    if not as_schedule(schedule).names and not schedule.has_settings:
        return
    if loss.schedule is not None:
        raise ValueError(
            f"Both `schedule` ({type(schedule).__name__}) and `loss.schedule` ({type(loss.schedule).__name__}) would "
            f"drive the coefficients. Leave one of them out: schedule=constant, or no `schedule` in the loss."
        )
    loss.follow(schedule, interval)


def time_limit(config: DictConfig) -> timedelta:
    """Time that ranks wait for each other, also where ``trainer.timeout`` itself is wrong."""
    seconds = config.trainer.get("timeout")
    return timedelta(seconds=seconds) if isinstance(seconds, int | float) and seconds > 0 else START_LIMIT
