"""Batch → row: each distinct field is read once, and every component's errors are summed, or their maximum taken.

The row is ``sums [S] | counts [S] | numbers of adapters`` and ``maxima | maxima of adapters``, in the order of the
components, as :mod:`harness.metrics.layout` has arranged them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from harness.fields import ATOM_TYPES, Batch, FieldModifier, get_field
from harness.metrics.adapters import MergedAdapter, detached, labelled_rows, whole_batches
from harness.metrics.coefficients import Coefficients
from harness.metrics.components import MetricEntry
from harness.metrics.errors import ErrorMetric, check_same_shape
from harness.metrics.row import Elements, Row

__all__ = ["AdapterInputs", "BatchReader", "Reading", "modifier_key"]

AdapterInputs = dict[int, list[Any]]
"""Inputs of each component that is not in the row, by position and group; None for a group without data."""
_UNSET = torch.empty(0)


@dataclass
class Reading:
    """One distinct (field, ignore_nan, per_type), read once a step.

    Attributes:
        modifier: reads prediction and target.
        ignore_nan: elements whose target is NaN are left out.
        per_type: elements are grouped by atom type.
        positions: positions of the components that use it.
        is_counted: errors of it are summed, so that their number is needed.
    """

    modifier: FieldModifier
    ignore_nan: bool
    per_type: bool
    positions: list[int] = field(default_factory=list)
    is_counted: bool = False


class BatchReader:
    """Measures batches of predictions and targets.

    Atom types are checked in the first step with data only, since the check makes the host wait.

    Args:
        components: entries in the row's order: sums, maxima, then metrics of torchmetrics.
        merged: adapters of those that are in the row, by position; the others are gathered.
        type_names: names of the atom types.
    """

    def __init__(
        self, components: Sequence[MetricEntry], merged: Mapping[int, MergedAdapter], type_names: Sequence[str]
    ) -> None:
        self._components = components
        self._merged = merged
        self._type_names = tuple(type_names)
        kinds = [entry.metric.kind for entry in components if isinstance(entry.metric, ErrorMetric)]
        self._num_sums, self._num_maxima = kinds.count("sum"), kinds.count("maximum")
        self._readings = self._find_readings()
        self._whole_batches = [position for position, entry in enumerate(components) if entry.field is None]
        self._gathered = [position for position in range(len(kinds), len(components)) if position not in merged]
        self._checked_types = False

    def _find_readings(self) -> list[Reading]:
        readings: dict[object, Reading] = {}
        for position, entry in enumerate(self._components):
            if entry.field is None:
                continue
            key = modifier_key(entry.field), entry.ignore_nan, entry.per_type
            reading = readings.setdefault(key, Reading(entry.field, entry.ignore_nan, entry.per_type))
            reading.positions.append(position)
            reading.is_counted |= position < self._num_sums
        return list(readings.values())

    def measure(self, preds: Batch, target: Batch, coefficients: Coefficients) -> tuple[Row, AdapterInputs]:
        """Local row of a batch, and the inputs of the components that are not in it.

        The row is differentiable where the coefficients of the components are above 0, or all are None.
        """
        device = _device_of(preds)
        sums: list[Tensor] = [_UNSET] * self._num_sums
        counts: list[Tensor] = [_UNSET] * self._num_sums
        maxima: list[Tensor] = [_UNSET] * self._num_maxima
        inputs: AdapterInputs = {}
        pairs: dict[object, tuple[Tensor, Tensor]] = {}
        types = self._read_types(preds, target) if any(reading.per_type for reading in self._readings) else None
        reached: set[object] = set()  # readings that gradients flow to
        for reading in self._readings:
            elements = self._read(reading, preds, target, types, pairs)
            cut = elements if all(map(coefficients.is_trained, reading.positions)) else elements.detach()
            count = elements.counts() if reading.is_counted else _UNSET
            for position in reading.positions:
                seen = elements if coefficients.is_trained(position) else cut
                if seen is elements:
                    reached.add(modifier_key(reading.modifier))
                if position < self._num_sums:
                    sums[position], counts[position] = seen.sums(self._errors(position, seen)), count
                elif position < self._num_sums + self._num_maxima:
                    maxima[position - self._num_sums] = seen.maxima(self._errors(position, seen))
                else:
                    groups = range(elements.num_groups) if reading.per_type else (None,)
                    inputs[position] = [labelled_rows(seen, group) for group in groups]
        for position in self._whole_batches:
            seen_whole = preds if coefficients.is_trained(position) else detached(preds)
            inputs[position] = [whole_batches(seen_whole, target)]
        pieces = [adapter.measure(group, device) for at, adapter in self._merged.items() for group in inputs[at]]
        row = Row.of(
            [*sums, *counts, *(additive for additive, _ in pieces)],
            [*maxima, *(piece for _, piece in pieces)],
            device,
        )
        if torch.is_grad_enabled():
            # Predictions that no gradient flows to, because their terms are outside of the sum or this rank has no data
            # for them, are connected to the row all the same: the rank takes part in the merge as in a training step.
            cut_off = [pair[0] for key, pair in pairs.items() if key not in reached or not row.requires_grad]
            if self._whole_batches:
                cut_off += [value for value in preds.values() if isinstance(value, Tensor)]
            row = _connected(row, cut_off)
        return row, {position: inputs[position] for position in self._gathered}

    def count(self, target: Batch, coefficients: Coefficients) -> Tensor:
        """Number of elements of each component of the weighted sum, by type if it is per type: float64 ``[num_slots]``.

        It is that of :meth:`measure`, without predictions. Slots of components outside of the weighted sum are 0.
        """
        counts: dict[int, Tensor] = {}
        types: Tensor | None = None
        for reading in self._readings:
            weighted = [at for at in reading.positions if at < self._num_sums and coefficients.coeffs[at]]
            if not weighted:
                continue
            if reading.per_type and types is None:
                types = self._read_types(target, target)
            reference = cast(Any, reading.modifier).target_of(target)
            grouping = self._grouping(reading, reference, types)
            elements = Elements.of_target(reference, ignore_nan=reading.ignore_nan, **grouping)
            counts |= dict.fromkeys(weighted, elements.counts())
        device = next(iter(counts.values())).device if counts else _device_of(target)
        pieces = [
            counts[position]
            if position in counts
            else torch.zeros(entry.num_slots(self._type_names), dtype=torch.float64, device=device)
            for position, entry in enumerate(self._components[: self._num_sums])
        ]
        return Row.of(pieces, [], device).additive

    def _errors(self, position: int, elements: Elements) -> Tensor:
        entry = self._components[position]
        errors = cast(ErrorMetric, entry.metric).measure(elements.prediction, elements.target)
        if errors.shape != elements.target.shape:
            raise ValueError(
                f"Component {entry.name!r}: {type(entry.metric).__name__}.measure returned errors of shape "
                f"{list(errors.shape)} for a target of shape {list(elements.target.shape)}; expected one error for "
                f"each element."
            )
        return errors

    def _read(
        self,
        reading: Reading,
        preds: Batch,
        target: Batch,
        types: Tensor | None,
        pairs: dict[object, tuple[Tensor, Tensor]],
    ) -> Elements:
        key = modifier_key(reading.modifier)
        if key not in pairs:
            try:
                read = reading.modifier(preds, target)
            except KeyError as error:
                raise KeyError(f"{error.args[0] if error.args else error}{self._advice(reading)}") from None
            prediction, reference = pairs[key] = _check_pair(read, reading.modifier)
            check_same_shape(prediction, reference, f"Field {str(reading.modifier)!r}")
            if not prediction.dim():
                raise ValueError(
                    f"Field {str(reading.modifier)!r} is a scalar; expected one row per graph, node or edge."
                )
        return Elements.read(
            *pairs[key], ignore_nan=reading.ignore_nan, **self._grouping(reading, pairs[key][1], types)
        )

    def _advice(self, reading: Reading) -> str:
        """Names of the components that read a field, and what helps if it is not there."""
        names = [self._components[position].name for position in reading.positions]
        what = f"component {names[0]!r} reads" if len(names) == 1 else f"components {', '.join(map(repr, names))} read"
        return (
            f" The {what} it: leave that out of loss and metrics, such as with loss=energy_force metrics=energy_force, "
            f"or choose a model and data that have it."
        )

    def _grouping(self, reading: Reading, reference: Tensor, types: Tensor | None) -> dict[str, Any]:
        """Arguments of :class:`Elements` for groups by atom type; none without ``per_type``."""
        if not reading.per_type:
            return {}
        row_types = cast(Tensor, types)
        if row_types.shape != reference.shape[:1]:
            raise ValueError(
                f"Field {str(reading.modifier)!r} has shape {list(reference.shape)}, but {ATOM_TYPES!r} has shape "
                f"{list(row_types.shape)}; expected one type for each row."
            )
        return {"types": row_types, "num_groups": len(self._type_names)}

    def _read_types(self, preds: Batch, target: Batch) -> Tensor:
        types = (target[ATOM_TYPES] if ATOM_TYPES in target else get_field(preds, ATOM_TYPES, "target")).reshape(-1)
        if not self._checked_types and not torch.compiler.is_compiling():
            self._checked_types = self._check_types(types)
        return types.to(torch.int64)

    def _check_types(self, types: Tensor) -> bool:
        """Refuse atom types that are no indices of ``type_names``; returns False if there is no atom to look at."""
        if types.is_floating_point() or types.is_complex() or types.dtype == torch.bool:
            raise TypeError(f"{ATOM_TYPES!r} has dtype {types.dtype}; expected integers, such as torch.int64.")
        if not types.numel():
            return False
        lowest, highest = torch.stack((types.min(), types.max())).tolist()
        if lowest < 0 or highest >= len(self._type_names):
            raise ValueError(
                f"{ATOM_TYPES!r} has indices from {lowest} to {highest}, but there are {len(self._type_names)} "
                f"type_names {list(self._type_names)}: expected 0 to {len(self._type_names) - 1}. Do data and "
                f"metrics use the same type_names?"
            )
        return True


def modifier_key(modifier: FieldModifier) -> object:
    """Key under which a modifier's result is shared: the modifier itself if it has a hash, else its identity."""
    try:
        hash(modifier)
    except TypeError:
        return id(modifier)
    return modifier


def _connected(row: Row, predictions: Sequence[Tensor]) -> Row:
    """The row plus zeros that depend on predictions, so that these get a gradient of exactly 0 instead of none.

    DDP waits for a gradient of every parameter, also of those that only a component outside of the sum depends on.
    """
    zeros = [each.reshape(-1)[:0].sum(dtype=torch.float64) for each in predictions if each.requires_grad]
    return Row(row.additive + sum(zeros), row.maxima) if zeros else row


def _check_pair(pair: object, modifier: object) -> tuple[Tensor, Tensor]:
    """Result of a modifier, if it is a prediction and a target that can be subtracted."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(each, Tensor) for each in pair)):
        raise TypeError(
            f"Field {str(modifier)!r}: a modifier returns two tensors, prediction and target; found {pair!r}."
        )
    if any(each.dtype == torch.bool for each in pair):
        raise TypeError(f"Field {str(modifier)!r} is boolean; errors are of numbers.")
    return pair[0], pair[1]


def _device_of(preds: Batch) -> torch.device:
    for value in preds.values():
        if isinstance(value, Tensor):
            return value.device
    raise ValueError(f"The predictions hold no tensor. Found the keys: {', '.join(map(str, preds)) or 'none'}.")
