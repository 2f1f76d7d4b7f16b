"""Reading of a sweep's directory, finished or not: its points and what was swept."""

from __future__ import annotations

import csv
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness import runs
from harness.runs import as_typed

__all__ = ["Point", "Sweep", "read_sweep"]

_OF_HYDRA = ".hydra/hydra.yaml"
_VALUE = re.compile(r"(val|test)\d+_\w+/")
_WITHOUT_ERROR = {"preempted": "told to leave, and saved", "interrupted": "by Ctrl-C"}
_ERROR_LINE = re.compile(r"(\w+\.)*(\w*(Error|Exception|Exit|Interrupt)|error)\b.*")


@dataclass(frozen=True)
class Point:
    """One training of a sweep.

    Attributes:
        name: its folder in that of the sweep; ``-`` if it has none.
        folder: where it is; None for a point that has not been started.
        overrides: what was given for it, by setting.
        state: finished, running, preempted, interrupted, failed, killed, starting, or not started.
        reason: why it is not finished, as far as it is known, or why it is not ranked.
        seconds: of wall time.
        ranks: processes that trained it.
        values: of its last validation and its test, by log key.
    """

    name: str
    folder: Path | None
    overrides: Mapping[str, str]
    state: str
    reason: str = ""
    seconds: float | None = None
    ranks: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether its values are final."""
        return self.state == "finished"


@dataclass(frozen=True)
class Sweep:
    """What the directory of a sweep holds.

    Attributes:
        folder: the directory.
        points: in the order of their numbers; those that have not been started are last.
        swept: settings in which points differ.
        monitor: log key of the value that the points were judged by.
        project: of the points' W&B runs.
        group: of the points' W&B runs.
        planned: number of points that were asked for, if it is known.
    """

    folder: Path
    points: Sequence[Point]
    swept: Sequence[str]
    monitor: str
    project: str
    group: str
    planned: int | None = None

    @property
    def title(self) -> str:
        """Its name: the last two parts of its directory."""
        return "/".join(self.folder.parts[-2:])

    def short(self, setting: str) -> str:
        """The last part of a setting's name, or as many as tell it from the others."""
        parts = setting.split(".")
        for number in range(1, len(parts)):
            name = ".".join(parts[-number:])
            if sum(f".{each}".endswith(f".{name}") for each in self.swept) == 1:
                return name
        return setting


def read_sweep(folder: Path) -> Sweep:
    """Read what there is of a sweep; points may be missing, unfinished, or have torn files.

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
    settings = _settings(folder)
    started = _point_folders(folder, is_sweep=settings is not None)
    if settings is None and not started:
        raise ValueError(_not_a_sweep(folder))
    settings = settings or DictConfig({})
    points = [_read_point(each, folder) for each in started]
    planned, missing = _planned(settings, [point.overrides for point in points])
    points += [Point("-", None, each, "not started", "it has left no folder") for each in missing]
    swept = [name for name in _sweep_settings(settings) if any(name in point.overrides for point in points)]
    names = dict.fromkeys(name for point in points for name in point.overrides)
    swept += [name for name in names if name not in swept and len({point.overrides.get(name) for point in points}) > 1]
    monitor, project, group = _of_config(started, folder)
    return Sweep(folder, points, swept, monitor, project, group, planned)


def _settings(folder: Path) -> DictConfig | None:
    """Hydra's settings of a sweep, which Optuna's sweeper leaves with the points alone; None if there are none."""
    if (folder / "multirun.yaml").is_file():
        return _read_yaml(folder / "multirun.yaml")
    ours = (file for file in sorted(folder.rglob(_OF_HYDRA)) if _sweep_of(file) == folder)
    return next((_read_yaml(file) for file in ours), None)


def _sweep_of(file: Path) -> Path | None:
    """Directory of the sweep that a point belongs to, by Hydra's settings of the point."""
    settings = _read_yaml(file)
    if OmegaConf.select(settings, "hydra.job.num") is None:  # a run on its own
        return None
    subdir = settings.hydra.sweep._get_node("subdir")  # as it is written: it is made of the point's number
    depth = 1 + len(Path(str(subdir)).parts)
    return file.parents[depth] if depth < len(file.parents) else None


