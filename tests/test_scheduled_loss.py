"""Managers that a schedule drives, trainings that follow one, restarts in the middle of a ramp, NequIP's callbacks."""

from __future__ import annotations

import csv
import functools
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import BIN, ROOT, TINY, read_csv, read_wandb, run, same
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from spawning import spawn

import harness
from harness.adaptive import UncertaintyWeighting
from harness.callbacks import (
    CoefficientCurve,
    LinearLossCoefficientScheduler,
    LossCoefficientMonitor,
    LossCoefficientScheduler,
)
from harness.data import EmbeddedAlloyDataModule, look_ahead
from harness.job import follow_schedule
from harness.loggers import WandbLogger
from harness.manager import MetricsManager
from harness.models import schnet_force_field
from harness.module import ForceFieldModule
from harness.schedules import Constant, Join, LearningRateCoupled, Linear, PiecewiseConstant, Together

TYPES = ["H", "C", "O"]
ENERGY, FORCES, STRESS = "per_atom_energy_mse", "forces_mse", "stress_mse"


def by_type(coeff: float | None = 1.0, **options: Any) -> dict[str, Any]:
    metric = harness.MeanSquaredError()
    return {"name": "f", "field": "forces", "metric": metric, "per_type": True, "coeff": coeff, **options}


def frame(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    target = {
        "forces": torch.randn(6, 3, generator=generator, dtype=torch.float64),
        "total_energy": torch.randn(2, 1, generator=generator, dtype=torch.float64),
        "atom_types": torch.tensor([0, 1, 2, 0, 0, 1]),
        "num_atoms": torch.tensor([3, 3]),
    }
    preds = {name: target[name] + torch.randn(target[name].shape, generator=generator) for name in ("forces",)}
    return {**preds, "total_energy": target["total_energy"] + 0.5}, target


# --- managers ---


def test_what_is_not_named_keeps_its_coefficient() -> None:
    schedule = PiecewiseConstant({10: {FORCES: 8}})
    loss = harness.EnergyForceStressLoss({"total_energy": 2, "forces": 1, "stress": 5}, schedule=schedule)
    assert loss.given_coeffs == {ENERGY: 2, FORCES: 1, STRESS: 5}
    loss.move_to(10)
    assert loss.given_coeffs == {ENERGY: 2, FORCES: 8, STRESS: 5}
    assert loss.coeffs == {ENERGY: 2 / 15, FORCES: 8 / 15, STRESS: 5 / 15}
    loss.move_to(9.99)  # any epoch, in any order
    assert loss.given_coeffs == {ENERGY: 2, FORCES: 1, STRESS: 5}


def test_coefficients_beside_a_schedule_can_be_changed_and_driven_ones_cannot() -> None:
    loss = harness.EnergyForceLoss(schedule=Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=4))
    loss.move_to(1)
    loss.set_coeffs({ENERGY: 3})
    assert loss.given_coeffs == {ENERGY: 3, FORCES: 1}
    with pytest.raises(ValueError, match=r"'forces_mse' is driven by the schedule Linear"):
        loss.set_coeffs({ENERGY: 9, FORCES: 3})
    loss.move_to(2)
    assert loss.given_coeffs == {ENERGY: 3, FORCES: 2}
    loss.follow(None)
    assert loss.given_coeffs == {ENERGY: 3, FORCES: 1}


def test_a_ramp_from_zero_keeps_its_component_alive() -> None:
    ramp = Linear({FORCES: 0}, {FORCES: 1}, start_epoch=0, end_epoch=2)
    loss = harness.EnergyForceLoss({"total_energy": 1, "forces": None}, schedule=ramp)
    preds, target = frame()
    preds = {name: value.requires_grad_() for name, value in preds.items()}
    shown = {}
    for epoch in (0, 1, 2):
        loss.move_to(epoch)
        values = loss(preds, target)
        (gradient,) = torch.autograd.grad(values["weighted_sum"], preds["forces"], allow_unused=True)
        shown[epoch] = (float(values[FORCES].detach()), float(gradient.abs().sum()))
        assert list(values) == [ENERGY, FORCES, "weighted_sum"]
    expected = float((preds["forces"] - target["forces"]).detach().square().mean())
    assert [value for value, _ in shown.values()] == pytest.approx([expected] * 3)
    assert shown[0][1] == 0
    assert 0 < shown[1][1] < shown[2][1]


