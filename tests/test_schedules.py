"""Schedules are the functions of the epoch that their formulas say, alone and nested."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
import pickle
import warnings
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.commands import ROOT

from harness import EnergyForceLoss, MeanSquaredError, MetricsManager, schedules
from harness.job import follow_schedule, read_schedule
from harness.schedules import (
    Constant,
    Cosine,
    Exponential,
    Join,
    LearningRateCoupled,
    Linear,
    PiecewiseConstant,
    Ramp,
    Scale,
    Schedule,
    Together,
    as_schedule,
    described,
    unreached,
)

RAMPS = (Linear, Cosine, Exponential)
CHOICES = sorted(path.stem for path in (ROOT / "conf" / "schedule").glob("*.yaml"))
NESTED = Join(
    [
        Scale(
            Together([PiecewiseConstant({0: {"a": 2}, 3: {"b": 1, "a": 4}}), Constant({"c": {"H": 1, "O": 2}})]),
            by=Linear({"a": 0, "c_H": 1}, {"a": 1, "c_H": 3}, 1, 5),
        ),
        LearningRateCoupled({"a": 10, "d": 0}, {"a": 1, "d": 3}),
        Exponential({"a": 100}, {"a": 1}, 20, 40),
    ],
    boundaries=[8, 16.5],
)


def formula(kind: type[Schedule], start: float, end: float, begin: float, stop: float, epochs: Any) -> Any:
    """The three ramps in NumPy, each by another road than the module's."""
    t = np.clip((np.asarray(epochs, dtype=np.float64) - begin) / (stop - begin), 0, 1)
    match kind.__name__:
        case "Linear":
            return np.interp(epochs, [begin, stop], [start, end])
        case "Cosine":
            return end + (start - end) * np.cos(np.pi * t / 2) ** 2
        case _:
            return np.exp(np.interp(t, [0, 1], np.log([start, end])))


# --- values ---


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize(("start", "end"), [(1.0, 1000.0), (0.3, 0.1), (7.0, 7.0)])
def test_ramps_follow_their_formula(kind: type[Schedule], start: float, end: float) -> None:
    schedule = kind({"a": start, "b": end}, {"a": end, "b": start}, 3, 17)  # type: ignore[call-arg]
    epochs = np.linspace(0, 20, 201)
    found = [schedule(epoch) for epoch in epochs]
    assert all(list(each) == ["a", "b"] for each in found)
    np.testing.assert_allclose([each["a"] for each in found], formula(kind, start, end, 3, 17, epochs), rtol=1e-12)
    np.testing.assert_allclose([each["b"] for each in found], formula(kind, end, start, 3, 17, epochs), rtol=1e-12)
    for epoch in (0, 2.9, 3):
        assert schedule(epoch) == {"a": start, "b": end}  # to the last bit
    for epoch in (17, 17.1, 1e9):
        assert schedule(epoch) == {"a": end, "b": start}


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_a_ramp_from_zero_starts_with_zero_and_not_with_nothing(kind: type[Schedule]) -> None:
    schedule = kind({"a": 0, "b": 1}, {"a": 8, "b": 0}, 0, 10)  # type: ignore[call-arg]
    assert schedule(0) == {"a": 0.0, "b": 1.0}
    assert schedule(5) == {"a": pytest.approx(4), "b": pytest.approx(0.5)}
    assert schedule(10) == {"a": 8.0, "b": 0.0}


def test_milestones_keep_what_they_do_not_name() -> None:
    schedule = PiecewiseConstant({"100": {"a": 1}, 0: {"a": 5, "b": 2}, 7.5: {"c": 3}, 200: {"b": 0}})
    assert schedule(0) == schedule(7.4) == {"a": 5.0, "b": 2.0}
    assert schedule(7.5) == schedule(99.9) == {"a": 5.0, "b": 2.0, "c": 3.0}
    assert schedule(100) == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert schedule(1e6) == {"a": 1.0, "b": 0.0, "c": 3.0}
    assert schedule.names == ("a", "b", "c")
    assert schedule.breakpoints == (0.0, 7.5, 100.0, 200.0)
    assert PiecewiseConstant({3: {"a": 1}})(2.9) == {}  # the loss's own


