"""Gradient accumulation: k micro-batches give the gradient and the values of the one batch that they make up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import oracle
from support.accumulation_cases import LOSS, TYPES, WATCHED
from support.oracle import Component
from support.spawning import spawn
from support.step_cost import Operators, counted_collectives

import harness
from harness.distributed import gradient_scale, merge_over_ranks
from harness.metrics import is_linear

LINEAR = ("mae", "mse", "huber", "huber_sum", "stratified", "stratified_sum")


def accumulate(managers, parts, theta):
    """Backward passes of all micro-batches, as a training loop does it; values after each of them."""
    window = managers[0].window([target for _, target in parts])
    seen = []
    for features, target in parts:
        values = harness.step_together(*managers, preds=oracle.predict(features, theta), target=target, window=window)
        (values[0].weighted_sum * gradient_scale()).backward()
        seen.append([each.to_host() for each in values])
    assert window.is_complete
    return seen


def assert_values(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


linear = st.sampled_from(LINEAR)
plain = st.sampled_from(LINEAR[:4])
coeffs = st.one_of(st.none(), st.just(0.0), st.floats(1e-3, 1e3))
weights = st.one_of(st.none(), st.tuples(*[st.floats(0.1, 10)] * 3))


@st.composite
def losses(draw):
    """One to four linear components, and a root and a maximum that are watched."""
    ignore_nan = draw(st.booleans())
    kinds = [
        lambda: Component(draw(st.sampled_from(["total_energy", "stress"])), draw(plain), draw(coeffs)),
        lambda: Component("total_energy", draw(plain), draw(coeffs), per_atom=True),
        lambda: Component("forces", draw(linear), draw(coeffs)),
        lambda: Component("forces", draw(linear), draw(coeffs), True, draw(weights)),
    ]
    chosen = [draw(st.sampled_from(kinds))() for _ in range(draw(st.integers(1, 4)))]
    chosen += [Component("forces", "rmse", None, True), Component("stress", "max")]
    unique = {component.name: component for component in chosen}.values()
    assume(sum(component.coeff or 0.0 for component in unique) > 0)
    return [Component(**{**vars(component), "ignore_nan": ignore_nan}) for component in unique]


@settings(max_examples=150)
@given(
    losses(),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from([(0, 1, 2), (0,), (1, 2)]),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(0, 2**31),
)
def test_any_split_gives_the_gradient_and_values_of_the_whole(components, atoms, cuts, types, unlabelled, seed):
    """Micro-batches may be empty: a cut at either end, or two at one place."""
    if not components[0].ignore_nan:
        unlabelled = 0.0
    features, target = oracle.draw(seed, atoms, types, unlabelled)
    parts = oracle.split(features, target, [min(cut, len(atoms)) for cut in cuts])
    theta, loss = oracle.parameters(), oracle.manager(components, TYPES)
    seen = accumulate([loss], parts, theta)
    expected = oracle.gradient(components, features, target, TYPES)
    np.testing.assert_allclose(theta.grad.numpy(), expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    preds = oracle.predict(features, oracle.parameters())
    assert_values(seen[-1][0], oracle.values(components, preds, target, TYPES))
    # on the way, values are those of what has come so far
    first = [oracle.join([part[side] for part in parts[:1]]) for side in (0, 1)]
    so_far = oracle.values(components, oracle.predict(first[0], oracle.parameters()), first[1], TYPES)
    assert_values(seen[0][0], so_far)
    # and the epoch has every micro-batch once
    epoch = {name: value.item() for name, value in loss.compute().items()}
    assert_values(epoch, seen[-1][0])


def test_the_mean_of_the_micro_batches_is_something_else():
    """What averaging losses gives, so that the comparison above is known to see a difference."""
    features, target = oracle.draw(0, [1, 5, 2, 4], unlabelled=0.3)
    parts = oracle.split(features, target, [1])
    averaged = sum(oracle.gradient(LOSS, *part, TYPES) for part in parts) / len(parts)
    exact = oracle.gradient(LOSS, features, target, TYPES)
    assert np.abs(averaged - exact).max() > 0.05 * np.abs(exact).max()


ATOMS = {  # of each micro-batch on each rank; [] is a rank without any graph
    "unequal": [[[2, 5], [3], [1, 1, 4]], [[1], [4, 2], [6]], [[3, 3, 3], [2], [5]]],
    "empty": [[[2], [3, 1], [4]], [[], [4], [1]], [[1, 2], [], []]],
}


def micro_batches(rank, case):
    """Rank 1 has no carbon, the first micro-batch of all ranks no oxygen, and a third of the labels are missing."""
    kinds = [(0, 1), (0, 1, 2), (0, 2)]
    parts = []
    for position, atoms in enumerate(ATOMS[case][rank]):
        types = [kind for kind in kinds[position] if rank != 1 or kind != 1]
        parts.append(oracle.draw(100 * rank + position, atoms, types, unlabelled=0.3))
    return parts


def accumulate_on_rank(rank, world_size, case):
    managers = [oracle.manager(LOSS, TYPES), oracle.manager(WATCHED, TYPES)]
    theta = oracle.parameters()
    seen = []
    for _ in range(2):  # the second step starts anew
        theta.grad = None
        seen.append(accumulate(managers, micro_batches(rank, case), theta)[-1])
    averaged = theta.grad.clone()
    if world_size > 1:
        torch.distributed.all_reduce(averaged)
    epoch = [values.to_host() for values in harness.compute_together(managers)]
    return (averaged / world_size).numpy(), seen, epoch


@pytest.mark.parametrize("case", ATOMS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_micro_batches_give_the_gradient_and_values_of_the_whole(world_size, case):
    everything = [part for rank in range(world_size) for part in micro_batches(rank, case)]
    features, target = (oracle.join([part[side] for part in everything]) for side in (0, 1))
    preds = oracle.predict(features, oracle.parameters())
    expected = [oracle.values(each, preds, target, TYPES) for each in (LOSS, WATCHED)]
    gradient = oracle.gradient(LOSS, features, target, TYPES)
    results = spawn(world_size, accumulate_on_rank, case)
    for found, seen, epoch in results:
        np.testing.assert_allclose(found, gradient, rtol=1e-10)
        for step in seen:
            for values, right in zip(step, expected, strict=True):
                assert_values(values, right)
        for values, right in zip(epoch, expected, strict=True):
            assert_values(
                {k: v for k, v in values.items() if "_sum" not in k},
                {k: v for k, v in right.items() if "_sum" not in k},
            )
        assert repr(seen) == repr(results[0][1])  # bitwise the same on every rank


def collectives_of_a_window(rank, world_size, monitors):
    managers = [oracle.manager(LOSS, TYPES), oracle.manager(monitors, TYPES)]
    parts = micro_batches(rank, "empty")
    with counted_collectives() as making:
        window = managers[0].window([target for _, target in parts])
    counts = [dict(making)]
    for features, target in parts:
        preds = oracle.predict(features, oracle.parameters())
        with counted_collectives() as counted:
            values = harness.step_together(*managers, preds=preds, target=target, window=window)
            values[0].weighted_sum.backward()
        counts.append(dict(counted))
    return counts


@pytest.mark.parametrize(("monitors", "expected"), [(LOSS, {"SUM": 1}), (WATCHED, {"SUM": 1, "MAX": 1})])
def test_a_micro_batch_takes_the_collectives_of_a_step(monitors, expected):
    """And the window one, for the counts, which nobody waits for before the first micro-batch has been measured."""
    for counts in spawn(2, collectives_of_a_window, monitors):
        assert counts == [{"SUM": 1}, expected, expected, expected]


def test_micro_batches_do_not_wait_for_the_device():
    managers = [oracle.manager(LOSS, TYPES), oracle.manager(WATCHED, TYPES)]
    parts = micro_batches(0, "unequal")
    accumulate(managers, parts, oracle.parameters())  # the first look at types and counts
    theta = oracle.parameters()
    with Operators() as operators:
        window = managers[0].window([target for _, target in parts])
        for features, target in parts:
            preds = oracle.predict(features, theta)
            harness.step_together(*managers, preds=preds, target=target, window=window)[0].weighted_sum.backward()
    assert operators.waits == []


def test_micro_batches_look_at_no_number():
    """The meta device has shapes and no numbers: whatever asks for one is an error there."""
    manager = oracle.manager(LOSS, TYPES)
    (features, target), *_ = parts = micro_batches(0, "unequal")
    accumulate([manager], parts, oracle.parameters())
    manager.reset()
    on_meta = {key: value.to("meta") for key, value in target.items()}
    preds = {key: torch.empty_like(on_meta[key], requires_grad=True) for key in features}
    window = manager.window([on_meta, on_meta])
    for _ in range(2):
        harness.step_together(manager, preds=preds, target=on_meta, window=window)[0].weighted_sum.backward()
    assert preds["forces"].grad.shape == target["forces"].shape


class Halved(harness.MeanSquaredError):
    """A user's metric that is a multiple of the sum, and says so."""

    value = staticmethod(lambda accumulated, count: 0.5 * accumulated / (count + 1))
    linear_in_sum = True


