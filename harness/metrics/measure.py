"""Batch → row: each distinct field is read once, and every component's errors are summed, or their maximum taken.

The row is ``sums [S] | counts [S] | numbers of adapters | frames by group`` and ``maxima | maxima of adapters``, in the
order of the components, as :mod:`harness.metrics.layout` has arranged them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from harness.fields import ATOM_TYPES, Batch, FieldModifier, Level, as_modifier, get_field, labels_of
from harness.metrics.adapters import (
    MergedAdapter,
    detached,
    labelled_rows,
    takes_weights,
    weighted_rows,
    whole_batches,
)
from harness.metrics.coefficients import Coefficients
from harness.metrics.components import MetricEntry, Weights
from harness.metrics.errors import ErrorMetric, check_same_shape
from harness.metrics.frames import FRAME_FIELDS, WEIGHT_FIELDS, FrameIndices, FramesOfBatch, check_frames, weights_in
from harness.metrics.row import Elements, Row
from harness.metrics.splits import DataNames, Split

__all__ = ["AdapterInputs", "BatchReader", "Reading", "modifier_key"]

AdapterInputs = dict[int, list[Any]]
"""Inputs of each component that is not in the row, by position and slot; None for a slot without data."""


@dataclass
class Reading:
    """One distinct way to read a field, for the components that share it, taken once a step.

    Attributes:
        modifier: reads prediction and target.
        ignore_nan: elements whose target is NaN are left out.
        per_type: elements are grouped by atom type.
        weights: where the weights of frames count.
        sets: indices of the data sets whose frames count; None for all frames.
        mean_over: elements are grouped by these parts.
        splits: parts that are summed up beside the whole.
        level: of the rows.
        labels: fields of the target, as far as the modifier says them.
        positions: positions of the components that use it.
        is_counted: errors of it are summed, so that their number is needed.
    """

    modifier: FieldModifier
    ignore_nan: bool
    per_type: bool
    weights: Weights = "everywhere"
    sets: tuple[int, ...] | None = None
    mean_over: Split | None = None
    splits: tuple[Split, ...] = ()
    level: Level = "graph"
    labels: tuple[str, ...] = ()
    positions: list[int] = field(default_factory=list)
    is_counted: bool = False

    @classmethod
    def of(cls, entry: MetricEntry) -> Reading:
        """Reading of a component with a field."""
        modifier, level = as_modifier(entry.field)
        return cls(
            modifier,
            entry.ignore_nan,
            entry.per_type,
            entry.weights,
            entry.sets,
            entry.mean_over,
            entry.splits,
            level,
            labels_of(modifier),
        )

    @property
    def key(self) -> object:
        """Key that is the same for components that share it."""
        what = self.ignore_nan, self.per_type, self.weights, self.sets, self.mean_over, self.splits
        return modifier_key(self.modifier), *what


class BatchReader:
    """Measures batches of predictions and targets.

    Atom types, weights and indices of frames are checked in the first step with data only, since the check makes the
    host wait.

    Args:
        components: entries in the row's order: sums, maxima, then metrics of torchmetrics.
        merged: adapters of those that are in the row, by position; the others are gathered.
        names: names that indices in batches stand for.
        num_counted_groups: number of groups whose frames are counted, at the end of the row's additive part.
    """

    def __init__(
        self,
        components: Sequence[MetricEntry],
        merged: Mapping[int, MergedAdapter],
        names: DataNames,
        num_counted_groups: int = 0,
    ) -> None:
        self._components = components
        self._merged = merged
        self._names = names
        self._type_names = names.types
        self._indices = FrameIndices()
        self._num_counted_groups = num_counted_groups
        kinds = [entry.metric.kind for entry in components if isinstance(entry.metric, ErrorMetric)]
        self._num_sums, self._num_maxima = kinds.count("sum"), kinds.count("maximum")
        self._readings = self._find_readings()
        self._whole_batches = [position for position, entry in enumerate(components) if entry.field is None]
        self._gathered = [position for position in range(len(kinds), len(components)) if position not in merged]
        self._keys = [modifier_key(reading.modifier) for reading in self._readings]
        self._reads_types = any(reading.per_type for reading in self._readings)
        self._checked_types = self._checked_frames = False
        used: set[str] = {split.by for reading in self._readings for split in reading.splits}
        used |= {"set" for reading in self._readings if reading.sets is not None}
        numbers = {"set": len(names.sets), "group": len(names.groups)}
        self._told_apart = {by: number for by, number in numbers.items() if by in used}

    def _find_readings(self) -> list[Reading]:
        readings: dict[object, Reading] = {}
        for position, entry in enumerate(self._components):
            if entry.field is None:
                continue
            reading = Reading.of(entry)
            reading = readings.setdefault(reading.key, reading)
            reading.positions.append(position)
            reading.is_counted |= position < self._num_sums
        return list(readings.values())

    def measure(self, preds: Batch, target: Batch, coefficients: Coefficients) -> tuple[Row, AdapterInputs]:
        """Local row of a batch, and the inputs of the components that are not in it.

        The row is differentiable where the coefficients of the components are above 0, or all are None.
        """
        device = _device_of(preds)
        sums: list[list[Tensor]] = [[] for _ in range(self._num_sums)]  # of each component: the whole, and its parts
        counts: list[list[Tensor]] = [[] for _ in range(self._num_sums)]
        maxima: list[list[Tensor]] = [[] for _ in range(self._num_maxima)]
        inputs: AdapterInputs = {}
        pairs: dict[object, tuple[Tensor, Tensor]] = {}
        types = self._read_types(preds, target) if self._reads_types else None
        frames = self._read_frames(preds, target)
        reached: set[object] = set()  # readings that gradients flow to
        for key, reading in zip(self._keys, self._readings, strict=True):
            pair = self._read(reading, key, preds, target, pairs)
            elements, counted = self._elements(reading, *pair, types, frames)
            watched = self._with_weightless(reading, *pair, types, frames) if reading.splits else None
            parts = self._parts(reading, elements.detach(), frames, watched) if reading.splits else []
            cut = elements if all(map(coefficients.is_trained, reading.positions)) else elements.detach()
            count: list[Tensor] = []
            if reading.is_counted:
                of_parts = parts if counted is elements else self._parts(reading, counted, frames, watched)
                count = [each.counts() for each in (counted, *of_parts)]
            for position in reading.positions:
                seen = elements if coefficients.is_trained(position) else cut
                if seen is elements:
                    reached.add(key)
                if position < self._num_sums + self._num_maxima:
                    errors = self._errors(position, seen)
                    found = [seen.sums(errors) if position < self._num_sums else seen.maxima(errors)]
                    if parts:
                        of_all = errors.detach() if watched is None else self._errors(position, watched)
                        found += [
                            part.sums(of_all) if position < self._num_sums else part.maxima(of_all) for part in parts
                        ]
                    if position < self._num_sums:
                        sums[position], counts[position] = found, count
                    else:
                        maxima[position - self._num_sums] = found
                else:
                    rows_of = weighted_rows if takes_weights(self._components[position].metric) else labelled_rows
                    inputs[position] = [
                        rows_of(each, group)
                        for each in (seen, *parts)
                        for group in (range(each.num_groups) if each.types is not None else (None,))
                    ]
        for position in self._whole_batches:
            seen_whole = preds if coefficients.is_trained(position) else detached(preds)
            seen_target = target
            if self._components[position].weights == "nowhere":
                seen_target = {name: value for name, value in target.items() if name not in WEIGHT_FIELDS}
            inputs[position] = [whole_batches(seen_whole, seen_target)]
        pieces = [adapter.measure(group, device) for at, adapter in self._merged.items() for group in inputs[at]]
        number = self._num_counted_groups
        numbers_of_frames = [frames.numbers_of_groups(number, device)] if number else []
        row = Row.of(
            [*_flat(sums), *_flat(counts), *(additive for additive, _ in pieces), *numbers_of_frames],
            [*_flat(maxima), *(piece for _, piece in pieces)],
            device,
        )
        if torch.is_grad_enabled():
            # Predictions that no gradient flows to, because their terms are outside of the sum or this rank has no data
            # for them, are connected to the row all the same: the rank takes part in the merge as in a training step.
            connects = row.requires_grad
            cut_off = [pair[0] for key, pair in pairs.items() if key not in reached or not connects]
            if self._whole_batches:
                cut_off += [value for value in preds.values() if isinstance(value, Tensor)]
            row = _connected(row, cut_off)
        return row, {position: inputs[position] for position in self._gathered}

    def count(self, target: Batch, coefficients: Coefficients) -> Tensor:
        """Number of elements of each component of the weighted sum, by slot: float64 ``[num_slots]``.

        It is that of :meth:`measure`, without predictions. Slots of components outside of the weighted sum are 0.
        """
        counts: dict[int, list[Tensor]] = {}
        types: Tensor | None = None
        frames = self._read_frames(target, target)
        for reading in self._readings:
            weighted = [at for at in reading.positions if at < self._num_sums and coefficients.coeffs[at]]
            if not weighted:
                continue
            if reading.per_type and types is None:
                types = self._read_types(target, target)
            reference = cast(Any, reading.modifier).target_of(target)
            counted = self._elements(reading, None, reference, types, frames)[1]
            watched = self._with_weightless(reading, None, reference, types, frames)
            parts = self._parts(reading, counted, frames, watched)
            numbers = [each.counts() for each in (counted, *parts)]
            for position in weighted:
                counts[position] = numbers
        device = next(iter(counts.values()))[0].device if counts else _device_of(target)
        pieces = []
        for position, entry in enumerate(self._components[: self._num_sums]):
            num_slots = entry.num_slots(self._type_names) * entry.num_parts
            pieces += counts.get(position) or [torch.zeros(num_slots, dtype=torch.float64, device=device)]
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
        self, reading: Reading, key: object, preds: Batch, target: Batch, pairs: dict[object, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Prediction and target of a reading; ``pairs`` keeps those that have been read, by the modifier's key."""
        if key not in pairs:
            try:
                read = reading.modifier(preds, target)
            except KeyError as error:
                raise KeyError(f"{error.args[0] if error.args else error}{self._advice(reading)}") from None
            prediction, reference = pairs[key] = _check_pair(read, reading.modifier)
            if prediction.shape != reference.shape:  # a message is not made in every step
                check_same_shape(prediction, reference, f"Field {str(reading.modifier)!r}")
            if not prediction.dim():
                raise ValueError(
                    f"Field {str(reading.modifier)!r} is a scalar; expected one row per graph, node or edge."
                )
        return pairs[key]

    def counted_rows(self, entry: MetricEntry, target: Batch, reference: Tensor) -> Tensor | None:
        """Mask of the rows of a component's field whose frames count by set and weight; None if all do.

        Args:
            entry: the component, with a field.
            target: of a batch.
            reference: labels of the field, ``[rows, ...]``.
        """
        reading, frames = Reading.of(entry), FramesOfBatch(target, target, self._indices)
        rows = self._rows_of_sets(reading, reference, frames, entry.name)
        weights = None if reading.weights == "nowhere" else frames.weights(reading.labels, reading.level, reference)
        if weights is None:
            return rows
        return weights > 0 if rows is None else rows & (weights > 0)

    def _elements(
        self,
        reading: Reading,
        prediction: Tensor | None,
        reference: Tensor,
        types: Tensor | None,
        frames: FramesOfBatch,
    ) -> tuple[Elements, Elements]:
        """Elements of a pair, or of a target alone, and those that are counted, where weights count in sums alone."""
        options = self._grouping(reading, reference, types, frames)
        options["ignore_nan"] = reading.ignore_nan
        if reading.sets is not None:
            options["rows"] = self._rows_of_sets(reading, reference, frames, self._name(reading))
        weights = None if reading.weights == "nowhere" else frames.weights(reading.labels, reading.level, reference)
        if prediction is None:
            elements = Elements.of_target(reference, weights=weights, **options)
        else:
            elements = Elements.read(prediction, reference, weights=weights, **options)
        if weights is None or reading.weights == "everywhere":
            return elements, elements
        return elements, Elements.of_target(reference, **options)

    def _rows_of_sets(
        self, reading: Reading, reference: Tensor, frames: FramesOfBatch, component: str
    ) -> Tensor | None:
        """Mask of the rows whose frames are of the sets that count; None if all do."""
        if reading.sets is None:
            return None
        return frames.are_of(reading.sets, len(self._names.sets), reading.level, reference, component)

    def _with_weightless(
        self,
        reading: Reading,
        prediction: Tensor | None,
        reference: Tensor,
        types: Tensor | None,
        frames: FramesOfBatch,
    ) -> Elements | None:
        """The elements of a pair and, once each, those of frames of weight 0; None if the split does not count them."""
        if not any(split.counts_weightless for split in reading.splits):
            return None
        weights = frames.weights(reading.labels, reading.level, reference)
        if weights is None:
            return None
        options = self._grouping(reading, reference, types, frames)
        options["ignore_nan"] = reading.ignore_nan or weights == 0  # labels of these frames may be missing
        options["rows"] = self._rows_of_sets(reading, reference, frames, self._name(reading))
        options["weights"] = torch.where(weights == 0, 1.0, weights)
        if prediction is None:
            return Elements.of_target(reference, **options)
        return Elements.read(prediction.detach(), reference, **options)

    def _parts(
        self, reading: Reading, elements: Elements, frames: FramesOfBatch, watched: Elements | None = None
    ) -> list[Elements]:
        """The same elements grouped by the parts of each split, and within them as before.

        Args:
            reading: of the elements.
            elements: in groups, or in one.
            frames: of the batch.
            watched: the elements with those of frames of weight 0, for splits that count these.
        """
        regrouped, number = [], elements.num_groups
        for split in reading.splits:
            parts = frames.parts(split, reading.level, elements.target, self._name(reading))
            of_split = elements
            if split.counts_weightless and watched is not None:
                weights = cast(Tensor, frames.weights(reading.labels, reading.level, elements.target))
                # those in none of the parts stay so
                parts = (parts + (weights == 0) * len(split.names)).clamp(max=split.num_parts)
                of_split = watched
            groups = parts if elements.types is None else parts * number + elements.types
            regrouped.append(replace(of_split, types=groups, num_groups=split.num_parts * number, num_rest=number))
        return regrouped

    def _name(self, reading: Reading) -> str:
        return self._components[reading.positions[0]].name

    def _advice(self, reading: Reading) -> str:
        """Names of the components that read a field, and what helps if it is not there."""
        names = [self._components[position].name for position in reading.positions]
        what = f"component {names[0]!r} reads" if len(names) == 1 else f"components {', '.join(map(repr, names))} read"
        return (
            f" The {what} it: leave that out of loss and metrics, such as with loss=energy_force metrics=energy_force, "
            f"or choose a model and data that have it."
        )

    def _grouping(
        self, reading: Reading, reference: Tensor, types: Tensor | None, frames: FramesOfBatch
    ) -> dict[str, Any]:
        """Arguments of :class:`Elements` for groups by atom type or set; none for a single one."""
        if reading.mean_over is not None:
            number = len(reading.mean_over.names)
            parts = frames.parts(reading.mean_over, reading.level, reference, self._name(reading))
            # rows of other sets do not count, but have to be in some group
            return {"types": parts.clamp(max=number - 1), "num_groups": number}
        if not reading.per_type:
            return {}
        row_types = cast(Tensor, types)
        if row_types.shape != reference.shape[:1]:
            raise ValueError(
                f"Field {str(reading.modifier)!r} has shape {list(reference.shape)}, but {ATOM_TYPES!r} has shape "
                f"{list(row_types.shape)}; expected one type for each row."
            )
        return {"types": row_types, "num_groups": len(self._type_names)}

    def _read_frames(self, preds: Batch, target: Batch) -> FramesOfBatch:
        if not self._checked_frames and not torch.compiler.is_compiling():
            named = [name for name in FRAME_FIELDS if name in target]
            self._checked_frames = any(bool(target[name].numel()) for name in named)
            if self._checked_frames:
                check_frames(target, self._told_apart)
                self._tell_of_weights(target)
        return FramesOfBatch(preds, target, self._indices)

    def _tell_of_weights(self, target: Batch) -> None:
        """Warn of metrics that know no weights where frames have some."""
        for entry in self._components[self._num_sums + self._num_maxima :]:
            if entry.field is None or entry.weights == "nowhere" or takes_weights(entry.metric):
                continue
            if weights_in(target, labels_of(entry.field)):
                warnings.warn(
                    f"Component {entry.name!r}: {type(entry.metric).__name__} knows no weights of frames: those of "
                    f"weight 0 are left out, and all others count once. Use an error metric of this package, such as "
                    f"MeanAbsoluteError, for values by weight; `weights: false` counts every frame once.",
                    stacklevel=2,
                )

    def _read_types(self, preds: Batch, target: Batch) -> Tensor:
        types = target[ATOM_TYPES] if ATOM_TYPES in target else get_field(preds, ATOM_TYPES, "target")
        types = types if types.dim() == 1 else types.reshape(-1)
        if not self._checked_types and not torch.compiler.is_compiling():
            self._checked_types = self._check_types(types)
        return types if types.dtype == torch.int64 else types.to(torch.int64)

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


def _flat(pieces: Iterable[Iterable[Tensor]]) -> Iterator[Tensor]:
    return (piece for of_component in pieces for piece in of_component)


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
    if not (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and isinstance(pair[0], Tensor)
        and isinstance(pair[1], Tensor)
    ):
        raise TypeError(
            f"Field {str(modifier)!r}: a modifier returns two tensors, prediction and target; found {pair!r}."
        )
    if torch.bool in (pair[0].dtype, pair[1].dtype):
        raise TypeError(f"Field {str(modifier)!r} is boolean; errors are of numbers.")
    return pair[0], pair[1]


def _device_of(preds: Batch) -> torch.device:
    for value in preds.values():
        if isinstance(value, Tensor):
            return value.device
    raise ValueError(f"The predictions hold no tensor. Found the keys: {', '.join(map(str, preds)) or 'none'}.")
