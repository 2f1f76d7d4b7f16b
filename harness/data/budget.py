"""Batches by a budget of atoms or edges instead of a number of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from harness.data.balance import as_sizes
from harness.data.dealing import EpochPlan, ascending_order, deal_in_rounds
from harness.data.samplers import GlobalBatchSampler, check_ranks

__all__ = ["BudgetBatchSampler", "EvaluationBudgetSampler"]

# From a random order, None, to one from large to small: the sizes by which samples are put in order are each lowered
# at random by up to this fraction. The later ones pack more tightly, the last one is that which set the number of
# batches. Products of random numbers only: exp() and its like differ between processors in the last bit, and with it
# the batches of two ranks.
_SPREADS = (None, 0.5, 0.25, 0.125, 0.0)
_FRACTIONS = 64
"""Lowered sizes are compared in parts of one atom or edge."""

_DEALT = "in rounds"
"""Manner in which batches are made, for the saved position: that of version 0.1 was another, and has no such entry."""


class BudgetBatchSampler(GlobalBatchSampler):
    r"""Batches of one rank: its part of global batches whose sums of sizes are similar and within a budget.

    The sizes :math:`s_i` and the budget :math:`B` alone, not the number of ranks, set the number of batches: the
    smallest from :math:`\lceil \sum_i s_i / B \rceil` on into which the samples were seen to fit, to 0.2 % where there
    are thousands, so that no batch is left with the rest. In each epoch the samples are dealt, in an order drawn from
    ``(seed, epoch)``, each to the batch of the smallest sum so far, in rounds: see
    :func:`~harness.data.dealing.deal_in_rounds`. The order is random if it fits into the budget; where the budget
    leaves little room, large samples come first: they are then spread over the batches, and which others they meet is
    random. In memory are arrays alone: about 80 bytes for each sample while an epoch is planned; afterwards 8, and 4
    for each of the two epochs that are planned.

    Of each global batch, ranks take parts of similar sums: with :math:`R` ranks none exceeds
    :math:`B/R + (1 - 1/R)\, s_\mathrm{max}`. Give :math:`B = P R` for about :math:`P` atoms on each of :math:`R` GPUs.
    Every sample is there exactly once in an epoch, and all ranks take the same number of steps, the same in every
    epoch. A global batch holds at least as many samples as the budget holds of the largest, or as there are for each
    batch if that is less: with :math:`B \ge R\, s_\mathrm{max}`, and data for it, no rank is ever without.

    Args:
        sizes: of the samples, whole numbers: their atoms or edges.
        budget: :math:`B`, the largest sum of sizes in a global batch, that of all ranks together.
        rank: this rank.
        num_ranks: :math:`R`.
        seed: of the orders.
        unit: what the sizes count, for messages and the saved position.
        name_of: what a sample is called in messages.

    Raises:
        ValueError: if a number or size is out of range, a sample is larger than the budget, or batches may have fewer
            samples than there are ranks.

    Example:
        >>> [list(BudgetBatchSampler([4, 3, 3, 2, 2, 2], 8, rank, 2)) for rank in (0, 1)]
        [[[0], [1]], [[3, 5], [2, 4]]]
    """

    def __init__(
        self,
        sizes: ArrayLike,
        budget: int,
        rank: int,
        num_ranks: int,
        seed: int = 0,
        unit: str = "atoms",
        name_of: Callable[[int], str] = "sample {}".format,
    ) -> None:
        checked = as_sizes(sizes)
        check_ranks(rank, num_ranks, budget=budget)
        super().__init__(rank, num_ranks, checked)
        self._sizes = checked
        self.budget = budget
        self.seed = seed
        self.unit = unit
        self._digest = hashlib.sha256(checked.astype("<i8", copy=False).tobytes()).hexdigest()[:16]
        largest = int(checked.max())
        biggest = f"the largest, {name_of(int(checked.argmax()))}, has {largest} {unit}"
        if largest == 0:
            raise ValueError(
                f"no sample has any {unit}, so that a budget of {budget} {unit} says nothing; is the cutoff right?"
            )
        if largest > budget:
            raise ValueError(
                f"{int((checked > budget).sum())} of {len(checked)} samples have more than the {budget} {unit} that a "
                f"batch of all ranks may hold; {biggest}; raise the budget, or leave such samples out"
            )
        self._num_batches, self._fewest = _plan(checked, budget)
        if self._fewest < num_ranks:
            raise ValueError(
                f"{len(checked)} samples in {self._num_batches} global batches of at most {budget} {unit} are sure to "
                f"have {self._fewest} samples in each, but there are {num_ranks} ranks, and every rank needs one in "
                f"every step; {biggest}; raise the budget (that of all ranks together; {num_ranks * largest} {unit} "
                f"hold one such sample for each rank), add data, or use at most {self._fewest} ranks"
            )

    def __len__(self) -> int:
        """Number of batches of an epoch, the same in every epoch and on every rank."""
        return self._num_batches

    @property
    def batch_size(self) -> int:
        """Samples in a mean global batch, rounded down: there is no fixed number, and DeepSpeed asks for one to log."""
        return len(self._sizes) // self._num_batches

    @property
    def fewest(self) -> int:
        """Samples that every global batch holds at least: the largest number of ranks that can share them."""
        return self._fewest

    def plan(self, epoch: int) -> EpochPlan:
        """Samples of all global batches of an epoch, in order; the same on any number of ranks."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(np.arange(len(self._sizes), dtype=np.int32))
        sizes = self._sizes[order]
        for spread in _SPREADS:
            if spread is not None:
                lowered = sizes * (_FRACTIONS * (spread * generator.random(len(order)) - 1))
                reordered = ascending_order(lowered.astype(np.int64))
                order, sizes = order[reordered], sizes[reordered]
            dealt = deal_in_rounds(sizes, self._num_batches, self._fewest)
            if dealt.largest <= self.budget:
                break
        return dealt.grouped(order, generator.permutation(self._num_batches))

    def _order(self) -> dict[str, Any]:
        """Arguments on which the global batches of an epoch depend, by name."""
        return {
            "num_samples": len(self._sizes),
            f"max_{self.unit}": self.budget,
            "seed": self.seed,
            "sizes": self._digest,
            "dealt": _DEALT,
        }


