"""Reading of a sweep's directory, finished or not, from the files that its runs have written for it.

Those are ``sweep.json``, and ``run.json``, ``result.json`` and ``csv/metrics.csv`` of each point.
"""

from __future__ import annotations

import csv
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import runs
from harness.support.checks import is_number, is_whole_number
from harness.sweep.points import Sweep, SweepPoint

__all__ = ["as_number", "read_sweep"]

_VALIDATION_OR_TEST = re.compile(r"(val|test)\d+_\w+/")
_WITHOUT_ERROR = {"preempted": "asked to stop, and saved", "interrupted": "by Ctrl-C"}
_MONITOR, _PROJECT = "val0_epoch/weighted_sum", "harness"  # where nothing names one, as in conf/


def read_sweep(folder: Path) -> Sweep:
    """Read the points of a sweep; they may be missing or unfinished, or have torn files.

    Values are those of ``result.json``, or else the last ones of each key in ``csv/metrics.csv``.

    Args:
        folder: ``multirun/<name>/<stamp>``.

    Raises:
        ValueError: there is no such directory, or it is not that of a sweep.
    """
    folder = folder.absolute()
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Expected the directory of a sweep, multirun/<name>/<date and time>.")
    if not folder.is_dir():
        raise ValueError(f"There is no directory {folder}. A sweep's is multirun/<name>/<date and time>.")
    plan = runs.read(folder, runs.SWEEP)
    records = {point: runs.read(point) for point in _point_folders(folder, has_plan=bool(plan))}
    if not plan and all(record.get("point") is None for record in records.values()):
        raise ValueError(_not_a_sweep(folder))
    asked = plan.get("swept") or []
    grid = [{**(plan.get("fixed") or {}), **settings} for settings in plan.get("points") or []]
    points = [_read_point(point, folder, record, grid) for point, record in records.items()]
    points += [
        SweepPoint("-", None, settings, "not started", f"it has no {runs.RECORD}")
        for settings in grid
        if not any(all(point.overrides.get(name) == settings.get(name) for name in asked) for point in points)
    ]
    swept = [name for name in asked if any(name in point.overrides for point in points)]
    names = dict.fromkeys(name for point in points for name in point.overrides)
    swept += [name for name in names if name not in swept and len({point.overrides.get(name) for point in points}) > 1]

    def of_most(key: str, default: str = "") -> str:
        found = Counter(str(record[key]) for record in records.values() if record.get(key))
        return found.most_common(1)[0][0] if found else str(plan.get(key) or default)

    title = "/".join(folder.parts[-2:])  # the group that points have unless another one is given
    project, group = of_most("project", _PROJECT), of_most("group", title)
    entity = of_most("entity") or None
    return Sweep(folder, points, swept, of_most("monitor", _MONITOR), project, group, plan.get("planned"), entity)


def _point_folders(folder: Path, has_plan: bool) -> list[Path]:
    """Folders of points: the numbered ones, even if empty, and with ``sweep.json`` others that have ``run.json``."""
    found = {child for child in folder.iterdir() if child.is_dir() and child.name.isdigit()}
    if has_plan:
        found |= {file.parent for file in folder.rglob(runs.RECORD)} - {folder}
    return sorted(found, key=lambda point: [(int(part) if part.isdigit() else math.inf, part) for part in point.parts])


def _not_a_sweep(folder: Path) -> str:
    inside = [file.parent for file in folder.rglob(runs.SWEEP)]
    if inside:
        newest = max(inside, key=lambda sweep: sweep.name)
        return f"{folder} is not a sweep's directory, but has sweeps in it. Give one of them, such as {newest}."
    if (folder / runs.RECORD).is_file():
        return (
            f"{folder} is the output of a single training. Expected the directory of a sweep, with {runs.SWEEP} and a "
            f"folder for each point; its parent {folder.parent}?"
        )
    points = f"points with a number in their {runs.RECORD}"
    return f"{folder} is not a sweep's directory: neither {runs.SWEEP} nor {points} are in it."


