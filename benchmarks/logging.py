"""Cost of monitoring: training steps with everything that is logged and watched, beside the same steps with none of it.

    python benchmarks/logging.py                       # 4 and 89 atom types
    python benchmarks/logging.py --types 4 --steps 2000

One training as `harness-train` makes it, with W&B (offline), CSV and all callbacks, has them in every second step only,
by chance; in the others nothing is called, logged or observed, as with ``logger=none callbacks=none``. So both kinds of
steps share model, data, memory and machine: two trainings side by side differ by more than what is measured. Times are
from the start of a step to the start of the next. Logged steps, all of them with everything, are reported apart, and so
are those of them that measure gradient shares.
"""

from __future__ import annotations

import os
import sys

# this folder, where this file would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 30
LOG_EVERY = 10
MEASURED = "logged, with gradient shares"


def write_frames(path: Path, num_types: int, num_frames: int, num_atoms: int) -> None:
    """Random crystals with random labels: what is learnt is of no interest here."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    random = np.random.default_rng(0)
    side = round(num_atoms ** (1 / 3))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3) * 2.6
    frames = []
    for number in range(num_frames):
        kinds = (np.arange(len(grid)) + number * len(grid)) % num_types + 1
        positions = grid + random.normal(0, 0.1, grid.shape)
        atoms = Atoms(random.permutation(kinds), positions, cell=[side * 2.6] * 3, pbc=True)
        forces, stress = random.normal(0, 1, grid.shape), random.normal(0, 0.01, 6)
        atoms.calc = SinglePointCalculator(atoms, energy=random.normal(-3 * len(grid), 1), forces=forces, stress=stress)
        frames.append(atoms)
    write(path, frames, format="extxyz")


def overrides(file: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of the training."""
    return [
        "data=file",
        f"data.train={file}",
        "data.split={val: 2, test: 2}",
        "loss=energy_force_stress",
        "metrics=energy_force_stress",
        "schedule=linear_alloy",
        "schedule.interval=step",
        "lr_scheduler=none",
        "optimizer.lr=1e-4",
        "max_epochs=1000",
        f"+trainer.max_steps={arguments.steps + WARM_UP}",
        "+trainer.limit_val_batches=0",
        "monitor=train_loss_epoch/weighted_sum",
        f"trainer.log_every_n_steps={LOG_EVERY}",
        "model.energy_scales=1.0",
        "dry_step=false",
        "test=false",
        "callbacks=[default,gradient_share]",
        "callbacks.best=null",  # there is no validation
        "callbacks.best_epoch=null",
        "callbacks.last=null",  # a checkpoint is none of what is measured
        f"output_dir={folder}",
    ]


def measure(num_types: int, arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of the steps without monitoring, with it, and of those that are logged."""
    from hydra import compose, initialize_config_dir
    from lightning.pytorch import Callback, Trainer

    from harness import job
    from harness.callbacks.gradient_share import EVERY_NTH_LOGGED_STEP
    from harness.config.resolvers import config_folder
    from harness.module import ForceFieldModule
    from harness.module.step import StepSumsOfAll

    file = folder / f"{num_types}.xyz"
    write_frames(file, num_types, 132, arguments.atoms)
    seconds: dict[str, list[float]] = {"without": [], "with everything": [], "logged": [], MEASURED: []}
    random = np.random.default_rng(0)

    class Switch(Callback):
        """Takes the time of each step, and decides what the next one has."""

        def __init__(self) -> None:
            self.kind, self.upcoming, self.start = "with everything", "with everything", 0.0
            self.callbacks: list[Callback] = []
            self.observers: list[Any] = []
            self.sums: Any = None

        def on_train_start(self, trainer: Trainer, pl_module: ForceFieldModule) -> None:
            self.callbacks, self.observers = list(trainer.callbacks), list(pl_module._observers)
            self.sums = pl_module._step_sums

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            now = time.perf_counter()
            if trainer.global_step > WARM_UP and trainer.fit_loop.epoch_loop.batch_idx > 0:
                seconds[self.kind].append(now - self.start)
            self.start = time.perf_counter()
            self.kind = self.upcoming

        def on_train_batch_end(self, trainer: Trainer, pl_module: ForceFieldModule, *_: Any) -> None:
            self.upcoming = self.draw(trainer)
            monitored = self.upcoming != "without"
            trainer.callbacks = self.callbacks if monitored else [self]
            pl_module._observers = self.observers if monitored else []
            pl_module._step_sums = self.sums if monitored else StepSumsOfAll()

        def draw(self, trainer: Trainer) -> str:
            if (trainer.global_step + 1) % (LOG_EVERY * EVERY_NTH_LOGGED_STEP) == 0:
                return MEASURED
            if (trainer.global_step + 1) % LOG_EVERY == 0:
                return "logged"
            return "without" if random.random() < 0.5 else "with everything"

    output = folder / str(num_types)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("train", overrides(file, output, arguments))
    prepared = job.prepare(config)
    prepared.trainer.callbacks.insert(0, Switch())  # type: ignore[attr-defined]
    job.execute(prepared)
    return seconds


def report(num_types: int, seconds: dict[str, list[float]]) -> None:
    """Medians, and the cost of monitoring with its 95 % interval (bootstrap)."""
    random = np.random.default_rng(0)
    without, monitored = (np.array(seconds[kind]) for kind in ("without", "with everything"))
    drawn = [
        np.median(random.choice(monitored, len(monitored))) / np.median(random.choice(without, len(without))) - 1
        for _ in range(1000)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    for kind, times in seconds.items():
        if not times:  # of a short run
            continue
        cost = np.median(times) / np.median(without) - 1
        cell = f"{100 * cost:+.1f} %"
        if kind == "with everything":
            cell += f" ({100 * low:+.1f} to {100 * high:+.1f})"
        print(f"| {num_types} | {kind} | {len(times)} | {1e3 * np.median(times):.2f} ms | {cell} |", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=int, nargs="+", default=[4, 89], help="numbers of atom types")
    parser.add_argument("--steps", type=int, default=1200, help="steps of the training")
    parser.add_argument("--atoms", type=int, default=64, help="atoms in a frame, about; 8 frames in a step")
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        print("| types | steps | number | median | cost |\n| --- | --- | --- | --- | --- |", flush=True)
        for num_types in arguments.types:
            stdout, stderr = os.dup(1), os.dup(2)
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            try:
                seconds = measure(num_types, arguments, Path(folder))
                gc.collect()  # a progress bar says something as it goes
            finally:
                os.dup2(stdout, 1), os.dup2(stderr, 2)
            report(num_types, seconds)


if __name__ == "__main__":
    sys.exit(main())
