"""Callbacks that make a rank fail at a step, for configurations of tests: this folder is on their PYTHONPATH."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

ERRORS: dict[str, type[Exception]] = {
    "RuntimeError": RuntimeError,
    "ValueError": ValueError,
    "MemoryError": MemoryError,
    "OutOfMemoryError": torch.OutOfMemoryError,
}


class _AtStep(Callback):
    """Does something before a training batch."""

    def __init__(self, step: int, rank: int = 1) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step and int(os.environ["RANK"]) == self.rank:
            self.act()

    def act(self) -> None:
        raise NotImplementedError


class RaiseAt(_AtStep):
    """An exception of this rank's own."""

    def __init__(self, step: int, error: str, rank: int = 1) -> None:
        super().__init__(step, rank)
        self.error = error

    def act(self) -> None:
        raise ERRORS[self.error](f"made up for the test on {socket.gethostname()}")


class StopAt(_AtStep):
    """SIGSTOP: the process keeps its connections and answers nothing."""

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class KillAt(_AtStep):
    """SIGKILL: the process leaves without a word, as by the kernel's out-of-memory killer. Once only."""

    def act(self) -> None:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


class StopInValidation(Callback):
    """SIGSTOP of rank 1 in the middle of a validation epoch."""

    def on_validation_batch_start(self, *args: Any) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)


class WaitAt(_AtStep):
    """Tell the test that rank 1 has reached a step, and wait until the test says to go on."""

    def __init__(self, step: int, folder: str) -> None:
        super().__init__(step)
        self.folder = Path(folder)

    def act(self) -> None:
        (self.folder / "reached").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.05)
