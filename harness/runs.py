"""The record that a run keeps in its output directory: who writes there, by which command, and how it ended."""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["RECORD", "claim", "interrupted_run", "is_interrupted", "read", "record"]

RECORD = "run.json"


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
            f"since {found.get('started')}). Wait for it or end it, or give this one another hydra.run.dir."
        ) from None
    except OSError as error:  # a file system without locks: better none than no training
        warnings.warn(
            f"{output_dir} cannot be locked ({error}): take care that no other run writes there.", stacklevel=2
        )
    return lock


def read(output_dir: Path) -> dict[str, Any]:
    """Record of the run in a directory; empty where there is none."""
    try:
        found = json.loads((output_dir / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def record(output_dir: Path, command: Sequence[str]) -> Iterator[None]:
    """Write down that a run is going on, and in the end how it ended: finished, preempted or failed.

    A run that is killed stays "running".
    """
    entry = {
        "command": list(command),
        "started": datetime.now().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
    }
    _write(output_dir, {**entry, "state": "running"})
    state = "failed"
    try:
        yield
        state = "finished"
    except BaseException as error:
        state = "preempted" if type(error).__name__ == "Preempted" else "failed"
        raise
    finally:
        _write(output_dir, {**entry, "state": state, "ended": datetime.now().isoformat(timespec="seconds")})


def _write(output_dir: Path, entry: dict[str, Any]) -> None:
    part = output_dir / f".{RECORD}.part"
    try:
        part.write_text(json.dumps(entry, indent=1) + "\n")
        os.replace(part, output_dir / RECORD)
    except OSError as error:
        print(f"warning: {output_dir / RECORD} cannot be written: {error}", file=sys.stderr)


def is_interrupted(output_dir: Path, command: Sequence[str]) -> bool:
    """Whether the last run in a directory was given the same command, and has not finished."""
    found = read(output_dir)
    return found.get("state") not in (None, "finished") and _identity(found.get("command", [])) == _identity(command)


def _identity(command: Sequence[str]) -> list[str]:
    """The overrides in any order; whether it is to be resumed makes no other training of it."""
    return sorted(str(each) for each in command if not str(each).lstrip("+").startswith("resume="))


def interrupted_run(command: Sequence[str], root: Path) -> Path | None:
    """The newest output directory under ``root`` that was given the same command, if it has not finished.

    Args:
        command: the overrides, in any order.
        root: folder of output directories.
    """
    same = [
        each.parent
        for each in root.rglob(RECORD)
        if _identity(read(each.parent).get("command", [])) == _identity(command)
    ]
    newest = max(same, key=lambda folder: read(folder).get("started", ""), default=None)
    return newest if newest is not None and is_interrupted(newest, command) else None
