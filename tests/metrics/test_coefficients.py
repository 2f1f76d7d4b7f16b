"""Coefficients as a frozen snapshot: what makes a new one, who is given it, and what NequIP's callbacks read."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import numpy as np
import pytest
import torch
from support import oracle
from support.oracle import Component
from support.spawning import spawn

import harness
from harness.metrics import Coefficients
from harness.schedules import PiecewiseConstant

TYPES = ("H", "C", "O")
PARTS = [
    Component("forces", "rmse", 1.0, per_type=True, weights=(1.0, 2.0, 5.0)),
    Component("stress", "mse", None),
    Component("total_energy", "mse", 3.0),
    Component("forces", "mse", 0.0),
]
FORCES, STRESS, ENERGY, ZERO = (part.name for part in PARTS)


def build() -> harness.MetricsManager:
    return oracle.manager(PARTS, TYPES)


def test_a_snapshot_has_the_order_of_the_row() -> None:
    manager = build()
    by_name = dict(zip((each.name for each in manager.layout.components), manager.coefficients.coeffs, strict=True))
    assert by_name == {FORCES: 0.25, STRESS: None, ENERGY: 0.75, ZERO: 0.0}
    assert list(manager.coeffs) == list(manager) == [FORCES, STRESS, ENERGY, ZERO]  # users see their own order
    assert manager.coeffs == by_name
    assert sorted(manager.coefficients.slot_weights) == [1, 1, 1, 1, 2, 5]
    positions = [manager.layout.components[each].name for each in manager.coefficients.weighted]
    assert sorted(positions) == sorted([FORCES, ENERGY, ZERO])


def test_nothing_in_a_snapshot_or_an_entry_can_be_set() -> None:
    manager = build()
    with pytest.raises(dataclasses.FrozenInstanceError):
        manager.coefficients.coeffs = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        manager.entries[FORCES].coeff = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        manager.layout.components[0].given_coeff = 1.0  # type: ignore[misc]


def test_a_change_makes_a_new_snapshot_and_the_old_one_stays() -> None:
    manager = build()
    before = manager.coefficients
    numbers = before.coeffs, before.slot_weights
    manager.set_coeffs({ENERGY: 1})
    assert manager.coefficients is not before
    assert manager.coefficients != before
    changed = manager.coefficients
    manager.set_coeffs({FORCES: {"H": 7}})
    assert manager.coefficients != changed
    assert manager.coefficients.coeffs == changed.coeffs
    assert (before.coeffs, before.slot_weights) == numbers
    with pytest.raises(ValueError, match="negative"):
        manager.set_coeffs({ENERGY: 2, ZERO: -1})
    assert manager.coeffs[ENERGY] == 0.5


def test_the_same_numbers_are_the_same_snapshot() -> None:
    """So that its tensors are not copied to the device anew in every step of a schedule that stands still."""
    manager = build()
    manager(*batch())
    before = manager.coefficients
    manager.set_coeffs({FORCES: 2, ENERGY: 6})  # the ratio is the same
    assert manager.coefficients is before
    assert manager.given_coeffs == {FORCES: 2, STRESS: None, ENERGY: 6, ZERO: 0}
    manager.follow(PiecewiseConstant({0: {STRESS: 1}, 2: {STRESS: 2}}))
    seen = []
    for epoch in (0, 1, 1.5, 2, 3):
        manager.move_to(epoch)
        seen.append(manager.coefficients)
    assert seen[0] is seen[1] is seen[2] is not seen[3]
    assert seen[3] is seen[4] is not before
    assert Coefficients((1.0, None), (1.0, 1.0)) == Coefficients((1.0, None), (1.0, 1.0))
    assert Coefficients((1.0, None), (1.0, 1.0)) != Coefficients((1.0, 0.0), (1.0, 1.0))


def batch() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    features, target = oracle.draw(0, [2, 3])
    return oracle.predict(features, oracle.parameters()), target


def test_a_layout_evaluates_what_it_is_given() -> None:
    manager = build()
    row = manager.measure(*batch())
    weights = torch.tensor(manager.coefficients.slot_weights)
    equal = Coefficients(manager.coefficients.coeffs, tuple(torch.ones_like(weights).tolist()))
    found = [manager.layout.evaluate(row, coefficients) for coefficients in (manager.coefficients, equal)]
    position = [entry.name for entry in manager.layout.components].index(FORCES)
    given, plain = (each.components[position].item() for each in found)
    slots = [manager.evaluate(row).to_host()[f"{FORCES}_{name}"] for name in TYPES]
    assert given == pytest.approx((slots[0] + 2 * slots[1] + 5 * slots[2]) / 8, rel=1e-12)
    assert plain == pytest.approx(sum(slots) / 3, rel=1e-12)


def test_entries_have_the_coefficients_of_the_moment() -> None:
    """NequIP's callbacks read them as ``loss.entries[name].coeff``."""
    manager = build()
    taken = manager.entries
    assert {name: entry.coeff for name, entry in taken.items()} == manager.coeffs
    manager.set_coeffs({ENERGY: 1, FORCES: {"C": 4}})
    assert {name: entry.coeff for name, entry in manager.entries.items()} == manager.coeffs
    assert manager.entries[ENERGY].given_coeff == 1
    assert manager.entries[FORCES].per_type_coeffs == (1, 4, 5)
    assert (taken[ENERGY].coeff, taken[ENERGY].given_coeff, taken[FORCES].per_type_coeffs) == (0.75, 3, (1, 2, 5))
    assert manager.entries[ENERGY].metric is manager[ENERGY]