def test_a_schedule_without_coefficients_names_nothing() -> None:
    assert Constant({})(5) == {}
    assert Constant({}).names == Constant({}).breakpoints == ()


def test_per_type_weights_go_by_the_names_of_the_values() -> None:
    nested = Constant({"a": {"H": 5, "O": 1}, "b": 2})
    assert nested(0) == {"a_H": 5.0, "a_O": 1.0, "b": 2.0}
    assert nested == Constant({"a_H": 5, "a_O": 1, "b": 2})
    ramp = Linear({"a": {"H": 1}, "a_O": 0}, {"a_H": 3, "a": {"O": 4}}, 0, 2)
    assert ramp(1) == {"a_H": 2.0, "a_O": 2.0}


def test_at_a_boundary_the_later_schedule_holds() -> None:
    schedule = Join([Constant({"a": 1}), Constant({}), Linear({"b": 0}, {"b": 10}, 5, 25)], boundaries=[5, 10])
    assert schedule(4.999) == {"a": 1.0}
    assert schedule(5) == schedule(9.9) == {}
    assert schedule(10) == {"b": 2.5}  # epochs are those of the training
    assert schedule.names == ("a", "b")
    assert schedule.boundaries == (5.0, 10.0)
    assert schedule.breakpoints == (5.0, 10.0, 25.0)  # where the ramp begins, another schedule holds
    assert Join([Constant({"a": 1})], [])(3) == {"a": 1.0}
    assert Join([Linear({"a": 0}, {"a": 1}, 5, 30), Constant({})], [10]).breakpoints == (5.0, 10.0)  # it never ends


def test_a_factor_multiplies_what_is_set() -> None:
    schedule = Scale(PiecewiseConstant({2: {"a": 3, "b": 4}}), by=Constant({"a": 1.5}))
    assert schedule(1) == {}
    assert schedule(2) == {"a": 4.5, "b": 4.0}
    assert schedule.names == ("a", "b")
    without = Scale(Constant({"a": 3}), by=PiecewiseConstant({4: {"a": 0}}))
    assert (without(3), without(4)) == ({"a": 3.0}, {"a": 0.0})


def test_the_learning_rate_moves_coefficients() -> None:
    schedule = LearningRateCoupled({"energy": 0.02, "forces": 1000}, {"energy": 1, "forces": 1})
    assert schedule.needs_learning_rate
    assert schedule(0, 1) == {"energy": 0.02, "forces": 1000.0}
    assert schedule(99, 0) == {"energy": 1.0, "forces": 1.0}
    for ratio in np.linspace(0, 1, 11):
        expected = {"energy": 1 + (0.02 - 1) * ratio, "forces": 1 + (1000 - 1) * ratio}
        assert schedule(7, ratio) == pytest.approx(expected, rel=1e-12)
    assert schedule(0, 1.5) == pytest.approx({"energy": 0.0, "forces": 1499.5 + 0.0})  # 1 - 0.98 × 1.5 is below 0
    assert Join([Constant({}), schedule], [3]).needs_learning_rate
    assert Scale(Constant({"forces": 2}), by=LearningRateCoupled({"forces": 1}, {"forces": 0}))(0, 0.25) == {
        "forces": 0.5
    }
    assert not Constant({}).needs_learning_rate


def test_nested_schedules_in_closed_form() -> None:
    for epoch in np.linspace(0, 50, 401):
        factor_a, factor_h = np.interp(epoch, [1, 5], [0, 1]), np.interp(epoch, [1, 5], [1, 3])
        if epoch < 8:
            expected = {"a": (2 if epoch < 3 else 4) * factor_a, "c_H": factor_h, "c_O": 2}
            expected |= {"b": 1} if epoch >= 3 else {}
        elif epoch < 16.5:
            expected = {"a": 1 + 9 * 0.3, "d": 3 - 3 * 0.3}
        else:
            expected = {"a": 100 ** (1 - np.clip((epoch - 20) / 20, 0, 1))}
        assert NESTED(epoch, 0.3) == pytest.approx(expected, rel=1e-12)
    assert NESTED.names == ("a", "b", "c_H", "c_O", "d")
    assert NESTED.breakpoints == (0.0, 1.0, 3.0, 5.0, 8.0, 16.5, 20.0, 40.0)


