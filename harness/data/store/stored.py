"""Frames of a store: columns by memory map, single frames by one read each, safe for any number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.facts import WEIGHTS, Compositions
from harness.data.frames import FrameArrays, FrameSet, absent_column, checked_index
from harness.data.reading import Frame
from harness.data.store.format import (
    COMPOSITION_COLUMNS,
    MANIFEST,
    RecordField,
    RecordHeader,
    anew,
    arrays_of,
    checksum_of,
    decode,
    frame_of,
    header_of,
    read_manifest,
)
from harness.data.store.information import HEADER, body_of

__all__ = ["INFORMATION", "StoredFrames", "edges_column", "is_store"]

INFORMATION = "information"
"""Column with the place of what else a frame's file says of it; -1 for nothing."""


def is_store(path: Path) -> bool:
    """True for the folder of a finished store."""
    return (path / MANIFEST).is_file()


def edges_column(cutoff: float) -> str:
    """Name of the column with the number of edges within a cutoff in Å."""
    return f"edges_{float(cutoff)!r}"


class StoredFrames(FrameSet):
    """Frames of a store.

    Nothing is read at first but the manifest; the sizes of all files are compared with it. A column is checked when a
    process asks for it first, a frame whenever it is read. Frames are read from the file and not by memory map, so that
    they are in the memory of the operating system alone, which all processes share, and a file that was cut off is an
    error and not the end of the process.

    Args:
        path: folder of the store.
        manifest: of a store that is being built; read from the folder if None.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is damaged or of another version.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path).expanduser()
        if manifest is None:
            self._refuse_others()
        self.manifest = read_manifest(self.path) if manifest is None else manifest
        self._parts = self.manifest["parts"]
        self._ends = np.cumsum([0, *(part["frames"] for part in self._parts)])
        self._fields = [[RecordField.from_json(field) for field in part["fields"]] for part in self._parts]
        self._checked_columns: set[str] = set()
        self._files: dict[str, int] = {}
        self._held: list[int] = []
        for name, facts in self._all_files():
            self._check_size(name, facts["bytes"])

    def _refuse_others(self) -> None:
        if is_store(self.path):
            return
        unfinished = self.path.with_name(f"{self.path.name}.building")
        if unfinished.is_dir():
            raise FileNotFoundError(
                f"{self.path} is not finished: its build has stopped or is still running. Give the command again, and "
                f"it goes on: harness-data build {self.path} FILES..."
            )
        if self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} is a file and no store. Build a store of it: harness-data build {self.path.stem}.store "
                f"{self.path}"
            )
        what = "no store" if self.path.exists() else "not there"
        raise FileNotFoundError(
            f"{self.path} is {what}: expected a folder that `harness-data build` has written. Relative paths start at "
            f"{Path.cwd()}. Build it: harness-data build {self.path} FILES..."
        )

    def _all_files(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield from ((f"columns/{name}.npy", facts) for name, facts in self.manifest["columns"].items())
        for part in self._parts:
            yield from ((each["file"], each) for each in (part, part.get(INFORMATION)) if each is not None)

    def _check_size(self, name: str, expected: int) -> None:
        file = self.path / name
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes, expected {expected}"
            raise ValueError(f"{file} {state}: the store is damaged or was not copied completely. {anew(self.path)}")

    def __getstate__(self) -> dict[str, Any]:
        # files are opened by each process, and memory maps would be sent as a whole
        return {name: value for name, value in self.__dict__.items() if name != "_offsets"} | {
            "_files": {},
            "_held": [],
        }

    def __del__(self) -> None:
        for file in (*getattr(self, "_files", {}).values(), *getattr(self, "_held", ())):
            os.close(file)

    def hold(self, file: int) -> None:
        """Keep a file open as long as these frames are there, such as one whose lock says that they are in use."""
        self._held.append(file)

    @property
    def digest(self) -> str:
        """SHA-256 of the frames and their labels, whatever files they are in."""
        return str(self.manifest["digest"])

    def __len__(self) -> int:
        """Number of frames."""
        return int(self._ends[-1])

    def _file(self, name: str) -> int:
        if name not in self._files:
            if len(self._files) >= 256:  # processes may have no more than 1024 files open
                os.close(self._files.pop(next(iter(self._files))))
            self._files[name] = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[name]

    def _record(self, index: int) -> tuple[dict[str, NDArray[Any]], RecordHeader, int]:
        """Quantities and header of a frame, and the number of its file of records."""
        number = _part_of(self._ends, index)
        start, is_last = int(self._offsets[index]), index + 1 == self._ends[number + 1]
        end = self._parts[number]["bytes"] if is_last else int(self._offsets[index + 1])
        is_there = 0 <= start < end <= self._parts[number]["bytes"]
        record = bytearray(end - start if is_there else 0)
        read = os.preadv(self._file(self._parts[number]["file"]), [record], start) if is_there else 0
        header = header_of(record) if read == len(record) else None
        if header is None:
            raise ValueError(
                f"{self.path / self._parts[number]['file']}: frame {index} of the store is damaged: its checksum does "
                f"not fit. `harness-data info {self.path} --verify` looks at all of them. {anew(self.path)}"
            )
        return decode(record, header, self._fields[number]), header, number

    def _frame(self, index: int) -> Frame:
        found, header, number = self._record(index)
        part = self._parts[number]
        group = None if header.group < 0 else part["groups"][header.group]
        return frame_of(found, header, part["origins"][header.origin], group)

    def information(self, index: int) -> bytes:
        """Everything else that a frame's file says of it, see :mod:`harness.data.store.information`; empty for nothing.

        Raises:
            ValueError: it is damaged.
        """
        start = int(self._stored(INFORMATION)[index]) if INFORMATION in self.manifest["columns"] else -1
        if start < 0:
            return b""
        file = self._parts[_part_of(self._ends, index)][INFORMATION]["file"]
        header = os.pread(self._file(file), HEADER.size, start)
        length = HEADER.unpack(header)[0] if len(header) == HEADER.size else 0
        body = body_of(header + os.pread(self._file(file), length, start + HEADER.size)) if length else None
        if body is None:
            raise ValueError(
                f"{self.path / file}: what the store has of frame {index} beside its labels is damaged: its checksum "
                f"does not fit. {anew(self.path)}"
            )
        return body

    def arrays(self, index: int) -> FrameArrays:
        """Numbers of one frame."""
        return arrays_of(self._record(checked_index(self, index))[0])

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """Place of each frame's record in its file."""
        return self._mapped("offset")

    def _mapped(self, name: str) -> NDArray[Any]:
        """A column as it is on disk; its pages are memory of this process as long as the array is in use."""
        array = np.load(self.path / "columns" / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return np.asarray(array)  # of the same pages, and indexed four times as fast

    def _stored(self, name: str) -> NDArray[Any]:
        """A column, checked when this process asks for it first."""
        if name not in self._checked_columns:
            file = self.path / "columns" / f"{name}.npy"
            self._check_size(f"columns/{name}.npy", self.manifest["columns"][name]["bytes"])
            if checksum_of(file) != self.manifest["columns"][name]["crc32"]:
                raise ValueError(f"{file} is damaged: its checksum does not fit. {anew(self.path)}")
            self._checked_columns.add(name)
        return self._mapped(name)

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns; see :meth:`FrameSet.column`."""
        return self._stored(name) if name in self.manifest["columns"] else absent_column(name, len(self))

    def compositions(self) -> Compositions:
        """Elements of all frames."""
        return Compositions(*(self._stored(name) for name in COMPOSITION_COLUMNS))

    def label_names(self) -> list[str]:
        """Labels, and further labels and inputs that a frame has."""
        return list(self.manifest["labels"])

    def weight_names(self) -> list[str]:
        """Weights that a frame has."""
        return [name for name in WEIGHTS if name in self.manifest["columns"]]

    def group_names(self) -> list[str]:
        """Groups, at the positions that the column ``group`` refers to."""
        return list(self.manifest["groups"])

    def origin_names(self) -> list[str]:
        """Files that the store was built of."""
        return list(self.manifest["origins"])

    def available(self) -> Mapping[str, frozenset[str]]:
        """Names that the files had values under, and the labels that each might be."""
        return {name: frozenset(labels) for name, labels in self.manifest["available"].items()}

    def num_edges(self, cutoff: float) -> NDArray[np.int64] | None:
        """Number of edges of each frame, if the store was built with this cutoff."""
        name = edges_column(cutoff)
        return self._stored(name).astype(np.int64) if name in self.manifest["columns"] else None

    def damages(self) -> Iterator[str]:
        """Sentences on all files that are not what was written; every byte is read."""
        for name, facts in self._all_files():
            file = self.path / name
            if not file.is_file():
                yield f"{file} is missing"
            elif file.stat().st_size != facts["bytes"] or checksum_of(file) != facts["crc32"]:
                yield f"{file} is damaged"


def _part_of(ends: NDArray[np.int64], index: int) -> int:
    """Number of the part that a frame is in, of parts with these ends."""
    return int(np.searchsorted(ends, index, side="right")) - 1
