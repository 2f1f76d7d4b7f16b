"""Trainings on two ranks in which no rank's backward pass waits for the forward pass of another."""

from __future__ import annotations

import csv
import functools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from support import oracle
from support.accumulation_cases import LOSS, TYPES, WATCHED
from support.lightning_ranks import Ranks
from support.linear import Linear, batches, plain, trainer
from support.spawning import spawn
from support.step_cost import counted_collectives

import harness
from harness.callbacks import NonFiniteGuard, ResumeCheckpoint, ThroughputMonitor
from harness.data import look_ahead
from harness.module import ForceFieldModule
from harness.strategies import FlatStrategy

PARTS = [[[0, 1], [2], [3, 4, 5], [6]], [[7, 8], [9, 10, 11], [12], [13, 14]]]
"""Frames of each batch of an epoch, by rank."""


class AfterBackwardOfFirst(Linear):
    """On rank 1, makes its predictions only when the backward pass of rank 0 has begun."""

    def __init__(self, rank: int, folder: Path, num_first: int) -> None:
        super().__init__()
        self.rank, self.folder, self.num_first, self.calls = rank, folder, num_first, 0

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls += 1
        begun = self.folder / f"backward{self.calls}"
        deadline = time.monotonic() + 15
        # the first step compares the elements with those announced, and waits
        while self.rank == 1 and self.calls > self.num_first and not begun.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank 0 waits for rank 1 before its backward pass in call {self.calls}")
            time.sleep(0.01)
        return super().forward(batch)


class BackwardBegins(Callback):
    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if trainer.global_rank == 0:
            (pl_module.model.folder / f"backward{pl_module.model.calls}").touch()


def built(model: torch.nn.Module) -> ForceFieldModule:
    return ForceFieldModule(
        model,
        oracle.manager(LOSS, TYPES),
        train_metrics=oracle.manager(WATCHED, TYPES),
        optimizer=functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    )


def train_late(rank: int, world_size: int, folder: Path, strategy: type[DDPStrategy], k: int) -> list[float]:
    module = built(AfterBackwardOfFirst(rank, folder, k))
    callbacks = [
        BackwardBegins(),
        NonFiniteGuard(output_dir=folder),
        ThroughputMonitor(),
        ResumeCheckpoint(folder / "checkpoints"),
    ]
    fit = trainer(
        devices=world_size,
        strategy=strategy(cluster_environment=Ranks(rank, world_size)),
        callbacks=callbacks,
        enable_checkpointing=True,
        default_root_dir=folder,
        max_epochs=1,
        accumulate_grad_batches=k,
        logger=CSVLogger(folder, name="", version="csv") if rank == 0 else False,
    )
    fit.fit(module, look_ahead(batches(PARTS[rank]), k) if k > 1 else plain(PARTS[rank]))
    return module.model.theta.tolist()


@pytest.mark.parametrize(("strategy", "k"), [(DDPStrategy, 1), (FlatStrategy, 1), (DDPStrategy, 2)])
def test_a_rank_that_is_late_in_its_forward_pass(tmp_path: Path, strategy: type[DDPStrategy], k: int) -> None:
    """With the guard, the throughput, requests to stop, and every step logged."""
    first, second = spawn(2, train_late, tmp_path, strategy, k, timeout=120)
    assert first == second
    steps = [row for row in rows_of(tmp_path) if row.get("train_loss_step/weighted_sum")]
    assert len(steps) == 4 // k


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def train_with(rank: int, world_size: int, optimizer: Any, options: dict[str, bool], folder: Path) -> list[str]:
    """Weights behind two epochs; one rank has the batches of both."""
    groups = PARTS[rank] if world_size > 1 else [first + second for first, second in zip(*PARTS, strict=True)]
    module = built(Linear())
    module._optimizer = optimizer
    strategy = DDPStrategy(cluster_environment=Ranks(rank, world_size), **options) if world_size > 1 else "auto"
    trainer(devices=world_size, strategy=strategy, default_root_dir=folder).fit(module, plain(groups))
    return [number.hex() for number in module.model.theta.tolist()]


LBFGS = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=7, line_search_fn="strong_wolfe")
SGD = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (LBFGS, {}),
        (SGD, {"find_unused_parameters": True}),
        (SGD, {"static_graph": True}),
        (SGD, {"gradient_as_bucket_view": True}),
    ],
    ids=["LBFGS", "find_unused_parameters", "static_graph", "gradient_as_bucket_view"],
)
def test_weights_are_those_of_one_process(optimizer: Any, options: dict[str, bool], tmp_path: Path) -> None:
    """Also of an optimizer that looks at the loss, whose value of one rank alone would lead the ranks apart."""
    first, second = spawn(2, train_with, optimizer, options, tmp_path, timeout=120)
    assert first == second
    (alone,) = spawn(1, train_with, optimizer, options, tmp_path, timeout=120)
    found, expected = ([float.fromhex(number) for number in each] for each in (first, alone))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-8)


class Record(Callback):
    """Values of every step and epoch, in hexadecimal."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        for manager in (pl_module.loss, pl_module.train_metrics):
            self.seen.append({name: value.hex() for name, value in manager._last_step.to_host().items()})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append({name: float(value).hex() for name, value in trainer.callback_metrics.items()})


def train_both_ways(rank: int, world_size: int, folder: Path) -> list[Any]:
    results = []
    for way in ("overlapping", "waiting"):
        patch, record = pytest.MonkeyPatch(), Record()
        if way == "waiting":
            patch.setattr(harness.MetricsManager, "announces", lambda manager, target: False)
        module = built(Linear())
        fit = trainer(
            devices=world_size,
            strategy=DDPStrategy(cluster_environment=Ranks(rank, world_size)),
            callbacks=[NonFiniteGuard(output_dir=folder), ThroughputMonitor(), record],
            default_root_dir=folder,
            logger=CSVLogger(folder / way, name="", version="csv") if rank == 0 else False,
        )
        with counted_collectives() as counted:
            fit.fit(module, plain(PARTS[rank]))
        patch.undo()
        results.append([module.model.theta.tolist(), record.seen, counted["SUM"], counted["MAX"]])
    return results


def test_a_training_is_bitwise_the_one_that_waits(tmp_path: Path) -> None:
    """With metrics that watch a maximum; weights, and all values of steps and epochs, on both ranks."""
    results = spawn(2, train_both_ways, tmp_path, timeout=120)
    for overlapping, waiting in results:
        assert overlapping[:2] == waiting[:2] == results[0][0][:2]
        assert len(overlapping[1]) == 17
        assert overlapping[2] == waiting[2] + 8  # the counts of 8 steps
        assert overlapping[3] == waiting[3] + 1  # all ranks are asked once if they can announce
    timed = ("throughput", "epoch")
    found, expected = (
        [{key: cell for key, cell in row.items() if not key.startswith(timed)} for row in rows_of(tmp_path / way)]
        for way in ("overlapping", "waiting")
    )
    assert found == expected
    assert len(found) > 8
