"""Cost of a whole training step beside a loop written by hand, side by side in one run: table, and where time goes.

    python benchmarks/training.py                          # short and long steps, on 1 and on 2 gloo ranks
    python benchmarks/training.py --frames 4 --ranks 1 --rounds 60 --where
    python benchmarks/training.py --checkpoints 100 --ranks 1  # MB: how long one stops the training

The contestants train the same model on the same batches, in turns of a few steps:

* ``loop``: written by hand, with the loss written out, torch's DDP on several ranks, and nothing logged;
* ``managers``: the same loop with the loss of the default config, which has errors by atom type beside it;
* ``lightning``: the loop's own loss in a ``LightningModule``, with nothing of this package around the model;
* ``module``: ``ForceFieldModule`` under Lightning, without callbacks and loggers;
* ``everything``: the default config, with W&B (offline), CSV, all callbacks and gradient shares.

A contestant's loader hands out the batches, so that it can take the time from one batch to the next, and whoever has
had its batches waits until it is its turn again. Times are compared batch by batch, and the fastest fifth of the steps
counts, since other work on a machine only adds.
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import copy
import gc
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

WARM_UP = 3
"""Rounds that do not count."""
WARM_STEPS = 20
CONTESTANTS = ("loop", "managers", "lightning", "module", "everything")
LR = 1e-4
CLOCKS = (time.perf_counter, time.process_time, time.thread_time)
LOG_EVERY = 10
PERIOD = 20
"""Steps from one checkpoint to the next."""
Batch = dict[str, Tensor]


class Contest:
    """Turns of contestants, each of which runs in a thread of its own: one runs, the others wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._failed: BaseException | None = None

    def begin(self, name: str) -> None:
        """Wait for the turn of a contestant."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed is not None or self._waiting[0] == name)
            if self._failed is not None:
                raise RuntimeError("another contestant has failed")
        if dist.is_initialized():
            dist.barrier()

    def end(self, is_over: bool = False) -> None:
        """Let the next contestant have its turn."""
        with self._changed:
            current = self._waiting.pop(0)
            self._waiting += [] if is_over else [current]
            self._changed.notify_all()

    def run(self, contestants: dict[str, Callable[[], None]]) -> None:
        """Run all contestants to their ends."""
        self._waiting = list(contestants)

        def run(name: str, body: Callable[[], None]) -> None:
            try:
                self.begin(name)
                body()
                self.end(is_over=True)
            except BaseException as error:  # whatever it is, the others must not wait for this one
                with self._changed:
                    self._failed = self._failed or error
                    self._changed.notify_all()

        threads = [threading.Thread(target=run, args=each) for each in contestants.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed is not None:
            raise self._failed


class Turns:
    """Loader of a contestant, which takes the time of each of its steps.

    Attributes:
        steps: ``[round][step]`` of wall seconds, and seconds of the processor: of this process, and of this thread.
    """

    def __init__(self, contest: Contest, name: str, batches: Sequence[Batch], rounds: int) -> None:
        self.contest, self.name, self.batches, self.rounds = contest, name, batches, rounds
        self.steps: list[list[tuple[float, ...]]] = []

    def __len__(self) -> int:
        return self.rounds * len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.rounds):
            if number:
                self.contest.end()
                self.contest.begin(self.name)
            self.steps.append([])
            for batch in self.batches:
                start = [clock() for clock in CLOCKS]
                yield batch
                self.steps[-1].append(tuple(clock() - at for clock, at in zip(CLOCKS, start, strict=True)))


# --- the contestants ---


def loss_by_hand(predictions: Batch, batch: Batch) -> Tensor:
    """The default loss, written out: 1/11 of the error of the energy per atom, 10/11 of that of the forces."""
    difference = (predictions["total_energy"] - batch["total_energy"]) / batch["num_atoms"].unsqueeze(-1)
    forces = (predictions["forces"] - batch["forces"]).square().mean()
    return (difference.square().mean() + 10 * forces) / 11


def train_by_hand(model: nn.Module, batches: Turns, loss: Callable[[Batch, Batch], Tensor], lr: float) -> None:
    """A loop as anybody would write it."""
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        loss(wrapped(batch), batch).backward()
        optimizer.step()


def managed_loss(manager: Any) -> Callable[[Batch, Batch], Tensor]:
    """The same loss by a manager."""
    from harness.distributed import gradient_scale

    return lambda predictions, batch: manager(predictions, batch)["weighted_sum"] * gradient_scale()


class PlainModule(LightningModule):
    """The loop's model, loss and optimizer under Lightning."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return loss_by_hand(self.model(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the loop."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def compose_config(folder: Path, *overrides: str) -> Any:
    """The default config on CPU ranks, with little data and no test."""
    from hydra import compose, initialize_config_dir

    from harness.config.resolvers import config_folder

    common = ["trainer=cpu", "test=false", "dry_step=false", "max_epochs=1", f"trainer.log_every_n_steps={LOG_EVERY}"]
    common += ["data.split={val: 4, test: 4}", "model.energy_scales=1.0", f"optimizer.lr={LR}", f"output_dir={folder}"]
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose("train", [*common, *overrides])