def _point_folders(folder: Path, is_sweep: bool) -> list[Path]:
    """Folders of points: the numbered ones, even if empty, and others where Hydra's settings say that it is a sweep."""
    found = {each for each in folder.iterdir() if each.is_dir() and each.name.isdigit()}
    if is_sweep:
        found |= {each.parent for name in (".hydra", runs.RECORD) for each in folder.rglob(name)} - {folder}
    return sorted(found, key=lambda each: [(int(part) if part.isdigit() else math.inf, part) for part in each.parts])


def _not_a_sweep(folder: Path) -> str:
    inside = {each.parent for depth in ("*", "*/*", "*/*/*") for each in folder.glob(f"{depth}/multirun.yaml")}
    inside |= {found for each in folder.rglob(_OF_HYDRA) if (found := _sweep_of(each)) and folder in found.parents}
    if inside:
        newest = max(inside, key=lambda each: each.name)
        return f"{folder} is not a sweep's directory, but has sweeps in it. Give one of them, such as {newest}."
    if (folder / ".hydra").is_dir() or (folder / runs.RECORD).is_file():
        return (
            f"{folder} is the output of a single training. Expected the directory of a sweep, with multirun.yaml and a "
            f"folder for each point; its parent {folder.parent}?"
        )
    return f"{folder} is not a sweep's directory: neither multirun.yaml nor folders of points are in it."


def _read_point(folder: Path, root: Path) -> Point:
    record, result = runs.read(folder), runs.read(folder, runs.RESULT)
    state = str(record.get("state") or ("finished" if result else "starting"))
    reason = ""
    if state == "running":
        reason = f"since {record.get('started', '?')}, on {record.get('host', '?')}"
        if result:  # killed after all was done
            state, reason = "finished", ""
        elif _is_gone(record):
            state, reason = "killed", f"its process {record.get('pid')} on {record.get('host')} has gone"
    elif state == "starting":
        reason = f"it has written no {runs.RECORD}: it is starting, or was killed or refused before"
        reason = _last_error(folder, record) or reason
    elif state != "finished":
        reason = _last_error(folder, record) or _WITHOUT_ERROR.get(state, "no error recorded")
    values = result.get("values")
    of_result = {key: _number(value) for key, value in values.items()} if isinstance(values, Mapping) else {}
    found = {key: value for key, value in of_result.items() if value is not None and _VALUE.match(key)}
    found = found or _read_csv(folder / "csv" / "metrics.csv")
    monitor, objective = result.get("monitor"), _number(result.get("objective", ""))
    if isinstance(monitor, str) and objective is not None:
        found.setdefault(monitor, objective)
    if state == "finished" and not found:
        reason = f"no values: neither {runs.RESULT} nor csv/metrics.csv has any"
    seconds, ranks = result.get("seconds"), result.get("ranks") or record.get("ranks")
    return Point(
        str(folder.relative_to(root)),
        folder,
        _overrides(folder, record),
        state,
        reason,
        float(seconds) if isinstance(seconds, int | float) else _seconds(record, state),
        ranks if isinstance(ranks, int) else None,
        found,
    )


