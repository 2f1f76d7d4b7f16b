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
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from omegaconf import DictConfig

from harness.config.command_line import ConfigError, run_with_hydra
from harness.config.resolvers import now
from harness.distributed import launched_rank, launched_ranks
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
    hydra_elsewhere,
    interrupted_stamp,
    label,
    new_session,
    note_failure,
    point_name,
    typed,
    with_run_dir,
)
from harness.runs.ranks import absent_ranks_reported, settle_ranks
from harness.support.deferred import defer
from harness.support.garbage import importing
from harness.support.process import end_with_parent
from harness.support.warn import own_handlers, quieten, settle_rank

if TYPE_CHECKING:
    from harness.job.run import Objective

__all__ = ["main", "run_job"]


def main() -> None:
    """Command line of ``harness-train``."""
    if not end_with_parent(signal.SIGKILL):
        os.environ.pop(POINT, None)  # this command was started by a rank of a sweep point, and is none
    quieten()
    with new_session() as session, absent_ranks_reported():
        with importing():  # of torch, where there are ranks that have to meet
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
        from harness.distributed import agree, share

        stamp = share("run_stamp", agree("run_stamp", stamp or now()) if launched_rank() == 0 else "")
    else:  # points of a sweep, if it is one, may be composed in other processes
        os.environ[TYPED] = json.dumps(typed())
    os.environ[RUN_STAMP] = stamp or now()


def _refuse(error: ConfigError) -> NoReturn:
    """Report a wrong configuration once for all ranks, and exit."""
    refused: str | None = str(error)
    if launched_ranks() > 1:
        defer()
        with importing():
            from harness.distributed import share
            from harness.job.consistency import refusal
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
        return _run(config, asked_for)
    is_rank = SweepPoint.of_environment() is not None
    if not is_rank:
        if launched_ranks() > 1 and os.environ.get(TYPED) is None:
            sys.exit(_SWEEP_ON_RANKS.format(launched_ranks()))
        if "SUBMITIT_EXECUTOR" in os.environ:  # in a process that has not come through `main`
            quieten()
            settle_ranks()
    try:
        return _run(config, asked_for)
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


def _run(config: DictConfig, asked_for: Command) -> Objective:
    """Train on this rank."""
    run: Callable[[DictConfig, Command], Objective] = _training().run
    return run(config, asked_for)


@cache
def _training() -> ModuleType:
    """Import all that a training is made of, once it is certain that there will be one."""
    defer()
    with importing(), own_handlers():
        import harness.job.run as training

        settle_rank(launched_rank())
    return training


_SWEEP_ON_RANKS = (
    "error: --multirun under a launcher would run the whole sweep on each of the {} ranks. Start a sweep without "
    "torchrun, srun or mpirun; hydra/launcher=torchrun hydra.launcher.nproc_per_node=2 makes each of its points a job "
    "of two ranks."
)


if __name__ == "__main__":
    # by its name, under which launchers of Hydra find the job in other processes
    from harness.train import main as named_main

    named_main()
