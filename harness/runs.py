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

__all__ = ["RECORD", "claim", "interrupted_run", "record"]

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


def interrupted_run(command: Sequence[str], root: Path) -> Path | None:
    """The newest output directory under ``root`` whose run was given the same command and has not finished.

    Args:
        command: the overrides, in any order.
        root: folder of output directories ``{name}/{stamp}``.
    """
    folders = [each.parent for each in root.glob(f"*/*/{RECORD}")]
    newest_first = sorted(folders, key=lambda folder: read(folder).get("started", ""), reverse=True)
    for folder in newest_first:
        found = read(folder)
        if sorted(map(str, found.get("command", []))) == sorted(command):
            return None if found.get("state") == "finished" else folder
    return None
