"""Weights of frames: a frame of weight w counts as w frames do, in sums and counts, whatever the error."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.accumulation_cases import LOSS, TYPES, WATCHED
from support.frames import chosen, repeated, weighted
from support.oracle import Component
from support.spawning import spawn

import harness
from harness.distributed import gradient_scale

pytestmark = pytest.mark.filterwarnings("ignore:No data in the whole epoch")

ERRORS = [error for error in oracle.METRICS if not error.startswith("stratified")]
COMPONENTS = [
    *[Component("total_energy", error, 1.0, per_atom=True) for error in ERRORS],
    *[Component("stress", error, 1.0) for error in ERRORS],
    *[Component("forces", error, 1.0) for error in oracle.METRICS],
    *[Component("forces", error, 1.0, True, (1.0, 0.5, 3.0)) for error in oracle.METRICS],
]


def with_mask(components):
    return [Component(**{**vars(component), "ignore_nan": True}) for component in components]


def expected_of(components, features, target, types=TYPES):
    """Values and gradient of the oracle on repeated frames, each component with the weights of its own label."""
    values, gradient, weighted_sum = {}, 0.0, 0.0
    total = math.fsum(component.coeff or 0.0 for component in components)
    for component in components:
        of_field = repeated(features, target, component.field)
        preds = oracle.predict(of_field[0], oracle.parameters())
        found = oracle.values([component], preds, of_field[1], types)
        found.pop("weighted_sum", None)
        values |= found
        if component.coeff and not math.isnan(found[component.name]):
            weighted_sum += component.coeff / total * found[component.name]
            gradient = gradient + component.coeff / total * oracle.gradient([component], *of_field, types)
    return values | {"weighted_sum": weighted_sum}, gradient


def assert_values(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=5, unique_by=lambda component: component.name),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.3]),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 2**31),
)
def test_whole_weights_are_repeated_frames(components, atoms, unlabelled, cuts, seed):
    components = with_mask(components)
    features, target = oracle.draw(seed, atoms, unlabelled=unlabelled)
    target |= weighted(seed, len(atoms))
    expected, gradient = expected_of(components, features, target)
    manager, theta = oracle.manager(components, TYPES), oracle.parameters()
    (values,) = harness.step_together(manager, preds=oracle.predict(features, theta), target=target)
    assert_values(values.to_host(), expected)
    values.weighted_sum.backward()
    np.testing.assert_allclose(theta.grad.numpy(), gradient, rtol=1e-12, atol=1e-12)
    # and in any split into batches
    manager.reset()
    with torch.no_grad():
        for part, labels in oracle.split(features, target, [min(cut, len(atoms)) for cut in cuts]):
            manager(oracle.predict(part, theta), labels)
    assert_values({name: value.item() for name, value in manager.compute().items()}, expected)


def on_rank(rank, world_size, sizes, micro):
    """A step of a weighted loss with metrics beside it, and the epoch, on this rank's frames."""
    managers = [oracle.manager(LOSS, TYPES), oracle.manager(WATCHED, TYPES)]
    theta = oracle.parameters()
    parts = [part_of(rank, number, atoms) for number, atoms in enumerate(sizes[rank])]
    window = managers[0].window([target for _, target in parts]) if micro else None
    for features, target in parts:
        values = harness.step_together(*managers, preds=oracle.predict(features, theta), target=target, window=window)
        (values[0].weighted_sum * gradient_scale()).backward()
    averaged = theta.grad.clone()
    if world_size > 1:
        torch.distributed.all_reduce(averaged)
    epoch = [each.to_host() for each in harness.compute_together(managers)]
    return (averaged / world_size).numpy(), [each.to_host() for each in values], epoch


def part_of(rank, number, atoms):
    features, target = oracle.draw(10 * rank + number, atoms, unlabelled=0.2)
    return features, target | weighted(10 * rank + number, len(atoms))