def test_weights_of_atom_types_follow_a_schedule() -> None:
    """Against NumPy, with a weight that comes from zero."""
    schedule = Linear({"f": {"H": 0, "O": 1}}, {"f": {"H": 4, "O": 3}}, start_epoch=0, end_epoch=2)
    loss = MetricsManager([by_type()], TYPES, schedule=schedule)
    preds, target = frame()
    preds["forces"][0] = math.inf  # hydrogen: nothing of it may get through while its weight is 0
    squared = (preds["forces"] - target["forces"]).numpy() ** 2
    types = target["atom_types"].numpy()
    for epoch, weights in ((0, [0, 1, 1]), (1, [2, 1, 2]), (2, [4, 1, 3])):
        loss.move_to(epoch)
        finite = dict(preds) if epoch == 0 else {**preds, "forces": preds["forces"].nan_to_num(posinf=1.0)}
        if epoch:
            squared = (finite["forces"] - target["forces"]).numpy() ** 2
        values = {name: float(value) for name, value in loss(finite, target).items()}
        means = np.array([squared[types == index].mean() for index in range(3)])
        means = np.where(np.array(weights) > 0, means, 0)
        assert values["f"] == pytest.approx(np.dot(weights, means) / sum(weights), rel=1e-12)
        assert values["weighted_sum"] == values["f"]
        assert loss.type_weights == {f"f_{name}": w / sum(weights) for name, w in zip("HCO", weights, strict=True)}


