"""Text, numbers, further results and columns that files have beside structure and labels, as plain data.

A training does not read it. It is kept for those who write structures again, such as ``harness-eval --write``: what a
stored frame cannot be put together from, in the order of the file. Of a frame without any it takes no byte.

The bytes of a frame are a length and a CRC-32, then JSON, then the numbers of its arrays. Values are text, numbers,
booleans, None, arrays, and lists and dictionaries of these; others, such as objects of a library, are left out.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import dict2constraint
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from harness.data.extras import Extras
from harness.data.reading import Frame

__all__ = ["HEADER", "body_of", "encode_information", "with_information", "with_labels"]

HEADER = struct.Struct("<II")
"""Length and CRC-32 of what follows."""
_PLACES = ("results", "arrays", "info")
_STRUCTURE = ("numbers", "positions")
_PLAIN = (str, bool, int, float, type(None))
_CONSTRAINTS = "constraints"


class _NotPlainError(Exception):
    """A value that is no plain data."""


def with_labels(frame: Frame, keys: Mapping[str, str], extras: Extras) -> Atoms:
    """Structure with the labels of a frame, where files have them.

    Args:
        frame: structure and labels.
        keys: names of energy, forces and stress.
        extras: further labels and inputs, and the name of the group.
    """
    bare = frame.atoms
    atoms = Atoms(numbers=bare.numbers, positions=bare.positions, cell=bare.cell, pbc=bare.pbc)
    results = dict[str, Any]()
    stress = None if frame.stress is None else full_3x3_to_voigt_6_stress(frame.stress)
    # in the order of an extended XYZ, columns first
    labels: dict[str, Any] = {"forces": frame.forces, "energy": frame.energy, "stress": stress}
    for label, value in labels.items():
        if value is not None and keys[label] in ("energy", "forces", "stress"):
            results[label] = value
        elif value is not None:
            (atoms.arrays if label == "forces" else atoms.info)[keys[label]] = value
    for entry in extras.entries:
        if entry.field in frame.extras:
            values = np.asarray(frame.extras[entry.field])
            if entry.level == "node":
                flat = values.reshape(len(atoms), -1)
                place, value = atoms.arrays, flat[:, 0] if flat.shape[1] == 1 else flat
            else:
                place, value = atoms.info, values.item() if values.size == 1 else values.reshape(-1)
            (results if entry.key in all_properties else place)[entry.key] = value
    if results:
        atoms.calc = SinglePointCalculator(atoms)
        atoms.calc.results = results
    if frame.group is not None and extras.group_key is not None:
        atoms.info[extras.group_key] = frame.group
    return atoms


def encode_information(frame: Frame, keys: Mapping[str, str], extras: Extras) -> bytes:
    """Bytes of what a structure of a file has beyond :func:`with_labels`; none if that is all.

    Args:
        frame: as it was read from a file.
        keys: names of energy, forces and stress.
        extras: further labels and inputs, and the name of the group.
    """
    given, known = _contents(frame.atoms), _contents(with_labels(frame, keys, extras))
    constraints = [each.todict() for each in frame.atoms.constraints]
    is_known = {
        place: [name for name, value in values.items() if name in known[place] and _same(value, known[place][name])]
        for place, values in given.items()
    }
    if not constraints and all(list(given[each]) == list(known[each]) == list(is_known[each]) for each in _PLACES):
        return b""
    arrays: list[bytes] = []
    content: dict[str, list[Any]] = {place: [] for place in _PLACES}
    for place, values in given.items():
        for name, value in values.items():
            try:
                content[place].append(name if name in is_known[place] else [name, _encoded(value, arrays)])
            except _NotPlainError:
                continue
    if constraints:
        content[_CONSTRAINTS] = [_encoded(each, arrays) for each in constraints]
    text = json.dumps(content, separators=(",", ":")).encode()
    body = struct.pack("<I", len(text)) + text + b"".join(arrays)
    return HEADER.pack(len(body), zlib.crc32(body)) + body


def body_of(record: bytes | bytearray) -> bytes | None:
    """Content of the bytes of a frame; None if they are not what was written."""
    body = bytes(record[HEADER.size :])
    return body if HEADER.unpack_from(record) == (len(body), zlib.crc32(body)) else None


def with_information(atoms: Atoms, body: bytes) -> Atoms:
    """Structure of :func:`with_labels` with everything that the file had, in its order.

    Args:
        atoms: is changed.
        body: content of the bytes of the frame.
    """
    (length,) = struct.unpack_from("<I", body)
    content: dict[str, list[Any]] = json.loads(body[4 : 4 + length])
    known, numbers = _contents(atoms), body[4 + length :]
    found = {
        place: dict((each, known[place][each]) if isinstance(each, str) else _item(each, numbers) for each in names)
        for place, names in content.items()
        if place in _PLACES
    }
    for name in known["arrays"]:
        del atoms.arrays[name]
    atoms.arrays.update(found["arrays"])
    atoms.info = found["info"]
    atoms.calc = None
    if found["results"]:
        atoms.calc = SinglePointCalculator(atoms)
        atoms.calc.results = found["results"]
    atoms.set_constraint([dict2constraint(_decoded(each, numbers)) for each in content.get(_CONSTRAINTS, ())])
    return atoms


def _contents(atoms: Atoms) -> dict[str, dict[str, Any]]:
    """Values of a structure that are no part of it, by place and name."""
    results = {} if atoms.calc is None else {k: v for k, v in atoms.calc.results.items() if v is not None}
    arrays = {name: values for name, values in atoms.arrays.items() if name not in _STRUCTURE}
    return {"results": results, "arrays": arrays, "info": {str(name): value for name, value in atoms.info.items()}}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float) and isinstance(other, float):  # NumPy's, too
        return struct.pack("<d", one) == struct.pack("<d", other)
    return type(one) is type(other) and isinstance(one, _PLAIN) and one == other


def _encoded(value: Any, arrays: list[bytes]) -> Any:
    """Value as JSON; the numbers of arrays are added to a list.

    Raises:
        _NotPlainError: it is no plain data.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        if array.dtype.kind == "O":  # such as a column of text in an extended XYZ
            return {"objects": [list(np.shape(value)), [_encoded(each, arrays) for each in array.ravel().tolist()]]}
        if array.dtype.kind not in "biufcUS":
            raise _NotPlainError
        start = sum(map(len, arrays))
        arrays.append(array.tobytes())
        return {"array": [array.dtype.str, list(np.shape(value)), start, isinstance(value, np.generic)]}
    if isinstance(value, list | tuple):
        return [_encoded(each, arrays) for each in value]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"mapping": {name: _encoded(each, arrays) for name, each in value.items()}}
    raise _NotPlainError


def _item(pair: list[Any], numbers: bytes) -> tuple[str, Any]:
    return pair[0], _decoded(pair[1], numbers)


def _decoded(value: Any, numbers: bytes) -> Any:
    if isinstance(value, list):
        return [_decoded(each, numbers) for each in value]
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {name: _decoded(each, numbers) for name, each in value["mapping"].items()}
    if "objects" in value:
        shape, members = value["objects"]
        objects = np.empty(len(members), object)
        objects[:] = [_decoded(each, numbers) for each in members]
        return objects.reshape(shape)
    dtype, shape, start, is_scalar = value["array"]
    count = int(np.prod(shape, dtype=np.int64))
    found: NDArray[Any] = np.frombuffer(numbers, dtype, count, start).reshape(shape).copy()
    return found[()] if is_scalar else found