@pytest.mark.parametrize("micro", [False, True], ids=["step", "accumulation window"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_and_micro_batches_give_repeated_frames(world_size, micro):
    sizes = [[[2, 5, 1], [3, 2, 2]], [[4, 1], []]] if micro else [[[2, 5, 1]], [[4, 1]]]
    everything = [
        part_of(rank, number, atoms) for rank in range(world_size) for number, atoms in enumerate(sizes[rank])
    ]
    features, target = (oracle.join(part) for part in zip(*everything, strict=True))
    loss, gradient = expected_of(LOSS, features, target)
    watched, _ = expected_of(WATCHED, features, target)
    watched.pop("weighted_sum")
    ranks = spawn(world_size, on_rank, sizes, micro)
    for found, values, epoch in ranks:
        np.testing.assert_allclose(found, gradient, rtol=1e-12, atol=1e-12)
        for each in (values, epoch):
            assert_values(each[0], loss)
            assert_values(each[1], watched)
        assert (found == ranks[0][0]).all()
        assert str((values, epoch)) == str(ranks[0][1:])  # bitwise, NaN included


@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0])
def test_means_depend_on_ratios_of_weights_alone(factor):
    """Sums of weights below 1, too, are what a mean is divided by."""
    components = with_mask([each for each in COMPONENTS if not each.error.endswith("_sum")])
    features, target = oracle.draw(3, [2, 1, 4, 3])
    target["weight"] = torch.tensor([0.25, 1.5, 0.0, 0.4], dtype=torch.float64)
    preds = oracle.predict(features, oracle.parameters())
    plain, scaled = (
        oracle.manager(components, TYPES)(preds, target | {"weight": scale * target["weight"]}) for scale in (1, factor)
    )
    assert_values({k: v.item() for k, v in scaled.items()}, {k: v.item() for k, v in plain.items()})
    error = (preds["stress"] - target["stress"]).detach().numpy() ** 2
    expected = np.average(error.mean((1, 2)), weights=target["weight"].numpy())
    np.testing.assert_allclose(plain["stress_mse"].item(), expected, rtol=1e-13)


def test_a_frame_of_weight_0_counts_nowhere_and_gives_no_gradient():
    """Not even if its labels are NaN, its predictions infinite, and nothing else masks them."""
    features, target = oracle.draw(0, [2, 3, 1])
    target["weight"] = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    rows = {"total_energy": slice(1, 2), "stress": slice(1, 2), "forces": slice(2, 5)}
    for name, of_frame in rows.items():
        target[name][of_frame] = math.nan
        preds[name][of_frame] = math.inf
        preds[name].requires_grad_()
    values = oracle.manager(COMPONENTS, TYPES)(preds, target)
    values["weighted_sum"].backward()
    others = chosen(features, target, [0, 2, 2])
    expected = oracle.values(COMPONENTS, oracle.predict(others[0], oracle.parameters()), others[1], TYPES)
    assert_values({name: value.item() for name, value in values.items()}, expected)
    for name, of_frame in rows.items():
        assert (preds[name].grad[of_frame] == 0).all()
        assert preds[name].grad.isfinite().all()
        assert preds[name].grad.any()


def test_only_weights_of_0_are_no_data():
    features, target = oracle.draw(0, [2, 3])
    target["energy_weight"] = torch.zeros(2, dtype=torch.float64)
    components = [Component("total_energy", "mse", 1.0), Component("forces", "mse", 1.0)]
    manager, theta = oracle.manager(components), oracle.parameters()
    values = manager(oracle.predict(features, theta), target)
    assert values["total_energy_mse"].isnan()
    assert values["weighted_sum"] == values["forces_mse"] / 2
    target["forces_weight"] = torch.zeros(2, dtype=torch.float64)
    values = manager(oracle.predict(features, theta), target)
    assert values["weighted_sum"] == 0
    values["weighted_sum"].backward()
    assert (theta.grad == 0).all()


def test_weights_may_count_in_sums_alone_or_not_at_all():
    features, target = oracle.draw(1, [2, 1, 3])
    preds = oracle.predict(features, oracle.parameters())
    weights = np.array([2.0, 0.0, 0.5])
    target["weight"], target["energy_weight"] = torch.tensor(weights), torch.tensor([1.0, 3.0, 4.0]).double()
    entries = [
        {"name": f"{field}_{mode}", "field": field, "metric": harness.MeanSquaredError(), "weights": mode, "coeff": 1}
        for field in ("total_energy", "forces")
        for mode in (True, "in_sums", False)
    ]
    manager = harness.MetricsManager(entries)
    window = manager.window([target])
    (step,) = harness.step_together(manager, preds=preds, target=target, window=window)
    found = step.to_host()
    energy = ((preds["total_energy"] - target["total_energy"]).detach().numpy() ** 2)[:, 0]
    forces = ((preds["forces"] - target["forces"]).detach().numpy() ** 2).mean(1)
    for field, errors, of_rows in [
        ("total_energy", energy, weights * [1, 3, 4]),
        ("forces", forces, np.repeat(weights, [2, 1, 3])),
    ]:
        np.testing.assert_allclose(found[f"{field}_True"], (of_rows * errors).sum() / of_rows.sum(), rtol=1e-13)
        np.testing.assert_allclose(found[f"{field}_in_sums"], (of_rows * errors).mean(), rtol=1e-13)
        np.testing.assert_allclose(found[f"{field}_False"], errors.mean(), rtol=1e-13)


