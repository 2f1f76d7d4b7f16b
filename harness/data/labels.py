"""Further labels and inputs of the frames: which there are, where files have them, and the fields that they become.

A config names them by field: ``data.labels: {dipole: {key: REF_dipole}}``, ``data.inputs: {total_charge: {}}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from harness.data.batch_fields import ExtraField, RowLevel
from harness.data.reading import Frame, information
from harness.fields import BUILT_IN_FIELDS, FieldSpec, Level, register_field, registered_fields
from harness.support.checks import is_number, is_whole_number
from harness.support.configs import unwrapped
from harness.support.text import did_you_mean

__all__ = ["READY_INPUTS", "READY_LABELS", "FieldEntry", "entries_of", "label_shape_text"]

Kind = Literal["float", "int"]

_OF_THE_BATCH = frozenset(
    {
        *("pos", "cell", "pbc", "batch", "num_atoms", "atom_types", "atomic_numbers", "frame_index"),
        *("edge_index", "edge_cell_shift", "edge_vectors", "edge_lengths", "following_micro_batches"),
        *("weight", "energy_weight", "forces_weight", "stress_weight", "group_index", "set_index"),
    }
)
"""Fields that a batch has anyway."""
_OF_THE_KEYS = {"total_energy": "energy", "forces": "forces", "stress": "stress"}
"""Labels that ``data.keys`` names."""
_OPTIONS = {False: ("key", "level", "shape", "unit"), True: ("key", "level", "shape", "unit", "type", "default")}


@dataclass(frozen=True)
class FieldEntry:
    """A further label, or an input of the model.

    Attributes:
        field: name in batches.
        key: name in the files, looked up as those of :class:`~harness.data.reading.LabelKeys`.
        level: ``graph`` or ``node``.
        shape: of one row.
        unit: for logs and tables; nothing is converted.
        is_input: the model gets it, every frame has it, and it is no label.
        type: ``float`` or ``int``, of an input; labels are ``float``.
        default: of the frames without it, of an input; None if it has to be there.
    """

    field: str
    key: str
    level: RowLevel = "graph"
    shape: tuple[int, ...] = (1,)
    unit: str = ""
    is_input: bool = False
    type: Kind = "float"
    default: float | None = None

    @property
    def setting(self) -> str:
        """Name of its section of the config."""
        return f"data.{'inputs' if self.is_input else 'labels'}.{self.field}"

    def register(self) -> FieldSpec:
        """Register the field for losses and metrics."""
        missing = None if self.is_input else True
        return register_field(self.field, self.level, self.unit, shape=self.shape, may_be_missing=missing)

    def batch_field(self) -> ExtraField:
        """The field of a batch: NaN, or the default of an input, where a frame has no value."""
        dtype = torch.int64 if self.type == "int" else None
        fill = math.nan if self.default is None else self.default
        return ExtraField(self.field, self.level, self.shape, dtype, fill)

    def read(self, frame: Frame) -> NDArray[Any] | None:
        """Value of a frame, ``[*shape]`` or ``[num_atoms, *shape]``; None if the file has none, or NaN alone.

        Numbers of the same order in another form are taken: one number as an array of it, a matrix as a row.

        Raises:
            ValueError: no numbers, infinite ones, or another shape; or an input that is absent, unknown or no integer.
        """
        value = information(frame.atoms, self.key)
        if value is None:
            if self.is_input and self.default is None:
                raise ValueError(
                    f"{frame.location} has no {self.key!r}, the input {self.field} of the model; expected one in every "
                    f"frame. Add it to the file, or give {self.setting}.default"
                )
            return None
        what = f"{frame.location}: the {'input' if self.is_input else 'label'} {self.field} ({self.key!r})"
        try:
            numbers = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{what} must be numbers, found {value!r}") from None
        expected = self._shape_in(frame)
        if not _same_order(numbers.shape, expected, self.level):
            here = f", which is {list(expected)} here" if self.level == "node" else ""
            raise ValueError(
                f"{what} must have shape {label_shape_text(self.level, self.shape)}{here}, found "
                f"{list(numbers.shape)}. Is {self.setting}.key the right name, and its level and shape?"
            )
        numbers = numbers.reshape(expected)
        if self.is_input:
            return self._of_input(numbers, what)
        if np.isinf(numbers).any():
            raise ValueError(f"{what} has infinite values; write NaN where it is unknown")
        return None if np.isnan(numbers).all() else numbers

    def fits(self, frame: Frame, name: str) -> bool:
        """True if a frame has numbers of the right shape under a name."""
        try:
            shape = np.array(information(frame.atoms, name), dtype=np.float64).shape
        except (TypeError, ValueError):
            return False
        return _same_order(shape, self._shape_in(frame), self.level)

    def _shape_in(self, frame: Frame) -> tuple[int, ...]:
        return (len(frame.atoms), *self.shape) if self.level == "node" else self.shape

    def _of_input(self, numbers: NDArray[np.float64], what: str) -> NDArray[Any]:
        if not np.isfinite(numbers).all():
            raise ValueError(f"{what} must be finite, found {numbers.reshape(-1).tolist()}; a model needs its inputs")
        if self.type == "float":
            return numbers
        if (numbers != np.rint(numbers)).any():
            raise ValueError(
                f"{what} must be integers, found {numbers.reshape(-1).tolist()}; other numbers are inputs with "
                f"{self.setting}.type=float"
            )
        return np.rint(numbers).astype(np.int64)

    def plain(self) -> dict[str, Any]:
        """Options as plain data, from which :func:`entries_of` makes the same entry."""
        found: dict[str, Any] = {"key": self.key, "level": self.level, "shape": list(self.shape), "unit": self.unit}
        return found | ({"type": self.type, "default": self.default} if self.is_input else {})


READY_LABELS = {
    entry.field: entry
    for entry in (
        FieldEntry("dipole", "dipole", shape=(3,), unit="e·Å"),
        FieldEntry("charges", "charges", "node", unit="e"),
        FieldEntry("magnetic_moments", "magmoms", "node", unit="μB"),
        FieldEntry("born_charges", "born_effective_charges", "node", shape=(3, 3), unit="e"),
        FieldEntry("polarizability", "polarizability", shape=(3, 3), unit="Å³"),
    )
}
"""Labels that need no more than their name in ``data.labels``; the keys are ASE's."""
READY_INPUTS = {
    entry.field: entry
    for entry in (
        FieldEntry("total_charge", "charge", unit="e", is_input=True, type="int", default=0),
        FieldEntry("spin_multiplicity", "spin", is_input=True, type="int", default=1),
    )
}
"""Inputs that need no more than their name in ``data.inputs``: the charge in e, and the multiplicity 2S + 1."""


