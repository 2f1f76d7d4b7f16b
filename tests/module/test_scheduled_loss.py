"""Managers that a schedule drives, trainings that follow one, restarts in the middle of a ramp, NequIP's callbacks."""

from __future__ import annotations

import csv
import functools
import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from support.commands import ROOT, TINY, read_csv, read_wandb, same, started, train
from support.failure_callbacks import SignalAt
from support.lightning_ranks import Ranks
from support.spawning import RankFailedError, spawn

import harness
from harness.adaptive import UncertaintyWeighting
from harness.callbacks import (
    CoefficientCurve,
    LinearLossCoefficientScheduler,
    LossCoefficientMonitor,
    LossCoefficientScheduler,
    ResumeCheckpoint,
)
from harness.data import EmbeddedAlloyDataModule, look_ahead
from harness.job import follow_schedule, read_schedule
from harness.loggers import CSVLogger as CSVFile
from harness.loggers import WandbLogger
from harness.metrics import MetricsManager
from harness.models import schnet_force_field
from harness.module import ForceFieldModule
from harness.module.schedule_following import warn_of_monitors
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


def test_a_ramp_from_zero_and_to_zero_keeps_its_components_alive() -> None:
    """Forces come from 0 while energies go to it: at 0 a component is in the sum, and reported, with nothing."""
    ramp = Linear({ENERGY: 3, FORCES: 0}, {ENERGY: 0, FORCES: 1}, start_epoch=0, end_epoch=2)
    loss = harness.EnergyForceLoss({"total_energy": 1, "forces": None}, schedule=ramp)
    preds, target = frame()
    preds = {name: value.requires_grad_() for name, value in preds.items()}
    errors = {name: (preds[name] - target[name]).detach() for name in ("forces", "total_energy")}
    expected = {
        ENERGY: float((errors["total_energy"] / target["num_atoms"][:, None]).square().mean()),
        FORCES: float(errors["forces"].square().mean()),
    }
    gradients = {}
    for epoch, energy, forces in ((0, 3.0, 0.0), (1, 1.5, 0.5), (2, 0.0, 1.0)):
        loss.move_to(epoch)
        assert loss.given_coeffs == {ENERGY: energy, FORCES: forces}  # 0, and not None
        coeffs = {ENERGY: energy / (energy + forces), FORCES: forces / (energy + forces)}
        assert loss.coeffs == loss.effective_coeffs() == coeffs
        assert loss.ever_weighted == {ENERGY, FORCES}
        (values,) = harness.step_together(loss, preds=preds, target=target)
        report = values.to_report()
        assert list(report.values) == [ENERGY, FORCES, "weighted_sum"]
        assert {name: report.values[name] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert report.coeffs == coeffs
        contributions = {name: coeffs[name] * expected[name] for name in coeffs}
        assert report.contributions == pytest.approx(contributions, rel=1e-12, abs=0)
        assert report.values["weighted_sum"] == pytest.approx(sum(contributions.values()), rel=1e-12)
        inputs = (preds["total_energy"], preds["forces"])
        gradients[epoch] = [float(each.abs().sum()) for each in torch.autograd.grad(values.weighted_sum, inputs)]
    assert gradients[0][0] > gradients[1][0] > gradients[2][0] == 0
    assert 0 == gradients[0][1] < gradients[1][1] < gradients[2][1]


def test_a_coefficient_that_is_set_to_zero_is_not_left_out() -> None:
    loss = harness.EnergyForceLoss({"total_energy": 0, "forces": 1})
    assert loss.given_coeffs == loss.coeffs == {ENERGY: 0.0, FORCES: 1.0}
    loss.set_coeffs({ENERGY: 2, FORCES: 0})
    assert loss.given_coeffs == {ENERGY: 2.0, FORCES: 0.0}
    assert loss.coeffs == loss.effective_coeffs() == {ENERGY: 1.0, FORCES: 0.0}
    assert loss.ever_weighted == {ENERGY, FORCES}
    loss.set_coeffs({FORCES: None})
    assert loss.coeffs == {ENERGY: 1.0, FORCES: None}
    assert loss.ever_weighted == {ENERGY}


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
        (
            Constant({"force_mse": 1}),
            ValueError,
            r"'force_mse'.*Did you mean forces_mse\? Valid names: per_atom",
        ),
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


def alloy() -> EmbeddedAlloyDataModule:
    module = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float64", seed=1
    )
    module.setup()
    return module


