"""Fields of a batch beyond structure, energy, forces and stress: rows of a frame, and fill where it has none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from harness.data.reading import Frame

__all__ = ["BatchField", "ExtraField", "GroupField", "WeightField", "empty_fields", "fields_of_frame"]

RowLevel = Literal["graph", "node"]


@dataclass(frozen=True)
class BatchField(ABC):
    """A further field of a batch: the same in every batch of a data set, whatever its frames have.

    Subclasses say where a frame has the value.

    Attributes:
        name: key in the batch.
        level: ``graph`` (one row for each frame) or ``node`` (one for each atom).
        shape: of one row.
        dtype: of the tensor; None for that of the data.
        fill: in the place of the value of a frame that has none.
    """

    name: str
    level: RowLevel = "graph"
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    fill: float = float("nan")

    @abstractmethod
    def value(self, frame: Frame) -> Any:
        """Numbers of a frame, ``[*shape]`` of a graph or ``[num_atoms, *shape]``; None if it has none."""

    def tensor(self, frame: Frame, dtype: torch.dtype) -> Tensor:
        """Rows of a frame: ``[1, *shape]``, or ``[num_atoms, *shape]``.

        Args:
            frame: any.
            dtype: of the data.
        """
        rows, kind = len(frame.atoms) if self.level == "node" else 1, self.dtype or dtype
        found = self.value(frame)
        if found is None:
            return torch.full((rows, *self.shape), self.fill, dtype=kind)
        return torch.tensor(np.asarray(found), dtype=kind).reshape(rows, *self.shape)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """No rows: ``[0, *shape]``."""
        return torch.zeros(0, *self.shape, dtype=self.dtype or dtype)


@dataclass(frozen=True)
class ExtraField(BatchField):
    """A further label or input, which frames have among their ``extras``."""

    def value(self, frame: Frame) -> Any:
        """Entry of the frame's extras."""
        return frame.extras.get(self.name)


@dataclass(frozen=True)
class WeightField(BatchField):
    """A weight of the frames; 1 where a frame has none."""

    dtype: torch.dtype | None = torch.float64
    fill: float = 1.0

    def value(self, frame: Frame) -> float | None:
        """Entry of the frame's weights."""
        return frame.weights.get(self.name)


@dataclass(frozen=True)
class GroupField(BatchField):
    """Position of the frames' group among the names of all groups; -1 for a frame of no group.

    Attributes:
        names: of the groups.
    """

    dtype: torch.dtype | None = torch.int64
    fill: float = -1
    names: tuple[str, ...] = ()

    def value(self, frame: Frame) -> int | None:
        """Position of the group.

        Raises:
            ValueError: if it is not among the names.
        """
        if frame.group is None:
            return None
        if frame.group not in self.names:
            raise ValueError(f"{frame.location}: the group {frame.group!r} is not among {list(self.names)}")
        return self.names.index(frame.group)


def fields_of_frame(frame: Frame, fields: Sequence[BatchField], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a frame's further fields, by name."""
    return {field.name: field.tensor(frame, dtype) for field in fields}


def empty_fields(fields: Sequence[BatchField], dtype: torch.dtype) -> dict[str, Tensor]:
    """Further fields of a batch of no graphs, by name."""
    return {field.name: field.empty(dtype) for field in fields}