def entries_of(given: Any, is_input: bool = False) -> tuple[FieldEntry, ...]:
    """Entries that a config asks for.

    What an entry leaves out is that of the ready entry of this name, or of the registered field.

    Args:
        given: ``{field: {key: …, level: …, shape: …, unit: …}}``, a list of names, or None.
        is_input: whether they are inputs, which also have a ``type`` and a ``default``.

    Raises:
        TypeError: neither a mapping nor a list of names, or an option of the wrong kind.
        ValueError: a field that the batch has already, or an option that is unknown, missing or contradicts a field of
            the package.
    """
    setting = "data.inputs" if is_input else "data.labels"
    given = unwrapped(given)
    if given is None:
        return ()
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = {name: {} for name in given} if all(map(_is_name, given)) else given
    if not isinstance(given, Mapping):
        example = "{total_charge: {key: charge, default: 0}}" if is_input else "{dipole: {key: REF_dipole}}"
        raise TypeError(f"{setting} is a mapping such as {example}, or a list of names, found {given!r}")
    return tuple(_entry(name, {} if options is None else options, is_input) for name, options in given.items())


def label_shape_text(level: str, shape: Sequence[int]) -> str:
    """Shape in words of the field: ``[num_atoms, 3]``, or ``[3]`` of a frame."""
    return f"[{', '.join([*(['num_atoms'] if level == 'node' else []), *map(str, shape)])}]"


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name)


