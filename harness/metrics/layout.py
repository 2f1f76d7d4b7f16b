"""Row → values: the place of each component's numbers in a row, and the evaluation of rows.

The order is fixed when a manager is built: components whose errors are summed, grouped by the function that makes their
value, then maxima, then metrics of torchmetrics that merge, then those that are gathered at the end of an epoch (and
have no place in the row). A component has one *slot*, or one for each atom type or set that it is the mean of; if it is
split by set or group, as many for each part follow those of the whole. With S slots of sums the row is
``sums [S] | counts [S] | numbers of adapters | frames by group`` and ``maxima | maxima of adapters``; frames of each
group are counted for tables alone.

Whole and parts are *averages* of their slots. Groups may have a further part each, of their frames of weight 0, whose
value stands in for that of a group without other frames. Values are those of the averages, the components' first, and
of slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.metrics.adapters import GatheredAdapter, MergedAdapter, why_not_mergeable
from harness.metrics.coefficients import Coefficients
from harness.metrics.components import MetricEntry
from harness.metrics.errors import ErrorMetric, Value
from harness.metrics.row import Row
from harness.metrics.splits import DataNames
from harness.metrics.values import Evaluated

__all__ = ["Layout"]

GatheredValues = Mapping[int, Sequence[Tensor | None]]
"""Values of the components that are not in the row, by position, one for each slot; None where unknown."""


@dataclass(frozen=True)
class _Span:
    """Consecutive slots whose values one function makes."""

    value: Value
    start: int
    stop: int


@dataclass(frozen=True)
class _Constants:
    """Constants of an evaluation on one device."""

    slot_average: Tensor
    one: Tensor
    zero: Tensor
    nan: Tensor
    true: Tensor
    false: Tensor
    instead: Tensor | None


class Layout:
    """Order of components in a row, and the evaluation of rows.

    Args:
        entries: components in the user's order.
        names: names that indices in batches stand for.
        counts_frames: the row ends with the number of frames of each group.

    Attributes:
        components: entries in the row's order; positions below count in it.
        num_sums: number of components whose errors are summed: the first ones.
        merged: adapters of torchmetrics that are in the row, by position.
        gathered: adapters of torchmetrics that are not, by position, one for each slot.
        names: names of reported values.
        order: their positions as users see them.
        counted: slots of sums that each value is made of, by its name.
        by_group: position of the value of each group, by component; for those split by group.
        num_counted_groups: number of groups whose frames are counted.
        description: components and types in order; only rows of equal descriptions are merged.
    """

    def __init__(self, entries: Sequence[MetricEntry], names: DataNames, counts_frames: bool = False) -> None:
        self._type_names = names.types
        own = [(entry, entry.metric) for entry in entries if isinstance(entry.metric, ErrorMetric)]
        functions = list(dict.fromkeys(metric.value for _, metric in own if metric.kind == "sum"))
        sums = [[entry for entry, m in own if m.kind == "sum" and m.value is function] for function in functions]
        maxima = [entry for entry, metric in own if metric.kind == "maximum"]
        reasons = {
            entry.name: why_not_mergeable(entry.metric, getattr(entry.field, "shape", None))
            for entry in entries
            if not isinstance(entry.metric, ErrorMetric)
        }
        merged = [entry for entry in entries if entry.name in reasons and reasons[entry.name] is None]
        gathered = [entry for entry in entries if reasons.get(entry.name)]
        self.num_sums = sum(map(len, sums))
        self.components = [*(entry for members in sums for entry in members), *maxima, *merged, *gathered]
        self.description = [entry.describe() for entry in self.components] + list(names.types)
        self.num_counted_groups = len(names.groups) if counts_frames else 0
        if counts_frames:
            self.description.append(f"frames by group {list(names.groups)}")

        self._spans: list[_Span] = []
        self._num_sum_slots = 0
        for function, members in zip(functions, sums, strict=True):
            start, self._num_sum_slots = self._num_sum_slots, self._num_sum_slots + sum(map(self.num_slots, members))
            self._spans.append(_Span(function, start, self._num_sum_slots))
        self._num_maximum_slots = sum(map(self.num_slots, maxima))
        self._num_averages = sum(entry.num_parts for entry in self.components)
        self._one_slot_each = all(
            not entry.per_type and entry.mean_over is None and entry.num_parts == 1 for entry in self.components
        )

        self.merged: dict[int, MergedAdapter] = {}
        self.gathered: dict[int, list[GatheredAdapter]] = {}
        self._num_additive, self._num_extremal = 2 * self._num_sum_slots, self._num_maximum_slots
        for position, entry in enumerate(self.components):
            if entry.name not in reasons:
                continue
            reason = reasons[entry.name]
            if reason is None:
                adapter = MergedAdapter(entry.metric, entry.name, getattr(entry.field, "shape", None))
                self.merged[position] = adapter
                self._num_additive += self.num_slots(entry) * adapter.num_additive
                self._num_extremal += self.num_slots(entry) * adapter.num_maxima
            else:
                self.gathered[position] = [
                    GatheredAdapter(entry.metric.clone(), entry.name, reason) for _ in range(self.num_slots(entry))
                ]
        self._num_additive += self.num_counted_groups
        self._num_adapter_slots = sum(
            self.num_slots(self.components[position]) for position in (*self.merged, *self.gathered)
        )
        self.names, self.order = self._name_values(entries)
        self.counted = self._find_counted()
        self.by_group = self._find_groups()
        self._constants: dict[torch.device, _Constants] = {}

    def num_slots(self, entry: MetricEntry) -> int:
        """Number of slots of a component, the parts that it is split into included."""
        return entry.num_slots(self._type_names) * entry.num_parts

    def neutral(self) -> Row:
        """The row of no data."""
        return Row.neutral(self._num_additive, self._num_extremal)

    def _name_values(self, entries: Sequence[MetricEntry]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Names of the values, empty for those that are not reported, and the order in which users see them."""
        names = [entry.name for entry in self.components]
        for entry in self.components:
            for split in entry.splits:
                names += split.value_names(entry.name)
        if not self._one_slot_each:
            for entry in self.components:
                own = entry.slot_keys(self._type_names)
                names += own + [""] * (self.num_slots(entry) - len(own))
        position = {name: index for index, name in enumerate(names)}
        shown = [key for entry in entries for key in (*entry.value_keys(self._type_names), entry.name)]
        return tuple(names), tuple(position[key] for key in shown)

    def _find_counted(self) -> dict[str, range]:
        """Slots of sums that each value is made of, by its name."""
        counted, start = {}, 0
        for entry in self.components[: self.num_sums]:
            number = entry.num_slots(self._type_names)
            counted[entry.name] = range(start, start + number)
            counted |= {key: range(start + i, start + i + 1) for i, key in enumerate(entry.slot_keys(self._type_names))}
            for split in entry.splits:
                for key in split.value_names(entry.name):
                    start += number
                    counted[key] = range(start, start + number)
            start += number
        counted.pop("", None)
        return counted

    def _find_groups(self) -> dict[str, range]:
        """Position of the value of each group, by component."""
        found, position = {}, len(self.components)
        for entry in self.components:
            for split in entry.splits:
                start, position = position, position + split.num_parts
                if split.by == "group":
                    found[entry.name] = range(start, start + len(split.names))
        return found

    def _find_instead(self) -> list[int] | None:
        """Position of the value that stands in for each value without data, which may be itself; None if all are."""
        found = list(range(len(self.names)))
        position = len(self.components)
        for split in (split for entry in self.components for split in entry.splits):
            number = len(split.names)
            if split.counts_weightless:
                found[position : position + number] = range(position + number, position + 2 * number)
            position += split.num_parts
        return None if found == list(range(len(self.names))) else found

    def frames_by_group(self, row: Row) -> Tensor | None:
        """Number of frames of each group: float64 ``[num_groups]``; None where they are not counted."""
        number = self.num_counted_groups
        return row.additive.detach()[self._num_additive - number :] if number else None

    def counts(self, row: Row) -> Tensor:
        """Number of elements in each slot of sums: float64 ``[num_slots]``, without a graph."""
        # counts are of targets: no gradient, and none to be computed
        return row.additive.detach()[self._num_sum_slots : 2 * self._num_sum_slots]

    def evaluate(
        self,
        row: Row,
        coefficients: Coefficients,
        gathered: GatheredValues | None = None,
        counts: Tensor | None = None,
    ) -> Evaluated:
        """Every component and per-type value of a row; differentiable.

        Args:
            row: statistics in this layout.
            coefficients: weights of the slots in the averages of their components.
            gathered: values of the components that are not in the row.
            counts: those of a whole that the row is a part of, to be used in place of its own. Then only values that
                are linear in their sums mean anything: they add up to the whole's. Those of adapters are left out.
        """
        values: list[Tensor] = []
        has_data: list[Tensor] = []
        if self._num_sum_slots:
            sums = row.additive[: self._num_sum_slots]
            numbers = self.counts(row) if counts is None else counts
            has_data.append(numbers > 0)
            # a sum of weights may be below 1
            divisors = torch.where(has_data[-1], numbers, self._constants_on(numbers.device).one)
            for span in self._spans:
                whole = len(self._spans) == 1
                slots = (sums, divisors) if whole else (sums[span.start : span.stop], divisors[span.start : span.stop])
                values.append(span.value(*slots))
        if self._num_maximum_slots:
            maxima = row.maxima[: self._num_maximum_slots]
            has_data.append(maxima != -math.inf)
            values.append(torch.where(has_data[-1], maxima, 0.0))
        if self.merged or self.gathered:
            constants = self._constants_on(row.additive.device)
            scalars = (
                self._evaluate_adapters(row, coefficients, gathered or {})
                if counts is None
                else [None] * self._num_adapter_slots
            )
            pairs = [(constants.zero, constants.false) if scalar is None else scalar for scalar in scalars]
            values.append(torch.stack([value for value, _ in pairs]))
            has_data.append(torch.stack([is_there for _, is_there in pairs]))
        return self._average(
            _join(values), _join(has_data), self.counts(row) if counts is None else counts, coefficients
        )

    def _average(self, slots: Tensor, has_data: Tensor, counts: Tensor, coefficients: Coefficients) -> Evaluated:
        """Components, and their parts, as weighted means of their slots that have data."""
        constants = self._constants_on(slots.device)
        number, nan, instead = len(self.components), constants.nan, constants.instead
        if self._one_slot_each:
            return Evaluated(slots, None, has_data, None, number, counts, nan, instead)
        weights = coefficients.on(slots.device).slot_weights * has_data
        empty = slots.new_zeros(self._num_averages)
        norm = empty.index_add(0, constants.slot_average, weights)
        # 0 times an infinite error, or its slope, is NaN
        terms = slots if coefficients.all_slots_weigh else torch.where(weights > 0, slots, constants.zero)
        averages = empty.index_add(0, constants.slot_average, weights * terms)
        averages_have_data = norm > 0
        averages = averages / torch.where(averages_have_data, norm, constants.one)
        return Evaluated(averages, slots, averages_have_data, has_data, number, counts, nan, instead)

    def _evaluate_adapters(
        self, row: Row, coefficients: Coefficients, gathered: GatheredValues
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Value of each slot of the adapters, and if it has data; None without data, where the host knows that."""
        scalars: list[tuple[Tensor, Tensor] | None] = []
        additive, maxima = 2 * self._num_sum_slots, self._num_maximum_slots
        for position, adapter in self.merged.items():
            for _ in range(self.num_slots(self.components[position])):
                additive_end, maxima_end = additive + adapter.num_additive, maxima + adapter.num_maxima
                pieces = row.additive[additive:additive_end], row.maxima[maxima:maxima_end]
                scalars.append(adapter.value(*pieces, needed=bool(coefficients.coeffs[position])))
                additive, maxima = additive_end, maxima_end
        device = row.additive.device
        for position, adapters in self.gathered.items():
            for value in gathered.get(position, [None] * len(adapters)):
                scalars.append(None if value is None else (value.to(device), self._constants_on(device).true))
        return scalars

    def _constants_on(self, device: torch.device) -> _Constants:
        if device not in self._constants:
            average, part = [], len(self.components)
            for index, entry in enumerate(self.components):
                whole_and_parts = [index, *range(part, part + entry.num_parts - 1)]
                average += [each for each in whole_and_parts for _ in range(entry.num_slots(self._type_names))]
                part += entry.num_parts - 1
            instead = self._find_instead()
            with torch.inference_mode(False):  # they outlive this step, and training saves them for backward
                self._constants[device] = _Constants(
                    torch.tensor(average, dtype=torch.int64, device=device),
                    torch.ones((), dtype=torch.float64, device=device),
                    torch.zeros((), dtype=torch.float64, device=device),
                    torch.full((), torch.nan, dtype=torch.float64, device=device),
                    torch.ones((), dtype=torch.bool, device=device),
                    torch.zeros((), dtype=torch.bool, device=device),
                    None if instead is None else torch.tensor(instead, dtype=torch.int64, device=device),
                )
        return self._constants[device]


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
