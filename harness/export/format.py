"""A file format that a trained model is exported in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from ase import Atoms
from torch import Tensor, nn

from harness.models.force_field import ForceField
from harness.models.scale_shift import ScaleShift

__all__ = ["Format", "parts_of"]

_Energy = TypeVar("_Energy", bound=nn.Module)


def parts_of(model: nn.Module, kind: type[_Energy]) -> tuple[ScaleShift, _Energy] | None:
    """References and scales of a force field, and the model of its energies; None if that is of another kind.

    Args:
        model: any force field.
        kind: class of the model of energies.
    """
    outer = model.energy_model if isinstance(model, ForceField) else None
    inner = outer.energy_model if isinstance(outer, ScaleShift) else None
    return (outer, inner) if isinstance(outer, ScaleShift) and isinstance(inner, kind) else None


class Format(ABC):
    """A format of another package: the models that it is for, its content, and how the package reads the file.

    Attributes:
        name: value of ``--to``.
        models: configs of ``conf/model`` whose models it takes.
        suffix: end of the file's name, in place of that of the checkpoint.
        has_dtype: True if the dtype of the file can be chosen.
        only_dtype: that of all files; None if weights keep theirs.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    suffix: ClassVar[str]
    has_dtype: ClassVar[bool] = False
    only_dtype: ClassVar[torch.dtype | None] = None

    @abstractmethod
    def takes(self, model: nn.Module) -> bool:
        """True for a force field that the format is for, whoever has built it."""

    @abstractmethod
    def content(self, model: nn.Module, example: Atoms, dtype: torch.dtype | None) -> Any:
        """Object that ``torch.save`` writes.

        Args:
            model: the force field.
            example: a structure of the model's elements.
            dtype: of the weights in the file; None for that of the training.
        """

    @abstractmethod
    def predictions(
        self, path: Path, example: Atoms, batch: Mapping[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Energy, forces and stress of a structure, predicted from the file by the package itself.

        Args:
            path: of the file, which is unpickled.
            example: the structure.
            batch: made of it.
            model: the force field that the file was written from.
        """

    @abstractmethod
    def uses(self, file: Path, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Commands and lines of Python that take the file of a model, which has weights of the dtype."""

    def remarks(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Sentences about what a file with weights of the dtype does not keep of the model."""
        return []
