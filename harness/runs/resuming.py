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

    It is looked for with ``resume=auto``, and after a restart of the job by SLURM, in ``outputs`` and ``multirun``, or
    where the command line has its ``hydra.run.dir`` and ``hydra.sweep.dir``. A directory whose name has no such part
    is the same at each start, and needs no stamp.
    """
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    plain = [argument.lstrip("+").replace("'", "").replace('"', "") for argument in sys.argv[1:]]
    if not requeued and "resume=auto" not in plain:
        return None
    runs, sweeps = _root("hydra.run.dir", "outputs"), _root("hydra.sweep.dir", "multirun")
    command = Command(typed(), ())
    found = None if is_sweep else interrupted_run(command, runs)
    if found is not None:
        return _stamp(found, runs)
    point = latest_run(command, sweeps)  # also if the command line does not show it: an experiment can ask for a sweep
    if point is not None:
        return _stamp(point, sweeps)
    if is_sweep:  # a run on its own knows its directory later, and says so then
        print(f"resume: no sweep of this command under {sweeps}; it starts anew", flush=True)
    return None


def _root(key: str, default: str) -> Path:
    """Folder that has the directories of runs: the part of a setting that is the same for all, up to an interpolation.

    Args:
        key: of the command line.
        default: if it is not given there.
    """
    given = [value for name, _, value in (argument.partition("=") for argument in sys.argv[1:]) if name == key]
    if not given:
        return Path(default).absolute()
    fixed, interpolation, _ = given[-1].strip("'\"").partition("${")
    return Path(
        fixed.rpartition("/")[0] if interpolation and "/" in fixed else "" if interpolation else fixed
    ).absolute()


def _stamp(found: Path, root: Path) -> str | None:
    """Part of the directory of a run that is the moment of its start."""
    return next((part for part in found.relative_to(root).parts if re.fullmatch(_STAMP, part)), None)
