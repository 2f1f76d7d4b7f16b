"""Entry point: trains and tests a force field from Hydra configs, on one rank or under torchrun on many.

    python -m harness.train                                        # the embedded alloy
    python -m harness.train data=file data.train=my.xyz loss.coeffs.forces=10
    torchrun --nproc-per-node 2 -m harness.train ...               # the same on two ranks
    python -m harness.train --multirun loss.coeffs.forces=1,10,100 # a sweep

``conf/train.yaml`` is the table of contents of what can be set.
"""

from __future__ import annotations

import difflib
import inspect
import io
import json
import logging
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc
from rich.console import Console

from harness.agreement import facts
from harness.callbacks import (
    CoefficientCurve,
    NonFiniteError,
    NonFiniteGuard,
    ParityPlot,
    PerTypeReport,
    Preempted,
    ResumeCheckpoint,
)
from harness.callbacks.resume import COMPLETE
from harness.checkpoints import AtomicCheckpointIO, read, step_of
from harness.distributed import (
    START_LIMIT,
    RankAbsentError,
    agree,
    launched_rank,
    launched_ranks,
    share,
    take_ranks_of_submitit,
)
from harness.dry_step import check_first_batch
from harness.faults import Whereabouts, reported
from harness.loggers import WandbLogger
from harness.manager import MetricsManager
from harness.module import ForceFieldModule
from harness.points import (
    COMPOSED,
    FAILED,
    QUIET_RANK,
    SWEEPS,
    TYPED,
    asks_for_sweep,
    command,
    goes_on,
    group,
    label,
    objective,
    point_name,
    typed,
)
from harness.preflight import (
    check_accumulation,
    check_adaptive,
    check_drivers,
    check_labels,
    check_monitors,
    check_settings,
    check_shares,
    check_trainer,
    refusal,
)
from harness.report import values_table
from harness.runs import (
    Command,
    Interrupted,
    JobFailed,
    PointFailedError,
    claim,
    finished_result,
    interrupted_run,
    is_interrupted,
    latest_run,
    note_failure,
    record,
    write_result,
)
from harness.schedules import Schedule, as_schedule
from harness.strategies import check_strategy, cluster_plugins, connect, load_weights

__all__ = [
    "Job",
    "build_module",
    "execute",
    "follow_schedule",
    "main",
    "prepare",
    "register_resolvers",
    "run_job",
    "train",
]

_RUN_STAMP = "HARNESS_RUN_STAMP"
_STAMP = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"
_BAD_INPUT = (
    ValueError,
    TypeError,
    KeyError,
    OSError,
    hydra.errors.InstantiationException,
    OmegaConfBaseException,
    MisconfigurationException,
)


def _config_folder() -> str:
    """``conf/`` beside the package in a checkout, inside of it when installed."""
    inside, beside = Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf"
    return str(inside if inside.is_dir() else beside)


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _interrupted_stamp(is_sweep: bool) -> str | None:
    """Last part of the directory of the interrupted run or sweep that this command continues, if there is one."""
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    asked = [each for each in sys.argv[1:] if each.lstrip("+").replace("'", "").replace('"', "") == "resume=auto"]
    if not requeued and not asked:
        return None
    runs, sweeps, asked_for = Path("outputs").absolute(), Path("multirun").absolute(), Command(typed(), ())
    found = None if is_sweep else interrupted_run(asked_for, runs)
    if found is not None:
        return found.name
    point = latest_run(asked_for, sweeps)  # also if the command line does not tell: an experiment can ask for a sweep
    if point is not None:
        stamps = [part for part in point.relative_to(sweeps).parts if re.fullmatch(_STAMP, part)]
        return stamps[0] if stamps else None
    where, what = (sweeps, "sweep") if is_sweep else (runs, "interrupted run")
    print(f"resume: no {what} of this command under {where}; it starts anew", flush=True)
    return None


def _part(number: float, fraction: float) -> float:
    """A fraction of a number such as ``max_epochs``, for the epochs of schedules."""
    if number < 0:
        raise ValueError(
            f"{fraction:g} of {number:g} epochs is no epoch: this schedule needs a number. Give max_epochs=..., "
            f"or write the epochs in the schedule as numbers."
        )
    return number * fraction


