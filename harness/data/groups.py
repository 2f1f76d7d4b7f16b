"""Groups of the frames, by the value of a key such as ``config_type``."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from harness.data.batch_fields import GroupField
from harness.data.frames import FrameSet
from harness.data.reading import Frame, information
from harness.data.weights import value_text
from harness.support.text import did_you_mean

__all__ = [
    "GROUP_KEY",
    "MOST_GROUPS",
    "group_fields",
    "group_of",
    "groups_of",
    "refuse_unknown_group_key",
    "sorted_groups",
]

GROUP_KEY = "config_type"
"""Key of the groups unless another one is given."""
MOST_GROUPS = 200
"""Largest number of groups that have values of their own."""


def group_of(frame: Frame, key: str | None) -> str | None:
    """Group of a frame: the value of the key as text; None without one."""
    return None if key is None else value_text(information(frame.atoms, key))


def sorted_groups(groups: Iterable[str | None], key: str | None) -> list[str]:
    """Names of the groups of all sets, sorted; none where there are too many to have values of their own.

    Args:
        groups: of the frames, or of the sets.
        key: that they are the values of.

    Raises:
        ValueError: there are more than 200 groups of a key that was asked for; of the usual one that is a warning.
    """
    names = sorted({group for group in groups if group is not None})
    if len(names) <= MOST_GROUPS:
        return names
    text = f"data.group_key={key}: {len(names)} different values, expected at most {MOST_GROUPS}"
    if key != GROUP_KEY:
        raise ValueError(f"{text}. Give a key whose values many frames share, or data.group_key=null for no groups")
    rank_zero_warn(f"{text}: there are no groups. data.group_key=null says so, too.")
    return []


def groups_of(sets: Iterable[FrameSet], key: str | None) -> list[str]:
    """Names of the groups that frames of some sets are in, as :func:`sorted_groups` has them."""
    return sorted_groups(
        (
            frames.group_names()[code]
            for frames in sets
            for code in np.unique(frames.column("group")).tolist()
            if code >= 0
        ),
        key,
    )


def refuse_unknown_group_key(key: str | None, is_there: bool, available: Collection[str]) -> None:
    """Refuse a key that was asked for and that no frame has.

    Raises:
        KeyError: with what the frames have.
    """
    if key is None or is_there or key == GROUP_KEY:
        return
    names = sorted(available)
    raise KeyError(
        f"data.group_key={key}: no frame has it. {did_you_mean(key, names)}The frames have {names}; "
        f"data.group_key=null makes no groups"
    )


def group_fields(names: Collection[str]) -> tuple[GroupField, ...]:
    """Field of a batch for the groups; none without any."""
    return (GroupField("group_index", names=tuple(names)),) if names else ()
