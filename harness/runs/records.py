"""Record of a run in its output directory: its command, how it ended, and its result.

``run.json`` is written when a run begins and when it ends, ``result.json`` when it has come to its end. Readers find
the old file or the new one at any time.
"""

from __future__ import annotations

import json
import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.runs.command import Command, point_name
from harness.runs.exits import Interrupted, Preempted
from harness.support.files import write_text_whole
from harness.support.log_keys import is_of_evaluation
from harness.support.warn import warn

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
    "report_entries",
    "write_json",
    "write_result",
]

RECORD = "run.json"
RESULT = "result.json"


def claim(output_dir: Path) -> FileLock:
    """Lock an output directory for this process until it ends, also if it is killed.

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
    """Read ``run.json`` of a directory, or another file of that kind; empty where it is missing or torn."""
    try:
        found = json.loads((output_dir / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that readers see whole or not at all; a warning where it cannot be written."""
    try:
        write_text_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        warn(f"{path} cannot be written: {error}")


def report_entries(config: DictConfig) -> dict[str, Any]:
    """Entries of ``run.json`` that the report of a sweep needs from the configuration.

    Returns:
        ``name`` of a sweep point, ``monitor``, ``objectives``, and ``project``, ``group`` and ``entity`` of the W&B
        run; None where there is no such thing.
    """
    objectives = _select(config, "objectives")
    return {
        "name": point_name(),
        "monitor": _select(config, "monitor"),
        "objectives": list(objectives) if objectives else None,
        **_of_wandb(config),
    }


_WANDB_VARIABLES = {"project": "WANDB_PROJECT", "group": "WANDB_RUN_GROUP", "entity": "WANDB_ENTITY"}


def _of_wandb(config: DictConfig) -> dict[str, Any]:
    """Project, group and entity of the W&B run: of the first such logger's section, else as W&B's variables say."""
    sections = [f"logger.{name}" for name in _select(config, "logger") or {}]
    wandb = [each for each in sections if str(_select(config, f"{each}._target_")).endswith(".WandbLogger")]
    if not wandb:
        return dict.fromkeys(_WANDB_VARIABLES)
    return {
        key: _select(config, f"{wandb[0]}.{key}") or os.environ.get(variable) or None
        for key, variable in _WANDB_VARIABLES.items()
    }


def _select(config: DictConfig, name: str) -> Any:
    """Value of a setting; None if it is missing, or cannot be resolved here."""
    with suppress(OmegaConfBaseException):
        return OmegaConf.select(config, name)
    return None


@contextmanager
def record(output_dir: Path, command: Command, entries: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Write ``run.json`` at the begin of the block and at its end, with the ``state`` and the error that ended it.

    The state is "finished", "preempted", "interrupted" or "failed". A run that is killed stays "running".

    Args:
        output_dir: of the run.
        command: of the run.
        entries: further ones, see :func:`report_entries`.
    """
    entry = {**_entry(command), **(entries or {})}
    with suppress(OSError):
        (output_dir / RESULT).unlink(missing_ok=True)  # of a run before
    write_json(output_dir / RECORD, {**entry, "state": "running"})
    end: dict[str, Any] = {"state": "finished"}
    try:
        yield
    except Preempted:
        end = {"state": "preempted"}
        raise
    except (Interrupted, KeyboardInterrupt):
        end = {"state": "interrupted"}
        raise
    except BaseException as error:
        end = _failure(error)
        raise
    finally:
        write_json(output_dir / RECORD, {**entry, **end, "ended": _now()})


def note_failure(output_dir: Path, command: Command, error: BaseException | str, has_begun: bool = False) -> None:
    """Write ``run.json`` for a run that could not do so itself, since it was refused or killed.

    Nothing is written where the directory belongs to another run that is going on, nor over a failure that the run has
    written itself.

    Args:
        output_dir: of the run.
        command: of the run.
        error: the reason of the failure.
        has_begun: True if the files in the directory are of this run; otherwise results of a run that has finished
            are kept.
    """
    with suppress(ValueError):
        lock = claim(output_dir)
        found = read(output_dir)
        ours = _identity_in(found, command) == command.identity
        is_written = found.get("pid") == os.getpid() and found.get("state") != "running"
        if not (ours and is_written) and (has_begun or found.get("state") != "finished"):
            # a record of the same run that was cut off knows when it started, and where
            entry = found if ours and found.get("state") == "running" else _entry(command)
            with suppress(OSError):
                (output_dir / RESULT).unlink(missing_ok=True)
            write_json(output_dir / RECORD, {**entry, **_failure(error), "ended": _now()})
        lock.release()


def write_result(
    output_dir: Path,
    monitor: str,
    values: Mapping[str, float],
    seconds: float,
    ranks: int = 1,
    objectives: Sequence[str] = (),
) -> None:
    """Write ``result.json``, which the report of a sweep, a sampler and a sweep that is resumed read.

    Args:
        output_dir: of the run.
        monitor: log key of the monitored value, which becomes the ``objective``.
        values: by log key; those of validations and tests are written, and ``monitor`` and ``objectives``. NaN
            becomes null.
        seconds: of wall time.
        ranks: number of processes that trained.
        objectives: log keys of a sweep with several objectives.
    """
    always = {monitor, *objectives}
    kept = {key: _finite(value) for key, value in values.items() if is_of_evaluation(key) or key in always}
    result = {
        "monitor": monitor,
        "objective": _finite(values.get(monitor)),
        "values": kept,
        "seconds": round(seconds, 3),
        "ranks": ranks,
    }
    if objectives:
        result["objectives"] = {key: _finite(values.get(key)) for key in objectives}
    write_json(output_dir / RESULT, result)


def finished_result(output_dir: Path, command: Command) -> dict[str, Any]:
    """Read ``result.json`` of a directory, if the same command has finished there; empty otherwise."""
    found = read(output_dir)
    if found.get("state") != "finished" or _identity_in(found, command) != command.identity:
        return {}
    return read(output_dir, RESULT)


def _entry(command: Command) -> dict[str, Any]:
    return {
        "command": list(command.typed),
        "overrides": list(command.overrides),
        "point": command.point,
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


def is_interrupted(output_dir: Path, command: Command) -> bool:
    """True if the last run in a directory had the same command, and has not finished."""
    found = read(output_dir)
    return found.get("state") not in (None, "finished") and _identity_in(found, command) == command.identity


def _identity_in(found: Mapping[str, Any], command: Command) -> list[str]:
    """Identity of the command in a record, comparable with ``command.identity``."""
    written = Command(tuple(found.get("command", ())), tuple(found.get("overrides", ())), command.point)
    return written.identity


def latest_run(command: Command, root: Path) -> Path | None:
    """Newest output directory under ``root`` that has a run of the same command, finished or not.

    Args:
        command: of a run on its own, or of a whole sweep.
        root: folder of output directories.
    """
    runs = {file.parent: read(file.parent) for file in root.rglob(RECORD)}
    same = [folder for folder, found in runs.items() if _identity_in(found, command) == command.identity]
    return max(same, key=lambda folder: runs[folder].get("started", ""), default=None)


def interrupted_run(command: Command, root: Path) -> Path | None:
    """:func:`latest_run`, if it has not finished."""
    newest = latest_run(command, root)
    return newest if newest is not None and is_interrupted(newest, command) else None
