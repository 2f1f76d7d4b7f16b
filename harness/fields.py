"""Field names with their level and unit, and modifiers that read a (prediction, target) pair from two batches.

A batch is a dictionary of tensors under NequIP's field names. The registry knows on which *level* a field lives
(one value per graph, node or edge) and its unit; :func:`register_field` extends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from harness.support.checks import is_number
from harness.support.configs import unwrapped

__all__ = [
    "ATOM_TYPES",
    "BUILT_IN_FIELDS",
    "NUM_ATOMS",
    "UPCOMING_LABELS",
    "Batch",
    "FieldModifier",
    "FieldSpec",
    "Level",
    "MappedFieldModifier",
    "PerAtomModifier",
    "PlainField",
    "as_modifier",
    "field_spec",
    "get_field",
    "labels_of",
    "predictions_of",
    "register_field",
    "registered_fields",
]

Batch = Mapping[str, Tensor]
Level = Literal["graph", "node", "edge"]

ATOM_TYPES = "atom_types"
NUM_ATOMS = "num_atoms"
UPCOMING_LABELS = "following_micro_batches"
"""Key, in the first of the micro-batches that make up one step, of the labels of the others: a list of batches."""


@dataclass(frozen=True)
class FieldSpec:
    """Level, unit and shape of a field.

    Attributes:
        name: key in batches and predictions.
        level: ``graph``, ``node`` or ``edge``.
        unit: for logs and tables.
        abbreviation: short form for automatic component names.
        shape: of one row, such as ``(3,)`` for forces ``[num_atoms, 3]``; None where it is not known.
        may_be_missing: rows are NaN where a frame has no such label: components leave them out unless they say
            ``ignore_nan: false``.
    """

    name: str
    level: Level
    unit: str = ""
    abbreviation: str = ""
    shape: tuple[int, ...] | None = None
    may_be_missing: bool = False


_REGISTRY: dict[str, FieldSpec] = {
    spec.name: spec
    for spec in (
        FieldSpec("total_energy", "graph", "eV", "E", shape=(1,)),
        FieldSpec("free_energy", "graph", "eV", shape=(1,)),
        FieldSpec("stress", "graph", "eV/Å³", shape=(3, 3)),
        FieldSpec("virial", "graph", "eV", shape=(3, 3)),
        FieldSpec("cell", "graph", "Å", shape=(3, 3)),
        FieldSpec("pbc", "graph", shape=(3,)),
        FieldSpec("num_atoms", "graph", shape=()),
        FieldSpec("dipole", "graph", "e·Å", shape=(3,), may_be_missing=True),
        FieldSpec("polarizability", "graph", "Å³", shape=(3, 3), may_be_missing=True),
        FieldSpec("total_charge", "graph", "e", shape=(1,)),
        FieldSpec("spin_multiplicity", "graph", shape=(1,)),
        FieldSpec("weight", "graph", shape=()),
        FieldSpec("energy_weight", "graph", shape=()),
        FieldSpec("forces_weight", "graph", shape=()),
        FieldSpec("stress_weight", "graph", shape=()),
        FieldSpec("group_index", "graph", shape=()),
        FieldSpec("set_index", "graph", shape=()),
        FieldSpec("frame_index", "graph", shape=()),
        FieldSpec("forces", "node", "eV/Å", "F", shape=(3,)),
        FieldSpec("pos", "node", "Å", shape=(3,)),
        FieldSpec("atomic_energy", "node", "eV", shape=(1,)),
        FieldSpec("charge", "node", "e", shape=(1,)),
        FieldSpec("magmom", "node", "μB", shape=(1,)),
        FieldSpec("charges", "node", "e", shape=(1,), may_be_missing=True),
        FieldSpec("magnetic_moments", "node", "μB", shape=(1,), may_be_missing=True),
        FieldSpec("born_charges", "node", "e", shape=(3, 3), may_be_missing=True),
        FieldSpec("atom_types", "node", shape=()),
        FieldSpec("atomic_numbers", "node", shape=()),
        FieldSpec("edge_vectors", "edge", "Å", shape=(3,)),
        FieldSpec("edge_lengths", "edge", "Å", shape=(1,)),
        FieldSpec("edge_energy", "edge", "eV", shape=(1,)),
        FieldSpec("edge_cell_shift", "edge", shape=(3,)),
    )
}

BUILT_IN_FIELDS = frozenset(_REGISTRY)
"""Names of the fields that are known without a registration."""


def register_field(
    name: str,
    level: Level,
    unit: str = "",
    abbreviation: str = "",
    shape: Sequence[int] | None = None,
    may_be_missing: bool | None = None,
) -> FieldSpec:
    """Register a field for losses and metrics, or add to its entry.

    Args:
        name: key of the field in batches and predictions.
        level: ``graph`` (first dimension ``num_graphs``), ``node`` (``num_atoms``) or ``edge`` (``num_edges``).
        unit: for logs and tables.
        abbreviation: short form for automatic component names, such as ``F`` for forces.
        shape: of one row, such as ``(3,)`` for forces; other people's metrics with several outputs need it.
        may_be_missing: whether components leave out its NaN labels by themselves; None keeps what it was, at first
            False.

    Raises:
        ValueError: the level is unknown, or the name is registered already with another level.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"A field's name is a non-empty string, found {name!r}.")
    if level not in get_args(Level):
        raise ValueError(f"Unknown level {level!r} for field {name!r}. Valid levels: {', '.join(get_args(Level))}.")
    known = _REGISTRY.get(name)
    if known is not None and known.level != level:
        raise ValueError(f"Field {name!r} is registered as a {known.level} field; it cannot become a {level} field.")
    before = known or FieldSpec(name, level)
    spec = FieldSpec(
        name,
        level,
        unit or before.unit,
        abbreviation or before.abbreviation,
        before.shape if shape is None else tuple(shape),
        before.may_be_missing if may_be_missing is None else may_be_missing,
    )
    _REGISTRY[name] = spec
    return spec


