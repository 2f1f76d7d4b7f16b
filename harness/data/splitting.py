"""Seeded split of frames into training, validation and test sets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from harness.support.checks import is_number

__all__ = ["split_indices"]


def split_indices(
    num_frames: int, parts: Mapping[str, int | float], seed: int, num_train: int | None = None
) -> dict[str, NDArray[np.int64]]:
    """Disjoint sorted indices of each of ``parts``, and of ``"train"``, which gets the rest.

    The parts are cut off the front of one permutation, and ``num_train`` only shortens the rest: training sets of
    different sizes are nested, and are evaluated on the same frames.

    Args:
        num_frames: number of frames to share out.
        parts: size of each part other than ``"train"``: a number of frames, or a fraction below 1.
        seed: of the permutation.
        num_train: largest number of training frames; None for all that are left.

    Raises:
        TypeError: if a size is not a number.
        ValueError: if a size is negative, a fraction gives no frame, or there are not enough frames.
    """
    sizes = {name: _size(name, amount, num_frames) for name, amount in parts.items()}
    left = num_frames - sum(sizes.values())
    if left < 1:
        raise ValueError(
            f"the split {dict(parts)} of {num_frames} frames takes {sizes} and leaves {max(left, 0)} for training; ask "
            "for less, or give files for validation and test"
        )
    if num_train is not None and not 1 <= num_train <= left:
        raise ValueError(
            f"num_train={num_train} asked for, but {left} of {num_frames} frames are left for training after {sizes}"
        )
    order = np.random.default_rng(seed).permutation(num_frames)
    indices, start = {}, 0
    for name, size in sizes.items():
        indices[name] = np.sort(order[start : start + size])
        start += size
    stop = num_frames if num_train is None else start + num_train
    indices["train"] = np.sort(order[start:stop])
    return indices


def _size(name: str, amount: int | float, num_frames: int) -> int:
    if not is_number(amount):
        raise TypeError(f"the split of {name!r} must be a number of frames or a fraction, found {amount!r}")
    if isinstance(amount, int):
        if amount < 0:
            raise ValueError(f"the split of {name!r} must not be negative, found {amount}")
        return amount
    if not 0 <= amount < 1:
        raise ValueError(
            f"a fractional split must be in [0, 1), found {amount} for {name!r}; write a number of frames as an integer"
        )
    size = round(amount * num_frames)
    if amount > 0 and size == 0:
        raise ValueError(f"the split of {name!r}, {amount} of {num_frames} frames, has no frame; ask for more")
    return size