def everything(folder: Path, *overrides: str) -> Any:
    """The job of the default config, with gradient shares."""
    from harness import job

    return job.prepare(compose_config(folder, "callbacks=[default,gradient_share]", *overrides))


def give(prepared: Any, loader: Turns | Sequence[Batch]) -> None:
    """Let a job train on batches of this script."""
    vars(prepared.datamodule)["train_dataloader"] = lambda: loader


def plain_trainer(folder: Path) -> Any:
    """Trainer without callbacks and loggers."""
    from harness.job.trainer import make_strategy, make_trainer

    bare = ["callbacks=none", "logger=none", "trainer.enable_progress_bar=false", "+trainer.enable_checkpointing=false"]
    config = compose_config(folder, *bare)
    return make_trainer(config, make_strategy(config))


def batches_of(prepared: Any, number: int) -> list[Batch]:
    """This rank's parts of the first batches of a job's data."""
    loader = iter(prepared.datamodule.train_dataloader())
    return [next(loader) for _ in range(number)]


def data_overrides(frames: int, ranks: int) -> list[str]:
    """Data with a number of frames for each rank in a step."""
    return [f"data.num_frames={4 * frames * ranks + 8}", f"data.batch_size={frames * ranks}"]


def compete(frames: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Turns]:
    """Run all contestants in turns."""
    from harness import job
    from harness.distributed import launched_ranks
    from harness.job.build import build_module
    from harness.strategies import connect

    data = data_overrides(frames, launched_ranks())
    prepared = everything(folder / str(frames), *data)
    batches = batches_of(prepared, 4)
    rounds, contest = arguments.rounds + WARM_UP, Contest()
    loaders = {name: Turns(contest, name, batches, rounds) for name in reversed(CONTESTANTS)}
    module = build_module(prepared.config, prepared.datamodule)
    module.model.load_state_dict(prepared.module.model.state_dict())
    by_hand, managed, plain = (copy.deepcopy(prepared.module.model).train() for _ in range(3))
    by_manager = managed_loss(build_module(prepared.config, prepared.datamodule).loss)
    if launched_ranks() == 1:
        check(by_hand, batches[0], by_manager)
    give(prepared, loaders["everything"])
    connect(prepared.trainer)

    def fit(name: str, made: LightningModule) -> None:
        plain_trainer(folder).fit(made, train_dataloaders=loaders[name])

    contest.run(
        {
            "everything": lambda: job.execute(prepared) and None,
            "module": lambda: fit("module", module),
            "lightning": lambda: fit("lightning", PlainModule(plain, LR)),
            "managers": lambda: train_by_hand(managed, loaders["managers"], by_manager, LR),
            "loop": lambda: train_by_hand(by_hand, loaders["loop"], loss_by_hand, LR),
        }
    )
    return loaders


def check(model: nn.Module, batch: Batch, by_manager: Callable[[Batch, Batch], Tensor]) -> None:
    """Refuse to compare losses that are not the same."""
    predictions = model(batch)
    values = [float(loss(predictions, batch)) for loss in (loss_by_hand, by_manager)]
    if abs(values[0] - values[1]) > 1e-5 * abs(values[0]):
        raise RuntimeError(f"the loss by hand is {values[0]}, that of the manager {values[1]}: not the same loss")


# --- tables ---


def kind_of(step: int, logged: bool) -> str:
    """Kind of a step, by its number from 0, of a contestant that logs."""
    from harness.callbacks.gradient_share import EVERY_NTH_LOGGED_STEP

    if logged and (step + 1) % (EVERY_NTH_LOGGED_STEP * LOG_EVERY) == 0:
        return "with gradient shares"
    return "logged" if logged and (step + 1) % LOG_EVERY == 0 else "not logged"