def registered_fields() -> dict[str, FieldSpec]:
    """Copy of the registry: every known field by name."""
    return dict(_REGISTRY)


def field_spec(name: str) -> FieldSpec:
    """Level and unit of a field.

    Raises:
        KeyError: the field is not registered; the message lists the valid names.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        raise KeyError(
            f"Unknown field {name!r}. Known fields: {', '.join(sorted(_REGISTRY))}. "
            f"A label of your files: data.labels={{{name}: {{level: ...}}}}; a field of your own: "
            f"harness.register_field({name!r}, level='graph'|'node'|'edge', unit=...)."
        ) from None


@runtime_checkable
class FieldModifier(Protocol):
    """Callable from (predictions, target) to the pair of tensors, of the same shape, that a component compares.

    ``str(modifier)`` names the component automatically and ``level`` (or ``type``, as in NequIP's own modifiers) is the
    level of the result. One that is a frozen dataclass, or otherwise hashable by its content, is read once per step
    however many components use it. Other people's metrics with several outputs need its ``shape`` of one row.

    It says what it reads by ``field``, by ``pred_field`` and ``target_field``, or by ``fields`` if these are several.

    Gradient accumulation needs a further method, ``target_of(target)``: the target side alone, as the call returns it
    second: the number of labels to average over must be known before there are predictions.
    """

    @property
    def level(self) -> str:
        """``graph``, ``node`` or ``edge``."""
        ...

    def __call__(self, preds: Batch, target: Batch) -> tuple[Tensor, Tensor]:
        """Prediction and target, of the same shape."""
        ...


@dataclass(frozen=True)
class PlainField:
    """Reads one field as it is from both batches: the modifier behind a field's name."""

    field: str

    def __post_init__(self) -> None:
        field_spec(self.field)

    @property
    def level(self) -> Level:
        """Level of the field."""
        return field_spec(self.field).level

    @property
    def type(self) -> Level:
        """The level, by NequIP's name."""
        return self.level

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one row."""
        return field_spec(self.field).shape

    def __call__(self, preds: Batch, target: Batch) -> tuple[Tensor, Tensor]:
        """Prediction and target of the field."""
        return get_field(preds, self.field, "predictions"), self.target_of(target)

    def target_of(self, target: Batch) -> Tensor:
        """Target of the field, without a prediction."""
        return get_field(target, self.field, "target")

    def __str__(self) -> str:
        return _short(self.field)


@dataclass(frozen=True)
class PerAtomModifier:
    r"""Divides a graph field by the number of atoms of its graph: :math:`y_g = f \cdot x_g / N_g`.

    The division is made in the field's own precision. Shapes: field ``[num_graphs, ...]``, ``num_atoms``
    ``[num_graphs]``, taken from the target batch (the model need not repeat it).

    Args:
        field: a graph field, such as ``total_energy``.
        factor: optional factor :math:`f`, for example 1000 for meV per atom.

    Raises:
        ValueError: the field is not a graph field, or the factor is not finite.
    """

    field: str
    factor: float | None = None

    def __post_init__(self) -> None:
        level = field_spec(self.field).level
        if level != "graph":
            raise ValueError(f"PerAtomModifier divides graph fields only; {self.field!r} is a {level} field.")
        if self.factor is not None:
            if not is_number(self.factor):
                raise TypeError(f"PerAtomModifier's factor is a number or null, found {self.factor!r}.")
            if not abs(self.factor) < float("inf") or self.factor == 0:
                raise ValueError(f"PerAtomModifier's factor must be finite and not 0, found {self.factor}.")

    @property
    def level(self) -> Level:
        """Always ``graph``."""
        return "graph"

    @property
    def type(self) -> Level:
        """The level, by NequIP's name."""
        return self.level

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one row."""
        return field_spec(self.field).shape

    def __call__(self, preds: Batch, target: Batch) -> tuple[Tensor, Tensor]:
        """Prediction and target per atom."""
        num_atoms = target[NUM_ATOMS] if NUM_ATOMS in target else get_field(preds, NUM_ATOMS, "target or predictions")
        predicted, reference = get_field(preds, self.field, "predictions"), get_field(target, self.field, "target")
        divisor = self._divisor(reference, num_atoms)
        if predicted.shape == reference.shape:
            return self._divided(predicted, divisor), self._divided(reference, divisor)
        return self._divided(predicted, self._divisor(predicted, num_atoms)), self._divided(reference, divisor)

    def target_of(self, target: Batch) -> Tensor:
        """Target per atom, without a prediction."""
        reference = get_field(target, self.field, "target")
        return self._divided(reference, self._divisor(reference, get_field(target, NUM_ATOMS, "target")))

    def _divisor(self, value: Tensor, num_atoms: Tensor) -> Tensor:
        """Number of atoms of each graph in as many dimensions as a value has."""
        if value.shape[:1] != (num_atoms.numel(),):
            raise ValueError(
                f"Field {self.field!r} has shape {list(value.shape)}, but there are {num_atoms.numel()} graphs in "
                f"'num_atoms'. Graph fields have one row per graph: [num_graphs, ...]."
            )
        return num_atoms.reshape(-1, *[1] * (value.dim() - 1))

    def _divided(self, value: Tensor, divisor: Tensor) -> Tensor:
        # A true division by an integer tensor takes the field's precision; the integer's reciprocal() would be float32.
        per_atom = value / divisor
        return per_atom if self.factor is None else per_atom * self.factor

    def __str__(self) -> str:
        return f"per_atom_{_short(self.field)}"


@dataclass(frozen=True)
class MappedFieldModifier:
    """Compares one field of the predictions with another field of the target, on the same level.

    Args:
        pred_field: field read from the predictions.
        target_field: field read from the target.

    Raises:
        ValueError: the two fields live on different levels.
    """

    pred_field: str
    target_field: str

    def __post_init__(self) -> None:
        predicted, reference = field_spec(self.pred_field).level, field_spec(self.target_field).level
        if predicted != reference:
            raise ValueError(
                f"MappedFieldModifier compares fields of one level, found pred_field {self.pred_field!r} ({predicted}) "
                f"and target_field {self.target_field!r} ({reference})."
            )

    @property
    def level(self) -> Level:
        """Level of both fields."""
        return field_spec(self.pred_field).level

    @property
    def type(self) -> Level:
        """The level, by NequIP's name."""
        return self.level

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one row."""
        return field_spec(self.pred_field).shape

    def __call__(self, preds: Batch, target: Batch) -> tuple[Tensor, Tensor]:
        """Prediction of one field and target of the other."""
        return get_field(preds, self.pred_field, "predictions"), self.target_of(target)

    def target_of(self, target: Batch) -> Tensor:
        """Target of the other field, without a prediction."""
        return get_field(target, self.target_field, "target")

    def __str__(self) -> str:
        return f"pred_{_short(self.pred_field)}_label_{_short(self.target_field)}"


def as_modifier(field: object) -> tuple[FieldModifier, Level]:
    """A field's name or modifier as a modifier, with the level it reads.

    Raises:
        KeyError: unknown field name.
        TypeError: neither a name nor a callable with a ``level`` (or NequIP's ``type``).
        ValueError: the modifier's level is none of graph, node, edge.
    """
    field = unwrapped(field)
    modifier = PlainField(field) if isinstance(field, str) else field
    level = getattr(modifier, "level", None) or getattr(modifier, "type", None)
    if not callable(modifier) or isinstance(modifier, type) or level is None:
        raise TypeError(
            f"`field` is a field's name, a modifier or null; found {field!r} of type {type(field).__name__}. A "
            f"modifier is a callable (preds, target) -> (prediction, target) with a `level`: graph, node or edge."
        )
    if level not in get_args(Level):
        raise ValueError(f"{field!r} has the level {level!r}. Valid levels: {', '.join(get_args(Level))}.")
    return modifier, level  # type: ignore[return-value]


def labels_of(modifier: object) -> tuple[str, ...]:
    """Fields of the target that a modifier reads; none where it does not say.

    It does by ``target_field``, ``field``, or a tuple ``fields``.
    """
    return _named_fields(modifier, "target_field")


def predictions_of(modifier: object) -> tuple[str, ...]:
    """Fields of the predictions that a modifier reads; none where it does not say.

    It does by ``pred_field``, ``field``, or a tuple ``fields``.
    """
    return _named_fields(modifier, "pred_field")


def _named_fields(modifier: object, attribute: str) -> tuple[str, ...]:
    name = getattr(modifier, attribute, None) or getattr(modifier, "field", None)
    several = getattr(modifier, "fields", ()) if name is None else (name,)
    return tuple(name for name in several if isinstance(name, str)) if isinstance(several, tuple) else ()


def get_field(batch: Batch, name: str, where: str) -> Tensor:
    """The tensor called ``name`` in a batch.

    Raises:
        KeyError: no such field in the batch.
        TypeError: the entry is not a tensor.
    """
    try:
        value = batch[name]
    except KeyError:
        raise KeyError(
            f"Field {name!r} is missing from the {where}. Found: {', '.join(sorted(map(str, batch))) or 'nothing'}."
        ) from None
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"Field {name!r} of the {where} is a {type(value).__name__}; expected a tensor.")
    return value


def _short(field: str) -> str:
    return field_spec(field).abbreviation or field