# --- laws ---

numbers = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
positive = st.floats(1e-6, 1e6)
epochs = st.one_of(st.integers(0, 60).map(float), st.floats(0, 60))
names = st.sampled_from(["a", "b", "c"])
coefficients = st.dictionaries(names, numbers, min_size=1)


@st.composite
def ramps(draw: Any, keys: Any = None) -> Schedule:
    kind = draw(st.sampled_from(RAMPS))
    ends = st.fixed_dictionaries(
        dict.fromkeys(keys or draw(st.sets(names, min_size=1)), positive if kind is Exponential else numbers)
    )
    start = draw(ends)
    begin = draw(st.floats(0, 50))
    return kind(start, draw(st.fixed_dictionaries(dict.fromkeys(start, positive))), begin, begin + draw(positive))


leaves = st.one_of(
    st.builds(Constant, coefficients),
    st.builds(PiecewiseConstant, st.dictionaries(epochs, coefficients, min_size=1, max_size=4)),
    ramps(),
)


def joined(children: Any) -> Any:
    return st.lists(children, min_size=1, max_size=3).flatmap(
        lambda parts: st.lists(epochs, min_size=len(parts) - 1, max_size=len(parts) - 1, unique=True).map(
            lambda switches: Join(parts, sorted(switches))
        )
    )


trees = st.recursive(leaves, joined, max_leaves=6)


@given(trees, st.lists(epochs, min_size=1, max_size=8), st.randoms())
def test_only_the_epoch_matters(schedule: Schedule, visited: list[float], random: Any) -> None:
    expected = {epoch: schedule(epoch) for epoch in visited}
    text = repr(schedule)
    random.shuffle(visited)
    for epoch in visited:
        expected_there = dict(expected[epoch])
        schedule(epoch).clear()  # what is returned belongs to the caller
        assert schedule(epoch) == expected_there == copy.deepcopy(schedule)(epoch)
    assert repr(schedule) == text


@given(trees, epochs)
def test_what_is_set_is_named_and_valid(schedule: Schedule, epoch: float) -> None:
    found = schedule(epoch)
    assert set(found) <= set(schedule.names)
    assert len(set(schedule.names)) == len(schedule.names)
    assert all(type(value) is float and 0 <= value < math.inf for value in found.values())
    assert list(schedule.breakpoints) == sorted(set(schedule.breakpoints))


@given(trees, epochs, epochs)
def test_nothing_is_named_anew_between_breakpoints(schedule: Schedule, one: float, other: float) -> None:
    low, high = sorted((one, other))
    if not any(low < breakpoint <= high for breakpoint in schedule.breakpoints):
        assert set(schedule(low)) == set(schedule(high))


@given(ramps(), st.lists(epochs, min_size=2, max_size=6))
def test_ramps_stay_between_their_ends_and_never_turn(schedule: Any, visited: list[float]) -> None:
    start, end = dict(schedule.start), dict(schedule.end)
    found = [schedule(epoch) for epoch in sorted(visited)]
    for name in start:
        values = np.array([each[name] for each in found])
        assert min(start[name], end[name]) <= values.min()
        assert values.max() <= max(start[name], end[name])
        rising = np.diff(values) * np.sign(end[name] - start[name])
        assert (rising >= -1e-12 * (start[name] + end[name])).all()


@given(st.lists(trees, min_size=1, max_size=3), epochs, st.data())
def test_a_join_is_one_of_its_schedules(parts: list[Schedule], epoch: float, data: Any) -> None:
    switches = sorted(data.draw(st.lists(epochs, min_size=len(parts) - 1, max_size=len(parts) - 1, unique=True)))
    joint = Join(parts, switches)
    assert joint(epoch) == parts[sum(switch <= epoch for switch in switches)](epoch)


