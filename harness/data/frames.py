"""Sets of frames: one frame at a time, and facts of all of them without reading any.

A training asks two things of its data. Workers read single frames, by index. Checks, statistics, samplers and messages
ask for facts of all frames: how many atoms each has, which labels, how often an element. A :class:`FrameSet` answers
both; whether its frames are in memory or on disk is its own business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from harness.data.facts import COLUMNS, LABELS, MISSING, WEIGHTS, WHOLE, Compositions, columns_of
from harness.data.reading import Frame, available_labels
from harness.data.references import EnergySums

__all__ = ["FrameArrays", "FrameList", "FrameSet", "FrameSubset", "JoinedFrames", "as_frame_set"]

_CHUNK = 65_536  # frames whose compositions are made dense at once


class FrameArrays(NamedTuple):
    """Numbers of one frame, without the cost of an ``ase.Atoms``; labels are None where they are missing.

    Attributes:
        numbers: atomic numbers ``[num_atoms]``.
        positions: ``[num_atoms, 3]`` in Å.
        cell: ``[3, 3]`` in Å.
        pbc: ``[3]``.
        energy: in eV.
        forces: ``[num_atoms, 3]`` in eV/Å.
        stress: ``[3, 3]`` in eV/Å³.
        extras: further labels and inputs by field, as in :class:`~harness.data.reading.Frame`.
        weights: by field, as in :class:`~harness.data.reading.Frame`.
    """

    numbers: NDArray[np.integer[Any]]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    energy: float | None
    forces: NDArray[np.float64] | None
    stress: NDArray[np.float64] | None
    extras: Mapping[str, NDArray[Any]]
    weights: Mapping[str, float]


class FrameSet(Sequence[Frame], ABC):
    """Frames in an order, and facts of them by columns; read by any number of processes, changed by none.

    A subclass has the frames and the columns; everything else follows from these. Columns are read-only, and may be
    large: who needs one for long keeps what follows from it.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def _frame(self, index: int) -> Frame:
        """The frame ``index``, which is in the range."""

    @abstractmethod
    def column(self, name: str) -> NDArray[Any]:
        """One of :data:`~harness.data.facts.COLUMNS`, ``state_<label>``, or a weight, ``[num_frames]``.

        A label or weight that no frame has is a column too: of ``MISSING``, or of ones.

        Raises:
            KeyError: for an unknown column.
        """

    @abstractmethod
    def compositions(self) -> Compositions:
        """Elements of all frames."""

    @abstractmethod
    def label_names(self) -> list[str]:
        """``energy``, ``forces`` and ``stress``, then the fields of further labels and inputs that a frame has."""

    @abstractmethod
    def weight_names(self) -> list[str]:
        """Weights that a frame has, in the order of :data:`~harness.data.facts.WEIGHTS`."""

    @abstractmethod
    def group_names(self) -> list[str]:
        """Groups, at the positions that the column ``group`` refers to."""

    @abstractmethod
    def origin_names(self) -> list[str]:
        """Files, at the positions that the column ``origin`` refers to."""

    @abstractmethod
    def available(self) -> Mapping[str, frozenset[str]]:
        """Names that the file has values under, of its first frames, and the labels that each value might be."""

    def num_edges(self, cutoff: float) -> NDArray[np.int64] | None:
        """Number of edges of each frame within ``cutoff`` in Å; None if they are not known without a search."""
        return None

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> FrameSet: ...
    def __getitem__(self, index: int | slice) -> Frame | FrameSet:
        """A frame, or the set of a range of them."""
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        return self._frame(checked_index(self, index))

    def arrays(self, index: int) -> FrameArrays:
        """Numbers of one frame."""
        frame = self[index]
        atoms = frame.atoms
        return FrameArrays(
            atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc,
            frame.energy, frame.forces, frame.stress, frame.extras, frame.weights,
        )  # fmt: skip

    def location(self, index: int) -> str:
        """File of a frame and index in it, for messages; the frame is not read."""
        place = checked_index(self, index)
        origin = self.origin_names()[int(self.column("origin")[place])]
        return f"{origin}, frame {int(self.column('index')[place])}"

    def subset(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> FrameSet:
        """The set of some of the frames, in the order of ``indices``."""
        return FrameSubset(self, indices)

    def num_atoms(self) -> NDArray[np.int64]:
        """Number of atoms of each frame, ``[num_frames]``."""
        return self.column("num_atoms").astype(np.int64)

    def symbols(self) -> set[str]:
        """Chemical symbols of all frames."""
        return self.compositions().symbols()

    def label_counts(self) -> dict[str, int]:
        """Number of frames that have a label, with gaps or without, by label."""
        return {name: int((self.column(f"state_{name}") != MISSING).sum()) for name in self.label_names()}

    def incomplete_counts(self, labels: Iterable[str] = (), weighted: bool = False) -> dict[str, tuple[int, int]]:
        """Number of frames that lack a label or have gaps in it, and of all frames, by label.

        Args:
            labels: further ones, which perhaps no frame has.
            weighted: frames are not counted for a label whose weight is 0 in them.
        """
        weights = self.weight_names() if weighted else []
        found = {}
        for label in dict.fromkeys([*self.label_names(), *labels]):
            counted = np.ones(len(self), dtype=bool)
            for name in ("weight", f"{label}_weight"):
                if name in weights:
                    counted &= self.column(name) > 0
            missing = counted & (self.column(f"state_{label}") != WHOLE)
            found[label] = int(missing.sum()), int(counted.sum())
        return found

    def labelled(self, label: str) -> NDArray[np.int64]:
        """Indices of the frames that have a label, with gaps or without."""
        return np.flatnonzero(self.column(f"state_{label}") != MISSING)

    def labelled_types(self) -> dict[str, set[str]]:
        """Chemical symbols of atoms that have a label, by field of atoms."""
        return {"forces": self.compositions().symbols(with_forces=True)}

    def energy_sums(self, type_names: Sequence[str]) -> EnergySums:
        """Sums over the frames with an energy, from which reference energies follow.

        Args:
            type_names: chemical symbols in the order of the types.
        """
        sums, energies = EnergySums.empty(len(type_names)), self.column("energy")
        for part, compositions in self.compositions().chunks(self.labelled("energy"), _CHUNK):
            sums += EnergySums.of(compositions.dense(type_names), energies[part])
        return sums

    def energy_rows(self, type_names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Numbers of atoms ``[num_labelled, num_types]`` and energies in eV of the frames with an energy."""
        labelled = self.labelled("energy")
        return self.compositions().take(labelled).dense(type_names), self.column("energy")[labelled]

    def force_squares(self) -> tuple[float, int]:
        """Sum of the squares of all known force components in eV²/Å², and their number."""
        number = int(self.column("force_components").sum(dtype=np.int64))
        return float(self.column("force_squares").sum()), number


class FrameList(FrameSet):
    """Frames in memory; the columns are made when the first of them is asked for.

    Args:
        frames: structures and labels.
    """

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._frames = list(frames)
        self._origins: list[str] = []
        self._groups: list[str] = []

    @cached_property
    def _columns(self) -> dict[str, NDArray[Any]]:
        return columns_of(self._frames, self._origins, self._groups)

    @cached_property
    def _compositions(self) -> Compositions:
        return Compositions.of(self._frames)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._frames)

    def _frame(self, index: int) -> Frame:
        return self._frames[index]

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns; see :meth:`FrameSet.column`."""
        return self._columns[name] if name in self._columns else absent_column(name, len(self))

    def compositions(self) -> Compositions:
        """Elements of all frames."""
        return self._compositions

    def label_names(self) -> list[str]:
        """Labels, and further labels and inputs that a frame has."""
        return [name.removeprefix("state_") for name in self._columns if name.startswith("state_")]

    def weight_names(self) -> list[str]:
        """Weights that a frame has."""
        return [name for name in WEIGHTS if name in self._columns]

    def group_names(self) -> list[str]:
        """Groups, at the positions that the column ``group`` refers to."""
        return self._groups if self._columns else []

    def origin_names(self) -> list[str]:
        """Files, at the positions that the column ``origin`` refers to."""
        return self._origins if self._columns else []

    @cached_property
    def _available(self) -> Mapping[str, frozenset[str]]:
        return available_labels(self._frames)

    def available(self) -> Mapping[str, frozenset[str]]:
        """Names that the frames have values under, and the labels that each might be."""
        return self._available


class FrameSubset(FrameSet):
    """Some frames of another set, in an order of their own. Columns are made of the other's when they are asked for.

    Args:
        frames: the other set.
        indices: of its frames.

    Raises:
        IndexError: there is no such frame.
    """

    def __init__(self, frames: FrameSet, indices: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(frames)):
            raise IndexError(f"frames {chosen.min()} to {chosen.max()} of a set of {len(frames)}")
        self.frames: FrameSet = frames.frames if isinstance(frames, FrameSubset) else frames
        self.indices: NDArray[np.int64] = frames.indices[chosen] if isinstance(frames, FrameSubset) else chosen

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.indices)

    def _frame(self, index: int) -> Frame:
        return self.frames[int(self.indices[index])]

    def arrays(self, index: int) -> FrameArrays:
        """Numbers of one frame."""
        return self.frames.arrays(int(self.indices[checked_index(self, index)]))

    def location(self, index: int) -> str:
        """File of a frame and index in it."""
        return self.frames.location(int(self.indices[checked_index(self, index)]))

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns; see :meth:`FrameSet.column`."""
        return self.frames.column(name)[self.indices]

    def compositions(self) -> Compositions:
        """Elements of these frames."""
        return self.frames.compositions().take(self.indices)

    def label_names(self) -> list[str]:
        """Labels of the other set."""
        return self.frames.label_names()

    def weight_names(self) -> list[str]:
        """Weights of the other set."""
        return self.frames.weight_names()

    def group_names(self) -> list[str]:
        """Groups of the other set."""
        return self.frames.group_names()

    def origin_names(self) -> list[str]:
        """Files of the other set."""
        return self.frames.origin_names()

    def available(self) -> Mapping[str, frozenset[str]]:
        """Names that the other set has values under."""
        return self.frames.available()

    def num_edges(self, cutoff: float) -> NDArray[np.int64] | None:
        """Number of edges of each frame, if the other set knows them."""
        known = self.frames.num_edges(cutoff)
        return None if known is None else known[self.indices]


class JoinedFrames(FrameSet):
    """Frames of several sets, one after the other.

    Args:
        parts: the sets.
    """

    def __init__(self, parts: Sequence[FrameSet]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        """Number of frames."""
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[FrameSet, int]:
        number = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self.parts[number], index - int(self._ends[number])

    def _frame(self, index: int) -> Frame:
        part, position = self._place(index)
        return part[position]

    def arrays(self, index: int) -> FrameArrays:
        """Numbers of one frame."""
        part, position = self._place(checked_index(self, index))
        return part.arrays(position)

    def location(self, index: int) -> str:
        """File of a frame and index in it."""
        part, position = self._place(checked_index(self, index))
        return part.location(position)

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns; see :meth:`FrameSet.column`."""
        columns = [part.column(name) for part in self.parts]
        if name in ("origin", "group"):
            names = self.origin_names() if name == "origin" else self.group_names()
            code_of = {each: code for code, each in enumerate(names)}
            for number, part in enumerate(self.parts):
                own = part.origin_names() if name == "origin" else part.group_names()
                codes = np.array([*(code_of[each] for each in own), -1], dtype=np.int32)  # -1 stays -1
                columns[number] = codes[columns[number]]
        return np.concatenate(columns) if columns else absent_column(name, 0)

    def compositions(self) -> Compositions:
        """Elements of all frames."""
        return Compositions.joined([part.compositions() for part in self.parts])

    def label_names(self) -> list[str]:
        """Labels that any part has."""
        return list(dict.fromkeys([*LABELS, *(name for part in self.parts for name in part.label_names())]))

    def weight_names(self) -> list[str]:
        """Weights that any part has."""
        found = {name for part in self.parts for name in part.weight_names()}
        return [name for name in WEIGHTS if name in found]

    def group_names(self) -> list[str]:
        """Groups of all parts."""
        return list(dict.fromkeys(name for part in self.parts for name in part.group_names()))

    def origin_names(self) -> list[str]:
        """Files of all parts."""
        return list(dict.fromkeys(name for part in self.parts for name in part.origin_names()))

    def available(self) -> Mapping[str, frozenset[str]]:
        """Names that any part has values under."""
        found: dict[str, frozenset[str]] = {}
        for part in self.parts:
            for name, labels in part.available().items():
                found[name] = found.get(name, frozenset()) | labels
        return found

    def num_edges(self, cutoff: float) -> NDArray[np.int64] | None:
        """Number of edges of each frame, if all parts know them."""
        known = [part.num_edges(cutoff) for part in self.parts]
        if any(each is None for each in known):
            return None
        return np.concatenate([np.zeros(0, np.int64), *(each for each in known if each is not None)])


def as_frame_set(frames: Iterable[Frame]) -> FrameSet:
    """The frames themselves if they are a set, and a set of them in memory otherwise.

    Args:
        frames: or other objects with ``atoms`` and, perhaps, labels of the names of a frame's.
    """
    if isinstance(frames, FrameSet):
        return frames
    return FrameList(frame if isinstance(frame, Frame) else _frame_like(frame) for frame in frames)


def _frame_like(found: Any) -> Frame:
    energy, forces, stress = (getattr(found, name, None) for name in LABELS)
    return Frame(found.atoms, energy, forces, stress)


def checked_index(frames: FrameSet, index: int) -> int:
    """Index of a frame, counted from the beginning.

    Raises:
        IndexError: there is no such frame.
    """
    position = index + len(frames) if index < 0 else index
    if not 0 <= position < len(frames):
        raise IndexError(f"frame {index} of a set of {len(frames)}")
    return int(position)


def absent_column(name: str, num_frames: int) -> NDArray[Any]:
    """Column of a label or weight that no frame has.

    Raises:
        KeyError: for an unknown column.
    """
    if name.startswith("state_"):
        return np.full(num_frames, MISSING, np.uint8)
    if name in WEIGHTS:
        return np.ones(num_frames)
    if name in COLUMNS and num_frames == 0:
        dtype, shape = COLUMNS[name]
        return np.zeros((0, *shape), dtype)
    raise KeyError(f"there is no column {name!r}; there are {[*COLUMNS, *WEIGHTS, 'state_<label>']}")
