"""Shares of similar sums: how samples of different sizes are dealt out to ranks or to batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["as_sizes", "balanced_parts", "balanced_shares", "deal"]

# Batches of more items for each of them are divided one by one: array operations over a few batches gain nothing.
_LONG = 100


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


def deal(sizes: Sequence[int], num_shares: int) -> tuple[list[int], int]:
    r"""The share of each item, dealt in order to the share of the smallest sum so far, and the largest sum at the end.

    Whatever the order, no sum exceeds :math:`T/R + (1 - 1/R)\, s_\mathrm{max}`, with the sum :math:`T` of all sizes
    and :math:`R` shares; from large to small, none exceeds 4/3 of the best there is (R. L. Graham, SIAM J. Appl. Math.
    17, 416, 1969). Of equal sums, the share of fewer items comes first: none stays empty if there are enough items,
    even of size 0.

    Args:
        sizes: of the items, in the order in which they are dealt.
        num_shares: :math:`R`.

    Example:
        >>> deal([5, 4, 3, 3], 2)
        ([0, 1, 1, 0], 8)
    """
    heap = [(0, 0, share) for share in range(num_shares)]
    shares, largest = [], 0
    for size in sizes:
        total, count, share = heap[0]
        total += size
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
    share_of = np.asarray(deal(values[order].tolist(), num_shares)[0], dtype=np.int64)
    ends = np.cumsum(np.bincount(share_of, minlength=num_shares))
    return np.split(order[np.argsort(share_of, kind="stable")], ends[:-1])


def balanced_parts(
    sizes: NDArray[np.int64], batches: Sequence[NDArray[np.int64]], num_shares: int, wanted: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """One share of each batch, as :func:`balanced_shares` makes it; all batches are divided at once.

    Args:
        sizes: of all items.
        batches: items of each batch.
        num_shares: into which every batch is divided.
        wanted: which of its shares is returned, for each batch.
    """
    lengths = np.array([len(batch) for batch in batches])
    longest = int(lengths.max())
    items = np.concatenate(batches)
    values = sizes[items]
    # sums are compared together with numbers of items, as one whole number
    if longest > _LONG * len(batches) or (int(values.sum()) + 1) * (longest + 1) >= 1 << 63:
        pairs = zip(batches, wanted.tolist(), strict=True)
        return [batch[balanced_shares(sizes[batch], num_shares)[share]] for batch, share in pairs]
    of_batch = np.repeat(np.arange(len(batches)), lengths)
    order = np.lexsort((-values, of_batch))  # stable: of equal sizes the first comes first
    items, steps = items[order], values[order] * (longest + 1) + 1
    # from long batches to short ones: those that have a further item are the first
    from_long = np.argsort(-lengths, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[from_long]
    with_item = np.searchsorted(-lengths[from_long], -np.arange(longest), side="left")
    keys = np.zeros((len(batches), num_shares), dtype=np.int64)
    rows = np.arange(len(batches))
    share_of = np.empty(len(items), dtype=np.int64)
    for place, number in enumerate(with_item.tolist()):
        at = starts[:number] + place
        smallest = keys[:number].argmin(axis=1)  # of equal ones the first
        share_of[at] = smallest
        keys[rows[:number], smallest] += steps[at]
    own = share_of == wanted[of_batch]
    return np.split(items[own], np.cumsum(np.bincount(of_batch[own], minlength=len(batches)))[:-1])