@given(trees, st.data(), epochs)
def test_a_scale_multiplies_name_by_name(schedule: Schedule, data: Any, epoch: float) -> None:
    by = data.draw(ramps(keys=data.draw(st.sets(st.sampled_from(schedule.names), min_size=1))))
    factors = by(epoch)
    expected = {name: value * factors.get(name, 1.0) for name, value in schedule(epoch).items()}
    assert Scale(schedule, by)(epoch) == expected
    ones = Scale(schedule, by=Constant(dict.fromkeys(schedule.names, 1)))
    assert ones(epoch) == schedule(epoch)


@given(ramps(keys=["a", "b"]), ramps(keys=["d"]), epochs)
def test_together_is_the_union(one: Schedule, other: Schedule, epoch: float) -> None:
    assert Together([one, other])(epoch) == {**one(epoch), **other(epoch)}
    assert Together([other, one])(epoch) == Together([one, other])(epoch)


@given(trees)
def test_copies_are_equal(schedule: Schedule) -> None:
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), eval(repr(schedule))):
        assert other == schedule
        assert repr(other) == repr(schedule)
        assert hash(other) == hash(schedule)


# --- identity ---


def test_text_and_equality_are_those_of_the_content() -> None:
    one, other = Constant({"a": 1, "b": np.float32(2)}), Constant(OmegaConf.create({"b": 2, "a": 1.0}))
    assert one == other
    assert repr(one) == repr(other) == "Constant(coeffs={'a': 1.0, 'b': 2.0})"
    assert one != Constant({"a": 1, "b": 3})
    assert PiecewiseConstant({5: {"a": 1}, "0": {"a": 2}}) == PiecewiseConstant({0.0: {"a": 2}, 5: {"a": 1}})
    assert Join([one, other], [3]) != Join([one, other], [4])
    assert len({one, other, Constant({}), Together([Constant({})])}) == 3
    assert repr(Join([Constant({})] * 2, [5])) == (
        "Join(schedules=(Constant(coeffs={}), Constant(coeffs={})), boundaries=(5.0,))"
    )
    assert pickle.loads(pickle.dumps(NESTED)) == copy.deepcopy(NESTED) == eval(repr(NESTED)) == NESTED


def test_nothing_can_be_changed() -> None:
    given = {"a": 1.0}
    schedule = Constant(given)
    given["a"] = 2.0
    assert schedule(0) == {"a": 1.0}
    with pytest.raises(FrozenInstanceError, match="coeffs"):
        schedule.coeffs = {"a": 3}  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError, match="coeffs"):
        del schedule.coeffs  # type: ignore[misc]
    with pytest.raises(TypeError):
        schedule.coeffs["a"] = 3  # type: ignore[index]


def test_a_schedule_of_ones_own_nests() -> None:
    @dataclass(frozen=True)
    class Pulse(Schedule):
        """On in even epochs."""

        name: str
        interval: int = 2  # an argument of its own

        def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
            return {self.name: float(int(epoch) % self.interval == 0)}

        @property
        def names(self) -> tuple[str, ...]:
            return (self.name,)

    schedule = Join([Scale(Constant({"a": 3}), by=Pulse("a")), Pulse("b")], [2])
    assert [schedule(epoch) for epoch in (0, 1.5, 2.5)] == [{"a": 3.0}, {"a": 0.0}, {"b": 1.0}]
    assert schedule.breakpoints == (2.0,)
    assert Pulse("a") == Pulse("a", interval=2) != Pulse("b")


# --- mistakes ---

