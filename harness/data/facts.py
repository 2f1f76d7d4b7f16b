"""Facts of frames as columns, one row a frame: what a training asks of all frames before it reads any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from harness.data.isolated import is_isolated
from harness.data.reading import Frame
from harness.data.repeats import frame_key

__all__ = ["COLUMNS", "LABELS", "MISSING", "PARTLY_KNOWN", "WEIGHTS", "WHOLE", "Compositions", "columns_of", "state_of"]

COLUMNS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "num_atoms": ("<i4", ()),
    "energy": ("<f8", ()),  # eV, NaN where there is none
    "force_squares": ("<f8", ()),  # sum over the known components, eV²/Å²
    "force_components": ("<i4", ()),  # number of the known components
    "stress_left_out": ("|b1", ()),
    "isolated": ("|b1", ()),  # an isolated atom by its config_type
    "structure": ("<u8", ()),  # hash of elements, positions, cell and periodicity
    "species": ("<u8", ()),  # hash of the elements in their order, and of the periodicity
    "index": ("<i8", ()),  # number of the frame in its file
    "origin": ("<i4", ()),  # its file among the names of the set's files
    "group": ("<i4", ()),  # its group among the names of the set's groups, -1 without one
}
"""Columns that every set has: dtype, and shape of an entry."""

LABELS = ("energy", "forces", "stress")
"""Labels that every set knows; further ones come by the names of their fields."""

WEIGHTS = ("weight", "energy_weight", "forces_weight", "stress_weight")
"""Columns of the sets that have weights: 1 where a frame has none of that name."""

MISSING, PARTLY_KNOWN, WHOLE = 0, 1, 2
"""States of a label of a frame: not there or all NaN, NaN in some of its numbers, without NaN."""


@dataclass(frozen=True, eq=False)
class Compositions:
    """Elements of frames, in rows of different lengths: an entry for each element of a frame, by atomic number.

    Attributes:
        offsets: where the entries of a frame start, and where the last one's end, ``[num_frames + 1]``.
        numbers: atomic numbers, ``[num_entries]``.
        counts: number of atoms of that element, ``[num_entries]``.
        with_forces: number of these with a force, of which at least one component is known, ``[num_entries]``.
    """

    offsets: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    counts: NDArray[np.int32]
    with_forces: NDArray[np.int32]

    @classmethod
    def of(cls, frames: Iterable[Frame]) -> Compositions:
        """Elements of frames."""
        lengths, numbers, counts, with_forces = [0], [np.zeros(0, np.int64)], [], []
        for frame in frames:
            each = np.bincount(frame.atoms.numbers, minlength=1)
            present = np.flatnonzero(each)
            known = np.zeros_like(each)
            if frame.forces is not None:
                is_known = ~np.isnan(frame.forces).all(axis=1)
                known = np.bincount(frame.atoms.numbers[is_known], minlength=len(each))
            lengths.append(len(present))
            numbers.append(present)
            counts.append(each[present])
            with_forces.append(known[present])
        return cls(
            np.cumsum(lengths, dtype=np.int64),
            np.concatenate(numbers).astype(np.uint8),
            np.concatenate([numbers[0], *counts]).astype(np.int32),
            np.concatenate([numbers[0], *with_forces]).astype(np.int32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Compositions]) -> Compositions:
        """Elements of the frames of all parts, in order."""
        lengths = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
        return cls(
            np.cumsum(np.concatenate(lengths)),
            np.concatenate([np.zeros(0, np.uint8), *(part.numbers for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.counts for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.with_forces for part in parts)]),
        )

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.offsets) - 1

    def take(self, indices: NDArray[np.int64]) -> Compositions:
        """Elements of some of the frames."""
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        entries = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Compositions(offsets, self.numbers[entries], self.counts[entries], self.with_forces[entries])

    def symbols(self, with_forces: bool = False) -> set[str]:
        """Chemical symbols of all frames, or of atoms with a force alone."""
        atoms = np.bincount(self.numbers, self.with_forces if with_forces else self.counts)
        return {str(chemical_symbols[number]) for number in np.flatnonzero(atoms)}

    def dense(self, type_names: Sequence[str]) -> NDArray[np.float64]:
        """Numbers of atoms of each type, ``[num_frames, num_types]``; elements that are no type are left out."""
        types = self.types(type_names)
        frames = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        known = types >= 0
        found = np.zeros((len(self), len(type_names)))
        found[frames[known], types[known]] = self.counts[known]
        return found

    def types(self, type_names: Sequence[str]) -> NDArray[np.int64]:
        """Position of each entry's element among the types, ``[num_entries]``; -1 for one that is no type."""
        index_of = np.full(256, -1, dtype=np.int64)
        index_of[[atomic_numbers[name] for name in type_names]] = np.arange(len(type_names))
        return index_of[self.numbers]

    def sums(self, values: NDArray[np.float64], type_names: Sequence[str]) -> NDArray[np.float64]:
        """Sum of a value of each type over the atoms of each frame, ``[num_frames]``; elements that are no type add 0.

        Args:
            values: ``[num_types]``.
            type_names: chemical symbols in the order of the types.
        """
        of_entries = np.append(values, 0.0)[self.types(type_names)] * self.counts
        frames = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return np.bincount(frames, of_entries, minlength=len(self)).astype(np.float64)

    def first_with(self, symbol: str) -> int:
        """The first frame that has an element.

        Raises:
            ValueError: if none has it.
        """
        entries = np.flatnonzero(self.numbers == atomic_numbers[symbol])
        if not len(entries):
            raise ValueError(f"no frame has {symbol}")
        return int(np.searchsorted(self.offsets, entries[0], side="right")) - 1

    def chunks(self, chosen: NDArray[np.int64], size: int) -> Iterator[tuple[NDArray[np.int64], Compositions]]:
        """Parts of the frames ``chosen``, of up to ``size``, with their elements."""
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            yield part, self.take(part)


