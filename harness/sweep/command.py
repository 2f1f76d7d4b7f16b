"""Report of a sweep, finished or not: a ranked table of its points, and the Pareto front of energy and force errors.

    python -m harness.sweep multirun/train/2026-11-24_10-00-00
    harness-sweep multirun/train/2026-11-24_10-00-00 --forces test0_epoch/forces_mae --no-wandb

Writes ``sweep.csv``, with every value of every point, and ``pareto.png`` into the sweep's directory, and logs both to
W&B as one run of the job type ``sweep``, in the project and group of the points.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.support.process import mistakes_reported
from harness.sweep.output import draw, log_to_wandb, table, table_width, write_csv
from harness.sweep.ranking import RankedSweep, rank
from harness.sweep.reading import read_sweep

__all__ = ["main"]

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False}


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harness-sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "sweep", type=Path, metavar="OUTPUT_DIR", help="directory of the sweep: multirun/<name>/<stamp>"
    )
    of_key = "log key such as test0_epoch/{0}, or {0}"
    parser.add_argument("--energy", metavar="KEY", help=f"energy error: {of_key.format('per_atom_energy_mae')}")
    parser.add_argument("--forces", metavar="KEY", help=f"force error: {of_key.format('forces_mae')}")
    parser.add_argument(
        "--sort", metavar="KEY", help="key that orders the points, smaller is better; `monitor` if not given"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the report; OUTPUT_DIR if not given")
    parser.add_argument(
        "--wandb", action=argparse.BooleanOptionalAction, default=True, help="log table and picture to W&B"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Command line of ``harness-sweep``."""
    arguments = _arguments(given)
    with mistakes_reported():
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    """Read, rank, print, write, and log.

    Raises:
        ValueError: no point has been started or has finished, or a log key has no value.
    """
    sweep = read_sweep(arguments.sweep)
    if not sweep.points:
        raise ValueError(f"No point of {sweep.folder} has been started yet.")
    ranked = rank(sweep, arguments.energy, arguments.forces, arguments.sort)
    console = Console()
    _print_points(console, ranked)
    folder = (arguments.output or sweep.folder).absolute()
    columns, rows = write_csv(ranked, folder / "sweep.csv")
    _print_place(console, "table", folder / "sweep.csv")
    if not any(point.finished for point in sweep.points):
        states = Counter(point.state for point in sweep.points)
        counts = ", ".join(f"{number} {state}" for state, number in states.items())
        raise ValueError(f"nothing has finished yet, so that there is no ranking and no front: {counts}.")
    picture = folder / "pareto.png"
    if draw(ranked, picture):
        front = ", ".join(point.name for point in ranked.front)
        console.print(f"front       {front} (*), of {' and '.join(ranked.axes or ())}", soft_wrap=True, **_PLAIN)
        _print_place(console, "picture", picture)
    else:
        picture.unlink(missing_ok=True)  # of a report before
        console.print(
            "no front: no point has an energy and a force error. Name them with --energy and --forces", **_PLAIN
        )
    if arguments.wandb:
        place = log_to_wandb(ranked, folder, columns, rows, picture if picture.exists() else None)
        if place:
            _print_place(console, "W&B run", place)


def _print_points(console: Console, ranked: RankedSweep) -> None:
    """Print the table, and the reason of each point that is not ranked."""
    sweep = ranked.sweep
    shown = table(ranked, console.width if console.is_terminal else None)
    if not console.is_terminal:  # a log file has room for every column
        console.width = max(console.width, table_width(shown))
    console.print(shown)
    for point in ranked.others:
        settings = sweep.describe(point)
        named = f"{point.name} ({settings})" if settings else point.name
        console.print(f"point {named} {point.state}: {point.reason}", soft_wrap=True, **_PLAIN)
    if sweep.planned is not None and sweep.planned > len(sweep.points):
        console.print(f"{len(sweep.points)} of {sweep.planned} points have been started", **_PLAIN)


def _print_place(console: Console, name: str, place: object) -> None:
    console.print(f"{name:<11} {place}", soft_wrap=True, **_PLAIN)
