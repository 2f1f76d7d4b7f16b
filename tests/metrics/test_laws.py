"""Laws of a manager for any data: how it is cut and ordered makes no difference, and what is logged adds up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import oracle
from support.oracle import Component

pytestmark = pytest.mark.filterwarnings("ignore:No data in the whole epoch")

TYPES = ("H", "C", "O")

errors = st.sampled_from([error for error in oracle.METRICS if not error.startswith("stratified")])
coeffs = st.one_of(st.none(), st.just(0.0), st.floats(1e-3, 1e3))
weights = st.one_of(st.none(), st.tuples(*[st.floats(0.1, 10)] * 3))


@st.composite
def components(draw, ignore_nan=True):
    """One to five components with distinct names."""
    kinds = [
        lambda: Component(draw(st.sampled_from(["total_energy", "stress"])), draw(errors), draw(coeffs), False),
        lambda: Component("total_energy", draw(errors), draw(coeffs), per_atom=True),
        lambda: Component("forces", draw(st.sampled_from(sorted(oracle.METRICS))), draw(coeffs)),
        lambda: Component("forces", draw(st.sampled_from(sorted(oracle.METRICS))), draw(coeffs), True, draw(weights)),
    ]
    chosen = [draw(st.sampled_from(kinds))() for _ in range(draw(st.integers(1, 5)))]
    unique = {component.name: component for component in chosen}.values()
    given_coeffs = [component.coeff for component in unique if component.coeff is not None]
    assume(not given_coeffs or sum(given_coeffs) > 0)
    return [Component(**{**vars(component), "ignore_nan": ignore_nan}) for component in unique]


atoms = st.lists(st.integers(1, 5), min_size=1, max_size=6)
types = st.sampled_from([(0, 1, 2), (0,), (1, 2)])
unlabelled = st.sampled_from([0.0, 0.3, 0.9, 1.0])
seeds = st.integers(0, 2**31)


def as_floats(values):
    return {name: value.item() for name, value in values.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-12, err_msg=name)


@settings(max_examples=100)
@given(components(), atoms, types, unlabelled, seeds)
def test_values_and_gradients_are_those_of_the_oracle(parts, atoms, types, unlabelled, seed):
    features, target = oracle.draw(seed, atoms, types, unlabelled)
    theta = oracle.parameters()
    manager = oracle.manager(parts, TYPES)
    step = manager(oracle.predict(features, theta), target)
    expected = oracle.values(parts, oracle.predict(features, theta), target, TYPES)
    assert_close(as_floats(step), expected)
    if "weighted_sum" in step:
        step["weighted_sum"].backward()
        np.testing.assert_allclose(theta.grad, oracle.gradient(parts, features, target, TYPES), rtol=1e-10, atol=1e-12)
    assert_close(as_floats(manager.compute()), expected)


@settings(max_examples=50)
@given(components(), atoms, unlabelled, seeds, st.lists(st.integers(0, 6), max_size=4), st.randoms())
def test_any_split_into_batches_in_any_order_gives_the_same_epoch(parts, atoms, unlabelled, seed, cuts, random):
    features, target = oracle.draw(seed, atoms, unlabelled=unlabelled)
    batches = oracle.split(features, target, [min(cut, len(atoms)) for cut in cuts])  # some may be empty
    random.shuffle(batches)
    manager = oracle.manager(parts, TYPES)
    with torch.no_grad():
        for some_features, some_target in batches:
            manager(oracle.predict(some_features, oracle.parameters()), some_target)
    assert_close(
        as_floats(manager.compute()),
        oracle.values(parts, oracle.predict(features, oracle.parameters()), target, TYPES),
    )


@settings(max_examples=50)
@given(components(), atoms, unlabelled, seeds, seeds)
def test_rows_of_two_batches_merge_into_the_row_of_both(parts, atoms, unlabelled, seed, other_seed):
    batches = [oracle.draw(seed, atoms, unlabelled=unlabelled), oracle.draw(other_seed, [2, 1], types=(0,))]
    both = tuple(oracle.join(part) for part in zip(*batches, strict=True))
    manager = oracle.manager(parts, TYPES)
    one, other, whole = (
        manager.measure(oracle.predict(features, oracle.parameters()), target).detach()
        for features, target in (*batches, both)
    )
    for merged in (one.merge(other), other.merge(one)):
        np.testing.assert_allclose(merged.additive, whole.additive, rtol=1e-12, atol=1e-12)
        assert torch.equal(merged.maxima, whole.maxima)


@settings(max_examples=50)
@given(components(), atoms, types, unlabelled, seeds)
def test_what_is_logged_adds_up(parts, atoms, types, unlabelled, seed):
    features, target = oracle.draw(seed, atoms, types, unlabelled)
    manager = oracle.manager(parts, TYPES)
    for values in (manager(oracle.predict(features, oracle.parameters()), target), manager.compute()):
        assert ("weighted_sum" in values) == any(component.coeff is not None for component in parts)
        if "weighted_sum" in values:
            terms = [
                entry.coeff * values[name].item()
                for name, entry in manager.entries.items()
                if entry.coeff and not values[name].isnan()
            ]
            np.testing.assert_allclose(values["weighted_sum"].item(), math.fsum(terms), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(sum(entry.coeff or 0 for entry in manager.entries.values()), 1, rtol=1e-12)


@settings(max_examples=50)
@given(
    components(ignore_nan=False),
    atoms,
    seeds,
    st.integers(0, 10**6),
    st.sampled_from(["total_energy", "forces", "stress"]),
)
def test_an_unmasked_nan_shows_where_it_is_and_nowhere_else(parts, atoms, seed, where, field):
    features, target = oracle.draw(seed, atoms)
    labels = target[field].reshape(-1)
    labels[where % len(labels)] = math.nan
    manager = oracle.manager(parts, TYPES)
    values = as_floats(manager(oracle.predict(features, oracle.parameters()), target))
    for component in parts:
        assert math.isnan(values[component.name]) == (component.field == field)
    if "weighted_sum" in values:
        poisoned = any(component.coeff and component.field == field for component in parts)
        assert math.isnan(values["weighted_sum"]) == poisoned


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), st.floats(1e-3, 1e3))
def test_only_ratios_of_coefficients_matter(given_coeffs, factor):
    assume(sum(given_coeffs) > 1e-3)
    names = ["total_energy", "forces", "stress"]

    def normalised(scale):
        parts = [Component(name, "mse", coeff * scale) for name, coeff in zip(names, given_coeffs, strict=True)]
        return list(oracle.manager(parts).coeffs.values())

    np.testing.assert_allclose(normalised(1.0), normalised(factor), rtol=1e-12)
