"""Training, validation and test sets: frames of files, divided by a split, with isolated atoms set apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from harness.data.frames import FrameSet, JoinedFrames
from harness.data.isolated import isolated_energies, without_isolated_atoms
from harness.data.splitting import split_indices

__all__ = ["FrameSets", "divided"]


@dataclass(frozen=True, eq=False)
class FrameSets:
    """Frames of a training by the set that they are in.

    Attributes:
        train: training frames.
        val: validation sets.
        test: test sets.
        indices: of the frames in each part of the split, among the structures of the training files.
        isolated: isolated atoms that were set apart, by the argument with their files.
    """

    train: FrameSet
    val: list[FrameSet]
    test: list[FrameSet]
    indices: Mapping[str, NDArray[np.int64]]
    isolated: Mapping[str, FrameSet]

    def named(self) -> dict[str, FrameSet]:
        """All sets as ``train``, ``val0``, ``val1`` … ``test0`` …"""
        found = {"train": self.train}
        found |= {f"val{index}": frames for index, frames in enumerate(self.val)}
        return found | {f"test{index}": frames for index, frames in enumerate(self.test)}

    def evaluated(self) -> dict[str, FrameSet]:
        """Validation and test sets by their names in messages, such as ``validation set 0``."""
        found = {f"validation set {index}": frames for index, frames in enumerate(self.val)}
        return found | {f"test set {index}": frames for index, frames in enumerate(self.test)}

    def type_names(self) -> list[str]:
        """Chemical symbols of all sets by atomic number."""
        symbols = set().union(*(frames.symbols() for frames in self.named().values()))
        return sorted(symbols, key=lambda symbol: atomic_numbers[symbol])


def divided(
    read: Mapping[str, Sequence[FrameSet]],
    files: Mapping[str, Sequence[Path]],
    split: Mapping[str, int | float],
    split_seed: int,
    num_train: int | None = None,
    isolated_atoms: str = "references",
) -> FrameSets:
    """Sets of the frames that were read: validation and test files are a set each, the others are split off.

    Args:
        read: frames of each file, by ``train``, ``val`` and ``test``.
        files: their paths, for messages.
        split: size of the ``val`` and the ``test`` set, for those that have no file.
        split_seed: of the permutation.
        num_train: largest number of training frames.
        isolated_atoms: ``references`` sets isolated atoms apart, ``frames`` does not.

    Raises:
        ValueError: a file has isolated atoms alone, an element has two energies, or the split asks for more frames than
            there are.
    """
    isolated = {name: JoinedFrames([]) for name in read}
    structures = {name: list(sets) for name, sets in read.items()}
    if isolated_atoms == "references":
        structures, isolated = _set_apart(read, files)
    frames = structures["train"][0] if len(structures["train"]) == 1 else JoinedFrames(structures["train"])
    parts = {name: amount for name, amount in split.items() if amount and not files[name]}
    indices = split_indices(len(frames), parts, split_seed, num_train)
    chosen = {name: frames if len(each) == len(frames) else frames.subset(each) for name, each in indices.items()}
    val = structures["val"] or [chosen[name] for name in ("val",) if name in chosen]
    test = structures["test"] or [chosen[name] for name in ("test",) if name in chosen]
    return FrameSets(chosen["train"], val, test, indices, isolated)


def _set_apart(
    read: Mapping[str, Sequence[FrameSet]], files: Mapping[str, Sequence[Path]]
) -> tuple[dict[str, list[FrameSet]], dict[str, JoinedFrames]]:
    """Frames of each file that are no isolated atoms, and the isolated atoms, by the argument with the files."""
    structures: dict[str, list[FrameSet]] = {name: [] for name in read}
    found: dict[str, list[FrameSet]] = {name: [] for name in read}
    for name, sets in read.items():
        for frames, path in zip(sets, files[name], strict=True):
            left, isolated = without_isolated_atoms(frames)
            structures[name].append(left)
            found[name].append(isolated)
            if not len(left) and name != "train":
                raise ValueError(
                    f"{path} has isolated atoms alone (config_type=IsolatedAtom), which are references and no "
                    f"{name} set; expected structures. Leave the file out, add it to data.train, or set "
                    f"data.isolated_atoms=frames"
                )
    if not any(map(len, structures["train"])):
        raise ValueError(
            f"{', '.join(map(str, files['train']))} has isolated atoms alone (config_type=IsolatedAtom), which are "
            f"references and no structures to train on; expected structures. Add a file to data.train, or set "
            f"data.isolated_atoms=frames"
        )
    isolated_energies(frame for sets in found.values() for each in sets for frame in each)  # one energy in all sets
    return structures, {name: JoinedFrames(sets) for name, sets in found.items()}