def register_resolvers(noted: Callable[[], None] | None = None) -> None:
    """Make the functions known that ``conf/`` calls as ``${harness.devices:}`` and the like.

    Args:
        noted: called whenever somebody asks for what each rank is to find out by itself, the number of ranks and
            variables of the environment.
    """
    of_ranks: dict[str, Callable[..., Any]] = {
        # ranks that a launcher has started on this node; one without a launcher
        "harness.devices": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "harness.nodes": lambda: int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "oc.env": oc.env,
    }
    of_all: dict[str, Callable[..., Any]] = {
        "harness.run_stamp": lambda: os.environ.get(_RUN_STAMP) or _now(),
        "harness.part": _part,
        # online only with a key; otherwise a run is kept on disk for `wandb sync`
        "harness.wandb_offline": lambda: not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()),
    }
    for name, resolver in of_all.items():
        OmegaConf.register_new_resolver(name, resolver, use_cache=True, replace=True)
    for name, resolver in of_ranks.items():
        OmegaConf.register_new_resolver(name, _noted(resolver, noted) if noted else resolver, replace=True)
    # not kept: each point of a sweep has its own
    OmegaConf.register_new_resolver("harness.point_name", point_name, replace=True)
    OmegaConf.register_new_resolver("harness.group", group, replace=True)


def _noted(resolver: Callable[..., Any], noted: Callable[[], None]) -> Callable[..., Any]:
    def asked(*arguments: Any) -> Any:
        noted()
        return resolver(*arguments)

    return asked


register_resolvers()


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
    whereabouts: Whereabouts
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
    check_drivers(module, callbacks)
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
    return Job(config, console, datamodule, module, callbacks, loggers, strategy, Whereabouts())


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
        callbacks=[*callbacks, job.whereabouts],
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
        raise ValueError(
            f"model._target_={config.model._target_} cannot be imported: {error.__cause__}. Is its folder on "
            f"PYTHONPATH?"
        ) from error
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
        follow_schedule(module.loss, instantiate(config.schedule))
    return module