class Undeclared(harness.MeanSquaredError):
    value = staticmethod(lambda accumulated, count: 0.5 * accumulated / count)


class Pretender(harness.RootMeanSquaredError):
    linear_in_sum = True


class Inherited(harness.HuberLoss):
    """A measure of one's own with the mean that it inherits."""

    def measure(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target) ** 4


def test_which_metrics_are_linear():
    assert {name: is_linear(make()) for name, make in oracle.METRICS.items()} == {
        name: name in LINEAR for name in oracle.METRICS
    }
    assert is_linear(Halved())
    assert is_linear(Inherited())
    assert not is_linear(Undeclared())
    assert not is_linear(Pretender())


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (harness.RootMeanSquaredError(), "'f' has the coefficient 1.0, but the value of RootMeanSquaredError"),
        (harness.MaximumAbsoluteError(), "is a maximum"),
        (Undeclared(), "linear_in_sum = True"),
        (Pretender(), "although declared so"),
        (torchmetrics.MeanSquaredError(), "of torchmetrics"),
        (torchmetrics.SpearmanCorrCoef(num_outputs=3), "of torchmetrics"),
    ],
)
def test_components_that_do_not_add_up_are_refused(metric, words):
    entry = {"name": "f", "field": "forces", "metric": metric}
    other = {"field": "stress", "metric": harness.MeanSquaredError(), "coeff": 1}
    with pytest.raises(ValueError, match=words) as error:
        harness.MetricsManager([{**entry, "coeff": 1}, other]).window([oracle.draw(0, [2])[1]])
    assert "MeanSquaredError; a coefficient of null for 'f'" in str(error.value)
    harness.MetricsManager([{**entry, "coeff": None}, other]).window([oracle.draw(0, [2])[1]])
    later = harness.MetricsManager([entry, other])
    later.check_accumulation()
    later.set_coeffs({"f": 1})  # as a schedule may do
    with pytest.raises(ValueError, match="'f' has the coefficient"):
        later.window([oracle.draw(0, [2])[1]])


