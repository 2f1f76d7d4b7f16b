"""A training as a config describes it: made, checked, and run on this rank."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch
from filelock import FileLock
from hydra.utils import instantiate
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from harness.callbacks import (
    CoefficientCurve,
    NonFiniteGuard,
    ParityPlot,
    PerTypeReport,
)
from harness.callbacks.resume import COMPLETE
from harness.callbacks.tables import values_table
from harness.checkpoints import AtomicCheckpointIO, read, step_of
from harness.config.explain import message
from harness.distributed import launched_rank
from harness.job.dry_step import check_first_batch
from harness.job.failures import TrainingPosition
from harness.job.preflight import (
    check_accumulation,
    check_adaptive,
    check_controllers,
    check_labels,
    check_monitors,
    check_settings,
    check_shares,
    check_trainer,
)
from harness.loggers import WandbLogger
from harness.metrics import MetricsManager
from harness.module import ForceFieldModule
from harness.schedules import Interval, Schedule, as_schedule
from harness.strategies import check_strategy, cluster_plugins, connect, load_weights
from harness.support.configs import take_out

__all__ = ["Job", "build_module", "execute", "follow_schedule", "prepare", "read_schedule", "train"]


@dataclass
class Job:
    """A training that is made and checked; nothing has been written yet."""

    config: DictConfig
    console: Console
    datamodule: LightningDataModule
    module: ForceFieldModule
    callbacks: list[Callback]
    loggers: list[Logger]
    strategy: Strategy | str
    position: TrainingPosition
    resume_from: str | None = None
    """Checkpoint of an interrupted run in the same output directory."""
    lock: FileLock | None = None
    """Of the output directory, on rank 0, for the life of the process."""


def train(config: DictConfig) -> dict[str, float]:
    """Train and test as configured.

    Returns:
        The last validation's and the test's values by log key.
    """
    return execute(prepare(config))


def prepare(config: DictConfig) -> Job:
    """Make data, model, loss and the rest, and refuse what cannot be trained, before anything is written or sent."""
    console = Console(quiet=launched_rank() != 0)
    if not console.is_terminal:
        console.width = 140  # a log file has room for every column
    check_settings(config)
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)

    datamodule: LightningDataModule = instantiate(config.data)
    datamodule.setup("fit")
    module = build_module(config, datamodule)
    check_labels(module, datamodule)
    callbacks: list[Callback] = [instantiate(each) for each in (config.callbacks or {}).values() if each]
    adaptive = instantiate(config.adaptive) if config.adaptive else None
    if isinstance(adaptive, Callback):
        callbacks.append(adaptive)
    elif adaptive is not None:
        module.loss.weigh_by(adaptive)
    check_controllers(module, callbacks)
    check_monitors(config, callbacks, module)
    check_accumulation(config, callbacks, module)
    # made anew by the trainer; here so that mistakes are told before anything is written
    made = module.configure_optimizers()
    timeout = timedelta(seconds=config.trainer.timeout)
    asked = instantiate(config.strategy, timeout=timeout)
    for guard in (callback for callback in callbacks if isinstance(callback, NonFiniteGuard)):
        guard.check(asked, [made["optimizer"] if isinstance(made, dict) else made])
    check_strategy(asked, str(config.trainer.accelerator), str(config.trainer.precision), callbacks)
    checked = check_trainer(config, asked)
    if config.train:
        check_adaptive(module, callbacks, checked)
    check_shares(datamodule, checked.strategy)
    if config.dry_step:
        check_first_batch(module, datamodule, checked, train=config.train)
    strategy = instantiate(config.strategy, timeout=timeout)
    if not config.trainer.enable_progress_bar:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    loggers: list[Logger] = [instantiate(each) for each in (config.logger or {}).values() if each]
    return Job(config, console, datamodule, module, callbacks, loggers, strategy, TrainingPosition())


def execute(job: Job) -> dict[str, float]:
    """Train and test.

    Returns:
        The last validation's and the test's values by log key.
    """
    config, console, datamodule, module, callbacks = job.config, job.console, job.datamodule, job.module, job.callbacks
    output_dir = Path(config.output_dir)
    resumed_from = job.resume_from or config.ckpt_path
    if hasattr(datamodule, "describe"):
        console.print(datamodule.describe(), highlight=False)
    loggers = job.loggers
    if not loggers:  # it refuses to run without one
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    plugins = [instantiate(each) for each in config.trainer.get("plugins") or []]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    plugins += cluster_plugins()
    trainer: Trainer = instantiate(
        {key: value for key, value in config.trainer.items() if key not in ("timeout", "plugins")},
        strategy=job.strategy,  # the time limit is its
        callbacks=[*callbacks, job.position],
        logger=loggers or False,
        use_distributed_sampler=False,  # its samplers pad with duplicates; the data brings its own
        plugins=plugins,
    )
    connect(trainer)
    trainer.precision_plugin.convert_module(module)  # before weights are loaded, which other parameters would round
    settings = OmegaConf.to_container(config, resolve=True)
    for logger in loggers:
        if job.resume_from and hasattr(logger, "resume_from"):
            logger.resume_from(step_of(Path(job.resume_from)))
        logger.log_hyperparams(settings)  # type: ignore[arg-type]

    results: dict[str, float] = {}
    best = config.ckpt_path
    complete = read(Path(job.resume_from)).get(COMPLETE) if job.resume_from else None
    if complete is not None:
        console.print(f"training is complete in {job.resume_from}", highlight=False, soft_wrap=True)
        before = _best_before(callbacks, resumed_from)
        results, best = dict(complete), _best_checkpoint(callbacks, before) or job.resume_from
    elif config.train:
        if resumed_from:
            console.print(f"goes on from {resumed_from}", highlight=False, soft_wrap=True)
        before = _best_before(callbacks, resumed_from)  # now, since rank 0 moves the checkpoint while others go on
        trainer.fit(module, datamodule=datamodule, ckpt_path=resumed_from, weights_only=True)
        results = {key: float(value) for key, value in trainer.callback_metrics.items()}
        best = _best_checkpoint(callbacks, before)
    if config.test and module.test_metrics:
        if best:
            # not by the trainer: an averaging callback would put back the weights that are not averaged
            checkpoint = torch.load(best, weights_only=True, map_location="cpu")
            module.on_load_checkpoint(checkpoint)
            load_weights(module, checkpoint["state_dict"])
        trainer.test(module, datamodule=datamodule, verbose=False)
        results |= {key: float(value) for key, value in trainer.callback_metrics.items()}
        for index, manager in enumerate(module.test_metrics):
            prefix = f"test{index}_epoch/"
            values = {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
            if isinstance(manager, MetricsManager):
                console.print(values_table(f"test set {index}", manager, values))
    _say_where(console, output_dir, best, loggers, callbacks)
    return results


def build_module(config: DictConfig, datamodule: LightningDataModule) -> ForceFieldModule:
    """The Lightning module of a config; type names, number of sets and statistics come from the data."""
    type_names = getattr(datamodule, "type_names", None)
    offered = {"statistics": getattr(datamodule, "statistics", None), "type_names": type_names}
    try:
        # by instantiate(), which refuses what a config may not call; get_object() would look up anything
        target = instantiate({"_target_": config.model._target_, "_partial_": True}).func
    except hydra.errors.InstantiationException as error:
        if not isinstance(error.__cause__, Exception):
            raise
        raise ValueError(f"model._target_={config.model._target_}: {message(error)}") from error
    wanted = inspect.signature(target).parameters
    model = instantiate(config.model, **{name: value for name, value in offered.items() if name in wanted})
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
    )
    if config.schedule:
        follow_schedule(module.loss, *read_schedule(config.schedule))
    return module


def read_schedule(section: DictConfig) -> tuple[Schedule, Interval]:
    """The schedule of a config's section, and its ``interval``: an argument of what follows, not of the schedule."""
    arguments, interval = take_out(section, "interval", "epoch")
    return as_schedule(instantiate(arguments)), interval


