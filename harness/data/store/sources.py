"""Files that a store is built of, and the pieces in which they are read, each by itself."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype, get_ioformat

from harness.data.reading import structures_of
from harness.data.store.stored import is_store

__all__ = ["Piece", "Source", "found_files", "pieces_of", "read_piece", "units_of"]

_FEWEST_BYTES = 2 << 20  # of a unit: half a second of work, which a process of its own is worth
_MOST_UNITS = 200  # about: files of records that a store has, and that a process has open
_UNSPLIT = "whole"


@dataclass(frozen=True)
class Source:
    """A file as it was when a build began.

    Attributes:
        path: as it was given.
        bytes: its size.
        modified: time of its last change in ns.
    """

    path: str
    bytes: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> Source:
        """A file as it is now."""
        state = path.expanduser().stat()
        return cls(str(path), state.st_size, state.st_mtime_ns)

    def refuse_change(self) -> None:
        """Refuse a file that is not what it was.

        Raises:
            ValueError: with the file.
        """
        path = Path(self.path)
        if not path.is_file() or Source.of(path) != self:
            raise ValueError(
                f"{path} has changed while the store was being built of it; expected a file that stays as it is. "
                f"Build anew when it is complete: add --restart"
            )

    def sha256(self) -> str:
        """SHA-256 of the content."""
        with Path(self.path).open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Piece:
    """Part of a file that can be read by itself.

    Attributes:
        source: number of the file.
        kind: ``bytes`` of an extended XYZ, ``frames`` of a trajectory, or the ``whole`` file.
        start: first byte or frame.
        stop: the one after the last.
        first: number of the first frame in the file.
    """

    source: int
    kind: str = _UNSPLIT
    start: int = 0
    stop: int = 0
    first: int = 0

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def found_files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files that are named, with those in named folders in the order of their names; and files that ASE cannot read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder is a store or has no file that ASE reads, or a file is there twice.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    for given in paths:
        path = given.expanduser()
        if is_store(path):
            raise ValueError(
                f"{given} is a store already; expected files that ASE reads, or folders of them. A training takes "
                f"several stores: harness-train data=store 'data.train=[{given},OTHER]'"
            )
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file, path)]
            readable = [file for file in inside if _is_readable(file)]
            if not readable:
                raise ValueError(f"{given} has no file that ASE reads among its {len(inside)} files")
            found += readable
            skipped += sorted(set(inside) - set(readable))
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no file or folder at {given}; relative paths start at {Path.cwd()}")
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise ValueError(f"{path} is there twice; expected each file once")
        seen.add(path.resolve())
    return found, skipped


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_readable(file: Path) -> bool:
    try:
        get_ioformat(filetype(str(file)))
    except (UnknownFileTypeError, OSError, UnicodeDecodeError):
        return False
    return True


def units_of(sources: Sequence[Source]) -> list[list[Piece]]:
    """Pieces of all files in order, put together to parts of a store of similar size: about 200, of 2 MiB or more."""
    target = max(_FEWEST_BYTES, sum(source.bytes for source in sources) // _MOST_UNITS)
    units: list[list[Piece]] = []
    filled = target
    for number, source in enumerate(sources):
        for piece, size in pieces_of(number, source, target):
            if filled + size > target:
                units.append([])
                filled = 0
            units[-1].append(piece)
            filled += size
    return units


def pieces_of(number: int, source: Source, target: int) -> Iterator[tuple[Piece, int]]:
    """Pieces of a file of up to about ``target`` bytes, and the size of each."""
    path = Path(source.path)
    if source.bytes > target and path.suffix in (".xyz", ".extxyz"):
        pieces = _pieces_of_xyz(number, path, target)
        if pieces:
            yield from pieces
            return
    if source.bytes > target and path.suffix == ".traj":
        with ase.io.Trajectory(str(path)) as trajectory:
            total = len(trajectory)
        step = max(1, total * target // source.bytes)
        for start in range(0, total, step):
            stop = min(start + step, total)
            yield Piece(number, "frames", start, stop, start), source.bytes * (stop - start) // total
        return
    yield Piece(number), source.bytes


def _pieces_of_xyz(number: int, path: Path, target: int) -> list[tuple[Piece, int]]:
    """Pieces of an extended XYZ file by its lines with numbers of atoms; none if they are not what they should be."""
    pieces, start, first, frame = [], 0, 0, 0
    with path.open("rb", buffering=1 << 20) as file:
        place = 0
        while line := file.readline():
            if not line.strip():  # ASE stops here
                break
            if place - start >= target:
                pieces.append((Piece(number, "bytes", start, place, first), place - start))
                start, first = place, frame
            try:
                num_atoms = int(line)
            except ValueError:
                return []
            deque(islice(file, num_atoms + 1), maxlen=0)
            place = file.tell()
            frame += 1
    pieces.append((Piece(number, "bytes", start, place, first), place - start))
    return pieces


def read_piece(source: Source, piece: Piece) -> list[Atoms]:
    """Structures of a piece.

    Raises:
        ValueError: ASE cannot read it.
    """
    path = Path(source.path)
    try:
        if piece.kind == "bytes":
            with path.open("rb") as file:
                file.seek(piece.start)
                text = file.read(piece.stop - piece.start).decode()
            return list(ase.io.read(io.StringIO(text), index=":", format="extxyz"))
        if piece.kind == "frames":
            return list(ase.io.read(path, index=slice(piece.start, piece.stop)))
        return structures_of(path)
    except Exception as error:  # every format of ASE fails in its own way
        place = f", from frame {piece.first} on" if piece.kind != _UNSPLIT else ""
        raise ValueError(
            f"ASE cannot read {path}{place} as a file of structures ({type(error).__name__}: {error}); is it complete, "
            "and has it the usual suffix?"
        ) from error
