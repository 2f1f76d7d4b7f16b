"""ForceFieldModule in real trainings: keys, monitors, several data sets, restarts in the middle of an epoch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.alloy import build, trainer
from torch import nn

import harness
from harness.data import EmbeddedAlloyDataModule
from harness.module import ForceFieldModule


class Record(Callback):
    """Epoch values of the training, by epoch."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs[trainer.current_epoch] = {
            key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train_")
        }


class RecordLate(Record):
    """Lightning calls monitoring callbacks after the module."""

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs[-1] = {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_keys_and_steps_that_are_logged(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module = build(data, train_metrics=harness.EnergyForceMetrics)
    fit = trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version="csv"))
    fit.fit(module, datamodule=data)
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    table = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
    steps = [int(row["step"]) for row in table if row["train_loss_step/weighted_sum"]]
    assert steps == [2, 5]  # 15 frames in batches of 4: 4 steps an epoch
    for key in ("train_loss_step/by_type_Cu", "train_metric_step/forces_maxabserr", "train_loss_epoch/stress_mse"):
        assert key in header
    expected = {f"val0_epoch/{name}" for name in harness.EnergyForceMetrics().value_names}
    assert {key for key in header if key.startswith("val0_epoch/")} == expected
    assert fit.callback_metrics["loss_coeff/forces_mse"] == pytest.approx(1 / 111)


def test_epoch_values_are_those_of_the_whole_set(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module = build(data)
    fit = trainer(tmp_path)
    fit.validate(module, datamodule=data, verbose=False)
    errors, energies = [], []
    for batch in data.val_dataloader()[0]:
        predictions = module.model.eval()(batch)
        errors.append((predictions["forces"] - batch["forces"]).detach())
        energies.append(((predictions["total_energy"] - batch["total_energy"])[:, 0] / batch["num_atoms"]).detach())
    force, energy = torch.cat(errors), torch.cat(energies)
    assert energy.numel() == 5
    values = fit.callback_metrics
    assert float(values["val0_epoch/forces_rmse"]) == pytest.approx(float(force.square().mean().sqrt()), rel=1e-12)
    assert float(values["val0_epoch/forces_maxabserr"]) == pytest.approx(float(force.abs().max()), rel=1e-12)
    assert float(values["val0_epoch/per_atom_energy_mae"]) == pytest.approx(float(energy.abs().mean()), rel=1e-12)


def test_monitors_see_epoch_values(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="best", monitor="val0_epoch/weighted_sum", save_weights_only=True)
    stopping = EarlyStopping(monitor="val0_epoch/forces_rmse", patience=0, min_delta=1e9)
    plateau = {
        "scheduler": functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9),
        "monitor": "train_loss_epoch/weighted_sum",
    }
    module = build(data, lr_scheduler=plateau)
    fit = trainer(tmp_path, max_epochs=5, enable_checkpointing=True, callbacks=[checkpoint, stopping])
    fit.fit(module, datamodule=data)
    assert fit.current_epoch == 2  # the second epoch cannot be better by so much
    assert checkpoint.best_model_score == min(
        fit.callback_metrics["val0_epoch/weighted_sum"], checkpoint.best_model_score
    )
    assert Path(checkpoint.best_model_path).is_file()
    assert module.optimizers().param_groups[0]["lr"] < 5e-3


def test_several_validation_and_test_sets(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module = build(data, num_val_sets=2, num_test_sets=2, test_metrics=harness.EnergyForceStressMetrics)
    loaders = [*data.val_dataloader(), *data.test_dataloader()]
    fit = trainer(tmp_path)
    fit.validate(module, loaders, verbose=False)
    values = {key: float(value) for key, value in fit.callback_metrics.items()}
    fit.validate(module, loaders[1], verbose=False)
    assert values["val1_epoch/forces_rmse"] == float(fit.callback_metrics["val0_epoch/forces_rmse"])
    assert values["val1_epoch/forces_rmse"] != values["val0_epoch/forces_rmse"]
    fit.test(module, loaders, verbose=False)
    assert math.isfinite(fit.callback_metrics["test1_epoch/stress_mae"])
    with pytest.raises(ValueError, match="num_val_sets"):
        fit.validate(build(data), loaders, verbose=False)


def test_ema_weights(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module = build(data)
    start = {name: value.clone() for name, value in module.model.named_parameters()}
    fit = trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)])
    fit.fit(module, datamodule=data)
    assert any(not torch.equal(start[name], value) for name, value in module.model.named_parameters())
    assert math.isfinite(fit.callback_metrics["val0_epoch/forces_rmse"])


