"""Callbacks that make a rank fail at a step, for configurations of tests: this folder is on their PYTHONPATH."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import TaskFunction
from lightning.pytorch import Callback

ERRORS: dict[str, type[Exception]] = {
    "RuntimeError": RuntimeError,
    "ValueError": ValueError,
    "MemoryError": MemoryError,
    "OutOfMemoryError": torch.OutOfMemoryError,
}


class _AtStep(Callback):
    """Does something before a training batch; ``sign`` is a file that tells the test when."""

    def __init__(self, step: int, rank: int = 1, sign: str | None = None) -> None:
        self.step, self.rank, self.sign = step, rank, sign

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step and int(os.environ["RANK"]) == self.rank:
            if self.sign:
                Path(self.sign).touch()
            self.act()

    def act(self) -> None:
        raise NotImplementedError


class RaiseAt(_AtStep):
    """An exception of this rank's own."""

    def __init__(self, error: str, **options: Any) -> None:
        super().__init__(**options)
        self.error = error

    def act(self) -> None:
        raise ERRORS[self.error](f"made up for the test on {socket.gethostname()}")


class SlowToWrite(Callback):
    """Lets the files of checkpoints after the first take a while; their copies do not."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.saved = seconds, 0

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.saved:
            checkpoint["slow"] = _Slow(self.seconds)
        self.saved += 1


class _Slow:
    """An empty dictionary in a file, which takes a while to be pickled; its copy is itself."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __deepcopy__(self, memo: Any) -> _Slow:
        return self

    def __reduce__(self) -> Any:
        time.sleep(self.seconds)
        return OrderedDict, ()


class StopAt(_AtStep):
    """SIGSTOP: the process keeps its connections and answers nothing."""

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class KillAt(_AtStep):
    """SIGKILL: the process leaves without a word, as by the kernel's out-of-memory killer; not after a restart."""

    def act(self) -> None:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


class StopInValidation(StopAt):
    """SIGSTOP in the middle of a validation epoch."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Not yet."""

    def on_validation_batch_start(self, *args: Any) -> None:
        if int(os.environ["RANK"]) == self.rank:
            if self.sign:
                Path(self.sign).touch()
            self.act()


class WaitAt(_AtStep):
    """Tell the test that rank 1 has reached a step, and wait until the test says to go on."""

    def act(self) -> None:
        while not Path(f"{self.sign}.go").exists():
            time.sleep(0.05)


class NotesJobs(HydraCallback):
    """Hydra's own callback, which writes down the jobs that it hears of."""

    def on_job_start(self, config: Any, *, task_function: TaskFunction, **kwargs: Any) -> None:
        self._note(f"start {task_function.__module__}.{task_function.__qualname__}")

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        self._note(f"end {job_return.status.name}")

    @staticmethod
    def _note(text: str) -> None:
        with Path("jobs.txt").open("a") as file:
            file.write(f"{text}\n")
