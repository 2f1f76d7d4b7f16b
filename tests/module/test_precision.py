"""Precision of the model: what is rounded, and what never is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

import harness
from harness.data import EmbeddedAlloyDataModule
from harness.models import schnet_force_field
from harness.models.force_field import ForceField
from harness.models.geometry import edge_lengths, edge_vectors
from harness.module import ForceFieldModule

COEFFS = {"total_energy": 1.0, "forces": 2.0, "stress": 10.0}


def alloy(dtype: str = "float32") -> EmbeddedAlloyDataModule:
    data = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 4, "test": 4}, cutoff=4.0, batch_size=8, dtype=dtype, seed=1
    )
    data.setup()
    return data


class Watch(Callback):
    """Keeps what the model has predicted and the loss has made of it, at every step."""

    def __init__(self) -> None:
        self.predictions: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.values: list[dict[str, Tensor]] = []
        self.rows: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        def keep(module: nn.Module, inputs: Any, outputs: dict[str, Tensor]) -> None:
            if module.training:
                detached = {name: value.detach().clone() for name, value in outputs.items()}
                self.predictions.append((detached, dict(inputs[0])))

        pl_module.model.register_forward_hook(keep)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.values.append(pl_module.loss._last_step.as_dict())
        self.rows.append(pl_module.loss.get_extra_state()["additive"])


def fit(folder: Path, data: EmbeddedAlloyDataModule, precision: Any) -> tuple[Watch, Trainer]:
    model = schnet_force_field(
        data.statistics, cutoff=4.0, hidden_channels=16, num_filters=16, num_interactions=1, num_gaussians=16, seed=3
    )
    module = ForceFieldModule(
        model,
        loss=functools.partial(harness.EnergyForceStressLoss, coeffs=COEFFS),
        val_metrics=harness.EnergyForceStressMetrics,
        type_names=data.type_names,
        optimizer=functools.partial(torch.optim.Adam, lr=5e-3),
    )
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        callbacks=[watch],
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    return watch, trainer


def weighted_sum(predictions: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, float]:
    """The loss of these predictions, in NumPy and float64."""
    energy, forces, stress = (
        predictions[name].double().numpy() - batch[name].double().numpy()
        for name in ("total_energy", "forces", "stress")
    )
    per_atom = energy[:, 0] / batch["num_atoms"].numpy()
    components = {
        "per_atom_energy_mse": np.mean(per_atom**2),
        "forces_mse": np.mean(forces**2),
        "stress_mse": np.mean(stress**2),
    }
    weights = np.array(list(COEFFS.values())) / sum(COEFFS.values())
    return components | {"weighted_sum": float(weights @ list(components.values()))}


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [("bf16-mixed", "float32", 1e-6), ("32-true", "float32", 1e-6), ("64-true", "float64", 1e-13)],
)
def test_statistics_are_float64_of_what_the_model_predicts(
    precision: str, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    """Whatever the precision of the model, nothing is lost behind its predictions."""
    watch, trainer = fit(tmp_path, alloy(dtype), precision)
    assert len(watch.values) == len(watch.predictions) == 8
    for (predictions, batch), values, row in zip(watch.predictions, watch.values, watch.rows, strict=True):
        assert row.dtype == torch.float64
        assert predictions["forces"].dtype == predictions["stress"].dtype == getattr(torch, dtype)
        assert predictions["total_energy"].dtype == torch.float64
        for name, expected in weighted_sum(predictions, batch).items():
            assert values[name].dtype == torch.float64
            assert values[name].item() == pytest.approx(expected, rel=tolerance)
    losses = [values["weighted_sum"].item() for values in watch.values]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    assert trainer.callback_metrics["val0_epoch/forces_rmse"].dtype == torch.float64


class Pairs(nn.Module):
    """An energy of pair distances only: no layer that mixed precision would touch."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(0.3))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        lengths = edge_lengths(edge_vectors(batch))
        energies = self.strength * (4.0 - lengths) ** 2
        return torch.zeros_like(batch["pos"][:, 0]).index_add(0, batch["edge_index"][0], energies)


def test_autocast_does_not_touch_geometry() -> None:
    """Distances, strains, derivatives, and second derivatives are those without autocast, to the last bit."""
    (batch, *_) = alloy().train_dataloader()
    results = []
    for enabled in (False, True):
        model = ForceField(Pairs())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(batch)
        loss = sum(outputs[name].square().sum() for name in ("total_energy", "forces", "stress"))
        loss.backward()  # type: ignore[union-attr]
        results.append({**outputs, "gradient": model.energy_model.strength.grad})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_autocast_reaches_the_layers() -> None:
    """Mixed precision does something: forces differ by the rounding of bfloat16, and not by more."""
    data = alloy()
    (batch, *_) = data.train_dataloader()
    model = schnet_force_field(data.statistics, cutoff=4.0, seed=3).eval()
    exact = model(batch)["forces"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)["forces"]
    error = float((exact - rounded).norm() / exact.norm())
    assert 1e-5 < error < 0.05
