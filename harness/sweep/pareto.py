"""Pareto front of two errors, both better the smaller they are, and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from harness.support.figures import new_figure, save_figure

__all__ = ["FrontPoint", "draw_front", "pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points on the Pareto front.

    Point i is on the front if there is no j with x_j ≤ x_i and y_j ≤ y_i of which one is smaller. Points that coincide
    are on it together. A point with a NaN or an infinite coordinate is not, and keeps no other from it.

    Args:
        points: pairs (x, y), both better the smaller they are.

    Returns:
        Indices, by increasing x and so by decreasing y.
    """
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    for index in sorted(finite, key=lambda i: tuple(points[i])):
        if not front or points[index][1] < points[front[-1]][1] or tuple(points[index]) == tuple(points[front[-1]]):
            front.append(index)
    return front


@dataclass(frozen=True)
class FrontPoint:
    """A point of the picture.

    Args:
        x: the error of the horizontal axis.
        y: the error of the vertical axis.
        label: text beside it.
        complete: False for values that are not final: the point is drawn, but is not part of the front.
    """

    x: float
    y: float
    label: str = ""
    complete: bool = True


def draw_front(
    path: Path, points: Sequence[FrontPoint], x_label: str, y_label: str, title: str = "", note: str = ""
) -> list[int]:
    """Draw points, and the front of the complete ones as a step line: what is above or right of it is worse.

    Points of the front are labelled, and the others if there are not too many, as far as there is room. An axis is
    logarithmic where the largest value is more than ten times the smallest.

    Args:
        path: of the PNG file.
        points: those that are not finite are left out.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        title: above the picture.
        note: explanation of the labels.

    Returns:
        Indices of the points on the front.
    """
    shown = [index for index, point in enumerate(points) if math.isfinite(point.x) and math.isfinite(point.y)]
    complete = [index for index in shown if points[index].complete]
    front = [complete[index] for index in pareto_front([(points[i].x, points[i].y) for i in complete])]
    behind = [index for index in complete if index not in front]
    unfinished = [index for index in shown if not points[index].complete]

    figure = new_figure(7.2, 5.4, dpi=120, layout="constrained")
    axis = figure.subplots()
    for name, along in (("x", [points[i].x for i in shown]), ("y", [points[i].y for i in shown])):
        _scale(axis, name, along)
    axis.grid(visible=True, which="major", color="0.92")
    axis.set_axisbelow(True)
    styles: list[tuple[list[int], str, dict[str, Any]]] = [
        (front, "on the front", {"color": "C0", "markersize": 8, "zorder": 4}),
        (behind, "dominated", {"color": "0.62", "markersize": 6, "zorder": 3}),
        (unfinished, "not finished", {"color": "0.62", "markersize": 6, "markerfacecolor": "none", "zorder": 3}),
    ]
    for chosen, name, style in styles:
        if chosen:
            label = f"{name} ({len(chosen)})"
            across, up = [points[i].x for i in chosen], [points[i].y for i in chosen]
            axis.plot(across, up, "o", label=label, clip_on=False, **style)
    steps = _steps(axis, [(points[i].x, points[i].y) for i in front]) if front else []
    axis.plot([x for x, _ in steps], [y for _, y in steps], color="C0", linewidth=1.2, alpha=0.7, zorder=2)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.set_title(title)
    handles = axis.get_legend_handles_labels()
    if handles[0]:
        figure.legend(*handles, loc="outside lower center", ncols=3, title=note or None)
    _write_labels(axis, points, [*front, *behind, *unfinished], set(front), steps)
    save_figure(figure, path)
    return front


def _scale(axis: Any, name: str, values: Sequence[float]) -> None:
    """Set limits with room for markers and labels at both ends, and a logarithmic scale where the spread is large."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values:
        return
    low, high = min(values), max(values)
    if low > 0 and high > 10 * low:
        room = (high / low) ** 0.1
        getattr(axis, f"set_{name}scale")("log")
        getattr(axis, f"set_{name}lim")(low / room, high * room)
        ticks = getattr(axis, f"{name}axis")
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())
    else:
        room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        getattr(axis, f"set_{name}lim")(low - room, high + room)


def _steps(axis: Any, corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the front's step line, from the upper edge of the picture to the right one."""
    (_, right), (_, top) = axis.get_xlim(), axis.get_ylim()
    line = [(corners[0][0], top)]
    for (x, y), (following, _) in zip(corners, [*corners[1:], (right, 0.0)], strict=True):
        line += [(x, y), (following, y)]
    return line


def _write_labels(
    axis: Any,
    points: Sequence[FrontPoint],
    order: Sequence[int],
    front: set[int],
    steps: Sequence[tuple[float, float]],
) -> None:
    """Write labels beside their points where they cover nothing; those without room are left out.

    Of more than ``_CROWD`` points only those on the front get labels.
    """
    from matplotlib.transforms import Bbox

    figure = axis.figure
    figure.draw_without_rendering()  # lays out axes and texts, in pixels
    renderer = figure.canvas.get_renderer()
    inside = axis.get_window_extent(renderer)
    pixel = figure.dpi / 72
    places = [axis.transData.transform((points[index].x, points[index].y)) for index in order]
    taken = [Bbox.from_extents(x, y, x, y).padded(4 * pixel) for x, y in places]
    corners = [axis.transData.transform(corner) for corner in steps]
    taken += [Bbox([here, there]).padded(pixel) for here, there in pairwise(corners)]
    written: set[FrontPoint] = set()
    for index in order:
        point = points[index]
        crowded = len(order) > _CROWD and index not in front
        if not point.label or crowded or point in written:  # once where points coincide
            continue
        style = {"fontsize": 8, "color": "0.1"} if index in front else {"fontsize": 7, "color": "0.45"}
        text = axis.annotate(point.label, (point.x, point.y), (0, 0), textcoords="offset points", zorder=5, **style)
        for distance, (across, up) in product((5, 9, 15), _DIRECTIONS):
            text.set_position((across * distance, up * distance))
            text.set_horizontalalignment({1: "left", 0: "center", -1: "right"}[across])
            text.set_verticalalignment({1: "bottom", 0: "center", -1: "top"}[up])
            box = text.get_window_extent(renderer)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                written.add(point)
                break
        else:
            text.remove()


_CROWD = 60
_DIRECTIONS = ((1, 1), (-1, -1), (1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1), (0, -1))
