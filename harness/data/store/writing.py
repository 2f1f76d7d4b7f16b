"""Writing a store: parts, each by itself and in any order, and the columns of all parts at the end."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.facts import LABELS, WEIGHTS, Compositions, columns_of
from harness.data.neighbors import neighbor_list
from harness.data.reading import Frame, available_labels
from harness.data.store.format import (
    COMPOSITION_COLUMNS,
    MANIFEST,
    content_checksum,
    encode,
    fields_of,
    manifest_text,
    save_array,
    sync_folder,
)
from harness.data.store.stored import INFORMATION, StoredFrames, edges_column
from harness.support.files import write_text_whole

__all__ = ["PART_FACTS", "has_part", "join_parts", "name_store", "write_part"]

PART_FACTS = "part.json"


def write_part(
    folder: Path,
    number: int,
    frames: Sequence[Frame],
    cutoffs: Sequence[float] = (),
    facts: Mapping[str, Any] | None = None,
    information: Sequence[bytes] = (),
) -> None:
    """Write some frames as one part of a store that is being built; a part is there as a whole or not.

    Args:
        folder: of the build.
        number: of the part, which is its place among the others.
        frames: structures and labels.
        cutoffs: in Å, for which the numbers of edges are counted.
        facts: further facts that the build needs when all parts are there.
        information: bytes of each frame, see :mod:`harness.data.store.information`.
    """
    columns_folder = folder / "parts" / f"{number:05d}"
    unfinished = columns_folder.with_name(f"{number:05d}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    origins: list[str] = []
    groups: list[str] = []
    columns: dict[str, NDArray[Any]] = columns_of(frames, origins, groups)
    fields = fields_of(frames)
    records = [
        encode(frame, fields, int(origin), int(group))
        for frame, origin, group in zip(frames, columns["origin"], columns["group"], strict=True)
    ]
    saved = _save_bytes(folder / "records" / f"{number:05d}.npy", records)
    lengths = np.array([len(record) for record in records], dtype=np.int64)
    columns["offset"] = saved["bytes"] - int(lengths.sum()) + np.cumsum(lengths) - lengths
    columns["checksum"] = np.array([content_checksum(record) for record in records], dtype=np.uint32)
    compositions = Compositions.of(frames)
    columns |= dict(zip(COMPOSITION_COLUMNS, _arrays(compositions), strict=True))
    for cutoff in cutoffs:
        columns[edges_column(cutoff)] = np.array([_num_edges(frame, cutoff) for frame in frames], dtype=np.int32)
    further = {}
    if any(information):
        lengths = np.array([len(each) for each in information], dtype=np.int64)
        further = {"information": _save_bytes(folder / "information" / f"{number:05d}.npy", information)}
        starts = further["information"]["bytes"] - int(lengths.sum()) + np.cumsum(lengths) - lengths
        columns[INFORMATION] = np.where(lengths > 0, starts, -1)
    for name, column in columns.items():
        save_array(unfinished / f"{name}.npy", column)
    part = {
        "frames": len(frames),
        **saved,
        **further,
        "fields": fields,
        "groups": groups,
        "origins": origins,
        "columns": list(columns),
        "available": available_labels(frames),
        **(facts or {}),
    }
    write_text_whole(unfinished / PART_FACTS, manifest_text(part))
    sync_folder(unfinished)
    shutil.rmtree(columns_folder, ignore_errors=True)
    os.replace(unfinished, columns_folder)
    sync_folder(columns_folder.parent)


def _save_bytes(path: Path, pieces: Sequence[bytes]) -> dict[str, Any]:
    """Write a file of bytes into a folder of the build; returns its place there, its size and checksum."""
    path.parent.mkdir(exist_ok=True)
    saved = save_array(path, np.frombuffer(b"".join(pieces), np.uint8))
    sync_folder(path.parent)
    return {"file": f"{path.parent.name}/{path.name}", **saved}


def _arrays(compositions: Compositions) -> tuple[NDArray[Any], ...]:
    return compositions.offsets, compositions.numbers, compositions.counts, compositions.with_forces


def _num_edges(frame: Frame, cutoff: float) -> int:
    atoms = frame.atoms
    return neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)[0].shape[1]


def has_part(folder: Path, number: int) -> bool:
    """True if a part has been written as a whole."""
    try:
        part = read_part(folder, number)
    except (OSError, ValueError):
        return False
    written = [part, part["information"]] if "information" in part else [part]
    files = [(folder / each["file"], each["bytes"]) for each in written]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def read_part(folder: Path, number: int) -> dict[str, Any]:
    """Facts of a part."""
    found: dict[str, Any] = json.loads((folder / "parts" / f"{number:05d}" / PART_FACTS).read_text())
    return found


def join_parts(folder: Path, num_parts: int, facts: Mapping[str, Any]) -> StoredFrames:
    """Write the columns of all parts as one, and return the frames of the store, which has no manifest yet.

    Args:
        folder: of the build.
        num_parts: all of which are there.
        facts: further facts for the manifest.
    """
    parts = [read_part(folder, number) for number in range(num_parts)]
    origins = list(dict.fromkeys(name for part in parts for name in part["origins"]))
    groups = list(dict.fromkeys(name for part in parts for name in part["groups"]))
    columns_folder = folder / "columns"
    columns_folder.mkdir(exist_ok=True)
    names = dict.fromkeys(name for part in parts for name in part["columns"])
    saved: dict[str, Any] = {}
    for name in names:
        saved[name] = save_array(columns_folder / f"{name}.npy", _joined(folder, parts, name, origins, groups))
    sync_folder(columns_folder)
    labels = [name.removeprefix("state_") for name in names if name.startswith("state_")]
    available: dict[str, set[str]] = {}
    for part in parts:
        for name, might_be in part["available"].items():
            available.setdefault(name, set()).update(might_be)
    kept = ("frames", "file", "bytes", "crc32", "information", "fields", "groups", "origins")
    manifest = {
        "made_by": _package(),
        "num_frames": sum(part["frames"] for part in parts),
        "labels": [*LABELS, *sorted(set(labels) - set(LABELS))],
        "groups": groups,
        "origins": origins,
        "available": {name: sorted(might_be) for name, might_be in available.items()},
        "columns": saved,
        "digest": _digest(columns_folder),
        "parts": [{name: part[name] for name in kept if name in part} for part in parts],
        **facts,
    }
    # the manifest as it will be read, in which tuples are lists
    return StoredFrames(folder, json.loads(manifest_text(manifest)))


def _joined(
    folder: Path, parts: Sequence[Mapping[str, Any]], name: str, origins: Sequence[str], groups: Sequence[str]
) -> NDArray[Any]:
    """A column of all parts."""
    arrays = []
    for number, part in enumerate(parts):
        if name in part["columns"]:
            array = np.load(folder / "parts" / f"{number:05d}" / f"{name}.npy", allow_pickle=False)
        elif name in WEIGHTS:
            array = np.ones(part["frames"])
        elif name == INFORMATION:
            array = np.full(part["frames"], -1, np.int64)
        else:  # a label that no frame of this part has
            array = np.zeros(part["frames"], np.uint8)
        if name in ("origin", "group"):
            own, of_all = (part["origins"], origins) if name == "origin" else (part["groups"], groups)
            code_of = {each: code for code, each in enumerate(of_all)}
            array = np.array([*(code_of[each] for each in own), -1], dtype=np.int32)[array]
        arrays.append(array)
    if name != COMPOSITION_COLUMNS[0]:
        return np.concatenate(arrays)
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *(np.diff(array) for array in arrays)]))


def _package() -> str:
    """Name and version of this package, as it is installed."""
    try:
        return f"potential-harness {importlib.metadata.version('potential-harness')}"
    except importlib.metadata.PackageNotFoundError:
        return "potential-harness from its sources"


def _digest(columns: Path) -> str:
    """SHA-256 of the structures and labels of all frames, from their columns."""
    digest = hashlib.sha256()
    for name in ("structure", "checksum"):
        digest.update(np.load(columns / f"{name}.npy", allow_pickle=False).tobytes())
    return digest.hexdigest()


def name_store(store: StoredFrames, path: Path) -> None:
    """Finish a store: write its manifest, remove what only the build needed, and give the folder its name."""
    folder = store.path
    entries = {name: entry for name, entry in store.manifest.items() if name not in ("format", "version", "checksum")}
    write_text_whole(folder / MANIFEST, manifest_text(entries))
    shutil.rmtree(folder / "parts", ignore_errors=True)
    sync_folder(folder)
    os.replace(folder, path)
    sync_folder(path.parent)
