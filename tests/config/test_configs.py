"""Every file in conf/ composes, and what it describes can be made."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from support.configs import CONF, composed
from torch import nn

import harness
from harness.callbacks import ExponentialMovingAverage
from harness.job import build_module
from harness.job.trainer import make_trainer
from harness.module.build import build_optimizer

CHOICES = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in ("experiment", "data")
)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_resolves(group: str, choice: str) -> None:
    config = composed(f"{group}={choice}")
    assert OmegaConf.to_container(config, resolve=True)
    chosen = config.get(group)
    if group in ("loss", "metrics"):
        manager = instantiate(chosen, type_names=["H", "O"])
        assert isinstance(manager, harness.MetricsManager)
        assert manager.do_weighted_sum
        assert f"{'forces_mse' if group == 'loss' else 'forces_mae'}_per_type_O" in manager.value_names or (
            choice == "energy"
        )
    elif group == "trainer":
        trainer = make_trainer(composed(f"{group}={choice}", "trainer.accelerator=cpu"), "auto")
        assert isinstance(trainer, Trainer)
        assert trainer.max_epochs == chosen.max_epochs


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_builds_its_module(path: Path) -> None:
    package = path.stem.removesuffix("_recipe")
    if package != path.stem and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here")
    config = composed(f"experiment={path.stem}", "data.num_frames=12", "data.split={val: 2, test: 2}")
    data = instantiate(config.data)
    data.setup()
    module = build_module(config, data)
    assert module.loss.type_names == tuple(data.type_names)
    assert config.monitor.partition("/")[2] in module.val_metrics[0].value_names
    assert config.callbacks.best.monitor == config.callbacks.progress.monitor == config.monitor


def test_callbacks_are_added_to_the_default_ones() -> None:
    callbacks = composed("callbacks=[default,ema,early_stopping]").callbacks
    assert {"best", "last", "progress", "ema", "early_stopping"} <= set(callbacks)
    assert callbacks.early_stopping.monitor == "val0_epoch/weighted_sum"
    assert isinstance(instantiate(callbacks.ema), ExponentialMovingAverage)


def test_a_file_needs_a_name() -> None:
    config = composed("data=file")
    assert OmegaConf.is_missing(config.data, "train")


def test_coefficients_are_changed_one_by_one() -> None:
    config = composed("loss.coeffs.forces=20")
    manager = instantiate(config.loss, type_names=["H"])
    assert manager.given_coeffs["forces_mse"] == 20
    assert manager.given_coeffs["per_atom_energy_mse"] == 1
    assert manager.coeffs["forces_mse"] == pytest.approx(20 / 21)


def test_every_group_is_in_the_table_of_contents() -> None:
    (defaults,) = [OmegaConf.load(CONF / "train.yaml")["defaults"]]
    listed = {next(iter(entry)) for entry in defaults if not isinstance(entry, str)} - {"override hydra/job_logging"}
    assert listed == {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}


@pytest.mark.parametrize(
    ("recipe", "rate"), [("mace_recipe", 0.002), ("nequip_recipe", 0.01), ("allegro_recipe", 0.001)]
)
def test_each_choice_of_a_recipe_can_be_replaced(recipe: str, rate: float) -> None:
    """Nothing of the one that it replaces is left: its section is that of the choice alone."""
    choices = ("lr_scheduler=cosine", "optimizer=adamw", "callbacks=[default,early_stopping]", "model=schnet")
    config, alone = composed(f"experiment={recipe}", *choices), composed(*choices)
    for group in ("lr_scheduler", "callbacks", "model"):
        assert OmegaConf.to_container(config[group]) == OmegaConf.to_container(alone[group])
    assert config.optimizer == {**alone.optimizer, "lr": rate}
    made = build_optimizer(nn.Linear(1, 1), config.optimizer, config.lr_scheduler)
    assert type(made["lr_scheduler"]["scheduler"]).__name__ == "CosineAnnealingLR"
