"""Tables of results: every component with its per-type values and unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from harness.components import WEIGHTED_SUM, MetricEntry
from harness.fields import PerAtomModifier, PlainField, field_spec
from harness.manager import MetricsManager
from harness.metrics import ErrorMetric, HuberLoss, MeanSquaredError, RootMeanSquaredError, StratifiedHuberForceLoss

__all__ = ["component_unit", "values_table"]


def values_table(title: str, manager: MetricsManager, values: Mapping[str, float]) -> Table:
    """Table of every component, with its per-type values beside it.

    Args:
        title: stands above the table.
        manager: whose components they are.
        values: by name, as :meth:`~harness.manager.Values.to_host` returns them.
    """
    type_names = manager.type_names if any(entry.per_type for entry in manager.entries.values()) else ()
    table = Table(title=title, title_justify="left")
    table.add_column("component", no_wrap=True)
    table.add_column("value", justify="right")
    for type_name in type_names:
        table.add_column(type_name, justify="right")
    table.add_column("unit")
    for entry in manager.entries.values():
        by_type = [_number(values.get(key)) for key in entry.type_keys(type_names)] or [""] * len(type_names)
        table.add_row(entry.name, _number(values.get(entry.name)), *by_type, component_unit(entry))
    if WEIGHTED_SUM in values:
        table.add_section()
        table.add_row(WEIGHTED_SUM, _number(values[WEIGHTED_SUM]), *[""] * len(type_names), "")
    return table


def component_unit(entry: MetricEntry) -> str:
    """Unit of a component's value; empty where it is not known."""
    if not isinstance(entry.metric, ErrorMetric):
        return ""
    match entry.field:
        case PlainField(field=name):
            unit = field_spec(name).unit
        case PerAtomModifier(field=name, factor=None):
            unit = f"{field_spec(name).unit}/atom"
        case _:
            return ""
    squares = isinstance(entry.metric, MeanSquaredError | HuberLoss | StratifiedHuberForceLoss)
    if unit and squares and not isinstance(entry.metric, RootMeanSquaredError):
        return f"({unit})²"
    return unit


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.5g}"