@pytest.mark.parametrize("stop_after", [2, 4, 5])
def test_a_restart_gives_the_epoch_values_of_one_run(
    data: EmbeddedAlloyDataModule, tmp_path: Path, stop_after: int
) -> None:
    whole, record = build(data, train_metrics=harness.EnergyForceMetrics), RecordLate()
    trainer(tmp_path, callbacks=[record]).fit(whole, datamodule=data)

    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop_after, save_top_k=-1)
    first = build(data, train_metrics=harness.EnergyForceMetrics)
    trainer(tmp_path, enable_checkpointing=True, callbacks=[saved], max_steps=stop_after, max_epochs=-1).fit(
        first, datamodule=data
    )
    path = tmp_path / f"step={stop_after}.ckpt"
    torch.load(path, weights_only=True)

    second, resumed = build(data, train_metrics=harness.EnergyForceMetrics), RecordLate()
    trainer(tmp_path, callbacks=[resumed]).fit(second, datamodule=data, ckpt_path=path, weights_only=True)
    assert resumed.epochs[-1].keys() == record.epochs[-1].keys()
    for key, value in record.epochs[-1].items():
        assert resumed.epochs[-1][key] == value, key  # bitwise
    for left, right in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_any_model_that_maps_batches_to_predictions(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    class Springs(nn.Module):
        """Not a good force field, but one without any of this package in it."""

        def __init__(self) -> None:
            super().__init__()
            self.stiffness = nn.Parameter(torch.zeros((), dtype=torch.float64))
            self.type_names = data.type_names

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"forces": -self.stiffness * batch["pos"]}

    loss = functools.partial(
        harness.MetricsManager, [{"field": "forces", "metric": harness.HuberLoss(), "coeff": 1, "per_type": True}]
    )
    module = ForceFieldModule(Springs(), loss)
    fit = trainer(tmp_path)
    fit.fit(module, data.train_dataloader())
    assert module.loss.type_names == tuple(data.type_names)  # the model's own
    assert "train_loss_epoch/F_huber_Cu" in fit.callback_metrics


def test_a_checkpoint_of_other_types_is_refused(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module, fit = build(data), trainer(tmp_path, max_steps=1, max_epochs=-1)
    fit.fit(module, datamodule=data)
    fit.save_checkpoint(tmp_path / "step.ckpt")
    renamed = build(data, type_names=["H", "C", "N", "O"], loss=harness.EnergyForceLoss)
    with pytest.raises(ValueError, match="another element"):
        trainer(tmp_path).fit(renamed, datamodule=data, ckpt_path=tmp_path / "step.ckpt", weights_only=True)


def test_mistakes(data: EmbeddedAlloyDataModule) -> None:
    with pytest.raises(ValueError, match="nothing to minimise"):
        build(data, loss=harness.EnergyForceMetrics(coeffs={}))
    with pytest.raises(TypeError, match="`val_metrics` is a MetricsManager"):
        build(data, val_metrics=3)
    with pytest.raises(TypeError, match="`optimizer` is a callable"):
        build(data, optimizer=3).configure_optimizers()


def test_configs_of_loss_and_optimizer(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module = build(
        data,
        loss={"_target_": "harness.EnergyForceLoss", "per_type_forces_coeffs": dict.fromkeys(data.type_names, 1.0)},
        optimizer={"_target_": "torch.optim.SGD", "lr": 1e-6},
        lr_scheduler={"scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1}, "interval": "step"},
    )
    fit = trainer(tmp_path, max_steps=2, max_epochs=-1)
    fit.fit(module, datamodule=data)
    assert isinstance(module.optimizers().optimizer, torch.optim.SGD)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(1e-8)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
