"""Learning rates of a training that is extended or changed, beside those of undisturbed ones: table and figure.

    python benchmarks/continuation.py --output outputs/continuation

Four epochs of the embedded alloy go on from their last checkpoint for four more, as they were and with a lower learning
rate. Each training is a process of its own, ``python -m harness.train`` with the overrides that are printed, on one
rank; rates are those that ``LearningRateMonitor`` has read from the optimizer.
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import csv
import subprocess
from pathlib import Path

COMMON = ["data.num_frames=40", "data.batch_size=8", "model.hidden_channels=8", "model.num_filters=8"]
COMMON += ["model.num_interactions=1", "trainer=cpu", "logger=csv", "test=false", "trainer.log_every_n_steps=1"]
COMMON += ["callbacks.parity=null"]
LAST = "ckpt_path={output}/four/checkpoints/last.ckpt"
RUNS = {
    "four": ("4 epochs", ["max_epochs=4"]),
    "extended": ("extended to 8", ["max_epochs=8", LAST]),
    "changed": ("extended to 8, optimizer.lr=1e-4", ["max_epochs=8", "optimizer.lr=1e-4", LAST]),
    "eight": ("8 epochs undisturbed", ["max_epochs=8"]),
    "low": ("8 epochs undisturbed, optimizer.lr=1e-4", ["max_epochs=8", "optimizer.lr=1e-4"]),
}


def rates_of(name: str, output: Path) -> dict[int, float]:
    """Learning rate of each epoch of a training, which is run if there is no file of it."""
    file = output / name / "csv" / "metrics.csv"
    if not file.is_file():
        overrides = [override.format(output=output) for override in (*COMMON, *RUNS[name][1])]
        print("harness-train", " ".join(overrides), flush=True)
        command = [sys.executable, "-m", "harness.train", *overrides, f"hydra.run.dir={output / name}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with file.open() as rows:
        found = [float(row["lr-Adam"]) for row in csv.DictReader(rows) if row.get("lr-Adam")]
    first = 4 if name in ("extended", "changed") else 0
    return {first + number: rate for number, rate in enumerate(found)}


def draw(rates: dict[str, dict[int, float]], path: Path) -> None:
    """Rates by epoch: lines of the undisturbed trainings, points of those that go on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    styles = {"eight": "C0-", "low": "C1-", "four": "C2s--", "extended": "C0o", "changed": "C1o"}
    for name, style in styles.items():
        axis.plot([*rates[name]], [*rates[name].values()], style, label=RUNS[name][0])
    axis.set_xlabel("epoch")
    axis.set_ylabel("learning rate")
    axis.set_yscale("log")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/continuation"))
    output = parser.parse_args().output.absolute()
    rates = {name: rates_of(name, output) for name in RUNS}
    print("| training | " + " | ".join(f"epoch {epoch}" for epoch in range(8)) + " |")
    print("| --- |" + " ---: |" * 8)
    for name, (label, _) in RUNS.items():
        cells = [f"{rates[name][epoch]:.3g}" if epoch in rates[name] else "" for epoch in range(8)]
        print(f"| {label} | {' | '.join(cells)} |")
    draw(rates, output / "continuation.png")
    print(f"figure: {output / 'continuation.png'}")


if __name__ == "__main__":
    main()
