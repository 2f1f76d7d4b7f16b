"""Adaptive weighting: its formulas in NumPy, the same on any ranks, exact restarts, and what is refused."""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support import oracle
from support.accumulation_cases import TYPES
from support.alloy import build, data, trainer
from support.commands import BIN, TINY, read_csv, train
from support.configs import composed
from support.failure_callbacks import Spoil
from support.lightning_ranks import Ranks
from support.linear import Linear, batches, plain
from support.linear import trainer as linear_trainer
from support.spawning import spawn
from support.step_cost import Operators

import harness
from harness import strategies
from harness.adaptive import GradientBalance, SoftAdapt, UncertaintyWeighting
from harness.adaptive.gradient_balance import balanced_factors
from harness.adaptive.set_point import SetPoint
from harness.adaptive.softadapt import soft_factors
from harness.callbacks import LossCoefficientScheduler, NonFiniteGuard, ResumeCheckpoint
from harness.data import EmbeddedAlloyDataModule, look_ahead
from harness.job import execute, prepare
from harness.job.dry_step import check_first_batch
from harness.module import ForceFieldModule
from harness.schedules import Constant

alloy = data  # the fixture

WEIGHTED = ("per_atom_energy_mse", "forces_mse", "stress_mse")
GIVEN = np.array([10, 1, 100]) / 111

DRIVERS: dict[str, Callable[[], Any]] = {
    "softadapt_batch": lambda: SoftAdapt(beta=1.1, interval="batch", frequency=2),
    "softadapt_epoch": lambda: SoftAdapt(beta=1.1, interval="epoch", frequency=1),
    "balance": lambda: GradientBalance(every_n_steps=3, rate=0.5, limit=50),
    "uncertainty": lambda: UncertaintyWeighting(speed=20),
}


class Steps(Callback):
    """Coefficients and values of every step, and the coefficients that stay, by step."""

    def __init__(self) -> None:
        self.coeffs: dict[int, list[float]] = {}
        self.values: dict[int, list[float]] = {}
        self.norms: dict[int, list[float]] = {}

    def on_train_values(self, trainer: Trainer, pl_module: Any, step: Any) -> None:
        if step.is_whole:
            report = step.values.to_report()
            assert math.isclose(sum(report.contributions.values()), report.values["weighted_sum"], rel_tol=1e-12)
            self.coeffs[trainer.global_step] = list(report.coeffs.values())
            self.values[trainer.global_step] = [report.values[name] for name in report.coeffs]


def fit(
    folder: Path,
    data: EmbeddedAlloyDataModule,
    driver: Any,
    callbacks: list[Callback] | None = None,
    ckpt: Path | None = None,
    **options: Any,
) -> tuple[ForceFieldModule, Steps]:
    """A training with a way of adaptive weighting."""
    steps = Steps()
    learnt = isinstance(driver, UncertaintyWeighting)
    # log variances in float64 too, as with precision=64-true: a float32 one may round to the other side on other ranks
    module = build(data, weighting=driver if learnt else None).double()
    running = trainer(
        folder,
        callbacks=[*([] if learnt or driver is None else [driver]), steps, *(callbacks or [])],
        enable_checkpointing=any(isinstance(each, Checkpoint) for each in callbacks or []),
        **{"max_epochs": 3, **options},
    )
    running.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return module, steps


# --- formulas ---


def test_soft_factors() -> None:
    changes = np.array([-0.3, 0.02, -1e-5])
    exponentials = np.exp(1.7 * changes / np.linalg.norm(changes))
    found = soft_factors(dict(zip("abc", changes, strict=True)), beta=1.7)
    np.testing.assert_allclose(list(found.values()), 3 * exponentials / exponentials.sum(), rtol=1e-13)
    assert soft_factors({"a": 0.0, "b": 0.0}, beta=3) == {"a": 1.0, "b": 1.0}
    tiny = soft_factors({"a": 1e-9, "b": 0.0}, beta=1, eps=1e-8)
    assert tiny["a"] / tiny["b"] == pytest.approx(math.exp(0.1))
    assert soft_factors({"a": -5.0}, beta=2) == {"a": 1.0}
    assert soft_factors({}, beta=1) == {}
    assert soft_factors({"a": 1.0, "b": -1.0}, beta=1e4)["a"] == 2.0


def test_balanced_factors() -> None:
    coeffs = {"a": 0.2, "b": 0.3, "c": 0.5}
    factors, norms = {"a": 1.5, "b": 1.0, "c": 0.8}, {"a": 7.0, "b": 0.02, "c": 1.0}
    weights, strengths = np.array([0.3, 0.3, 0.4]), np.array([2.1, 0.006, 0.4])
    target = {"a": 2, "b": 1, "c": 1}
    for rate in (1.0, 0.3):
        moved = weights * (np.array([0.5, 0.25, 0.25]) / (strengths / strengths.sum())) ** rate
        expected = moved / moved.sum() / np.array(list(coeffs.values()))
        found = balanced_factors(coeffs, factors, norms, target, rate)
        np.testing.assert_allclose(list(found.values()), expected, rtol=1e-13)
    found = balanced_factors(coeffs, factors, norms)
    shares = np.array([coeffs[name] * found[name] * norms[name] for name in coeffs])
    np.testing.assert_allclose(shares / shares.sum(), 1 / 3, rtol=1e-13)