def _overrides(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    given: Any = record.get("overrides")
    with suppress(Exception):  # missing or torn
        given = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    return _split(map(str, given)) if isinstance(given, list) else {}


def _split(overrides: Any) -> dict[str, str]:
    pairs = [each.partition("=") for each in overrides]
    return {name.lstrip("+~"): value for name, _, value in pairs}


def _read_yaml(path: Path) -> DictConfig:
    try:
        found = OmegaConf.load(path)
    except Exception:  # missing or torn: what it says is not needed
        return DictConfig({})
    return found if isinstance(found, DictConfig) else DictConfig({})


def _number(value: Any) -> float | None:
    """As a float, NaN for JSON's null; None where it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _read_csv(path: Path) -> dict[str, float]:
    """The last value of each key of a validation or test; the last line may have been torn."""
    found: dict[str, float] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                for key, cell in row.items():
                    if key and cell and _VALUE.match(key) and (value := _number(cell)) is not None:
                        found[key] = value
    except (OSError, csv.Error, UnicodeDecodeError):
        pass
    return found


def _seconds(record: Mapping[str, Any], state: str) -> float | None:
    try:
        started = datetime.fromisoformat(record["started"])
        ended = datetime.fromisoformat(record["ended"]) if "ended" in record else None
    except (KeyError, TypeError, ValueError):
        return None
    if ended is None and state != "running":
        return None
    return ((ended or datetime.now()) - started).total_seconds()


def _is_gone(record: Mapping[str, Any]) -> bool:
    """Whether the process of a run is known not to be there any more; on another host it is not known."""
    if record.get("host") != socket.gethostname() or not isinstance(record.get("pid"), int):
        return False
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _last_error(folder: Path, record: Mapping[str, Any]) -> str:
    """The error that a run has recorded, or the last one in a log beside it; empty if there is none."""
    if recorded := record.get("error"):
        return _one_line(str(recorded))
    logs = [each for pattern in ("*.log", "*.err", "*stderr*") for each in folder.glob(pattern) if each.is_file()]
    for log in sorted(logs, key=lambda each: each.stat().st_mtime, reverse=True):
        lines = log.read_text(errors="replace").splitlines()
        if errors := [line for line in map(str.strip, lines) if _ERROR_LINE.match(line)]:
            return _one_line(errors[-1])
    return ""


def _one_line(text: str, longest: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _parsed(settings: DictConfig) -> list[Any]:
    """Overrides of a sweep as Hydra understands them: those of its sweeper's params and of the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = OmegaConf.select(settings, "hydra.sweeper.params") or {}
    asked = [f"{name}={value}" for name, value in params.items()]
    asked += as_typed(OmegaConf.select(settings, "hydra.overrides.task") or OmegaConf.create([]))
    try:
        return OverridesParser.create().parse_overrides(asked)
    except Exception:  # of another version of Hydra, or a plugin's
        return []


def _sweep_settings(settings: DictConfig) -> list[str]:
    return [each.key_or_group for each in _parsed(settings) if each.is_sweep_override()]


def _planned(settings: DictConfig, started: Sequence[Mapping[str, str]]) -> tuple[int | None, list[dict[str, str]]]:
    """The number of points that were asked for, and the overrides of those that have not been started."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    trials = OmegaConf.select(settings, "hydra.sweeper.n_trials")
    if isinstance(trials, int):
        return trials, []
    if not str(OmegaConf.select(settings, "hydra.sweeper._target_")).endswith(".BasicSweeper"):
        return None, []
    try:
        ((*grid,),) = BasicSweeper.split_arguments(_parsed(settings), None)
    except Exception:  # a glob, which needs the configuration to be there
        return None, []
    asked = [_split(each) for each in grid]
    return len(asked), [each for each in asked if not any(each.items() <= point.items() for point in started)]


def _of_config(folders: Sequence[Path], root: Path) -> tuple[str, str, str]:
    """Monitored key, and W&B's project and group, as most points have them."""
    monitors: Counter[str] = Counter()
    places: Counter[tuple[str, str]] = Counter()
    named = "/".join(root.parts[-2:])  # the group that points of a sweep have unless told otherwise
    for folder in folders:
        # the settings that a logger wrote are resolved
        for path in (folder / "csv" / "hparams.yaml", folder / ".hydra" / "config.yaml"):
            config = _read_yaml(path)
            monitor = _selected(config, "monitor")
            loggers = _selected(config, "logger") or {}
            names = [
                name for name in loggers if str(_selected(config, f"logger.{name}._target_")).endswith("WandbLogger")
            ]
            if monitor:
                monitors[str(monitor)] += 1
            if names:
                project, group = (_selected(config, f"logger.{names[0]}.{key}") for key in ("project", "group"))
                places[str(project or "harness"), str(group or named)] += 1
                break
    monitor = monitors.most_common(1)[0][0] if monitors else "val0_epoch/weighted_sum"
    project, group = places.most_common(1)[0][0] if places else ("harness", named)
    return monitor, project, group


def _selected(config: DictConfig, name: str) -> Any:
    try:
        return OmegaConf.select(config, name)
    except Exception:  # an interpolation that means something to Hydra alone
        return None
