"""Frames that are there more than once: in training and in a test, or twice in a set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.data.reading import Frame

if TYPE_CHECKING:  # sets of frames have hashes of this module
    from harness.data.frames import FrameSet

__all__ = ["frame_key", "refuse_repeated_files", "repeated_frames_text"]


def frame_key(frame: Frame) -> int:
    """Hash of the structure of a frame, 64 bits: elements, positions, cell and periodicity, without its labels."""
    atoms = frame.atoms
    digest = hashlib.blake2b(np.ascontiguousarray(atoms.numbers, dtype="<i8").tobytes(), digest_size=8)
    digest.update(np.asarray(atoms.pbc, dtype=np.uint8).tobytes())
    for numbers in (atoms.positions, atoms.cell.array):
        digest.update((np.ascontiguousarray(numbers, dtype="<f8") + 0.0).tobytes())  # -0.0 is 0.0
    return int.from_bytes(digest.digest(), "little")


def refuse_repeated_files(argument: str, paths: Sequence[Path]) -> None:
    """Refuse a list that has the same file twice.

    Raises:
        ValueError: with the file.
    """
    files = Counter(path.expanduser().resolve() for path in paths)
    twice = [str(path) for path, number in files.items() if number > 1]
    if twice:
        raise ValueError(
            f"{argument} has {', '.join(twice)} {files.most_common(1)[0][1]} times; expected each file once. Remove "
            f"the repetition, or write the file that was meant"
        )


def repeated_frames_text(train: FrameSet, others: Mapping[str, FrameSet]) -> list[str]:
    """Sentences on structures that are in training twice, or in training and in another set.

    Args:
        train: training frames.
        others: frames of the other sets by name, such as ``test set 0``.
    """
    trained = train.column("structure")
    keys, firsts, numbers = np.unique(trained, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(firsts[numbers] != np.arange(len(trained)))
    told = []
    if len(repeated):
        again = int(repeated[0])
        told.append(
            f"{len(repeated)} of {len(train)} training frames have the structure of another one, such as "
            f"{train.location(again)} and {train.location(int(firsts[numbers[again]]))}: they count twice. Was a file "
            f"joined twice?"
        )
    for name, frames in others.items():
        own = frames.column("structure")
        places = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
        shared = np.flatnonzero(keys[places] == own) if len(keys) else np.zeros(0, np.int64)
        if len(shared):
            first = int(shared[0])
            told.append(
                f"{name}: {len(shared)} of {len(frames)} frames are training frames too, such as "
                f"{frames.location(first)} and {train.location(int(firsts[places[first]]))}: its errors are too small. "
                f"Take them out of one of the sets."
            )
    return told
