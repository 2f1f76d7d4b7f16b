"""Tensors of one frame, and batches of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from harness.data.batch_fields import BatchField, empty_fields, fields_of_frame
from harness.data.neighbors import neighbor_list
from harness.data.packing import pack_in_worker
from harness.data.reading import Frame

__all__ = ["collate", "empty_batch", "frame_to_sample", "type_indices"]

_COUNTED = {"edge_index": "pos", "batch": "num_atoms"}
"""Fields that count on from sample to sample, and the field with as many rows as they count."""


def type_indices(frame: Frame, type_names: Sequence[str]) -> Tensor:
    """Positions of the chemical symbols of a frame in ``type_names``, int64 ``[num_atoms]``.

    Raises:
        ValueError: if a symbol is not among the type names.
    """
    return torch.from_numpy(_type_indices(frame, type_names))


def _type_indices(frame: Frame, type_names: Sequence[str]) -> NDArray[np.int64]:
    numbers = frame.atoms.numbers
    indices: NDArray[np.int64] = _type_table(tuple(type_names))[numbers]
    if indices.min(initial=0) < 0:
        unknown = sorted({chemical_symbols[number] for number in numbers[indices < 0]})
        raise ValueError(
            f"{frame.location}: {', '.join(unknown)} is not among the type names {list(type_names)}; add it to "
            "type_names, or leave type_names out to take all symbols of the data"
        )
    return indices


@lru_cache(maxsize=8)
def _type_table(type_names: tuple[str, ...]) -> NDArray[np.int64]:
    """Type index of each atomic number; -1 for one that has none."""
    table = np.full(len(chemical_symbols), -1, dtype=np.int64)
    for index, name in enumerate(type_names):
        if name in atomic_numbers:
            table[atomic_numbers[name]] = index
    return table


def frame_to_sample(
    frame: Frame,
    type_names: Sequence[str],
    cutoff: float | None,
    frame_index: int = 0,
    dtype: torch.dtype = torch.float32,
    fields: Sequence[BatchField] = (),
) -> dict[str, Tensor]:
    """Tensors of one frame: a batch of one graph, with its neighbour list if there is a cutoff.

    Labels that are missing are NaN, so that every sample has the same fields. ``total_energy`` is float64 whatever the
    dtype: of -9000 eV, float32 keeps no more than 1 meV.

    Args:
        frame: the structure and its labels.
        type_names: chemical symbols in the order of the type indices.
        cutoff: of the neighbour list, in Å; None for a sample without edges.
        frame_index: number of the frame in its data set.
        dtype: of positions, cell, shifts, forces and stress.
        fields: further ones: labels, inputs, weights, group.

    Returns:
        ``pos`` ``[num_atoms, 3]``, ``atom_types``, ``atomic_numbers`` and ``batch`` ``[num_atoms]``, ``num_atoms`` and
        ``frame_index`` ``[1]``, ``cell`` ``[1, 3, 3]``, ``pbc`` ``[1, 3]``, ``edge_index`` ``[2, num_edges]``,
        ``edge_cell_shift`` ``[num_edges, 3]``, ``total_energy`` ``[1, 1]``, ``forces`` ``[num_atoms, 3]`` and
        ``stress`` ``[1, 3, 3]``; in Å and eV.

    Raises:
        ValueError: if a symbol is not among the type names, or the cutoff is not positive.
    """
    atoms = frame.atoms
    num_atoms = len(atoms)
    real = _FLOATS[dtype]
    edges: dict[str, NDArray[Any]] = {}
    if cutoff is not None:
        edge_index, edge_cell_shift = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
        edges = {"edge_index": edge_index, "edge_cell_shift": np.array(edge_cell_shift, dtype=real)}
    missing = np.array(np.nan)
    arrays = {
        "pos": np.array(atoms.positions, dtype=real),
        "atom_types": _type_indices(frame, type_names),
        "atomic_numbers": np.array(atoms.numbers, dtype=np.int64),
        "batch": np.zeros(num_atoms, dtype=np.int64),
        "num_atoms": np.array([num_atoms], dtype=np.int64),
        "cell": np.array(atoms.cell.array[None], dtype=real),
        "pbc": np.array(atoms.pbc[None], dtype=bool),
        **edges,
        "total_energy": np.array([[np.nan if frame.energy is None else frame.energy]], dtype=np.float64),
        "forces": _filled(missing if frame.forces is None else frame.forces, (num_atoms, 3), real),
        "stress": _filled(missing if frame.stress is None else frame.stress, (1, 3, 3), real),
        "frame_index": np.array([frame_index], dtype=np.int64),
    }
    sample = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**sample, **fields_of_frame(frame, fields, dtype)}


_FLOATS: dict[torch.dtype, type[np.floating[Any]]] = {torch.float32: np.float32, torch.float64: np.float64}


def _filled(values: NDArray[np.float64], shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    array = np.empty(shape, dtype=dtype)
    array[...] = values
    return array


def empty_batch(dtype: torch.dtype = torch.float32, fields: Sequence[BatchField] = ()) -> dict[str, Tensor]:
    """The batch of no graphs: all fields, of length zero. Collating it with others changes nothing."""
    return {
        "pos": torch.zeros(0, 3, dtype=dtype),
        "atom_types": torch.zeros(0, dtype=torch.int64),
        "atomic_numbers": torch.zeros(0, dtype=torch.int64),
        "batch": torch.zeros(0, dtype=torch.int64),
        "num_atoms": torch.zeros(0, dtype=torch.int64),
        "cell": torch.zeros(0, 3, 3, dtype=dtype),
        "pbc": torch.zeros(0, 3, dtype=torch.bool),
        "edge_index": torch.zeros(2, 0, dtype=torch.int64),
        "edge_cell_shift": torch.zeros(0, 3, dtype=dtype),
        "total_energy": torch.zeros(0, 1, dtype=torch.float64),
        "forces": torch.zeros(0, 3, dtype=dtype),
        "stress": torch.zeros(0, 3, 3, dtype=dtype),
        "frame_index": torch.zeros(0, dtype=torch.int64),
        **empty_fields(fields, dtype),
    }


def collate(
    samples: Sequence[Mapping[str, Tensor]], dtype: torch.dtype = torch.float32, fields: Sequence[BatchField] = ()
) -> dict[str, Tensor]:
    """One batch of the graphs of all ``samples``, in order; the samples, themselves batches, are left as they are.

    ``edge_index`` and ``batch`` count on from sample to sample; everything else is concatenated.

    Args:
        samples: batches of any number of graphs; no samples give :func:`empty_batch`.
        dtype: of the empty batch.
        fields: further ones of the empty batch.

    Raises:
        ValueError: if the samples do not have the same fields.
    """
    if not samples:
        return empty_batch(dtype, fields)
    names = samples[0].keys()
    for position, sample in enumerate(samples):
        if sample.keys() != names:
            raise ValueError(
                f"samples of a batch must have the same fields; sample {position} has {sorted(sample)} and sample 0 "
                f"has {sorted(names)}"
            )
    batch: dict[str, Tensor] = {}
    for name in names:
        values = [sample[name] for sample in samples]
        batch[name] = torch.cat(values, dim=1 if name == "edge_index" else 0)
        if name in _COUNTED and len(samples) > 1:
            counted = np.array([sample[_COUNTED[name]].shape[0] for sample in samples])
            lengths = np.array([value.shape[-1] for value in values])
            batch[name] += torch.from_numpy(np.repeat(np.cumsum(counted) - counted, lengths))
    return pack_in_worker(batch)
