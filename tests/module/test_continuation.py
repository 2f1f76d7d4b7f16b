"""Going on from a checkpoint with other settings: the rates and weights that are used, against plain torch loops."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import DDPStrategy
from support import oracle
from support.accumulation_cases import TYPES
from support.lightning_ranks import Ranks
from support.linear import Linear, batches, plain
from support.linear import trainer as make_trainer
from support.spawning import spawn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from harness import adaptive, step_together
from harness.callbacks import ExponentialMovingAverage, NonFiniteError, NonFiniteGuard, ResumeCheckpoint
from harness.data import look_ahead
from harness.module import ForceFieldModule
from harness.module.continuation import RECORD
from harness.module.horizon import Pace, Progress, TrainingLength
from harness.module.learning_rates import stable_then_decay
from harness.schedules import Constant, Join, LearningRateCoupled, Stage
from harness.schedules import Linear as LinearSchedule

RISING = LinearSchedule({"forces_mse": 1}, {"forces_mse": 50}, start_epoch=0, end_epoch=8)
LOSS = [
    oracle.Component("total_energy", "mse", 2.0, ignore_nan=True, per_atom=True),
    oracle.Component("forces", "mse", 1.0, ignore_nan=True),
]
OTHER_LOSS = [LOSS[0], oracle.Component("forces", "mse", 30.0, ignore_nan=True)]
GROUPS = [[0, 1], [2, 3, 4], [5, 6]]
WIDER = [[0, 1, 2, 3], [4, 5, 6]]
EPOCHS, RATE = 4, 0.02
MONITOR = "val0_epoch/weighted_sum"
COSINE = functools.partial(CosineAnnealingLR, T_max="horizon")
ADAM = functools.partial(Adam, lr=RATE)
PLATEAU = functools.partial(
    ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.999999
)  # nothing after the first is good enough


def stages(boundary: float, *, average_decay: float | None = None, **settings: Any) -> Join:
    """Two stages, the second one with settings of the optimizer."""
    return Join([Constant({}), Stage({"forces_mse": 1.0}, settings, average_decay)], boundaries=[boundary])


class Used(Callback):
    """Rates and hyperparameters of every step, and the weights behind it."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.groups: list[dict[str, Any]] = []
        self.weights: list[torch.Tensor] = []
        self.coefficients: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        self.groups.append({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
        self.coefficients.append({name: entry.coeff for name, entry in pl_module.loss.entries.items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(pl_module.model.theta.detach().clone())


@dataclass
class Training:
    """A training of the linear model; defaults are those of the one that goes on."""

    optimizer: Any = ADAM
    scheduler: Any = COSINE
    interval: str = "epoch"
    loss: list[oracle.Component] = field(default_factory=lambda: LOSS)
    schedule: Any = None
    warm_up: Any = None
    groups: list[list[int]] = field(default_factory=lambda: GROUPS)
    callbacks: Callable[[], list[Callback]] = list
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, folder: Path, start: Path | None = None, **saving: Any) -> Used:
        used = Used()
        manager = oracle.manager(self.loss, TYPES)
        if self.schedule is not None:
            manager.follow(self.schedule)
        options = {"scheduler": self.scheduler, "interval": self.interval, "monitor": MONITOR, "warm_up": self.warm_up}
        self.module = ForceFieldModule(
            Linear(torch.float64),
            manager,
            val_metrics=oracle.manager(self.loss, TYPES),
            optimizer=self.optimizer,
            lr_scheduler=options,
        )
        callbacks = [used, *self.callbacks(), ResumeCheckpoint(folder, signals=(), **saving)]
        settings = {"max_epochs": 2 * EPOCHS, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        self.trainer = make_trainer(callbacks=callbacks, default_root_dir=folder, **{**settings, **self.options})
        loader = look_ahead(plain(self.groups), lambda: self.trainer.accumulate_grad_batches)
        self.trainer.fit(self.module, loader, plain([[7, 8]]), ckpt_path=start, weights_only=True)
        return used


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("before")


@pytest.fixture(scope="module")
def last(folder: Path) -> Path:
    """Checkpoint of a complete training of four epochs: Adam, cosine to their end."""
    Training(options={"max_epochs": EPOCHS}).run(folder)
    return folder / "last.ckpt"


def cosine(rate: float, turn: int, turns: int) -> float:
    return rate * (1 + math.cos(math.pi * turn / turns)) / 2


def turns_of(scheduler: Any, rate: float, number: int, optimizer: Any = SGD) -> list[float]:
    """Rates of torch's own scheduler, in a loop of nothing else."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    parameter.grad = torch.zeros(())
    driven = optimizer([parameter], lr=rate, **({"momentum": 0.9} if optimizer is SGD else {}))
    moved, rates = scheduler(driven), []
    for _ in range(number):
        rates.append(float(driven.param_groups[0]["lr"]))
        driven.step()
        moved.step()
    return rates


def plain_loop(
    checkpoint: dict[str, Any],
    rates: list[float],
    optimizer: Callable[..., Optimizer],
    groups: list[list[int]],
    loss: list[oracle.Component],
    carried: bool = True,
    clip: float | None = None,
) -> torch.Tensor:
    """Weights after steps of torch's optimizer from those of a checkpoint, with its moments, at given rates."""
    model, manager = Linear(torch.float64), oracle.manager(loss, TYPES)
    with torch.no_grad():
        model.theta.copy_(checkpoint["state_dict"]["model.theta"])
    made = optimizer(model.parameters())
    if carried:
        state = checkpoint["optimizer_states"][0]["state"][0]
        made.state[model.theta] = {key: copy.deepcopy(value) for key, value in state.items()}
        if made.param_groups[0].get("amsgrad"):
            made.state[model.theta]["max_exp_avg_sq"] = torch.zeros_like(model.theta)
    data = batches(groups)
    for number, rate in enumerate(rates):
        batch = data[number % len(data)]
        made.param_groups[0]["lr"] = rate
        made.zero_grad()
        (values,) = step_together(manager, preds=model(batch), target=batch)
        values.weighted_sum.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        manager.reset()
    return model.theta.detach()


def by_epoch(rate: Callable[[int], float], steps: int = len(GROUPS)) -> list[float]:
    """Rates of the epochs that are left."""
    return [rate(epoch) for epoch in range(EPOCHS, 2 * EPOCHS) for _ in range(steps)]


DONE = EPOCHS * len(GROUPS)


@dataclass
class Case:
    """What is changed, and what must then be used."""

    now: Training
    rates: list[float]
    optimizer: Callable[..., Optimizer] = Adam
    carried: bool = True
    clip: float | None = None
    groups: list[list[int]] = field(default_factory=lambda: GROUPS)


def warm_up(optimizer: Optimizer) -> Any:
    parts = [LinearLR(optimizer, 0.1, total_iters=3), ExponentialLR(optimizer, 0.8)]
    return SequentialLR(optimizer, parts, milestones=[3])


def case_of(scheduler: Any, rates: list[float], interval: str = "epoch", **changes: Any) -> Case:
    return Case(Training(scheduler=scheduler, interval=interval), rates, **changes)


STEPS = 2 * EPOCHS * len(GROUPS)
ONE_CYCLE = functools.partial(OneCycleLR, max_lr=0.1, cycle_momentum=False)
CYCLIC = functools.partial(CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=4, cycle_momentum=False)
CASES = {
    "longer": Case(Training(), by_epoch(lambda e: cosine(RATE, e, 8))),
    "lower rate": Case(Training(functools.partial(Adam, lr=1e-4)), by_epoch(lambda e: cosine(1e-4, e, 8))),
    "lower rate, same length": Case(
        Training(functools.partial(Adam, lr=1e-4), functools.partial(CosineAnnealingLR, T_max=EPOCHS)),
        by_epoch(lambda e: cosine(1e-4, e, EPOCHS)),
    ),
    "no scheduler": case_of(None, by_epoch(lambda e: RATE)),
    "plateau": case_of(functools.partial(ReduceLROnPlateau, patience=99), by_epoch(lambda e: RATE)),
    "exponential": case_of(functools.partial(ExponentialLR, gamma=0.9), by_epoch(lambda e: RATE * 0.9**e)),
    "constant": case_of(
        functools.partial(ConstantLR, factor=0.5, total_iters=5), by_epoch(lambda e: RATE / (1 + (e < 5)))
    ),
    "lambda": case_of(functools.partial(LambdaLR, lr_lambda=lambda e: 1 / (1 + e)), by_epoch(lambda e: RATE / (1 + e))),
    "warm restarts": case_of(
        functools.partial(CosineAnnealingWarmRestarts, T_0=3), by_epoch(lambda e: cosine(RATE, e % 3, 3))
    ),
    "warm-up in sequence": case_of(warm_up, by_epoch(lambda e: turns_of(warm_up, RATE, 8)[e])),
    "stable, then decay": case_of(
        functools.partial(stable_then_decay, length="horizon", decay=0.5), by_epoch(lambda e: RATE * (8 - e) / 4)
    ),
    "stable, then decay by step": case_of(
        functools.partial(stable_then_decay, length="horizon", decay=0.25, end=0.1, shape="cosine"),
        [RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * max(s - 18, 0) / 6))) for s in range(DONE, STEPS)],
        "step",
    ),
    "warm-up of steps": Case(
        Training(scheduler=None, warm_up={"length": 20, "start": 0.1}),
        [RATE * (0.1 + 0.9 * min(s / 20, 1)) for s in range(DONE, STEPS)],
    ),
    "warm-up of epochs, in front of a cosine by step": Case(
        Training(interval="step", warm_up={"length": 6, "interval": "epoch", "start": 0.5}),
        [(0.5 + 0.5 * min(s // 3 / 6, 1)) * cosine(RATE, s, STEPS) for s in range(DONE, STEPS)],
    ),
    "warm-up in front of a plateau": Case(
        Training(scheduler=functools.partial(ReduceLROnPlateau, patience=99), warm_up={"length": 18}),
        [RATE * (0.01 + 0.99 * min(s / 18, 1)) for s in range(DONE, STEPS)],
    ),
    "a stage with a rate": Case(
        Training(schedule=stages(6, lr=1e-4)), by_epoch(lambda e: cosine(RATE, e, 8) if e < 6 else 1e-4)
    ),
    "steps": case_of(
        functools.partial(StepLR, step_size=5, gamma=0.5), [RATE * 0.5 ** (s // 5) for s in range(DONE, STEPS)], "step"
    ),
    "cosine by step": case_of(COSINE, [cosine(RATE, s, STEPS) for s in range(DONE, STEPS)], "step"),
    "one cycle": case_of(
        functools.partial(ONE_CYCLE, total_steps="horizon"),
        turns_of(functools.partial(ONE_CYCLE, total_steps=STEPS), RATE, STEPS)[DONE:],
        "step",
    ),
    "cyclic": case_of(
        functools.partial(CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=4, cycle_momentum=False),
        turns_of(
            functools.partial(CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=4, cycle_momentum=False), RATE, STEPS
        )[DONE:],
        "step",
    ),
    "length in steps": Case(
        Training(interval="step", options={"max_epochs": -1, "max_steps": 20}),
        [cosine(RATE, s, 20) for s in range(DONE, 20)],
    ),
    "length in both": Case(
        Training(interval="step", options={"max_epochs": 6, "max_steps": 1000}),
        [cosine(RATE, s, 18) for s in range(DONE, 18)],
    ),
    "AdamW": Case(
        Training(functools.partial(AdamW, lr=RATE, weight_decay=0.1)),
        by_epoch(lambda e: cosine(RATE, e, 8)),
        functools.partial(AdamW, weight_decay=0.1),
    ),
    "SGD": Case(
        Training(functools.partial(SGD, lr=1e-3, momentum=0.9)),
        by_epoch(lambda e: cosine(1e-3, e, 8)),
        functools.partial(SGD, lr=1.0, momentum=0.9),
        carried=False,
    ),
    "AMSGrad": Case(
        Training(functools.partial(Adam, lr=RATE, amsgrad=True)),
        by_epoch(lambda e: cosine(RATE, e, 8)),
        functools.partial(Adam, amsgrad=True),
    ),
    "decay and betas": Case(
        Training(functools.partial(Adam, lr=RATE, weight_decay=0.3, betas=(0.5, 0.9))),
        by_epoch(lambda e: cosine(RATE, e, 8)),
        functools.partial(Adam, weight_decay=0.3, betas=(0.5, 0.9)),
    ),
    "clipping": Case(Training(options={"gradient_clip_val": 0.05}), by_epoch(lambda e: cosine(RATE, e, 8)), clip=0.05),
    "coefficients": Case(Training(loss=OTHER_LOSS), by_epoch(lambda e: cosine(RATE, e, 8))),
    "batch size": Case(Training(groups=WIDER), by_epoch(lambda e: cosine(RATE, e, 8), 2), groups=WIDER),
    "batch size by step": Case(
        Training(groups=WIDER, interval="step"),
        [cosine(RATE, s, DONE + 8) for s in range(DONE, DONE + 8)],
        groups=WIDER,
    ),
    "accumulation": Case(
        Training(interval="step", options={"accumulate_grad_batches": 2}, groups=[[0, 1], [2, 3], [4, 5, 6]]),
        [cosine(RATE, s, DONE + 8) for s in range(DONE, DONE + 8)],
        groups=[[0, 1, 2, 3], [4, 5, 6]],
    ),
    "accumulation by schedule": Case(
        Training(callbacks=lambda: [GradientAccumulationScheduler({0: 1, 4: 2})], interval="step"),
        [cosine(RATE, s, DONE + 8) for s in range(DONE, DONE + 8)],
        groups=[[0, 1, 2, 3, 4], [5, 6]],
    ),
}


OF_0_1_0 = ("longer", "lower rate", "no scheduler", "plateau", "cosine by step", "AdamW", "SGD")


@pytest.mark.parametrize(
    ("name", "is_known"), [*((name, True) for name in CASES), *((name, False) for name in OF_0_1_0)]
)
def test_what_the_command_says_now_is_used(name: str, is_known: bool, last: Path, tmp_path: Path) -> None:
    case, start = CASES[name], last
    checkpoint = torch.load(last, weights_only=True)
    if not is_known:  # such checkpoints say nothing of what they were made with
        del checkpoint[RECORD]
        start = tmp_path / "old.ckpt"
        torch.save(checkpoint, start)
    used = case.now.run(tmp_path, start)
    assert used.rates == pytest.approx(case.rates, rel=1e-9, abs=1e-15)
    assert len(set(used.rates)) > 1 or len(set(case.rates)) == 1
    expected = plain_loop(checkpoint, case.rates, case.optimizer, case.groups, case.now.loss, case.carried, case.clip)
    torch.testing.assert_close(used.weights[-1], expected, rtol=1e-9, atol=1e-11)


# --- beside the undisturbed training ---


WHOLE = {
    "cosine": Training(),
    "cosine by step": Training(interval="step"),
    "one cycle": Training(scheduler=functools.partial(OneCycleLR, max_lr=0.1, total_steps="horizon"), interval="step"),
    "sequence": Training(scheduler=warm_up),
    "plateau": Training(scheduler=PLATEAU),
    "none": Training(scheduler=None),
    "averaged weights": Training(callbacks=lambda: [EMAWeightAveraging(decay=0.7)]),
    "early stopping": Training(callbacks=lambda: [EarlyStopping(MONITOR, patience=6, min_delta=1e9)]),
    "schedule": Training(
        schedule=LinearSchedule(start={"forces_mse": 1}, end={"forces_mse": 50}, start_epoch=0, end_epoch=8)
    ),
    "stable, then decay": Training(scheduler=functools.partial(stable_then_decay, length="horizon", decay=0.75)),
    "warm-up": Training(warm_up={"length": 18}),
    "a stage that began before": Training(schedule=stages(2, lr=1e-3, weight_decay=0.1)),
    "a stage that begins behind": Training(scheduler=PLATEAU, schedule=stages(6, lr=1e-3, betas=(0.8, 0.99))),
    "a stage with another average": Training(
        schedule=stages(6, average_decay=0.5), callbacks=lambda: [ExponentialMovingAverage(0.9)]
    ),
    "by the learning rate": Training(schedule=LearningRateCoupled(start={"forces_mse": 90}, limit={"forces_mse": 1})),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_extended_training_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    """To the last bit where the rates before do not depend on the length; else the rates behind it are the same."""
    training = WHOLE[name]
    limit = training.options
    whole = training.run(tmp_path / "whole")
    training.options = {**limit, "max_epochs": EPOCHS}
    # with the schedule of the whole before, too: only the length differs then
    turns = STEPS if training.interval == "step" else 2 * EPOCHS
    scheduler = training.scheduler
    if isinstance(scheduler, functools.partial) and "horizon" in scheduler.keywords.values():
        named = {key: turns if value == "horizon" else value for key, value in scheduler.keywords.items()}
        training.scheduler = functools.partial(scheduler.func, **named)
    training.run(tmp_path / "first")
    training.options, training.scheduler = limit, scheduler
    rest = training.run(tmp_path / "second", tmp_path / "first" / "last.ckpt")
    assert rest.rates == whole.rates[-len(rest.rates) :]
    assert rest.groups == whole.groups[-len(rest.rates) :]
    assert rest.coefficients == whole.coefficients[-len(rest.rates) :]
    for found, expected in zip(rest.weights, whole.weights[-len(rest.rates) :], strict=True):
        assert torch.equal(found, expected)
    states = [torch.load(tmp_path / part / "last.ckpt", weights_only=True) for part in ("whole", "second")]
    for key in ("state_dict", "current_model_state"):
        if key in states[0]:
            assert torch.equal(*(state[key]["model.theta"] for state in states))


def test_averaged_weights_go_and_come(tmp_path: Path) -> None:
    averaging = Training(callbacks=lambda: [EMAWeightAveraging(decay=0.7)], options={"max_epochs": EPOCHS})
    trained = averaging.run(tmp_path / "averaged")
    checkpoint = torch.load(tmp_path / "averaged" / "last.ckpt", weights_only=True)
    assert torch.equal(checkpoint["current_model_state"]["model.theta"], trained.weights[-1])
    assert not torch.equal(checkpoint["state_dict"]["model.theta"], trained.weights[-1])
    without = Training().run(tmp_path / "without", tmp_path / "averaged" / "last.ckpt")
    checkpoint["state_dict"] = checkpoint["current_model_state"]
    rates = by_epoch(lambda e: cosine(RATE, e, 8))
    torch.testing.assert_close(without.weights[-1], plain_loop(checkpoint, rates, Adam, GROUPS, LOSS))
    again = Training(callbacks=lambda: [EMAWeightAveraging(decay=0.5)], options={"max_epochs": 9})
    used = again.run(tmp_path / "again", tmp_path / "without" / "last.ckpt")
    average = used.weights[0]  # the first update takes the weights as they are
    for weights in used.weights[1:]:
        average = 0.5 * average + 0.5 * weights
    found = torch.load(tmp_path / "again" / "last.ckpt", weights_only=True)["state_dict"]["model.theta"]
    torch.testing.assert_close(found, average)


@pytest.mark.parametrize(
    ("rate", "patience", "expected"),
    # after four epochs without progress the rate is halved three times, and goes on so
    [(RATE, 0, [1 / 8, 1 / 16]), (RATE, 99, [1 / 8, 1 / 8]), (1e-3, 0, [1, 1 / 2]), (RATE, 1, [1 / 8, 1 / 8])],
)
def test_a_plateau_goes_on(rate: float, patience: int, expected: list[float], tmp_path: Path) -> None:
    Training(scheduler=PLATEAU, options={"max_epochs": EPOCHS}).run(tmp_path)
    now = functools.partial(ReduceLROnPlateau, factor=0.5, patience=patience, threshold=0.999999)
    training = Training(functools.partial(Adam, lr=rate), now, options={"max_epochs": EPOCHS + 2})
    used = training.run(tmp_path / "now", tmp_path / "last.ckpt")
    assert used.rates[:: len(GROUPS)] == pytest.approx([rate * factor for factor in expected])
    assert training.trainer.lr_scheduler_configs[0].scheduler.best < math.inf


def test_an_early_end_is_no_end(tmp_path: Path) -> None:
    """A patience of one epoch ends the training in its second; continued, it waits anew, as long as is said now."""

    def stopping(patience: int) -> Callable[[], list[Callback]]:
        return lambda: [EarlyStopping(MONITOR, patience=patience, min_delta=1e9)]

    assert len(Training(callbacks=stopping(1)).run(tmp_path).rates) == 2 * len(GROUPS)
    for patience in (1, 3):
        used = Training(callbacks=stopping(patience)).run(tmp_path / f"{patience}", tmp_path / "last.ckpt")
        assert len(used.rates) == patience * len(GROUPS)


@pytest.mark.parametrize("before", [lambda: adaptive.SoftAdapt(beta=2.0), lambda: None])
@pytest.mark.parametrize("schedule", [None, RISING])
def test_coefficients_are_those_of_the_command(before: Any, schedule: Any, tmp_path: Path) -> None:
    weighting = before()
    callbacks = [] if weighting is None else [weighting]
    loss = [oracle.Component(each.field, "mse", 1.0, ignore_nan=True) for each in LOSS]
    Training(loss=loss, callbacks=lambda: callbacks, options={"max_epochs": EPOCHS}).run(tmp_path)
    used = Training(loss=loss, schedule=schedule).run(tmp_path / "now", tmp_path / "last.ckpt")
    for step, found in enumerate(used.coefficients):
        epoch = EPOCHS + step // len(GROUPS)
        forces = 1.0 if schedule is None else 1 + 49 * epoch / 8
        assert found["forces_mse"] == pytest.approx(forces / (1 + forces)), step


def test_groups_of_parameters_are_known_by_their_names() -> None:
    """Moments follow their parameters into other groups and another order."""
    checkpoint, first = make_checkpoint([["a", "b", "c"]])
    del first
    module = Named()
    lines = module_continuation(module, checkpoint, [["c"], ["a", "b"]])
    state = checkpoint["optimizer_states"][0]
    assert [group["params"] for group in state["param_groups"]] == [[0], [1, 2]]
    assert [float(state["state"][number]["exp_avg"]) for number in range(3)] == [2.0, 0.0, 1.0]
    assert any("groups of parameters: [3] → [1, 2]" in line for line in lines)
    checkpoint, _ = make_checkpoint([["a", "b", "c"]])
    del checkpoint[RECORD]
    with pytest.raises(ValueError, match=r"has \[3\] parameters in its groups, this one \[1, 2\]"):
        module_continuation(module, checkpoint, [["c"], ["a", "b"]])
    checkpoint, _ = make_checkpoint([["a", "b"]])
    lines = module_continuation(module, checkpoint, [["a", "c", "b"]])
    assert set(checkpoint["optimizer_states"][0]["state"]) == {0, 2}
    assert any("made anew for c" in line for line in lines)


class Named(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Parameter(torch.zeros(())) for _ in range(3))
        self.loss = oracle.manager(LOSS, TYPES)


def optimizer_of(module: Named, names: list[list[str]]) -> Adam:
    return Adam([{"params": [getattr(module, name) for name in group]} for group in names], lr=RATE)


def make_checkpoint(names: list[list[str]]) -> tuple[dict[str, Any], Adam]:
    from harness.module.continuation import describe

    module = Named()
    optimizer = optimizer_of(module, names)
    for number, name in enumerate(name for group in names for name in group):
        parameter = getattr(module, name)
        moments = {key: torch.tensor(float(number)) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    counts = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    fit = {
        "epoch_progress": {"current": counts},
        "epoch_loop.batch_progress": {"current": counts, "is_last_batch": False},
    }
    record = {**describe(optimizer, None, module), "controllers": []}
    checkpoint = {"loops": {"fit_loop": fit}, "global_step": 3, "state_dict": {}, RECORD: record}
    return {**checkpoint, "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}, optimizer


def module_continuation(module: Named, checkpoint: dict[str, Any], names: list[list[str]]) -> list[str]:
    from harness.module.continuation import Continuation

    continuation = Continuation(checkpoint, make_trainer())
    continuation.apply(module, lambda horizon: optimizer_of(module, names))
    return continuation.lines


# --- what a scheduler's state does not show ---


def sequence(optimizer: Optimizer, second: Any = ExponentialLR, **options: Any) -> Any:
    parts = [ConstantLR(optimizer, 0.5, total_iters=2), second(optimizer, **options)]
    return SequentialLR(optimizer, parts, milestones=[2])


def chain(optimizer: Optimizer, second: Any = ExponentialLR, **options: Any) -> Any:
    return ChainedScheduler([ConstantLR(optimizer, 0.5, total_iters=2), second(optimizer, **options)], optimizer)


def falling(epoch: int, power: float = 1.0) -> float:
    return 1 / (1 + epoch) ** power


def to_end(optimizer: Optimizer, turns: int) -> Any:
    return LambdaLR(optimizer, lambda turn: 1 - turn / (turns + 1))


def closure(factor: float) -> Callable[[int], float]:
    return lambda turn: factor**turn


class Falling:
    """A function of the turn that is an object."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, turn: int) -> float:
        return falling(turn, self.power)


def partial(scheduler: Any, **options: Any) -> Any:
    return functools.partial(scheduler, **options)


ONE = partial(OneCycleLR, max_lr=0.1, total_steps=STEPS)
# schedulers before and now, and the lines that are told; the one before is that of a training of four epochs
HIDDEN: dict[str, tuple[Any, Any, list[str]]] = {
    "pct_start": (partial(ONE, pct_start=0.3), partial(ONE, pct_start=0.8), ["scheduler.pct_start: 0.3 → 0.8"]),
    "pct_start by default": (ONE, partial(ONE, pct_start=0.8), ["scheduler.pct_start: default → 0.8"]),
    "anneal_strategy": (
        partial(ONE, anneal_strategy="cos"),
        partial(ONE, anneal_strategy="linear"),
        ["scheduler.anneal_strategy: cos → linear"],
    ),
    "max_lr": (ONE, partial(ONE, max_lr=0.2), ["scheduler.max_lr: 0.1 → 0.2"]),
    "a config": (
        {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "_partial_": True, **ONE.keywords, "pct_start": 0.3},
        {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "_partial_": True, **ONE.keywords, "pct_start": 0.8},
        ["scheduler.pct_start: 0.3 → 0.8"],
    ),
    "mode of cycles": (
        partial(CYCLIC, mode="triangular"),
        partial(CYCLIC, mode="triangular2"),
        ["scheduler.mode: triangular → triangular2"],
    ),
    "sequence": (
        partial(sequence, gamma=0.5),
        partial(sequence, second=StepLR, step_size=3, gamma=0.5),
        [
            "scheduler.1: ExponentialLR → StepLR",
            "scheduler.second: default → StepLR",
            "scheduler.step_size: default → 3",
        ],
    ),
    "chain": (
        partial(chain, gamma=0.9),
        partial(chain, second=CosineAnnealingLR, T_max=40),
        [
            "scheduler.1: ExponentialLR → CosineAnnealingLR",
            "scheduler.gamma: 0.9 → default",
            "scheduler.second: default → CosineAnnealingLR",
            "scheduler.T_max: default → 40",
        ],
    ),
    "chain of functions": (
        lambda optimizer: ChainedScheduler([ExponentialLR(optimizer, 0.9)]),
        lambda optimizer: ChainedScheduler([CosineAnnealingLR(optimizer, 40)]),
        ["scheduler.0: ExponentialLR → CosineAnnealingLR"],
    ),
    "a function": (
        partial(LambdaLR, lr_lambda=lambda turn: 0.95**turn),
        partial(LambdaLR, lr_lambda=lambda turn: 0.9**turn),
        ["scheduler.lr_lambda: <lambda> → another function of this name"],
    ),
    "a closure": (
        partial(LambdaLR, lr_lambda=closure(0.95)),
        partial(LambdaLR, lr_lambda=closure(0.9)),
        ["scheduler.lr_lambda: <lambda> → another function of this name"],
    ),
    "a partial": (
        partial(LambdaLR, lr_lambda=partial(falling, power=0.3)),
        partial(LambdaLR, lr_lambda=partial(falling, power=0.7)),
        ["scheduler.lr_lambda.power: 0.3 → 0.7"],
    ),
    "an object": (
        partial(LambdaLR, lr_lambda=Falling(0.3)),
        partial(LambdaLR, lr_lambda=Falling(0.7)),
        ["scheduler.lr_lambda.power: 0.3 → 0.7"],
    ),
    "multiplicative": (
        partial(MultiplicativeLR, lr_lambda=lambda turn: 0.5),
        partial(MultiplicativeLR, lr_lambda=lambda turn: 0.9),
        ["scheduler.lr_lambda: <lambda> → another function of this name"],
    ),
    "milestones": (
        partial(MultiStepLR, milestones=[2, 90]),
        partial(MultiStepLR, milestones=[2, 9]),
        ["scheduler.milestones: [2, 90] → [2, 9]"],
    ),
}
BY_RATES = ("pct_start", "anneal_strategy", "chain of functions", "a function", "a closure", "a partial")
BY_RATES += ("an object", "multiplicative")


@pytest.mark.parametrize(
    ("name", "is_known"), [*((name, True) for name in HIDDEN), *((name, False) for name in BY_RATES)]
)
def test_a_schedule_that_is_asked_for_otherwise_is_used(
    name: str, is_known: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, now, lines = HIDDEN[name]
    Training(scheduler=before, interval="step", options={"max_epochs": 2}).run(tmp_path)
    start = tmp_path / "last.ckpt"
    if not is_known:
        checkpoint = torch.load(start, weights_only=True)
        checkpoint[RECORD] = without_recipe(checkpoint[RECORD])
        torch.save(checkpoint, start)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        used = Training(scheduler=now, interval="step", options={"max_epochs": 4}).run(tmp_path / "now", start)
    rates = [turns_of(callable_of(each), RATE, 12, Adam)[6:] for each in (before, now)]
    assert used.rates == pytest.approx(rates[1], rel=1e-9)
    assert used.rates != pytest.approx(rates[0], rel=1e-3)
    told = [line.removeprefix("lr_scheduler.") for line in told_in(caplog) if line.startswith("lr_scheduler")]
    if is_known:
        assert told == lines
    else:
        assert len(told) >= 1


def callable_of(source: Any) -> Any:
    return instantiate(source) if isinstance(source, dict) else source


def without_recipe(record: dict[str, Any]) -> dict[str, Any]:
    """Record as checkpoints before have it."""
    scheduler = {key: value for key, value in record["scheduler"].items() if key != "inner"}
    kept = {key: value for key, value in record.items() if key not in ("recipe", "settings")}
    return {**kept, "scheduler": scheduler}


def told_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    start = "differs from the checkpoint: "
    return [each.getMessage().removeprefix(start) for each in caplog.records if each.getMessage().startswith(start)]


# the same asked for again: nothing is told, and the states of the checkpoint stay
@pytest.mark.parametrize("name", HIDDEN)
def test_the_same_schedule_is_none_that_differs(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(scheduler=HIDDEN[name][0], interval="step", options={"max_epochs": 1})
    training.run(tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for kept in (checkpoint, {**checkpoint, RECORD: without_recipe(checkpoint[RECORD])}):
        states = [kept[key] for key in ("optimizer_states", "lr_schedulers")]
        assert training.module.go_on_from(kept, training.trainer) == []
        assert [kept[key] for key in ("optimizer_states", "lr_schedulers")] == states


def test_a_length_within_a_function_counts(tmp_path: Path) -> None:
    """Neither the recipe nor the state has the number that `horizon` stands for."""
    training = Training(scheduler=partial(to_end, turns="horizon"), options={"max_epochs": 2})
    training.run(tmp_path)
    training.options = {"max_epochs": 4}
    used = training.run(tmp_path / "now", tmp_path / "last.ckpt")
    assert used.rates[::3] == pytest.approx([RATE * (1 - turn / 5) for turn in (2, 3)])


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("optimizer", [ADAM, functools.partial(SGD, lr=RATE, momentum=0.8)])
def test_what_a_cycle_moves_is_no_setting_of_the_optimizer(
    optimizer: Any, is_known: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = partial(OneCycleLR, max_lr=0.1, total_steps="horizon")
    training = Training(optimizer, one, interval="step", options={"max_epochs": 2})
    training.run(tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    if not is_known:
        checkpoint[RECORD] = without_recipe(checkpoint[RECORD])
        torch.save(checkpoint, tmp_path / "last.ckpt")
    training.options = {"max_epochs": 4}
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        used = training.run(tmp_path / "now", tmp_path / "last.ckpt")
    expected = turns_of(partial(one, total_steps=12), RATE, 12, Adam)
    assert used.rates == pytest.approx(expected[6:])
    told = told_in(caplog)
    assert told[0] == "lr_scheduler.scheduler.total_steps: 6 → 12"
    assert len(told) == 2
    assert told[1].startswith("the learning rate goes on with")


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        (None, {"length": 9}, ["length: 0 → 9", "interval: default → step", "start: default → 0.01"]),
        ({"length": 9}, {"length": 9, "start": 0.5}, ["start: 0.01 → 0.5"]),
        ({"length": 9}, {"length": 9}, []),
        ({"length": 9}, None, ["length: 9 → 0", "interval: step → default", "start: 0.01 → default"]),
    ],
)
def test_another_warm_up_is_told(
    before: Any, now: Any, lines: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Training(scheduler=None, warm_up=before, options={"max_epochs": 1}).run(tmp_path)
    training = Training(scheduler=None, warm_up=now, options={"max_epochs": 2})
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        training.run(tmp_path / "now", tmp_path / "last.ckpt")
    assert told_in(caplog) == [f"lr_scheduler.warm_up.{line}" for line in lines]


def test_settings_that_were_typed_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = partial(OneCycleLR, max_lr=0.1, total_steps=12)
    Training(ADAM, one, interval="step", options={"max_epochs": 2}).run(tmp_path)
    now = Training(partial(ADAM, betas=(0.8, 0.99), weight_decay=0.1), one, interval="step", options={"max_epochs": 3})
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        now.run(tmp_path / "now", tmp_path / "last.ckpt")
    assert set(told_in(caplog)) == {
        "optimizer.betas: [0.9, 0.999] → [0.8, 0.99]",
        "optimizer.weight_decay: 0 → 0.1",
    }


# --- checkpoints that Lightning makes before an epoch is complete, and epochs that are cut ---


@pytest.mark.parametrize("patience", [0, 1])  # nothing differs, and another scheduler
@pytest.mark.parametrize("others", [0, 1])
def test_a_plateau_has_the_turn_that_a_best_checkpoint_lacks(
    patience: int, others: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def saving() -> list[Callback]:
        every = [ModelCheckpoint(tmp_path / "every", "{epoch}", save_top_k=-1, every_n_epochs=1)]
        best = ModelCheckpoint(tmp_path, "{epoch}", monitor=MONITOR, save_top_k=-1)
        return [best, *(every * others)]

    before = partial(PLATEAU, threshold=0.9)  # nothing is good enough
    now = partial(before, patience=patience)
    whole = Training(scheduler=before, callbacks=saving, options={"max_epochs": 4}).run(tmp_path)
    (start,) = tmp_path.glob("epoch=1*.ckpt")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        used = Training(scheduler=now, options={"max_epochs": 4}).run(tmp_path / "now", start)
    (told,) = [line for line in told_in(caplog) if line.startswith("ReduceLROnPlateau")]
    if others:
        assert told.endswith("epoch 1, which the checkpoint does not tell: its turn is left out")
        return
    assert told.startswith(f"ReduceLROnPlateau takes its turn of epoch 1, with {MONITOR} = ")
    if patience == 0:
        assert used.rates == whole.rates[6:]
        assert torch.equal(used.weights[-1], whole.weights[-1])
    else:
        assert used.rates[::3] == [RATE, RATE / 2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_that_is_cut_is_told(accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups = [[index] for index in range(3 if accumulate == 1 else 5)]
    training = Training(scheduler=None, groups=groups)
    steps = 4  # three are an epoch
    for part, (start, max_steps) in enumerate([(None, steps), (0, steps), (0, 6), (2, 9)]):
        training.options = {"max_steps": max_steps, "max_epochs": -1, "accumulate_grad_batches": accumulate}
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            used = training.run(tmp_path / str(part), None if start is None else tmp_path / str(start) / "last.ckpt")
        done = accumulate * (1 if part < 3 else 2)
        line = (
            f"the training ended within epoch {1 if part < 3 else 2}, after {done} of its {len(groups)} batches: the "
            f"other {len(groups) - done} are left out, and it goes on with epoch {2 if part < 3 else 3}"
        )
        assert told_in(caplog) == ([] if part < 2 else [line])
        assert len(used.rates) == [4, 0, 2, 3][part]


# --- refused ---


class Own:
    """A scheduler that is none of torch's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, *_: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}


NO_END = {"max_epochs": -1, "max_time": "00:00:00:10"}
REFUSED = {
    "shorter": (Training(options={"max_epochs": 3}), r"max_epochs=3, but the checkpoint has 4 epochs behind it"),
    "fewer steps": (Training(options={"max_steps": 5}), r"max_steps=5, but the checkpoint has 12 steps behind it"),
    "no end": (Training(options=NO_END), r"`horizon`.*max_epochs is -1 and max_steps is not set.*\+trainer.max_steps"),
    "another kind": (Training(scheduler=Own), r"Own is none of torch's schedulers.*init_from in place of ckpt_path"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name: str, last: Path, tmp_path: Path) -> None:
    training, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        training.run(tmp_path, last)
    assert not (tmp_path / "last.ckpt").exists()


class Killed(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            raise InterruptedError


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Training(groups=WIDER), r"within epoch 1, after 1 of its batches, of which an epoch had 3 then and has 2 now"),
        (Training(options={"accumulate_grad_batches": 2}), r"after 1 of its batches, which is no multiple of accumul"),
        (Training(functools.partial(Adam, lr=1e-3)), None),
    ],
)
def test_in_the_middle_of_an_epoch_its_batches_stay(now: Training, message: str | None, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        Training(callbacks=lambda: [Killed(5)]).run(tmp_path, every_n_steps=2)
    if message is None:
        used = now.run(tmp_path / "now", tmp_path / "last.ckpt")
        assert used.rates == pytest.approx([cosine(1e-3, step // 3, 8) for step in range(4, STEPS)])
    else:
        with pytest.raises(ValueError, match=message):
            now.run(tmp_path / "now", tmp_path / "last.ckpt")


# --- the length ---


class Turns(CosineAnnealingLR):
    """Counts its turns."""

    def __init__(self, optimizer: Optimizer, T_max: int) -> None:
        self.length, self.turns = T_max, -1  # torch's own first one is none
        super().__init__(optimizer, T_max)

    def step(self, epoch: int | None = None) -> None:
        self.turns += 1
        super().step(epoch)


LENGTHS = [
    ({"max_epochs": 5}, "epoch", 1, 5),
    ({"max_epochs": 5}, "epoch", 2, 2),
    ({"max_epochs": 5}, "step", 1, 15),
    ({"max_epochs": 5, "limit_train_batches": 2}, "step", 1, 10),
    ({"max_epochs": 5, "limit_train_batches": 0.67}, "step", 1, 10),
    ({"max_epochs": 5, "accumulate_grad_batches": 2}, "step", 1, 10),
    ({"max_epochs": 5, "accumulate_grad_batches": 2}, "step", 2, 5),
    ({"max_epochs": 5}, "step", 2, 5),
    ({"max_epochs": -1, "max_steps": 9}, "epoch", 1, 3),
    ({"max_epochs": -1, "max_steps": 8}, "step", 1, 8),
    ({"max_epochs": 2, "max_steps": 8}, "step", 1, 6),
    ({"max_epochs": 9, "max_steps": 8}, "step", 1, 8),
    ({"max_epochs": 9, "max_steps": 5, "accumulate_grad_batches": 2}, "step", 1, 5),
]


@pytest.mark.parametrize(("options", "interval", "frequency", "expected"), LENGTHS)
def test_the_horizon_is_the_number_of_turns(
    options: dict[str, Any], interval: str, frequency: int, expected: int, tmp_path: Path
) -> None:
    made: list[Turns] = []

    def scheduler(optimizer: Optimizer, T_max: int) -> Turns:
        made.append(Turns(optimizer, T_max))
        return made[-1]

    training = Training(scheduler=functools.partial(scheduler, T_max="horizon"), interval=interval, options=options)
    if frequency == 1:
        training.run(tmp_path)
        assert made[-1].turns == expected
        assert made[-1].length == expected
        return
    trainer = make_trainer(**options)
    trainer.fit_loop.max_batches = int(options.get("limit_train_batches", 3))
    length = TrainingLength.of(trainer)
    pace = Pace(interval, frequency)
    assert length.turns_left(pace, Progress()) == expected
    for epochs in range(5):  # and what is done and what is left add up
        for done in range(0, 3 if interval == "step" else 1, trainer.accumulate_grad_batches):
            steps = sum(-(-number // trainer.accumulate_grad_batches) for number in (*[3] * epochs, done))
            progress = Progress(epochs, done, steps)
            assert length.turns_done(pace, progress) + length.turns_left(pace, progress) == expected


def test_a_length_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(batches(GROUPS))

    training = Training(interval="step", options={"max_epochs": 2})
    training.run(tmp_path)
    module = training.module
    trainer = make_trainer(max_epochs=2)
    with pytest.raises(ValueError, match=r"`horizon`.*the training data has no length"):
        trainer.fit(module, torch.utils.data.DataLoader(Endless(), batch_size=None))


# --- after a loss that is not finite ---


def test_the_advice_after_a_loss_that_is_not_finite_works(tmp_path: Path) -> None:
    """A rate that is too high; the last good checkpoint goes on with the lower one that the message asks for."""
    spoilt = Training(functools.partial(SGD, lr=1e200), scheduler=COSINE)
    spoilt.callbacks = lambda: [NonFiniteGuard(output_dir=tmp_path)]
    with pytest.raises(NonFiniteError, match=r"ckpt_path=\S+ optimizer\.lr=1e\+199") as caught:
        spoilt.run(tmp_path, every_n_steps=1)
    start = Path(str(caught.value).partition("ckpt_path=")[2].split()[0])
    used = Training(functools.partial(SGD, lr=1e-3)).run(tmp_path / "now", start)
    first = torch.load(start, weights_only=True)["global_step"]
    assert used.rates == pytest.approx([cosine(1e-3, step // 3, 8) for step in range(first, STEPS)])


# --- ranks ---


def continued(rank: int, world_size: int, folder: Path, start: Path) -> tuple[list[float], torch.Tensor]:
    torch.set_num_threads(1)
    groups = [group[rank::world_size] for group in GROUPS]
    strategy = DDPStrategy(cluster_environment=Ranks(rank, world_size), process_group_backend="gloo")
    training = Training(functools.partial(AdamW, lr=1e-3), schedule=stages(6, lr=5e-4, weight_decay=0.5), groups=groups)
    training.options = {"devices": world_size, "strategy": strategy}
    used = training.run(folder, start)
    return used.rates, used.weights[-1]


def test_on_another_number_of_ranks(last: Path, tmp_path: Path) -> None:
    schedule = stages(6, lr=5e-4, weight_decay=0.5)
    alone = Training(functools.partial(AdamW, lr=1e-3), schedule=schedule).run(tmp_path / "alone", last)
    assert alone.rates[-6:] == [5e-4] * 6
    for rates, weights in spawn(2, continued, tmp_path / "two", last):
        assert rates == alone.rates
        torch.testing.assert_close(weights, alone.weights[-1], rtol=1e-9, atol=1e-11)