def test_weights_of_atom_types_end_with_their_schedule() -> None:
    """Whatever the order in which epochs are visited; a single weight may be zero; names are there from the start."""
    schedule = Join([Constant({}), Constant({"f": {"H": 0}}), Constant({"f": {"H": 4}}), Constant({})], [1, 2, 3])
    loss = MetricsManager([by_type()], TYPES, schedule=schedule)
    equal = (1.0, 1.0, 1.0)
    expected = {0: equal, 1: (0.0, 1.0, 1.0), 2: (4.0, 1.0, 1.0), 3: equal}
    for epoch in (0, 1, 2, 3, 2, 0, 1, 3):
        loss.move_to(epoch)
        total = sum(expected[epoch])
        assert list(loss.type_weights.values()) == [weight / total for weight in expected[epoch]]
        assert list(loss.type_weights) == ["f_H", "f_C", "f_O"]
        values = {name: float(value) for name, value in loss(*frame()).items()}
        by_hand = [weight * values[f"f_{name}"] for name, weight in zip(TYPES, expected[epoch], strict=True)]
        assert values["f"] == pytest.approx(sum(by_hand) / total, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "error", "words"),
    [
        (Constant({"force_mse": 1}), ValueError, r"'force_mse'.*Valid names: per_atom_energy_mse, forces_mse"),
        (Constant({FORCES: {"H": 1}}), ValueError, r"'forces_mse_H', which"),
        (Constant({FORCES: 0, ENERGY: 0}), ValueError, r"sum to 0.* at epoch 0"),
        (PiecewiseConstant({7: {FORCES: 0, ENERGY: 0}}), ValueError, r"at epoch 7"),
        (LearningRateCoupled({FORCES: 1, ENERGY: 1}, {FORCES: 0, ENERGY: 0}), ValueError, "at least one"),
        ({FORCES: 1}, TypeError, "Is `_target_` missing"),
    ],
)
def test_mistakes_are_told_at_construction(schedule: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        harness.EnergyForceLoss(schedule=schedule)


@pytest.mark.parametrize("preset", [name for name in harness.__all__ if name.startswith("Energy")])
def test_every_preset_takes_a_schedule(preset: str) -> None:
    name = next(n for n, c in getattr(harness, preset)().given_coeffs.items() if c is not None)
    manager = getattr(harness, preset)(schedule=PiecewiseConstant({3: {name: 7}}))
    manager.move_to(3)
    assert manager.given_coeffs[name] == 7


def test_contributions_add_up_and_counts_are_those_of_the_data() -> None:
    loss = MetricsManager(
        [by_type(2.0), {"name": "e", "field": "total_energy", "metric": harness.MeanAbsoluteError(), "coeff": 1}],
        TYPES,
    )
    preds, target = frame()
    (values,) = harness.step_together(loss, preds=preds, target=target)
    report = values.to_report()
    assert report.coeffs == {"f": 2 / 3, "e": 1 / 3}
    assert sum(report.contributions.values()) == pytest.approx(report.values["weighted_sum"], rel=1e-14)
    assert report.contributions["e"] == pytest.approx(report.values["e"] / 3, rel=1e-14)
    assert report.counts == {"f": 18, "f_H": 9, "f_C": 6, "f_O": 3, "e": 2}
    empty = {**target, "total_energy": torch.full((2, 1), math.nan, dtype=torch.float64)}
    masked = MetricsManager([by_type(2.0), {"name": "e", "field": "total_energy", "metric": harness.MeanAbsoluteError(),
                                            "coeff": 1, "ignore_nan": True}], TYPES)  # fmt: skip
    report = harness.step_together(masked, preds=preds, target=empty)[0].to_report()
    assert math.isnan(report.values["e"])
    assert report.contributions["e"] == 0
    assert sum(report.contributions.values()) == pytest.approx(report.values["weighted_sum"], rel=1e-14)


def test_a_state_remembers_where_its_schedule_was() -> None:
    ramp = Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=4)
    before, after = (harness.EnergyForceLoss(schedule=ramp) for _ in range(2))
    before.move_to(2.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.load_state_dict(before.state_dict())
    assert (after.position, after.given_coeffs) == (before.position, before.given_coeffs)
    other = harness.EnergyForceLoss(schedule=Constant({ENERGY: 3}))
    with pytest.warns(UserWarning, match=r"(?s)schedule Linear.*Constant.*configuration is used"):
        other.load_state_dict(before.state_dict())
    assert other.given_coeffs == {ENERGY: 3, FORCES: 1}  # nothing is left of the ramp


def test_a_checkpoint_of_another_schedule_is_loaded_by_one_that_follows_the_learning_rate() -> None:
    before = harness.EnergyForceLoss()
    after = harness.EnergyForceLoss(schedule=LearningRateCoupled({FORCES: 8}, {FORCES: 2}))
    with pytest.warns(UserWarning, match="LearningRateCoupled"):
        after.load_state_dict(before.state_dict())
    assert after.given_coeffs == {ENERGY: 1, FORCES: 8}


def weighted_sums(rank: int, world_size: int, seeds: list[int]) -> list[list[float]]:
    """Weighted sum and gradient of the first frame's forces at some epochs, of one frame on each rank or of all."""
    schedule = Linear({"f": {"H": 1}}, {"f": {"H": 9}}, start_epoch=0, end_epoch=4)
    loss = MetricsManager([by_type()], TYPES, schedule=schedule)
    found = []
    for epoch in (0, 1.5, 4):
        loss.move_to(epoch)
        frames = [frame(seed) for seed in (seeds if world_size == 1 else [seeds[rank]])]
        preds, target = ({name: torch.cat([pair[i][name] for pair in frames]) for name in frames[0][i]} for i in (0, 1))
        preds["forces"].requires_grad_()
        total = loss(preds, target)["weighted_sum"]
        (gradient,) = torch.autograd.grad(total, preds["forces"])
        found.append([float(total.detach()), *gradient[:6].flatten().tolist()])
    return found


def test_ranks_follow_alike_and_as_one() -> None:
    one, two = weighted_sums(0, 1, [4, 5]), spawn(2, weighted_sums, [4, 5])
    assert [row[0] for row in two[0]] == [row[0] for row in two[1]]
    np.testing.assert_allclose(two[0], one, rtol=1e-12)


# --- trainings ---


@pytest.fixture(scope="module")
def data() -> EmbeddedAlloyDataModule:
    module = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float64", seed=1
    )
    module.setup()
    return module


