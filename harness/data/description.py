"""Words on the data of a training: a summary at its start, and warnings of energies without a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.facts import LABELS
from harness.data.frames import FrameSet
from harness.data.references import SETTING, outside_text, undetermined_text
from harness.data.sets import FrameSets
from harness.data.statistics import DataStatistics

__all__ = ["reference_warnings", "summary"]


def summary(sets: FrameSets, statistics: DataStatistics, cutoff: float) -> str:
    """Sizes of the sets, types, neighbours, forces and fitted shifts in a few lines.

    Args:
        sets: of the training.
        statistics: of its training set.
        cutoff: of the neighbour lists, in Å.
    """
    train, type_names = sets.train, statistics.type_names
    atoms = train.column("num_atoms")
    sizes = f"{atoms.min()}" if atoms.min() == atoms.max() else f"{atoms.min()} to {atoms.max()}"
    present = train.symbols()
    shifts = ", ".join(
        f"{name} {shift:.4f}"
        for name, shift in zip(type_names, statistics.energy_shifts.tolist(), strict=True)
        if name in present
    )
    left_out = int(train.column("stress_left_out").sum())
    fitted = [name for name in type_names if name not in statistics.isolated_atoms]
    origin = "by least squares" if len(fitted) == len(type_names) else "of isolated atoms"
    if fitted and origin == "of isolated atoms":
        origin += f", and {', '.join(fitted)} by least squares"
    counts = dict.fromkeys(LABELS, 0) | train.label_counts()
    return "\n".join(
        (
            f"frames: {len(train)} train, {_sizes(sets.val)} val, {_sizes(sets.test)} test",
            f"training frames: {sizes} atoms, {statistics.num_atoms} in all; labelled with "
            + ", ".join(f"{name} {count}" for name, count in counts.items())
            + (f"; stress of {left_out} left out, not periodic in all directions" if left_out else ""),
            f"types: {', '.join(type_names)}",
            f"neighbours within {cutoff:g} Å: {statistics.mean_neighbors:.1f} per atom",
            f"RMS of the force components: {statistics.force_rms:.4f} eV/Å",
            *_isolated_atoms(sets.isolated),
            f"energies of the types in eV {origin}, for energy_shifts=fit: {shifts}",
        )
    )


def _isolated_atoms(isolated: Mapping[str, FrameSet]) -> list[str]:
    numbers = {name: len(frames) for name, frames in isolated.items() if len(frames)}
    if not numbers:
        return []
    found = ", ".join(f"{number} {name}" for name, number in numbers.items())
    return [
        f"isolated atoms: {found}; left out of the sets, references of the energies are those of train "
        f"(data.isolated_atoms)"
    ]


def _sizes(sets: Sequence[FrameSet]) -> str:
    return " + ".join(str(len(frames)) for frames in sets) or "0"


def reference_warnings(
    sets: FrameSets,
    undetermined: NDArray[np.float64],
    shifts: Any,
    type_names: Sequence[str],
    stage: str,
    fitted: bool,
    setting: str | None = SETTING,
) -> Iterator[str]:
    """Sentences on references that the training energies leave open, one for each set that they concern.

    Args:
        sets: of the training.
        undetermined: ``[num_types, num_undetermined]``, see :class:`~harness.data.references.References`.
        shifts: the references in eV, ``[num_types]``.
        type_names: chemical symbols in the order of the types.
        stage: ``fit`` or ``test``.
        fitted: whether the references are fitted to this training set, and not to that of a checkpoint.
        setting: of the model that references are given by; None if it has none.
    """
    if stage == "fit" and fitted and len(sets.train.labelled("energy")):
        yield undetermined_text(undetermined, list(map(float, shifts)), type_names, setting)
    for name, frames in sets.evaluated().items():
        if stage == "fit" or name.startswith("test"):
            yield outside_text(name, frames, undetermined, type_names, setting, fitted)
