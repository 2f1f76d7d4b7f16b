"""Report of a sweep, finished or not: a ranked table of its points, and the Pareto front of energy and force errors.

    python -m harness.sweep multirun/train/2026-11-24_10-00-00
    harness-sweep multirun/train/2026-11-24_10-00-00 --forces test0_epoch/forces_mae --no-wandb

It writes ``sweep.csv``, with every value of every point, and ``pareto.png`` into the sweep's directory, and logs both
to W&B as one run of the job type ``sweep``, in the project and group of the points.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.sweep.output import _width, draw, log_to_wandb, table, write_csv
from harness.sweep.ranking import report
from harness.sweep.reading import Point, Sweep, read_sweep

__all__ = ["main"]


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harness-sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "sweep", type=Path, metavar="OUTPUT_DIR", help="directory of the sweep: multirun/<name>/<stamp>"
    )
    of_key = "log key such as test0_epoch/{0}, or {0}"
    parser.add_argument("--energy", metavar="KEY", help=f"energy error: {of_key.format('per_atom_energy_mae')}")
    parser.add_argument("--forces", metavar="KEY", help=f"force error: {of_key.format('forces_mae')}")
    parser.add_argument(
        "--sort", metavar="KEY", help="what orders the points, smaller is better; `monitor` if not given"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the report is written; OUTPUT_DIR if not given"
    )
    parser.add_argument(
        "--wandb", action=argparse.BooleanOptionalAction, default=True, help="log table and picture to W&B"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Command line of ``harness-sweep``."""
    arguments = _arguments(given)
    try:
        _run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _run(arguments: argparse.Namespace) -> None:
    sweep = read_sweep(arguments.sweep)
    if not sweep.points:
        raise ValueError(f"No point of {sweep.folder} has been started yet.")
    found = report(sweep, arguments.energy, arguments.forces, arguments.sort)
    console = Console()
    shown = table(found, console.width if console.is_terminal else None)
    if not console.is_terminal:  # a log file has room for every column
        console.width = max(console.width, _width(shown))
    console.print(shown)
    for point in found.others:
        console.print(
            f"point {point.name} {_named(sweep, point)}{point.state}: {point.reason}", soft_wrap=True, **_PLAIN
        )
    if sweep.planned is not None and sweep.planned > len(sweep.points):
        console.print(f"{len(sweep.points)} of {sweep.planned} points have been started", **_PLAIN)
    folder = (arguments.output or sweep.folder).absolute()
    columns, rows = write_csv(found, folder / "sweep.csv")
    _say(console, "table", folder / "sweep.csv")
    if not any(point.finished for point in sweep.points):
        states = Counter(point.state for point in sweep.points)
        counts = ", ".join(f"{number} {state}" for state, number in states.items())
        raise ValueError(f"nothing has finished yet, so that there is no ranking and no front: {counts}.")
    picture = folder / "pareto.png"
    if draw(found, picture):
        front = ", ".join(point.name for point in found.front)
        console.print(f"front       {front} (*), of {' and '.join(found.axes or ())}", soft_wrap=True, **_PLAIN)
        _say(console, "picture", picture)
    else:
        picture.unlink(missing_ok=True)  # of a report before
        console.print(
            "no front: no point has an energy and a force error. Name them with --energy and --forces", **_PLAIN
        )
    if arguments.wandb:
        place = log_to_wandb(found, folder, columns, rows, picture if picture.exists() else None)
        if place:
            _say(console, "W&B run", place)


def _named(sweep: Sweep, point: Point) -> str:
    given = [f"{sweep.short(name)}={point.overrides[name]}" for name in sweep.swept if name in point.overrides]
    return f"({', '.join(given)}) " if given else ""


def _say(console: Console, what: str, place: object) -> None:
    console.print(f"{what:<11} {place}", soft_wrap=True, **_PLAIN)


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False}
