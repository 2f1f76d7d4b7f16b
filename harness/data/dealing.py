"""Samples dealt out to many batches of similar sums at once, by arrays instead of one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dealt", "EpochPlan", "ascending_order", "cut_equally", "deal_in_rounds"]

# Rounds in which shares get one item at a time, at the end of a deal; before them, and with more items for each share,
# they get several at once.
_SINGLE_ROUNDS = 256
# A round serves at least this part of the shares, so that the number of rounds is bounded whatever the sizes.
_LEAST_SERVED = 8


@dataclass(frozen=True)
class EpochPlan(Sequence[NDArray[Any]]):
    """Samples of all global batches of an epoch, in order: ``plan[step]`` is a view of those of a step.

    Attributes:
        samples: all of them, ``[num_samples]``.
        ends: where each batch ends in ``samples``, ``[num_batches]``.
    """

    samples: NDArray[Any]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of global batches."""
        return len(self.ends)

    @overload
    def __getitem__(self, step: int) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, step: slice) -> list[NDArray[Any]]: ...

    def __getitem__(self, step: int | slice) -> NDArray[Any] | list[NDArray[Any]]:
        if isinstance(step, slice):
            return [self[each] for each in range(*step.indices(len(self)))]
        position = range(len(self))[step]  # from the end, if negative
        return self.samples[self.ends[position - 1] if position else 0 : self.ends[position]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Samples of each batch in turn."""
        return (self[step] for step in range(len(self)))


def cut_equally(samples: NDArray[Any], num_batches: int) -> EpochPlan:
    """Samples in their order, cut into batches whose numbers differ by at most one, the larger ones first."""
    least, larger = divmod(len(samples), num_batches)
    lengths = np.full(num_batches, least, dtype=np.int64)
    lengths[:larger] += 1
    return EpochPlan(samples, np.cumsum(lengths))


@dataclass(frozen=True)
class Dealt:
    """Shares that items went to.

    Attributes:
        shares: share of each item, int32 ``[num_items]``.
        places: number of items that the share had before, int32 ``[num_items]``.
        counts: number of items of each share, ``[num_shares]``.
        largest: the largest sum of sizes in a share.
    """

    shares: NDArray[np.int32]
    places: NDArray[np.int32]
    counts: NDArray[np.int64]
    largest: int

    def grouped(self, items: NDArray[Any], shares: NDArray[np.int64]) -> EpochPlan:
        """The items of one share after the other, each in the order in which they were dealt.

        Args:
            items: in the order in which they were dealt.
            shares: all shares, in the order that is wanted.
        """
        ends = np.cumsum(self.counts[shares])
        starts = np.empty_like(ends)
        starts[shares] = ends - self.counts[shares]
        grouped = np.empty_like(items)
        grouped[starts[self.shares] + self.places] = items
        return EpochPlan(grouped, ends)


def ascending_order(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions that sort whole numbers; equal ones stay in their order, so that it is a function of the values alone.

    NumPy sorts numbers of 16 bits by their digits, several times faster than larger ones by comparisons.
    """
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    lowest = values.min()
    width = int(values.max()) - int(lowest)
    if width >= 1 << 32:
        return np.argsort(values, kind="stable")
    above = values - lowest
    order = np.argsort((above & 0xFFFF).astype(np.uint16), kind="stable")
    if width < 1 << 16:
        return order
    return order[np.argsort((above >> 16).astype(np.uint16)[order], kind="stable")]


def deal_in_rounds(sizes: NDArray[np.int64], num_shares: int, fewest: int = 0) -> Dealt:
    r"""Deal out items in their order, in rounds: those of a round to the shares of the smallest sums, large to small.

    A round serves the shares that are less than a mean item above the smallest sum, each with one item: about what
    giving each item to the smallest sum does, in :math:`N / R` rounds of array operations, for :math:`N` items and
    :math:`R` shares. Where a share gets thousands of items, the early rounds hand out several to each.

    With single items, sums never differ by more than the largest size :math:`s_\mathrm{max}`, whatever the order: a
    share of a smaller sum gets a larger item, and shares that get none are above those that do. So none exceeds
    :math:`T/R + (1 - 1/R)\, s_\mathrm{max}`, with the sum :math:`T` of all sizes. With ``fewest``, the last items go
    where items are missing; a sum is then either within that bound, or that of no more than ``fewest`` items.

    Args:
        sizes: of the items, at least 0, in the order in which they are dealt.
        num_shares: :math:`R`.
        fewest: number of items that every share gets at least.

    Raises:
        ValueError: if there are not enough items.

    Example:
        >>> deal_in_rounds(np.array([5, 4, 3, 3]), 2).shares.tolist()
        [0, 1, 1, 0]
    """
    num_items = len(sizes)
    if num_shares * fewest > num_items:
        raise ValueError(f"{num_items} items are not enough for {num_shares} shares of at least {fewest}")
    shares, places = np.empty(num_items, dtype=np.int32), np.empty(num_items, dtype=np.int32)
    sums, counts = np.zeros(num_shares, dtype=np.int64), np.zeros(num_shares, dtype=np.int64)
    served = np.arange(num_shares)
    missing = num_shares * fewest
    position = 0
    while position < num_items:
        left = num_items - position
        each = max(1, left // (_SINGLE_ROUNDS * num_shares))
        spare = left - missing  # items that may go to shares that have enough
        if missing and spare < each * num_shares:
            each = 1
        if missing and spare == 0:  # from here on only short ones count
            served = served[counts[served] < fewest]
        in_order = served[ascending_order(sums[served])]
        if missing and 0 < spare < num_shares:
            is_short = counts[in_order] < fewest
            in_order = in_order[is_short | (np.cumsum(~is_short) <= spare)]

        upcoming = sizes[position : position + each * num_shares]
        level = sums[in_order[0]] + -(-each * int(upcoming.sum()) // len(upcoming))
        near = int(np.searchsorted(sums[in_order], level, side="right"))
        number = min(max(near, -(-len(in_order) // _LEAST_SERVED)), left, len(in_order))
        chosen = in_order[:number]

        items = slice(position, position + each * number)
        columns = sizes[items].reshape(each, number)
        if each > 1:  # forth and back, so that what a column gets first and last evens out
            columns = columns.copy()
            columns[1::2] = columns[1::2, ::-1]
        totals = columns.sum(axis=0)
        from_large = ascending_order(-totals)
        to = np.empty(number, dtype=np.int64)
        to[from_large] = chosen
        rows = np.broadcast_to(to, (each, number))
        if each > 1:
            rows = rows.copy()
            rows[1::2] = rows[1::2, ::-1]
        shares[items] = rows.reshape(-1)
        places[items] = (counts[rows] + np.arange(each)[:, None]).reshape(-1)
        if missing:
            missing -= int(np.minimum(np.maximum(fewest - counts[chosen], 0), each).sum())
        sums[to] += totals
        counts[to] += each
        position += each * number
    return Dealt(shares, places, counts, int(sums.max()))
