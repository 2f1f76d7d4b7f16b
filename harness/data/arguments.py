"""Checks of a data module's arguments, each with a message that says what was found and expected."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers

from harness.data.repeats import refuse_repeated_files
from harness.support.checks import is_number, whole_number

__all__ = [
    "PathLike",
    "batch_limit",
    "checked_balance",
    "checked_cutoff",
    "checked_files",
    "checked_min_distance",
    "checked_split",
    "checked_type_names",
    "floating_dtype",
    "paths_of",
]

PathLike = str | os.PathLike[str]


def paths_of(files: PathLike | Sequence[PathLike] | None) -> list[Path]:
    """Paths from one, several or none.

    Raises:
        TypeError: if it is something else.
    """
    if files is None:
        return []
    if isinstance(files, (str, os.PathLike)):
        return [Path(files)]
    if not isinstance(files, Sequence) or not all(isinstance(file, (str, os.PathLike)) for file in files):
        raise TypeError(f"expected the path of a file or a list of paths, found {files!r}")
    return [Path(file) for file in files]


def checked_files(
    train: PathLike | Sequence[PathLike],
    val: PathLike | Sequence[PathLike] | None,
    test: PathLike | Sequence[PathLike] | None,
) -> dict[str, list[Path]]:
    """Paths by the argument that has named them.

    Raises:
        TypeError: an argument is no path and no list of paths.
        ValueError: ``train`` names no file, or a file is named twice.
    """
    files = {"train": paths_of(train), "val": paths_of(val), "test": paths_of(test)}
    if not files["train"]:
        raise ValueError("train must name at least one file")
    for name, paths in files.items():
        refuse_repeated_files(f"data.{name}", paths)
    return files


def checked_split(split: Mapping[str, int | float] | None) -> dict[str, int | float]:
    """The split, without anything if there is none.

    Raises:
        TypeError: if it is no mapping.
        KeyError: if it names another set than ``val`` or ``test``.
    """
    if split is not None and not isinstance(split, Mapping):
        raise TypeError(f"split is a mapping such as {{val: 0.1, test: 50}}, found {split!r}")
    unknown = sorted(set(split or {}) - {"val", "test"})
    if unknown:
        raise KeyError(f"unknown sets {unknown} in the split; valid are ['val', 'test'], the rest is for training")
    return dict(split or {})


def checked_cutoff(cutoff: Any) -> float:
    """The cutoff in Å.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not is_number(cutoff) or not 0 < cutoff < float("inf"):
        raise ValueError(f"cutoff must be a positive number of Å, found {cutoff!r}")
    return float(cutoff)


def checked_min_distance(min_distance: Any) -> float | None:
    """Smallest distance between atoms in Å, or None.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not positive and finite.
    """
    if min_distance is None:
        return None
    if not is_number(min_distance):
        raise TypeError(f"min_distance is a number of Å or null, found {min_distance!r}")
    if not 0 < min_distance < float("inf"):
        raise ValueError(f"min_distance must be a positive number of Å, found {min_distance}; null does not look")
    return min_distance


def batch_limit(batch_size: Any, max_atoms: Any, max_edges: Any) -> tuple[str, int]:
    """Name and value of the one argument that limits a training batch.

    Raises:
        ValueError: a number is out of range, or not exactly one is given.
    """
    limits = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
    given = {name: whole_number(name, value) for name, value in limits.items() if value is not None}
    if len(given) != 1:
        found = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
        raise ValueError(
            f"exactly one of {', '.join(limits)} must say what a training batch of all ranks holds, found {found}; "
            "for a budget of atoms or edges set batch_size to None (data.batch_size=null), otherwise leave them out"
        )
    ((limited, limit),) = given.items()
    return limited, limit


def checked_balance(balance: Any, limited: str) -> str | None:
    """``atoms`` or ``edges`` that ranks get similar numbers of; None for frames.

    Raises:
        ValueError: if it is another value, or batches are not limited by ``batch_size``.
    """
    if balance is not None and balance not in ("atoms", "edges"):
        raise ValueError(f"balance must be 'atoms', 'edges' or None, found {balance!r}")
    if balance is not None and limited != "batch_size":
        raise ValueError(
            f"balance={balance!r} is for batches of batch_size frames, found {limited}, by which ranks are balanced "
            "already; leave balance out, or give batch_size"
        )
    return None if balance is None else str(balance)


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``float32`` or ``float64`` as a dtype.

    Raises:
        ValueError: if it is another.
    """
    valid = {"float32": torch.float32, "float64": torch.float64}
    found = valid.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in valid.values():
        raise ValueError(f"dtype must be one of {list(valid)}, found {dtype!r}")
    return found


def checked_type_names(type_names: Sequence[str] | None) -> list[str] | None:
    """Chemical symbols, or None.

    Raises:
        TypeError: if it is no list.
        ValueError: if a symbol is unknown or repeated, or there is none.
    """
    if type_names is None:
        return None
    if not isinstance(type_names, str | Sequence):
        raise TypeError(f"type_names is a list of chemical symbols such as [H, C, O], found {type_names!r}")
    names = [type_names] if isinstance(type_names, str) else list(type_names)
    unknown = [name for name in names if name not in atomic_numbers]
    if unknown or not names:
        raise ValueError(f"type_names must be chemical symbols such as ['H', 'C', 'O'], found {names}")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"type_names must be different, {repeated} is repeated in {names}")
    return names
