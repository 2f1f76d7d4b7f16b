"""Settings of stages and warm-ups: which groups take them, what is logged of them, and what is refused."""

from __future__ import annotations

import csv
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from support import oracle
from support.accumulation_cases import TYPES
from support.configs import composed
from support.linear import Linear, plain
from support.linear import trainer as make_trainer
from torch.optim import SGD, Adam, Optimizer

from harness.callbacks import ExponentialMovingAverage, UsedLearningRates
from harness.data import look_ahead
from harness.job.build import read_schedule
from harness.module import ForceFieldModule
from harness.module.learning_rates import WarmUp, stable_then_decay
from harness.module.optimizer_settings import OptimizerSettings
from harness.schedules import Constant, Join, Schedule, Stage, Together
from harness.schedules import Linear as Ramp

LOSS = [
    oracle.Component("total_energy", "mse", 2.0, ignore_nan=True, per_atom=True),
    oracle.Component("forces", "mse", 1.0, ignore_nan=True),
]
ADAM = functools.partial(Adam, lr=0.02)
STEPS = 3  # of an epoch


def two(boundary: float, optimizer: dict[str, Any], average_decay: float | None = None) -> Join:
    return Join([Constant({}), Stage({}, optimizer, average_decay)], boundaries=[boundary])


def in_groups(parameters: list[Any], **options: Any) -> Adam:
    """Three groups: the optimizer's settings, a tenth of the rate, and no weight decay."""
    (theta,) = parameters
    others = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [
        {"params": [theta]},
        {"params": others[:1], "lr": options["lr"] / 10},
        {"params": others[1:], "weight_decay": 0.0, "betas": (0.5, 0.6)},
    ]
    return Adam(groups, **options)


