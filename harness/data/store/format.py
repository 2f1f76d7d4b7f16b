"""Layout of a store on disk: a folder of ``.npy`` files and a manifest.

    my.store/manifest.json            what is in it: sizes, checksums, sources and settings of the build
    my.store/columns/num_atoms.npy    facts, an entry for each frame, see harness.data.facts
    my.store/records/00000.npy        bytes: the numbers of one frame side by side, frame after frame
    my.store/information/00000.npy    bytes: what else its files say of a frame, see harness.data.store.information

Facts are asked of all frames at once and are columns; frames are read one at a time and are records, so that a frame is
one read of one file. A record is a header, the quantities that the frame has, in the order of the fields of its file,
and zeros up to a multiple of 8 bytes. Its checksum is checked whenever it is read. All numbers are little-endian.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from harness.data.frames import FrameArrays
from harness.data.reading import Frame

__all__ = [
    "COMPOSITION_COLUMNS",
    "MANIFEST",
    "VERSION",
    "RecordField",
    "RecordHeader",
    "anew",
    "arrays_of",
    "checksum_of",
    "content_checksum",
    "decode",
    "encode",
    "fields_of",
    "frame_of",
    "header_of",
    "manifest_text",
    "read_manifest",
    "save_array",
    "sync_folder",
]

VERSION = 2
"""To be raised whenever a store is written otherwise: others are refused, not misread."""
MANIFEST = "manifest.json"
COMPOSITION_COLUMNS = ("composition_offsets", "composition_numbers", "composition_counts", "composition_with_forces")
_FORMAT = "harness store"
_HEADER = struct.Struct("<QqIiiI")
_ALIGNMENT = 8


@dataclass(frozen=True)
class RecordField:
    """A quantity of the records of a file.

    Attributes:
        name: of the label, ``extras/<field>``, ``weights/<name>``, or a part of the structure.
        level: ``node``: an entry for each atom; ``graph``; or ``flag``, which is there or not and has no bytes.
        dtype: of NumPy, with its byte order.
        shape: of an entry.
    """

    name: str
    level: str
    dtype: str
    shape: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> RecordField:
        """A field of a manifest."""
        return cls(entry["name"], entry["level"], entry["dtype"], tuple(entry["shape"]))

    def whole_shape(self, num_atoms: int) -> tuple[int, ...]:
        """Shape of the quantity of a frame."""
        return (num_atoms, *self.shape) if self.level == "node" else self.shape


class RecordHeader(NamedTuple):
    """Beginning of a record.

    Attributes:
        present: bit k is set if the frame has the field k.
        number: of the frame in its file.
        num_atoms: of the frame.
        origin: its file, a position in the ``origins`` of the file of records.
        group: its group, a position in the ``groups`` of the file of records; -1 without one.
        checksum: CRC-32 of everything else in the record.
    """

    present: int
    number: int
    num_atoms: int
    origin: int
    group: int
    checksum: int


_STRUCTURE = (
    RecordField("cell", "graph", "<f8", (3, 3)),
    RecordField("positions", "node", "<f8", (3,)),
    RecordField("energy", "graph", "<f8"),
    RecordField("forces", "node", "<f8", (3,)),
    RecordField("stress", "graph", "<f8", (3, 3)),
)
_BYTES = (
    RecordField("pbc", "graph", "|b1", (3,)),
    RecordField("numbers", "node", "|u1"),
    RecordField("stress_left_out", "flag", "|u1"),
)


def fields_of(frames: Sequence[Frame]) -> list[RecordField]:
    """Fields of the records of some frames; words of 8 bytes before bytes.

    Raises:
        ValueError: a further label has different shapes or dtypes in two of the frames, or there are too many.
    """
    further: dict[str, list[tuple[Frame, NDArray[Any]]]] = {}
    for frame in frames:
        for name, value in frame.extras.items():
            further.setdefault(name, []).append((frame, np.asarray(value)))
    fields = [*_STRUCTURE, *(_further(name, values) for name, values in sorted(further.items()))]
    weights = sorted({name for frame in frames for name in frame.weights})
    fields += [RecordField(f"weights/{name}", "graph", "<f8") for name in weights]
    if len(fields) + len(_BYTES) > 64:
        raise ValueError(f"a store has room for 64 quantities of a frame, found {len(fields) + len(_BYTES)}")
    return [*fields, *_BYTES]


def _further(name: str, values: Sequence[tuple[Frame, NDArray[Any]]]) -> RecordField:
    """Field of a further label: of the atoms, if its first dimension is theirs in every frame."""
    of_atoms = all(value.ndim and len(value) == len(frame.atoms) for frame, value in values)
    first = values[0][1]
    shape = first.shape[1:] if of_atoms else first.shape
    dtype = "<i8" if first.dtype.kind in "iub" else "<f8"
    for frame, value in values:
        found = value.shape[1:] if of_atoms else value.shape
        if found != shape or ("<i8" if value.dtype.kind in "iub" else "<f8") != dtype:
            raise ValueError(
                f"{frame.location}: {name} has shape {value.shape} and {value.dtype}, and {values[0][0].location} has "
                f"{first.shape} and {first.dtype}; expected the same in all frames"
            )
    return RecordField(f"extras/{name}", "node" if of_atoms else "graph", dtype, shape)


def encode(frame: Frame, fields: Sequence[RecordField], origin: int, group: int) -> bytes:
    """Record of a frame.

    Args:
        frame: the structure and its labels.
        fields: of the file of records.
        origin: position of the frame's file in the ``origins`` of the file of records.
        group: position of its group in the file's list; -1 without one.
    """
    atoms = frame.atoms
    values: dict[str, Any] = {
        "cell": atoms.cell.array,
        "positions": atoms.positions,
        "energy": frame.energy,
        "forces": frame.forces,
        "stress": frame.stress,
        "pbc": atoms.pbc,
        "numbers": atoms.numbers,
        "stress_left_out": np.zeros(0, np.uint8) if frame.stress_left_out else None,
    }
    values |= {f"extras/{name}": value for name, value in frame.extras.items()}
    values |= {f"weights/{name}": value for name, value in frame.weights.items()}
    present, parts = 0, []
    for bit, field in enumerate(fields):
        value = values.get(field.name)
        if value is not None:
            present |= 1 << bit
            parts.append(np.asarray(value).astype(field.dtype).tobytes())
    body = b"".join(parts)
    body += bytes(-len(body) % _ALIGNMENT)
    start = _HEADER.pack(present, frame.index, len(atoms), origin, group, 0)
    checksum = zlib.crc32(body, zlib.crc32(start))
    return _HEADER.pack(present, frame.index, len(atoms), origin, group, checksum) + body


def content_checksum(record: bytes) -> int:
    """CRC-32 of what a frame is, without the file that it is of and its place there."""
    return zlib.crc32(record[_HEADER.size :], zlib.crc32(record[:8]))


def header_of(record: bytes | bytearray) -> RecordHeader | None:
    """Header of a record; None if the record is not what was written."""
    if len(record) < _HEADER.size:
        return None
    header = RecordHeader(*_HEADER.unpack_from(record))
    start = _HEADER.pack(*header[:-1], 0)
    checksum = zlib.crc32(memoryview(record)[_HEADER.size :], zlib.crc32(start))
    return header if checksum == header.checksum else None


def decode(record: bytearray, header: RecordHeader, fields: Sequence[RecordField]) -> dict[str, NDArray[Any]]:
    """Quantities that a frame has, by field; they are views of the record."""
    found, start, num_atoms = {}, _HEADER.size, header.num_atoms
    for bit, field in enumerate(fields):
        if not header.present >> bit & 1:
            continue
        if field.level == "flag":
            found[field.name] = np.zeros(0, np.uint8)
            continue
        shape = field.whole_shape(num_atoms)
        count = 1
        for length in shape:
            count *= length
        values = np.frombuffer(record, field.dtype, count, start)
        found[field.name] = values.reshape(shape)
        start += values.nbytes
    return found


def arrays_of(found: Mapping[str, NDArray[Any]]) -> FrameArrays:
    """Numbers of a frame from the quantities of its record."""
    energy = found.get("energy")
    extras = {name[7:]: value for name, value in found.items() if name.startswith("extras/")}
    weights = {name[8:]: float(value) for name, value in found.items() if name.startswith("weights/")}
    return FrameArrays(
        found["numbers"], found["positions"], found["cell"], found["pbc"],
        None if energy is None else float(energy), found.get("forces"), found.get("stress"), extras, weights,
    )  # fmt: skip


def frame_of(found: Mapping[str, NDArray[Any]], header: RecordHeader, origin: str, group: str | None) -> Frame:
    """Frame from the quantities of its record."""
    arrays = arrays_of(found)
    return Frame(
        Atoms(numbers=arrays.numbers, positions=arrays.positions, cell=arrays.cell, pbc=arrays.pbc),
        arrays.energy, arrays.forces, arrays.stress,
        origin=origin, index=header.number, stress_left_out="stress_left_out" in found,
        extras=arrays.extras, weights=arrays.weights, group=group,
    )  # fmt: skip


def save_array(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    """Write a ``.npy`` file that is whole or not there.

    Returns:
        Its size and checksum: ``bytes`` and ``crc32`` of the whole file.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    facts = {"bytes": part.stat().st_size, "crc32": checksum_of(part)}
    os.replace(part, path)
    return facts


