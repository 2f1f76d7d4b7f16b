"""Results of an evaluation: tables in the terminal, ``evaluation.json`` and ``evaluation.csv``."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from harness.callbacks.tables import component_unit
from harness.fields import PerAtomModifier, PlainField
from harness.metrics import MeanAbsoluteError, MetricsManager, Report, RootMeanSquaredError
from harness.support.files import replacing, write_text_whole

__all__ = ["CSV", "JSON", "Errors", "overview", "write_csv", "write_json"]

JSON = "evaluation.json"
CSV = "evaluation.csv"


@dataclass(frozen=True)
class Errors:
    """Errors of a file, of a group of frames, or of all files.

    Attributes:
        name: of the file or group.
        frames: number of frames.
        atoms: number of atoms in them.
        report: values by name, and the numbers of elements behind them.
        groups: errors of its groups.
        facts: further entries of the JSON file.
    """

    name: str
    frames: int
    atoms: int
    report: Report
    groups: list[Errors] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)


def overview(title: str, first: str, rows: Sequence[Errors], manager: MetricsManager) -> Table:
    """Table with a row for each group or file: numbers of frames and atoms, and RMSE and MAE of each field.

    Energies are those per atom where there are any. Without RMSE and MAE the columns are the first six components.

    Args:
        title: above the table.
        first: header of the names.
        rows: the groups or files.
        manager: whose components the errors are.
    """
    table = Table(title=title or None, title_justify="left")
    table.add_column(first)
    chosen = _columns(manager)
    for header in ("frames", "atoms"):
        table.add_column(header, justify="right")
    for name in chosen:
        unit = component_unit(manager.entries[name])
        table.add_column(f"{name}\n{unit}" if unit else name, justify="right")
    for row in rows:
        values = [row.report.values.get(name, math.nan) for name in chosen]
        table.add_row(row.name, str(row.frames), str(row.atoms), *map(_number, values))
    return table


def _columns(manager: MetricsManager) -> list[str]:
    entries = [entry for entry in manager.entries.values() if not entry.per_type]
    errors = [entry for entry in entries if isinstance(entry.metric, RootMeanSquaredError | MeanAbsoluteError)]
    per_atom = {entry.field.field for entry in errors if isinstance(entry.field, PerAtomModifier)}
    kept = [entry for entry in errors if not (isinstance(entry.field, PlainField) and entry.field.field in per_atom)]
    return [entry.name for entry in kept or entries[:6]]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.5g}"


def write_json(
    path: Path, facts: Mapping[str, Any], files: Sequence[Errors], everything: Errors, manager: MetricsManager
) -> None:
    """Write all values.

    Args:
        path: of the file.
        facts: first entries.
        files: errors of each file.
        everything: errors of all files together.
        manager: whose components the errors are.
    """
    content = {
        **facts,
        "units": {name: component_unit(entry) for name, entry in manager.entries.items()},
        "files": [{"file": errors.name, **_content(errors)} for errors in files],
        "all": _content(everything),
    }
    write_text_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _content(errors: Errors) -> dict[str, Any]:
    values = {name: None if math.isnan(value) else value for name, value in errors.report.values.items()}
    found = {"frames": errors.frames, "atoms": errors.atoms, **errors.facts, "values": values}
    found["elements"] = {name: _whole(count) for name, count in errors.report.counts.items()}
    if errors.groups:
        found["groups"] = {group.name: _content(group) for group in errors.groups}
    return found


def write_csv(path: Path, files: Sequence[Errors], everything: Errors, manager: MetricsManager) -> None:
    """Write all values, one in a row: file, group, frames, atoms, component, atom type, value, unit, elements.

    ``file`` is empty for all files together, ``group`` for all groups, ``type`` for all atom types, and ``elements`` is
    the number behind a value that is a mean: three for the force on an atom. Values without data are left out.
    """
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "group", "frames", "atoms", "component", "type", "value", "unit", "elements"])
        for name, whole in [*((errors.name, errors) for errors in files), ("", everything)]:
            for group, errors in [("", whole), *((each.name, each) for each in whole.groups)]:
                for row in _rows(errors, manager):
                    writer.writerow([name, group, errors.frames, errors.atoms, *row])


def _rows(errors: Errors, manager: MetricsManager) -> Iterator[list[Any]]:
    report = errors.report
    for entry in manager.entries.values():
        keys = dict(zip(entry.type_keys(manager.type_names), manager.type_names, strict=False))
        for key, kind in {entry.name: "", **keys}.items():
            value = report.values.get(key, math.nan)
            if not math.isnan(value):
                count = report.counts.get(key)
                yield [entry.name, kind, repr(value), component_unit(entry), "" if count is None else _whole(count)]


def _whole(count: float) -> float:
    """A number of elements; not a whole one where frames have weights."""
    return int(count) if count.is_integer() else count
