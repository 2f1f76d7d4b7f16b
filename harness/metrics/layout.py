"""Where the numbers of each component stand in a row, and how a row becomes values.

The order is fixed when a manager is built: components whose errors are summed, grouped by the function that makes their
value, then maxima, then other people's metrics that merge, then those that do not (and have no place in the row). A
component has one *slot*, or one for each atom type. With S slots of sums the row is
``sums [S] | counts [S] | numbers of others`` and ``maxima | maxima of others``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.fields import FieldModifier
from harness.metrics.adapters import DeferredMetric, ForeignMetric, why_not_mergeable
from harness.metrics.components import MetricEntry
from harness.metrics.errors import ErrorMetric, Value
from harness.metrics.row import Row
from harness.metrics.values import Evaluated
from harness.support.device import to_device

__all__ = ["Layout", "Reading", "modifier_key"]


@dataclass
class Reading:
    """One distinct (field, ignore_nan, per_type), read once a step, and the components that want it, by position."""

    modifier: FieldModifier
    ignore_nan: bool
    per_type: bool
    positions: list[int] = field(default_factory=list)
    counted: bool = False
    """Whether errors of it are summed, so that their number is needed."""


@dataclass(frozen=True)
class _Span:
    """Consecutive slots whose values come from one function."""

    value: Value
    start: int
    stop: int


@dataclass(frozen=True)
class _Constants:
    """What evaluation needs on a device."""

    slot_component: Tensor
    one: Tensor
    zero: Tensor
    nan: Tensor


class Layout:
    """Order of components in a row, and the evaluation of rows.

    Args:
        entries: components in the user's order.
        type_names: names of the atom types.

    Attributes:
        components: entries in the row's order; positions below count in it.
        num_sums: number of components whose errors are summed: the first ones.
        num_maxima: number of components that are maxima: the next ones.
        foreign: other people's metrics that merge, by position.
        deferred: other people's metrics that do not, by position, one for each group.
        readings: what is read from a batch, once each.
        whole_batches: positions of components that get the two whole dictionaries.
        names: names of reported values.
        order: their positions as users see them.
        description: what the numbers mean; rows are only merged between equal descriptions.
    """

    def __init__(self, entries: Sequence[MetricEntry], type_names: Sequence[str]) -> None:
        self._type_names = tuple(type_names)
        own = [(entry, entry.metric) for entry in entries if isinstance(entry.metric, ErrorMetric)]
        functions = list(dict.fromkeys(metric.value for _, metric in own if metric.kind == "sum"))
        sums = [[entry for entry, m in own if m.kind == "sum" and m.value is function] for function in functions]
        maxima = [entry for entry, metric in own if metric.kind == "maximum"]
        reasons = {
            entry.name: why_not_mergeable(entry.metric, getattr(entry.field, "shape", None))
            for entry in entries
            if not isinstance(entry.metric, ErrorMetric)
        }
        foreign = [entry for entry in entries if entry.name in reasons and reasons[entry.name] is None]
        deferred = [entry for entry in entries if reasons.get(entry.name)]
        self.num_sums, self.num_maxima = sum(map(len, sums)), len(maxima)
        self.components = [*(entry for members in sums for entry in members), *maxima, *foreign, *deferred]
        self.description = [entry.describe() for entry in self.components] + list(type_names)

        self._spans: list[_Span] = []
        self._num_sum_slots = 0
        for function, members in zip(functions, sums, strict=True):
            start, self._num_sum_slots = self._num_sum_slots, self._num_sum_slots + sum(map(self.groups, members))
            self._spans.append(_Span(function, start, self._num_sum_slots))
        self._num_maximum_slots = sum(map(self.groups, maxima))
        self._one_slot_each = not any(entry.per_type for entry in self.components)

        self.foreign: dict[int, ForeignMetric] = {}
        self.deferred: dict[int, list[DeferredMetric]] = {}
        self._num_additive, self._num_extremal = 2 * self._num_sum_slots, self._num_maximum_slots
        for position, entry in enumerate(self.components):
            if entry.name not in reasons:
                continue
            reason = reasons[entry.name]
            if reason is None:
                metric = ForeignMetric(entry.metric, entry.name, getattr(entry.field, "shape", None))
                self.foreign[position] = metric
                self._num_additive += self.groups(entry) * metric.num_additive
                self._num_extremal += self.groups(entry) * metric.num_maxima
            else:
                self.deferred[position] = [
                    DeferredMetric(entry.metric.clone(), entry.name, reason) for _ in range(self.groups(entry))
                ]
        self._num_other_slots = sum(
            self.groups(self.components[position]) for position in (*self.foreign, *self.deferred)
        )
        self.readings = self._find_readings()
        self.whole_batches = [position for position, entry in enumerate(self.components) if entry.field is None]
        self.names, self.order = self._name_values(entries)
        self.counted = self._find_counted()
        self._constants: dict[torch.device, _Constants] = {}
        self.weights_changed()

    def weights_changed(self) -> None:
        """Take up the weights of the atom types that the entries have now."""
        self._weights = [weight for e in self.components for weight in e.per_type_coeffs or [1.0] * self.groups(e)]
        self._all_weigh = all(self._weights)
        self._slot_weights: dict[torch.device, Tensor] = {}

    @property
    def type_weights(self) -> tuple[float, ...]:
        """Weight of every slot in its component's average."""
        return tuple(self._weights)

    def groups(self, entry: MetricEntry) -> int:
        """Number of slots of a component: the number of types, or 1."""
        return len(self._type_names) if entry.per_type else 1

    def neutral(self) -> Row:
        """The row of no data."""
        return Row.neutral(self._num_additive, self._num_extremal)

    def _find_readings(self) -> list[Reading]:
        readings: dict[object, Reading] = {}
        for position, entry in enumerate(self.components):
            if entry.field is None:
                continue
            key = modifier_key(entry.field), entry.ignore_nan, entry.per_type
            reading = readings.setdefault(key, Reading(entry.field, entry.ignore_nan, entry.per_type))
            reading.positions.append(position)
            reading.counted |= position < self.num_sums
        return list(readings.values())

    def _name_values(self, entries: Sequence[MetricEntry]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        names = [entry.name for entry in self.components]
        if not self._one_slot_each:
            for entry in self.components:
                names += entry.type_keys(self._type_names) or [""]  # slots of components without types are not shown
        position = {name: index for index, name in enumerate(names)}
        shown = [key for entry in entries for key in (*entry.type_keys(self._type_names), entry.name)]
        return tuple(names), tuple(position[key] for key in shown)

    def _find_counted(self) -> dict[str, range]:
        """Slots of sums that each value is made of, by its name."""
        counted, start = {}, 0
        for entry in self.components[: self.num_sums]:
            stop = start + self.groups(entry)
            counted[entry.name] = range(start, stop)
            counted |= {key: range(start + i, start + i + 1) for i, key in enumerate(entry.type_keys(self._type_names))}
            start = stop
        return counted

    def counts(self, row: Row) -> Tensor:
        """Number of elements in each slot of sums: float64 ``[num_slots]``, without a graph."""
        # counts are of targets: no gradient, and none to be computed
        return row.additive.detach()[self._num_sum_slots : 2 * self._num_sum_slots]

    def evaluate(
        self, row: Row, deferred: Mapping[int, list[Tensor | None]], counts: Tensor | None = None
    ) -> Evaluated:
        """Every component and per-type value of a row; differentiable.

        Args:
            row: statistics in this layout.
            deferred: values of the components that are not in the row, one for each group; None where unknown.
            counts: those of a whole that the row is a part of, to be used in place of its own. Then only values that
                are linear in their sums mean anything: they add up to the whole's. Metrics of others are left out.
        """
        values: list[Tensor] = []
        has_data: list[Tensor] = []
        if self._num_sum_slots:
            sums = row.additive[: self._num_sum_slots]
            numbers = self.counts(row) if counts is None else counts
            at_least_one = numbers.clamp(min=1.0)
            for span in self._spans:
                whole = len(self._spans) == 1
                slots = (
                    (sums, at_least_one)
                    if whole
                    else (sums[span.start : span.stop], at_least_one[span.start : span.stop])
                )
                values.append(span.value(*slots))
            has_data.append(numbers > 0)
        if self._num_maximum_slots:
            maxima = row.maxima[: self._num_maximum_slots]
            has_data.append(maxima != -math.inf)
            values.append(torch.where(has_data[-1], maxima, 0.0))
        if self.foreign or self.deferred:
            others = self._evaluate_others(row, deferred) if counts is None else [None] * self._num_other_slots
            zero = row.additive.new_zeros(())
            values.append(torch.stack([zero if other is None else other.to(zero.device) for other in others]))
            has_data.append(torch.tensor([other is not None for other in others], device=zero.device))
        return self._average(_join(values), _join(has_data), self.counts(row) if counts is None else counts)

    def _average(self, slots: Tensor, has_data: Tensor, counts: Tensor) -> Evaluated:
        """Components as weighted means of their slots that have data."""
        constants = self._constants_on(slots.device)
        components = reported = slots
        if not self._one_slot_each:
            weights = self._slot_weights_on(slots.device) * has_data
            empty = slots.new_zeros(len(self.components))
            norm = empty.index_add(0, constants.slot_component, weights)
            # 0 times an infinite error, or its slope, is NaN
            terms = slots if self._all_weigh else torch.where(weights > 0, slots, constants.zero)
            components = empty.index_add(0, constants.slot_component, weights * terms)
            components = components / torch.where(norm > 0, norm, constants.one)
            reported, has_data = torch.cat((components, slots)), torch.cat((norm > 0, has_data))
        return Evaluated(components, torch.where(has_data, reported, constants.nan), has_data, counts)

    def _evaluate_others(self, row: Row, deferred: Mapping[int, list[Tensor | None]]) -> list[Tensor | None]:
        """Value of each slot of the metrics that are not ours; None without data."""
        scalars: list[Tensor | None] = []
        additive, maxima = 2 * self._num_sum_slots, self._num_maximum_slots
        for position, foreign in self.foreign.items():
            for _ in range(self.groups(self.components[position])):
                additive_end, maxima_end = additive + foreign.num_additive, maxima + foreign.num_maxima
                pieces = row.additive[additive:additive_end], row.maxima[maxima:maxima_end]
                scalars.append(foreign.value(*pieces, needed=bool(self.components[position].coeff)))
                additive, maxima = additive_end, maxima_end
        for position, metrics in self.deferred.items():
            scalars.extend(deferred.get(position, [None] * len(metrics)))
        return scalars

    def _constants_on(self, device: torch.device) -> _Constants:
        if device not in self._constants:
            component = [index for index, entry in enumerate(self.components) for _ in range(self.groups(entry))]
            with torch.inference_mode(False):  # they outlive this step, and training saves them for backward
                self._constants[device] = _Constants(
                    torch.tensor(component, dtype=torch.int64, device=device),
                    torch.ones((), dtype=torch.float64, device=device),
                    torch.zeros((), dtype=torch.float64, device=device),
                    torch.full((), torch.nan, dtype=torch.float64, device=device),
                )
        return self._constants[device]

    def _slot_weights_on(self, device: torch.device) -> Tensor:
        if device not in self._slot_weights:
            self._slot_weights[device] = to_device(self._weights, device)
        return self._slot_weights[device]


def modifier_key(modifier: FieldModifier) -> object:
    """Key under which a modifier's result is shared: its content where it has one, else itself."""
    try:
        hash(modifier)
    except TypeError:
        return id(modifier)
    return modifier


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