def _entry(name: Any, options: Any, is_input: bool) -> FieldEntry:
    section = f"data.{'inputs' if is_input else 'labels'}"
    if not _is_name(name):
        raise TypeError(f"{section}: the name of a field is a non-empty string, found {name!r}")
    where = f"{section}.{name}"
    if name in _OF_THE_KEYS:
        raise ValueError(f"{where}: {name} is read anyway; its key in the files is data.keys.{_OF_THE_KEYS[name]}")
    if name in _OF_THE_BATCH:
        raise ValueError(f"{where}: a batch has a field {name} of its own; give the {_kind(is_input)} another name")
    if isinstance(options, str):
        options = {"key": options}
    if not isinstance(options, Mapping):
        raise TypeError(f"{where} is a mapping such as {{key: {name}, level: graph, shape: [3]}}, found {options!r}")
    valid = _OPTIONS[is_input]
    for option in options:
        if option not in valid:
            raise ValueError(
                f"{where} has no option {option!r}. {did_you_mean(option, valid)}Valid options: {', '.join(valid)}"
            )
    base = _base(name, is_input)
    level = options.get("level", None if base is None else base.level)
    if level not in get_args(RowLevel):
        found = "found none" if level is None else f"found {level!r}"
        ready = READY_INPUTS if is_input else READY_LABELS
        raise ValueError(
            f"{where}.level is graph (one value for a frame) or node (one for each atom), {found}. "
            f"{did_you_mean(name, ready)}Ready {_kind(is_input)}s, which need no level: {', '.join(ready)}"
        )
    entry = base or FieldEntry(name, name, level, is_input=is_input)
    entry = replace(entry, level=level, **_checked(options, where))
    if entry.type == "int" and entry.default is not None and entry.default != int(entry.default):
        raise ValueError(f"{where}.default must be an integer, found {entry.default}; or set {where}.type=float")
    _refuse_contradiction(entry)
    return entry


def _base(name: str, is_input: bool) -> FieldEntry | None:
    """The ready entry of a name, or one made of the registered field."""
    ready = (READY_INPUTS if is_input else READY_LABELS).get(name)
    spec = registered_fields().get(name) if ready is None and name in BUILT_IN_FIELDS else None
    if spec is None or spec.level == "edge":
        return ready
    return FieldEntry(name, name, spec.level, spec.shape or (1,), spec.unit, is_input)


def _checked(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options that were given, but for the level, as attributes of an entry."""
    found: dict[str, Any] = {}
    key = options.get("key")
    if key is not None:
        if not _is_name(key):
            raise TypeError(f"{where}.key is the name in the files, a non-empty string, found {key!r}")
        found["key"] = key
    if options.get("shape") is not None:
        shape = options["shape"]
        sizes = [shape] if is_whole_number(shape) else shape
        if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not all(map(is_whole_number, sizes)):
            raise TypeError(f"{where}.shape is a list of whole numbers such as [3], of one row, found {shape!r}")
        if any(size < 1 for size in sizes):
            raise ValueError(f"{where}.shape must have sizes of at least 1, found {list(sizes)}")
        found["shape"] = tuple(sizes)
    if options.get("unit") is not None:
        if not isinstance(options["unit"], str):
            raise TypeError(f"{where}.unit is a string such as e·Å, found {options['unit']!r}")
        found["unit"] = options["unit"]
    if options.get("type") is not None:
        if options["type"] not in get_args(Kind):
            raise ValueError(f"{where}.type is float or int, found {options['type']!r}")
        found["type"] = options["type"]
    if "default" in options:  # null: there is none
        default = options["default"]
        if default is not None and not (is_number(default) and math.isfinite(default)):
            raise TypeError(f"{where}.default is a finite number, or null where every frame has it, found {default!r}")
        found["default"] = default
    return found


def _refuse_contradiction(entry: FieldEntry) -> None:
    """Refuse another level than that of a registered field, and another shape than that of one of the package."""
    known = registered_fields().get(entry.field)
    if known is None:
        return
    if known.level != entry.level:
        raise ValueError(
            f"{entry.setting}: {entry.field} is a field of level {known.level}, found level={entry.level}; give the "
            f"{_kind(entry.is_input)} another name"
        )
    if entry.field in BUILT_IN_FIELDS and known.shape is not None and known.shape != entry.shape:
        raise ValueError(
            f"{entry.setting}: {entry.field} has the shape {list(known.shape)}, found {list(entry.shape)}; give the "
            f"{_kind(entry.is_input)} another name"
        )


def _same_order(found: tuple[int, ...], expected: tuple[int, ...], level: Level) -> bool:
    """True for shapes that differ in sizes of 1, or in rows that are written one number after the other."""
    flat = (expected[0], math.prod(expected[1:])) if level == "node" else (math.prod(expected),)
    return _without_ones(found) in (_without_ones(expected), _without_ones(flat))


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _kind(is_input: bool) -> str:
    return "input" if is_input else "label"
