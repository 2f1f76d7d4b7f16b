"""Sentences on labels that frames lack, and on labels of theirs that may belong to two calculations."""

from __future__ import annotations

import numpy as np

from harness.data.frames import FrameSet
from harness.data.reading import LabelKeys, suggested_keys

__all__ = ["label_hint", "mixed_family_hint"]


def label_hint(frames: FrameSet, label: str, keys: LabelKeys) -> str:
    """Sentences on a label that frames lack: what they have instead, and the key to give; or that it was left out.

    Args:
        frames: of a set.
        label: ``energy``, ``forces`` or ``stress``.
        keys: that the frames were read with.
    """
    if label == "stress":
        left_out = np.flatnonzero(frames.column("stress_left_out"))
        if len(left_out):
            first = frames[int(left_out[0])]
            directions = " ".join("FT"[int(periodic)] for periodic in first.atoms.pbc)
            return (
                f"{len(left_out)} of {len(frames)} frames have a stress in the file that was left out: it refers to a "
                f'volume, and {first.location} is not periodic in all three directions (pbc="{directions}"). '
                f"Correct pbc if the frames are periodic."
            )
    if len(frames.labelled(label)):
        return ""
    available = frames.available()
    places = {name: f"{getattr(keys, name)!r} (data.keys.{name})" for name in ("stress", "virial", label)}
    sought = f"{places['stress']} and {places['virial']}" if label == "stress" else places[label]
    suggestion = suggested_keys(available, keys, label)
    return f"It is looked for under {sought}; the frames have {sorted(available)}. {suggestion}".strip()


def mixed_family_hint(frames: FrameSet, keys: LabelKeys) -> str:
    """Sentence on labels of one calculation that were not asked for, where another label of it was.

    ``data.keys.virial=REF_virials`` alone reads the energies of ``energy``, though the frames also have ``REF_energy``:
    perhaps labels of two methods are mixed.

    Args:
        frames: of a set.
        keys: that the frames were read with.

    Returns:
        No text where the keys that were named have no beginning in common with other labels of the frames.
    """
    available = frames.available()
    changed = keys.changed()
    prefixes = {key.rpartition("_")[0] + "_" for key in changed.values() if "_" in key}
    found = [
        f"data.keys.{label}={key}"
        for label in ("energy", "forces")
        if label not in changed and getattr(keys, label) in available
        for key in sorted(available)
        if any(key.startswith(prefix) for prefix in prefixes) and label in available[key]
    ]
    if not found:
        return ""
    named = ", ".join(f"data.keys.{label}={key}" for label, key in changed.items())
    return (
        f"{frames[0].origin}: {named} is given, but energies or forces are read under their usual names, though the "
        f"frames also have {', '.join(name.partition('=')[2] for name in found)}: labels of two methods may be mixed. "
        f"If those belong together, give {' '.join(found)}, too."
    )