class Used(Callback):
    def __init__(self) -> None:
        self.groups: list[list[dict[str, Any]]] = []
        self.weights: list[float] = []
        self.averages: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        self.groups.append([{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(float(pl_module.model.theta.detach().flatten()[0]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.averages.append(float(pl_module.model.theta.detach().flatten()[0]))


def train(
    folder: Path,
    schedule: Schedule | None = None,
    optimizer: Any = ADAM,
    lr_scheduler: Any = None,
    interval: Any = "epoch",
    callbacks: Callable[[], list[Callback]] = list,
    **options: Any,
) -> tuple[Used, Trainer]:
    used = Used()
    manager = oracle.manager(LOSS, TYPES)
    if schedule is not None:
        manager.follow(schedule, interval)
    module = ForceFieldModule(
        Linear(torch.float64),
        manager,
        val_metrics=oracle.manager(LOSS, TYPES),
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )
    settings = {"max_epochs": 4, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options}
    trainer = make_trainer(callbacks=[used, *callbacks()], default_root_dir=folder, **settings)
    loader = look_ahead(plain([[0, 1], [2, 3, 4], [5, 6]]), lambda: trainer.accumulate_grad_batches)
    trainer.fit(module, loader, plain([[7, 8]]))
    return used, trainer


def test_groups_take_the_settings_of_a_stage_but_for_their_own(tmp_path: Path) -> None:
    schedule = two(2, {"lr": 1e-3, "weight_decay": 0.2, "betas": [0.7, 0.8]})
    optimizer = functools.partial(in_groups, lr=0.02, weight_decay=0.1)
    used, trainer = train(tmp_path, schedule, optimizer)
    before = [(0.02, 0.1, (0.9, 0.999)), (0.002, 0.1, (0.9, 0.999)), (0.02, 0.0, (0.5, 0.6))]
    within = [(1e-3, 0.2, (0.7, 0.8)), (1e-4, 0.2, (0.7, 0.8)), (1e-3, 0.0, (0.5, 0.6))]
    for step, groups in enumerate(used.groups):
        found = [(group["lr"], group["weight_decay"], tuple(group["betas"])) for group in groups]
        expected = before if step < 2 * STEPS else within
        for own, other in zip(found, expected, strict=True):
            assert own[0] == pytest.approx(other[0], rel=1e-14)
            assert own[1:] == other[1:]
    behind = trainer.optimizers[0].param_groups  # what a checkpoint has
    assert [(group["lr"], group["weight_decay"], tuple(group["betas"])) for group in behind] == before


def test_a_stage_by_step_begins_within_an_epoch(tmp_path: Path) -> None:
    used, _ = train(tmp_path, two(1.5, {"lr": 1e-3}), interval="step")
    assert [groups[0]["lr"] for groups in used.groups] == [0.02] * 5 + [1e-3] * 7


def test_a_stage_holds_for_all_micro_batches_of_a_step(tmp_path: Path) -> None:
    """The last two batches of an epoch are a step of their own, which began before the stage does."""
    used, _ = train(tmp_path, two(1.5, {"lr": 1e-3}), interval="step", accumulate_grad_batches=2)
    assert [groups[0]["lr"] for groups in used.groups] == [0.02] * 3 + [1e-3] * 5


def test_stages_lie_beside_schedules_of_coefficients(tmp_path: Path) -> None:
    ramp = Ramp({"forces_mse": 1}, {"forces_mse": 5}, start_epoch=0, end_epoch=4)
    schedule = Together([ramp, two(3, {"lr": 1e-3})])
    assert schedule.has_settings
    used, trainer = train(tmp_path, schedule)
    assert [groups[0]["lr"] for groups in used.groups] == [0.02] * 9 + [1e-3] * 3
    assert trainer.lightning_module.loss.given_coeffs["forces_mse"] == 4.0
    assert not Together([ramp]).has_settings


def test_what_the_optimizer_steps_with_is_logged(tmp_path: Path) -> None:
    """A warm-up of five steps under a cosine by epoch, and a stage from epoch 3 on."""
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)
    rates = {"scheduler": cosine, "interval": "epoch", "warm_up": {"length": 5, "start": 0.1}}
    used, _ = train(
        tmp_path,
        two(3, {"lr": 1e-3}),
        lr_scheduler=rates,
        callbacks=lambda: [UsedLearningRates(logging_interval="step")],
        logger=CSVLogger(tmp_path, name="", version="csv"),
    )
    expected = [0.02 * (1 + math.cos(math.pi * (step // 3) / 4)) / 2 for step in range(12)]
    expected = [rate * (0.1 + 0.9 * min(step / 5, 1)) if step < 9 else 1e-3 for step, rate in enumerate(expected)]
    assert [groups[0]["lr"] for groups in used.groups] == pytest.approx(expected, rel=1e-12)
    with (tmp_path / "csv" / "metrics.csv").open() as rows:
        logged = [float(row["lr-Adam"]) for row in csv.DictReader(rows) if row.get("lr-Adam")]
    assert logged == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("length", "interval", "told"), [(12, "step", True), (11, "step", False), (4, "epoch", True)])
def test_a_warm_up_that_the_training_ends_within_is_told(
    length: int, interval: str, told: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The training has four epochs of three steps."""
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)
    rates = {"scheduler": cosine, "interval": "epoch", "warm_up": {"length": length, "interval": interval}}
    train(tmp_path, Constant({}), lr_scheduler=rates)
    found = [str(warning.message) for warning in recwarn if "the warm-up" in str(warning.message)]
    assert len(found) == told
    assert all("lr_scheduler.warm_up.length=1." in text for text in found)


def test_a_stage_has_an_average_of_its_own(tmp_path: Path) -> None:
    """Without averaging (a decay of 0), then one of 0.5 from the weights of then."""
    schedule = Join([Stage({}, average_decay=0.0), Stage({}, average_decay=0.5)], boundaries=[2])
    used, _ = train(tmp_path, schedule, callbacks=lambda: [ExponentialMovingAverage(0.9, warm_up=False)])
    average, expected = 0.0, []
    for step, weight in enumerate(used.weights):
        average = weight if step < 2 * STEPS else 0.5 * average + 0.5 * weight
        expected += [average] * (step % STEPS == STEPS - 1)
    assert used.averages == pytest.approx(expected, rel=1e-12)
    assert used.averages[:2] == [used.weights[2], used.weights[5]]


def test_a_stage_of_a_file_may_be_without_settings() -> None:
    for value, expected in (("null", {}), ("{lr: 2e-3}", {"lr": 2e-3})):
        config = composed("schedule=two_stage", f"schedule.schedules.1.optimizer={value}", "max_epochs=8")
        schedule, _ = read_schedule(config.schedule)
        assert dict(schedule.settings(6).optimizer) == expected
        assert schedule(6) == {"per_atom_energy_mse": 1000.0, "forces_mse": 100.0}


def settings(optimizer: dict[str, Any], schedule: Any = None, **defaults: Any) -> None:
    made = in_groups([torch.nn.Parameter(torch.zeros(1))], lr=0.1, **defaults)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in made.param_groups]
    OptimizerSettings(None, schedule or two(5, optimizer), groups, made.defaults)


AMSGRAD = Join([Stage({}, {"amsgrad": False}), Constant({})], boundaries=[5])
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown setting": (
        lambda: settings({"momentum": 0.1}),
        r"stage at epoch 5 has momentum=0.1, which the optimizer.*lr, betas",
    ),
    "a setting that is fixed": (lambda: settings({"fused": True}), r"fused=True.*cannot change within a training"),
    "AMSGrad that begins": (lambda: settings({"amsgrad": True}), r"from epoch 5 on, amsgrad=True.*not on"),
    "AMSGrad that begins later": (lambda: settings({}, AMSGRAD, amsgrad=True), r"from epoch 5 on, amsgrad=True"),
    "groups of their own": (
        lambda: OptimizerSettings(None, two(5, {"weight_decay": 1.0}), [{"weight_decay": 0.2}], {"weight_decay": 0.0}),
        r"every group of parameters has a weight_decay of its own.*optimizer.weight_decay",
    ),
    "a text": (lambda: Stage({}, {"lr": "1e-3x"}), r"lr is a number.*'1e-3x'"),
    "no mapping": (lambda: Stage({}, [1e-3]), r"`optimizer` maps names of settings to values"),  # type: ignore[arg-type]
    "a rate below 0": (lambda: Stage({}, {"lr": -1.0}), r"lr is a finite number of at least 0, found -1.0"),
    "a decay of 1": (lambda: Stage({}, {}, 1.0), r"`average_decay` is at least 0 and below 1"),
    "a length": (lambda: WarmUp(-1), r"warm_up.length is a whole number.*found -1"),
    "an interval": (lambda: WarmUp(1, "steps"), r"warm_up.interval is epoch or step, found 'steps'"),  # type: ignore[arg-type]
    "a start": (lambda: WarmUp(1, "step", 0.0), r"warm_up.start is a part.*found 0.0"),
    "a key": (lambda: WarmUp.of({"steps": 3}), r"warm_up has no steps. Valid names: length, interval, start"),
    "no section": (lambda: WarmUp.of(3), r"warm_up is a mapping of length, interval, start, found 3"),
    "a decay": (lambda: stable_then_decay(SGD([torch.zeros(1)], 0.1), 5, decay=0), r"`decay` is above 0.*found 0"),
    "an end": (lambda: stable_then_decay(SGD([torch.zeros(1)], 0.1), 5, end=1), r"`end` is at least 0.*found 1"),
    "a shape": (lambda: stable_then_decay(SGD([torch.zeros(1)], 0.1), 5, shape="x"), r"linear, cosine, sqrt, found"),
    "a number of turns": (lambda: stable_then_decay(SGD([torch.zeros(1)], 0.1), 0), r"`length` is.*found 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()
    settings({"amsgrad": False, "lr": 1.0}, amsgrad=True)  # this can


OPTIONS = {
    "interval": ({"interval": "batch"}, r"lr_scheduler.interval is epoch or step, found 'batch'"),
    "frequency": ({"frequency": 0}, r"lr_scheduler.frequency is a whole number, at least 1, found 0"),
    "another key": ({"gamma": 0.5}, r"lr_scheduler has no gamma. Valid names: scheduler, interval.*scheduler.gamma"),
    "warm-up": ({"warm_up": {"length": 0.5}}, r"warm_up.length is a whole number"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_scheduler_are_checked(name: str, tmp_path: Path) -> None:
    options, message = OPTIONS[name]
    scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, lr_scheduler={"scheduler": scheduler, **options})


@pytest.mark.parametrize("callbacks", [list, lambda: [EMAWeightAveraging(decay=0.9)]])
def test_an_average_of_a_stage_needs_its_callback(callbacks: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage at epoch 3 has average_decay=0.5.*callbacks=\[default,ema\]"):
        train(tmp_path, two(3, {}, 0.5), callbacks=callbacks)


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_the_decay_begins_and_ends_where_it_is_asked_to(shape: str) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = stable_then_decay(optimizer, 10, decay=0.4, end=0.1, shape=shape)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:7] == pytest.approx([2.0] * 7)
    assert rates[10:] == pytest.approx([0.2] * 2)
    halfway = {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - math.sqrt(0.5)}[shape]
    assert rates[8] == pytest.approx(0.2 + 1.8 * halfway)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[6:11]))
