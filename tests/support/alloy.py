"""A small training of the embedded alloy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import harness
from harness.data import EmbeddedAlloyDataModule
from harness.models import schnet_force_field
from harness.module import ForceFieldModule

LOSS = functools.partial(
    harness.EnergyForceStressLoss,
    coeffs={"total_energy": 10, "forces": 1, "stress": 100},
    extra_metrics=[{"name": "by_type", "field": "forces", "metric": harness.MeanAbsoluteError(), "per_type": True}],
)


@pytest.fixture(scope="module")
def data() -> EmbeddedAlloyDataModule:
    module = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float64", seed=1
    )
    module.setup()
    return module


def build(data: EmbeddedAlloyDataModule, **options: Any) -> ForceFieldModule:
    seed_everything(3, verbose=False)
    model = schnet_force_field(
        data.statistics, cutoff=4.0, hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=8, seed=3
    ).double()
    settings: dict[str, Any] = {
        "loss": LOSS,
        "val_metrics": harness.EnergyForceMetrics,
        "type_names": data.type_names,
        "optimizer": functools.partial(torch.optim.Adam, lr=5e-3),
    }
    return ForceFieldModule(model, **{**settings, **options})


def trainer(folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "default_root_dir": folder,
        "log_every_n_steps": 3,
    }
    return Trainer(**{**settings, **options})
