"""Frames of several sets as one data set, with the number of the set of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.data.batch_fields import BatchField, GroupField
from harness.data.dataset import AtomsDataset
from harness.data.frames import FrameArrays, FrameSet, JoinedFrames, checked_index
from harness.data.mixture_references import Moves
from harness.data.reading import Frame

__all__ = ["MixtureDataset", "MixtureFields", "MixtureFrames"]


class MixtureFrames(JoinedFrames):
    """Frames of data sets after one another, their energies on the level of the mixture.

    Args:
        parts: frames of the data sets.
        set_indices: number of the set that each belongs to.
        moves: of the energies.
    """

    def __init__(self, parts: Sequence[FrameSet], set_indices: Sequence[int], moves: Moves) -> None:
        super().__init__(parts)
        self._set_indices, self._moves = list(set_indices), moves
        self._starts = np.cumsum([0, *map(len, parts)])

    def locate(self, index: int) -> tuple[int, int]:
        """Part that a frame is in, and its position there.

        Raises:
            IndexError: there is no such frame.
        """
        position = checked_index(self, index)
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return part, position - int(self._starts[part])

    def arrays(self, index: int) -> FrameArrays:
        """Numbers of one frame."""
        part, place = self.locate(index)
        found = self.parts[part].arrays(place)
        if found.energy is None:
            return found
        return found._replace(energy=found.energy - self._moves.of_elements(self._set_indices[part], found.numbers))

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns; see :meth:`~harness.data.frames.FrameSet.column`."""
        found = super().column(name)
        if name != "energy":
            return found
        moved = [self._moves.of_frames(*each) for each in zip(self._set_indices, self.parts, strict=True)]
        return found - np.concatenate(moved)

    def _frame(self, index: int) -> Frame:
        part, place = self.locate(index)
        frame = self.parts[part][place]
        if frame.energy is None:
            return frame
        move = self._moves.of_elements(self._set_indices[part], frame.atoms.numbers)
        return replace(frame, energy=frame.energy - move) if move else frame


class MixtureFields:
    """Fields beyond structure, energy, forces and stress that samples of any set have, for those of all sets.

    A field that a set does not have is there with what stands for no value: NaN of a label, 1 of a weight, -1 of a
    group. Groups of the same name are the same in all sets.

    Args:
        of_sets: fields of each set, by its name.
        groups: names of the groups of each set.

    Raises:
        ValueError: a field has different shapes in two sets.
    """

    def __init__(self, of_sets: Mapping[str, Sequence[BatchField]], groups: Mapping[str, Sequence[str]]) -> None:
        self.group_names = sorted(set().union(*groups.values()))
        self._all: dict[str, BatchField] = {}
        origin: dict[str, str] = {}
        for name, fields in of_sets.items():
            for each in fields:
                own = replace(each, names=tuple(self.group_names)) if isinstance(each, GroupField) else each
                before = self._all.setdefault(each.name, own)
                first = origin.setdefault(each.name, name)
                if (before.level, before.shape, before.dtype) != (each.level, each.shape, each.dtype):
                    raise ValueError(
                        f"the field {each.name!r} is of level {before.level} and shape {list(before.shape)} in the set "
                        f"{first}, and of level {each.level} and shape {list(each.shape)} in {name}; expected the same "
                        f"(data.labels, data.inputs)"
                    )
        self._absent = [
            [each for each in self._all.values() if each.name not in {own.name for own in fields}]
            for fields in of_sets.values()
        ]
        # the last entry is that of -1, no group
        self._groups = [torch.tensor([*map(self.group_names.index, names), -1]) for names in groups.values()]

    @property
    def fields(self) -> list[BatchField]:
        """Fields of all sets."""
        return list(self._all.values())

    def complete(self, sample: dict[str, Tensor], set_index: int, dtype: torch.dtype) -> None:
        """Add to a sample of a set what it lacks of the fields of all sets."""
        group = sample.get("group_index")
        if group is not None:
            sample["group_index"] = self._groups[set_index][group]
        for each in self._absent[set_index]:
            rows = sample["pos"].shape[0] if each.level == "node" else 1
            sample[each.name] = torch.full((rows, *each.shape), each.fill, dtype=each.dtype or dtype)

    def empty(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fields of a batch of no graphs."""
        return {name: each.empty(dtype) for name, each in self._all.items()}


class MixtureDataset(AtomsDataset):
    """Samples of several data sets after one another.

    A sample has ``set_index``, int64 ``[1]``, type indices of the mixture, and the energy on its level; ``frame_index``
    is the position in this data set. Neighbour lists are made, and kept, by the data sets that it is made of.

    Args:
        parts: the data sets.
        set_indices: number of the set that each belongs to.
        type_names: chemical symbols in the order of the type indices.
        moves: of the energies, see :mod:`harness.data.mixture_references`.
        further: fields beyond structure, energy, forces and stress, those of the samples of all sets.
    """

    def __init__(
        self,
        parts: Sequence[AtomsDataset],
        set_indices: Sequence[int],
        type_names: Sequence[str],
        moves: Moves,
        further: MixtureFields,
    ) -> None:
        first = parts[0]
        frames = MixtureFrames([part.frames for part in parts], set_indices, moves)
        kept, edges = first.cache_neighbors, first.with_edges
        super().__init__(frames, type_names, first.cutoff, first.dtype, kept, further.fields, edges)
        self.parts = list(parts)
        self.set_indices = list(set_indices)
        self.moves = moves
        self.further = further
        self._locate = frames.locate
        self._types = [_positions(part.type_names, self.type_names) for part in parts]

    def _refuse_unknown_symbols(self) -> None:
        """Nothing: the data sets that it is made of have done it, and the compositions of all would be a large copy."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample of one frame. Not to be changed in place."""
        part, place = self._locate(index)
        sample = dict(self.parts[part][place])
        set_index, types = self.set_indices[part], self._types[part]
        if types is not None:
            sample["atom_types"] = types.index_select(0, sample["atom_types"])
        move = self.moves.of_types(set_index, sample["atom_types"])
        if move:
            sample["total_energy"] = sample["total_energy"] - move
        sample["frame_index"] = torch.tensor([index], dtype=torch.int64)
        sample["set_index"] = torch.tensor([set_index], dtype=torch.int64)
        self.further.complete(sample, set_index, self.dtype)
        return sample

    def num_edges(self) -> NDArray[np.int64]:
        """Number of edges of each frame, ``[num_frames]``, see :meth:`AtomsDataset.num_edges`."""
        return np.concatenate([part.num_edges() for part in self.parts])


def _positions(names: Sequence[str], among: Sequence[str]) -> Tensor | None:
    """Positions of type names among those of the mixture; None where they are the same."""
    if list(names) == list(among):
        return None
    return torch.tensor([list(among).index(name) for name in names], dtype=torch.int64)
