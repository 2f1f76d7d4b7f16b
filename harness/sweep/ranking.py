"""Ranking of the points of a sweep, and the Pareto front of energy and force errors."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from harness.sweep.pareto import pareto_front
from harness.sweep.points import Sweep, SweepPoint, datasets, log_keys

__all__ = ["MEASURES", "RankedSweep", "errors_of", "rank"]

MEASURES = ("rmse", "mae", "mse", "maxabserr")
"""Last parts of the names of errors."""


@dataclass(frozen=True)
class RankedSweep:
    """A sweep with its points in order.

    Attributes:
        sweep: the sweep.
        sort: log key of the order; smaller is better.
        ranked: finished points that have a finite value of that key, the best first.
        others: the other points.
        axes: log keys of the energy and the force error, if there are any.
        front: points on the Pareto front of these errors.
    """

    sweep: Sweep
    sort: str
    ranked: Sequence[SweepPoint]
    others: Sequence[SweepPoint]
    axes: tuple[str, str] | None
    front: Sequence[SweepPoint]

    def rows(self) -> Iterator[tuple[int | None, SweepPoint]]:
        """All points in order, with their ranks from 1; None for points that are not ranked."""
        yield from enumerate(self.ranked, start=1)
        yield from ((None, point) for point in self.others)


def rank(sweep: Sweep, energy: str | None = None, forces: str | None = None, sort: str | None = None) -> RankedSweep:
    """Rank the points of a sweep, and find those on the Pareto front of energy and force errors.

    Args:
        sweep: with points that may be unfinished.
        energy: log key of the energy error, or the name of its component; chosen if not given.
        forces: log key of the force error, or the name of its component; chosen if not given.
        sort: log key that orders the points, or the name of a component; the monitored value if not given.

    Raises:
        ValueError: no point has a value of a key that was given.
    """
    key = _find(sort, sweep.most_final) if sort else sweep.monitor
    points = [_with_reason(point, key) for point in sweep.points]
    ranked = [point for point in points if point.finished and math.isfinite(point.values.get(key, math.nan))]
    ranked.sort(key=lambda point: point.values[key])
    others = [point for point in points if point not in ranked]
    others.sort(key=lambda point: not point.finished)
    axes = _axes(sweep.most_final, energy, forces)
    finished = [point for point in points if point.finished]
    front = [] if axes is None else pareto_front([errors_of(point, axes) for point in finished])
    return RankedSweep(sweep, key, ranked, others, axes, [finished[index] for index in front])


def errors_of(point: SweepPoint, axes: tuple[str, str]) -> tuple[float, float]:
    """Energy and force error of a point, NaN where it has none."""
    return point.values.get(axes[0], math.nan), point.values.get(axes[1], math.nan)


def _with_reason(point: SweepPoint, key: str) -> SweepPoint:
    """Add the reason why a finished point is not ranked, if it has no reason yet."""
    if point.reason or not point.finished or math.isfinite(point.values.get(key, math.nan)):
        return point
    return replace(point, reason=f"{key} is {point.values[key]}" if key in point.values else f"it has no {key}")


def _find(name: str, points: Sequence[SweepPoint]) -> str:
    """Log key of a name, which may be that of a component: ``forces_rmse``, of the first test or validation set.

    Raises:
        ValueError: there is none.
    """
    keys = log_keys(points)
    if name in keys:
        return name
    same = [each.key(name) for each in datasets(points) if each.key(name) in keys]
    if same:
        return same[0]
    close = difflib.get_close_matches(name, keys, n=3, cutoff=0.5)
    plain = [key for each in datasets(points) for key in keys if each.name_in(key) and "_per_type" not in key]
    known = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(plain) or 'none'}."
    raise ValueError(f"No point has a value {name!r}. {known}")


def _axes(points: Sequence[SweepPoint], energy: str | None, forces: str | None) -> tuple[str, str] | None:
    """Keys of the energy and the force error: the same measure of the same set, a test's if all points have it.

    Raises:
        ValueError: no point has a value of a key that was given.
    """
    if energy and forces:
        return _find(energy, points), _find(forces, points)
    pairs = [
        (each.key(f"{name}_{measure}"), each.key(f"forces_{measure}"))
        for each in datasets(points)
        for measure in MEASURES[:3]
        for name in ("per_atom_energy", "total_energy")
    ]
    if energy:
        pairs = [(_find(energy, points), right) for _, right in pairs]
    elif forces:
        pairs = [(left, _find(forces, points)) for left, _ in pairs]
    having = Counter({pair: sum(set(pair) <= point.values.keys() for point in points) for pair in pairs})
    if not having:
        return None
    best = max(having.values())
    return next(pair for pair in pairs if having[pair] == best) if best else None
