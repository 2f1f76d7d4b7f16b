"""Frames that are there more than once: in training and in a test, or twice in a set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.data.reading import Frame

__all__ = ["frame_key", "refuse_repeated_files", "repeated_frames_text"]


def frame_key(frame: Frame) -> bytes:
    """Hash of the structure of a frame, 16 bytes: elements, positions, cell and periodicity, without its labels."""
    atoms = frame.atoms
    digest = hashlib.blake2b(np.ascontiguousarray(atoms.numbers, dtype="<i8").tobytes(), digest_size=16)
    digest.update(np.asarray(atoms.pbc, dtype=np.uint8).tobytes())
    for numbers in (atoms.positions, atoms.cell.array):
        digest.update((np.ascontiguousarray(numbers, dtype="<f8") + 0.0).tobytes())  # -0.0 is 0.0
    return digest.digest()


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


def repeated_frames_text(train: Sequence[Frame], others: Mapping[str, Sequence[Frame]]) -> list[str]:
    """Sentences on structures that are in training twice, or in training and in another set.

    Args:
        train: training frames.
        others: frames of the other sets by name, such as ``test set 0``.
    """
    trained: dict[bytes, Frame] = {}
    repeated: list[tuple[Frame, Frame]] = []
    for frame in train:
        before = trained.setdefault(frame_key(frame), frame)
        if before is not frame:
            repeated.append((before, frame))
    told = []
    if repeated:
        told.append(
            f"{len(repeated)} of {len(train)} training frames have the structure of another one, such as "
            f"{repeated[0][1].location} and {repeated[0][0].location}: they count twice. Was a file joined twice?"
        )
    for name, frames in others.items():
        shared = [(frame, trained[key]) for frame in frames if (key := frame_key(frame)) in trained]
        if shared:
            told.append(
                f"{name}: {len(shared)} of {len(frames)} frames are training frames too, such as "
                f"{shared[0][0].location} and {shared[0][1].location}: its errors are too small. Take them out of one "
                f"of the sets."
            )
    return told
