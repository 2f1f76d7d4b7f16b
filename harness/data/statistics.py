"""Numbers of a training set from which models take their scales and shifts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.data.collate import type_indices
from harness.data.dataset import AtomsDataset

__all__ = ["DataStatistics", "training_statistics"]

_NEIGHBOR_FRAMES = 500  # neighbour lists of more frames would not change the mean but delay the start


@dataclass(frozen=True, eq=False)
class DataStatistics:
    """Statistics of a training set.

    Attributes:
        type_names: chemical symbols in the order of the type indices.
        energy_shifts: energies per type in eV that fit the total energies best, float64 ``[num_types]``.
        force_rms: root mean square of all labelled force components in eV/Å; NaN without any.
        mean_neighbors: mean number of neighbours of an atom within the cutoff.
        num_frames: number of frames.
        num_atoms: number of atoms of all frames together.
    """

    type_names: tuple[str, ...]
    energy_shifts: Tensor
    force_rms: float
    mean_neighbors: float
    num_frames: int
    num_atoms: int


def training_statistics(dataset: AtomsDataset) -> DataStatistics:
    r"""Statistics of ``dataset``; a function of the data alone, hence the same on every rank.

    The energy shifts minimise :math:`\sum_g \big(E_g - \sum_t n_{gt}\, \mu_t\big)^2` over the labelled frames, with
    :math:`n_{gt}` atoms of type :math:`t` in frame :math:`g`; where the compositions leave them undetermined, those of
    least norm are taken, and zeros without any energy. The mean number of neighbours is taken over up to 500 frames at
    equal distances.
    """
    num_types = len(dataset.type_names)
    counts, energies, squares, num_components, num_atoms = [], [], 0.0, 0, 0
    for frame in dataset.frames:
        num_atoms += len(frame.atoms)
        if frame.energy is not None:
            types = type_indices(frame, dataset.type_names).numpy()
            counts.append(np.bincount(types, minlength=num_types))
            energies.append(frame.energy)
        if frame.forces is not None:
            squares += float(np.nansum(frame.forces**2))
            num_components += int(np.count_nonzero(~np.isnan(frame.forces)))

    shifts = np.zeros(num_types)
    if energies:
        shifts = np.linalg.lstsq(np.array(counts, dtype=np.float64), np.array(energies), rcond=None)[0]

    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _NEIGHBOR_FRAMES)).round().astype(int))
    samples = [dataset[int(index)] for index in chosen]
    num_edges = sum(sample["edge_index"].shape[1] for sample in samples)
    return DataStatistics(
        type_names=tuple(dataset.type_names),
        energy_shifts=torch.from_numpy(shifts),
        force_rms=float(np.sqrt(squares / num_components)) if num_components else float("nan"),
        mean_neighbors=num_edges / sum(sample["pos"].shape[0] for sample in samples),
        num_frames=len(dataset),
        num_atoms=num_atoms,
    )