def follow_schedule(loss: MetricsManager, schedule: Schedule, interval: Interval = "epoch") -> None:
    """Let the schedule of a config drive the loss, unless it names nothing.

    Raises:
        ValueError: the loss has a schedule of its own.
    """
    if not as_schedule(schedule).names:
        return
    if loss.schedule is not None:
        raise ValueError(
            f"Both `schedule` ({type(schedule).__name__}) and `loss.schedule` ({type(loss.schedule).__name__}) would "
            f"drive the coefficients. Leave one of them out: schedule=constant, or no `schedule` in the loss."
        )
    loss.follow(schedule, interval)


def _best_monitor(callbacks: list[Callback]) -> ModelCheckpoint | None:
    return next((each for each in callbacks if isinstance(each, ModelCheckpoint) and each.monitor), None)


def _best_before(callbacks: list[Callback], resumed_from: str | None) -> dict[str, Any]:
    """What the run that is continued knows of its best checkpoint."""
    monitoring = _best_monitor(callbacks)
    if monitoring is None or not resumed_from:
        return {}
    checkpoint = torch.load(resumed_from, weights_only=True, map_location="cpu")
    return checkpoint["callbacks"].get(monitoring.state_key, {})  # type: ignore[no-any-return]


def _best_checkpoint(callbacks: list[Callback], before: dict[str, Any]) -> str | None:
    """The checkpoint with the best monitored value, of this run or of the one that it continues."""
    best = _best_monitor(callbacks)
    if best is None:
        return None
    found: list[tuple[float, str]] = []
    # a full disk may have kept it from being written
    if best.best_model_score is not None and Path(best.best_model_path).is_file():
        found.append((float(best.best_model_score), best.best_model_path))
    if before.get("best_model_score") is not None and Path(before["best_model_path"]).is_file():
        found.append((float(before["best_model_score"]), before["best_model_path"]))
    if not found:
        return None
    return (min if best.mode == "min" else max)(found)[1]


def _say_where(console: Console, output_dir: Path, best: str, loggers: list[Logger], callbacks: list[Callback]) -> None:
    console.print(f"output      {output_dir}", highlight=False)
    if best:
        console.print(f"checkpoint  {best}", highlight=False)
    for callback in callbacks:
        if isinstance(callback, ParityPlot):
            for path in callback.files:
                console.print(f"parity plot {path}", highlight=False)
        if isinstance(callback, PerTypeReport):
            for path in callback.files:
                console.print(f"atom types  {path}", highlight=False)
        if isinstance(callback, CoefficientCurve) and callback.file:
            console.print(f"coefficients {callback.file}", highlight=False)
    for logger in loggers:
        if isinstance(logger, WandbLogger) and (place := logger.finish()):
            console.print(f"W&B run     {place}", highlight=False)
            if Path(place).is_dir():
                console.print(f"            upload it with: wandb sync {Path(place).parent}", highlight=False)
