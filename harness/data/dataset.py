"""Map-style data set of frames, with neighbour lists made on demand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from harness.data.batch_fields import BatchField
from harness.data.collate import frame_to_sample, type_indices
from harness.data.frames import as_frame_set
from harness.data.neighbors import neighbor_list
from harness.data.reading import Frame

__all__ = ["AtomsDataset"]

_CACHED_BYTES = 1 << 29
"""Bound of the samples that a rank keeps of a data set; each worker of a loader has its share of it."""


class AtomsDataset(Dataset[dict[str, Tensor]]):
    """Samples of frames; the ``frame_index`` of a sample is its position in this data set.

    Args:
        frames: structures and labels.
        type_names: chemical symbols in the order of the type indices.
        cutoff: of the neighbour lists, in Å.
        dtype: of all floating-point fields but ``total_energy``.
        cache_neighbors: whether a sample, with its neighbour list, stays in memory once it has been made; up to 512 MiB
            of them on a rank, which its workers divide among them.
        fields: further ones of the samples: labels, inputs, weights, group.
        with_edges: whether samples have their edges; without, they are made of whole batches, see
            :mod:`harness.data.device_neighbors`.

    Raises:
        ValueError: if a frame has a symbol that is not among the type names.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        type_names: Sequence[str],
        cutoff: float,
        dtype: torch.dtype = torch.float32,
        cache_neighbors: bool = True,
        fields: Sequence[BatchField] = (),
        with_edges: bool = True,
    ) -> None:
        self.frames = as_frame_set(frames)
        self.type_names = list(type_names)
        self.cutoff = cutoff
        self.dtype = dtype
        self.cache_neighbors = cache_neighbors
        self.fields = tuple(fields)
        self.with_edges = with_edges
        self._samples: dict[int, dict[str, Tensor]] = {}
        self._cached_bytes = 0
        self._num_edges: NDArray[np.int64] | None = None
        self._refuse_unknown_symbols()  # now rather than in the middle of an epoch

    def _refuse_unknown_symbols(self) -> None:
        compositions = self.frames.compositions()
        for symbol in sorted(compositions.symbols() - set(self.type_names)):
            type_indices(self.frames[compositions.first_with(symbol)], self.type_names)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample of one frame; see :func:`~harness.data.collate.frame_to_sample`. Not to be changed in place."""
        if index in self._samples:
            return self._samples[index]
        cutoff = self.cutoff if self.with_edges else None
        sample = frame_to_sample(self.frames[index], self.type_names, cutoff, index, self.dtype, self.fields)
        if self.cache_neighbors:
            self._keep(index, sample)
        return sample

    def _keep(self, index: int, sample: dict[str, Tensor]) -> None:
        """Keep a sample if there is room: every one is drawn as often, so that none is worth more than another."""
        worker = get_worker_info()
        size = sum(value.nbytes for value in sample.values())
        if self._cached_bytes + size <= _CACHED_BYTES // (1 if worker is None else worker.num_workers):
            self._samples[index] = sample
            self._cached_bytes += size

    def num_atoms(self) -> NDArray[np.int64]:
        """Number of atoms of each frame, ``[num_frames]``."""
        return self.frames.num_atoms()

    def num_edges(self) -> NDArray[np.int64]:
        """Number of edges of each frame, ``[num_frames]``: of each pair within the cutoff there are two.

        The first call makes the neighbour lists of all frames, unless these know the numbers. The lists stay in memory
        with their samples if ``cache_neighbors``; otherwise only the numbers do.
        """
        if self._num_edges is None:
            self._num_edges = self.frames.num_edges(self.cutoff)
        if self._num_edges is None:
            self._num_edges = np.array([self.count_edges(index) for index in range(len(self))], dtype=np.int64)
        return self._num_edges

    def count_edges(self, index: int) -> int:
        """Number of edges of one frame."""
        if self.cache_neighbors and self.with_edges:
            return int(self[index]["edge_index"].shape[1])
        atoms = self.frames[index].atoms
        return neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, self.cutoff)[0].shape[1]