@pytest.mark.parametrize("without", [0.0, math.nan, math.inf])
def test_a_component_without_a_gradient_keeps_its_coefficient(without: float) -> None:
    coeffs, factors = {"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 1.5, "b": 1.0, "c": 0.8}
    found = balanced_factors(coeffs, factors, {"a": 7.0, "b": without, "c": 1.0})
    assert set(found) == {"a", "c"}
    assert 0.2 * found["a"] * 7 == pytest.approx(0.5 * found["c"])
    assert 0.2 * found["a"] + 0.5 * found["c"] == pytest.approx(0.3 + 0.4)
    assert balanced_factors(coeffs, factors, {"a": 7.0, "b": without, "c": 0.0}) == {}


def test_limits_hold_and_do_not_drift() -> None:
    """The components would need ratios far beyond the limit; again and again, and then the other way round."""
    coeffs = {"a": 0.2, "b": 0.3, "c": 0.5}
    factors = dict.fromkeys(coeffs, 1.0)
    for norms in ({"a": 1e9, "b": 1.0, "c": 1e-9}, {"a": 1.0, "b": 1e9, "c": 1e5}):
        seen = []
        for _ in range(300):
            factors |= balanced_factors(coeffs, factors, norms, rate=0.5, limit=4)
            seen.append(dict(factors))
            assert sum(coeffs[name] * factors[name] for name in coeffs) == pytest.approx(1, rel=1e-12)
            assert all(0.25 <= factor <= 4 for factor in factors.values())
        assert seen[-1] == pytest.approx(seen[-50], rel=1e-9)
        largest, smallest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
        assert factors[largest] == 0.25
        assert factors[smallest] == max(factors.values()) > 1


def test_the_set_point_is_what_was_given_last() -> None:
    loss = oracle.manager([oracle.Component("forces", "mse", 3.0), oracle.Component("stress", "mse", 1.0)])
    point = SetPoint()
    point.begin(loss)
    point.move(loss, {"forces_mse": 2.0})
    assert loss.coeffs == pytest.approx({"forces_mse": 6 / 7, "stress_mse": 1 / 7})
    again = SetPoint()
    again.restore(point.state())
    again.begin(loss)
    assert again.coeffs == {"forces_mse": 0.75, "stress_mse": 0.25}
    again.move(loss, {"stress_mse": 2.0})
    assert loss.coeffs == pytest.approx({"forces_mse": 0.75, "stress_mse": 0.25})
    loss.set_coeffs({"forces_mse": 1, "stress_mse": 1})
    again.begin(loss)
    assert again.coeffs == {"forces_mse": 0.5, "stress_mse": 0.5}
    assert again.factors == {"forces_mse": 1.0, "stress_mse": 1.0}


# --- SoftAdapt in trainings ---


def replayed(values: list[list[float]], given: np.ndarray, beta: float, frequency: int) -> list[np.ndarray]:
    """Coefficients that hold before the first interval, and after each: NumPy, with a memory of known values."""
    factors, known = np.ones(len(given)), np.full(len(given), np.nan)
    coeffs, cycle = [given], []
    for index, row in enumerate(np.array(values, float)):
        change = row - known
        known = np.where(np.isnan(row), known, row)
        has = ~np.isnan(change)
        exponentials = np.exp(
            beta * change / np.sqrt((change[has] ** 2).sum()), where=has, out=np.full(len(has), np.nan)
        )
        cycle.append(has.sum() * exponentials / exponentials[has].sum() if has.any() else np.full(len(has), np.nan))
        if (index + 1) % frequency == 0:
            number = (~np.isnan(cycle)).sum(0)
            factors = np.where(number > 0, np.nansum(cycle, 0) / np.maximum(number, 1), factors)
            cycle = []
        coeffs.append(given * factors / (given * factors).sum())
    return coeffs


LOSS = [
    oracle.Component("total_energy", "mse", 2.0, ignore_nan=True),
    oracle.Component("forces", "mse", 1.0, ignore_nan=True),
    oracle.Component("stress", "mae", 3.0, ignore_nan=True),
    oracle.Component("stress", "mse", 0.0, ignore_nan=True),
    oracle.Component("forces", "mae", None, per_type=True, ignore_nan=True),
]
MICRO = [[0, 1], [2], [3, 4, 5], [6], [7, 8, 9, 10], [11, 12], [13, 14]]


def linear_module(loss: Any = None) -> ForceFieldModule:
    return ForceFieldModule(
        Linear(),
        oracle.manager(LOSS, TYPES) if loss is None else loss,
        optimizer=functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    )


def without_stress(loaded: list[oracle.Batch], *indices: int) -> list[oracle.Batch]:
    for index in indices:
        loaded[index]["stress"] = torch.full_like(loaded[index]["stress"], math.nan)
    return loaded


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_softadapt_by_batches(frequency: int, k: int, tmp_path: Path) -> None:
    """Stress labels are missing at the start, and later for some steps; a component has the coefficient 0."""
    loaded = without_stress(batches(MICRO), 0, 1, 4, 5)
    loader = look_ahead(loaded, k) if k > 1 else torch.utils.data.DataLoader(loaded, batch_size=None)
    steps = Steps()
    callbacks = [SoftAdapt(beta=0.9, interval="batch", frequency=frequency), steps]
    module = linear_module()
    running = linear_trainer(callbacks=callbacks, default_root_dir=tmp_path, accumulate_grad_batches=k)
    running.fit(module, loader)
    number = 14 if k == 1 else 8
    assert sorted(steps.coeffs) == list(range(number))
    values = [steps.values[step][:3] for step in range(number)]
    assert np.isnan(np.array(values)).any()
    expected = replayed(values, np.array([2, 1, 3]) / 6, 0.9, frequency)
    for step in range(number):
        np.testing.assert_allclose(steps.coeffs[step], [*expected[step], 0], rtol=1e-12)
    assert steps.coeffs[number - 1] != steps.coeffs[0]
    assert module.loss.coeffs["forces_mae_by_type"] is None


class Coefficients(Callback):
    """Coefficients of each step."""

    def __init__(self) -> None:
        self.coeffs: dict[int, dict[str, float]] = {}

    def on_train_values(self, trainer: Trainer, pl_module: Any, step: Any) -> None:
        self.coeffs[trainer.global_step] = step.values.to_report().coeffs


def test_a_step_that_is_not_trained_on_teaches_softadapt_nothing(
    alloy: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    """The labels of one component are NaN in a step that is skipped; the values of the others do not count there."""
    module, seen = build(alloy).double(), Coefficients()
    callbacks = [SoftAdapt(0.9, "batch", 1), NonFiniteGuard("skip", output_dir=tmp_path), Spoil([2]), seen]
    with pytest.warns(UserWarning, match="The step is skipped"):
        trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module, datamodule=alloy)
    assert seen.coeffs[2] != seen.coeffs[1]
    assert seen.coeffs[3] == seen.coeffs[2]
    assert seen.coeffs[4] != seen.coeffs[3]


def test_a_training_that_ends_before_softadapt_begins_is_warned_of(
    alloy: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    for frequency, max_epochs, never in ((1, 2, True), (1, 3, False), (2, 2, True), (2, 3, False)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            _, steps = fit(tmp_path, alloy, SoftAdapt(0.9, "epoch", frequency), max_epochs=max_epochs)
        assert any("they stay as they are" in str(each.message) for each in told) == never
        assert (steps.coeffs[max(steps.coeffs)] == steps.coeffs[0]) == never


def test_softadapt_by_epochs(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    class Epochs(Callback):
        def __init__(self) -> None:
            self.reports: list[Any] = []

        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch:
                self.reports.append(pl_module.reports["train_loss"])

    epochs = Epochs()
    _, steps = fit(tmp_path, alloy, SoftAdapt(2.0, "epoch", 2), [epochs], max_epochs=6)
    values = [[report.values[name] for name in WEIGHTED] for report in epochs.reports]
    expected = replayed(values, GIVEN, 2.0, 2)
    assert len(values) == 5
    for step, coeffs in steps.coeffs.items():
        np.testing.assert_allclose(coeffs, expected[step // 4], rtol=1e-12)
    for epoch, report in enumerate(epochs.reports):  # what is reported of an epoch has the coefficients of its steps
        assert list(report.coeffs.values()) == steps.coeffs[4 * epoch]
    assert steps.coeffs[8] != steps.coeffs[7] == steps.coeffs[0]


# --- NequIP's manager in a module of somebody else's ---


class Foreign(LightningModule):
    """What NequIP's module does with its loss."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.model, self.loss = Linear(), loss
        self.values: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []
        self.coeffs: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.coeffs.append({name: entry.coeff for name, entry in self.loss.entries.items()})
        total = self.loss(self.model(batch), batch)["weighted_sum"]
        self.values.append(dict(self.loss.metrics_values_step))
        return total

    def on_train_epoch_end(self) -> None:
        self.loss.compute()
        self.epochs.append(dict(self.loss.metrics_values_epoch))
        self.loss.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


@pytest.mark.parametrize("interval", ["batch", "epoch"])
@pytest.mark.parametrize("theirs", [True, False])
def test_softadapt_in_another_module(interval: str, theirs: bool, tmp_path: Path) -> None:
    if theirs:
        nequip = pytest.importorskip("nequip.train")
    package: Any = nequip if theirs else harness
    entries = [
        {"name": name, "field": field, "metric": package.MeanSquaredError(), "coeff": coeff}
        for name, field, coeff in (("e", "total_energy", 3), ("f", "forces", 1), ("s", "stress", None))
    ]
    loaded = [{key: value.nan_to_num() for key, value in batch.items()} for batch in batches(MICRO)]
    module = Foreign(package.MetricsManager(entries))
    callback = SoftAdapt(1.5, interval, 2)  # type: ignore[arg-type]
    running = linear_trainer(callbacks=[callback], max_epochs=5, default_root_dir=tmp_path)
    running.fit(module, torch.utils.data.DataLoader(loaded, batch_size=None))
    seen = module.values if interval == "batch" else module.epochs
    expected = replayed([[row["e"], row["f"]] for row in seen], np.array([0.75, 0.25]), 1.5, 2)
    assert len(module.coeffs) == 35
    for step, coeffs in enumerate(module.coeffs):
        at = step if interval == "batch" else step // 7
        np.testing.assert_allclose([coeffs["e"], coeffs["f"]], expected[at], rtol=1e-12)
        assert coeffs["s"] is None
    if theirs:
        other = pytest.importorskip("nequip.train.callbacks").LossCoefficientScheduler({0: {"e": 1.0, "f": 1.0}})
        with pytest.raises(ValueError, match="SoftAdapt and by NequIP's LossCoefficientScheduler"):
            linear_trainer(callbacks=[callback, other]).fit(module, plain(MICRO))
    with pytest.raises(TypeError, match="no manager of components"):
        linear_trainer(callbacks=[callback]).fit(Foreign(None), plain(MICRO))


# --- uncertainty ---


def test_uncertainty_weighting_is_its_formula() -> None:
    """One component has no data, one the coefficient 0, one none; gradients are of the log variances alone."""
    loss = oracle.manager(LOSS, TYPES)
    weighting = UncertaintyWeighting(initial_log_variance=0.5, speed=2.0)
    with pytest.raises(ValueError, match="no components yet"):
        weighting(torch.ones(2))
    loss.weigh_by(weighting)
    np.testing.assert_array_equal(weighting.log_variances.detach().numpy(), np.full(5, 0.25, np.float32))
    features, target = oracle.draw(1, [3, 2], unlabelled=0.2)
    target["stress"] = torch.full_like(target["stress"], math.nan)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([-1.0, 0.3, 0.7, 2.0, -3.0]))
    theta = oracle.parameters()
    (values,) = harness.step_together(loss, preds=oracle.predict(features, theta), target=target)
    order = list(weighting.names)
    given = {component.name: (component.coeff or 0.0) / 6 for component in LOSS}
    weights = np.array([given[name] for name in order])
    log_variances = 2 * weighting.log_variances.detach().double().numpy()
    expected = weights * np.exp(-log_variances)
    np.testing.assert_allclose(values.coeffs.numpy(), expected / expected.sum(), rtol=1e-13)
    assert not values.coeffs.requires_grad
    report = values.to_report()
    assert report.values["weighted_sum"] == pytest.approx(sum(report.contributions.values()), rel=1e-13)
    assert report.coeffs["stress_mae"] > 0
    assert math.isnan(report.values["stress_mae"])
    assert loss.effective_coeffs() == pytest.approx(report.coeffs)
    assert loss.coeffs["forces_mse"] == pytest.approx(1 / 6)  # the set-point

    objective = weighting.objective(values)
    known = np.array([0.0 if math.isnan(report.values[name]) else report.values[name] for name in order])
    counts = (weights > 0) & np.array([not math.isnan(report.values[name]) for name in order])
    terms = 0.5 * weights * (np.exp(-log_variances) * known + log_variances)
    assert float(objective) == pytest.approx(terms[counts].sum(), rel=1e-12)
    objective.backward()
    assert theta.grad is None
    gradient = 2 * 0.5 * weights * (1 - np.exp(-log_variances) * known) * counts
    np.testing.assert_allclose(weighting.log_variances.grad.numpy(), gradient, rtol=1e-6)


def test_contributions_become_the_given_shares() -> None:
    loss = oracle.manager(LOSS[:3])
    weighting = UncertaintyWeighting()
    loss.weigh_by(weighting)
    features, target = oracle.draw(1, [3, 2])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(400):
        (values,) = harness.step_together(
            loss, preds=oracle.predict(features, oracle.parameters().detach()), target=target
        )
        optimizer.zero_grad()
        weighting.objective(values).backward()
        optimizer.step()
    report = values.to_report()
    shares = np.array(list(report.contributions.values())) / report.values["weighted_sum"]
    np.testing.assert_allclose(shares, np.array([2, 1, 3]) / 6, rtol=1e-3)
    found = weighting.log_variances.detach().numpy()
    np.testing.assert_allclose(found, [math.log(report.values[name]) for name in weighting.names], atol=1e-3)


def test_a_component_without_error_leads_nowhere() -> None:
    loss = oracle.manager(LOSS[:2])
    weighting = UncertaintyWeighting()
    loss.weigh_by(weighting)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([-1e9, 1e9]))
    features, target = oracle.draw(1, [3, 2])
    preds = oracle.predict(features, oracle.parameters())
    (values,) = harness.step_together(
        loss, preds=preds, target={**target, "total_energy": preds["total_energy"].detach()}
    )
    assert values.coeffs.isfinite().all()
    assert math.isfinite(weighting.objective(values))


def test_learning_does_not_wait_for_the_device() -> None:
    loss = oracle.manager(LOSS, TYPES)
    module = linear_module(loss)
    weighting = UncertaintyWeighting()
    loss.weigh_by(weighting)
    features, target = oracle.draw(0, [2, 3, 4], unlabelled=0.3)
    preds = oracle.predict(features, oracle.parameters())
    harness.step_together(loss, preds=preds, target=target)  # the first one looks at the types
    with Operators() as operators:
        (values,) = harness.step_together(loss, preds=preds, target=target)
        module.objective(values).backward()
    assert operators.waits == []
    assert weighting.log_variances.grad.abs().sum() > 0


def test_weights_do_not_feel_how_fast_variances_are_learnt(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """The objective of the variances does not reach the model: one step with and without it is the same."""
    alone, _ = fit(tmp_path, alloy, None, max_steps=1, max_epochs=-1)
    learnt, _ = fit(tmp_path, alloy, UncertaintyWeighting(), max_steps=1, max_epochs=-1)
    assert all(map(torch.equal, alone.model.parameters(), learnt.model.parameters()))
    assert learnt.loss.weighting.log_variances.abs().min() == 0  # of what is not in the sum
    assert (learnt.loss.weighting.log_variances != 0).sum() == 3


@pytest.mark.parametrize("k", [1, 3])
def test_steps_of_micro_batches_teach_what_big_batches_do(k: int, tmp_path: Path) -> None:
    ends = []
    for groups, number in ((MICRO, 2), ([[*a, *b] for a, b in zip(MICRO[::2], [*MICRO[1::2], []], strict=True)], 1)):
        module = linear_module()
        module.loss.weigh_by(UncertaintyWeighting(speed=3))
        loaded = batches(groups)
        loader = look_ahead(loaded, number) if number > 1 else torch.utils.data.DataLoader(loaded, batch_size=None)
        linear_trainer(default_root_dir=tmp_path, accumulate_grad_batches=number, max_epochs=k).fit(module, loader)
        ends.append(torch.cat([each.detach().double() for each in module.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


def test_averaged_weights_and_the_dry_step(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module, _ = fit(tmp_path, alloy, UncertaintyWeighting(speed=20), [EMAWeightAveraging(decay=0.9)])
    assert (module.loss.weighting.log_variances != 0).sum() == 3
    assert module.loss.weighting.log_variances.isfinite().all()
    tried = build(alloy, weighting=UncertaintyWeighting())
    check_first_batch(tried, alloy, trainer(tmp_path), train=True)
    assert tried.loss.weighting.log_variances.grad is None
    tried.model.requires_grad_(False)
    with pytest.raises(ValueError, match="No gradient reaches a parameter of the model"):
        check_first_batch(tried, alloy, trainer(tmp_path), train=True)


def test_checkpoints_with_another_weighting(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """They are tested with any, and go on with the same only."""
    with_path, without = tmp_path / "with.ckpt", tmp_path / "without.ckpt"
    for path, driver in ((with_path, UncertaintyWeighting(speed=20)), (without, None)):
        saved = ModelCheckpoint(tmp_path, filename=path.stem)
        fit(tmp_path, alloy, driver, [saved], max_epochs=1)
    tested = []
    for path, driver in ((with_path, UncertaintyWeighting()), (with_path, None), (without, UncertaintyWeighting())):
        module = build(alloy, weighting=driver)
        (found,) = trainer(tmp_path).test(module, datamodule=alloy, ckpt_path=path, verbose=False, weights_only=True)
        tested.append(found)
        if path == with_path and driver is not None:
            assert (module.loss.weighting.log_variances != 0).sum() == 3
    assert tested[0] == tested[1] != tested[2]
    for path, driver in ((with_path, None), (without, UncertaintyWeighting())):
        with pytest.raises(ValueError, match="its optimizer cannot go on"):
            fit(tmp_path, alloy, driver, ckpt=path)


# --- gradient balancing in trainings ---


def test_balance_is_its_formula(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """The coefficients after each measurement, from gradients that are taken by themselves."""

    class Gradients(Callback):
        def __init__(self) -> None:
            self.norms: dict[int, np.ndarray] = {}

        def on_train_values(self, trainer: Trainer, pl_module: Any, step: Any) -> None:
            norms = []
            for name in WEIGHTED:
                value = step.values.as_dict()[name]
                gradients = torch.autograd.grad(value, list(pl_module.model.parameters()), retain_graph=True)
                norms.append(math.sqrt(sum(float(each.pow(2).sum()) for each in gradients)))
            self.norms[trainer.global_step] = np.array(norms)

    gradients = Gradients()
    target = {"per_atom_energy_mse": 1, "forces_mse": 2, "stress_mse": 1}
    driver = GradientBalance(every_n_steps=3, target=target, rate=0.5)
    logger = CSVLogger(tmp_path, name="", version="csv")
    module, steps = fit(tmp_path, alloy, driver, [gradients], logger=logger)
    coeffs = GIVEN
    logged = [row for row in read_csv(tmp_path) if "gradient_share/forces_mse" in row]
    assert len(logged) == 4
    for step in range(12):
        np.testing.assert_allclose(steps.coeffs[step], coeffs, rtol=1e-9)
        if (step + 1) % 3 == 0:
            (row,) = [row for row in logged if row["step"] == step]
            shares = coeffs * gradients.norms[step] / (coeffs * gradients.norms[step]).sum()
            assert [row[f"gradient_share/{name}"] for name in WEIGHTED] == pytest.approx(list(shares))
            coeffs = coeffs * (np.array([0.25, 0.5, 0.25]) / shares) ** 0.5
            coeffs = coeffs / coeffs.sum()
    assert module.loss.given_coeffs["by_type"] is None
    before, after = gradients.norms[0] * GIVEN, gradients.norms[11] * np.array(steps.coeffs[11])
    wanted = np.array([0.25, 0.5, 0.25])
    assert np.abs(after / after.sum() - wanted).max() < np.abs(before / before.sum() - wanted).max()


# --- restarts, and other numbers of ranks ---


@pytest.fixture(scope="module")
def uninterrupted(
    alloy: EmbeddedAlloyDataModule, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, ForceFieldModule, Steps]]:
    """A training with each driver, and checkpoints of all kinds on its way: 3 epochs of 4 steps."""
    found = {}
    for name, make in DRIVERS.items():
        folder = tmp_path_factory.mktemp(name)
        callbacks: list[Callback] = [Everywhere(folder)]
        found[name] = folder, *fit(folder, alloy, make(), callbacks)
        coeffs = [found[name][2].coeffs[step] for step in range(12)]
        assert len(set(map(tuple, coeffs))) > 1, "the driver has done nothing"
    return found


class Everywhere(ResumeCheckpoint):
    """Saves at every moment at which somebody does."""

    def _save_as(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.dirpath / f"{name}.ckpt", weights_only=False)

    def _save(self, trainer: Trainer) -> None:
        self._save_as(trainer, f"between={trainer.current_epoch}")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._save_as(trainer, f"step={trainer.global_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_as(trainer, f"validated={trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_as(trainer, f"trained={trainer.current_epoch}")


@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize(
    "checkpoint", ["step=2", "step=3", "step=4", "step=5", "step=8", "trained=1", "validated=0", "between=1"]
)
def test_a_restart_is_exact(
    uninterrupted: dict[str, Any], alloy: EmbeddedAlloyDataModule, tmp_path: Path, name: str, checkpoint: str
) -> None:
    """Bitwise, wherever it was cut off: within an epoch, behind its last batch, and between two."""
    folder, whole, expected = uninterrupted[name]
    # which ends an epoch of its own for a checkpoint between two
    resume = [ResumeCheckpoint(tmp_path / "resume", every_n_epochs=100)] if "between" in checkpoint else []
    module, steps = fit(tmp_path, alloy, DRIVERS[name](), resume, ckpt=folder / f"{checkpoint}.ckpt")
    first = {"step": 1, "trained": 4, "validated": 4, "between": 4}[checkpoint.split("=")[0]]
    start = int(checkpoint.split("=")[1]) * first + (4 if checkpoint.split("=")[0] in ("trained", "validated") else 0)
    assert sorted(steps.coeffs) == list(range(start, 12))
    for step in steps.coeffs:
        assert steps.coeffs[step] == expected.coeffs[step], step
        assert steps.values[step] == expected.values[step], step
    assert all(map(torch.equal, whole.parameters(), module.parameters()))
    assert module.loss.coeffs == whole.loss.coeffs


def fit_on_rank(rank: int, world_size: int, folder: Path, start: dict[str, Path | None]) -> dict[str, Any]:
    """Trainings of each driver: coefficients of their steps and parameters in the end."""
    data = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float64", seed=1
    )
    data.setup()
    found = {}
    for name, ckpt in start.items():
        strategy = strategies.data_parallel(cluster_environment=Ranks(rank, world_size))
        module, steps = fit(folder, data, DRIVERS[name](), ckpt=ckpt, strategy=strategy, devices=world_size)
        found[name] = steps.coeffs, torch.cat([each.detach().double().reshape(-1) for each in module.parameters()])
    return found


@pytest.mark.parametrize(("world_size", "checkpoint"), [(2, None), (3, None), (2, "step=5"), (3, "validated=0")])
def test_other_numbers_of_ranks(
    uninterrupted: dict[str, Any], tmp_path: Path, world_size: int, checkpoint: str | None
) -> None:
    """From the start, and from a checkpoint of one process."""
    start = {name: checkpoint and uninterrupted[name][0] / f"{checkpoint}.ckpt" for name in DRIVERS}
    ranks = spawn(world_size, fit_on_rank, tmp_path, start, timeout=200)
    for name in DRIVERS:
        _, whole, expected = uninterrupted[name]
        parameters = torch.cat([each.detach().double().reshape(-1) for each in whole.parameters()])
        for found in ranks:
            coeffs, end = found[name]
            assert coeffs == ranks[0][name][0]  # bitwise the same on all ranks
            assert torch.equal(end, ranks[0][name][1])
            assert len(coeffs) == {None: 12, "step=5": 7, "validated=0": 8}[checkpoint]
            for step, row in coeffs.items():
                np.testing.assert_allclose(row, expected.coeffs[step], rtol=1e-9, err_msg=name)
            torch.testing.assert_close(end, parameters, rtol=1e-9, atol=1e-9)


def learn_with_zero(rank: int, world_size: int, folder: Path) -> list[torch.Tensor]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    from support.cpu_deepspeed import CpuZero

    data = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float32", seed=1
    )
    data.setup()
    ends = []
    for stage in (None, 1, 2):
        environment = Ranks(rank, world_size)
        strategy = (
            strategies.data_parallel(cluster_environment=environment)
            if stage is None
            else CpuZero(stage=stage, cluster_environment=environment)
        )
        optimizer = functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
        module = build(data, weighting=UncertaintyWeighting(speed=3), optimizer=optimizer).float()
        trainer(folder, strategy=strategy, devices=world_size, gradient_clip_val=0.5).fit(module, datamodule=data)
        ends.append(torch.cat([each.detach().double().reshape(-1) for each in module.parameters()]))
    return ends


@pytest.mark.slow
def test_deep_speed_learns_as_ddp_does(tmp_path: Path) -> None:
    for ddp, *others in spawn(2, learn_with_zero, tmp_path, timeout=200):
        assert ddp[-4:].abs().max() > 1e-3
        for end in others:
            torch.testing.assert_close(end, ddp, rtol=1e-6, atol=1e-6)


# --- what is refused ---


def test_strategies_that_split_parameters_are_refused(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    from support.cpu_deepspeed import CpuZero

    for strategy in (strategies.fully_sharded(), CpuZero(stage=3)):
        module = build(alloy, weighting=UncertaintyWeighting())
        with pytest.raises(ValueError, match=r"UncertaintyWeighting learns coefficients.*Choose strategy=ddp"):
            module.check_weighting(strategy)
        build(alloy).check_weighting(strategy)
        with pytest.raises(ValueError, match="splits the parameters over the ranks"):
            GradientBalance().setup(trainer(tmp_path, strategy=strategy), build(alloy), "fit")


@pytest.mark.parametrize("make", [DRIVERS["softadapt_epoch"], DRIVERS["balance"]])
def test_one_thing_drives_the_coefficients(
    alloy: EmbeddedAlloyDataModule, tmp_path: Path, make: Callable[[], Callback]
) -> None:
    name = type(make()).__name__
    scheduled = build(alloy)
    scheduled.loss.follow(Constant({"forces_mse": 2}))
    with pytest.raises(ValueError, match=rf"{name} and by the schedule Constant; only one"):
        trainer(tmp_path, callbacks=[make()]).fit(scheduled, datamodule=alloy)
    with pytest.raises(ValueError, match=rf"{name} and by UncertaintyWeighting"):
        trainer(tmp_path, callbacks=[make()]).fit(build(alloy, weighting=UncertaintyWeighting()), datamodule=alloy)
    other = LossCoefficientScheduler({0: {"forces_mse": 1}})
    with pytest.raises(ValueError, match="only one of them can"):
        trainer(tmp_path, callbacks=[other, make()]).fit(build(alloy), datamodule=alloy)


def test_targets_name_all_components(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    for target in ({"forces_mse": 1}, {"forces_mse": 1, "per_atom_energy_mse": 1, "stress_mse": 1, "by_type": 1}):
        with pytest.raises(ValueError, match=r"expected one for each.*per_atom_energy_mse, forces_mse, stress_mse"):
            GradientBalance(target=target).setup(trainer(tmp_path), build(alloy), "fit")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftAdapt(math.nan, "epoch", 1), "beta is a finite number"),
        (lambda: SoftAdapt("1", "epoch", 1), "beta is a finite number"),
        (lambda: SoftAdapt(1, "step", 1), "interval is batch or epoch"),
        (lambda: SoftAdapt(1, "epoch", 0), "frequency is a whole number"),
        (lambda: SoftAdapt(1, "epoch", 1.5), "frequency is a whole number"),
        (lambda: SoftAdapt(1, "epoch", 1, 0), "eps is a number above 0"),
        (lambda: GradientBalance(rate=0), "rate is a number above 0"),
        (lambda: GradientBalance(rate=1.1), "rate is a number above 0"),
        (lambda: GradientBalance(limit=0.5), "limit is a number of at least 1"),
        (lambda: GradientBalance(every_n_steps=0), "every_n_steps is a whole number"),
        (lambda: GradientBalance(target={"a": 0}), "share of 'a' is a number above 0"),
        (lambda: GradientBalance(target=[1]), "`target` is {component: share} or null"),
        (lambda: UncertaintyWeighting(math.inf), "initial_log_variance is a finite number"),
        (lambda: UncertaintyWeighting(60), "initial_log_variance is within ±50"),
        (lambda: UncertaintyWeighting(speed=0), "speed is above 0"),
        (lambda: UncertaintyWeighting(speed=None), "speed is a finite number"),
    ],
)
def test_arguments_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert message in str(caught.value)


# --- configurations ---


def check_rows(rows: list[dict[str, float]]) -> None:
    """Coefficients have moved, sum to 1, and make the weighted sum."""
    last = next(row for row in reversed(rows) if "loss_coeff_step/forces_mse" in row)
    coeffs = {key.partition("/")[2]: value for key, value in last.items() if key.startswith("loss_coeff_step/")}
    assert sum(coeffs.values()) == pytest.approx(1, rel=1e-5)
    assert coeffs["forces_mse"] != pytest.approx(1 / 11, rel=1e-5)
    contributions = [value for key, value in last.items() if key.startswith("loss_contribution_step/")]
    assert sum(contributions) == pytest.approx(last["train_loss_step/weighted_sum"], rel=1e-5)


def run_here(folder: Path, *overrides: str) -> dict[str, float]:
    config = composed(*TINY, "trainer.accelerator=cpu", "logger=csv", *overrides)
    config.output_dir = str(folder)
    config.trainer.enable_progress_bar = False
    return execute(prepare(config))


@pytest.mark.parametrize(
    "choice",
    [["adaptive=softadapt", "adaptive.interval=batch", "adaptive.frequency=2"],
     ["adaptive=uncertainty", "adaptive.speed=10"]],
)  # fmt: skip
def test_choices(choice: list[str], tmp_path: Path) -> None:
    """And tests of what they have trained, also without what has trained it."""
    ended = run_here(tmp_path / "trained", *choice)
    check_rows(read_csv(tmp_path / "trained"))
    best = f"ckpt_path={tmp_path}/trained/checkpoints/best.ckpt"
    for name, adaptive in (("with", choice), ("without", ["adaptive=none"])):
        tested = run_here(tmp_path / name, *adaptive, best, "train=false")
        of_test = {key: value for key, value in ended.items() if key.startswith("test0_epoch/")}
        assert {key: tested[key] for key in of_test} == of_test != {}


@pytest.mark.slow
def test_two_ranks_on_the_command_line(tmp_path: Path) -> None:
    choice = ["adaptive=gradient_balance", "adaptive.every_n_steps=1", "callbacks=[default,gradient_share]"]
    settings = ["callbacks.gradient_share.every_n_steps=2", "logger=csv", "test=false"]
    done = train(*TINY, *choice, *settings, folder=tmp_path, ranks=2)
    assert done.code == 0, done.err[-4000:]
    rows = read_csv(done.runs[0])
    check_rows(rows)
    shares = [row for row in rows if "gradient_share/forces_mse" in row]
    assert len(shares) == 4
    for row in shares:
        assert row["gradient_share/forces_mse"] + row["gradient_share/per_atom_energy_mse"] == pytest.approx(1)
        assert abs(row["gradient_cosine/per_atom_energy_mse:forces_mse"]) <= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adaptive=softadapt", "schedule=piecewise"], "SoftAdapt and by the schedule PiecewiseConstant"),
        (["adaptive=uncertainty", "schedule=cosine"], "by the schedule Cosine and by UncertaintyWeighting"),
        (["adaptive=uncertainty", "strategy=fsdp"], "UncertaintyWeighting learns coefficients"),
        (["adaptive=gradient_balance", "strategy=fsdp"], "splits the parameters over the ranks"),
        (["adaptive=gradient_balance", "adaptive.target={forces_mse: 1}"], "expected one for each component"),
        (["adaptive=gradient_balance", "adaptive.parameters=[layers]"], "begins with 'layers'. Valid: "),
        (["callbacks=[default,gradient_share]", "callbacks.gradient_share.parameters=[x]"], "begins with 'x'. Valid: "),
    ],
)
def test_refused_before_anything_is_written(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_here(tmp_path / "never", *overrides)
    assert not (tmp_path / "never").exists()
