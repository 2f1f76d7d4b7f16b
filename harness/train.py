"""Entry point: trains and tests a force field from Hydra configs, on one rank or on many.

    python -m harness.train                                        # the embedded alloy
    python -m harness.train data=file data.train=my.xyz loss.coeffs.forces=10
    torchrun --nproc-per-node 2 -m harness.train ...               # the same on two ranks
    srun -n 2 python -m harness.train ...                          # likewise, as mpirun, mpiexec and jsrun do
    python -m harness.train --multirun loss.coeffs.forces=1,10,100 # a sweep

``conf/train.yaml`` is the table of contents of what can be set.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from harness.config.command_line import ConfigError, run_with_hydra
from harness.config.explain import BAD_INPUT, HINT, message
from harness.config.resolvers import now
from harness.distributed import (
    START_LIMIT,
    RankAbsentError,
    agree,
    launched_rank,
    launched_ranks,
    share,
)
from harness.job import Job, execute
from harness.job.consistency import refusal
from harness.job.failures import reported
from harness.job.protocols import FinishesRun
from harness.job.start import absent_ranks_reported, settle_ranks, start, time_limit
from harness.runs import (
    POINT,
    RUN_STAMP,
    TYPED,
    Command,
    Interrupted,
    JobFailed,
    PointFailedError,
    Preempted,
    SweepPoint,
    arguments_of_rank,
    asks_for_sweep,
    command,
    current_session,
    finished_result,
    goes_on,
    hydra_elsewhere,
    interrupted_stamp,
    keyboard_interrupts,
    label,
    new_session,
    note_failure,
    objective,
    point_name,
    record,
    report_entries,
    typed,
    with_run_dir,
    write_result,
)
from harness.support.process import end_with_parent
from harness.support.warn import quieten

__all__ = ["main", "run_job", "train"]

Objective = float | tuple[float | None, ...] | None
"""Monitored value, or a tuple of those of ``objectives``, for the sampler of a sweep; None instead of NaN."""


def main() -> None:
    """Command line of ``harness-train``."""
    if not end_with_parent(signal.SIGKILL):
        os.environ.pop(POINT, None)  # this command was started by a rank of a sweep point, and is none
    quieten()
    with new_session() as session, absent_ranks_reported():
        settle_ranks()
        _settle_arguments()
        try:
            run_with_hydra(run_job)
            if session.failed:
                sys.exit(JobFailed.exit_code)
        except ConfigError as error:
            _refuse(error)
        except KeyboardInterrupt:
            print("\nstopped: interrupted", file=sys.stderr)
            raise Interrupted from None
        except SystemExit as error:
            if session.failed and error.code == JobFailed.exit_code:
                print(f"\nerror: failed points of the sweep: {', '.join(session.failed)}", file=sys.stderr)
            raise


def _settle_arguments() -> None:
    """Arguments of this rank, and the moment in the name of the output directory, the same on all ranks."""
    # Hydra wants all overrides in one piece: an option among them would end it
    arguments = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    num_ranks, is_sweep = launched_ranks(), asks_for_sweep(arguments)
    if SweepPoint.of_environment() is None:
        try:
            arguments = with_run_dir(arguments, is_sweep)
        except ValueError as error:
            if launched_rank() == 0:
                print(f"\nerror: {error}", file=sys.stderr)
            raise JobFailed(str(error)) from None
    sys.argv[1:] = arguments_of_rank(arguments, launched_rank()) if num_ranks > 1 else arguments
    if SweepPoint.of_environment() is not None:  # the sweep has settled the rest
        return
    os.environ.pop(TYPED, None)  # of a sweep that has started this command
    if num_ranks > 1 and is_sweep:
        sys.exit(_SWEEP_ON_RANKS.format(num_ranks) if launched_rank() == 0 else 1)
    stamp = interrupted_stamp(is_sweep) if launched_rank() == 0 else None
    if num_ranks > 1:  # each rank's clock would give it a folder of its own
        stamp = share("run_stamp", agree("run_stamp", stamp or now()) if launched_rank() == 0 else "")
    else:  # points of a sweep, if it is one, may be composed in other processes
        os.environ[TYPED] = json.dumps(typed())
    os.environ[RUN_STAMP] = stamp or now()


def _refuse(error: ConfigError) -> NoReturn:
    """Report a wrong configuration once for all ranks, and exit."""
    if launched_rank() == 0:
        share("output_dir", "")  # which ranks that found no mistake are waiting for
    refused = refusal(str(error))
    if launched_rank() == 0:
        print(f"\nerror: {refused}", file=sys.stderr)
    sys.exit(error.exit_code)


def run_job(config: DictConfig) -> Objective:
    """Hydra's job: a run on its own, or a sweep point; mistakes of users end it with one message, not a traceback.

    A run that is preempted exits with :data:`~harness.callbacks.REQUEUE_EXIT_CODE`.

    Raises:
        JobFailed: a run on its own, or a rank of a sweep point, has failed and has reported why.
        PointFailedError: a sweep point in this process has.
    """
    session, asked_for = current_session(), command()
    session.has_composed = True
    if launched_rank() == 0 and (away := hydra_elsewhere(config)):
        _refuse(ConfigError(away, 1))
    if asked_for.point is None:
        return train(config, asked_for)
    is_rank = SweepPoint.of_environment() is not None
    if not is_rank:
        if launched_ranks() > 1 and os.environ.get(TYPED) is None:
            sys.exit(_SWEEP_ON_RANKS.format(launched_ranks()))
        if "SUBMITIT_EXECUTOR" in os.environ:  # in a process that has not come through `main`
            quieten()
            settle_ranks()
    try:
        return train(config, asked_for)
    except SystemExit as error:
        if isinstance(error, Preempted | Interrupted) or not error.code:
            raise
        reason = str(error)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    # outside of the handlers, so that it does not keep the model of the point alive
    if launched_rank() == 0:
        note_failure(Path(config.output_dir), asked_for, reason)
    if is_rank:  # the sweep reads it
        raise JobFailed(reason)
    name = label(asked_for.point, point_name())
    session.failed.append(name)
    raise PointFailedError(f"{name} failed: {reason}")


@absent_ranks_reported()
def train(config: DictConfig, asked_for: Command) -> Objective:
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


_SWEEP_ON_RANKS = (
    "error: --multirun under a launcher would run the whole sweep on each of the {} ranks. Start a sweep without "
    "torchrun, srun or mpirun; hydra/launcher=torchrun hydra.launcher.nproc_per_node=2 makes each of its points a job "
    "of two ranks."
)


if __name__ == "__main__":
    # by its name, under which launchers of Hydra find the job in other processes
    from harness.train import main as named_main

    named_main()
