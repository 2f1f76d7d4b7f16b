"""Data loaders that resume in mid-epoch, and loaders that look ahead for gradient accumulation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harness.data.samplers import GlobalBatchSampler
from harness.fields import UPCOMING_LABELS
from harness.support.checks import whole_number

__all__ = ["LookAheadLoader", "ResumableDataLoader", "StatefulLookAheadLoader", "look_ahead"]

_NEIGHBOR_LISTS = frozenset({"edge_index", "edge_cell_shift", "edge_vectors", "edge_lengths"})
"""Fields of a batch that are no labels, and the largest part of it."""

NumMicroBatches = int | Callable[[], int]
"""Number of micro-batches in a step, or a callable that returns it at the beginning of a step."""


class ResumableDataLoader(DataLoader[Any]):
    """Batches of a :class:`~harness.data.samplers.GlobalBatchSampler`, continued in mid-epoch after a restart.

    The state counts the batches that the consumer was given, not those that were fetched ahead, by workers or by
    looking ahead. Lightning saves and restores it with the training loop; it is the same on all ranks and fits any
    number of them.

    Args:
        dataset: the samples.
        batch_sampler: which of them make up the batches.
        accumulate_grad_batches: micro-batches in a step; the first of them brings the labels of the others, see
            :func:`look_ahead`.
        options: any other argument of :class:`torch.utils.data.DataLoader`.
    """

    batch_sampler: GlobalBatchSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: GlobalBatchSampler,
        accumulate_grad_batches: NumMicroBatches = 1,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.accumulate_grad_batches = accumulate_grad_batches
        self._num_batches_done = 0
        self._epoch = batch_sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from where the sampler starts.

        Nothing is fetched before the first batch is asked for: Lightning makes the iterator of the first epoch before
        it sets the epoch, and workers would already have begun on another.
        """
        self._num_batches_done, self._epoch = self.batch_sampler.start, self.batch_sampler.epoch
        start = self._num_batches_done
        for batch in _windows(super().__iter__(), self.accumulate_grad_batches, start):
            self._num_batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the data; see :meth:`~harness.data.samplers.GlobalBatchSampler.state_dict`."""
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


class LookAheadLoader:
    """A data loader whose batches know what follows them in the same step; made by :func:`look_ahead`."""

    def __init__(self, loader: Iterable[Any], accumulate_grad_batches: NumMicroBatches) -> None:
        self.loader = loader
        self.accumulate_grad_batches = accumulate_grad_batches

    def __len__(self) -> int:
        """Number of batches, if the loader knows it."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """The loader's batches, the first of each step with the labels of the others."""
        return _windows(iter(self.loader), self.accumulate_grad_batches, 0)

    def __getattr__(self, name: str) -> Any:
        # where Lightning looks for samplers, to tell them the epoch
        if name in ("sampler", "batch_sampler", "dataset"):
            return getattr(self.loader, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; the loader itself is `loader`.")


class StatefulLookAheadLoader(LookAheadLoader):
    """:class:`LookAheadLoader` of a loader with ``state_dict``: saves the state after the last batch handed out."""

    def __init__(self, loader: Iterable[Any], accumulate_grad_batches: NumMicroBatches) -> None:
        super().__init__(loader, accumulate_grad_batches)
        self._num_done = self._start = 0
        self._state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Batches from where the state has put the loader."""
        self._num_done, self._start = self._start, 0
        states: deque[dict[str, Any]] = deque()

        def fetched() -> Iterator[Any]:
            for batch in self.loader:
                states.append(self.loader.state_dict())  # type: ignore[attr-defined]
                yield batch

        for batch in _windows(fetched(), self.accumulate_grad_batches, self._num_done):
            self._num_done += 1
            self._state = states.popleft()
            yield batch
        self._num_done, self._state = 0, None

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the last batch that was handed out, and the number of these."""
        state = self.loader.state_dict() if self._state is None else self._state  # type: ignore[attr-defined]
        return {"num_done": self._num_done, "loader": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state`` with the next iteration."""
        self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        num_done = int(state["num_done"])
        is_whole = hasattr(self.loader, "__len__") and num_done >= len(self)
        self._num_done = self._start = 0 if is_whole else num_done
        self._state = state["loader"]


def look_ahead(loader: Iterable[Any], accumulate_grad_batches: NumMicroBatches) -> LookAheadLoader:
    """A data loader of your own for ``Trainer(accumulate_grad_batches=k)``: it looks k - 1 batches ahead.

    The gradient of a step of k micro-batches needs the number of labels of all of them before the first backward pass.
    The first micro-batch of each step therefore has a further entry, the list of the others without their neighbour
    lists; :class:`~harness.module.ForceFieldModule` takes it out before the model sees the batch. On the way to the
    device, labels pass twice; edges, the largest part, once.

    Epochs and the position for a restart pass through to the loader, if it has ``set_epoch`` on its sampler, or
    ``state_dict`` and ``load_state_dict``. Lightning adds no sampler of its own to it: bring one that deals out the
    data to the ranks, as ``Trainer(use_distributed_sampler=False)`` asks for anyway.

    Args:
        loader: any iterable of batches, dictionaries of tensors.
        accumulate_grad_batches: k, or a callable that returns it, such as ``lambda: trainer.accumulate_grad_batches``.

    Raises:
        ValueError: k is below 1.
    """
    if not callable(accumulate_grad_batches):
        whole_number("accumulate_grad_batches", accumulate_grad_batches)
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return (StatefulLookAheadLoader if stateful else LookAheadLoader)(loader, accumulate_grad_batches)


def _windows(batches: Iterator[Any], accumulate_grad_batches: NumMicroBatches, start: int) -> Iterator[Any]:
    """The batches, the first of each step with the labels of the others; steps begin at multiples of their number.

    Args:
        batches: of an epoch, from number ``start`` on.
        accumulate_grad_batches: batches in a step; the last step may have fewer, and so has the first if ``start`` is
            no multiple.
        start: number of the first batch in its epoch.
    """
    position = start
    while True:
        given = accumulate_grad_batches() if callable(accumulate_grad_batches) else accumulate_grad_batches
        whole_number("accumulate_grad_batches", given)
        window: deque[Any] = deque()
        for batch in batches:
            window.append(batch)
            if len(window) == given - position % given:
                break
        if not window:
            return
        position += len(window)
        if given > 1:
            first = window.popleft()
            if not isinstance(first, Mapping):
                raise TypeError(
                    f"Gradient accumulation needs batches that are dictionaries, found {type(first).__name__}."
                )
            window.appendleft({**first, UPCOMING_LABELS: [_labels(batch) for batch in window]})
        while window:
            yield window.popleft()  # kept by nobody but its consumer


def _labels(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in _NEIGHBOR_LISTS}
