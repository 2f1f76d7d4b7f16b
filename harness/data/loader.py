"""A data loader that remembers how far its consumer has come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from harness.data.samplers import TrainingBatchSampler

__all__ = ["ResumableDataLoader"]


class ResumableDataLoader(DataLoader[Any]):
    """Batches of a :class:`~harness.data.samplers.TrainingBatchSampler`, continued in mid-epoch after a restart.

    The state counts the batches that the consumer was given, not those that workers have fetched ahead. Lightning
    saves and restores it with the training loop; it is the same on all ranks and fits any number of them.

    Args:
        dataset: the samples.
        batch_sampler: which of them make up the batches.
        options: any other argument of :class:`torch.utils.data.DataLoader`.
    """

    batch_sampler: TrainingBatchSampler

    def __init__(self, dataset: Dataset[Any], batch_sampler: TrainingBatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self._num_batches_done = 0
        self._epoch = batch_sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from where the sampler starts.

        Nothing is fetched before the first batch is asked for: Lightning makes the iterator of the first epoch before
        it sets the epoch, and workers would already have begun on another.
        """
        self._num_batches_done, self._epoch = self.batch_sampler.start, self.batch_sampler.epoch
        for batch in super().__iter__():
            self._num_batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the data; see :meth:`~harness.data.samplers.TrainingBatchSampler.state_dict`."""
        # between two epochs the sampler is in the next already, and the count still that of the one before
        counted = self._epoch == self.batch_sampler.epoch
        return self.batch_sampler.state_dict(self._num_batches_done if counted else None)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state`` with the next iteration.

        Raises:
            ValueError: if the state belongs to another order of the data.
        """
        self.batch_sampler.load_state_dict(state)
        self._num_batches_done, self._epoch = self.batch_sampler.start, self.batch_sampler.epoch
