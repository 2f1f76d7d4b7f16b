"""A linear model on small batches, on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from support import oracle
from torch import nn
from torch.utils.data import DataLoader

from harness.fields import UPCOMING_LABELS

FIELDS = ("total_energy", "forces", "stress")
ATOMS = (2, 5, 1, 3, 4, 1, 2, 6, 1, 3, 2, 4, 5, 1, 2, 3)


def frame(index: int, dtype: torch.dtype) -> oracle.Batch:
    """A batch of one graph with its features; some frames have one type only."""
    kinds = [(0, 1, 2), (0,), (1, 2)][index % 3]
    features, target = oracle.draw(index, [ATOMS[index]], kinds, unlabelled=0.2, dtype=dtype)
    return {**{f"x_{name}": value for name, value in features.items()}, **target}


def batches(groups: list[list[int]], dtype: torch.dtype = torch.float64) -> list[oracle.Batch]:
    return [oracle.join([frame(index, dtype) for index in group]) for group in groups]


def plain(groups: list[list[int]]) -> DataLoader[Any]:
    """A loader that does not look ahead."""
    return DataLoader(batches(groups), batch_size=None)  # type: ignore[arg-type]


class Linear(nn.Module):
    """The oracle's linear model."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.theta = nn.Parameter(oracle.parameters(dtype).detach())

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if UPCOMING_LABELS in batch:
            raise AssertionError("the model sees what is meant for the loss")
        return oracle.predict({name: batch[f"x_{name}"] for name in FIELDS}, self.theta)


def trainer(**options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**settings, **options})
