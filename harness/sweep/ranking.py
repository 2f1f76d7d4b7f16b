"""Ranking of the points of a sweep, and the Pareto front of energy and force errors."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.sweep.pareto import pareto_front
from harness.sweep.reading import Point, Sweep

__all__ = ["report"]


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


_MEASURES = ("rmse", "mae", "mse", "maxabserr")


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
