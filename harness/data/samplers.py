"""Samplers of batches: every sample exactly once, in global batches that do not depend on the number of ranks."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from harness.data.balance import as_sizes, balanced_parts
from harness.data.dealing import EpochPlan, cut_equally

__all__ = ["EvaluationBatchSampler", "GlobalBatchSampler", "TrainingBatchSampler"]


def check_ranks(rank: int, num_ranks: int, **counts: int) -> None:
    """Refuse a rank that is not among the ranks, and counts below 1.

    Raises:
        ValueError: if there is one.
    """
    for name, value in {**counts, "num_ranks": num_ranks}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be in 0 … {num_ranks - 1} for {num_ranks} ranks, found {rank}")


# Numbers of samples from which on the next epoch is planned beforehand (less takes less than a step), and that are
# divided over the ranks at once.
_AHEAD_FROM = 100_000
_DIVIDED = 1 << 17


class PlanAhead:
    """An epoch's plan that is made in a thread of its own, beside the epoch before it.

    The thread ends with the plan, and an interpreter that exits waits for it.

    Args:
        make: function of the epoch alone.
        epoch: the one to plan.
    """

    def __init__(self, make: Callable[[int], EpochPlan], epoch: int) -> None:
        self.epoch = epoch
        self._make = make
        self._plan: EpochPlan | None = None
        self._thread = threading.Thread(target=self._run, name=f"plan of epoch {epoch}")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._plan = self._make(self.epoch)
        except MemoryError:
            self._plan = None  # made when it is needed, where the error is seen

    def plan(self) -> EpochPlan:
        """Plan of the epoch, once it is there."""
        self._thread.join()
        return self._make(self.epoch) if self._plan is None else self._plan


class GlobalBatchSampler(Sampler[list[int]], ABC):
    r"""Batches of one rank: its part of global batches that do not depend on the number of ranks.

    What training samplers have in common: the division of global batches, and the position in an epoch, which is that
    of all ranks and fits any number of them. A subclass makes the plan of an epoch, always of the same number of global
    batches; from 100 000 samples on that of the next epoch is made in a thread while this one runs.

    Args:
        rank: this rank.
        num_ranks: number of ranks.
        sizes: of the samples: a global batch is divided so that the ranks' sums are similar, by
            :func:`~harness.data.balance.balanced_shares`. If None, rank :math:`r` of :math:`R` takes the elements
            :math:`r, r + R, r + 2R, \dots`
    """

    def __init__(self, rank: int, num_ranks: int, sizes: NDArray[np.int64] | None) -> None:
        check_ranks(rank, num_ranks)
        self.rank = rank
        self.num_ranks = num_ranks
        self.sizes = sizes
        self.epoch = 0
        self.start = 0
        """Global batches of the epoch that were handed out before: where the next iteration starts."""
        self._ahead: PlanAhead | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches of an epoch, the same in every epoch and on every rank."""

    @abstractmethod
    def plan(self, epoch: int) -> EpochPlan:
        """Samples of all global batches of an epoch, in order: a function of the epoch, on any number of ranks."""

    def global_batches(self) -> EpochPlan:
        """Samples of all global batches of this epoch, in order; the same on any number of ranks."""
        return self.plan(self.epoch)

    @abstractmethod
    def _order(self) -> dict[str, Any]:
        """Arguments on which the global batches of an epoch depend, by name."""

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's part of the global batches from ``start`` on; the iteration after this one is a whole one."""
        start, self.start = self.start, 0
        ahead, self._ahead = self._ahead, None
        plan = ahead.plan() if ahead is not None and ahead.epoch == self.epoch else self.global_batches()
        if len(plan.samples) >= _AHEAD_FROM:
            self._ahead = PlanAhead(self.plan, self.epoch + 1)
        yield from (part.tolist() for part in self._parts(plan, start))

    def _parts(self, plan: EpochPlan, start: int) -> Iterator[NDArray[Any]]:
        if self.sizes is None:
            for step in range(start, len(plan)):
                yield plan[step][self.rank :: self.num_ranks]
            return
        at_once = max(1, _DIVIDED * len(plan) // len(plan.samples))
        for first in range(start, len(plan), at_once):
            steps = np.arange(first, min(first + at_once, len(plan)))
            # The first share has the largest sample: ranks take turns, or one of them would see all the large ones.
            shares = (self.rank + steps) % self.num_ranks
            yield from balanced_parts(self.sizes, plan[first : int(steps[-1]) + 1], self.num_ranks, shares)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ahead": None}  # a thread cannot be copied, and the plan is made again

    @property
    def sampler(self) -> GlobalBatchSampler:
        """Self, since Lightning calls ``set_epoch`` on ``batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Take up ``epoch``: from its beginning, or where :meth:`load_state_dict` has put it."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def state_dict(self, num_batches: int | None = None) -> dict[str, Any]:
        """Position in the data: the epoch and the number of its global batches that are done; any rank's is the same.

        Args:
            num_batches: how many are done, which the consumer knows, where a sampler is asked ahead; ``start`` if None.
        """
        done = self.start if num_batches is None else num_batches
        return {"epoch": self.epoch, "num_batches_done": done, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, possibly on another number of ranks.

        Raises:
            ValueError: if the state belongs to another order of the data.
        """
        found = {name: state.get(name) for name in self._order()}
        if found != self._order():
            raise ValueError(
                f"cannot continue in the middle of an epoch: the saved position is one in {found}, this run has "
                f"{self._order()}; use the same data and settings, or continue from a checkpoint at the end of an epoch"
            )
        self.epoch, self.start = int(state["epoch"]), int(state["num_batches_done"])


class TrainingBatchSampler(GlobalBatchSampler):
    r"""Batches of one rank: its part of global batches that do not depend on the number of ranks.

    An epoch is a permutation of all samples, drawn from ``(seed, epoch)`` alone and cut into
    :math:`\lceil N / B \rceil` global batches whose sizes differ by at most one. Of each, rank :math:`r` of :math:`R`
    takes the elements :math:`r, r + R, r + 2R, \dots`, or, with ``sizes``, a part of a similar sum of sizes. So every
    sample is there exactly once in an epoch, no batch of any rank is empty, and all ranks take the same number of
    steps.

    Args:
        num_samples: :math:`N`, the size of the data set.
        batch_size: :math:`B`, the largest size of a global batch, that of all ranks together.
        rank: :math:`r`.
        num_ranks: :math:`R`.
        seed: of the permutations.
        shuffle: whether to permute; the samples come in order otherwise.
        sizes: atoms or edges of each sample, for ranks of similar work. Global batches do not depend on them.

    Raises:
        ValueError: if a number or size is out of range, or a global batch has fewer samples than there are ranks.

    Example:
        >>> [list(TrainingBatchSampler(5, 4, rank, 2, shuffle=False)) for rank in (0, 1)]
        [[[0, 2], [3]], [[1], [4]]]
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int,
        num_ranks: int,
        seed: int = 0,
        shuffle: bool = True,
        sizes: ArrayLike | None = None,
    ) -> None:
        check_ranks(rank, num_ranks, num_samples=num_samples, batch_size=batch_size)
        super().__init__(rank, num_ranks, None if sizes is None else as_sizes(sizes))
        if self.sizes is not None and len(self.sizes) != num_samples:
            raise ValueError(f"expected a size for each of {num_samples} samples, found {len(self.sizes)}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._num_batches = -(-num_samples // batch_size)
        smallest = num_samples // self._num_batches
        if smallest < num_ranks:
            raise ValueError(
                f"{num_samples} samples in {self._num_batches} global batches of at most {batch_size} leave batches of "
                f"{smallest} samples for {num_ranks} ranks, and every rank needs one in every step; raise batch_size "
                f"(it counts the samples of all ranks together), add data, or use at most {smallest} ranks"
            )

    def __len__(self) -> int:
        """Number of batches of an epoch, the same in every epoch and on every rank."""
        return self._num_batches

    def plan(self, epoch: int) -> EpochPlan:
        """Samples of all global batches of an epoch, in order; the same on any number of ranks."""
        order = np.arange(self.num_samples, dtype=np.int32)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return cut_equally(order, self._num_batches)

    def _order(self) -> dict[str, Any]:
        """Arguments on which the global batches of an epoch depend, by name."""
        return {
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


class EvaluationBatchSampler(Sampler[list[int]]):
    r"""Batches of one rank in order, without padding or dropping: rank r of R takes samples :math:`r, r + R, \dots`

    Ranks may have different numbers of batches; a rank without samples has none.

    Args:
        num_samples: size of the data set.
        batch_size: size of a batch of all ranks together; a rank's own are :math:`\lceil B / R \rceil`.
        rank: :math:`r`.
        num_ranks: :math:`R`.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> [list(EvaluationBatchSampler(5, 4, rank, 2)) for rank in (0, 1)]
        [[[0, 2], [4]], [[1, 3]]]
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int, num_ranks: int) -> None:
        check_ranks(rank, num_ranks, num_samples=num_samples, batch_size=batch_size)
        self._indices = range(rank, num_samples, num_ranks)
        self._batch_size = -(-batch_size // num_ranks)

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return -(-len(self._indices) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches."""
        for start in range(0, len(self._indices), self._batch_size):
            yield list(self._indices[start : start + self._batch_size])
