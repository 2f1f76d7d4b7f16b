"""Report of a sweep, finished or not: a ranked table of its points, and the Pareto front of energy and force errors.

    python -m harness.sweep multirun/train/2026-11-24_10-00-00
    harness-sweep multirun/train/2026-11-24_10-00-00 --forces test0_epoch/forces_mae --no-wandb

It writes ``sweep.csv``, with every value of every point, and ``pareto.png`` into the sweep's directory, and logs both
to W&B as one run of the job type ``sweep``, in the project and group of the points.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import math
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import runs
from harness.fields import registered_fields
from harness.pareto import FrontPoint, draw_front, pareto_front
from harness.points import as_typed

__all__ = ["Point", "Sweep", "main", "read_sweep", "report"]

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


# --- reading ---


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
    if OmegaConf.select(settings, "hydra.mode") != "MULTIRUN":
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


# --- what was asked for ---


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


# --- choosing keys ---


def _keys(points: Sequence[Point]) -> list[str]:
    """All log keys, tests first."""
    keys = {key for point in points for key in point.values}
    return sorted(keys, key=lambda key: (not key.startswith("test"), key))


def _parts(points: Sequence[Point]) -> list[str]:
    """Tests and validations that points have values of: ``test0_epoch``, ``val0_epoch``."""
    return [part for part in dict.fromkeys(key.partition("/")[0] for key in _keys(points)) if part.endswith("_epoch")]


def _find(name: str, points: Sequence[Point]) -> str:
    """The log key of a name, which may be that of a component: ``forces_rmse``, of the first test or validation set.

    Raises:
        ValueError: there is none.
    """
    keys = _keys(points)
    if name in keys:
        return name
    same = [f"{part}/{name}" for part in _parts(points) if f"{part}/{name}" in keys]
    if same:
        return same[0]
    close = difflib.get_close_matches(name, keys, n=3, cutoff=0.5)
    plain = [key for part in _parts(points) for key in keys if key.startswith(f"{part}/") and "_per_type" not in key]
    known = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(plain) or 'none'}."
    raise ValueError(f"No point has a value {name!r}. {known}")


def _axes(points: Sequence[Point], energy: str | None, forces: str | None) -> tuple[str, str] | None:
    """Keys of the energy and the force error: the same measure of the same set, a test's if all points have it.

    Raises:
        ValueError: a key that was asked for is not there.
    """
    if energy and forces:
        return _find(energy, points), _find(forces, points)
    pairs = []
    for part in _parts(points):
        for measure in _MEASURES[:3]:
            for name in ("per_atom_energy", "total_energy"):
                pairs.append((f"{part}/{name}_{measure}", f"{part}/forces_{measure}"))
    if energy:
        pairs = [(_find(energy, points), right) for _, right in pairs]
    elif forces:
        pairs = [(left, _find(forces, points)) for left, _ in pairs]
    having = Counter({pair: sum(set(pair) <= point.values.keys() for point in points) for pair in pairs})
    if not having:
        return None
    best = max(having.values())
    return next(pair for pair in pairs if having[pair] == best) if best else None


def _readable(found: Report) -> list[str]:
    """Keys that the table shows: what it is sorted by, what is drawn, and errors of the first test (or validation)."""
    shown = _best_known(found.sweep.points)
    first = [found.sort, *(found.axes or ())]
    if not (parts := _parts(shown)):
        return list(dict.fromkeys(first))
    part = parts[0]
    components = [key.removeprefix(f"{part}/") for key in _keys(shown) if key.startswith(f"{part}/")]
    per_atom = any(name.startswith("per_atom_energy_") for name in components)
    chosen = [
        name
        for name in components
        if "_per_type" not in name
        and not name.endswith("_maxabserr")
        and not (per_atom and name.startswith("total_energy_"))
    ]
    fields = ("per_atom_energy", "total_energy", "forces", "stress", "virial")

    def importance(name: str) -> tuple[bool, int]:
        number = next((number for number, start in enumerate(fields) if name.startswith(start)), len(fields))
        return not name.endswith("_rmse"), number

    chosen.sort(key=importance)
    return list(dict.fromkeys([*first, *(f"{part}/{name}" for name in chosen)]))


def _unit(key: str) -> str:
    """Unit of a component by its name; empty where the name does not tell."""
    name = key.partition("/")[2]
    fields = registered_fields()
    per_atom = name.startswith("per_atom_energy_")
    found = "total_energy" if per_atom else max((each for each in fields if name.startswith(f"{each}_")), default="")
    unit = fields[found].unit if found else ""
    if unit and per_atom:
        unit = f"{unit}/atom"
    measure = name.partition("_per_type")[0].rpartition("_")[2]
    if unit and measure == "mse":
        return f"({unit})²"
    return unit if measure in _MEASURES else ""


_MEASURES = ("rmse", "mae", "mse", "maxabserr")


# --- the report ---


@dataclass(frozen=True)
class Report:
    """A sweep in its order.

    Attributes:
        sweep: it.
        sort: log key of the order; smaller is better.
        ranked: finished points that have a finite value of that key, the best first.
        others: the other points.
        axes: log keys of the energy and the force error, if there are any.
        front: points on the Pareto front.
    """

    sweep: Sweep
    sort: str
    ranked: Sequence[Point]
    others: Sequence[Point]
    axes: tuple[str, str] | None
    front: Sequence[Point]


def report(sweep: Sweep, energy: str | None = None, forces: str | None = None, sort: str | None = None) -> Report:
    """Rank the points of a sweep, and find those on the Pareto front of energy and force errors.

    Args:
        sweep: with points that may be unfinished.
        energy: log key of the energy error, or the name of its component; chosen if not given.
        forces: log key of the force error, or the name of its component; chosen if not given.
        sort: log key that orders the points, or the name of a component; the monitored value if not given.

    Raises:
        ValueError: no point has a value of a key that was asked for.
    """
    key = _find(sort, _best_known(sweep.points)) if sort else sweep.monitor
    points = [_with_reason(point, key) for point in sweep.points]
    ranked = [point for point in points if point.finished and math.isfinite(point.values.get(key, math.nan))]
    ranked.sort(key=lambda point: point.values[key])
    others = [point for point in points if point not in ranked]
    others.sort(key=lambda point: not point.finished)
    axes = _axes(_best_known(points), energy, forces)
    finished = [point for point in points if point.finished]
    front = [] if axes is None else pareto_front([_coordinates(point, axes) for point in finished])
    return Report(sweep, key, ranked, others, axes, [finished[index] for index in front])


def _best_known(points: Sequence[Point]) -> Sequence[Point]:
    """Points whose values tell what there is: those that have finished, or all if none has."""
    return [point for point in points if point.finished] or points


def _with_reason(point: Point, key: str) -> Point:
    """With the reason why it is not ranked, if it has finished and has no reason yet."""
    if point.reason or not point.finished or math.isfinite(point.values.get(key, math.nan)):
        return point
    return replace(point, reason=f"{key} is {point.values[key]}" if key in point.values else f"it has no {key}")


def _coordinates(point: Point, axes: tuple[str, str]) -> tuple[float, float]:
    return point.values.get(axes[0], math.nan), point.values.get(axes[1], math.nan)


def table(found: Report, width: int | None = None) -> Table:
    """The points in their order, with what was swept, a readable selection of components, time and state.

    Args:
        found: the report.
        width: characters that there is room for, which components at the end of the selection make way for.
    """
    keys = _readable(found)
    while True:
        shown = _table(found, keys)
        if width is None or len(keys) == 1 or _width(shown) <= width:
            return shown
        keys = keys[:-1]


def _width(shown: Table) -> int:
    console = Console(width=10_000)
    return console.measure(shown).maximum


def _table(found: Report, keys: Sequence[str]) -> Table:
    sweep = found.sweep
    shown = Table(title=sweep.title, title_justify="left")
    shown.add_column("rank", justify="right")
    shown.add_column("point", justify="right")
    for setting in sweep.swept:
        shown.add_column(sweep.short(setting), justify="right")
    for key in keys:
        shown.add_column("\n".join(_header(key)), justify="right")
    shown.add_column("time", justify="right")
    shown.add_column("state")
    for number, point in enumerate([*found.ranked, *found.others], start=1):
        if number == len(found.ranked) + 1 and found.ranked:
            shown.add_section()
        rank = f"{number}{'*' if point in found.front else ''}" if number <= len(found.ranked) else ""
        settings = [_shown_setting(point.overrides.get(setting)) for setting in sweep.swept]
        values = [_shown(point.values.get(key)) for key in keys]
        cells = [rank, point.name, *settings, *values, _shown_time(point.seconds), point.state]
        shown.add_row(*map(Text, cells), style=None if point.finished else "dim")
    return shown


def _header(key: str) -> list[str]:
    """Of a column: set, field, measure and unit, where the name has them."""
    part, _, name = key.partition("/")
    start, _, measure = name.rpartition("_")
    names = [start, measure] if measure in _MEASURES else [name]
    return [each for each in (part.removesuffix("_epoch"), *names, _unit(key)) if each]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _shown_setting(value: str | None) -> str:
    if value is None:
        return "-"
    number = _number(value)
    return value if number is None or len(value) <= 8 else f"{number:.4g}"


def _shown_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def write_csv(found: Report, path: Path) -> tuple[list[str], list[list[Any]]]:
    """Write every value of every point, in their order; returns the columns and rows."""
    sweep, keys = found.sweep, _keys(found.sweep.points)
    columns = ["rank", "point", "state", "front", "seconds", "ranks", *sweep.swept, *keys, "reason"]
    rows: list[list[Any]] = []
    for number, point in enumerate([*found.ranked, *found.others], start=1):
        rank = number if number <= len(found.ranked) else None
        settings = [point.overrides.get(setting) for setting in sweep.swept]
        values = [point.values.get(key) for key in keys]
        front = point in found.front
        rows.append(
            [rank, point.name, point.state, front, point.seconds, point.ranks, *settings, *values, point.reason]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    os.replace(part, path)
    return columns, rows


def draw(found: Report, path: Path) -> bool:
    """Draw the front and all other points that have both errors; whether there was anything to draw."""
    sweep, axes = found.sweep, found.axes
    points = [*found.ranked, *found.others]
    if axes is None or not any(all(map(math.isfinite, _coordinates(point, axes))) for point in points):
        return False
    drawn = []
    for point in points:
        label = ", ".join(_shown_setting(point.overrides.get(setting)) for setting in sweep.swept)
        drawn.append(FrontPoint(*_coordinates(point, axes), label or point.name, point.finished))
    names = [f"{part.removesuffix('_epoch')} {name}" for part, _, name in (key.partition("/") for key in axes)]
    units = [f" ({_unit(key)})" if _unit(key) else "" for key in axes]
    note = f"labels: {', '.join(map(sweep.short, sweep.swept))}" if sweep.swept else ""
    draw_front(path, drawn, names[0] + units[0], names[1] + units[1], sweep.title, note)
    return True


def log_to_wandb(
    found: Report, folder: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path | None
) -> str | None:
    """Log table and picture as one run beside those of the points; returns where it is."""
    import harness.composition  # noqa: F401  it registers the resolvers of the configuration
    from harness.loggers import WandbLogger

    sweep = found.sweep
    logger = WandbLogger(
        folder,
        project=sweep.project,
        group=sweep.group,
        job_type="sweep",
        name=f"report of {sweep.title}",
        offline=not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()),
        settings={"quiet": True},
    )
    states = Counter(point.state for point in sweep.points)
    logger.log_hyperparams(
        {"sweep": str(sweep.folder), "swept": list(sweep.swept), "sort": found.sort, "axes": list(found.axes or [])}
    )
    # one kind of value in each column, as W&B demands
    text = {name for name, *cells in zip(columns, *rows, strict=True) if any(isinstance(cell, str) for cell in cells)}
    cells = [
        [("" if cell is None else str(cell)) if name in text else cell for name, cell in zip(columns, row, strict=True)]
        for row in rows
    ]
    logger.log_table("sweep/points", columns=list(columns), data=cells)
    if picture is not None:
        logger.log_image("sweep/pareto", [str(picture)])
    summary: dict[str, float] = {f"sweep/{state.replace(' ', '_')}": number for state, number in states.items()}
    if found.ranked:
        summary["sweep/best"] = found.ranked[0].values[found.sort]
    logger.log_metrics(summary)
    return logger.finish()


# --- the command ---


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harness-sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "sweep", type=Path, metavar="OUTPUT_DIR", help="directory of the sweep: multirun/<name>/<stamp>"
    )
    of_key = "log key such as test0_epoch/{0}, or {0}"
    parser.add_argument("--energy", metavar="KEY", help=f"energy error: {of_key.format('per_atom_energy_mae')}")
    parser.add_argument("--forces", metavar="KEY", help=f"force error: {of_key.format('forces_mae')}")
    parser.add_argument(
        "--sort", metavar="KEY", help="what orders the points, smaller is better; `monitor` if not given"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the report is written; OUTPUT_DIR if not given"
    )
    parser.add_argument(
        "--wandb", action=argparse.BooleanOptionalAction, default=True, help="log table and picture to W&B"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Command line of ``harness-sweep``."""
    arguments = _arguments(given)
    try:
        _run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _run(arguments: argparse.Namespace) -> None:
    sweep = read_sweep(arguments.sweep)
    if not sweep.points:
        raise ValueError(f"No point of {sweep.folder} has been started yet.")
    found = report(sweep, arguments.energy, arguments.forces, arguments.sort)
    console = Console()
    shown = table(found, console.width if console.is_terminal else None)
    if not console.is_terminal:  # a log file has room for every column
        console.width = max(console.width, _width(shown))
    console.print(shown)
    for point in found.others:
        console.print(
            f"point {point.name} {_named(sweep, point)}{point.state}: {point.reason}", soft_wrap=True, **_PLAIN
        )
    if sweep.planned is not None and sweep.planned > len(sweep.points):
        console.print(f"{len(sweep.points)} of {sweep.planned} points have been started", **_PLAIN)
    folder = (arguments.output or sweep.folder).absolute()
    columns, rows = write_csv(found, folder / "sweep.csv")
    _say(console, "table", folder / "sweep.csv")
    if not any(point.finished for point in sweep.points):
        states = Counter(point.state for point in sweep.points)
        counts = ", ".join(f"{number} {state}" for state, number in states.items())
        raise ValueError(f"nothing has finished yet, so that there is no ranking and no front: {counts}.")
    picture = folder / "pareto.png"
    if draw(found, picture):
        front = ", ".join(point.name for point in found.front)
        console.print(f"front       {front} (*), of {' and '.join(found.axes or ())}", soft_wrap=True, **_PLAIN)
        _say(console, "picture", picture)
    else:
        picture.unlink(missing_ok=True)  # of a report before
        console.print(
            "no front: no point has an energy and a force error. Name them with --energy and --forces", **_PLAIN
        )
    if arguments.wandb:
        place = log_to_wandb(found, folder, columns, rows, picture if picture.exists() else None)
        if place:
            _say(console, "W&B run", place)


def _named(sweep: Sweep, point: Point) -> str:
    given = [f"{sweep.short(name)}={point.overrides[name]}" for name in sweep.swept if name in point.overrides]
    return f"({', '.join(given)}) " if given else ""


def _say(console: Console, what: str, place: object) -> None:
    console.print(f"{what:<11} {place}", soft_wrap=True, **_PLAIN)


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False}


if __name__ == "__main__":
    main()
