"""Numbers that callbacks have summed over the ranks: right on all of them, within the one all-reduce of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from support.alloy import build, data, trainer  # noqa: F401 - a fixture
from support.lightning_ranks import Ranks
from support.spawning import spawn
from support.step_cost import counted_collectives

from harness.callbacks import ResumeCheckpoint, ThroughputMonitor
from harness.data import EmbeddedAlloyDataModule
from harness.fields import Batch
from harness.module import StepSums
from harness.module.step import StepSumsOfAll


class Numbers(Callback):
    """Sends numbers of its rank, and keeps the sums."""

    def __init__(self, *numbers: float) -> None:
        self.numbers, self.num_step_sums = list(numbers), len(numbers)
        self.sums: list[list[float]] = []

    def step_numbers(self, batch: Batch) -> list[float]:
        return self.numbers

    def on_step_sums(self, sums: torch.Tensor) -> None:
        assert sums.dtype == torch.float64
        self.sums.append(sums.tolist())


def sums_on_rank(rank: int, world_size: int, folder: Path) -> tuple[list[Any], dict[str, int], dict[str, int]]:
    alloy = EmbeddedAlloyDataModule(num_frames=16, split={"val": 2, "test": 2}, batch_size=4, cutoff=4.0)
    alloy.setup()
    callbacks = [Numbers(rank, 10.0 + rank), Numbers(), Numbers(0.5)]
    counts = []
    for used in ([], callbacks):
        strategy = DDPStrategy(cluster_environment=Ranks(rank, world_size))
        running = trainer(folder, devices=world_size, strategy=strategy, callbacks=used, max_epochs=1)
        with counted_collectives() as counted:
            running.fit(build(alloy), alloy.train_dataloader())
        counts.append(dict(counted))
    return [callback.sums for callback in callbacks], *counts


def test_sums_are_those_of_all_ranks_and_cost_no_collective(tmp_path: Path) -> None:
    for sums, without, counted in spawn(2, sums_on_rank, tmp_path, timeout=120):
        assert sums == [[[1.0, 21.0]] * 3, [[]] * 3, [[1.0]] * 3]
        assert counted == without
        assert counted["SUM"] >= 3


def test_one_rank_has_its_own_numbers(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    numbers = Numbers(3.0)
    trainer(tmp_path, callbacks=[numbers], max_epochs=1, limit_train_batches=2).fit(build(data), data)
    assert numbers.sums == [[3.0], [3.0]]


def test_a_layout_that_depends_on_data_is_refused() -> None:
    numbers = Numbers(1.0, 2.0)
    numbers.numbers = [1.0]
    with pytest.raises(ValueError, match=r"Numbers.step_numbers returned 1 numbers, expected as many .* 2, for every"):
        StepSumsOfAll([numbers]).collect({}, torch.device("cpu"))


def test_callbacks_of_this_package_have_some(tmp_path: Path) -> None:
    for callback in (ResumeCheckpoint(tmp_path), ThroughputMonitor()):
        assert isinstance(callback, StepSums)
        assert len(callback.step_numbers({"pos": torch.zeros(3, 3)})) == callback.num_step_sums
    assert StepSumsOfAll([Callback()]).collect({}, torch.device("cpu")) is None
