"""Table, CSV file, picture and W&B run of a sweep's report."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.fields import registered_fields
from harness.sweep.pareto import FrontPoint, draw_front
from harness.sweep.ranking import _MEASURES, Report, _best_known, _coordinates, _keys, _parts
from harness.sweep.reading import _number


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
