"""A file format that a trained model is exported in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from torch import Tensor, nn

__all__ = ["Format"]


class Format(ABC):
    """A format of another package: the models that it is for, its content, and how the package reads the file.

    Attributes:
        name: value of ``--to``.
        models: configs of ``conf/model`` whose models it takes.
        suffix: end of the file's name, in place of that of the checkpoint.
        has_dtype: True if the dtype of the file can be chosen.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    suffix: ClassVar[str]
    has_dtype: ClassVar[bool] = False

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
    def predictions(self, path: Path, example: Atoms, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Energy, forces and stress of a structure, predicted from the file by the package itself.

        Args:
            path: of the file, which is unpickled.
            example: the structure.
            batch: made of it.
        """

    @abstractmethod
    def uses(self, file: Path, model: nn.Module) -> list[str]:
        """Commands and lines of Python that take the file."""

    def remarks(self, model: nn.Module, dtype: torch.dtype | None) -> list[str]:
        """Sentences about what the format cannot keep."""
        return []