def _read_point(folder: Path, root: Path, record: Mapping[str, Any], grid: Sequence[Mapping[str, str]]) -> SweepPoint:
    result = runs.read(folder, runs.RESULT)
    state, reason = _state(record, has_result=bool(result))
    values = _of_result(result) or _of_csv(folder / "csv" / "metrics.csv")
    monitor, objective = result.get("monitor"), as_number(result.get("objective", ""))
    if isinstance(monitor, str) and objective is not None:
        values.setdefault(monitor, objective)
    if state == "finished" and not values:
        reason = f"no values: neither {runs.RESULT} nor csv/metrics.csv has any"
    seconds, ranks = result.get("seconds"), result.get("ranks") or record.get("ranks")
    return SweepPoint(
        str(folder.relative_to(root)),
        folder,
        _overrides(folder, record, grid),
        state,
        reason,
        float(seconds) if is_number(seconds) else _seconds(record, state),
        ranks if is_whole_number(ranks) else None,
        values,
    )


def _state(record: Mapping[str, Any], has_result: bool) -> tuple[str, str]:
    """State of a point, and the reason where it has not finished."""
    state = record.get("state") or ("finished" if has_result else "starting")
    if state == "running" and has_result:  # killed after all was done
        return "finished", ""
    if state == "running" and _is_gone(record):
        return "killed", f"its process {record.get('pid')} on {record.get('host')} has gone"
    if state == "running":
        return state, f"since {record.get('started', '?')}, on {record.get('host', '?')}"
    if state == "starting":
        return state, f"it has written no {runs.RECORD}: it is starting, or was killed or refused before"
    if state == "finished":
        return state, ""
    return str(state), _one_line(str(record.get("error") or _WITHOUT_ERROR.get(state, "no error recorded")))


def _is_gone(record: Mapping[str, Any]) -> bool:
    """True if the process of a run is known to have ended; on another host it is not known."""
    if record.get("host") != socket.gethostname() or not is_whole_number(record.get("pid")):
        return False
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _one_line(text: str, longest: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _overrides(folder: Path, record: Mapping[str, Any], grid: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """Overrides of a point by its record, or else by its number in the grid."""
    if isinstance(record.get("overrides"), list):
        return runs.settings_of(map(str, record["overrides"]))
    number = int(folder.name) if folder.name.isdigit() else len(grid)
    return grid[number] if number < len(grid) else {}


def _of_result(result: Mapping[str, Any]) -> dict[str, float]:
    """Values of validations and tests in ``result.json``."""
    values = result.get("values")
    numbers = {key: as_number(value) for key, value in values.items()} if isinstance(values, Mapping) else {}
    return {key: value for key, value in numbers.items() if value is not None and _VALIDATION_OR_TEST.match(key)}


def _of_csv(path: Path) -> dict[str, float]:
    """The last value of each key of a validation or test; the last line may be torn."""
    found: dict[str, float] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                for key, cell in row.items():
                    if key and cell and _VALIDATION_OR_TEST.match(key) and (value := as_number(cell)) is not None:
                        found[key] = value
    except (OSError, csv.Error, UnicodeDecodeError):
        pass
    return found


def as_number(value: Any) -> float | None:
    """Value as a float, NaN for JSON's null; None where it is no number."""
    if value is None:
        return math.nan
    if not is_number(value) and not isinstance(value, str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _seconds(record: Mapping[str, Any], state: str) -> float | None:
    """Wall time from the begin of a run to its end, or until now if it is running."""
    try:
        started = datetime.fromisoformat(record["started"])
        ended = datetime.fromisoformat(record["ended"]) if "ended" in record else None
    except (KeyError, TypeError, ValueError):
        return None
    if ended is None and state != "running":
        return None
    return ((ended or datetime.now()) - started).total_seconds()