@pytest.fixture(scope="module")
def data() -> EmbeddedAlloyDataModule:
    return alloy()


def build(
    data: EmbeddedAlloyDataModule, schedule: Any = None, interval: Any = "epoch", **options: Any
) -> ForceFieldModule:
    model = schnet_force_field(
        data.statistics, cutoff=4.0, hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=8, seed=3
    ).double()
    settings = {
        "loss": functools.partial(harness.EnergyForceLoss, schedule=schedule, schedule_interval=interval),
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
    ramp = Linear({FORCES: 0, ENERGY: 4}, {FORCES: 4, ENERGY: 0}, start_epoch=0, end_epoch=2)
    _, rows = fit(tmp_path, build(data, ramp, interval), data)
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


def warm_up(step: int) -> float:
    """The learning rate of torch's LinearLR as a part of the optimizer's."""
    return 0.1 + 0.9 * min(step, 6) / 6


def one_cycle(step: int) -> float:
    """The learning rate of torch's OneCycleLR as a part of its first one, which is not the optimizer's."""
    top, end, bottom, last = 0.3 * 12 - 1, 12 - 1, 1e-4, 8.0
    if step <= top:
        return 1 + (last - 1) * (1 - math.cos(math.pi * step / top)) / 2
    return last + (bottom - last) * (1 - math.cos(math.pi * (step - top) / (end - top))) / 2


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize(
    ("scheduler", "ratio"),
    [
        (functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=6), warm_up),
        (
            functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=12, div_factor=8),
            one_cycle,
        ),
    ],
    ids=["warm_up", "one_cycle"],
)
def test_a_schedule_follows_a_learning_rate_from_its_own_start(
    scheduler: Any, ratio: Any, interval: Any, data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    """Of lr and the group's initial_lr, which a warm-up begins below and a cycle chooses by itself."""
    coupled = LearningRateCoupled({ENERGY: 2, FORCES: 10}, {ENERGY: 1, FORCES: 1})
    rate = {"scheduler": scheduler, "interval": "step"}
    _, rows = fit(tmp_path, build(data, coupled, interval, lr_scheduler=rate), data)
    steps = steps_of(rows)
    assert len(steps) == 12
    for number, row in enumerate(steps):
        at = ratio(number if interval == "step" else number // 4 * 4)
        energy, forces = 1 + (2 - 1) * at, 1 + (10 - 1) * at
        assert row[f"loss_coeff_step/{ENERGY}"] == pytest.approx(energy / (energy + forces), rel=1e-12)
        assert row[f"loss_coeff_step/{FORCES}"] == pytest.approx(forces / (energy + forces), rel=1e-12)


def test_coefficients_hold_for_all_micro_batches_of_a_step(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    ramp = Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=1)
    loader = look_ahead(data.train_dataloader(), 2)
    _, rows = fit(tmp_path, build(data, ramp, "step"), loader, accumulate_grad_batches=2, max_epochs=1)
    forces = [given / (1 + given) for given in (0.0, 2.0)]  # at batches 0 and 2 of 4
    assert [row[f"loss_coeff_step/{FORCES}"] for row in steps_of(rows)] == pytest.approx(forces)
    for row in steps_of(rows):
        adds_up(row, "train_loss_step/", "loss_contribution_step/", "loss_coeff_step/")


@pytest.mark.parametrize("choice", sorted(path.stem for path in (ROOT / "conf" / "schedule").glob("*.yaml")))
def test_every_choice_of_schedule_trains(choice: str, data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"schedule={choice}", "max_epochs=5", "output_dir=somewhere"])
    schedule, interval = read_schedule(config.schedule)
    module = build(data)
    follow_schedule(module.loss, schedule, interval)
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
    ramp = Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=1)
    with pytest.raises(ValueError, match=r"interval: step.*no length"):
        fit(tmp_path, build(data, ramp, "step"), Endless(data.train_dataloader()))


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


