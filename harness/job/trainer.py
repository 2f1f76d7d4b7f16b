"""The trainer of a job: made once, asked by the checks, and used if they pass."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.checkpoints import AtomicCheckpointIO
from harness.distributed import known_backends
from harness.strategies import FlatStrategy, check_strategy, cluster_plugins, compiled_parts
from harness.support.lightning_private import counts_versions, ddp_options

__all__ = ["make_strategy", "make_trainer", "withheld"]

_TALKATIVE = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def make_strategy(config: DictConfig, model: nn.Module | None = None) -> Strategy | str:
    """The strategy of a config, with the time limit of the trainer's section.

    Args:
        config: the whole configuration.
        model: that it is for; ``strategy=auto`` chooses by it.
    """
    options: dict[str, Any] = {"timeout": timedelta(seconds=config.trainer.timeout)}
    if model is not None and config.strategy.get("_target_") == "harness.strategies.auto_strategy":
        options["compiled"] = bool(compiled_parts(model))
    strategy: Strategy | str = instantiate(config.strategy, **options)
    return strategy


def make_trainer(
    config: DictConfig, strategy: Strategy | str, callbacks: Sequence[Callback] = (), loggers: Sequence[Logger] = ()
) -> Trainer:
    """The trainer of a config; nothing is written or sent.

    Lightning refuses a progress bar that is switched off, and learning rates that no logger takes: such callbacks are
    left out.

    Args:
        config: the whole configuration.
        strategy: what :func:`make_strategy` has made; a trainer takes possession of it.
        callbacks: of the training.
        loggers: of the training.

    Raises:
        ValueError: the strategy and the precision cannot train forces, or the trainer cannot be made of its settings;
            ``background_checkpoints`` is neither true nor false.
    """
    settings = {key: value for key, value in config.trainer.items() if key not in ("timeout", "plugins")}
    # of the settings, since a trainer takes another precision where a device lacks the one that was asked for
    check_strategy(strategy, str(settings.get("accelerator")), str(settings.get("precision")), callbacks)
    useless: list[type[Callback]] = [] if settings.get("enable_progress_bar", True) else [ProgressBar]
    useless += [] if loggers else [LearningRateMonitor]
    used = [callback for callback in callbacks if not isinstance(callback, tuple(useless))]
    plugins = [instantiate(plugin) for plugin in config.trainer.get("plugins") or []]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        in_background = config.get("background_checkpoints", True)
        if not isinstance(in_background, bool):
            raise ValueError(f"background_checkpoints is true or false, found {in_background!r}.")
        plugins.append(AtomicCheckpointIO(in_background and _may_wait(strategy, used, loggers)))
    if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        plugins += cluster_plugins()
    try:
        trainer: Trainer = instantiate(
            settings,
            strategy=strategy,
            callbacks=used,
            logger=list(loggers) or False,
            use_distributed_sampler=False,  # its samplers pad with duplicates; the data brings its own
            plugins=plugins,
        )
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, Exception):  # of Hydra itself, such as a target that it refuses
            raise
        raise ValueError(f"The trainer cannot be made: {cause}{_hint(str(cause), settings)}") from error
    _check_backend(config, trainer)
    _check_ddp_options(trainer.strategy)
    return trainer


def _may_wait(strategy: Strategy | str, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> bool:
    """True if nothing looks at a checkpoint once it has been saved, and its state is not gathered for the file."""
    if isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy):
        return False
    looked_at = (getattr(each, "reads_checkpoints", type(each).after_save_checkpoint) for each in loggers)
    if any(each not in (False, Logger.after_save_checkpoint) for each in looked_at):
        return False
    saving = (each for each in callbacks if isinstance(each, ModelCheckpoint))
    # a link to a file; a name that is given if no file has it
    return not any(
        each.save_last == "link" or (counts_versions(each) and "{step" not in (each.filename or "{step}"))
        for each in saving
    )


def _hint(cause: str, settings: dict[Any, Any]) -> str:
    """Settings that a failure of the hardware comes from."""
    if not any(word in cause.lower() for word in ("accelerator", "backend", "gpu", "cuda", "precision")):
        return ""
    named = {key: settings[key] for key in ("accelerator", "devices", "precision") if key in settings}
    found = ", ".join(f"trainer.{key}={value}" for key, value in named.items())
    return f" Found {found}; without GPUs use trainer.accelerator=cpu and trainer.precision=32-true."


def _check_backend(config: DictConfig, trainer: Trainer) -> None:
    """Refuse a backend that torch does not know, or that cannot move data of the trainer's device."""
    backend = (config.strategy or {}).get("process_group_backend")
    if backend and backend not in known_backends():
        raise ValueError(
            f"strategy.process_group_backend={backend} is unknown to torch; expected one of "
            f"{', '.join(known_backends())}."
        )
    if backend == "nccl" and trainer.strategy.root_device.type != "cuda":
        raise ValueError(
            f"strategy.process_group_backend=nccl, but this rank trains on the {trainer.strategy.root_device.type} "
            f"(trainer.accelerator={config.trainer.get('accelerator')}); NCCL only moves data of GPUs. Use gloo, or "
            f"leave it out: strategy.process_group_backend=gloo."
        )


def _check_ddp_options(strategy: Strategy) -> None:
    """Refuse options that torch's DDP would refuse, with words of its own, once there is a process group."""
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, FlatStrategy):
        return
    valid = set(inspect.signature(DistributedDataParallel).parameters)
    unknown = sorted(set(ddp_options(strategy)) - valid)
    if unknown:
        raise ValueError(
            f"strategy has the unknown option {unknown[0]!r}; DDPStrategy and DistributedDataParallel take "
            f"{', '.join(sorted(valid - {'module'}))}."
        )


@contextmanager
def withheld() -> Iterator[list[logging.LogRecord]]:
    """Collect what Lightning would print about devices, to be printed once the job starts."""
    records: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            records.append(record)
        return record.levelno >= logging.ERROR

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield records
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