class EvaluationBudgetSampler(Sampler[list[int]]):
    r"""Batches of one rank in order, within its part of a budget: rank r of R takes samples :math:`r, r + R, \dots`

    A batch ends where the next sample would take it over :math:`B / R`; a sample that is larger than that is a batch of
    its own. Nothing is padded or dropped. Ranks may have different numbers of batches; one without samples has none.

    Args:
        sizes: of the samples of all ranks, whole numbers.
        budget: :math:`B`, of all ranks together.
        rank: :math:`r`.
        num_ranks: :math:`R`.

    Raises:
        ValueError: if a number or size is out of range.

    Example:
        >>> [list(EvaluationBudgetSampler([3, 2, 1, 9, 1, 1, 1], 8, rank, 2)) for rank in (0, 1)]
        [[[0, 2], [4, 6]], [[1], [3], [5]]]
    """

    def __init__(self, sizes: ArrayLike, budget: int, rank: int, num_ranks: int) -> None:
        check_ranks(rank, num_ranks, budget=budget)
        own = as_sizes(sizes)[rank::num_ranks]
        self._samples = range(rank, rank + len(own) * num_ranks, num_ranks)
        self._ends = _filled_up(own, budget // num_ranks)

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches."""
        start = 0
        for end in self._ends:
            yield list(self._samples[start : int(end)])
            start = int(end)


def _filled_up(sizes: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Ends of the batches that samples in their order fill up to the limit; a larger one is alone."""
    sums = np.cumsum(sizes)
    # where a batch that starts at each of the samples would end
    ends = np.searchsorted(sums, sums - sizes + limit, side="right")
    ends = np.maximum(ends, np.arange(1, len(sizes) + 1))
    view: memoryview[int] = memoryview(ends)  # type: ignore[arg-type]

    def found() -> Iterator[int]:
        start = 0
        while start < len(view):
            start = view[start]
            yield start

    return np.fromiter(found(), dtype=np.int64)


def _plan(sizes: NDArray[np.int64], budget: int) -> tuple[int, int]:
    """Number of batches, and of samples that each holds at least, for samples none of which exceeds the budget.

    Each is such that the samples were seen to fit when dealt from large to small, which :class:`BudgetBatchSampler`
    falls back to: an epoch that does not fit cannot happen.
    """
    descending = np.sort(sizes)[::-1]
    num_samples, most_alike = len(descending), budget // int(descending[0])

    def fewest_for(num_batches: int) -> int:
        # As many of the largest sample are within the budget, so that filling up batches never exceeds it.
        return min(most_alike, num_samples // num_batches)

    def fits(num_batches: int, fewest: int) -> bool:
        return deal_in_rounds(descending, num_batches, fewest).largest <= budget

    # The first try nearly always fits; steps that double, then halves, find a number where most samples are so large
    # that few of them go together. A batch for each sample always fits. Of many batches, 0.2 % are not looked for.
    least = -(-int(sizes.sum()) // budget)
    close = least // 500 if least >= 5000 else 1
    too_few, step = least - 1, 1
    enough = least
    while not fits(enough, fewest_for(enough)):
        too_few, step = enough, max(2 * step, close)
        enough = min(enough + step, num_samples)
    while enough - too_few > close:
        middle = (too_few + enough) // 2
        if fits(middle, fewest_for(middle)):
            enough = middle
        else:
            too_few = middle

    # Among samples of very different sizes more can be had. Less than the mean number leaves the orders random.
    fewest = fewest_for(enough)
    more = min(3 * num_samples // enough // 4, int(deal_in_rounds(descending, enough, fewest).counts.min()))
    while more > fewest and not fits(enough, more):
        more = 2 * more // 3
    return enough, max(fewest, more)
