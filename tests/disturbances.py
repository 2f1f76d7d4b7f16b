"""Callbacks that do to a training what happens to it elsewhere; tests name them on the command line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


def service_of(process: int) -> int | None:
    """Process id of the W&B service that a process has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == process and b"wandb-core" in command:
            return int(folder.name)
    return None


class DisturbService(Callback):
    """Sends a signal to the W&B service after a step, once the run has started.

    Args:
        signal_name: such as SIGSTOP or SIGKILL.
        step: number of the step.
    """

    def __init__(self, signal_name: str, step: int = 1) -> None:
        self.signal = getattr(signal, signal_name)
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            _ = trainer.loggers[0].experiment.id  # waits until it has started
            process = service_of(os.getpid())
            if process is None:
                raise RuntimeError("no W&B service to disturb")
            os.kill(process, self.signal)
            print(f"disturbed {process}", flush=True)


class FillDisk(Callback):
    """Fills the file system of a folder after a step.

    Args:
        folder: a folder on it.
        step: number of the step.
    """

    def __init__(self, folder: str, step: int = 1) -> None:
        self.folder = Path(folder)
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            fill(self.folder)


def fill(folder: Path) -> None:
    """Write until there is no room."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (4096, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break


class Interrupt(Callback):
    """Ends the process without a word after a step, as kill -9 does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            _wait_until_written(trainer)
            os.kill(os.getpid(), signal.SIGKILL)


def _wait_until_written(trainer: Trainer) -> None:
    """Give W&B the time that steps of a real training take: these ones are over before it has started."""
    logger = trainer.loggers[0]
    if not hasattr(logger, "_tasks"):
        return
    _ = logger.experiment.id
    while not logger._tasks.empty():  # type: ignore[attr-defined]
        time.sleep(0.05)
    time.sleep(0.2)