def follow_schedule(loss: MetricsManager, schedule: Schedule) -> None:
    """Let the schedule of a config drive the loss, unless it says nothing.

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
    loss.follow(schedule)


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


def run_job(config: DictConfig, asked_for: Command | None = None) -> float | tuple[float | None, ...] | None:
    """Hydra's job; mistakes of users end it with one message, not a traceback.

    A run that is told to leave exits with :data:`~harness.callbacks.REQUEUE_EXIT_CODE`.

    Args:
        config: the whole configuration.
        asked_for: by what command; None to ask Hydra.

    Returns:
        The monitored value, or a tuple of those of ``objectives``, for the sampler of a sweep; None instead of NaN.

    Raises:
        JobFailed: a run on its own has failed, and has said why.
        PointFailedError: a point of a sweep has.
    """
    COMPOSED.set()
    if asked_for is None:
        asked_for = command()
        if asked_for.point is not None:
            if launched_ranks() > 1 and os.environ.get(TYPED) is None:
                sys.exit(_SWEEP_ON_RANKS.format(launched_ranks()))
            if take_ranks_of_submitit():
                quieten()
    if asked_for.point is None:
        return _run_job(config, asked_for)
    try:
        return _run_job(config, asked_for)
    except SystemExit as error:
        if isinstance(error, Preempted | Interrupted) or not error.code:
            raise
        what = str(error)
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
    # outside of the handlers, so that it does not keep the model of the point alive
    if launched_rank() == 0:
        note_failure(Path(config.output_dir), asked_for, what)
    name = label(asked_for.point, point_name())
    FAILED.append(name)
    raise PointFailedError(f"{name} failed: {what}")


def _run_job(config: DictConfig, asked_for: Command) -> float | tuple[float | None, ...] | None:
    try:
        return _try_job(config, asked_for)
    except RankAbsentError as error:
        _say_absent(error)
        raise JobFailed(str(error)) from error


def _try_job(config: DictConfig, asked_for: Command) -> float | tuple[float | None, ...] | None:
    config.output_dir = share("output_dir", str(Path(config.output_dir).absolute()))
    output_dir, limit, is_point = Path(config.output_dir), _time_limit(config), asked_for.point is not None
    if is_point and goes_on(config):
        before = json.loads(share("finished", json.dumps(finished_result(output_dir, asked_for)), limit))
        if before:
            print(f"finished before: {output_dir}", flush=True)
            return objective(config, before["values"])
    job, refused, start = None, None, time.monotonic()
    ranks = launched_ranks()  # Lightning may have forgotten it in the end
    try:
        job, refused = _started(config, limit, asked_for)
        if job is None:
            raise ValueError(refused)
        with (
            record(output_dir, asked_for) if launched_rank() == 0 else nullcontext(),
            reported(job.whereabouts, limit),
            _told_by_keyboard(),
        ):
            results = execute(job)
            if launched_rank() == 0:
                seconds = time.monotonic() - start
                write_result(output_dir, config.monitor, results, seconds, ranks, config.get("objectives") or ())
    except Preempted as told:
        if launched_rank() == 0:
            print(f"\nstopped: {told}. The same command with resume=auto goes on.", flush=True)
        raise
    except Interrupted:
        if launched_rank() == 0:
            print("\nstopped: interrupted. The same command with resume=auto goes on.", flush=True)
        raise
    except NonFiniteError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        _leave_together(error, job.loggers if job else [], max(limit, START_LIMIT))
    except _BAD_INPUT as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        text = refused or _message(error)
        if launched_rank() == 0:
            if not is_point:
                _leave_no_trace(output_dir)
            print(f"\nerror: {text}\n{_HINT}", file=sys.stderr, flush=True)
        raise JobFailed(text) from error
    finally:
        if is_point and job is not None:  # the next point in this process has a run of its own
            for logger in job.loggers:
                if isinstance(logger, WandbLogger):
                    logger.finish(exit_code=1 if sys.exc_info()[0] else 0)
    return objective(config, results)


@contextmanager
def _told_by_keyboard() -> Iterator[None]:
    """Ctrl-C as what it is; Lightning makes an exit of it that looks like that of an error."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise Interrupted from None
        raise


def _leave_together(error: Exception, loggers: list[Logger], limit: timedelta) -> NoReturn:
    """Say once what all ranks have raised, and leave when all is written: a launcher ends the others with the first."""
    if launched_rank() == 0:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.finish(exit_code=1)
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
    with suppress(RankAbsentError):
        share("all is written", "", limit)
    raise JobFailed(str(error)) from error


def _leave_no_trace(output_dir: Path) -> None:
    """Remove the output directory of a refused job, which holds nothing but Hydra's copy of the config."""
    if output_dir.is_dir() and {path.name for path in output_dir.iterdir()} == {".hydra"}:
        shutil.rmtree(output_dir, ignore_errors=True)


def _started(config: DictConfig, limit: timedelta, asked_for: Command) -> tuple[Job | None, str | None]:
    """The job, ready on all ranks, in an output directory of its own; or why it cannot start.

    Raises:
        Exception: what is wrong on this rank.
    """
    job, mistake, in_common = None, None, None
    # whatever is wrong, the other ranks must not wait for this one
    try:
        job = prepare(config)
    except Exception as error:
        mistake = error
    try:
        in_common = facts(config, job.datamodule if job else None) if launched_ranks() > 1 else None
    except Exception as error:
        mistake = mistake or error
    shown = None
    if mistake is not None:
        shown = _message(mistake) if isinstance(mistake, _BAD_INPUT) else f"{type(mistake).__name__}: {mistake}"
    refused = refusal(shown, in_common, max(limit, START_LIMIT))  # ranks start less evenly than they step
    if mistake is not None:
        raise mistake
    if job is None or refused:
        return None, refused
    found: dict[str, str | None] = {}
    if launched_rank() == 0:  # one rank looks for all: they must go on from the same
        try:
            job.lock = claim(Path(config.output_dir))
            found["checkpoint"] = _checkpoint_to_resume(config, job.callbacks, asked_for)
        except _BAD_INPUT as error:
            found["error"] = _message(error)
    found = json.loads(share("resume", json.dumps(found), limit))
    job.resume_from = found.get("checkpoint")
    return (None, found["error"]) if found.get("error") else (job, None)