RAMP = ({"a": 1}, {"a": 2}, 0, 10)
MISTAKES: list[tuple[Any, type[Exception], list[str]]] = [
    # coefficients
    (lambda: Constant(None), TypeError, ["Constant: `coeffs` maps components", "None"]),  # type: ignore[arg-type]
    (lambda: Constant([1]), TypeError, ["maps components to coefficients", "list"]),  # type: ignore[arg-type]
    (lambda: Constant({"a": -1}), ValueError, ["a must be finite and not negative", "-1"]),
    (lambda: Constant({"a": math.nan}), ValueError, ["a must be finite", "nan"]),
    (lambda: Constant({"a": {"H": math.inf}}), ValueError, ["a_H must be finite", "inf"]),
    (lambda: Constant({"a": True}), TypeError, ["a is a number", "True"]),
    (lambda: Constant({"a": "5"}), TypeError, ["a is a number", "'5'", "str"]),
    (lambda: Constant({"a": None}), TypeError, ["a is null", "0 keeps the component in the sum"]),
    (lambda: Constant({"a": {}}), ValueError, ["a maps atom types to weights, found none"]),
    (lambda: Constant({"a": {"H": {"x": 1}}}), TypeError, ["a_H is a number"]),
    (lambda: Constant({"a": {False: 1}}), TypeError, ["atom type of a is text", "False", "quote it"]),
    (lambda: Constant({"": 1}), TypeError, ["component is text", "''"]),
    (lambda: Constant({3: 1}), TypeError, ["component is text", "found 3."]),
    (lambda: Constant({"a": {"H": 1}, "a_H": 2}), ValueError, ["sets a_H twice", "{component}_{type}"]),
    (lambda: Constant({}, interval="step"), TypeError, ["Constant has no `interval`", "schedule_interval='step'"]),  # type: ignore[call-arg]
    # milestones
    (lambda: PiecewiseConstant({}), TypeError, ["maps epochs to coefficients", "{}"]),
    (lambda: PiecewiseConstant([1]), TypeError, ["maps epochs to coefficients", "[1]"]),  # type: ignore[arg-type]
    (lambda: PiecewiseConstant({5: {"a": 1}, "5.0": {"a": 2}}), ValueError, ["epoch 5 stands there twice", "Join"]),
    (lambda: PiecewiseConstant({-1: {"a": 1}}), ValueError, ["milestone", "at least 0", "-1"]),
    (lambda: PiecewiseConstant({"nan": {"a": 1}}), ValueError, ["milestone", "finite", "nan"]),
    (lambda: PiecewiseConstant({"ten": {"a": 1}}), TypeError, ["milestone is a number of epochs", "'ten'"]),
    (lambda: PiecewiseConstant({True: {"a": 1}}), TypeError, ["milestone is a number of epochs", "True"]),
    (lambda: PiecewiseConstant({5: {}}), ValueError, ["epoch 5 names no component"]),
    (lambda: PiecewiseConstant({5: {"a": None}}), TypeError, ["epoch 5: a is null"]),
    # ramps
    (
        lambda: Linear({"a": 1}, {"b": 1, "a": 2}, 0, 1),
        ValueError,
        ["b is in one of them only", "`start`: a"],
    ),
    (lambda: Linear({}, {}, 0, 1), ValueError, ["Linear: `start` names no component"]),
    (lambda: Linear({"a": 1}, {"a": 2}, 5, 5), ValueError, ["before `end_epoch`", "5 and 5", "PiecewiseConstant"]),
    (lambda: Cosine({"a": 1}, {"a": 2}, -3, 5), ValueError, ["Cosine: `start_epoch`", "at least 0", "-3"]),
    (lambda: Cosine({"a": 1}, {"a": 2}, 0, "5"), TypeError, ["Cosine: `end_epoch` is a number", "'5'"]),  # type: ignore[arg-type]
    (lambda: Cosine({"a": 1}, {"a": 2}, 0, math.inf), ValueError, ["Cosine: `end_epoch` is a finite", "inf"]),
    (lambda: Exponential({"a": 0}, {"a": 1}, 0, 1), ValueError, ["`start` has 0 for a", "Linear"]),
    (lambda: Exponential({"a": 1}, {"a": 0}, 0, 1), ValueError, ["`end` has 0 for a", "Linear"]),
    # nesting
    (lambda: Join([], []), ValueError, ["`schedules` is empty"]),
    (lambda: Join(Constant({}), []), TypeError, ["`schedules` is a list"]),  # type: ignore[arg-type]
    (lambda: Join([Constant({})], 5), TypeError, ["`boundaries` is a list of epochs", "5"]),  # type: ignore[arg-type]
    (lambda: Join([Constant({}), {"a": 1}], [5]), TypeError, ["schedules[1] is a schedule", "`_target_` missing"]),  # type: ignore[list-item]
    (lambda: Join([Constant({})] * 3, [5]), ValueError, ["3 schedules have 2 boundaries", "found 1: [5.0]"]),
    (lambda: Join([Constant({})] * 3, [5, 5]), ValueError, ["rise strictly", "[5.0, 5.0]"]),
    (lambda: Join([Constant({})] * 2, [-5]), ValueError, ["`boundaries[0]`", "at least 0"]),
    (lambda: Join([Constant({})] * 2, ["5"]), TypeError, ["`boundaries[0]` is a number", "'5'"]),  # type: ignore[list-item]
    (lambda: Scale({"a": 1}, Linear(*RAMP)), TypeError, ["Scale: `schedule` is a schedule", "_target_"]),  # type: ignore[arg-type]
    (lambda: Scale(Linear(*RAMP), 2), TypeError, ["Scale: `by` is a schedule", "found 2 (int)"]),  # type: ignore[arg-type]
    (lambda: Scale(Linear(*RAMP), Constant({"b": 2})), ValueError, ["`by` names b", "It sets a"]),
    (lambda: Scale(Constant({}), Constant({"b": 2})), ValueError, ["It sets nothing", "name the coefficient there"]),
    (lambda: Together([]), ValueError, ["`schedules` is empty"]),
    (
        lambda: Together([Constant({"a_H": 1}), Constant({"b": 1}), Constant({"a": {"H": 2}})]),
        ValueError,
        ["schedules[0] and schedules[2] both set a_H", "Join", "Scale"],
    ),
    # learning rate
    (lambda: LearningRateCoupled({"a": 1}, {"b": 1}), ValueError, ["must name the same components", "`limit`: b"]),
    (lambda: LearningRateCoupled({"a": 1}, {"a": 2})(0), ValueError, ["needs the learning rate", "None"]),
    (lambda: LearningRateCoupled({"a": 1}, {"a": 2})(0, math.nan), ValueError, ["finite number", "nan"]),
    (lambda: LearningRateCoupled({"a": 1}, {"a": 2})(0, -0.5), ValueError, ["at least 0", "-0.5"]),
    (
        lambda: as_schedule(None),
        TypeError,
        ["one of Constant, Cosine, Exponential, Join, L", "Together of", "found None"],
    ),
    (lambda: as_schedule(Constant), TypeError, ["found <class"]),
]