def test_metrics_of_others_leave_out_frames_of_weight_0():
    features, target = oracle.draw(1, [2, 1, 3])
    target["weight"] = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    entry = {"name": "mae", "field": "total_energy", "metric": torchmetrics.MeanAbsoluteError()}
    manager = harness.MetricsManager([entry])
    with pytest.warns(UserWarning, match="'mae': MeanAbsoluteError knows no weights of frames") as told:
        found = manager(preds, target)["mae"].item()
    assert len(told) == 1
    error = (preds["total_energy"] - target["total_energy"]).abs()[[0, 2]]
    np.testing.assert_allclose(found, error.mean().item(), rtol=1e-6)
    with warnings.catch_warnings():  # nothing is ignored where weights are switched off, or are of another label
        warnings.simplefilter("error")
        manager(preds, target)  # it was told once
        harness.MetricsManager([{**entry, "weights": False}])(preds, target)
        target["forces_weight"] = target.pop("weight")
        harness.MetricsManager([entry])(preds, target)
    for asked in (True, "in_sums"):
        with pytest.raises(ValueError, match=f"'mae' has `weights: {asked}`, but MeanAbsoluteError knows no weights"):
            harness.MetricsManager([{**entry, "weights": asked}])


OF_SEVERAL_SUMS = [
    {"name": "rel_mae", "field": "forces", "metric": harness.metrics.RelativeMeanAbsoluteError()},
    {"name": "rel_rmse", "field": "forces", "metric": harness.metrics.RelativeRootMeanSquaredError(), "weights": True},
    {"name": "rel_type", "field": "forces", "metric": harness.metrics.RelativeMeanAbsoluteError(), "per_type": True},
    {"name": "median", "field": "forces", "metric": harness.metrics.ErrorQuantile(0.5)},
    {"name": "q90", "field": "total_energy", "metric": harness.metrics.ErrorQuantile(0.9, relative_error=0.001)},
    {"name": "of_forces", "metric": harness.metrics.MeanOverStructures("forces", "rmse")},
    {"name": "of_energies", "metric": harness.metrics.MeanOverStructures("total_energy")},
    {"name": "efwt", "metric": harness.metrics.EnergyForcesWithinThreshold(1.0, 2.0)},
]


def test_measures_of_several_sums_have_the_values_of_repeated_frames():
    features, target = oracle.draw(4, [2, 1, 3, 2, 4, 1])
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    weights = [2, 0, 1, 3, 1, 4]
    weighted_target = target | {"weight": torch.tensor(weights, dtype=torch.float64)}
    again = [frame for frame, weight in enumerate(weights) for _ in range(weight)]
    others = chosen(features, target, again)
    expected = harness.MetricsManager(OF_SEVERAL_SUMS, type_names=TYPES)(
        oracle.predict(others[0], oracle.parameters()), others[1]
    )
    expected = {name: value.item() for name, value in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        manager = harness.MetricsManager(OF_SEVERAL_SUMS, type_names=TYPES)
        found = manager(preds, weighted_target)
    assert_values({name: value.item() for name, value in found.items()}, expected)
    assert 0 < expected["efwt"] < 1
    # each frame once
    once = [{**entry, "weights": False} for entry in OF_SEVERAL_SUMS]
    plain = harness.MetricsManager(once, type_names=TYPES)(preds, weighted_target)
    unweighted = harness.MetricsManager(OF_SEVERAL_SUMS, type_names=TYPES)(preds, target)
    for name, value in plain.items():
        torch.testing.assert_close(value, unweighted[name], rtol=0, atol=0, equal_nan=True)
    assert all(plain[name].item() != expected[name] for name in ("rel_mae", "rel_rmse", "of_forces", "of_energies"))
    for entry in OF_SEVERAL_SUMS[:5]:  # those of structures are a sum and a count
        with pytest.raises(ValueError, match="has weights in all of its sums, or in none"):
            harness.MetricsManager([{**entry, "weights": "in_sums"}], type_names=TYPES)
    # quantiles depend on ratios of weights alone
    small = manager.evaluate(manager.measure(preds, weighted_target | {"weight": 0.01 * weighted_target["weight"]}))
    assert_values(small.to_host(), expected)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        ([1.0, -1.0], ValueError, r"'forces_weight' has weights from -1 to 1; .* finite and not negative"),
        ([1.0, math.nan], ValueError, r"finite and not negative"),
        ([1.0, math.inf], ValueError, r"finite and not negative"),
        ([1.0, 1.0, 1.0], ValueError, r"of 3 frames, with 3 rows of the level graph, .* shape \[2, 1\]"),
    ],
)
def test_weights_that_are_none(weight, error, words):
    features, target = oracle.draw(0, [2, 3])
    name = "forces_weight" if len(weight) == 2 else "weight"
    target[name] = torch.tensor(weight, dtype=torch.float64)
    manager = oracle.manager([Component("total_energy", "mse")])
    with pytest.raises(error, match=words):
        manager(oracle.predict(features, oracle.parameters()), target)


@pytest.mark.parametrize("given", ["sums", 2, {}])
def test_a_switch_that_is_none(given):
    with pytest.raises((TypeError, ValueError), match=r"'mse': `weights` is true .* in_sums .* or false, found"):
        harness.MetricsManager(
            [{"name": "mse", "field": "forces", "metric": harness.MeanSquaredError(), "weights": given}]
        )