@pytest.mark.parametrize("through", [copy.deepcopy, lambda manager: pickle.loads(pickle.dumps(manager))])
def test_a_copy_has_coefficients_of_its_own(through) -> None:
    manager = build()
    expected = {name: value.item() for name, value in manager(*batch()).items()}
    twin = through(manager)
    assert twin.coefficients == manager.coefficients
    twin.set_coeffs({ENERGY: 100})
    assert {name: value.item() for name, value in manager(*batch()).items()} == expected
    assert twin(*batch())["weighted_sum"] != expected["weighted_sum"]


def test_a_schedule_that_is_refused_changes_nothing() -> None:
    manager = build()
    manager.follow(PiecewiseConstant({0: {STRESS: 1}, 2: {STRESS: 2}}))
    manager.move_to(2)
    before = manager.schedule, manager.position, manager.coefficients, manager.given_coeffs
    with pytest.raises(ValueError, match="at least one must be above 0"):
        manager.follow(PiecewiseConstant({0: {FORCES: 1}, 5: {FORCES: 0, ENERGY: 0, STRESS: 0}}))
    assert (manager.schedule, manager.position, manager.coefficients, manager.given_coeffs) == before


# --- coefficients as given ---

AS_GIVEN = [
    Component("total_energy", "mse", 2.0, ignore_nan=True, per_atom=True),
    Component("forces", "rmse", 40.0, per_type=True, weights=(1.0, 2.0, 5.0), ignore_nan=True),
    Component("stress", "huber", 0.5, ignore_nan=True),
    Component("forces", "mae", None, ignore_nan=True),
]
STAGES = {
    0: {"per_atom_total_energy_mse": 2},
    1: {"per_atom_total_energy_mse": 1},
    2: {"stress_huber": 0, "forces_rmse_by_type": 1000},
}
SUMS = {0: 42.5, 1: 41.5, 2: 1001.0}


def both(parts: list[Component] = AS_GIVEN, **options) -> list[harness.MetricsManager]:
    """The same loss with coefficients that are normalised, and as they were given."""
    entries = [part.entry(TYPES) for part in parts]
    return [harness.MetricsManager(entries, TYPES, coefficients=kind, **options) for kind in ("normalised", "as_given")]


