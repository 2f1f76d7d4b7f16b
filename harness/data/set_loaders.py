"""Loaders of a training set, validation sets and test sets: what data modules of one set and of several have alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from harness.data.dataset import AtomsDataset
from harness.data.evaluation import evaluation_loader
from harness.data.loader import ResumableDataLoader
from harness.data.samplers import GlobalBatchSampler
from harness.strategies import data_parallel_ranks, is_on_gpu

__all__ = ["SetLoaders"]


class SetLoaders(LightningDataModule, ABC):
    """Data module whose sets are there after ``setup``; a subclass says which batches the training has.

    Attributes:
        train_set: training frames.
        val_sets: validation sets.
        test_sets: test sets.
        eval_batch_size: frames in an evaluation step, of all ranks together; None for the limit of training steps.
        num_workers: processes of each data loader.
        pin_memory: whether batches are made in page-locked memory; None for those of a trainer on a GPU.
    """

    train_set: AtomsDataset
    val_sets: Sequence[AtomsDataset]
    test_sets: Sequence[AtomsDataset]
    eval_batch_size: int | None
    num_workers: int
    pin_memory: bool | None
    _limited: str
    _limit: int

    @abstractmethod
    def training_sampler(self, rank: int, num_ranks: int) -> GlobalBatchSampler:
        """Sampler of the training frames in the batches of one rank.

        Raises:
            ValueError: the batches have fewer frames than there are ranks, or a frame is larger than the budget.
        """

    @abstractmethod
    def _collate(self) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """Function that makes a batch of samples, in workers too."""

    def train_dataloader(self) -> ResumableDataLoader:
        """This rank's part of the training batches, in an order by seed and epoch; can be continued in mid-epoch.

        Under ``Trainer(accumulate_grad_batches=k)`` the first batch of each step brings the labels of the others, see
        :func:`~harness.data.loader.look_ahead`.
        """
        self.setup("fit")
        return ResumableDataLoader(
            self.train_set,
            self.training_sampler(*data_parallel_ranks(self.trainer)),
            lambda: 1 if self.trainer is None else self.trainer.accumulate_grad_batches,
            **self._loader_options(),
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """This rank's part of each validation set, every frame on exactly one rank."""
        self.setup("validate")
        return [self._evaluation_loader(dataset) for dataset in self.val_sets]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """This rank's part of each test set, every frame on exactly one rank."""
        self.setup("test")
        return [self._evaluation_loader(dataset) for dataset in self.test_sets]

    def _evaluation_loader(self, dataset: AtomsDataset) -> DataLoader[Any]:
        limited, limit = ("batch_size", self.eval_batch_size) if self.eval_batch_size else (self._limited, self._limit)
        return evaluation_loader(dataset, limited, limit, *data_parallel_ranks(self.trainer), **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": is_on_gpu(self.trainer) if self.pin_memory is None else self.pin_memory,
            "persistent_workers": self.num_workers > 0,  # they hold the samples that they have made
            "collate_fn": self._collate(),
        }