def build(data: EmbeddedAlloyDataModule, schedule: Any = None, **options: Any) -> ForceFieldModule:
    model = schnet_force_field(
        data.statistics, cutoff=4.0, hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=8, seed=3
    ).double()
    settings = {
        "loss": functools.partial(harness.EnergyForceLoss, schedule=schedule),
        "type_names": data.type_names,
        "optimizer": functools.partial(torch.optim.Adam, lr=4e-3),
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    }
    return ForceFieldModule(model, **{**settings, **options})


def fit(
    folder: Path, module: LightningModule, data: Any, **options: Any
) -> tuple[Trainer, list[dict[str, float]]]:  # 15 frames in batches of 4: 4 steps an epoch
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": CSVLogger(folder, name="", version="csv"),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    resume = options.pop("ckpt_path", None)
    trainer = Trainer(**{**settings, **options})
    source: dict[str, Any] = {"train_dataloaders": data}
    if isinstance(data, EmbeddedAlloyDataModule):
        source = {"train_dataloaders": data.train_dataloader()}
        if module.val_metrics:
            source["val_dataloaders"] = data.val_dataloader()
    trainer.fit(module, **source, ckpt_path=resume, weights_only=True)
    table = folder / "csv" / "metrics.csv"
    if not table.is_file():  # nothing was logged
        return trainer, []
    with table.open() as file:
        return trainer, [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def steps_of(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row for row in rows if "train_loss_step/weighted_sum" in row]


def adds_up(row: dict[str, float], what: str, contribution: str, coeff: str) -> None:
    names = [key.partition("/")[2] for key in row if key.startswith(contribution)]
    assert set(names) == {ENERGY, FORCES}
    for name in names:
        product = row[coeff + name] * row[what + name]
        assert row[contribution + name] == pytest.approx(product, rel=1e-12)
    total = sum(row[contribution + name] for name in names)
    assert row[what + "weighted_sum"] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_training_follows_by_epoch_or_by_step(interval: Any, data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    ramp = Linear({FORCES: 0, ENERGY: 4}, {FORCES: 4, ENERGY: 0}, start_epoch=0, end_epoch=2, interval=interval)
    _, rows = fit(tmp_path, build(data, ramp), data)
    steps = steps_of(rows)
    assert [row["step"] for row in steps] == list(range(12))
    for number, row in enumerate(steps):
        epoch = number // 4 if interval == "epoch" else number / 4
        assert row[f"loss_coeff_step/{FORCES}"] == pytest.approx(min(epoch / 2, 1), abs=1e-15)
        adds_up(row, "train_loss_step/", "loss_contribution_step/", "loss_coeff_step/")
    epochs = [row for row in rows if f"loss_coeff/{FORCES}" in row]
    assert len(epochs) == 3
    for row in epochs:
        adds_up(row, "train_loss_epoch/", "loss_contribution_epoch/", "loss_coeff/")


def test_a_schedule_follows_the_learning_rate(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """The learning rate is halved after each epoch; DeePMD's limit + (start - limit) * lr / lr(0)."""
    coupled = LearningRateCoupled({ENERGY: 0.02, FORCES: 1000}, {ENERGY: 1, FORCES: 1})
    module = build(data, coupled)
    _, rows = fit(tmp_path, module, data)
    for number, row in enumerate(steps_of(rows)):
        ratio = 0.5 ** (number // 4)
        energy, forces = 1 + (0.02 - 1) * ratio, 1 + (1000 - 1) * ratio
        assert row[f"loss_coeff_step/{ENERGY}"] == pytest.approx(energy / (energy + forces), rel=1e-12)
    assert module.loss.given_coeffs == {ENERGY: 1 + (0.02 - 1) / 4, FORCES: 1 + 999 / 4}


def test_coefficients_hold_for_all_micro_batches_of_a_step(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    ramp = Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=1, interval="step")
    loader = look_ahead(data.train_dataloader(), 2)
    _, rows = fit(tmp_path, build(data, ramp), loader, accumulate_grad_batches=2, max_epochs=1)
    forces = [given / (1 + given) for given in (0.0, 2.0)]  # at batches 0 and 2 of 4
    assert [row[f"loss_coeff_step/{FORCES}"] for row in steps_of(rows)] == pytest.approx(forces)
    for row in steps_of(rows):
        adds_up(row, "train_loss_step/", "loss_contribution_step/", "loss_coeff_step/")


@pytest.mark.parametrize("choice", sorted(path.stem for path in (ROOT / "conf" / "schedule").glob("*.yaml")))
def test_every_choice_of_schedule_trains(choice: str, data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"schedule={choice}", "max_epochs=5", "output_dir=somewhere"])
    schedule = instantiate(config.schedule)
    module = build(data)
    follow_schedule(module.loss, schedule)
    _, rows = fit(tmp_path, module, data, max_epochs=5)
    epochs = [row for row in rows if f"loss_coeff/{FORCES}" in row]
    assert len(epochs) == 5
    for epoch, row in enumerate(epochs):
        given = {ENERGY: 1.0, FORCES: 1.0, **schedule(epoch, 0.5**epoch)}
        assert row[f"loss_coeff/{FORCES}"] == pytest.approx(given[FORCES] / (given[FORCES] + given[ENERGY]), rel=1e-12)
        adds_up(row, "train_loss_epoch/", "loss_contribution_epoch/", "loss_coeff/")


class Endless:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return iter(self.loader)


def test_steps_of_an_epoch_without_an_end_are_refused(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    ramp = Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=1, interval="step")
    with pytest.raises(ValueError, match=r"interval: step.*no length"):
        fit(tmp_path, build(data, ramp), Endless(data.train_dataloader()))


def test_a_restart_in_mid_epoch_has_the_coefficients_of_its_start(
    data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    """By epoch, with a learning rate that moves by step: what counts is the one that the epoch began with."""
    coupled = LearningRateCoupled({ENERGY: 1, FORCES: 100}, {ENERGY: 1, FORCES: 1})
    rate = {"scheduler": functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8), "interval": "step"}

    def run_from(folder: Path, **options: Any) -> list[dict[str, float]]:
        torch.manual_seed(0)
        return steps_of(fit(folder, build(data, coupled, lr_scheduler=rate), data, max_epochs=2, **options)[1])

    whole = run_from(tmp_path / "whole")
    saving = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=6, save_top_k=-1)
    run_from(tmp_path / "first", callbacks=[saving], max_steps=6, enable_checkpointing=True)
    rest = run_from(tmp_path / "rest", ckpt_path=tmp_path / "saved.ckpt")
    assert [row["step"] for row in rest] == [6, 7]
    for row, other in zip(rest, whole[6:], strict=True):
        assert row == other


def test_a_schedule_of_monitored_metrics_is_warned_of(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    name = "forces_rmse"
    metrics = functools.partial(
        harness.EnergyForceMetrics, schedule=Linear({name: 0}, {name: 9}, start_epoch=0, end_epoch=2)
    )
    checkpoint = ModelCheckpoint(tmp_path, monitor="val0_epoch/weighted_sum")
    options = {"callbacks": [checkpoint], "enable_checkpointing": True, "max_epochs": 2}
    with pytest.warns(UserWarning, match=r"val0_epoch/weighted_sum is monitored.*changes its meaning"):
        _, rows = fit(tmp_path, build(data, val_metrics=metrics), data, **options)
    found = [row for row in rows if "val0_epoch/weighted_sum" in row]
    for epoch, row in enumerate(found):
        weight = 4.5 * epoch / (1 + 4.5 * epoch)
        expected = weight * row["val0_epoch/forces_rmse"] + (1 - weight) * row["val0_epoch/total_energy_rmse"]
        assert row["val0_epoch/weighted_sum"] == pytest.approx(expected, rel=1e-12)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changes its meaning")
        checkpoint = ModelCheckpoint(tmp_path, monitor="val0_epoch/forces_rmse")
        fit(tmp_path / "b", build(data, val_metrics=metrics), data, **{**options, "callbacks": [checkpoint]})


@pytest.mark.parametrize("driver", ["nothing", "schedules", "callback", "weighting"])
def test_summaries_have_no_least_of_sums_that_do_not_compare(
    driver: str, data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    options: dict[str, Any] = {}
    callbacks = [LossCoefficientScheduler({0: {ENERGY: 1, FORCES: 1}, 1: {FORCES: 9}})] if driver == "callback" else []
    if driver == "schedules":
        of_metrics = Linear({"forces_rmse": 0}, {"forces_rmse": 9}, start_epoch=0, end_epoch=2)
        options["schedule"] = Linear({FORCES: 1}, {FORCES: 9}, start_epoch=0, end_epoch=2)
        options["val_metrics"] = functools.partial(harness.EnergyForceMetrics, schedule=of_metrics)
    elif driver == "weighting":
        options["weighting"] = UncertaintyWeighting()
    options.setdefault("val_metrics", harness.EnergyForceMetrics)
    logger = WandbLogger(tmp_path, offline=True, project="test", settings={"quiet": True})
    fit(tmp_path, build(data, **options), data, callbacks=callbacks, logger=logger, max_epochs=2)
    assert logger.finish()
    summary, history = read_wandb(tmp_path)
    moving = {"schedules": {"train_loss", "val0"}, "callback": {"train_loss"}, "weighting": {"train_loss"}}
    for stage in ("train_loss", "val0"):
        for name in ("weighted_sum", "forces_mse" if stage == "train_loss" else "forces_rmse"):
            key = f"{stage}_epoch/{name}"
            values = [entry["item"][key] for entry in history if key in entry["item"]]
            assert len(values) == 2
            is_moving = name == "weighted_sum" and stage in moving.get(driver, ())
            assert summary["summary"][key] == (values[-1] if is_moving else {"min": min(values), "last": values[-1]})


def test_the_curve_is_drawn_and_kept_over_a_restart(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    ramp = Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=4)
    curve, saving = CoefficientCurve(tmp_path / "first"), ModelCheckpoint(tmp_path, filename="saved")
    fit(tmp_path / "1", build(data, ramp), data, callbacks=[curve, saving], enable_checkpointing=True, max_epochs=2)
    assert (tmp_path / "first" / "coefficients.png").read_bytes()[:4] == b"\x89PNG"
    again = CoefficientCurve(tmp_path / "second")
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"][again.state_key]["history"]
    assert {epoch: row[FORCES][0] for epoch, row in state.items()} == {0: 0.0}  # the second epoch is not complete there
    fit(tmp_path / "2", build(data, ramp), data, callbacks=[again], ckpt_path=tmp_path / "saved.ckpt", max_epochs=4)
    shown = {epoch: row[FORCES][0] for epoch, row in again.state_dict()["history"].items()}
    assert shown == {epoch: pytest.approx(epoch / (1 + epoch)) for epoch in (0, 2, 3)}
    assert all(sum(share for _, share in row.values()) == pytest.approx(1) for row in again._history.values())


def test_a_picture_that_cannot_be_written_does_not_end_a_training(
    data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    (tmp_path / "full").write_text("no folder")
    curve = CoefficientCurve(tmp_path / "full")
    with pytest.warns(UserWarning, match=r"coefficients.png cannot be written"):
        trainer, _ = fit(tmp_path, build(data), data, callbacks=[curve], max_epochs=1)
    assert trainer.current_epoch == 1
    assert curve.file is None


NESTED = (
    "schedule._target_=harness.schedules.Together",
    "~schedule.coeffs",
    "+schedule.interval=step",
    "+schedule.schedules=[{_target_: harness.schedules.Linear, start: {forces_mse: 0}, end: {forces_mse: 9}, "
    "start_epoch: 0.5, end_epoch: 3}, {_target_: harness.schedules.LearningRateCoupled, "
    "start: {per_atom_energy_mse: 9}, limit: {per_atom_energy_mse: 1}}]",
)


def test_a_ramp_goes_on_after_a_kill_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Uninterrupted on one rank; told to leave in the middle of the ramp on two ranks, continued on one."""
    arguments = (*TINY, *NESTED, "max_epochs=3", "data.dtype=float64", "trainer.precision=64-true",
                 "trainer.log_every_n_steps=1", "callbacks.parity=null", "trainer.enable_progress_bar=false",
                 "logger=csv", "resume=auto", "test=false")  # fmt: skip
    tests = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}

    def under_torchrun(*overrides: str, folder: Path, ranks: int) -> Any:
        launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
        return run([*launcher, "-m", "harness.train", *arguments, *overrides], folder, **tests)

    fault = f"+callbacks.fault={{_target_: fault_callbacks.SignalAt, step: 5, name: SIGTERM, marker: {tmp_path}/done}}"
    stopped = under_torchrun(fault, folder=tmp_path / "stopped", ranks=2)
    assert "exitcode  : 75" in stopped.err, stopped.err[-3000:]
    again = under_torchrun(fault, folder=tmp_path / "stopped", ranks=1)
    assert again.code == 0, again.err[-3000:]
    assert "goes on from" in again.out
    whole = under_torchrun(folder=tmp_path / "whole", ranks=1)
    assert whole.code == 0, whole.err[-3000:]
    found, expected = read_csv(again.runs[0]), read_csv(whole.runs[0])
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        for key in other:
            assert same(row[key], other[key], 1e-9), (key, row["step"])
    forces = [row["loss_coeff_step/forces_mse"] for row in steps_of(found)]
    assert len(set(forces)) > 8  # it moves with the steps, beyond the place of the interruption
    assert forces[0] == 0


# --- NequIP's callbacks ---


def coefficients_by_epoch(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[f"loss_coeff/{name}"] for row in rows if f"loss_coeff/{name}" in row]


def test_schedules_of_nequips_callbacks(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    step = LossCoefficientScheduler({1: {FORCES: 3}, 2: {FORCES: 1, ENERGY: 4}})
    _, rows = fit(tmp_path / "step", build(data), data, callbacks=[step], max_epochs=4)
    assert coefficients_by_epoch(rows, FORCES) == pytest.approx([1 / 2, 3 / 4, 1 / 5, 1 / 5])

    stages = [
        LinearLossCoefficientScheduler({ENERGY: 1, FORCES: 1}, transition_epochs=2, start_epoch=3),
        LinearLossCoefficientScheduler({ENERGY: 1, FORCES: 3}, transition_epochs=2, start_epoch=1),
    ]
    _, rows = fit(tmp_path / "linear", build(data), data, callbacks=stages, max_epochs=7)
    expected = [0.5, 0.5, 0.625, 0.75, 0.625, 0.5, 0.5]
    assert coefficients_by_epoch(rows, FORCES) == pytest.approx(expected)


class OwnModule(LightningModule):
    """Somebody's own module: it has a `loss`, and nothing else of this package's module."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: list[dict[str, float | None]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        made = {name: self.scale * batch[name] + 0.1 for name in ("forces", "total_energy")}
        predictions = {**batch, **made}
        self.seen.append({name: entry.coeff for name, entry in self.loss.entries.items()})
        return self.loss(predictions, batch)["weighted_sum"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("origin", ["harness", "nequip"])
def test_they_work_on_other_modules(origin: str, data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    if origin == "nequip":
        nequip = pytest.importorskip("nequip.train")
        loss = nequip.EnergyForceLoss(coeffs={"total_energy": 1.0, "forces": 1.0}, type_names=data.type_names)
    else:
        loss = harness.EnergyForceLoss()
    module = OwnModule(loss)
    callbacks = [LossCoefficientScheduler({1: {FORCES: 3, ENERGY: 1}}), LossCoefficientMonitor("batch", 2)]
    loader = data.train_dataloader()
    _, rows = fit(tmp_path, module, loader, callbacks=callbacks, max_epochs=2)
    forces = [seen[FORCES] for seen in module.seen]
    assert forces == pytest.approx([0.5] * 4 + [0.75] * 4)
    logged = {int(row["step"]): row[f"loss_coeff/{FORCES}"] for row in rows if f"loss_coeff/{FORCES}" in row}
    assert logged == {1: 0.5, 3: 0.5, 5: 0.75, 7: 0.75}

    module = OwnModule(loss)
    linear = LinearLossCoefficientScheduler({FORCES: 1, ENERGY: 3}, transition_epochs=2)
    fit(tmp_path / "linear", module, loader, callbacks=[linear], max_epochs=3)
    assert [seen[FORCES] for seen in module.seen][::4] == pytest.approx([0.75, 0.5, 0.25])


def test_the_monitor_logs_what_a_step_was_trained_with(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """Learnt coefficients: the module's own rows of the same training, which are logged between the passes."""
    rows = {}
    for every in (1, 1000):
        module = build(data, weighting=UncertaintyWeighting(speed=30.0))
        monitor = LossCoefficientMonitor("batch", 1)
        _, logged = fit(tmp_path / str(every), module, data, callbacks=[monitor], log_every_n_steps=every, max_epochs=1)
        key = f"loss_coeff_step/{FORCES}"
        rows[every] = {int(row["step"]): row[key] for row in logged if key in row}
    assert len(rows[1]) == 4
    assert len(set(rows[1].values())) > 2  # at first both variances move alike
    assert rows[1] == rows[1000]


def test_nequips_manager_would_drop_what_is_not_named(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    nequip = pytest.importorskip("nequip.train")
    module = OwnModule(nequip.EnergyForceLoss(type_names=data.type_names))
    with pytest.raises(ValueError, match=r"does not name per_atom_energy_mse.*drops"):
        fit(tmp_path, module, data.train_dataloader(), callbacks=[LossCoefficientScheduler({0: {FORCES: 1}})])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LossCoefficientScheduler({1: {"force_mse": 1}}), "no component 'force_mse'.*forces_mse"),
        (lambda: LinearLossCoefficientScheduler({"force_mse": 1}, 2), "no component 'force_mse'.*forces_mse"),
        (lambda: LinearLossCoefficientScheduler({FORCES: 1}, 0), "at least 1, found 0"),
        (lambda: LinearLossCoefficientScheduler({FORCES: 0}, 1), "all 0"),
        (lambda: LossCoefficientMonitor("step", 1), "epoch or batch, found 'step'"),
        (lambda: LossCoefficientMonitor("epoch", 0), "at least 1, found 0"),
    ],
)
def test_mistakes_in_callbacks(make: Any, words: str, data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        fit(tmp_path, build(data), data, callbacks=[make()])


def test_overlapping_stages_and_two_drivers_are_refused(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    stages = [LinearLossCoefficientScheduler({FORCES: 1}, 5), LinearLossCoefficientScheduler({FORCES: 2}, 5, 4)]
    with pytest.raises(ValueError, match="overlap: one goes from epoch 0 to 5, and one starts at 4"):
        fit(tmp_path, build(data), data, callbacks=stages)
    ramp = Join([Constant({}), Constant({FORCES: 3})], boundaries=[2])
    for module, others in ((build(data, ramp), []), (build(data), [LinearLossCoefficientScheduler({FORCES: 1}, 5)])):
        with pytest.raises(ValueError, match="only one of them can"):
            fit(tmp_path, module, data, callbacks=[LossCoefficientScheduler({0: {FORCES: 1}}), *others])
    assert Together  # what the message recommends