def _checkpoint_to_resume(config: DictConfig, callbacks: list[Callback], asked_for: Command) -> str | None:
    """The newest whole checkpoint of this command in this output directory, if it was interrupted and is to go on."""
    keeping = next((each for each in callbacks if isinstance(each, ResumeCheckpoint)), None)
    if keeping is None or not config.train:
        return None
    if not goes_on(config) or not is_interrupted(Path(config.output_dir), asked_for):
        if not config.ckpt_path or Path(config.ckpt_path).resolve().parent != keeping.dirpath.resolve():
            keeping.put_aside()
        return None
    newest = keeping.newest()
    return None if newest is None else str(newest)


def _say_absent(error: RankAbsentError) -> None:
    if str(error).startswith(f"Rank {launched_rank()} "):  # not if it is what another rank has said
        print(f"\nerror: {error}", file=sys.stderr)


def _time_limit(config: DictConfig) -> timedelta:
    """How long ranks wait for each other, also where ``trainer.timeout`` itself is wrong."""
    seconds = config.trainer.get("timeout")
    return timedelta(seconds=seconds) if isinstance(seconds, int | float) and seconds > 0 else START_LIMIT


def _message(error: Exception) -> str:
    """What a user needs to know of an error: its own words, and the config that Hydra was at."""
    if isinstance(error, hydra.errors.InstantiationException):
        place = str(error).splitlines()[0].removeprefix("Error ").rstrip(":")  # such as: in call to target 'x.Y'
        return f"{_message(error.__cause__)} ({place})" if isinstance(error.__cause__, Exception) else str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{str(error).splitlines()[0]}. Give it on the command line, such as {error.full_key}=..."
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def quieten() -> None:
    """Leave out what libraries say at every start and no user of this command can act on."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # of the strides of dimensions of size 1, which mean nothing
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of Optuna
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)


def main() -> None:
    """Command line of ``harness-train``."""
    quieten()
    try:
        _main()
    except RankAbsentError as error:
        _say_absent(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped: interrupted", file=sys.stderr)
        raise Interrupted from None
    finally:
        _say_sweeps()


def _say_sweeps() -> None:
    """Where the sweeps of this command are, and how to read them; a sweep that was refused leaves nothing behind."""
    for folder, lock in SWEEPS.items():
        if next(folder.rglob(".hydra"), None):
            typed_here = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
            print(f"\nsweep       {folder}\nreport      harness-sweep {typed_here}", flush=True)
        elif {path.name for path in folder.glob("*")} <= {"multirun.yaml", ".lock"}:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _main() -> None:
    # Hydra wants all overrides in one piece: an option among them would end it
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    num_ranks, is_sweep = launched_ranks(), asks_for_sweep(sys.argv[1:])
    os.environ.pop(TYPED, None)  # of a sweep that has started this command
    if num_ranks > 1:
        if is_sweep:
            sys.exit(_SWEEP_ON_RANKS.format(num_ranks))
        if launched_rank() != 0:  # only rank 0 writes
            sys.argv += QUIET_RANK
    stamp = _interrupted_stamp(is_sweep) if launched_rank() == 0 else None
    if num_ranks > 1:  # each rank's clock would give it a folder of its own
        stamp = share("run_stamp", agree("run_stamp", stamp or _now()) if launched_rank() == 0 else "")
    else:  # points of a sweep, if it is one, may be composed in other processes
        os.environ[TYPED] = json.dumps(typed())
    os.environ[_RUN_STAMP] = stamp or _now()
    COMPOSED.clear()
    FAILED.clear()
    SWEEPS.clear()
    said = io.StringIO()
    try:
        with redirect_stderr(_UntilComposed(said)):
            hydra.main(version_base="1.3", config_path=_config_folder(), config_name="train")(run_job)()
        sys.stderr.write(said.getvalue())  # of a sweep whose points run in other processes
        if FAILED:
            sys.exit(1)
    except SystemExit as ended:
        if ended.code in (None, 0):  # --help and the like
            sys.stderr.write(said.getvalue())
        elif not COMPOSED.is_set():  # a mistake that Hydra has found itself
            if launched_rank() == 0:
                share("output_dir", "")  # which ranks that found none are waiting for
            refused = refusal(_of_hydra(said.getvalue()))
            if launched_rank() == 0:
                print(f"\nerror: {refused}", file=sys.stderr)
        if FAILED and ended.code == 1:
            print(f"\nerror: failed points of the sweep: {', '.join(FAILED)}", file=sys.stderr)
        raise


def _of_hydra(text: str) -> str:
    """What Hydra says of a wrong configuration, with the setting that a misspelt one may be meant for."""
    told = text.partition("Set the environment variable HYDRA_FULL_ERROR")[0].strip()
    plugin = re.search(r"Could not find 'hydra/(?:sweeper|launcher)(?:/sampler)?/(optuna|tpe|submitit_\w+|ray)'", told)
    if plugin is not None and plugin.group(1) == "ray":
        return f"hydra-ray-launcher is not installed: pip install hydra-ray-launcher.\n({told})"
    if plugin is not None:
        of = "hydra-submitit-launcher" if plugin.group(1).startswith("submitit") else "hydra-optuna-sweeper"
        return f"{of} is not installed; it comes with pip install 'potential-harness[sweep]'.\n({told})"
    if "BasicSweeper does not support sweep type" in told:
        last = told.splitlines()[-1]
        return f"a range of values needs a sampler that draws from it: sweep=optuna or sweep=pareto.\n({last})"
    misspelt = re.search(r"Could not override '([\w.]+)'", told)
    if misspelt is None:
        return told or "the configuration cannot be composed"
    full = re.search(r"^\s*full_key: ([\w.]+)", told, re.MULTILINE)  # a key within the value that was given
    key = full.group(1) if full else misspelt.group(1)
    of_hydra = key.startswith("hydra.")
    close = difflib.get_close_matches(key, _valid_settings("hydra" if of_hydra else None), n=3, cutoff=0.6)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    meant += "It is one of sweep=optuna and sweep=pareto. " if key == "hydra.sweeper.n_trials" else ""
    listed = "hydra" if of_hydra else "job"
    return f"there is no setting {key}. {meant}`harness-train --cfg {listed}` lists all of them.\n({told})"


def _valid_settings(part: str | None = None) -> list[str]:
    """Dotted names of all settings, or of those of Hydra, with the choices of groups that have been typed."""
    folder = Path(_config_folder())
    choices = [each for each in sys.argv[1:] if (folder / each.partition("=")[0]).is_dir()]
    with initialize_config_dir(str(folder), version_base="1.3"):
        try:
            config = compose("train", choices, return_hydra_config=part is not None)
        except hydra.errors.HydraException:  # a choice of a directory of the user's own
            config = compose("train", return_hydra_config=part is not None)
        return _settings_of(config[part], f"{part}.") if part else _settings_of(config)


def _settings_of(config: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    names = []
    for key in map(str, config):
        node = config._get_node(key)
        names.append(f"{prefix}{key}")
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            names += _settings_of(node, f"{prefix}{key}.")
    return names


class _UntilComposed(io.TextIOBase):
    """Standard error that keeps to itself what Hydra says of a wrong configuration: one rank is to say it."""

    def __init__(self, kept: io.StringIO) -> None:
        self._kept, self._stderr = kept, sys.stderr

    def write(self, text: str) -> int:
        return (self._stderr if COMPOSED.is_set() else self._kept).write(text)

    def flush(self) -> None:
        self._stderr.flush()

    def isatty(self) -> bool:
        return self._stderr.isatty()

    def fileno(self) -> int:
        return self._stderr.fileno()


_SWEEP_ON_RANKS = (
    "error: --multirun under a launcher would run the whole sweep on each of the {} ranks. Start a sweep without "
    "torchrun; hydra/launcher=torchrun hydra.launcher.nproc_per_node=2 makes each of its points a job of two ranks."
)
_HINT = "(HYDRA_FULL_ERROR=1 shows where it was found)"


if __name__ == "__main__":
    # by its name, under which launchers of Hydra find the job in other processes
    from harness.train import main as named_main

    named_main()
