"""Rates of a training: what is counted, what is timed, and what it costs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from support.alloy import build
from support.commands import read_csv
from support.lightning_ranks import Ranks
from support.spawning import spawn
from support.step_cost import counted_collectives
from torch.utils.data import DataLoader, Dataset

from harness.callbacks import ThroughputMonitor
from harness.data import EmbeddedAlloyDataModule
from harness.loggers import CSVLogger

SIZES = [3, 5, 2, 7, 4]  # structures of the batches of an epoch
RATES = ("structures", "atoms", "edges")


class Slow(LightningModule):
    """Sleeps, and does nothing else."""

    def __init__(self, step: float = 0.0, validation: float = 0.0) -> None:
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.step, self.validation = step, validation

    def training_step(self, batch: int, index: int) -> torch.Tensor:
        time.sleep(self.step)
        return self.parameter * 1.0

    def validation_step(self, batch: int, index: int) -> None:
        time.sleep(self.validation)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Counting(Slow):
    """Knows how much it has trained on."""

    def __init__(self, **seconds: float) -> None:
        super().__init__(**seconds)
        self.structures = 0
        self.num_reads = 0

    def training_step(self, batch: int, index: int) -> torch.Tensor:
        self.structures += int(batch)
        return super().training_step(batch, index)

    def read_work(self) -> dict[str, float]:
        self.num_reads += 1
        return {name: float(self.structures * factor) for name, factor in zip(RATES, (1, 10, 100), strict=True)}


class SlowNumbers(Dataset[int]):
    """The sizes, each after a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, index: int) -> int:
        time.sleep(self.seconds)
        return SIZES[index]


def numbers(seconds: float = 0.0) -> DataLoader[int]:
    return DataLoader(SlowNumbers(seconds), batch_size=None)


def trainer(folder: Path, *callbacks: ThroughputMonitor, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": CSVLogger(folder, name="", version="csv"),
        "callbacks": list(callbacks),
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**settings, **options})


def rates_of(folder: Path) -> dict[int, dict[str, float]]:
    """What was logged of the throughput, by step."""
    return {
        int(row["step"]): {name.partition("/")[2]: value for name, value in row.items() if "throughput/" in name}
        | {"epoch": row["epoch"]}
        for row in read_csv(folder, times=True)
        if "throughput/step_seconds" in row
    }


def test_rates_are_those_between_logged_steps(tmp_path: Path) -> None:
    """From the end of the first step on; validations, of a second and a half each, do not count."""
    module = Counting(step=0.02, validation=0.5)
    running = trainer(tmp_path, ThroughputMonitor(), limit_val_batches=3, num_sanity_val_steps=0)
    running.fit(module, numbers(0.03), numbers())
    rates = rates_of(tmp_path)
    assert list(rates) == [1, 3, 5, 7, 9]
    work = SIZES + SIZES
    intervals = {1: work[1:2], 3: work[2:4], 5: work[4:6], 7: work[6:8], 9: work[8:10]}
    for step, row in rates.items():
        assert row["epoch"] == step // 5
        seconds = row["step_seconds"] * len(intervals[step])
        for name, factor in zip(RATES, (1, 10, 100), strict=True):
            assert row[f"{name}_per_second"] * seconds == pytest.approx(factor * sum(intervals[step]))
        assert 0.05 <= row["step_seconds"] < 0.7
        assert 0.03 * len(intervals[step]) <= row["data_wait_share"] * seconds < seconds - 0.02 * len(intervals[step])
        assert "gpu_memory_GiB" not in row
    assert module.num_reads == 6  # of 10 steps


def test_a_loader_that_is_fast_is_not_waited_for(tmp_path: Path) -> None:
    running = trainer(tmp_path, ThroughputMonitor(every_n_steps=5), accumulate_grad_batches=2, max_epochs=4)
    running.fit(Counting(step=0.02), DataLoader(SIZES, batch_size=None))  # type: ignore[arg-type]
    ((step, row), (later, _)) = rates_of(tmp_path).items()
    assert (step, later) == (4, 9)  # three optimizer steps an epoch
    assert row["data_wait_share"] < 0.5
    assert row["structures_per_second"] * row["step_seconds"] * 4 == pytest.approx(sum(SIZES) - 8 + sum(SIZES[:4]))
    loop = running.fit_loop.epoch_loop
    assert not {"_on_before_fetch", "_on_after_fetch"} & vars(loop).keys()  # the trainer is as before


def test_a_module_that_does_not_count_is_timed_alone(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Slow has no method read_work\(\)") as caught:
        trainer(tmp_path, ThroughputMonitor()).fit(Slow(), numbers())
    assert len([each for each in caught if "read_work" in str(each.message)]) == 1
    rates = rates_of(tmp_path)
    assert list(rates) == [1, 3, 5, 7, 9]
    assert all(row.keys() == {"step_seconds", "data_wait_share", "epoch"} for row in rates.values())


def test_nothing_is_read_where_nothing_is_logged(tmp_path: Path) -> None:
    module = Counting()
    trainer(tmp_path, ThroughputMonitor(), logger=False).fit(module, numbers())
    trainer(tmp_path, ThroughputMonitor(), log_every_n_steps=0).fit(module, numbers())
    assert module.num_reads <= 1


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_a_number_of_steps_that_is_none(number: Any) -> None:
    with pytest.raises(ValueError, match="every_n_steps is a whole number, at least 1, found"):
        ThroughputMonitor(number)


class Delayed:
    """A loader whose batches take a while."""

    def __init__(self, loader: Any, seconds: float) -> None:
        self.loader, self.seconds = loader, seconds

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            time.sleep(self.seconds)
            yield batch


def fit_on_rank(rank: int, world_size: int, folder: Path) -> list[dict[str, int]]:
    """Collectives of a training without the monitor, and of one with it."""
    counts = []
    for callbacks in ([], [ThroughputMonitor()]):
        data = EmbeddedAlloyDataModule(num_frames=16, split={"val": 2, "test": 2}, batch_size=4, cutoff=4.0)
        data.setup()
        running = trainer(
            folder,
            *callbacks,
            devices=world_size,
            strategy=DDPStrategy(cluster_environment=Ranks(rank, world_size)),
            num_sanity_val_steps=0,
            inference_mode=False,
            log_every_n_steps=2,
            **({} if rank == 0 and callbacks else {"logger": False}),
        )
        with counted_collectives() as counted:
            running.fit(build(data), Delayed(data.train_dataloader(), 0.3 * rank), data.val_dataloader())
        counts.append(dict(counted))
    return counts


def test_numbers_are_those_of_all_ranks_and_a_logged_step_has_one_collective(tmp_path: Path) -> None:
    """Work of both ranks, and waits of the one that waits; rank 0 alone has a logger."""
    for without, with_monitor in spawn(2, fit_on_rank, tmp_path, timeout=120):
        added = Counter(with_monitor) - Counter(without)
        assert added == {"MAX": 4}  # whether anything is logged, and three logged steps
        assert without["SUM"] >= 6
    rates = rates_of(tmp_path)
    assert list(rates) == [1, 3, 5]  # 12 frames in batches of 4: 3 steps an epoch
    for step, row in rates.items():
        assert row["structures_per_second"] * row["step_seconds"] == pytest.approx(4)  # of both ranks
        assert row["edges_per_second"] > row["atoms_per_second"] > row["structures_per_second"]
        number = 1 if step == 1 else 2
        assert 0.29 * number <= row["data_wait_share"] * row["step_seconds"] * number < row["step_seconds"] * number
