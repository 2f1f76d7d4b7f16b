"""Tables of results: every component with its per-type values and unit."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from harness.fields import PerAtomModifier, PlainField, field_spec
from harness.metrics import (
    WEIGHTED_SUM,
    ErrorMetric,
    HuberLoss,
    MeanSquaredError,
    MetricEntry,
    MetricsManager,
    Report,
    RootMeanSquaredError,
    StratifiedHuberForceLoss,
    modifier_key,
)
from harness.metrics.structures import StructureErrors

__all__ = [
    "COLUMNS",
    "atoms_behind",
    "component_unit",
    "is_better",
    "number_text",
    "output_console",
    "print_above_bar",
    "values_table",
]

_WIDTH = 140
"""Width of a log file in characters."""
COLUMNS = ("value", "best", "epoch", "types", "unit")
"""Columns of a table, beside the names of the components."""


def values_table(
    title: str,
    manager: MetricsManager,
    values: Mapping[str, float],
    best: Mapping[str, tuple[float, int]] | None = None,
    columns: Sequence[str] = COLUMNS,
    max_types: int = 8,
    type_names: Sequence[str] | None = None,
) -> Table:
    """Table of every component, with its per-type values beside it and those of sets below it.

    Args:
        title: stands above the table; empty for none.
        manager: whose components they are.
        values: by name, as :meth:`~harness.metrics.manager.Values.to_host` returns them.
        best: the best value so far of each component, and its epoch; those that are of now stand out.
        columns: which of :data:`COLUMNS` there are; those of ``best`` only where that is given.
        max_types: the most types that have columns.
        type_names: types that are looked at; all of the manager's if None.
    """
    has_types = any(entry.per_type for entry in manager.entries.values())
    type_names = (manager.type_names if type_names is None else type_names) if has_types else ()
    shown = type_names if "types" in columns and len(type_names) <= max_types else ()
    table = Table(title=title or None, title_justify="left", caption_justify="left")
    table.add_column("component", no_wrap=True)
    headers = {"value": "value", "best": "best so far", "epoch": "in epoch"}
    chosen = [name for name in headers if name in columns and (best is not None or name == "value")]
    for header in (*(headers[name] for name in chosen), *shown):
        table.add_column(header, justify="right")
    if "unit" in columns:
        table.add_column("unit")

    def row(name: str, by_type: Sequence[str], unit: str) -> None:
        least, epoch = (best or {}).get(name, (math.nan, None))
        cells = {
            "value": number_text(values.get(name)),
            "best": number_text(least),
            "epoch": "-" if epoch is None else str(epoch),
        }
        line = [name, *(cells[each] for each in chosen), *by_type, *([unit] if "unit" in columns else [])]
        table.add_row(*line, style="green" if values.get(name) == least else None)

    for entry in manager.entries.values():
        by_type = [number_text(values.get(key)) for key in entry.type_keys(shown)] or [""] * len(shown)
        row(entry.name, by_type, component_unit(entry))
        for key in entry.set_keys():
            row(key, [""] * len(shown), component_unit(entry))
    if WEIGHTED_SUM in values:
        table.add_section()
        row(WEIGHTED_SUM, [""] * len(shown), "")
    absent = len(manager.type_names) - len(type_names)
    if shown and absent:
        table.caption = f"{absent} other type{'s' if absent > 1 else ''} of the model without data"
    if "types" in columns and len(type_names) > max_types:
        by_type = [entry.name for entry in manager.entries.values() if entry.per_type]
        table.caption = f"{len(type_names)} types: values of each are logged as {', '.join(by_type)} with _<type>"
    return table


def component_unit(entry: MetricEntry) -> str:
    """Unit of a component's value; empty where it is not known."""
    if not isinstance(entry.metric, ErrorMetric) or entry.metric.dimensionless:
        return ""
    match entry.field:
        case PlainField(field=name):
            unit = field_spec(name).unit
        case PerAtomModifier(field=name, factor=None):
            unit = f"{field_spec(name).unit}/atom"
        case StructureErrors(field=name):
            unit = field_spec(name).unit
        case _:
            return ""
    squares = isinstance(entry.metric, MeanSquaredError | HuberLoss | StratifiedHuberForceLoss)
    if unit and squares and not isinstance(entry.metric, RootMeanSquaredError):
        return f"({unit})²"
    return unit


def is_better(manager: MetricsManager, name: str, value: float, than: float) -> bool:
    """True if a value of a component or set, or of the weighted sum, is better than another; any is better than NaN.

    Smaller is better, but for other people's metrics that say ``higher_is_better``.
    """
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    entries = manager.entries
    entry = entries.get(name) or next((each for each in entries.values() if name in each.set_keys()), None)
    return value > than if entry is not None and entry.metric.higher_is_better else value < than


def atoms_behind(manager: MetricsManager, report: Report) -> dict[str, list[float | None]]:
    """Number of atoms behind each value of the components that are per type, by component, in the order of the types.

    A report counts elements, such as three for the force on an atom. A maximum has no count of its own: it is that of
    another component of the same field, with the same labels left out. None where it is not known.
    """
    read = [(entry, entry.field) for entry in manager.entries.values() if entry.per_type and entry.field]
    known: dict[tuple[object, bool], list[float | None]] = {}
    for entry, field in read:
        shape, keys = getattr(field, "shape", None), entry.type_keys(manager.type_names)
        if shape is not None and keys[0] in report.counts:
            counts = [report.counts[key] / math.prod(shape) for key in keys]
            known.setdefault((modifier_key(field), entry.ignore_nan), [*counts])
    unknown: list[float | None] = [None] * len(manager.type_names)
    return {entry.name: known.get((modifier_key(field), entry.ignore_nan), unknown) for entry, field in read}


def output_console() -> Console:
    """Console that renders for standard output, into a text; a log file has room for every column."""
    terminal = sys.stdout.isatty()
    return Console(file=io.StringIO(), force_terminal=terminal, width=None if terminal else _WIDTH)


def print_above_bar(trainer: Trainer, console: Console, *what: Any) -> None:
    """Print above the progress bar, which draws itself anew below.

    Args:
        trainer: with the progress bar.
        console: of :func:`output_console`.
        what: texts and tables.
    """
    for each in what:
        console.print(each, highlight=False, soft_wrap=isinstance(each, str))
    text = cast(io.StringIO, console.file).getvalue().rstrip()
    # a bar prints while it is drawn, which that of a test is no longer in the end
    bar = trainer.progress_bar_callback if trainer.state.fn == "fit" else None
    (print if bar is None else bar.print)(f"\n{text}")


def number_text(value: float | None) -> str:
    """Five digits of a value; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.5g}"
