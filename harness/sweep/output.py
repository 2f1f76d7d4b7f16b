"""Table, CSV file, picture and W&B run of a ranked sweep."""

from __future__ import annotations

import csv
import math
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.fields import registered_fields
from harness.support.files import replacing
from harness.support.log_keys import LogKeys
from harness.sweep.pareto import FrontPoint, draw_front
from harness.sweep.points import datasets, log_keys
from harness.sweep.ranking import MEASURES, RankedSweep, errors_of
from harness.sweep.reading import as_number

__all__ = ["draw", "log_to_wandb", "table", "table_width", "write_csv"]

_FIELDS = ("per_atom_energy", "total_energy", "forces", "stress", "virial")


def table(ranked: RankedSweep, width: int | None = None) -> Table:
    """Table of the points in order: swept settings, a readable selection of components, time and state.

    Args:
        ranked: the sweep.
        width: characters that there is room for; components at the end of the selection are left out until it fits.
    """
    keys = _readable(ranked)
    while True:
        shown = _table(ranked, keys)
        if width is None or len(keys) == 1 or table_width(shown) <= width:
            return shown
        keys = keys[:-1]


def table_width(shown: Table) -> int:
    """Characters of the table's longest line."""
    console = Console(width=10_000)
    return console.measure(shown).maximum


def _readable(ranked: RankedSweep) -> list[str]:
    """Keys of the table: that of the order, those of the front, and errors of the first test (or validation) set."""
    points = ranked.sweep.most_final
    keys = [ranked.sort, *(ranked.axes or ())]
    for of_set in datasets(points)[:1]:
        names = [name for name in map(of_set.name_in, log_keys(points)) if name is not None]
        names = [name for name in names if "_per_type" not in name and not name.endswith("_maxabserr")]
        if any(name.startswith("per_atom_energy_") for name in names):
            names = [name for name in names if not name.startswith("total_energy_")]
        keys += of_set.keys(sorted(names, key=_importance))
    return list(dict.fromkeys(keys))


def _importance(name: str) -> tuple[bool, int]:
    """Sort key of a component: RMSE before others, then by field."""
    number = next((number for number, field in enumerate(_FIELDS) if name.startswith(field)), len(_FIELDS))
    return not name.endswith("_rmse"), number


def _table(ranked: RankedSweep, keys: Sequence[str]) -> Table:
    sweep = ranked.sweep
    shown = Table(title=sweep.title, title_justify="left")
    shown.add_column("rank", justify="right")
    shown.add_column("point", justify="right")
    for setting in sweep.swept:
        shown.add_column(sweep.short(setting), justify="right")
    for key in keys:
        shown.add_column("\n".join(_header(key)), justify="right")
    shown.add_column("time", justify="right")
    shown.add_column("state")
    for number, point in ranked.rows():
        first = "" if number is None else f"{number}{'*' if point in ranked.front else ''}"
        settings = [_setting(point.overrides.get(setting)) for setting in sweep.swept]
        values = [_value(point.values.get(key)) for key in keys]
        cells = [first, point.name, *settings, *values, _time(point.seconds), point.state]
        is_last_ranked = number == len(ranked.ranked)
        shown.add_row(*map(Text, cells), style=None if point.finished else "dim", end_section=is_last_ranked)
    return shown


def _header(key: str) -> list[str]:
    """Lines of a column's header: set, field, measure and unit, where the key has them."""
    stage, name = _stage_and_name(key)
    field, _, measure = name.rpartition("_")
    names = [field, measure] if measure in MEASURES else [name]
    return [line for line in (stage, *names, _unit(key)) if line]


def _stage_and_name(key: str) -> tuple[str, str]:
    """Stage and name of an error, such as ``val0`` and ``forces_mae``; of another key the parts around its slash."""
    found = LogKeys.of_error(key)
    first, _, last = key.partition("/")
    return (first, last) if found is None else (found[0].stage, found[1])