@pytest.mark.parametrize(("make", "kind", "words"), MISTAKES, ids=[str(index) for index in range(len(MISTAKES))])
def test_mistakes(make: Any, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as raised:
        make()
    for word in words:
        assert word in str(raised.value)


# --- Hydra ---

YAML = """
_target_: harness.schedules.Join
schedules:
  - _target_: harness.schedules.PiecewiseConstant
    milestones: {0: {a: 1}, "10": {a: 2, b: {H: 3}}}
  - _target_: harness.schedules.Scale
    schedule:
      _target_: harness.schedules.Together
      schedules:
        - {_target_: harness.schedules.LearningRateCoupled, start: {a: 1e3}, limit: {a: 1}}
        - {_target_: harness.schedules.Cosine, start: {b: 1}, end: {b: 2}, start_epoch: 50, end_epoch: 60}
    by: {_target_: harness.schedules.Constant, coeffs: {b: "${factor}"}}
boundaries: ["${begin}"]
"""


def test_nested_configs_are_instantiated() -> None:
    config = OmegaConf.create({"factor": 10, "begin": 50, "schedule": OmegaConf.create(YAML)})
    expected = Join(
        [
            PiecewiseConstant({0: {"a": 1}, 10: {"a": 2, "b_H": 3}}),
            Scale(
                Together([LearningRateCoupled({"a": 1000}, {"a": 1}), Cosine({"b": 1}, {"b": 2}, 50, 60)]),
                Constant({"b": 10}),
            ),
        ],
        [50],
    )
    for convert in ("none", "partial", "all", "object"):
        made = as_schedule(instantiate(config.schedule, _convert_=convert))
        assert made == expected
        assert repr(made) == repr(expected)
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == expected


def test_a_missing_target_is_told() -> None:
    config = OmegaConf.create({"factor": 10, "begin": 50, "schedule": OmegaConf.create(YAML)})
    del config.schedule.schedules[1].schedule._target_
    with pytest.raises(InstantiationException) as raised:
        instantiate(config.schedule)
    assert "Scale: `schedule` is a schedule" in str(raised.value.__cause__)
    assert "Is `_target_` missing" in str(raised.value.__cause__)


@pytest.mark.parametrize("loss", ["energy_force", "energy_force_stress"])
def test_every_file_fits_the_losses(loss: str) -> None:
    made: dict[str, Schedule] = {}
    for choice in CHOICES:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [f"loss={loss}", f"schedule={choice}", "max_epochs=40"])
        manager = instantiate(config.loss, type_names=["H", "O"])
        schedule, interval = read_schedule(config.schedule)
        made[choice] = schedule
        assert interval == "epoch"
        given = dict(manager.given_coeffs)
        follow_schedule(manager, schedule, interval)  # which refuses names that the loss does not have
        for epoch in range(41):
            manager.move_to(epoch, 1 - epoch / 40)
            assert manager.given_coeffs == {**given, **schedule(epoch, 1 - epoch / 40)}
            assert sum(coeff for coeff in manager.coeffs.values() if coeff is not None) == pytest.approx(1)
    assert made["constant"](20) == {}
    assert made["two_stage"](29) == {}
    assert made["two_stage"](30) == {"per_atom_energy_mse": 1000.0, "forces_mse": 100.0}
    assert dict(made["two_stage"].settings(30).optimizer) == {"lr": 1e-3}
    assert not made["two_stage"].settings(29)
    assert made["linear"](20) == {"per_atom_energy_mse": 1.0, "forces_mse": 5.5}
    assert made["cosine"](40) == made["linear"](40) == {"per_atom_energy_mse": 1.0, "forces_mse": 1.0}
    assert made["linear_alloy"](40) == {"per_atom_energy_mse": 100.0, "forces_mse": 1.0}
    assert made["deepmd"](0, 1.0) == {"per_atom_energy_mse": 0.02, "forces_mse": 1000.0}
    assert made["nested"](2) == pytest.approx({"per_atom_energy_mse": 1.0, "forces_mse": 5.5})
    assert made["nested"](28) == pytest.approx({"per_atom_energy_mse": 5**0.5, "forces_mse": 7.5})
    assert made["nested"].breakpoints == (0.0, 4.0, 20.0, 36.0)


