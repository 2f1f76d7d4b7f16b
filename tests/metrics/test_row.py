"""Rows: their merge is a commutative monoid, and elements are summed, counted and compared by group."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from harness.metrics import Elements, Row, merge_rows_over_ranks

# integers as floats: their sums are exact, so that laws hold to the last bit
exact = st.integers(-(2**40), 2**40).map(float)
maxima = st.one_of(exact, st.sampled_from([math.inf, -math.inf, math.nan]))
rows = st.builds(
    lambda additive, largest: Row(torch.tensor(additive), torch.tensor(largest)),
    st.lists(exact, min_size=4, max_size=4),
    st.lists(maxima, min_size=3, max_size=3),
)
rows = rows.map(lambda row: Row(row.additive.double(), row.maxima.double()))


def same(one: Row, other: Row) -> bool:
    return torch.equal(one.additive, other.additive) and torch.equal(
        one.maxima.nan_to_num(nan=0.5), other.maxima.nan_to_num(nan=0.5)
    )


@given(rows)
def test_the_neutral_row_changes_nothing(row):
    neutral = Row.neutral(4, 3)
    assert same(row.merge(neutral), row)
    assert same(neutral.merge(row), row)


@given(rows, rows, rows)
def test_merge_is_associative_and_commutative(a, b, c):
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(b), b.merge(a))


def test_merge_without_maxima():
    row = Row(torch.ones(2, dtype=torch.float64), torch.empty(0, dtype=torch.float64))
    assert row.merge(row).additive.tolist() == [2, 2]
    assert row.merge(Row.neutral(2, 0)).maxima.shape == (0,)


def test_rows_stay_as_they_are_on_one_rank():
    some = [Row.neutral(2, 1), Row(torch.ones(3, dtype=torch.float64), torch.empty(0, dtype=torch.float64))]
    assert all(same(before, after) for before, after in zip(some, merge_rows_over_ranks(some), strict=True))


arrays = nps.arrays(np.float64, st.tuples(st.integers(0, 6), st.integers(1, 3)), elements=st.integers(-9, 9))


@settings(max_examples=50)
@given(arrays, st.data())
def test_elements_reduce_by_group_as_numpy_does(values, data):
    labelled = np.array(data.draw(nps.arrays(bool, values.shape)))
    types = np.array(data.draw(nps.arrays(np.int64, len(values), elements=st.integers(0, 3))))
    target = torch.tensor(np.where(labelled, 0.0, np.nan))
    elements = Elements.read(torch.tensor(values), target, ignore_nan=True, types=torch.tensor(types), num_groups=4)
    errors = (elements.prediction - elements.target).abs()
    for kind in range(4):
        kept = np.abs(values[types == kind][labelled[types == kind]])
        assert elements.sums(errors)[kind] == kept.sum()
        assert elements.counts()[kind] == kept.size
        assert elements.maxima(errors)[kind] == (kept.max() if kept.size else -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_float64_whatever_the_inputs(dtype):
    ones = torch.ones(5, 3, dtype=dtype)
    for types in (None, torch.zeros(5, dtype=torch.int64)):
        elements = Elements(ones, ones, types=types)
        assert elements.sums(ones).dtype == elements.counts().dtype == elements.maxima(ones).dtype == torch.float64


def test_many_small_numbers_are_summed_in_float64():
    errors = torch.full((2**20, 3), 0.1, dtype=torch.float32)
    exact_sum = float(np.float32(0.1)) * errors.numel()
    assert Elements(errors, errors).sums(errors).item() == pytest.approx(exact_sum, rel=1e-12)
