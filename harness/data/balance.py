"""Shares of similar sums: how samples of different sizes are dealt out to ranks or to batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["as_sizes", "balanced_shares", "deal", "grouped"]


def as_sizes(sizes: ArrayLike) -> NDArray[np.int64]:
    """``sizes`` as an int64 array ``[num_samples]``.

    Raises:
        ValueError: if they are not whole numbers, at least 0, in one dimension; or if there are none.
    """
    found = np.asarray(sizes)
    if found.ndim != 1 or found.size == 0 or found.dtype.kind not in "iu" or found.min() < 0:
        raise ValueError(
            "sizes must be whole numbers, at least 0, one for each sample (its atoms or its edges), found "
            f"{found.dtype} of shape {list(found.shape)}" + (f" from {found.min()}" if found.size else "")
        )
    return found.astype(np.int64)


def deal(sizes: Sequence[int], num_shares: int, fewest: int = 0) -> tuple[list[int], int]:
    r"""The share of each item, dealt in order to the share of the smallest sum so far, and the largest sum at the end.

    Whatever the order, no sum exceeds :math:`T/R + (1 - 1/R)\, s_\mathrm{max}`, with the sum :math:`T` of all sizes
    and :math:`R` shares; from large to small, none exceeds 4/3 of the best there is (R. L. Graham, SIAM J. Appl. Math.
    17, 416, 1969). With ``fewest``, the last items go where items are missing, and the bound does not hold.

    Args:
        sizes: of the items, in the order in which they are dealt.
        num_shares: :math:`R`.
        fewest: number of items that every share gets at least.

    Raises:
        ValueError: if there are not enough items.

    Example:
        >>> deal([5, 4, 3, 3], 2)
        ([0, 1, 1, 0], 8)
        >>> deal([9, 1, 1, 1], 2, fewest=2)
        ([0, 1, 1, 0], 10)
    """
    missing = num_shares * fewest
    if missing > len(sizes):
        raise ValueError(f"{len(sizes)} items are not enough for {num_shares} shares of at least {fewest}")
    # Of equal sums, the share of fewer items comes first: none stays empty if there are enough items, even of size 0.
    heap = [(0, 0, share) for share in range(num_shares)]
    shares, largest, only_short = [], 0, False
    for left, size in zip(range(len(sizes), 0, -1), sizes, strict=True):
        if left == missing and not only_short:
            heap = [entry for entry in heap if entry[1] < fewest]
            heapq.heapify(heap)
            only_short = True
        total, count, share = heap[0]
        total += size
        missing -= count < fewest
        if only_short and count + 1 == fewest:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (total, count + 1, share))
        shares.append(share)
        largest = max(largest, total)
    return shares, largest


def balanced_shares(sizes: ArrayLike, num_shares: int) -> list[NDArray[np.int64]]:
    r"""Positions of the items of each share, sums being similar: from large to small, each to the smallest sum so far.

    A function of the sizes alone. No sum exceeds :math:`T/R + (1 - 1/R)\, s_\mathrm{max}`, see :func:`deal`, and no
    share is empty if there are at least :math:`R` items.

    Args:
        sizes: of the items, whole numbers.
        num_shares: :math:`R`.

    Example:
        >>> [share.tolist() for share in balanced_shares([2, 9, 3, 3, 2], 2)]
        [[1], [2, 3, 0, 4]]
    """
    values = np.asarray(sizes)
    order = np.argsort(-values, kind="stable")
    shares, _ = deal(values[order].tolist(), num_shares)
    return grouped(order, shares, num_shares)


def grouped(items: NDArray[np.int64], shares: Sequence[int], num_shares: int) -> list[NDArray[np.int64]]:
    """The items of each share, in the order in which they were dealt."""
    share_of = np.asarray(shares, dtype=np.int64)
    ends = np.cumsum(np.bincount(share_of, minlength=num_shares))
    return np.split(items[np.argsort(share_of, kind="stable")], ends[:-1])