# --- how often ---

RAMP_IN_A_LOSS = {
    "_target_": "harness.schedules.Linear",
    "start": {"forces_mse": 0},
    "end": {"forces_mse": 1},
    "start_epoch": 0,
    "end_epoch": 4,
}


def test_the_interval_is_that_of_what_follows() -> None:
    ramp = instantiate(RAMP_IN_A_LOSS)
    for loss in (
        EnergyForceLoss(schedule=ramp, schedule_interval="step"),
        MetricsManager(
            [
                {"field": "forces", "metric": MeanSquaredError, "coeff": 1, "name": "forces_mse"},
                {"field": "total_energy", "metric": MeanSquaredError, "coeff": 1},
            ],
            schedule=ramp,
            schedule_interval="step",
        ),
        instantiate({"_target_": "harness.EnergyForceLoss", "schedule": RAMP_IN_A_LOSS, "schedule_interval": "step"}),
    ):
        assert loss.schedule_interval == "step"
        assert copy.deepcopy(loss).schedule_interval == "step"
        loss.follow(ramp)
        assert loss.schedule_interval == "epoch"
        with pytest.raises(ValueError, match="`interval` is epoch or step, found 'batch'"):
            loss.follow(ramp, "batch")
        assert loss.schedule_interval == "epoch"
    with pytest.raises(ValueError, match="`schedule_interval` is epoch or step, found 'batch'"):
        EnergyForceLoss(schedule_interval="batch")  # type: ignore[arg-type]


