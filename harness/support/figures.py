"""Matplotlib figures without pyplot, which would keep every figure and look for a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.support.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure", "save_figure"]


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Figure of a size in inches that draws into files; ``options`` are those of :class:`matplotlib.figure.Figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure, in the format of the file's suffix; readers see it whole or not at all.

    ``options`` are those of ``savefig``, such as ``dpi``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".") or "png", **options)
