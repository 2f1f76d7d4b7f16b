"""One training on this rank, from its config to its results."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from harness.callbacks.resume import COMPLETE
from harness.callbacks.tables import values_table
from harness.checkpoints import read, step_of, wait_for_checkpoints
from harness.job.best import best_before, best_checkpoint, load_checkpoint, why_scores_differ
from harness.job.build import Job, build, time_limit
from harness.job.first_errors import settle_references
from harness.job.going_on import changed_settings, load_initial_weights
from harness.job.made_with import MadeWith, made_with
from harness.job.match import data_differences
from harness.job.preflight import check, check_files, check_settings
from harness.job.protocols import FinishesRun, WritesFiles
from harness.job.recorded_model import settle_model
from harness.metrics import MetricsManager
from harness.module.horizon import Progress
from harness.module.reporting import types_with_data
from harness.strategies import connect
from harness.support.log_keys import LogKeys, stage_of_set

__all__ = ["execute", "prepare", "train"]


def train(config: DictConfig) -> dict[str, float]:
    """Train and test as configured.

    Returns:
        The last validation's and the test's values by log key.
    """
    return execute(prepare(config))


def prepare(config: DictConfig) -> Job:
    """Make the job of a config, and refuse one that cannot be trained; nothing is written or sent.

    Raises:
        ValueError, TypeError, KeyError, OSError: a mistake of the user, such as a part that cannot be made of its
            section, or that refuses the job.
    """
    check_files(config)
    references = settle_model(config)
    check_settings(config)
    job = build(config)
    job.references = references
    check(job)
    return job


def execute(job: Job) -> dict[str, float]:
    """Train and test.

    Returns:
        The last validation's and the test's values by log key.
    """
    _print_start(job)
    connect(job.trainer)
    job.trainer.precision_plugin.convert_module(job.module)  # before weights are loaded, which it would round
    if job.config.train and job.config.get("init_from") and not job.resume_from:
        _start_from_weights(job)
    _start_loggers(job)
    results: dict[str, float] = {}
    best = job.config.ckpt_path
    if job.config.train:
        results, best = _fit(job)
    if job.config.test and job.module.test_metrics:
        results |= _test(job, best)
    _print_end(job, best)
    return results


def _start_from_weights(job: Job) -> None:
    """Load weights, give the model the references that were asked for, and tell and record both."""
    started = load_initial_weights(job.config.init_from, job.module, job.config.get("init_anew") or ())
    _print_lines(job, started.lines)
    lines, facts = settle_references(job, job.references, time_limit(job.config))
    _print_lines(job, lines)
    for callback in job.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MadeWith):
            callback.record["started_from"] = started.facts | {"first_errors": facts}


def _print_start(job: Job) -> None:
    if hasattr(job.datamodule, "describe"):
        job.console.print(job.datamodule.describe(), highlight=False)
    for line in (*job.parameters, *job.notes):
        job.console.print(line, highlight=False, markup=False, soft_wrap=True)
    for record in job.device_notes:
        logging.getLogger(record.name).handle(record)


def _print_lines(job: Job, lines: list[str]) -> None:
    for line in lines:
        job.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _start_loggers(job: Job) -> None:
    """Let loggers continue an interrupted run, and hand them the configuration."""
    settings: Any = OmegaConf.to_container(job.config, resolve=True)
    for logger in job.loggers:
        if job.resume_from and hasattr(logger, "resume_from"):
            logger.resume_from(step_of(Path(job.resume_from)))
        logger.log_hyperparams(settings)


def _fit(job: Job) -> tuple[dict[str, float], str | None]:
    """Train, or take over what a complete training has left.

    Returns:
        Values by log key, and the path of the best checkpoint.
    """
    trainer, start = job.trainer, job.resume_from or job.config.ckpt_path
    before = best_before(trainer, start)
    if start and _are_other_scores(job, start):
        before = {}
    complete = read(job.resume_from).get(COMPLETE) if job.resume_from else None
    if complete is not None:
        job.console.print(f"training is complete in {job.resume_from}", highlight=False, soft_wrap=True)
        return dict(complete), best_checkpoint(trainer, before) or job.resume_from
    if start:
        job.console.print(f"goes on from {start}", highlight=False, soft_wrap=True)
    if start and not job.resume_from:
        lines = [f"differs from the checkpoint: {line}" for line in changed_settings(start, job.config)]
        _print_lines(job, lines)
        done, limit = Progress.of(read(start)).epochs, trainer.max_epochs
        if limit not in (None, -1) and done >= limit:  # type: ignore[operator]
            job.console.print(f"nothing is left to train: {done} epochs are done, and max_epochs={limit}")
    trainer.fit(job.module, datamodule=job.datamodule, ckpt_path=start, weights_only=True)
    wait_for_checkpoints(trainer)
    return _floats(trainer.callback_metrics), best_checkpoint(trainer, before)


def _are_other_scores(job: Job, start: str) -> bool:
    """True, and told, if the scores of a checkpoint are those of other data or metrics, and do not compete."""
    record = made_with(start)
    if record is not None and start == job.resume_from:
        for line in data_differences(record, job.config, job.datamodule):
            job.console.print(line, highlight=False, markup=False, soft_wrap=True)
    reason = why_scores_differ(record, job.config, job.datamodule, job.config.monitor)
    if reason:
        text = f"scores of before are of another kind, and do not compete: the best starts anew ({reason})"
        job.console.print(text, highlight=False, markup=False, soft_wrap=True)
    return reason is not None


def _test(job: Job, best: str | None) -> dict[str, float]:
    """Test the best checkpoint, or the weights as they are, and print a table for each test set.

    Returns:
        Values by log key.
    """
    if best:
        load_checkpoint(job.module, best)
    job.trainer.test(job.module, datamodule=job.datamodule, verbose=False)
    results = _floats(job.trainer.callback_metrics)
    for index, manager in enumerate(job.module.test_metrics):
        if isinstance(manager, MetricsManager):
            stage = stage_of_set("test", index)
            keys, report = LogKeys(stage), job.module.reports.get(stage)
            present = None if report is None else types_with_data(report, manager)
            values = {name: results[key] for name in manager.value_names if (key := keys.key(name)) in results}
            job.console.print(values_table(f"test set {index}", manager, values, type_names=present))
    return results


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _print_end(job: Job, best: str | None) -> None:
    """Print where the results are: output directory, best checkpoint, and the files of callbacks and loggers."""
    _print_location(job, "output", job.config.output_dir)
    if best:
        _print_location(job, "checkpoint", best)
    for callback in job.callbacks:
        _print_files(job, callback)
    for logger in job.loggers:
        if isinstance(logger, FinishesRun):
            logger.finish()
        _print_files(job, logger)


def _print_files(job: Job, part: object) -> None:
    if not isinstance(part, WritesFiles):
        return
    written = part.written_files
    if not isinstance(written, Mapping):  # no reason to fail after the training
        rank_zero_warn(f"{type(part).__name__}.written_files is a mapping of labels to paths, found {written!r}.")
        return
    for label, files in written.items():
        for file in files if isinstance(files, list | tuple) else [files]:
            _print_location(job, label, file)


def _print_location(job: Job, label: str, location: object) -> None:
    job.console.print(f"{label:<11} {location}", highlight=False, markup=False, soft_wrap=True)