@pytest.mark.parametrize(
    ("what", "who"),
    [
        ("train_loss_epoch", "checkpoint"),
        ("train_loss_epoch", "stopping"),
        ("train_loss_epoch", "lr_scheduler"),
        ("train_metric_epoch", "checkpoint"),
    ],
)
def test_a_schedule_of_a_monitored_value_of_the_training_is_warned_of(
    what: str, who: str, data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    of_loss = what == "train_loss_epoch"
    name = FORCES if of_loss else "forces_rmse"
    ramp = Linear({name: 0}, {name: 4}, start_epoch=0, end_epoch=2)
    metrics = functools.partial(harness.EnergyForceMetrics, schedule=None if of_loss else ramp)

    def warned(monitor: str) -> list[str]:
        module: dict[str, Any] = {"train_metrics": metrics}
        options: dict[str, Any] = {"max_epochs": 1}
        if who == "checkpoint":
            options |= {"callbacks": [ModelCheckpoint(tmp_path, monitor=monitor)], "enable_checkpointing": True}
        elif who == "stopping":
            options["callbacks"] = [EarlyStopping(monitor)]
        else:
            plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
            module["lr_scheduler"] = {"scheduler": plateau, "monitor": monitor}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path / monitor, build(data, ramp if of_loss else None, **module), data, **options)
        return [str(each.message) for each in caught if "changes its meaning" in str(each.message)]

    (message,) = warned(f"{what}/weighted_sum")
    assert message.startswith(f"{what}/weighted_sum is monitored, and the schedule of its components")
    assert f"Monitor a component such as {what}/" in message
    for monitor in (f"{what}/{name}", f"{'train_metric' if of_loss else 'train_loss'}_epoch/weighted_sum"):
        assert warned(monitor) == []  # a component, and a sum that no schedule changes


def test_monitored_averages_of_types_whose_names_have_underscores() -> None:
    component = {"name": "f", "field": "forces", "metric": harness.MeanSquaredError(), "coeff": 1, "per_type": True}
    ramp = Linear({"f_H_1": 1}, {"f_H_1": 9}, start_epoch=0, end_epoch=2)
    loss = harness.MetricsManager([component], ["H_1", "O_2"], schedule=ramp)
    with pytest.warns(UserWarning, match="train_loss_epoch/f is monitored"):
        warn_of_monitors({"train_loss": loss}, ["train_loss_epoch/f"])


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