def test_metrics_of_ones_own_that_are_linear_add_up():
    features, target = oracle.draw(1, [2, 3, 1, 4])
    entries = [{"field": "forces", "metric": metric, "coeff": 1} for metric in (Halved(), Inherited())]
    entries = [{**entry, "name": f"c{index}"} for index, entry in enumerate(entries)]
    whole, split = oracle.parameters(), oracle.parameters()
    harness.MetricsManager(entries)(oracle.predict(features, whole), target)["weighted_sum"].backward()
    accumulate([harness.MetricsManager(entries)], oracle.split(features, target, [1, 2]), split)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-10, atol=1e-12)


def test_metrics_of_others_are_watched_over_the_window():
    features, target = oracle.draw(1, [2, 3, 1, 4])
    entries: list[dict[str, Any]] = [
        {"name": "own", "field": "forces", "metric": harness.MeanSquaredError(), "coeff": 1},
        {"name": "theirs", "field": "forces", "metric": torchmetrics.MeanSquaredError(squared=False)},
        {"name": "rank", "field": "total_energy", "metric": torchmetrics.SpearmanCorrCoef()},
    ]
    manager = harness.MetricsManager(entries)
    seen = accumulate([manager], oracle.split(features, target, [1, 2]), oracle.parameters())
    assert seen[-1][0]["theirs"] == pytest.approx(math.sqrt(seen[-1][0]["own"]), rel=1e-12)
    assert math.isnan(seen[-1][0]["rank"])  # of lists of samples, nothing is known of several batches within a step
    assert math.isfinite(manager.compute()["rank"])


def test_modifiers_must_say_what_they_read_of_the_target():
    class Doubled:
        level = "node"

        def __call__(self, preds: Any, target: Any) -> Any:
            return 2 * preds["forces"], 2 * target["forces"]

        def __str__(self) -> str:
            return "doubled"

    class DoubledAlone(Doubled):
        def target_of(self, target: Any) -> Any:
            return 2 * target["forces"]

    def manager(modifier: Any) -> harness.MetricsManager:
        return harness.MetricsManager([{"field": modifier, "metric": harness.MeanSquaredError(), "coeff": 1}])

    features, target = oracle.draw(1, [2, 3, 1, 4])
    with pytest.raises(ValueError, match=r"modifier doubled of type Doubled has no method `target_of`.*def target_of"):
        manager(Doubled()).window([target])
    whole, split = oracle.parameters(), oracle.parameters()
    manager(Doubled())(oracle.predict(features, whole), target)["weighted_sum"].backward()
    accumulate([manager(DoubledAlone())], oracle.split(features, target, [1]), split)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "modifier",
    [harness.PerAtomModifier("total_energy", 1000.0), harness.MappedFieldModifier("pos", "forces"), "stress"],
)
def test_references_are_what_the_modifier_returns(modifier):
    modifier = harness.fields.as_modifier(modifier)[0]
    features, target = oracle.draw(1, [2, 3], unlabelled=0.3)
    preds = {**oracle.predict(features, oracle.parameters()), "pos": features["forces"][..., 0]}
    torch.testing.assert_close(modifier.target_of(target), modifier(preds, target)[1], equal_nan=True, rtol=0, atol=0)