def state_of(label: NDArray[np.float64] | float | None) -> int:
    """State of a label: :data:`MISSING`, :data:`PARTLY_KNOWN` or :data:`WHOLE`; integers are whole."""
    if label is None:
        return MISSING
    unknown = np.isnan(label) if np.asarray(label).dtype.kind == "f" else np.zeros(1, bool)
    if not unknown.any():
        return WHOLE
    return MISSING if unknown.all() else PARTLY_KNOWN


def columns_of(frames: Sequence[Frame], origins: list[str], groups: list[str]) -> dict[str, NDArray[np.generic]]:
    """Columns of :data:`COLUMNS`, of the weights if a frame has one, and ``state_<label>`` of each label.

    Args:
        frames: of which.
        origins: names of files so far; those of the frames are added.
        groups: names of groups so far, likewise.
    """
    origin_codes = {name: code for code, name in enumerate(origins)}
    group_codes = {name: code for code, name in enumerate(groups)}
    found = {name: np.zeros((len(frames), *shape), dtype) for name, (dtype, shape) in COLUMNS.items()}
    labels = [*LABELS, *sorted({name for frame in frames for name in frame.extras})]
    weights = [name for name in WEIGHTS if any(name in frame.weights for frame in frames)]
    found |= {f"state_{name}": np.zeros(len(frames), np.uint8) for name in labels}
    found |= {name: np.ones(len(frames)) for name in weights}
    for row, frame in enumerate(frames):
        atoms = frame.atoms
        found["num_atoms"][row] = len(atoms)
        found["energy"][row] = np.nan if frame.energy is None else frame.energy
        if frame.forces is not None:
            components = frame.forces.ravel()  # in one order, whatever the layout: sums are the same to the last bit
            known = components[~np.isnan(components)]
            found["force_squares"][row], found["force_components"][row] = known @ known, len(known)
        found["stress_left_out"][row] = frame.stress_left_out
        found["isolated"][row] = is_isolated(frame)
        found["structure"][row] = frame_key(frame)
        found["species"][row] = _species_key(frame)
        found["index"][row] = frame.index
        found["origin"][row] = origin_codes.setdefault(frame.origin, len(origin_codes))
        found["group"][row] = -1 if frame.group is None else group_codes.setdefault(frame.group, len(group_codes))
        for name in LABELS:
            found[f"state_{name}"][row] = state_of(getattr(frame, name))
        for name, label in frame.extras.items():
            found[f"state_{name}"][row] = state_of(label)
        for name in weights:
            found[name][row] = frame.weights.get(name, 1.0)
    origins[:], groups[:] = list(origin_codes), list(group_codes)
    return found


def _species_key(frame: Frame) -> int:
    atoms = frame.atoms
    digest = hashlib.blake2b(np.ascontiguousarray(atoms.numbers, dtype="<i8").tobytes(), digest_size=8)
    digest.update(np.asarray(atoms.pbc, dtype=np.uint8).tobytes())
    return int.from_bytes(digest.digest(), "little")