def low(values: Sequence[float]) -> float:
    """The fifth of the values that are lowest, at its upper end: other work on the machine only adds."""
    return sorted(values)[len(values) // 5]


def report(frames: int, ranks: int, loaders: dict[str, Turns]) -> None:
    """Print each contestant's time for each kind of its steps, beside that of the loop on the same batches."""
    columns = ("steps of", "kind", "number", "wall ms", "/ loop", "CPU ms", "/ loop", "CPU µs over the loop")
    print(f"\n{frames} frames a rank, {ranks} rank{'s' * (ranks > 1)}\n\n| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    turns = [turn for turn in loaders["loop"].steps[WARM_UP:] if len(turn) == len(loaders["loop"].batches)]
    loop = [[low([turn[index][column] for turn in turns]) for index in range(len(turns[0]))] for column in (0, 1)]
    for name in CONTESTANTS:
        kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for number, turn in enumerate(loaders[name].steps):
            for index, step in enumerate(turn):
                if number >= WARM_UP:
                    kind = kind_of(number * len(loop[0]) + index, name == "everything")
                    kinds[kind].append((step[0] / loop[0][index], step[1] / loop[1][index]))
        for kind, steps in sorted(kinds.items(), key=lambda each: -len(each[1])):
            ratios = [low([step[column] for step in steps]) for column in (0, 1)]
            wall, used = (1e3 * ratio * statistics.mean(times) for ratio, times in zip(ratios, loop, strict=True))
            over = f"{1e6 * (ratios[1] - 1) * statistics.mean(loop[1]):+.0f}"
            cells = (f"{wall:.2f}", f"{ratios[0]:.3f}", f"{used:.2f}", f"{ratios[1]:.3f}", over)
            print(f"| {name} | {kind} | {len(steps)} | {' | '.join(cells)} |")
    sys.stdout.flush()


# --- where the time goes ---


class Clock:
    """Processor time of the thread within each action that Lightning knows of, without that of actions inside of it."""

    def __init__(self) -> None:
        from lightning.pytorch.profilers import Profiler

        clock = self
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[list[Any]] = []  # name, start, seconds of actions inside

        class Watch(Profiler):
            def start(self, action_name: str) -> None:
                clock._running.append([action_name, time.thread_time(), 0.0])

            def stop(self, action_name: str) -> None:
                name, start, inside = clock._running.pop()
                taken = time.thread_time() - start
                clock.seconds[name] += taken - inside
                if clock._running:
                    clock._running[-1][2] += taken

        self.profiler = Watch()


class Timed:
    """Loader that lets a clock run from a number of warm steps on, and reads it at the end."""

    def __init__(self, clock: Clock, batches: Sequence[Batch], steps: int) -> None:
        self.clock, self.batches, self.steps = clock, batches, steps
        self.microseconds: dict[str, float] = {}
        self.step = 0.0

    def __len__(self) -> int:
        return WARM_STEPS + self.steps + 1

    def __iter__(self) -> Iterator[Batch]:
        start = 0.0
        for number in range(len(self)):
            if number == WARM_STEPS:
                self.clock.seconds.clear()
                start = time.thread_time()
            if number == len(self) - 1:  # nobody asks for one more
                self.step = 1e6 * (time.thread_time() - start) / self.steps
                self.microseconds = {name: 1e6 * value / self.steps for name, value in self.clock.seconds.items()}
            yield self.batches[number % len(self.batches)]


def measure_actions(frames: int, folder: Path, steps: int) -> Timed:
    """Time the actions of steps of ``everything`` that are not logged."""
    from harness import job
    from harness.distributed import launched_ranks

    unlogged = "trainer.log_every_n_steps=100000"
    prepared = everything(folder / "where", *data_overrides(frames, launched_ranks()), unlogged)
    clock = Clock()
    timed = Timed(clock, batches_of(prepared, 4), steps)
    prepared.trainer.profiler = clock.profiler
    give(prepared, timed)
    job.execute(prepared)
    return timed


def report_actions(frames: int, timed: Timed) -> None:
    """Print actions by their time."""
    print(
        f"\nµs of the processor of the actions of a step, {timed.step:.0f}, with {frames} frames a rank; not logged\n"
    )
    print("| action | µs |\n| --- | --- |")
    shown = [(name, value) for name, value in sorted(timed.microseconds.items(), key=lambda row: -row[1]) if value >= 2]
    rest = timed.step - sum(value for _, value in shown)
    for name, value in [*shown, ("between actions, and smaller ones", rest)]:
        print(f"| {name} | {value:.0f} |")
    sys.stdout.flush()


# --- checkpoints ---


class Ballast(Callback):
    """Makes checkpoints larger by a tensor that lives on, as weights do."""

    def __init__(self, megabytes: int) -> None:
        self.tensor = torch.ones(megabytes * 2**18)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add it."""
        checkpoint["ballast"] = self.tensor


def time_checkpoints(name: str, arguments: argparse.Namespace, folder: Path) -> list[tuple[float, ...]]:
    """Times of steps, of which every 20th saves a checkpoint in the foreground or background, or none does."""
    from harness import job
    from harness.distributed import launched_ranks

    settings = [f"callbacks.last.every_n_steps={'null' if name == 'none' else PERIOD}", "logger=csv"]
    settings += [f"background_checkpoints={str(name == 'background').lower()}"]
    prepared = everything(folder / name, *data_overrides(arguments.frames[0], launched_ranks()), *settings)
    prepared.trainer.callbacks.insert(0, Ballast(arguments.checkpoints))  # type: ignore[attr-defined]
    timed = Turns(Contest(), name, batches_of(prepared, 4), 6 * PERIOD // 4)
    give(prepared, timed)
    timed.contest.run({name: lambda: job.execute(prepared) and None})
    return [step for turn in timed.steps for step in turn]


def report_checkpoints(megabytes: int, times: dict[str, list[tuple[float, ...]]]) -> None:
    """Print what a checkpoint adds to the step that saves it, and to all steps until the next one."""
    clocks = {"by the clock": 0, "of the training's thread": 2, "of all threads": 1}
    step = {column: statistics.median(each[column] for each in times["none"]) for column in clocks.values()}
    print(f"\nms that a checkpoint of {megabytes} MB adds to steps of {1e3 * step[2]:.1f} ms of the processor\n")
    print(f"| written in the | ms | step that saves | it and the {PERIOD - 1} after it |\n| --- | --- | --- | --- |")
    for name in ("foreground", "background"):
        periods = [times[name][start : start + PERIOD] for start in range(2 * PERIOD - 1, 5 * PERIOD - 1, PERIOD)]
        for clock, column in clocks.items():
            more = [
                statistics.median(1e3 * (sum(each[column] for each in part[:n]) - n * step[column]) for part in periods)
                for n in (1, PERIOD)
            ]
            print(f"| {name} | {clock} | {more[0]:.0f} | {more[1]:.0f} |")
    sys.stdout.flush()


# --- ranks ---


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what is printed, also by other libraries, to a file."""
    sys.stdout.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    try:
        yield
    except BaseException:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        print(log.read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        gc.collect()  # a progress bar says something as it goes
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(stdout, 1), os.dup2(stderr, 2)


def work(arguments: argparse.Namespace) -> None:
    """One rank; rank 0 prints."""
    from harness.distributed import launched_rank, launched_ranks

    torch.set_num_threads(1)
    folder = Path(arguments.folder)
    log = folder / f"log.{launched_rank()}"
    if arguments.checkpoints is not None:
        with quiet(log):
            times = {name: time_checkpoints(name, arguments, folder) for name in ("none", "foreground", "background")}
        if launched_rank() == 0:
            report_checkpoints(arguments.checkpoints, times)
        return
    for frames in arguments.frames:
        with quiet(log):
            loaders = compete(frames, arguments, folder)
        if launched_rank() == 0:
            report(frames, launched_ranks(), loaders)
    if arguments.where:
        with quiet(log):
            timed = measure_actions(arguments.frames[0], folder, 4 * arguments.rounds)
        if launched_rank() == 0:
            report_actions(arguments.frames[0], timed)


def main() -> None:
    """Parse the command line and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 90], help="frames of a step on each rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40, help="turns of each contestant, of 4 steps")
    parser.add_argument("--where", action="store_true", help="print the actions of the first step by their time")
    parser.add_argument("--checkpoints", type=int, metavar="MB", help="time checkpoints of that size instead")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the ranks of one start
    arguments = parser.parse_args()
    if arguments.folder:
        work(arguments)
        return
    environment = {"WANDB_MODE": "offline", **os.environ, "OMP_NUM_THREADS": "1"}
    for ranks in arguments.ranks:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *start, os.path.abspath(__file__), *sys.argv[1:], "--folder", folder]
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