class FailAt(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            raise RuntimeError("as planned")


def test_the_curve_of_steps_and_types_and_of_a_training_that_fails(
    data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    ramp = Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=2)
    curve = CoefficientCurve(tmp_path / "steps")
    _, rows = fit(tmp_path / "a", build(data, ramp, "step"), data, callbacks=[curve], max_epochs=2, log_every_n_steps=2)
    logged = [row[f"loss_coeff_step/{FORCES}"] for row in steps_of(rows)]
    points = curve.state_dict()["points"]
    assert [position for position, _ in points] == [0.25, 0.75, 1.25, 1.75]  # steps 1, 3, 5 and 7 of 4 an epoch
    assert [coeffs[FORCES] for _, coeffs in points] == logged == [0.5 / 1.5, 0.6, 2.5 / 3.5, 3.5 / 4.5]

    moving = Linear({"f": {"Cu": 1, "Pd": 1}}, {"f": {"Cu": 5, "Pd": 1}}, start_epoch=0, end_epoch=2)
    loss = functools.partial(MetricsManager, [by_type()], schedule=moving)
    curve = CoefficientCurve(tmp_path / "types")
    fit(tmp_path / "b", build(data, loss=loss), data, callbacks=[curve], max_epochs=3)
    assert curve._moving_types([0, 1, 2]) == [f"f_{name}" for name in data.type_names or []]
    assert curve._types[1]["f_Cu"] == 3 / 6

    curve = CoefficientCurve(tmp_path / "failed")
    with pytest.raises(RuntimeError, match="as planned"):
        fit(tmp_path / "c", build(data), data, callbacks=[curve, FailAt()])
    for name in ("steps", "types", "failed"):
        assert (tmp_path / name / "coefficients.png").read_bytes()[:4] == b"\x89PNG"


def test_a_schedule_that_the_training_ends_before_is_told(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    for schedule, told in (
        (PiecewiseConstant({0: {FORCES: 1}, 1: {FORCES: 2}, 50: {FORCES: 3}, 75: {FORCES: 4}}), "epoch 50, 75"),
        (Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=10), "epoch 10"),
        (Linear({FORCES: 0}, {FORCES: 4}, start_epoch=0, end_epoch=2), ""),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, build(data, schedule), data, max_epochs=2)
        found = [str(each.message) for each in caught if "never comes" in str(each.message)]
        assert len(found) == bool(told)
        assert all(told in each for each in found)


def test_tested_metrics_are_those_of_the_weights(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """A schedule of metrics stands at the epoch that a checkpoint was made in, whoever tests it."""
    schedule = Linear({"forces_rmse": 0}, {"forces_rmse": 8}, start_epoch=0, end_epoch=4)
    metrics = functools.partial(harness.EnergyForceMetrics, schedule=schedule)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = build(data, val_metrics=metrics)
    trainer, rows = fit(tmp_path, module, data, callbacks=[saving], enable_checkpointing=True)
    assert [row["val0_coeff/forces_rmse"] for row in rows if "val0_coeff/forces_rmse" in row] == [0, 2 / 3, 4 / 5]
    for row in (row for row in rows if "val0_coeff/forces_rmse" in row):
        parts = [row[f"val0_coeff/{name}"] * row[f"val0_epoch/{name}"] for name in ("total_energy_rmse", "forces_rmse")]
        assert row["val0_epoch/weighted_sum"] == pytest.approx(sum(parts), rel=1e-12)

    def tested(module: ForceFieldModule, runner: Trainer, **options: Any) -> float:
        (found,) = runner.test(module, data.test_dataloader(), verbose=False, **options)
        return found["test0_coeff/forces_rmse"]

    assert tested(module, trainer) == 4 / 5  # the weights that the training has ended with
    for epoch, expected in ((0, 0.0), (1, 2 / 3), (2, 4 / 5)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        alone = Trainer(accelerator="cpu", devices=1, logger=False, inference_mode=False, default_root_dir=tmp_path)
        assert tested(build(data, val_metrics=metrics), alone, ckpt_path=path, weights_only=True) == expected
        assert tested(module, trainer, ckpt_path=path, weights_only=True) == expected

    alone = build(data, val_metrics=harness.EnergyForceMetrics, test_metrics=metrics)
    trainer, _ = fit(tmp_path / "alone", alone, data)  # no checkpoint, and no schedule of the validation
    assert tested(alone, trainer) == 4 / 5
    last, alone = ResumeCheckpoint(tmp_path / "last"), build(data, val_metrics=metrics)
    trainer, _ = fit(tmp_path / "resume", alone, data, callbacks=[last], enable_checkpointing=True)
    assert tested(alone, trainer) == 4 / 5  # though it saves when the last epoch has ended
    assert tested(alone, trainer, ckpt_path=last.newest(), weights_only=True) == 4 / 5


def test_epochs_and_learning_rates_that_are_none() -> None:
    loss = harness.EnergyForceLoss(schedule=LearningRateCoupled({FORCES: 1000}, {FORCES: 1}))
    with pytest.raises(ValueError, match=r"follows the learning rate: give it beside the epoch.*learning_rate="):
        loss.move_to(50)
    loss.move_to(50, 0.1)
    assert loss.given_coeffs[FORCES] == pytest.approx(100.9)
    loss = harness.EnergyForceLoss()
    loss.move_to(5)
    loss.follow(LearningRateCoupled({FORCES: 1000}, {FORCES: 1}))  # at the rate of the start, until one is told
    assert loss.given_coeffs[FORCES] == 1000
    for epoch in (-1, math.nan, math.inf, "1", None, True):
        with pytest.raises(ValueError, match="An epoch is a number of at least 0, found"):
            loss.move_to(epoch, 0.1)  # type: ignore[arg-type]


def test_a_learning_rate_beyond_its_start_is_told(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    coupled = LearningRateCoupled({ENERGY: 0.02, FORCES: 1000}, {ENERGY: 1, FORCES: 1})
    cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=4e-3, total_steps=9)
    scheduler = {"scheduler": cycle, "interval": "step"}
    with pytest.warns(UserWarning, match="times that which the schedule of the coefficients starts with") as told:
        fit(tmp_path, build(data, coupled, "step", lr_scheduler=scheduler), data, max_epochs=2)
    assert len([each for each in told if "starts with" in str(each.message)]) == 1


def test_a_picture_that_cannot_be_written_does_not_end_a_training(
    data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    (tmp_path / "full").write_text("no folder")
    curve = CoefficientCurve(tmp_path / "full")
    with pytest.warns(UserWarning, match=r"coefficients.png cannot be written"):
        trainer, _ = fit(tmp_path, build(data), data, callbacks=[curve], max_epochs=1)
    assert trainer.current_epoch == 1
    assert curve.file is None


# --- a kill in the middle of a ramp ---

EVERY, KILLED, SAVED = 5, 6, {"SIGKILL": 5, "SIGTERM": 7}
"""Steps between checkpoints within an epoch of 4; steps done when the signal comes, and in the checkpoint it leaves."""


def ramp_of_forces(step: int) -> float:
    """Coefficient of the forces: 0 until the middle of the first epoch, 9 at the end of the third."""
    return 9 * min(max(step / 4 - 0.5, 0) / 2.5, 1)


def same_trainings(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """All rows, in order: the coefficients to the last bit, and values on another number of ranks to rounding."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        for key, value in other.items():
            exact = key in ("step", "epoch") or key.startswith(("loss_coeff/", "loss_coeff_step/"))
            assert row[key] == value if exact else same(row[key], value, 1e-9), (key, row["step"])
    assert [row["step"] for row in steps_of(found)] == list(range(12))
    assert [row["epoch"] for row in found if "train_loss_epoch/weighted_sum" in row] == [0, 1, 2]


def train_a_ramp(folder: Path, data: EmbeddedAlloyDataModule, **options: Any) -> list[dict[str, float]]:
    ramp = Linear({FORCES: 0}, {FORCES: 9}, start_epoch=0.5, end_epoch=3)
    coupled = LearningRateCoupled({ENERGY: 9}, {ENERGY: 1})
    module = build(data, Together([ramp, coupled]), "step", val_metrics=harness.EnergyForceMetrics)
    return fit(folder, module, data, **{"logger": CSVFile(folder, name="", version="csv"), **options})[1]


def train_a_ramp_until_killed(rank: int, world_size: int, folder: Path, name: str) -> None:
    callbacks = [ResumeCheckpoint(folder, every_n_steps=EVERY), SignalAt(KILLED, name, str(folder / "done"))]
    strategy = DDPStrategy(cluster_environment=Ranks(rank, world_size))
    train_a_ramp(folder, alloy(), callbacks=callbacks, strategy=strategy, devices=world_size, enable_checkpointing=True)


@pytest.mark.parametrize("name", list(SAVED))
def test_a_ramp_goes_on_after_a_kill_on_another_number_of_ranks(
    name: str, data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    """Two ranks are killed, or leave, in the middle of the ramp and of an epoch; one goes on from their checkpoint."""
    with pytest.raises(RankFailedError, match="the process died"):
        spawn(2, train_a_ramp_until_killed, tmp_path, name)
    assert list(tmp_path.glob("done.*"))
    resume = ResumeCheckpoint(tmp_path)
    saved = resume.newest()
    assert torch.load(saved, weights_only=True)["global_step"] == SAVED[name]
    logger = CSVFile(tmp_path, name="", version="csv")
    logger.resume_from(SAVED[name])
    options = {"callbacks": [resume], "enable_checkpointing": True, "ckpt_path": saved}
    found = train_a_ramp(tmp_path, data, logger=logger, **options)
    same_trainings(found, train_a_ramp(tmp_path / "whole", data))
    for step, row in enumerate(steps_of(found)):
        forces, energy = ramp_of_forces(step), 1 + (9 - 1) * 0.5 ** (step // 4)
        assert row[f"loss_coeff_step/{FORCES}"] == pytest.approx(forces / (forces + energy), rel=1e-12)


NESTED = (
    "schedule._target_=harness.schedules.Together",
    "~schedule.coeffs",
    "+schedule.interval=step",
    "+schedule.schedules=[{_target_: harness.schedules.Linear, start: {forces_mse: 0}, end: {forces_mse: 9}, "
    "start_epoch: 0.5, end_epoch: 3}, {_target_: harness.schedules.LearningRateCoupled, "
    "start: {per_atom_energy_mse: 9}, limit: {per_atom_energy_mse: 1}}]",
)


@pytest.mark.slow
def test_a_job_goes_on_in_its_ramp_after_a_kill_on_another_number_of_ranks(tmp_path: Path) -> None:
    """By the same command with resume=auto."""
    command = (*TINY, *NESTED, "max_epochs=3", "data.dtype=float64", "trainer.precision=64-true",
               "trainer.log_every_n_steps=1", f"callbacks.last.every_n_steps={EVERY}",
               "trainer.enable_progress_bar=false", "logger=csv", "resume=auto", "test=false")  # fmt: skip
    tests = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    whole = train(*command, folder=tmp_path / "whole", **tests)
    assert whole.code == 0, whole.err[-3000:]
    stopped = tmp_path / "stopped"
    signals = f"step: {KILLED}, name: SIGKILL, marker: {stopped}/done"
    command = (*command, f"+callbacks.fault={{_target_: support.failure_callbacks.SignalAt, {signals}}}")
    with started(*command, folder=stopped, ranks=2, **tests) as processes:
        codes = [process.wait(timeout=120) for process in processes]
    assert codes == [-signal.SIGKILL] * 2, (stopped / "stderr.0").read_text()[-3000:]
    (folder,) = stopped.glob("outputs/*/*")
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == SAVED["SIGKILL"]
    again = train(*command, folder=stopped, **tests)
    assert again.code == 0, again.err[-3000:]
    assert again.runs == [folder]
    assert f"goes on from {last}" in again.out
    found = read_csv(folder)
    same_trainings(found, read_csv(whole.runs[0]))
    for step, row in enumerate(steps_of(found)):
        rate = (1 + math.cos(math.pi * (step // 4) / 3)) / 2  # a half cosine
        forces, energy = ramp_of_forces(step), 1 + (9 - 1) * rate
        assert row[f"loss_coeff_step/{FORCES}"] == pytest.approx(forces / (forces + energy), rel=1e-12)


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


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("interval", ["epoch", "batch"])
def test_the_monitor_logs_every_so_many_epochs_or_batches(
    interval: Any, frequency: int, data: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    """Of a module that logs none by itself: which rows there are, and what is in them."""
    weights = {0: 1.0, 1: 3.0, 2: 0.0, 3: 7.0}
    scheduler = LossCoefficientScheduler({epoch: {FORCES: weight} for epoch, weight in weights.items()})
    callbacks = [scheduler, LossCoefficientMonitor(interval, frequency)]
    _, rows = fit(
        tmp_path, OwnModule(harness.EnergyForceLoss()), data.train_dataloader(), callbacks=callbacks, max_epochs=4
    )
    if interval == "epoch":
        steps = [4 * epoch + 3 for epoch in range(4) if epoch % frequency == 0]  # the last ones of epochs
    else:
        steps = [step for step in range(16) if (step + 1) % frequency == 0]
    expected = []
    for step in steps:
        forces = weights[step // 4]
        coeffs = {f"loss_coeff/{FORCES}": forces / (1 + forces), f"loss_coeff/{ENERGY}": 1 / (1 + forces)}
        expected.append({"step": step, "epoch": step // 4, **coeffs})
    assert [row for row in rows if any(key.startswith("loss_coeff") for key in row)] == expected


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
