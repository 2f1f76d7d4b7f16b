"""Tensors of one frame, and batches of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from harness.data.batch_fields import BatchField, empty_fields, fields_of_frame
from harness.data.neighbors import neighbor_list
from harness.data.reading import Frame

__all__ = ["collate", "empty_batch", "frame_to_sample", "type_indices"]


def type_indices(frame: Frame, type_names: Sequence[str]) -> Tensor:
    """Positions of the chemical symbols of a frame in ``type_names``, int64 ``[num_atoms]``.

    Raises:
        ValueError: if a symbol is not among the type names.
    """
    index_of = {name: index for index, name in enumerate(type_names)}
    symbols = frame.atoms.get_chemical_symbols()
    unknown = sorted(set(symbols) - set(index_of))
    if unknown:
        raise ValueError(
            f"{frame.location}: {', '.join(unknown)} is not among the type names {list(type_names)}; add it to "
            "type_names, or leave type_names out to take all symbols of the data"
        )
    return torch.tensor([index_of[symbol] for symbol in symbols], dtype=torch.int64)


def frame_to_sample(
    frame: Frame,
    type_names: Sequence[str],
    cutoff: float,
    frame_index: int = 0,
    dtype: torch.dtype = torch.float32,
    fields: Sequence[BatchField] = (),
) -> dict[str, Tensor]:
    """Tensors of one frame: a batch of one graph, with its neighbour list.

    Labels that are missing are NaN, so that every sample has the same fields. ``total_energy`` is float64 whatever the
    dtype: of -9000 eV, float32 keeps no more than 1 meV.

    Args:
        frame: the structure and its labels.
        type_names: chemical symbols in the order of the type indices.
        cutoff: of the neighbour list, in Å.
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
    edge_index, edge_cell_shift = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    energy = np.nan if frame.energy is None else frame.energy
    forces = np.full((num_atoms, 3), np.nan) if frame.forces is None else frame.forces
    stress = np.full((3, 3), np.nan) if frame.stress is None else frame.stress
    return {
        "pos": torch.tensor(atoms.positions, dtype=dtype),
        "atom_types": type_indices(frame, type_names),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.int64),
        "batch": torch.zeros(num_atoms, dtype=torch.int64),
        "num_atoms": torch.tensor([num_atoms], dtype=torch.int64),
        "cell": torch.tensor(atoms.cell.array, dtype=dtype).unsqueeze(0),
        "pbc": torch.tensor(atoms.pbc, dtype=torch.bool).unsqueeze(0),
        "edge_index": torch.from_numpy(edge_index),
        "edge_cell_shift": torch.tensor(edge_cell_shift, dtype=dtype),
        "total_energy": torch.tensor([[energy]], dtype=torch.float64),
        "forces": torch.tensor(forces, dtype=dtype),
        "stress": torch.tensor(stress, dtype=dtype).unsqueeze(0),
        "frame_index": torch.tensor([frame_index], dtype=torch.int64),
        **fields_of_frame(frame, fields, dtype),
    }


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
        if name in ("edge_index", "batch"):
            counted = "pos" if name == "edge_index" else "num_atoms"
            lengths = torch.tensor([sample[counted].shape[0] for sample in samples])
            offsets = (lengths.cumsum(0) - lengths).tolist()
            values = [value + offset for value, offset in zip(values, offsets, strict=True)]
        batch[name] = torch.cat(values, dim=1 if name == "edge_index" else 0)
    return batch
