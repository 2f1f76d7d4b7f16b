"""A run: the training of one command, with its record, its result, and one message where it fails."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from harness.config.bad_input import BAD_INPUT
from harness.config.explain import HINT, message
from harness.distributed import START_LIMIT, RankAbsentError, launched_rank, launched_ranks, share
from harness.job.failures import reported
from harness.job.job import Job, execute
from harness.job.protocols import FinishesRun
from harness.job.start import start, time_limit
from harness.runs import (
    Command,
    Interrupted,
    JobFailed,
    Preempted,
    finished_result,
    goes_on,
    keyboard_interrupts,
    objective,
    record,
    report_entries,
    write_result,
)
from harness.runs.ranks import absent_ranks_reported
from harness.support.garbage import without_collections

__all__ = ["Objective", "run"]

Objective = float | tuple[float | None, ...] | None
"""Monitored value, or a tuple of those of ``objectives``, for the sampler of a sweep; None instead of NaN."""


@absent_ranks_reported()
def run(config: DictConfig, asked_for: Command) -> Objective:
    """Train and test on this rank: start the job, execute it, write its result.

    Args:
        config: the whole configuration.
        asked_for: command that has started the run.

    Raises:
        JobFailed: the job has failed and has reported why.
        Preempted: it was asked to stop, and has saved.
    """
    config.output_dir = share("output_dir", str(Path(config.output_dir).absolute()))
    output_dir, limit, is_point = Path(config.output_dir), time_limit(config), asked_for.point is not None
    if is_point and goes_on(config):
        before = json.loads(share("finished", json.dumps(finished_result(output_dir, asked_for)), limit))
        if before:
            print(f"finished before: {output_dir}", flush=True)
            return objective(config, before["values"])
    job, begin, ranks = None, time.monotonic(), launched_ranks()  # Lightning may have forgotten them in the end
    try:
        with without_collections():
            job = start(config, limit, asked_for)
        with (
            record(output_dir, asked_for, report_entries(config)) if launched_rank() == 0 else nullcontext(),
            reported(job.position, limit),
            keyboard_interrupts(),
        ):
            results = execute(job)
            if launched_rank() == 0:
                seconds = time.monotonic() - begin
                write_result(output_dir, config.monitor, results, seconds, ranks, config.get("objectives") or ())
    except (Preempted, Interrupted) as error:
        if launched_rank() == 0:
            reason = "interrupted" if isinstance(error, Interrupted) else error
            print(f"\nstopped: {reason}. The same command with resume=auto goes on.", flush=True)
        raise
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if getattr(error, "on_all_ranks", False) is True:  # such as a loss that is not finite
            _fail_together(error, job, max(limit, START_LIMIT))
        if not isinstance(error, BAD_INPUT):
            raise
        if launched_rank() == 0:
            if not is_point:
                _remove_if_empty(output_dir)
            print(f"\nerror: {message(error)}\n{HINT}", file=sys.stderr, flush=True)
        raise JobFailed(message(error)) from error
    finally:
        if is_point:  # the next point in this process has a run of its own
            _finish_loggers(job, exit_code=1 if sys.exc_info()[0] else 0)
    return objective(config, results)


def _fail_together(error: Exception, job: Job | None, limit: timedelta) -> NoReturn:
    """Report an error of all ranks once, and exit when all is written: a launcher ends the others with the first."""
    if launched_rank() == 0:
        _finish_loggers(job, exit_code=1)
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
    with suppress(RankAbsentError):
        share("all is written", "", limit)
    raise JobFailed(str(error)) from error


def _finish_loggers(job: Job | None, exit_code: int) -> None:
    for logger in job.loggers if job else []:
        if isinstance(logger, FinishesRun):
            logger.finish(exit_code)


def _remove_if_empty(output_dir: Path) -> None:
    """Remove the output directory of a refused job, which holds nothing but Hydra's copy of the config."""
    if output_dir.is_dir() and {path.name for path in output_dir.iterdir()} == {".hydra"}:
        shutil.rmtree(output_dir, ignore_errors=True)
