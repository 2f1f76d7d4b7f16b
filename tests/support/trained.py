"""Small trainings whose last validation is kept, beside which a model that was rebuilt from a checkpoint is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.bad_input import BASE, composed, frames
from support.commands import NO_FIGURES
from torch import Tensor

from harness.job import execute, prepare

SMALL = {
    "schnet": ["hidden_channels=8", "num_filters=8", "num_interactions=2", "num_gaussians=8"],
    "mace": ["channels=4", "max_ell=2", "correlation=2", "num_bessel=4", "radial_mlp=[8]", "mlp_irreps=4x0e"],
    "nequip": ["num_layers=2", "num_features=4", "radial_mlp_width=8"],
    "allegro": ["num_layers=1", "num_scalar_features=8", "num_tensor_features=4"],
    "sevennet": ["channels=4", "num_convolution_layer=2", "weight_nn_hidden_neurons=[8]"],
}
DOUBLE = ("trainer.precision=64-true", "data.dtype=float64")
_OF_SCHNET = [setting for setting in BASE if not setting.startswith("model.")]


class KeepValidation(Callback):
    """Batches of the last validation and the predictions for them; written to a folder if there is one."""

    def __init__(self, folder: str | None = None) -> None:
        self.seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self._folder = folder

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        copied = [{name: value.clone() for name, value in each.items()} for each in (batch, outputs)]
        self.seen.append((copied[0], copied[1]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._folder is not None:
            torch.save(self.seen, Path(self._folder) / f"validation-{trainer.global_rank}.pt")


def trained(folder: Path, *overrides: str, model: str = "schnet") -> tuple[Path, KeepValidation]:
    """Last checkpoint of a training of two epochs, and its last validation."""
    file = folder / "frames.xyz"
    ase.io.write(file, frames(), format="extxyz")
    options = [f"model={model}", *(f"model.{option}" for option in SMALL[model])]
    run = [f"data.train={file}", *NO_FIGURES, f"output_dir={folder}", "test=false", "max_epochs=2"]
    job = prepare(composed([*_OF_SCHNET, *run, *options, *overrides]))
    kept = KeepValidation()
    job.trainer.callbacks.append(kept)  # type: ignore[attr-defined]
    execute(job)
    return folder / "checkpoints" / "last.ckpt", kept


def same_bits(model: torch.nn.Module, kept: KeepValidation) -> None:
    """Assert that predictions for the batches of the validation are those of the validation."""
    assert kept.seen
    for batch, expected in kept.seen:
        found = model(batch)
        assert found.keys() == expected.keys()
        for field, value in expected.items():
            assert value.abs().max() > 1e-4, field
            assert torch.equal(found[field], value), field
