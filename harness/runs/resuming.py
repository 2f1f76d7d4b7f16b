"""Lookup of the directory of an interrupted run or sweep, which the same command continues."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from harness.runs.command import Command, typed
from harness.runs.records import interrupted_run, latest_run

__all__ = ["interrupted_stamp"]

_STAMP = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"


def interrupted_stamp(is_sweep: bool) -> str | None:
    """Last part of the directory of the interrupted run or sweep that this command continues, if there is one.

    It is looked for with ``resume=auto``, and after a restart of the job by SLURM.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    plain = [argument.lstrip("+").replace("'", "").replace('"', "") for argument in sys.argv[1:]]
    if not requeued and "resume=auto" not in plain:
        return None
    runs, sweeps, command = Path("outputs").absolute(), Path("multirun").absolute(), Command(typed(), ())
    found = None if is_sweep else interrupted_run(command, runs)
    if found is not None:
        return found.name
    point = latest_run(command, sweeps)  # also if the command line does not show it: an experiment can ask for a sweep
    if point is not None:
        stamps = [part for part in point.relative_to(sweeps).parts if re.fullmatch(_STAMP, part)]
        return stamps[0] if stamps else None
    where, what = (sweeps, "sweep") if is_sweep else (runs, "interrupted run")
    print(f"resume: no {what} of this command under {where}; it starts anew", flush=True)
    return None
