"""Coefficients as a frozen snapshot: what makes a new one, who is given it, and what NequIP's callbacks read."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from support import oracle
from support.oracle import Component

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
    by_name = dict(
        zip((each.name for each in manager._layout.components), manager.coefficients.normalised, strict=True)
    )
    assert by_name == {FORCES: 0.25, STRESS: None, ENERGY: 0.75, ZERO: 0.0}
    assert list(manager.coeffs) == list(manager) == [FORCES, STRESS, ENERGY, ZERO]  # users see their own order
    assert manager.coeffs == by_name
    assert sorted(manager.coefficients.slot_weights) == [1, 1, 1, 1, 2, 5]
    positions = [manager._layout.components[each].name for each in manager.coefficients.weighted]
    assert sorted(positions) == sorted([FORCES, ENERGY, ZERO])


def test_nothing_in_a_snapshot_or_an_entry_can_be_set() -> None:
    manager = build()
    with pytest.raises(dataclasses.FrozenInstanceError):
        manager.coefficients.normalised = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        manager.entries[FORCES].coeff = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        manager._layout.components[0].given_coeff = 1.0  # type: ignore[misc]


def test_a_change_makes_a_new_snapshot_and_the_old_one_stays() -> None:
    manager = build()
    before = manager.coefficients
    numbers = before.normalised, before.slot_weights
    manager.set_coeffs({ENERGY: 1})
    assert manager.coefficients is not before
    assert manager.coefficients != before
    changed = manager.coefficients
    manager.set_coeffs({FORCES: {"H": 7}})
    assert manager.coefficients != changed
    assert manager.coefficients.normalised == changed.normalised
    assert (before.normalised, before.slot_weights) == numbers
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
    equal = Coefficients(manager.coefficients.normalised, tuple(torch.ones_like(weights).tolist()))
    found = [manager._layout.evaluate(row, coefficients) for coefficients in (manager.coefficients, equal)]
    position = [entry.name for entry in manager._layout.components].index(FORCES)
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
