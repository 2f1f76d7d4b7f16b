"""Laws of mixtures: shares, what an epoch has of each set, and batches that no number of ranks changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import BudgetBatchSampler, TrainingBatchSampler, mixing
from harness.data.mixing import Mixing, MixtureBatchSampler, frames_of_shares, shares_of

SETS = (40, 7, 12)
DRAWN = (25, 30, 12)  # a part of the first set, the second four times and a bit, the third as it is
ATOMS = np.random.default_rng(0).integers(2, 60, sum(SETS))


def sampler(rank: int = 0, num_ranks: int = 1, limit: str = "batch_size") -> MixtureBatchSampler:
    sets = Mixing(SETS, DRAWN, seed=5)
    if limit == "max_atoms":
        largest = sets.largest_sizes(ATOMS)
        return MixtureBatchSampler(BudgetBatchSampler(largest, 300, rank, num_ranks, seed=5), sets, ATOMS, largest)
    places = TrainingBatchSampler(sets.epoch_frames, 10, rank, num_ranks, seed=5)
    return MixtureBatchSampler(places, sets, ATOMS if limit == "balance" else None)


def set_of(frame: int) -> int:
    return int(np.searchsorted(np.cumsum(SETS), frame, side="right"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.9, 0.1]),
        ({"weights": [2, 1]}, [2 / 3, 1 / 3]),
        ({"temperature": 1}, [0.9, 0.1]),
        ({"temperature": 2}, [0.75, 0.25]),
        ({"temperature": 1e9}, [0.5, 0.5]),
    ],
)
def test_shares(options, expected):
    np.testing.assert_allclose(shares_of([900, 100], **options), expected, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(1, 5000))
def test_frames_of_natural_shares_are_rounded_to_an_exact_sum(sizes, epoch_frames):
    exact = np.array(sizes) * epoch_frames / sum(sizes)
    found = frames_of_shares(shares_of(sizes), epoch_frames)
    assert sum(found) == epoch_frames
    assert (np.abs(found - exact) < 1 + 1e-9).all()
    if epoch_frames == sum(sizes):
        assert found == sizes


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=4), st.integers(1, 6))
def test_frames_of_a_set_are_used_equally_often(sets, num_epochs):
    sets_mixed = Mixing(tuple(size for size, _ in sets), tuple(drawn for _, drawn in sets), seed=3)
    counts: Counter[int] = Counter()
    for epoch in range(num_epochs):
        frames = sets_mixed.frames(epoch)
        assert len(frames) == sets_mixed.epoch_frames
        counts.update(frames.tolist())
        start = 0
        for size, drawn in sets:
            of_set = [counts[frame] for frame in range(start, start + size)]
            assert sum(of_set) == drawn * (epoch + 1)
            assert max(of_set) - min(of_set) <= 1
            start += size


def test_natural_shares_give_every_frame_once_in_a_new_order():
    natural = MixtureBatchSampler(TrainingBatchSampler(59, 10, 0, 1, seed=1), Mixing(SETS, SETS, seed=1))
    orders = []
    for epoch in range(2):
        natural.set_epoch(epoch)
        orders.append([index for batch in natural for index in batch])
        assert sorted(orders[-1]) == list(range(59))
    assert orders[0] != orders[1]
    first_sets = [set_of(index) for index in orders[0][:20]]
    assert len(set(first_sets)) > 1  # mixed, and not set by set


@pytest.mark.parametrize("limit", ["batch_size", "balance", "max_atoms"])
def test_batches_have_their_shares_and_no_number_of_ranks_changes_them(limit):
    for epoch in (0, 1, 7):
        alone = sampler(limit=limit)
        alone.set_epoch(epoch)
        batches = list(alone)
        assert len(batches) == len(alone)
        drawn = Counter(set_of(index) for batch in batches for index in batch)
        assert tuple(drawn[index] for index in range(3)) == DRAWN
        shares = [sampler(rank, 3, limit) for rank in range(3)]
        for share in shares:
            share.set_epoch(epoch)
        for batch, parts in zip(batches, zip(*shares, strict=True), strict=True):
            assert all(parts)
            assert sorted(index for part in parts for index in part) == sorted(batch)
        if limit == "max_atoms":
            assert max(ATOMS[batch].sum() for batch in batches) <= 300
    assert len({tuple(map(tuple, sampler(limit=limit).global_batches())) for _ in range(2)}) == 1


@pytest.mark.parametrize("limit", ["batch_size", "max_atoms"])
def test_a_position_in_mid_epoch_fits_another_number_of_ranks(limit):
    whole = sampler(limit=limit)
    whole.set_epoch(4)
    expected = list(whole)[3:]
    state = sampler(1, 2, limit)
    state.set_epoch(4)
    saved = state.state_dict(num_batches=3)
    resumed = [sampler(rank, 3, limit) for rank in range(3)]
    for rank in resumed:
        rank.load_state_dict(saved)
    for batch, parts in zip(expected, zip(*resumed, strict=True), strict=True):
        assert sorted(index for part in parts for index in part) == sorted(batch)


def test_a_position_in_another_mixture_is_refused():
    places = TrainingBatchSampler(67, 10, 0, 1, seed=5)
    other = MixtureBatchSampler(places, Mixing(SETS, (26, 29, 12), seed=5))
    with pytest.raises(ValueError, match=r"in an epoch.*\[25, 30, 12\].*\[26, 29, 12\]"):
        other.load_state_dict(sampler().state_dict())
    for sets, seed in (((41, 7, 11), 5), (SETS, 6)):  # other frames, or in another order, in as many batches
        other = MixtureBatchSampler(places, Mixing(sets, DRAWN, seed=seed))
        with pytest.raises(ValueError, match="cannot continue in the middle of an epoch"):
            other.load_state_dict(sampler().state_dict())


def test_frames_of_one_size_meet_others_in_each_epoch():
    """Under a budget, whose places are filled by size."""
    sizes = np.full(sum(SETS), 20)
    sets = Mixing(SETS, SETS, seed=5)
    largest = sets.largest_sizes(sizes)
    orders = [sets.by_size(epoch, sizes, largest).tolist() for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(sum(SETS)))


@pytest.mark.parametrize("width", [3.0, 0.0])
def test_sizes_of_an_epoch_do_not_exceed_those_that_the_batches_were_planned_for(width, monkeypatch):
    monkeypatch.setattr(mixing, "_TAIL", width)
    sizes = np.random.default_rng(1).lognormal(3, 0.6, 250).astype(np.int64) + 1
    sets = Mixing((200, 50), (150, 75))
    largest = sets.largest_sizes(sizes)
    exchanged = 0
    for epoch in range(40):
        frames = sets.by_size(epoch, sizes, largest)
        assert (sizes[frames] <= largest).all()
        exchanged += sorted(frames) != sorted(sets.frames(epoch))
    # a band of no width is left in nearly every epoch, one of the usual width in one of 10⁷
    assert exchanged == 0 if width else exchanged > 20
