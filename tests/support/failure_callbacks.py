"""Faults that a training brings upon itself at a known step, named in a command by ``+callbacks.fault._target_=…``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from harness.checkpoints import wait_for_checkpoints


class SignalAt(Callback):
    """Sends this process a signal within a step, while no checkpoint is written, once in the life of ``marker``."""

    def __init__(self, step: int, name: str, marker: str, ranks: list[int] | None = None) -> None:
        self.step = step
        self.signal = signal.Signals[name]
        self.ranks = ranks
        self.marker = Path(marker)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        wait_for_checkpoints(trainer)
        if self.ranks is not None and trainer.global_rank not in self.ranks:
            return
        mine = self.marker.with_name(f"{self.marker.name}.{trainer.global_rank}")
        if not mine.exists():
            mine.write_text(str(os.getpid()))
            os.kill(os.getpid(), self.signal)


class Noise(Callback):
    """Changes the weights at random in every step: without the random state of before, a restart shows."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        with torch.no_grad():
            generator = torch.rand(())  # torch's own generator, the same on all ranks
            for parameter in pl_module.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 + 0.1 * generator)


class Ballast(Callback):
    """Makes checkpoints so large that writing one takes a while."""

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ballast"] = torch.zeros(self.megabytes * 2**18)


class WeightsAtEnd(Callback):
    """Writes the weights at the end of the training."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.model.state_dict(), self.path)


class Slow(Callback):
    """Takes its time over every step."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)


class Spoil(Callback):
    """Puts NaN, or another number, into a batch or the weights at some steps of a rank.

    Args:
        steps: numbers of the steps, from 0; under gradient accumulation the last micro-batch of them is meant.
        what: a field of the batch whose first row it is put in; or ``weights``.
        rank: whose.
        value: the number.
        micro_batch: which one, instead of the last.
    """

    def __init__(
        self,
        steps: list[int],
        what: str = "forces",
        rank: int = 0,
        value: float = float("nan"),
        micro_batch: int | None = None,
    ) -> None:
        self.steps, self.what, self.rank, self.value, self.micro_batch = steps, what, rank, value, micro_batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step not in self.steps or trainer.global_rank != self.rank:
            return
        k = trainer.accumulate_grad_batches
        if batch_idx % k != (k - 1 if self.micro_batch is None else self.micro_batch):
            return
        if self.what == "weights":
            next(pl_module.model.parameters()).data.fill_(self.value)
        else:
            batch[self.what] = batch[self.what].clone()
            batch[self.what][0] = self.value


class NoteError(Callback):
    """Writes down the error that ends a training, on each rank."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        text = f"{type(exception).__name__} in step {trainer.global_step}: {exception}"
        self.path.with_name(f"{self.path.name}.{trainer.global_rank}").write_text(text)
