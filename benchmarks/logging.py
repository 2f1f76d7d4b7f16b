"""Cost of monitoring: training steps with everything that is logged and watched, beside the same steps with none of it.

    python benchmarks/logging.py                       # 4 and 89 atom types
    python benchmarks/logging.py --types 4 --steps 400

Two trainings of the same data, model and loss run in one process and take turns, a step each, so that a busy machine
slows both alike: one as `harness-train` makes it, with W&B (offline), CSV and all callbacks, the other with
``logger=none`` and no callbacks. Times are from the start of a step to its end, callbacks included. The first steps are
left out; steps that are logged are reported apart.
"""

from __future__ import annotations

import sys

# the folder of this script, in which it would be found in the place of Python's own module of this name
del sys.path[0]

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 30
LOG_EVERY = 10


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


def overrides(file: Path, folder: Path, monitored: bool, arguments: argparse.Namespace) -> list[str]:
    """The command line of one of the two trainings."""
    common = [
        "data=file",
        f"data.train={file}",
        "data.split={val: 2, test: 2}",
        "data.batch_size=4",
        "loss=energy_force_stress",
        "metrics=energy_force_stress",
        "schedule=linear",
        "schedule.interval=step",
        "lr_scheduler=none",
        "optimizer.lr=1e-4",
        "max_epochs=1000",
        f"+trainer.max_steps={arguments.steps + WARM_UP}",
        "+trainer.limit_val_batches=0",
        f"trainer.log_every_n_steps={LOG_EVERY}",
        "model.energy_scales=1.0",
        "dry_step=false",
        "test=false",
        f"output_dir={folder}",
    ]
    if monitored:
        return [
            *common,
            "callbacks=[default,gradient_share]",
            f"callbacks.gradient_share.every_n_steps={LOG_EVERY}",
            "callbacks.best=null",  # there is no validation
            "callbacks.best_epoch=null",
        ]
    return [*common, "logger=none", "callbacks=none", "trainer.enable_progress_bar=false"]


class Turns:
    """Lets two threads take turns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._left: set[int] = set()

    def begin(self, who: int) -> None:
        """Wait for the turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == who or 1 - who in self._left)

    def end(self, who: int) -> None:
        """Give the turn to the other."""
        with self._changed:
            self._turn = 1 - who
            self._changed.notify_all()

    def leave(self, who: int) -> None:
        """Take no more turns."""
        with self._changed:
            self._left.add(who)
            self._changed.notify_all()


def contest(num_types: int, arguments: argparse.Namespace, folder: Path) -> list[list[float]]:
    """Seconds of each step without and with monitoring."""
    from hydra import compose, initialize_config_dir
    from lightning.pytorch import Callback

    from harness import train

    file = folder / f"{num_types}.xyz"
    write_frames(file, num_types, 64, arguments.atoms)
    turns, seconds, failures = Turns(), [[], []], []

    class First(Callback):
        """Begins a step before any other callback does."""

        def __init__(self, who: int) -> None:
            self.who, self.start = who, 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            turns.begin(self.who)
            self.start = time.perf_counter()

    class Last(Callback):
        """Ends a step after all other callbacks."""

        def __init__(self, first: First) -> None:
            self.first = first

        def on_train_batch_end(self, *_: Any) -> None:
            seconds[self.first.who].append(time.perf_counter() - self.first.start)
            turns.end(self.first.who)

    def run(who: int, job: train.Job) -> None:
        first = First(who)
        job.callbacks = [first, *job.callbacks, Last(first)]
        try:
            train.execute(job)
        except BaseException as error:
            failures.append(error)
        finally:
            turns.leave(who)

    jobs = []
    for who in range(2):
        output = folder / f"{num_types}-{who}"
        with initialize_config_dir(train._config_folder(), version_base="1.3"):
            config = compose("train", overrides(file, output, bool(who), arguments))
        config.output_dir = str(output)
        jobs.append(train.prepare(config))
    threads = [threading.Thread(target=run, args=(who, job)) for who, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [each[WARM_UP:] for each in seconds]


def report(num_types: int, without: list[float], monitored: list[float]) -> None:
    """Medians of unlogged and logged steps, and of the ratios of neighbours in time."""
    steps = range(WARM_UP, WARM_UP + min(len(without), len(monitored)))
    for what, chosen in (
        ("unlogged", [i for i, step in enumerate(steps) if (step + 1) % LOG_EVERY]),
        ("logged", [i for i, step in enumerate(steps) if (step + 1) % LOG_EVERY == 0]),
    ):
        bare, full = ([times[i] for i in chosen] for times in (without, monitored))
        ratio = statistics.median(b / a for a, b in zip(bare, full, strict=True))
        cells = [f"{1e3 * statistics.median(each):.2f} ms" for each in (bare, full)]
        cells.append(f"{100 * (ratio - 1):+.1f} %")
        print(f"| {num_types} | {what} ({len(chosen)}) | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=int, nargs="+", default=[4, 89], help="numbers of atom types")
    parser.add_argument("--steps", type=int, default=400, help="steps of each training")
    parser.add_argument("--atoms", type=int, default=64, help="atoms in a frame, about; 4 frames in a step")
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        print("| types | steps | without | with everything | cost |\n| --- | --- | --- | --- | --- |", flush=True)
        for num_types in arguments.types:
            stdout, stderr = os.dup(1), os.dup(2)
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            try:
                times = contest(num_types, arguments, Path(folder))
            finally:
                os.dup2(stdout, 1), os.dup2(stderr, 2)
            report(num_types, *times)


if __name__ == "__main__":
    sys.exit(main())
