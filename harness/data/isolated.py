"""Frames of isolated atoms among others: references of the energies rather than something to train on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from harness.data.reading import Frame, information

if TYPE_CHECKING:  # sets of frames know which of them are isolated atoms
    from harness.data.frames import FrameSet

__all__ = ["is_isolated", "isolated_energies", "without_isolated_atoms"]

_CONFIG_TYPE = "config_type"
_SAME_ENERGY = 1e-6  # eV


def without_isolated_atoms(frames: FrameSet, require_energies: bool = True) -> tuple[FrameSet, FrameSet]:
    """Frames of structures, and frames whose ``config_type`` is ``IsolatedAtom`` (in any spelling, ``isolated_atom``).

    A frame of one atom without this ``config_type`` is a structure like any other.

    Args:
        frames: of a file.
        require_energies: whether an isolated atom without an energy is an error.

    Raises:
        ValueError: if a frame of that type has more than one atom or no energy.
    """
    is_isolated_atom = frames.column("isolated").astype(bool)
    if not is_isolated_atom.any():
        return frames, frames.subset([])
    isolated = frames.subset(np.flatnonzero(is_isolated_atom))
    for frame in isolated:
        if len(frame.atoms) != 1:
            raise ValueError(
                f"{frame.location}: config_type=IsolatedAtom is for one atom, found "
                f"{frame.atoms.get_chemical_formula()}; correct the config_type of the frame, or set "
                f"data.isolated_atoms=frames to train on all frames alike"
            )
        if frame.energy is None and require_energies:
            raise ValueError(
                f"{frame.location}: an isolated atom ({frame.atoms.get_chemical_formula()}) without an energy; "
                f"expected its energy in eV under the key of the other frames (data.keys.energy). Add it, or "
                f"remove the frame"
            )
    return frames.subset(np.flatnonzero(~is_isolated_atom)), isolated


def isolated_energies(frames: Iterable[Frame]) -> dict[str, float]:
    """Energies in eV of isolated atoms by chemical symbol.

    Raises:
        ValueError: if an element has two energies.
    """
    first: dict[str, Frame] = {}
    for frame in frames:
        symbol = frame.atoms.get_chemical_symbols()[0]
        before = first.setdefault(symbol, frame)
        if abs(before.energy - frame.energy) > _SAME_ENERGY:  # type: ignore[operator]
            raise ValueError(
                f"{frame.location}: the isolated atom {symbol} has {frame.energy} eV here and {before.energy} eV in "
                f"{before.location}; expected one reference energy for an element. Remove one of the frames, or set "
                f"data.isolated_atoms=frames to train on both"
            )
    return {symbol: float(frame.energy) for symbol, frame in first.items()}  # type: ignore[arg-type]


def is_isolated(frame: Frame) -> bool:
    """True if the ``config_type`` of a frame is ``IsolatedAtom``, in any spelling."""
    value = information(frame.atoms, _CONFIG_TYPE)
    return isinstance(value, str) and "".join(filter(str.isalnum, value)).lower() == "isolatedatom"
