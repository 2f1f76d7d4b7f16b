"""Entry point: trains and tests a force field from Hydra configs, on one rank or under torchrun on many.

    python -m harness.train                                        # the embedded alloy
    python -m harness.train data=file data.train=my.xyz loss.coeffs.forces=10
    torchrun --nproc-per-node 2 -m harness.train ...               # the same on two ranks
    python -m harness.train --multirun loss.coeffs.forces=1,10,100 # a sweep

``conf/train.yaml`` is the table of contents of what can be set.
"""

from __future__ import annotations

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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import hydra
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from harness.callbacks import NonFiniteError, Preempted, ResumeCheckpoint
from harness.config.explain import BAD_INPUT, HINT, explain, message
from harness.config.resolvers import RUN_STAMP, config_folder, now
from harness.distributed import (
    START_LIMIT,
    RankAbsentError,
    agree,
    launched_rank,
    launched_ranks,
    share,
    take_ranks_of_submitit,
)
from harness.job import Job, execute, prepare
from harness.job.consistency import facts, refusal
from harness.job.failures import reported
from harness.loggers import WandbLogger
from harness.runs import (
    COMPOSED,
    FAILED,
    QUIET_RANK,
    SWEEP,
    SWEEPS,
    TYPED,
    Command,
    Interrupted,
    JobFailed,
    PointFailedError,
    asks_for_sweep,
    claim,
    command,
    finished_result,
    goes_on,
    interrupted_run,
    is_interrupted,
    label,
    latest_run,
    note_failure,
    objective,
    point_name,
    record,
    report_entries,
    typed,
    write_result,
)

__all__ = ["main", "quieten", "run_job"]

_STAMP = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"


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
            record(output_dir, asked_for, report_entries(config)) if launched_rank() == 0 else nullcontext(),
            reported(job.position, limit),
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
    except BAD_INPUT as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        text = refused or message(error)
        if launched_rank() == 0:
            if not is_point:
                _leave_no_trace(output_dir)
            print(f"\nerror: {text}\n{HINT}", file=sys.stderr, flush=True)
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
        shown = message(mistake) if isinstance(mistake, BAD_INPUT) else f"{type(mistake).__name__}: {mistake}"
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
        except BAD_INPUT as error:
            found["error"] = message(error)
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


def quieten() -> None:
    """Leave out what libraries say at every start and no user of this command can act on."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # of the strides of dimensions of size 1, which mean nothing
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of Optuna
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    warnings.formatwarning = _formatted


_FORMAT = warnings.formatwarning


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Warnings of this package without the line of code that they come from, which tells a user nothing."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"warning: {message}\n"
    return _FORMAT(message, category, filename, lineno, line)


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
        elif {path.name for path in folder.glob("*")} <= {"multirun.yaml", SWEEP, ".lock"}:
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
        stamp = share("run_stamp", agree("run_stamp", stamp or now()) if launched_rank() == 0 else "")
    else:  # points of a sweep, if it is one, may be composed in other processes
        os.environ[TYPED] = json.dumps(typed())
    os.environ[RUN_STAMP] = stamp or now()
    COMPOSED.clear()
    FAILED.clear()
    SWEEPS.clear()
    said = io.StringIO()
    try:
        with redirect_stderr(_UntilComposed(said)):
            hydra.main(version_base="1.3", config_path=config_folder(), config_name="train")(run_job)()
        sys.stderr.write(said.getvalue())  # of a sweep whose points run in other processes
        if FAILED:
            sys.exit(1)
    except SystemExit as ended:
        if ended.code in (None, 0):  # --help and the like
            sys.stderr.write(said.getvalue())
        elif not COMPOSED.is_set():  # a mistake that Hydra has found itself
            if launched_rank() == 0:
                share("output_dir", "")  # which ranks that found none are waiting for
            refused = refusal(explain(said.getvalue()))
            if launched_rank() == 0:
                print(f"\nerror: {refused}", file=sys.stderr)
        if FAILED and ended.code == 1:
            print(f"\nerror: failed points of the sweep: {', '.join(FAILED)}", file=sys.stderr)
        raise


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


if __name__ == "__main__":
    # by its name, under which launchers of Hydra find the job in other processes
    from harness.train import main as named_main

    named_main()