def checksum_of(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, so that they outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Text of a manifest with its own checksum."""
    whole = {"format": _FORMAT, "version": VERSION, **manifest}
    return json.dumps(whole | {"checksum": _checksum(whole)}, indent=1, default=_as_json) + "\n"


def _as_json(value: Any) -> Any:
    if isinstance(value, RecordField):
        return asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is no entry of a manifest")


def _checksum(manifest: Mapping[str, Any]) -> int:
    entries: Iterable[tuple[str, Any]] = ((name, entry) for name, entry in manifest.items() if name != "checksum")
    return zlib.crc32(json.dumps(dict(entries), sort_keys=True, default=_as_json).encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """Manifest of a store.

    Raises:
        ValueError: it is damaged, of no store, or of another version.
    """
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error}). {anew(path)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{path / MANIFEST} is no manifest of a store. {anew(path)}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} is a store of version {manifest.get('version')}, this package reads version {VERSION}. Build it "
            f"anew with this package, or use the one that it was built with ({manifest.get('made_by')}): "
            f"harness-data build {path} FILES..."
        )
    if _checksum(manifest) != manifest.get("checksum"):
        raise ValueError(f"{path / MANIFEST} is damaged (its checksum does not fit). {anew(path)}")
    return manifest


def anew(path: Path) -> str:
    """Advice for a store that cannot be used."""
    return f"Remove the folder and build the store anew: harness-data build {path} FILES..."
