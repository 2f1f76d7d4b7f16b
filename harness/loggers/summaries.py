"""Axes that values are drawn against, and summaries of values to be minimised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Summaries", "axes_of"]


def axes_of(
    epoch: Sequence[str], step: Sequence[str], minimised: Sequence[str], epoch_name: str, step_name: str
) -> dict[str, dict[str, str]]:
    """Arguments of ``Run.define_metric`` for each value, by name.

    Args:
        epoch: names of values that are drawn against the epoch.
        step: names of values that are drawn against the step.
        minimised: those among them whose minimum belongs in the summary.
        epoch_name: name of the epoch among the values.
        step_name: name of the step among the values.

    Raises:
        ValueError: a pattern instead of a name, or a name in ``minimised`` alone.
    """
    # W&B takes any of several patterns that fit a name, and Lightning's `*` fits all
    if patterns := [name for name in (*epoch, *step) if "*" in name]:
        raise ValueError(f"Axes are defined by exact names, found {patterns}: give each name by itself.")
    if unknown := [name for name in minimised if name not in {*epoch, *step}]:
        raise ValueError(f"Values to be minimised are among those of `epoch` or `step`; {unknown} are not.")
    axes = {name: {"step_metric": step_name} for name in step} | {name: {"step_metric": epoch_name} for name in epoch}
    for name in minimised:
        axes[name]["summary"] = "min,last"
    return axes


class Summaries:
    """The least and the last of every value of a run over all its starts.

    W&B's own minimum begins anew with each start, and is NaN once a value is.
    """

    def __init__(self) -> None:
        self._axes: dict[str, dict[str, str]] = {}  # as they have been defined, by name
        self._extremes: dict[str, _Extremes] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Take the numbers of a row into account."""
        for name, value in row.items():
            if isinstance(value, int | float):
                self._extremes.setdefault(name, _Extremes()).add(value)

    def define(self, run: Any, axes: Mapping[str, dict[str, str]]) -> None:
        """Define axes of a ``wandb.Run``, those that have not been defined yet."""
        for name, axis in axes.items():
            if self._axes.get(name) != axis:
                run.define_metric(name.replace(".", "\\."), **axis)  # else a value within another one
                self._axes[name] = axis

    def write(self, run: Any) -> None:
        """Put ``{"min": ..., "last": ...}`` of the values to be minimised into the summary of a ``wandb.Run``."""
        names = [name for name, axis in self._axes.items() if "summary" in axis and name in self._extremes]
        if names:
            found = {name: self._extremes[name] for name in names}
            run.summary.update({name: {"min": value.least, "last": value.last} for name, value in found.items()})


class _Extremes:
    """The least and the last of a value's numbers; NaN is the last, and never the least if there is another."""

    def __init__(self) -> None:
        self.least = self.last = math.nan

    def add(self, number: float) -> None:
        self.least = number if math.isnan(self.least) else min(self.least, number)
        self.last = number
