"""Ways to weigh a loss on the same data, with the same budget, over several seeds: table and figure of test errors.

    python benchmarks/schedules.py                               # the embedded alloy
    python benchmarks/schedules.py --train train.xyz --test test.xyz --isolated-atoms atoms.xyz --epochs 40
    python benchmarks/schedules.py --only constant linear --seeds 0 1 --output elsewhere

Each training is a process of its own, ``python -m harness.train`` with the overrides that are printed, on one rank;
``--jobs`` of them run at a time. A training whose result is there already is not run again.
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import csv
import math
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def _one_to(forces: int) -> list[str]:
    return ["loss.coeffs.total_energy=1", f"loss.coeffs.forces={forces}"]


_TEN_TO_ONE = ["loss.coeffs.total_energy=10", "loss.coeffs.forces=1"]
# coefficients alone, and 1000 : 1
_TWO_STAGE = ["schedule=two_stage", "schedule.schedules.1.coeffs.forces_mse=1", "schedule.schedules.1.optimizer=null"]
_TO_THE_ENERGY = "schedule.end.per_atom_energy_mse=100"  # an end of 100 : 1
# coefficients of the loss are ENERGY : FORCES = 10 : 1 unless the name or a schedule says otherwise
WAYS: dict[str, list[str]] = {
    "constant": ["schedule=constant", *_TEN_TO_ONE],
    **{f"constant-1-{forces}": ["schedule=constant", *_one_to(forces)] for forces in (1, 10, 100, 1000)},
    "two-stage": [*_TWO_STAGE, *_TEN_TO_ONE],
    "two-stage-1-100": [*_TWO_STAGE, *_one_to(100)],
    "linear": ["schedule=linear", _TO_THE_ENERGY],
    "cosine": ["schedule=cosine", _TO_THE_ENERGY],
    "deepmd": ["schedule=deepmd"],
    "softadapt": ["adaptive=softadapt", *_TEN_TO_ONE],
    "uncertainty": ["adaptive=uncertainty", *_TEN_TO_ONE],
    "gradient-balance": ["adaptive=gradient_balance", *_TEN_TO_ONE],
    "softadapt-1-10": ["adaptive=softadapt", *_one_to(10)],
    "uncertainty-1-10": ["adaptive=uncertainty", *_one_to(10)],
    "gradient-balance-1-10": ["adaptive=gradient_balance", *_one_to(10)],
}
COLUMNS = {
    "per_atom_energy_rmse": ("energy RMSE", "meV/atom", 1000.0),
    "per_atom_energy_mae": ("energy MAE", "meV/atom", 1000.0),
    "forces_rmse": ("force RMSE", "meV/Å", 1000.0),
    "forces_mae": ("force MAE", "meV/Å", 1000.0),
}


def command(way: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """Overrides of one training."""
    data = ["experiment=alloy", "loss=energy_force", "metrics=energy_force"]
    if arguments.train:
        data = ["data=file", f"data.train={arguments.train}"]
        data += [f"data.test={arguments.test}"] if arguments.test else []
        data += [f"model.energy_shifts={arguments.isolated_atoms}"] if arguments.isolated_atoms else []
    return [
        *data,
        *WAYS[way],
        f"seed={seed}",
        "data.split_seed=0",
        f"max_epochs={arguments.epochs}",
        # the best checkpoint would be that of the coefficients of the metrics: the last one is nobody's choice
        "callbacks.best=null",
        "callbacks.parity=null",
        "logger=csv",
        "trainer.enable_progress_bar=false",
        *arguments.overrides,
    ]


def train(way: str, seed: int, arguments: argparse.Namespace) -> Path:
    """The CSV file of one training, run unless it is there."""
    folder = arguments.output / way / f"seed{seed}"
    table = folder / "csv" / "metrics.csv"
    if table.is_file() and "test0_epoch/forces_rmse" in last_row(table, "test0_epoch/forces_rmse"):
        return table
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "harness.train", *command(way, seed, arguments), f"hydra.run.dir={folder}"],
            stdout=log,
            stderr=log,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    print(f"{way}, seed {seed}: done", flush=True)
    return table


def rows_of(table: Path) -> list[dict[str, float]]:
    """Rows of a CSV file without their empty cells."""
    with table.open() as file:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def last_row(table: Path, key: str) -> dict[str, float]:
    """The last row that has a value."""
    found = [row for row in rows_of(table) if key in row]
    return found[-1] if found else {}


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def report(tables: dict[str, list[Path]]) -> str:
    """Markdown table of the test errors, mean and standard deviation over the seeds."""
    head = [f"{title} ({unit})" for title, unit, _ in COLUMNS.values()]
    lines = ["| | " + " | ".join(head) + " |", "| --- |" + " --- |" * len(head)]
    for way, files in tables.items():
        rows = [last_row(file, "test0_epoch/forces_rmse") for file in files]
        cells = [
            spread([row[f"test0_epoch/{name}"] * factor for row in rows]) for name, (_, _, factor) in COLUMNS.items()
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(tables: dict[str, list[Path]], path: Path) -> None:
    """Validation errors by epoch, and test errors of energy against forces."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for index, (way, files) in enumerate(tables.items()):
        color = f"C{index}"
        runs = [[row for row in rows_of(file) if "val0_epoch/forces_rmse" in row] for file in files]
        for axis, name in zip(axes, ("per_atom_energy_rmse", "forces_rmse"), strict=False):
            values = np.array([[1000 * row[f"val0_epoch/{name}"] for row in rows] for rows in runs])
            axis.plot(np.arange(1, values.shape[1] + 1), np.exp(np.log(values).mean(0)), color=color, label=way)
        tests = [last_row(file, "test0_epoch/forces_rmse") for file in files]
        points = np.array([[row["test0_epoch/forces_rmse"], row["test0_epoch/per_atom_energy_rmse"]] for row in tests])
        axes[2].plot(*(1000 * points.T), "o", color=color, markersize=5)
    for axis, title in zip(axes, ("energy RMSE (meV/atom)", "force RMSE (meV/Å)"), strict=False):
        axis.set_yscale("log")
        axis.set_xlabel("epoch")
        axis.set_title(f"validation: {title}")
    axes[2].set_xlabel("force RMSE (meV/Å)")
    axes[2].set_ylabel("energy RMSE (meV/atom)")
    axes[2].set_title("test, each seed")
    axes[2].set_yscale("log")
    for axis in axes:
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if np.diff(np.log10(axis.get_ylim())) < 1.3 else "")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(tables), 5))
    figure.savefig(path, dpi=90)


def main() -> None:
    """Parse the command line, train, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="training frames; without them the embedded alloy")
    parser.add_argument("--test", type=Path, help="test frames; without them a part of the training frames")
    parser.add_argument("--isolated-atoms", type=Path, help="energies of single atoms")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("outputs/schedules"))
    parser.add_argument("overrides", nargs="*", help="further overrides of every training")
    arguments = parser.parse_args()
    for name in ("train", "test", "isolated_atoms"):
        if getattr(arguments, name):
            setattr(arguments, name, getattr(arguments, name).absolute())
    arguments.output = arguments.output.absolute()
    print("harness-train", " ".join(command(arguments.only[0], arguments.seeds[0], arguments)), flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = {
            (way, seed): pool.submit(train, way, seed, arguments) for seed in arguments.seeds for way in arguments.only
        }
    tables = {way: [found[way, seed].result() for seed in arguments.seeds] for way in arguments.only}
    print(report(tables))
    draw(tables, arguments.output / "schedules.png")
    print(f"figure: {arguments.output / 'schedules.png'}")


if __name__ == "__main__":
    main()