def _unit(key: str) -> str:
    """Unit of a component by its name; empty for a field that is not registered."""
    name = _stage_and_name(key)[1]
    fields = registered_fields()
    per_atom = name.startswith("per_atom_energy_")
    found = "total_energy" if per_atom else max((field for field in fields if name.startswith(f"{field}_")), default="")
    unit = fields[found].unit if found else ""
    if unit and per_atom:
        unit = f"{unit}/atom"
    measure = name.partition("_per_type")[0].rpartition("_")[2]
    if unit and measure == "mse":
        return f"({unit})²"
    return unit if measure in MEASURES else ""


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _setting(value: str | None) -> str:
    if value is None:
        return "-"
    number = as_number(value)
    return value if number is None or len(value) <= 8 else f"{number:.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def write_csv(ranked: RankedSweep, path: Path) -> tuple[list[str], list[list[Any]]]:
    """Write every value of every point, in order.

    Returns:
        Columns and rows.
    """
    sweep, keys = ranked.sweep, log_keys(ranked.sweep.points)
    columns = ["rank", "point", "state", "front", "seconds", "ranks", *sweep.swept, *keys, "reason"]
    rows: list[list[Any]] = []
    for number, point in ranked.rows():
        settings = [point.overrides.get(setting) for setting in sweep.swept]
        values = [point.values.get(key) for key in keys]
        front = point in ranked.front
        rows.append(
            [number, point.name, point.state, front, point.seconds, point.ranks, *settings, *values, point.reason]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return columns, rows


def draw(ranked: RankedSweep, path: Path) -> bool:
    """Draw the front and all other points that have both errors.

    Returns:
        False if no point has both, and nothing is drawn.
    """
    sweep, axes = ranked.sweep, ranked.axes
    points = [point for _, point in ranked.rows()]
    if axes is None or not any(all(map(math.isfinite, errors_of(point, axes))) for point in points):
        return False
    drawn = []
    for point in points:
        label = ", ".join(_setting(point.overrides.get(setting)) for setting in sweep.swept)
        drawn.append(FrontPoint(*errors_of(point, axes), label or point.name, point.finished))
    names = [" ".join(_stage_and_name(key)) for key in axes]
    units = [f" ({_unit(key)})" if _unit(key) else "" for key in axes]
    note = f"labels: {', '.join(map(sweep.short, sweep.swept))}" if sweep.swept else ""
    draw_front(path, drawn, names[0] + units[0], names[1] + units[1], sweep.title, note)
    return True


def log_to_wandb(
    ranked: RankedSweep, folder: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], picture: Path | None
) -> str | None:
    """Log table and picture as one W&B run, in the project and group of the points.

    Returns:
        URL or directory of the run.
    """
    from harness.loggers import WandbLogger
    from harness.loggers.wandb_variables import variable

    sweep = ranked.sweep
    logger = WandbLogger(
        folder,
        project=sweep.project,
        group=sweep.group,
        job_type="sweep",
        name=f"report of {sweep.title}",
        entity=sweep.entity,
        id=uuid.uuid4().hex[:8],  # the variables of a run that is a point may still be there
        resume="allow",
        dir=variable("DIR", str(folder)),
        settings={"quiet": True},
    )
    logger.log_hyperparams(
        {"sweep": str(sweep.folder), "swept": list(sweep.swept), "sort": ranked.sort, "axes": list(ranked.axes or [])}
    )
    # W&B demands one type of value in each column
    text = {name for name, *cells in zip(columns, *rows, strict=True) if any(isinstance(cell, str) for cell in cells)}
    cells = [
        [("" if cell is None else str(cell)) if name in text else cell for name, cell in zip(columns, row, strict=True)]
        for row in rows
    ]
    logger.log_table("sweep/points", columns=list(columns), data=cells)
    if picture is not None:
        logger.log_image("sweep/pareto", [str(picture)])
    states = Counter(point.state for point in sweep.points)
    summary: dict[str, float] = {f"sweep/{state.replace(' ', '_')}": number for state, number in states.items()}
    if ranked.ranked:
        summary["sweep/best"] = ranked.ranked[0].values[ranked.sort]
    logger.log_metrics(summary)
    return logger.finish()
