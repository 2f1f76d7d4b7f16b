"""The record that a run keeps in its output directory: who writes there, by which command, how it ended, with what.

``run.json`` is written when a run begins and when it ends, ``result.json`` when it has come to its end. Both are the
old or the new one at any time.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.errors import CompactHydraException

from harness.runs.command import Command
from harness.runs.exits import Interrupted, Preempted

__all__ = [
    "RECORD",
    "RESULT",
    "claim",
    "finished_result",
    "interrupted_run",
    "is_interrupted",
    "latest_run",
    "note_failure",
    "read",
    "record",
    "write_result",
]

RECORD = "run.json"
RESULT = "result.json"


def claim(output_dir: Path) -> FileLock:
    """Take an output directory for this process until it ends, however it ends.

    Raises:
        ValueError: another process has it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        found = read(output_dir)
        raise ValueError(
            f"{output_dir} belongs to a run that is still going on (process {found.get('pid')} on {found.get('host')}, "
            f"since {found.get('started')}). Wait for it or end it, or give this one another hydra.run.dir, or "
            f"hydra.sweep.dir if it is a sweep."
        ) from None
    except OSError as error:  # a file system without locks: better none than no training
        warnings.warn(
            f"{output_dir} cannot be locked ({error}): take care that no other run writes there.", stacklevel=2
        )
    return lock


def read(output_dir: Path, name: str = RECORD) -> dict[str, Any]:
    """Record of the run in a directory, or its result; empty where there is none."""
    try:
        found = json.loads((output_dir / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def record(output_dir: Path, command: Command) -> Iterator[None]:
    """Write down that a run is going on, and in the end how it ended, and by what error.

    That is "finished", "preempted", "interrupted" or "failed". A run that is killed stays "running".
    """
    entry = _entry(command)
    with suppress(OSError):
        (output_dir / RESULT).unlink(missing_ok=True)  # of a run before
    _write(output_dir / RECORD, {**entry, "state": "running"})
    end: dict[str, Any] = {"state": "finished"}
    try:
        yield
    except BaseException as error:
        end = _failure(error)
        if isinstance(error, Preempted):
            end = {"state": "preempted"}
        if isinstance(error, Interrupted | KeyboardInterrupt):
            end = {"state": "interrupted"}
        raise
    finally:
        _write(output_dir / RECORD, {**entry, **end, "ended": _now()})


def note_failure(output_dir: Path, command: Command, error: BaseException | str, has_begun: bool = False) -> None:
    """Write down that a run has failed which could not do so itself, since it was refused or killed.

    Nothing is written where the directory belongs to another run that is going on, nor over what the run has written
    itself.

    Args:
        output_dir: of the run.
        command: by which it was asked for.
        error: why it has failed.
        has_begun: whether what is there is of this run; otherwise the results of one that has finished are kept.
    """
    with suppress(ValueError):
        lock = claim(output_dir)
        found = read(output_dir)
        ours = _identity_in(found, command) == command.identity
        is_told = found.get("pid") == os.getpid() and found.get("state") != "running"
        if not (ours and is_told) and (has_begun or found.get("state") != "finished"):
            # a record of the same run that was cut off knows when it started, and where
            entry = found if ours and found.get("state") == "running" else _entry(command)
            with suppress(OSError):
                (output_dir / RESULT).unlink(missing_ok=True)
            _write(output_dir / RECORD, {**entry, **_failure(error), "ended": _now()})
        lock.release()


def write_result(
    output_dir: Path,
    monitor: str,
    values: Mapping[str, float],
    seconds: float,
    ranks: int = 1,
    objectives: Sequence[str] = (),
) -> None:
    """Write ``result.json``, what a report or the sampler of a sweep reads of a run.

    Args:
        output_dir: of the run.
        monitor: log key of the monitored value, which becomes the ``objective``.
        values: by log key; those of validations and tests are kept, and what is asked for. NaN becomes null.
        seconds: how long it took.
        ranks: how many took part.
        objectives: log keys of a sweep with several objectives.
    """
    asked_for = {monitor, *objectives}
    kept = {key: _finite(each) for key, each in values.items() if key.startswith(("val", "test")) or key in asked_for}
    result = {
        "monitor": monitor,
        "objective": _finite(values.get(monitor)),
        "values": kept,
        "seconds": round(seconds, 3),
        "ranks": ranks,
    }
    if objectives:
        result["objectives"] = {key: _finite(values.get(key)) for key in objectives}
    _write(output_dir / RESULT, result)


def finished_result(output_dir: Path, command: Command) -> dict[str, Any]:
    """Result of the run in a directory, if it was given the same command and has finished; empty otherwise."""
    found = read(output_dir)
    if found.get("state") != "finished" or _identity_in(found, command) != command.identity:
        return {}
    return read(output_dir, RESULT)


def _entry(command: Command) -> dict[str, Any]:
    return {
        "command": list(command.typed),
        "overrides": list(command.overrides),
        "started": _now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _failure(error: BaseException | str) -> dict[str, Any]:
    plain = isinstance(error, str | SystemExit) or (isinstance(error, CompactHydraException) and str(error))
    return {"state": "failed", "error": str(error) if plain else f"{type(error).__name__}: {error}".rstrip(": ")}


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def _write(path: Path, entry: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(entry, indent=1) + "\n")
        os.replace(part, path)
    except OSError as error:
        print(f"warning: {path} cannot be written: {error}", file=sys.stderr)


def is_interrupted(output_dir: Path, command: Command) -> bool:
    """Whether the last run in a directory was given the same command, and has not finished."""
    found = read(output_dir)
    return found.get("state") not in (None, "finished") and _identity_in(found, command) == command.identity


def _identity_in(found: Mapping[str, Any], command: Command) -> list[str]:
    """Identity of the run in a record, as that of the command would be."""
    written = Command(tuple(found.get("command", ())), tuple(found.get("overrides", ())), command.point)
    return written.identity


def latest_run(command: Command, root: Path) -> Path | None:
    """The newest output directory under ``root`` that was given the same command line, finished or not.

    Args:
        command: of a run on its own, or of a whole sweep.
        root: folder of output directories.
    """
    same = [each.parent for each in root.rglob(RECORD) if _identity_in(read(each.parent), command) == command.identity]
    return max(same, key=lambda folder: read(folder).get("started", ""), default=None)


def interrupted_run(command: Command, root: Path) -> Path | None:
    """The same if it has not finished."""
    newest = latest_run(command, root)
    return newest if newest is not None and is_interrupted(newest, command) else None
