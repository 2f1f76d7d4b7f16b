"""Callbacks that do to a training what happens to it elsewhere; tests name them on the command line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from harness.checkpoints import wait_for_checkpoints
from harness.loggers import WandbLogger


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
            wait_for_checkpoints(trainer)
            os.kill(os.getpid(), signal.SIGKILL)


def _wait_until_written(trainer: Trainer) -> None:
    """Give W&B the time that steps of a real training take: these ones are over before it has started."""
    logger = trainer.loggers[0]
    if not isinstance(logger, WandbLogger):
        return
    _ = logger.experiment.id
    while logger._run is not None and not logger._run.thread.is_idle:
        time.sleep(0.05)
    time.sleep(0.2)


def log_steps(logger: WandbLogger, folder: Path, steps: range) -> None:
    """Log what a training might: numbers at each step, and media at each other one."""
    for step in steps:
        logger.log_metrics({"loss": 0.1 * step, "nan": float("nan"), "tensor": torch.tensor(step / 8)}, step)  # type: ignore[dict-item]
        if step % 2 == 0:
            when = {"step": step, "epoch": step // 4}
            logger.log_table("val0_report/table", ["type", "error"], [["H", 0.5 * step], ["C", float("nan")]], **when)
            logger.log_bar_chart("val0_report/chart", ["H", "C"], [1.0, 0.5 * step], title="Errors", **when)
            for name in (f"picture{step}.png", "same.png"):  # the second is written again and again
                Image.new("L", (2, 2), step).save(folder / name)
                os.utime(folder / name, ns=(step, step))
                logger.log_image(f"val0_report/{name[:4]}", [folder / name], caption=[f"of {step}"], **when)


def log_until_killed(folder: Path, steps: range, is_busy: bool) -> None:
    """Log some steps and be killed before W&B has started, or while it is busy."""
    logger = WandbLogger(folder, offline=True, project="test", settings={"quiet": True})
    if steps.start:
        logger.resume_from(steps.start)
    if is_busy:
        _ = logger.experiment.id  # waits until it has started
        logger._submit(lambda: time.sleep(100))
    log_steps(logger, folder, steps)
    os.kill(os.getpid(), signal.SIGKILL)
