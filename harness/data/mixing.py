r"""Mixtures of sets in numbers: shares of the frames of an epoch, and which frames of each set an epoch has.

Set :math:`s` of :math:`n_s` frames has the share :math:`p_s` of an epoch of :math:`M` frames:

.. math:: p_s \propto n_s \text{ (natural)}, \qquad p_s \propto w_s \text{ (weights)}, \qquad
          p_s \propto n_s^{1/T} \text{ (temperature)},

and gives :math:`m_s` frames to each epoch, :math:`p_s M` rounded so that all of them add up to :math:`M` (largest
remainders). The temperature is that of the sampling of languages in A. Conneau et al., "Unsupervised cross-lingual
representation learning at scale", ACL 2020, whose exponent is :math:`\alpha = 1/T`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.dealing import EpochPlan, ascending_order
from harness.data.samplers import GlobalBatchSampler

__all__ = ["Mixing", "MixtureBatchSampler", "frames_of_shares", "shares_of"]

_TAIL = 3.0
"""Width of the band around the distribution of a set's sizes in which those of a random part of it are: by the
inequality of Dvoretzky, Kiefer, Wolfowitz and Massart, outside of it with a probability of exp(-2 · 3²) = 2e-8."""


def shares_of(
    num_frames: Sequence[int], weights: Sequence[float] | None = None, temperature: float | None = None
) -> list[float]:
    """Shares of the sets, which add up to 1: natural ones, by weights, or by a temperature.

    Args:
        num_frames: of each set.
        weights: of each set, for a ratio that does not depend on their sizes.
        temperature: 1 for natural shares; the larger, the more alike.

    Raises:
        ValueError: if both are given.

    Example:
        >>> shares_of([900, 100]), shares_of([900, 100], weights=[1, 1]), shares_of([900, 100], temperature=2)
        ([0.9, 0.1], [0.5, 0.5], [0.75, 0.25])
    """
    if weights is not None and temperature is not None:
        raise ValueError("weights of the sets and a temperature cannot both say what their shares are")
    if weights is not None:
        raw = [float(weight) for weight in weights]
    else:
        raw = [math.pow(number, 1.0 / (temperature or 1.0)) for number in num_frames]
    total = math.fsum(raw)
    return [value / total for value in raw]


def frames_of_shares(shares: Sequence[float], epoch_frames: int) -> list[int]:
    """Frames of each set in an epoch, which add up to ``epoch_frames``: rounded by the largest remainders.

    Example:
        >>> frames_of_shares([0.5, 0.25, 0.25], 10)
        [5, 3, 2]
    """
    exact = [share * epoch_frames for share in shares]
    numbers = [math.floor(round(value, 9)) for value in exact]
    missing = epoch_frames - sum(numbers)
    # of equal remainders, that of the first set
    order = sorted(range(len(shares)), key=lambda index: (round(numbers[index] - exact[index], 9), index))
    for index in order[:missing]:
        numbers[index] += 1
    return numbers


@dataclass(frozen=True)
class Mixing:
    r"""Frames of several sets that an epoch has, as positions in the sets joined one after the other.

    With :math:`m_s = q_s n_s + r_s`, every frame of set :math:`s` comes :math:`q_s` times, and :math:`r_s` of them once
    more: the next ones of permutations of the set, gone through one after the other from epoch to epoch. So after any
    number of epochs all frames of a set have been used equally often, up to one. The frames of an epoch are a function
    of the seed and the number of the epoch, and need no state of those before.

    Attributes:
        num_frames: :math:`n_s` of each set.
        per_epoch: :math:`m_s` of each set.
        seed: of the permutations.

    Example:
        >>> Mixing((2, 4), (4, 1)).frames(0).tolist()[:4]
        [0, 1, 0, 1]
        >>> sorted(Mixing((2, 4), (4, 1)).frames(epoch).tolist()[4] for epoch in range(4))
        [2, 3, 4, 5]
    """

    num_frames: tuple[int, ...]
    per_epoch: tuple[int, ...]
    seed: int = 0

    @property
    def epoch_frames(self) -> int:
        """Frames of an epoch."""
        return sum(self.per_epoch)

    @property
    def passes(self) -> list[float]:
        """Mean number of times that a frame of each set comes in an epoch."""
        return [drawn / number for drawn, number in zip(self.per_epoch, self.num_frames, strict=True)]

    def frames(self, epoch: int) -> NDArray[np.integer[Any]]:
        """Frames of an epoch, ``[epoch_frames]``: set by set, not mixed yet."""
        parts: list[NDArray[np.integer[Any]]] = []
        start = 0
        kind = np.int32 if sum(self.num_frames) < 2**31 else np.int64
        for index, (number, drawn) in enumerate(zip(self.num_frames, self.per_epoch, strict=True)):
            whole, rest = divmod(drawn, number)
            parts.append(np.tile(np.arange(start, start + number, dtype=kind), whole))
            parts += [
                start + part for part in self._parts_of_passes(index, number, epoch * rest, (epoch + 1) * rest, kind)
            ]
            start += number
        return np.concatenate(parts)

    def _parts_of_passes(
        self, index: int, number: int, start: int, stop: int, kind: Any
    ) -> list[NDArray[np.integer[Any]]]:
        """Frames ``start`` to ``stop`` of the permutations of a set after one another."""
        parts = []
        while start < stop:
            number_of_pass, first = divmod(start, number)
            last = min(number, first + stop - start)
            # four numbers: with fewer, NumPy fills up with zeros, and these were the numbers of other generators
            generator = np.random.default_rng([self.seed, 1 + index, number_of_pass, 1])
            parts.append(generator.permutation(np.arange(number, dtype=kind))[first:last])
            start += last - first
        return parts

    def largest_sizes(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        r"""Sizes that those of any epoch's frames, both sorted, do not exceed; int64 ``[epoch_frames]``, descending.

        Of the :math:`r_s` frames that come once more, the :math:`j`-th largest, counted from 0, is taken as large as
        the one at rank :math:`(j - 3 \sqrt{r_s (1 - r_s / 2 n_s)})\, n_s / r_s` of its set, or at :math:`j/2` if that
        is more. :meth:`by_size` keeps to it.

        Args:
            sizes: of the frames of all sets, ``[num_frames]``.
        """
        parts, start = [], 0
        for number, drawn in zip(self.num_frames, self.per_epoch, strict=True):
            own = sizes[start : start + number]
            descending = own[_descending(own)]
            whole, rest = divmod(drawn, number)
            parts += [np.tile(descending, whole), descending[_first_ranks(number, rest)]]
            start += number
        found = np.concatenate(parts)
        return found[_descending(found)]

    def by_size(self, epoch: int, sizes: NDArray[np.int64], largest: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """Frames of an epoch from large to small, those of one size in a random order.

        Args:
            epoch: number of the epoch.
            sizes: of the frames of all sets.
            largest: :meth:`largest_sizes`. A frame that would exceed them, in one of 10⁷ epochs, makes place for one
                that is smaller.
        """
        frames = self._mixed_by_size(self.frames(epoch), epoch, sizes)
        if (sizes[frames] <= largest).all():
            return frames
        return self._mixed_by_size(self._capped(self.frames(epoch), sizes), epoch, sizes)

    def _mixed_by_size(
        self, frames: NDArray[np.integer[Any]], epoch: int, sizes: NDArray[np.int64]
    ) -> NDArray[np.integer[Any]]:
        mixed = frames[np.random.default_rng([self.seed, 0, epoch, 1]).permutation(len(frames))]
        return mixed[_descending(sizes[mixed])]

    def _capped(self, frames: NDArray[np.integer[Any]], sizes: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """The frames of an epoch, set by set, those that come once more at ranks of at least :func:`_first_ranks`."""
        start = stop = 0
        for number, drawn in zip(self.num_frames, self.per_epoch, strict=True):
            stop += drawn
            more = slice(stop - drawn % number, stop)
            order = _descending(sizes[start : start + number])
            rank_of = np.empty_like(order)
            rank_of[order] = np.arange(number)
            ranks = np.sort(rank_of[frames[more] - start])
            frames[more] = start + order[np.maximum(ranks, _first_ranks(number, len(ranks)))]
            start += number
        return frames


def _descending(sizes: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
    """Order from large to small; equal ones stay in theirs."""
    return ascending_order(-sizes)


def _first_ranks(number: int, rest: int) -> NDArray[np.int64]:
    """Ranks by size, the largest being 0, that those of ``rest`` of ``number`` frames are not below."""
    places = np.arange(rest)
    if not rest:
        return places
    expected = np.floor((places - _TAIL * math.sqrt(rest * (1 - rest / (2 * number)))) * (number / rest))
    return np.maximum(places // 2, expected).astype(np.int64)


class MixtureBatchSampler(GlobalBatchSampler):
    """Batches of one rank of a mixture: those of another sampler, whose samples are places for the frames of an epoch.

    Args:
        places: sampler of as many samples as an epoch has frames, for the same rank: of batches of a number of
            samples, or by a budget, made with :meth:`Mixing.largest_sizes`.
        mixing: the frames of each epoch.
        sizes: of all frames. Global batches are divided so that the ranks' sums of them are similar.
        largest: sizes of the places, from large to small; the frames are put into them by their sizes. None for places
            that are alike.

    Example:
        >>> from harness.data.samplers import TrainingBatchSampler
        >>> mixing = Mixing((2, 4), (4, 2))
        >>> sampler = MixtureBatchSampler(TrainingBatchSampler(mixing.epoch_frames, 3, 0, 1), mixing)
        >>> [len(batch) for batch in sampler]
        [3, 3]
    """

    def __init__(
        self,
        places: GlobalBatchSampler,
        mixing: Mixing,
        sizes: NDArray[np.int64] | None = None,
        largest: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(places.rank, places.num_ranks, sizes)
        self.places = places
        self.mixing = mixing
        self.largest = largest

    def __len__(self) -> int:
        """Number of batches of an epoch, the same in every epoch and on every rank."""
        return len(self.places)

    @property
    def batch_size(self) -> int:
        """Samples in a global batch, at most, or on the mean where a budget limits them."""
        found: int = self.places.batch_size  # type: ignore[attr-defined]
        return found

    def plan(self, epoch: int) -> EpochPlan:
        """Frames of all global batches of an epoch, in order; the same on any number of ranks."""
        if self.largest is None or self.sizes is None:
            frames = self.mixing.frames(epoch)
        else:
            frames = self.mixing.by_size(epoch, self.sizes, self.largest)
        places = self.places.plan(epoch)
        return EpochPlan(frames[places.samples], places.ends)

    def _order(self) -> dict[str, Any]:
        """Arguments on which the global batches of an epoch depend, by name."""
        sets = {"frames of the sets": list(self.mixing.num_frames), "in an epoch": list(self.mixing.per_epoch)}
        return {**self.places._order(), **sets, "seed of the mixture": self.mixing.seed}