def test_windows_that_are_used_wrongly():
    loss = oracle.manager(LOSS, TYPES)
    features, target = oracle.draw(0, [2, 3])
    preds = oracle.predict(features, oracle.parameters())
    with pytest.raises(ValueError, match="at least one micro-batch"):
        loss.window([])
    window = loss.window([target])
    harness.step_together(loss, preds=preds, target=target, window=window)
    with pytest.raises(ValueError, match="all of them have come"):
        harness.step_together(loss, preds=preds, target=target, window=window)
    with pytest.raises(ValueError, match="another manager"):
        harness.step_together(oracle.manager(LOSS, TYPES), preds=preds, target=target, window=loss.window([target]))
    window = loss.window([target, target])
    loss.set_coeffs({"forces_huber": 5})
    with pytest.raises(ValueError, match="in the middle of a step"):
        harness.step_together(loss, preds=preds, target=target, window=window)
    other = oracle.manager(LOSS, TYPES)
    _, changed = oracle.draw(0, [2, 3], unlabelled=0.5)
    window = other.window([changed])
    with pytest.raises(ValueError, match=r"had announced.*forces_huber"):
        harness.step_together(other, preds=preds, target=target, window=window)
    with pytest.raises(ValueError, match="No component has a coefficient"):
        harness.MetricsManager([{"field": "forces", "metric": harness.MeanSquaredError()}]).window([target])


ROOT = [
    *LOSS,
    Component("forces", "rmse", 1.0, True, ignore_nan=True),
    Component("stress", "max", 0.5, ignore_nan=True),
]


def ordinary_step(rank, world_size, explicit):
    """Values (hexadecimal), gradient, collectives and operators of a step of one batch, which merges its rows alone."""
    managers = [oracle.manager(ROOT, TYPES), oracle.manager(WATCHED, TYPES)]
    features, target = micro_batches(rank, "unequal")[1]
    theta = oracle.parameters()
    window = managers[0].window() if explicit else None
    merged = []

    def merge(additive, maxima, group):
        merged.append((additive.numel(), maxima.numel()))
        return merge_over_ranks(additive, maxima, group)

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("harness.metrics.row.merge_over_ranks", merge)
    with counted_collectives() as counted, Operators() as operators:
        values = harness.step_together(*managers, preds=oracle.predict(features, theta), target=target, window=window)
        values[0].weighted_sum.backward()
    numbers = [{name: number.hex() for name, number in each.to_host().items()} for each in values]
    monkeypatch.undo()
    rows = [manager.measure(target, target) for manager in managers]
    assert merged == [(sum(row.additive.numel() for row in rows), sum(row.maxima.numel() for row in rows))]
    return numbers, theta.grad.tolist(), dict(counted), operators.names


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_ordinary_step_is_a_window_of_one(world_size):
    """Also of a loss that cannot be accumulated: nothing of a batch is left to come."""
    given, made = (spawn(world_size, ordinary_step, explicit) for explicit in (True, False))
    assert given == made
    assert all(counted == ({"SUM": 1, "MAX": 1} if world_size > 1 else {}) for _, _, counted, _ in given)


def test_a_window_of_one_announces_nothing():
    loss = oracle.manager(LOSS, TYPES)
    features, target = oracle.draw(0, [2, 3])
    preds = oracle.predict(features, oracle.parameters())
    window = loss.window()
    assert (window.num_micro_batches, window.num_done, window.is_complete) == (1, 0, False)
    assert not window.is_announced
    assert window.counts is None
    row = loss.measure(preds, target)
    assert window.add(0, row) is row  # its own counts, and its graph
    harness.step_together(loss, preds=preds, target=target, window=window)
    assert window.is_complete
    with pytest.raises(ValueError, match="all of them have come"):
        harness.step_together(loss, preds=preds, target=target, window=window)
    window = loss.window()
    loss.set_coeffs({"forces_huber": 5})
    with pytest.raises(ValueError, match=r"in the middle of a step, after 0 of its 1 micro-batches, from \(.*\) to \("):
        harness.step_together(loss, preds=preds, target=target, window=window)
    window = loss.window([target, target])
    assert window.is_announced
    assert window.counts.tolist() == (2 * loss.count(target)).tolist()


def test_the_same_coefficients_set_anew_do_not_disturb_a_window():
    loss = oracle.manager(LOSS, TYPES)
    features, target = oracle.draw(0, [2, 3])
    preds = oracle.predict(features, oracle.parameters())
    window = loss.window([target, target])
    harness.step_together(loss, preds=preds, target=target, window=window)
    loss.set_coeffs({name: coeff for name, coeff in loss.given_coeffs.items() if coeff is not None})
    harness.step_together(loss, preds=preds, target=target, window=window)
    assert window.is_complete