def gradients(rank: int, world_size: int) -> list[list[list[float]]]:
    """Weighted sum and gradient of the parameters of every stage, normalised and as given; ranks share the frames."""
    found = []
    for manager in both(schedule=PiecewiseConstant(STAGES)):
        rows = []
        for epoch in STAGES:
            manager.move_to(epoch)
            theta, frames = oracle.parameters(), [oracle.draw(seed, [2, 3, 1], unlabelled=0.2) for seed in range(4)]
            features, target = (oracle.join([each[side] for each in frames[rank::world_size]]) for side in (0, 1))
            weighted_sum = manager(oracle.predict(features, theta), target)["weighted_sum"]
            (weighted_sum * harness.distributed.gradient_scale()).backward()
            gradient = harness.distributed.sum_over_ranks(theta.grad / world_size, None)
            rows.append([weighted_sum.item(), *gradient.tolist()])
        found.append(rows)
    return found


def test_gradients_of_coefficients_as_given_are_their_sum_times_those_of_normalised_ones() -> None:
    (one,), two = [gradients(0, 1)], spawn(2, gradients)
    for normalised, as_given in (one, *two):
        for number, total in enumerate(SUMS.values()):
            np.testing.assert_allclose(as_given[number], total * np.array(normalised[number]), rtol=1e-12)
    for found in two:
        np.testing.assert_allclose(found, one, rtol=1e-12)


def test_the_weighted_sum_of_coefficients_as_given_is_the_plain_sum() -> None:
    normalised, plain = both()
    assert plain.coeffs == plain.given_coeffs == {part.name: part.coeff for part in AS_GIVEN}
    for seed in range(3):
        features, target = oracle.draw(seed, [2, 3], unlabelled=0.2)
        (values,) = harness.step_together(plain, preds=oracle.predict(features, oracle.parameters()), target=target)
        report = values.to_report()
        terms = {part.name: part.coeff * report.values[part.name] for part in AS_GIVEN if part.coeff is not None}
        assert report.contributions == pytest.approx(terms, rel=1e-12)
        assert report.values["weighted_sum"] == pytest.approx(sum(terms.values()), rel=1e-12)
        assert report.coeffs == {name: plain.given_coeffs[name] for name in terms}
    plain.set_coeffs({"stress_huber": 7})
    normalised.set_coeffs({"stress_huber": 7})
    assert plain.coeffs["stress_huber"] == 7
    assert plain.coeffs["forces_rmse_by_type"] == 40
    assert normalised.coeffs["stress_huber"] == 7 / 49
    with pytest.raises(ValueError, match="at least one must be above 0"):
        plain.set_coeffs(dict.fromkeys(plain.coeffs, 0))
    with pytest.raises(ValueError, match=r"`coefficients` is normalised or as_given, found 'plain'.*`coeffs`"):
        harness.EnergyForceLoss(coefficients="plain")


def test_micro_batches_of_coefficients_as_given_make_up_the_batch() -> None:
    parts = [part for part in AS_GIVEN if part.error != "rmse"]
    frames = [oracle.draw(seed, [2, 1 + seed], unlabelled=0.2) for seed in range(3)]
    found = []
    for normalised, manager in zip((True, False), both(parts), strict=True):
        theta = oracle.parameters()
        window = manager.window([target for _, target in frames])
        for features, target in frames:
            preds = oracle.predict(features, theta)
            (values,) = harness.step_together(manager, preds=preds, target=target, window=window)
            values.weighted_sum.backward()
        scale = 2.5 if normalised else 1.0
        found.append([scale * values.weighted_sum.item(), *(scale * theta.grad).tolist()])
    np.testing.assert_allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("moved", [False, True])
def test_a_checkpoint_of_the_other_kind_is_followed_by_the_configuration(moved: bool) -> None:
    normalised, plain = both()
    assert "normalisation" not in normalised.get_extra_state()["coeffs"]  # as version 0.1.0 wrote it
    for before, after in ((0, 1), (1, 0)):
        managers = both()
        if moved:
            managers[before].set_coeffs({"stress_huber": 9})
        with pytest.warns(UserWarning, match=r"coefficients (as_given|normalised), this run.*configuration is used"):
            managers[after].load_state_dict(managers[before].state_dict())
        assert managers[after].coeffs == both()[after].coeffs
    plain.set_coeffs({"stress_huber": 9})
    again = both()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(plain.state_dict())
    assert again.coeffs == plain.coeffs
    assert again.coeffs["stress_huber"] == 9
