"""A training on a GPU, and as far as it shows anything on a CPU: transfers, logged steps, no wait in a step."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from support.alloy import build, trainer
from support.devices import DEVICES, nothing_is_waited_for
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from harness.callbacks import NonFiniteGuard, ResumeCheckpoint, ThroughputMonitor, UsedLearningRates
from harness.data import EmbeddedAlloyDataModule

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}
SGD = partial(torch.optim.SGD, lr=1e-4)  # Adam on a CPU reads its step number


class NoWaits(Callback):
    """No step from the third on waits for the device, the transfer of its batch left out."""

    def __init__(self, device: str) -> None:
        self.device, self.steps, self.stack = device, 0, ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= 2:
            self.stack = ExitStack()
            self.stack.enter_context(nothing_is_waited_for(self.device))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.steps += args[-1] >= 2
        self.stack.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_waits_for_nothing(data: EmbeddedAlloyDataModule, tmp_path: Path, device: str) -> None:
    module = build(data, train_metrics=harness.EnergyForceStressMetrics, optimizer=SGD)
    watch = NoWaits(device)
    callbacks = [
        NonFiniteGuard(output_dir=tmp_path),
        ResumeCheckpoint(tmp_path),
        UsedLearningRates(),
        ThroughputMonitor(),
    ]
    if device == "cpu":  # there the guard reads the numbers of the very step, for which nothing has to be waited
        callbacks[0].loss.delayed = callbacks[0].gradient.delayed = True
    fit = trainer(
        tmp_path,
        accelerator=ACCELERATORS[device],
        logger=CSVLogger(tmp_path),
        callbacks=[*callbacks, watch],
        enable_checkpointing=True,
        log_every_n_steps=100,
    )
    fit.fit(module, datamodule=data)
    assert watch.steps == 2 * 2  # of two epochs with four steps


class Late(Callback):
    """Steps whose values were read behind the optimizer's step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before = dict(pl_module.step_log.latest)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.steps += [trainer.global_step] if pl_module.step_log.latest != self.before else []


@pytest.mark.parametrize("late", [False, pytest.param(None, marks=pytest.mark.gpu), True])
def test_late_values_are_those_of_their_step(data: EmbeddedAlloyDataModule, tmp_path: Path, late: bool | None) -> None:
    """The table of the steps is the same; ``None`` is a GPU's own choice, to read them late."""
    tables = []
    for number, reads_late in enumerate((False, late)):
        module, watch = build(data, train_metrics=harness.EnergyForceMetrics), Late()
        module.step_log.reads_late = reads_late
        fit = trainer(
            tmp_path,
            accelerator="gpu" if late is None else "cpu",
            logger=CSVLogger(tmp_path, name="", version=f"{number}"),
            callbacks=[watch],
            log_every_n_steps=2,
        )
        fit.fit(module, datamodule=data)
        tables.append((tmp_path / f"{number}" / "metrics.csv").read_text())
        assert watch.steps == ([] if reads_late is False else [2, 4, 6, 8])
        assert module.step_log.latest
    assert tables[0].count("\n") > 6
    assert late is None or tables[0] == tables[1]  # the numbers of a GPU may differ from run to run


def test_late_values_are_logged_where_the_step_fails(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            raise RuntimeError("this step")

    module = build(data)
    module.step_log.reads_late = True
    fit = trainer(tmp_path, callbacks=[Fails()], log_every_n_steps=1)
    with pytest.raises(RuntimeError, match="this step"):
        fit.fit(module, datamodule=data)
    assert module.step_log.latest


class Transfers(TorchDispatchMode):
    """Whether each copy to another device was asked not to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.are_waited_for: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket._qualified_op_name == "aten::_to_copy" and (kwargs or {}).get("device") is not None:
            self.are_waited_for.append(not kwargs.get("non_blocking", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_are_sent_without_a_wait(data: EmbeddedAlloyDataModule, device: str) -> None:
    """By Lightning's hook, which the trainer calls for every batch; the meta device takes copies and keeps nothing."""
    module, (batch, *_) = build(data), data.train_dataloader()
    if device == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
        torch.zeros(1, device=device)
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Transfers() as transfers:
            sent = module.transfer_batch_to_device(batch, torch.device(device), 0)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert {value.device.type for value in sent.values()} == {device}
    assert transfers.are_waited_for == [False] * len(transfers.are_waited_for)
    assert transfers.are_waited_for
    if device == "cuda":
        assert all(torch.equal(value.cpu(), batch[name]) for name, value in sent.items())


class OnGPU:
    """As much of a trainer as a data module asks for."""

    def __init__(self, kind: str) -> None:
        self.strategy = type("Strategy", (), {"root_device": torch.device(kind)})()


@pytest.mark.parametrize(
    ("asked", "kind", "pinned"), [(None, "cpu", False), (None, "cuda", True), (False, "cuda", False)]
)
def test_batches_of_a_gpu_are_page_locked(asked: bool | None, kind: str, pinned: bool) -> None:
    data = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, seed=1, pin_memory=asked
    )
    data.setup()
    data.trainer = OnGPU(kind)  # type: ignore[assignment]
    assert {each.pin_memory for each in (data.train_dataloader(), *data.val_dataloader())} == {pinned}


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_a_gpu_come_page_locked(num_workers: int, tmp_path: Path) -> None:
    data = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, seed=1, num_workers=num_workers
    )
    data.setup()
    data.trainer = OnGPU("cuda")  # type: ignore[assignment]
    for batch in data.train_dataloader():
        assert all(value.is_pinned() for value in batch.values() if value.numel())


@pytest.mark.gpu
def test_a_training_on_a_gpu_is_that_on_a_cpu(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    values = []
    for accelerator in ("cpu", "gpu"):
        module = build(data, train_metrics=harness.EnergyForceStressMetrics)
        fit = trainer(tmp_path, accelerator=accelerator)
        fit.fit(module, datamodule=data)
        values.append({name: float(value) for name, value in fit.callback_metrics.items()})
    assert values[1] == pytest.approx(values[0], rel=1e-6, nan_ok=True)
