"""Parts of a job as users write them, with a ``check_job`` of their own: each notes on which rank it was asked.

``NOTES`` is the folder of the notes, ``REFUSES`` the name of the part that refuses the job, and ``REFUSES_ON`` the
ranks that it does so on, all of them if it is not set. Nothing is imported from :mod:`harness.job`.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from support.bad_parts import Pairs
from torch import Tensor, nn

from harness.data import AtomsDataModule

MADE: Counter[str] = Counter()
"""Objects of each class that this process has made."""


class _Counted:
    def __new__(cls, *args: Any, **options: Any) -> Any:
        MADE[cls.__name__] += 1
        return super().__new__(cls)


def asked(part: str, trainer: Any, pl_module: Any, stage: str) -> None:
    """Note that a part was asked, with what it can see; refuse if it is its turn."""
    rank = os.environ.get("RANK", "0")
    assert not dist.is_initialized()
    assert trainer.datamodule.train_set is not None
    seen = f"{part} {stage} {type(pl_module).__name__} {len(trainer.callbacks) > 0} {len(trainer.loggers)}"
    with Path(os.environ["NOTES"], f"rank{rank}").open("a") as notes:
        notes.write(f"{seen}\n")
    if os.environ.get("REFUSES") == part and rank in os.environ.get("REFUSES_ON", rank).split(","):
        raise ValueError(f"the {part} found this; expected that. Do something else.")


class OwnCallback(_Counted, Callback):
    """A callback with files."""

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)

    def check_job(self, trainer: Any, pl_module: Any, stage: str) -> None:
        asked("callback", trainer, pl_module, stage)

    @property
    def written_files(self) -> dict[str, Any]:
        return {"one file": self.output_dir / "one.txt", "two files": ["a.txt", Path("b [1].txt")], "none": []}


class WrongFiles(Callback):
    """Files without labels."""

    written_files = ("a.txt",)


class OwnLogger(_Counted, Logger):
    """A logger with a run that is to be ended, at an address that is known then."""

    name, version = "own", 0
    address: str | None = None
    num_finished = 0

    def check_job(self, trainer: Any, pl_module: Any, stage: str) -> None:
        asked("logger", trainer, pl_module, stage)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def finish(self) -> None:
        self.num_finished += 1
        self.address = f"https://example.org/run/{self.num_finished}"

    @property
    def written_files(self) -> dict[str, str]:
        return {} if self.address is None else {"own run": self.address}


class OwnModel(_Counted, Pairs):
    """A model whose part, too, has something to check."""

    def __init__(self) -> None:
        super().__init__()
        self.part = OwnPart()

    def check_job(self, trainer: Any, pl_module: Any, stage: str) -> None:
        asked("model", trainer, pl_module, stage)


class OwnPart(_Counted, nn.Module):
    def check_job(self, trainer: Any, pl_module: Any, stage: str) -> None:
        asked("part", trainer, pl_module, stage)


class OwnData(_Counted, AtomsDataModule):
    def check_job(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().check_job(trainer, pl_module, stage)
        asked("data", trainer, pl_module, stage)


class OwnWeighting(_Counted, nn.Module):
    """Coefficients that are learnt in the simplest way."""

    def prepare(self, names: Any) -> None:
        self.shift = nn.Parameter(torch.zeros(len(names)))

    def forward(self, coeffs: Tensor) -> Tensor:
        weights = coeffs * torch.exp(self.shift.detach().double())
        return weights / weights.sum()

    def objective(self, values: Any) -> Tensor:
        return (self.shift.double() ** 2).sum()

    def check_job(self, trainer: Any, pl_module: Any, stage: str) -> None:
        asked("weighting", trainer, pl_module, stage)


class OwnStrategy(_Counted, DDPStrategy):
    def check_job(self, trainer: Any, pl_module: Any, stage: str) -> None:
        assert trainer.strategy is self
        asked("strategy", trainer, pl_module, stage)


class OwnTrainer(_Counted, Trainer):
    pass