def test_the_interval_of_a_config_is_a_key_of_its_outermost_section() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["schedule=nested", "schedule.interval=step", "max_epochs=40"])
        plain = compose("train", ["schedule=nested", "max_epochs=40"])
    schedule, interval = read_schedule(config.schedule)
    assert interval == "step"
    assert config.schedule.interval == "step"  # what was composed stays as it is
    assert (schedule, "epoch") == read_schedule(plain.schedule)
    with pytest.raises(InstantiationException) as raised:
        instantiate({"_target_": "harness.EnergyForceLoss", "schedule": {**RAMP_IN_A_LOSS, "interval": "step"}})
    for words in ("Linear has no `interval`", "in the outermost schedule of a config", "schedule_interval='step' of a"):
        assert words in str(raised.value.__cause__)


def test_a_training_by_steps_reaches_more() -> None:
    ramp = Linear({"a": 0}, {"a": 1}, 0, 9.5)
    assert unreached(ramp, 10) == [9.5]
    assert unreached(ramp, 10, "step") == unreached(ramp, 11) == []
    assert unreached(ramp, 9, "step") == [9.5]


def test_checkpoints_know_schedules_as_in_version_0_1_0() -> None:
    """There, the interval was the last argument of a schedule, shown unless it was ``epoch``."""
    ramp = Linear({"forces_mse": 0}, {"forces_mse": 1}, 0, 4)
    text = "Linear(start={'forces_mse': 0.0}, end={'forces_mse': 1.0}, start_epoch=0.0, end_epoch=4.0)"
    assert described(ramp, "epoch") == text
    assert described(ramp, "step") == f"{text[:-1]}, interval='step')"
    assert EnergyForceLoss(schedule=ramp).get_extra_state()["coeffs"]["schedule"] == text
    by_step = EnergyForceLoss(schedule=ramp, schedule_interval="step")
    by_step.move_to(3)
    state = by_step.get_extra_state()
    assert state["coeffs"]["schedule"] == described(ramp, "step")
    continued = EnergyForceLoss(schedule=ramp, schedule_interval="step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        continued.set_extra_state(state)
    assert continued.given_coeffs["forces_mse"] == 0.75
    with pytest.warns(UserWarning, match=r"made with the schedule Linear.*interval='step'"):
        EnergyForceLoss(schedule=ramp).set_extra_state(state)


MODULES = ("combined", "ramps", "schedule", "stages")


def test_the_kinds_that_a_message_names_are_all_schedules() -> None:
    kinds = [getattr(schedules, name) for name in schedules.__all__]
    made = [k for k in kinds if isinstance(k, type) and issubclass(k, Schedule) and k not in (Schedule, Ramp)]
    with pytest.raises(TypeError, match=f"one of {', '.join(kind.__name__ for kind in made)} of harness.schedules"):
        schedules.as_schedule(3)


def test_examples_of_the_docstrings_run() -> None:
    modules = [schedules, *(importlib.import_module(f"harness.schedules.{name}") for name in MODULES)]
    results = [doctest.testmod(module, extraglobs=vars(schedules)) for module in modules]
    assert sum(each.failed for each in results) == 0
    assert sum(each.attempted for each in results) >= 15
    for name in schedules.__all__:
        value = getattr(schedules, name)
        if isinstance(value, type) and value not in (Schedule, Ramp):
            assert ">>> " in (value.__doc__ or ""), name
