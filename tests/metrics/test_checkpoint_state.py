"""The accumulated row and the coefficients go through checkpoints, on the same or another number of ranks."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from support import oracle
from support.oracle import Component
from support.spawning import spawn
from torchmetrics import CosineSimilarity, PearsonCorrCoef, SpearmanCorrCoef

import harness
from harness.metrics.adapters import why_not_mergeable

pytestmark = pytest.mark.filterwarnings("ignore:No data in the whole epoch")

TYPES = ("H", "C", "O")
PARTS = [
    Component("total_energy", "mse", 1.0, per_atom=True),
    Component("forces", "rmse", 3.0, per_type=True, ignore_nan=True),
    Component("forces", "max", None, per_type=True, ignore_nan=True),
    Component("stress", "huber_sum", None),
]


def build(gathered=False):
    entries = [part.entry(TYPES) for part in PARTS]
    if gathered:
        entries.append({"name": "cosine", "field": "forces", "metric": CosineSimilarity(reduction="mean")})
        entries.append({"name": "pearson", "field": "charge", "metric": PearsonCorrCoef()})
    return harness.MetricsManager(entries, TYPES)


def draw(seed):
    features, target = oracle.draw(seed, [2, 1 + seed % 3])
    random = torch.Generator().manual_seed(seed)
    features["charge"] = torch.rand(len(target["forces"]), oracle.NUM_PARAMETERS, generator=random, dtype=torch.float64)
    target["charge"] = torch.rand(len(target["forces"]), generator=random, dtype=torch.float64)
    return features, target


def feed(manager, seeds):
    for seed in seeds:
        features, target = draw(seed)
        with torch.set_grad_enabled(seed % 2 == 0 and not any(map(why_not_mergeable, manager.values()))):
            manager(oracle.predict(features, oracle.parameters()), target)


def as_floats(values):
    return {name: value.item() for name, value in values.items()}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        # CosineSimilarity works in float32, and PearsonCorrCoef joins by a formula of its own
        rtol = {"cosine": 1e-6, "pearson": 1e-9}.get(name, 1e-12)
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_restart_in_the_middle_of_an_epoch(gathered):
    uninterrupted = build(gathered)
    feed(uninterrupted, range(6))
    before = build(gathered)
    feed(before, range(3))
    after = build(gathered)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.load_state_dict(through_a_file(before.state_dict()))
    assert_close(as_floats(after.compute()), as_floats(before.compute()))
    feed(after, range(3, 6))
    assert_close(as_floats(after.compute()), as_floats(uninterrupted.compute()))
    after.reset()
    feed(after, range(6))
    assert as_floats(after.compute()) == as_floats(uninterrupted.compute())


def test_loading_replaces_what_was_accumulated():
    before, after = build(True), build(True)
    feed(before, range(3))
    feed(after, range(10, 20))
    after.load_state_dict(before.state_dict())
    assert_close(as_floats(after.compute()), as_floats(before.compute()))


def test_an_empty_state():
    after = build(True)
    feed(after, [1])
    after.load_state_dict(through_a_file(build(True).state_dict()))
    assert all(np.isnan(value) for name, value in as_floats(after.compute()).items() if name != "weighted_sum")


def test_a_state_after_inference_mode():
    before = build(True)
    with torch.inference_mode():
        feed(before, range(3))
    after = build(True)
    after.load_state_dict(through_a_file(before.state_dict()))
    feed(after, [3])
    feed(before, [3])
    assert_close(as_floats(after.compute()), as_floats(before.compute()))


# --- coefficients ---


def test_coefficients_are_restored():
    before, after = build(), build()
    before.set_coeffs({"stress_huber_sum": 4, "forces_rmse_by_type": None})
    after.load_state_dict(through_a_file(before.state_dict()))
    assert after.given_coeffs == before.given_coeffs
    assert after.coeffs == before.coeffs


def test_changed_coefficients_in_the_configuration_win_with_a_warning():
    before, after = build(), build()
    feed(before, range(2))
    before.set_coeffs({"stress_huber_sum": 4})
    changed = [Component(**{**vars(part), "coeff": 7.0}) for part in PARTS]
    after = oracle.manager(changed, TYPES)
    with pytest.warns(UserWarning, match=r"(?s)coefficients.*3\.0.*7\.0.*configuration is used"):
        after.load_state_dict(before.state_dict())
    assert after.given_coeffs == dict.fromkeys(after.entries, 7.0)
    values, expected = as_floats(after.compute()), as_floats(before.compute())
    assert {**values, "weighted_sum": 0} == {**expected, "weighted_sum": 0}


# --- other components ---

OTHERS = {
    "a component more": [*PARTS, Component("stress", "mae", None)],
    "a component less": PARTS[:-1],
    "another metric": [*PARTS[:-1], Component("stress", "huber", None)],
    "other types": PARTS,
}


@pytest.mark.parametrize("change", OTHERS)
def test_with_other_components_the_epoch_starts_anew(change):
    before = build()
    feed(before, range(2))
    types = ("H", "C", "N") if change == "other types" else TYPES
    after = oracle.manager(OTHERS[change], types)
    with pytest.warns(UserWarning, match="starts anew"):
        after.load_state_dict(before.state_dict())
    fresh = oracle.manager(OTHERS[change], types)
    for manager in (after, fresh):
        feed(manager, [3])
    assert_close(as_floats(after.compute()), as_floats(fresh.compute()))


def test_a_changed_delta_is_another_component():
    def huber(delta):
        metric = harness.HuberLoss(delta=delta)
        return harness.MetricsManager([{"field": "forces", "metric": metric, "name": "huber"}])

    before, after = huber(1.0), huber(0.5)
    feed(before, [1])
    with pytest.warns(UserWarning, match="starts anew"):
        after.load_state_dict(before.state_dict())


def test_between_epochs_other_components_are_no_matter():
    before, after = oracle.manager(PARTS[2:], TYPES), oracle.manager([Component("forces", "mse")])
    feed(before, [1])
    before.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starts anew")
        after.load_state_dict(before.state_dict())


class Halved:
    """A modifier without a name or equality of its own."""

    level = "node"

    def __call__(self, preds, target):
        return preds["forces"] / 2, target["forces"] / 2


def test_a_users_modifier_is_the_same_component_after_a_restart():
    before, after = (
        harness.MetricsManager([{"name": "half", "field": Halved(), "metric": harness.MeanSquaredError}])
        for _ in range(2)
    )
    feed(before, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.load_state_dict(before.state_dict())
    assert as_floats(after.compute()) == as_floats(before.compute())


# --- ranks ---


def save(rank, world_size, seeds_of):
    """Half an epoch, merged and saved as rank 0 would; the epoch goes on afterwards."""
    manager = build(gathered=True)
    feed(manager, seeds_of[rank])
    before = as_floats(manager.compute())
    harness.merge_accumulated([manager])
    state = manager.state_dict()
    assert as_floats(manager.compute()) == pytest.approx(before, rel=1e-12)
    feed(manager, [50 + rank])
    return state, as_floats(manager.compute())


def resume(rank, world_size, state, seeds_of):
    manager = build(gathered=True)
    manager.load_state_dict(through_a_file(state))
    feed(manager, seeds_of[rank])
    first = as_floats(manager.compute())
    assert first == as_floats(manager.compute())
    return first


@pytest.mark.parametrize("ranks_after", [1, 2, 3])
@pytest.mark.parametrize("ranks_before", [1, 2])
def test_a_restart_on_another_number_of_ranks(ranks_before, ranks_after):
    first, rest = list(range(5)), list(range(5, 11))
    states, values = zip(*spawn(ranks_before, save, [first[rank::ranks_before] for rank in range(2)]), strict=True)
    assert all(
        torch.equal(state["_extra_state"]["additive"], states[0]["_extra_state"]["additive"]) for state in states
    )

    uninterrupted = build(gathered=True)
    feed(uninterrupted, first)
    feed(uninterrupted, [50 + rank for rank in range(ranks_before)])
    for value in values:  # saving disturbs nothing
        assert_close(value, as_floats(uninterrupted.compute()))

    uninterrupted.reset()
    feed(uninterrupted, first + rest)
    shares = [rest[rank::ranks_after] for rank in range(ranks_after)]
    if ranks_after == 3:
        shares = [rest[:4], rest[4:], []]
    results = spawn(ranks_after, resume, states[-1], shares)
    assert all(result == results[0] for result in results)
    assert_close(results[0], as_floats(uninterrupted.compute()))


def test_a_modifier_with_another_factor_is_another_component():
    def build_scaled(factor):
        field = harness.PerAtomModifier("total_energy", factor)
        return harness.MetricsManager([{"name": "energy", "field": field, "metric": harness.MeanAbsoluteError()}])

    batch = {"total_energy": torch.ones(2, 1), "num_atoms": torch.tensor([2, 4])}
    manager = build_scaled(None)
    manager(batch, {**batch, "total_energy": torch.zeros(2, 1)})
    with pytest.warns(UserWarning, match="other components"):
        build_scaled(1000.0).load_state_dict(manager.state_dict())


STATE_OF_0_1_0 = {
    "layout": [
        "F_mse: MeanSquaredError{'parameters': ()} of PlainField(field='forces') per type",
        "E_max_ae: MaximumAbsoluteError{'maximum_MaximumAbsoluteError_fb4c9eb0': -inf, 'parameters': ()} of "
        "PlainField(field='total_energy')",
        "rank: SpearmanCorrCoef{'num_outputs': 1, 'preds': [], 'target': []} of PlainField(field='total_energy')",
        "H",
        "O",
    ],
    "coeffs": {
        "given": {"F_mse": 3.0, "E_max_ae": 2.0, "rank": None, "F_mse_H": 1.0, "F_mse_O": 2.0},
        "configured": {"F_mse": 3.0, "E_max_ae": 1.0, "rank": None, "F_mse_H": 1.0, "F_mse_O": 2.0},
        "schedule": None,
        "position": [0.0, None],
    },
    "additive": torch.tensor([1.0, 13.0, 3.0, 6.0], dtype=torch.float64),
    "maxima": torch.tensor([2.0], dtype=torch.float64),
    "deferred": [[{"preds": [torch.tensor([[1.5], [4.0]])], "target": [torch.tensor([[1.0], [2.0]])]}]],
}
"""As version 0.1.0 wrote it, in the middle of an epoch and after ``set_coeffs({"E_max_ae": 2})``."""


def test_a_state_of_0_1_0_goes_on() -> None:
    def build() -> harness.MetricsManager:
        forces = {"field": "forces", "metric": harness.MeanSquaredError(), "coeff": 3}
        return harness.MetricsManager(
            [
                {**forces, "per_type": True, "per_type_coeffs": {"H": 1, "O": 2}},
                {"field": "total_energy", "metric": harness.MaximumAbsoluteError(), "coeff": 1},
                {"name": "rank", "field": "total_energy", "metric": SpearmanCorrCoef()},
            ],
            ["H", "O"],
        )

    manager = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.load_state_dict({"_extra_state": STATE_OF_0_1_0})
        values = as_floats(manager.compute())
    assert values == pytest.approx(
        {"F_mse_H": 1 / 3, "F_mse_O": 13 / 6, "F_mse": 14 / 9, "E_max_ae": 2, "rank": 1, "weighted_sum": 26 / 15},
        rel=1e-5,
    )
    assert manager.given_coeffs == {"F_mse": 3, "E_max_ae": 2, "rank": None}
    state = manager.get_extra_state()
    assert repr(state) == repr(STATE_OF_0_1_0)
    again = build()
    again.load_state_dict({"_extra_state": through_a_file(state)})
    assert as_floats(again.compute()) == values
