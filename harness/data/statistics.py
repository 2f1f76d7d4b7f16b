"""Numbers of a training set from which models take their scales and shifts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from harness.data.dataset import AtomsDataset
from harness.data.facts import LABELS
from harness.data.hints import label_hint
from harness.data.reading import LabelKeys
from harness.data.references import fit_references

__all__ = ["DataStatistics", "training_statistics"]

_NEIGHBOR_FRAMES = 500  # neighbour lists of more frames would not change the mean but delay the start
_DENSE_NUMBERS = 4_000_000  # numbers of atoms of all frames up to which they are kept for the fit: 32 MB


@dataclass(frozen=True, eq=False)
class DataStatistics:
    """Statistics of a training set.

    Attributes:
        type_names: chemical symbols in the order of the type indices.
        energy_shifts: energies per type in eV, float64 ``[num_types]``: of isolated atoms where there are some, and
            those that fit the total energies best; see :func:`~harness.data.references.fit_references`.
        force_rms: root mean square of all labelled force components in eV/Å; NaN without any.
        mean_neighbors: mean number of neighbours of an atom within the cutoff.
        num_frames: number of frames.
        num_atoms: number of atoms of all frames together.
        undetermined: directions in which the energies leave ``energy_shifts`` open, orthonormal columns
            ``[num_types, num_undetermined]``; None if that is not known.
        isolated_atoms: energies in eV by symbol that are among ``energy_shifts``.
        energy_key: name of the energies in the files.
        hints: sentences on labels that no frame has, by label: what the frames have in their place.
    """

    type_names: tuple[str, ...]
    energy_shifts: Tensor
    force_rms: float
    mean_neighbors: float
    num_frames: int
    num_atoms: int
    undetermined: Tensor | None = None
    isolated_atoms: Mapping[str, float] = field(default_factory=dict)
    energy_key: str = "energy"
    hints: Mapping[str, str] = field(default_factory=dict)


def training_statistics(
    dataset: AtomsDataset, isolated_atoms: Mapping[str, float] | None = None, keys: LabelKeys | None = None
) -> DataStatistics:
    r"""Statistics of ``dataset``; a function of the data alone, hence the same on every rank.

    The energy shifts minimise :math:`\sum_g \big(E_g - \sum_t n_{gt}\, \mu_t\big)^2` over the labelled frames, with
    :math:`n_{gt}` atoms of type :math:`t` in frame :math:`g`; where the compositions leave them undetermined, see
    :func:`~harness.data.references.fit_references`. They are zeros without any energy. Sums over frames are taken as
    they come, so that no matrix of all compositions is needed; up to 4 million numbers it is kept for its precision.
    The mean number of neighbours is taken over up to 500 frames at equal distances.

    Args:
        dataset: training frames.
        isolated_atoms: energies of isolated atoms in eV by symbol, which are kept as they are.
        keys: names of the labels in the files, for hints on labels that are missing.
    """
    type_names = tuple(dataset.type_names)
    frames = dataset.frames
    squares, num_components = frames.force_squares()
    sums = frames.energy_sums(type_names)
    rows = frames.energy_rows(type_names) if sums.num_frames * len(type_names) <= _DENSE_NUMBERS else None
    isolated = {name: energy for name, energy in (isolated_atoms or {}).items() if name in type_names}
    references = fit_references(sums, type_names, isolated, rows if sums.num_frames else None)

    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _NEIGHBOR_FRAMES)).round().astype(int))
    num_edges = sum(dataset.count_edges(int(index)) for index in chosen)
    missing = [name for name in LABELS if not len(frames.labelled(name))]
    names = keys or LabelKeys()
    return DataStatistics(
        type_names=type_names,
        energy_shifts=torch.from_numpy(references.energies),
        force_rms=float(np.sqrt(squares / num_components)) if num_components else float("nan"),
        mean_neighbors=num_edges / int(dataset.num_atoms()[chosen].sum()),
        num_frames=len(dataset),
        num_atoms=int(frames.num_atoms().sum()),
        undetermined=torch.from_numpy(references.undetermined),
        isolated_atoms=isolated,
        energy_key=names.energy,
        hints={label: label_hint(frames, label, names) for label in missing},
    )
