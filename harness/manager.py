r"""Many components in one row: :class:`MetricsManager`, the loss and the metrics of a training.

A step reads each distinct field once, measures one local row, merges it over the ranks, evaluates every component,
per-type value and the weighted sum from the merged row, and keeps the row for the epoch. The end of an epoch is the
same evaluation of the accumulated row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from harness.components import WEIGHTED_SUM, MetricEntry, check_coeff, check_type_names, parse_entries
from harness.distributed import ProcessGroup, data_parallel_size, gather_objects, global_rank
from harness.fields import ATOM_TYPES, Batch, FieldModifier, take
from harness.foreign import (
    DeferredMetric,
    ForeignMetric,
    Part,
    detached,
    labelled_rows,
    whole_batches,
    why_not_mergeable,
)
from harness.metrics import ErrorMetric, Value, check_same_shape
from harness.statistics import Elements, Row, merge_rows_over_ranks

__all__ = [
    "WEIGHTED_SUM",
    "MetricEntry",
    "MetricsManager",
    "Values",
    "compute_together",
    "merge_accumulated",
    "step_together",
]


@dataclass(frozen=True)
class Values:
    """Every value of one step or epoch, still on the device.

    Attributes:
        names: names of the reported values, in the order of ``reported``.
        order: the order in which users see them.
        reported: float64 ``[num_values]``: components, then per-type values; NaN where there is no data.
        weighted_sum: float64 scalar, or None if no component has a coefficient.
        has_data: bool ``[num_values]``.
    """

    names: tuple[str, ...]
    order: tuple[int, ...]
    reported: Tensor
    weighted_sum: Tensor | None
    has_data: Tensor

    def detach(self) -> Values:
        """The same values without a graph."""
        weighted_sum = None if self.weighted_sum is None else self.weighted_sum.detach()
        return Values(self.names, self.order, self.reported.detach(), weighted_sum, self.has_data)

    def as_dict(self, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        """Values by name, as scalar tensors on the device."""
        scalars = self.reported.unbind()
        values = {f"{prefix}{self.names[index]}{suffix}": scalars[index] for index in self.order}
        if self.weighted_sum is not None:
            values[f"{prefix}{WEIGHTED_SUM}{suffix}"] = self.weighted_sum
        return values

    def to_host(self, prefix: str = "", suffix: str = "") -> dict[str, float]:
        """Values by name as Python numbers: one copy, and the only place where the host waits for the device."""
        vector = self.reported.detach()
        if self.weighted_sum is not None:
            vector = torch.cat((vector, self.weighted_sum.detach().unsqueeze(0)))
        numbers = vector.tolist()
        values = {f"{prefix}{self.names[index]}{suffix}": numbers[index] for index in self.order}
        if self.weighted_sum is not None:
            values[f"{prefix}{WEIGHTED_SUM}{suffix}"] = numbers[-1]
        return values


@dataclass
class _Reading:
    """One distinct (field, ignore_nan, per_type), read once a step, and the components that want it."""

    modifier: FieldModifier
    ignore_nan: bool
    per_type: bool
    additive: list[int] = field(default_factory=list)
    maxima: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, bool, bool]:
        return _identity(self.modifier), self.ignore_nan, self.per_type


@dataclass(frozen=True)
class _Span:
    """Consecutive slots whose values come from one function."""

    value: Value
    start: int
    stop: int


@dataclass(frozen=True)
class _Constants:
    """What evaluation needs on a device."""

    slot_weights: Tensor
    slot_component: Tensor
    coeffs: Tensor
    contributes: Tensor
    zero: Tensor
    one: Tensor
    nan: Tensor


class MetricsManager(nn.Module):
    r"""Losses and error metrics as managed components of one weighted sum.

    Each component reads a field of predictions and target and reduces an error over it, for all atoms or by atom type.
    With the normalised coefficients :math:`c_k` (:math:`\sum_k c_k = 1`) and the values :math:`v_k`

    .. math:: \text{weighted\_sum} = \sum_k c_k v_k

    where a component without any data contributes nothing. Values are those of one process on the data of all ranks,
    and so are gradients, see :func:`harness.distributed.gradient_scale`.

    Args:
        metrics: a list of dictionaries, one for each component:

            * ``metric`` (required): a :class:`torchmetrics.Metric`, or a class of them that needs no arguments.
            * ``field``: a field's name, a modifier such as :class:`~harness.fields.PerAtomModifier`, or null: then the
              metric gets the two whole dictionaries.
            * ``coeff``: weight in ``weighted_sum``; null leaves the component out of it. 0 is legal.
            * ``name``: default ``{field}_{metric}``, such as ``F_rmse``.
            * ``per_type``: one value for each atom type, reported as ``{name}_{type}``, averaged over the types that
              have data. Fields of nodes only.
            * ``per_type_coeffs``: ``{type: weight}`` for this average, one positive weight for each type.
            * ``ignore_nan``: leave out elements whose target is NaN.
        type_names: names of the atom types, in the order of the indices in ``atom_types``; needed by ``per_type``.
        sync_on_step: merge over the ranks in every step, also where no gradients flow.

    Raises:
        TypeError, ValueError, KeyError: a mistake in the list, with the component, what was found and what is valid.

    The definition follows NequIP's ``MetricsManager`` (https://nequip.readthedocs.io).

    Example:
        >>> from harness.metrics import MeanSquaredError
        >>> manager = MetricsManager([{"field": "forces", "metric": MeanSquaredError(), "coeff": 1}])
        >>> manager({"forces": torch.ones(2, 3)}, {"forces": torch.zeros(2, 3)})
        {'F_mse': tensor(1., dtype=torch.float64), 'weighted_sum': tensor(1., dtype=torch.float64)}
    """

    def __init__(
        self,
        metrics: Sequence[Mapping[str, Any]],
        type_names: Sequence[str] | None = None,
        *,
        sync_on_step: bool = False,
    ) -> None:
        super().__init__()
        self.type_names = check_type_names(type_names)
        self.sync_on_step = sync_on_step
        self.process_group: ProcessGroup | None = None
        """The ranks that share a batch, if a strategy splits the world; None for all."""
        self.entries = parse_entries(metrics, self.type_names)
        self._modules_by_name = nn.ModuleList(entry.metric for entry in self.entries.values())
        self._build_layout()
        self.do_weighted_sum = False
        self.set_coeffs({})
        self._configured_coeffs = self.given_coeffs
        self._local: Row | None = None
        self._merged: Row | None = None
        self._last_step: Values | None = None
        self._last_epoch: Values | None = None
        self._checked_types = False
        self._warned_types = False

    # --- a mapping from names to metrics, as NequIP's module and callbacks expect ---

    def __getitem__(self, name: str) -> Metric:
        return self._entry(name).metric

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def keys(self) -> list[str]:
        """Names of the components."""
        return list(self.entries)

    def values(self) -> list[Metric]:
        """Metrics of the components."""
        return [entry.metric for entry in self.entries.values()]

    def items(self) -> list[tuple[str, Metric]]:
        """Names and metrics of the components."""
        return [(name, entry.metric) for name, entry in self.entries.items()]

    @property
    def metrics_values_step(self) -> dict[str, float | None]:
        """Every component of the last step; read on access, since it makes the host wait for the device."""
        return self._component_values(self._last_step)

    @property
    def metrics_values_epoch(self) -> dict[str, float | None]:
        """Every component of the last :meth:`compute`."""
        return self._component_values(self._last_epoch)

    def _component_values(self, values: Values | None) -> dict[str, float | None]:
        if values is None:
            return dict.fromkeys(self.entries)
        numbers = values.to_host()
        return {name: numbers[name] for name in self.entries}

    @property
    def value_names(self) -> list[str]:
        """Names of everything that is reported: components, per-type values, and the weighted sum if there is one."""
        names = [self._names[index] for index in self._order]
        return [*names, WEIGHTED_SUM] if self.do_weighted_sum else names

    # --- coefficients ---

    @property
    def given_coeffs(self) -> dict[str, float | None]:
        """Coefficients as given, by component."""
        return {name: entry.given_coeff for name, entry in self.entries.items()}

    @property
    def coeffs(self) -> dict[str, float | None]:
        """Normalised coefficients by component; None for those outside of the weighted sum."""
        return {name: entry.coeff for name, entry in self.entries.items()}

    def set_coeffs(self, coeffs: Mapping[str, float | None]) -> None:
        """Change some coefficients; the others stay as they were given, and all are normalised anew.

        Args:
            coeffs: ``{component: coefficient}``; None takes a component out of the weighted sum.

        Raises:
            KeyError: an unknown component; the valid ones are listed. Nothing is changed then.
            ValueError: a coefficient that is negative or not finite, or only zeros.
        """
        given = self.given_coeffs
        for name, coeff in coeffs.items():
            self._entry(name)
            given[name] = check_coeff(coeff, name)
        weighted = {name: coeff for name, coeff in given.items() if coeff is not None}
        total = math.fsum(weighted.values())
        if weighted and not 0 < total < math.inf:
            raise ValueError(
                f"The coefficients {weighted} sum to {total}; at least one must be above 0. To leave a component out "
                f"of the weighted sum, set its coefficient to null."
            )
        for name, entry in self.entries.items():
            entry.given_coeff = given[name]
            entry.coeff = weighted[name] / total if name in weighted else None
        self.do_weighted_sum = bool(weighted)
        self._everything_contributes = all(entry.coeff for entry in self.entries.values())
        self._constants: dict[torch.device, _Constants] = {}

    def _entry(self, name: str) -> MetricEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise KeyError(f"Unknown component {name!r}. Valid names: {', '.join(self.entries)}.") from None

    # --- a step ---

    def forward(self, preds: Batch, target: Batch, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        """Compute and accumulate a batch.

        Values are those of all ranks where gradients flow, or if ``sync_on_step``; otherwise those of this rank's
        batch, and only :meth:`compute` is global. A rank whose batch is empty takes part as any other: its predictions
        need only be connected to the parameters.

        Args:
            preds: predictions by field name.
            target: labels by field name, with ``atom_types`` and ``num_atoms`` where a component needs them.
            prefix: put before every name.
            suffix: put behind every name.

        Returns:
            Every component, every per-type value as ``{name}_{type}``, and ``weighted_sum`` if any component has a
            coefficient: float64 scalars.

        Raises:
            KeyError: a field is missing.
            ValueError: prediction and target differ in shape, or an atom type is out of range.
        """
        (values,) = step_together(self, preds=preds, target=target)
        return values.as_dict(prefix, suffix)

    def measure(self, preds: Batch, target: Batch) -> Row:
        """Local row of a batch; differentiable, nothing is kept or sent."""
        return self._measure(preds, target)[0]

    def _measure(self, preds: Batch, target: Batch) -> tuple[Row, _DeferredInputs]:
        """Local row, and the inputs of the components that are not in it."""
        device = _device_of(preds)
        sums: list[Tensor] = [_UNSET] * self._num_additive_components
        counts: list[Tensor] = [_UNSET] * self._num_additive_components
        maxima: list[Tensor] = [_UNSET] * self._num_maximum_components
        foreign: dict[int, list[tuple[Tensor, Tensor]]] = {}
        pairs: dict[object, tuple[Tensor, Tensor]] = {}
        deferred: _DeferredInputs = {}

        types = self._read_types(preds, target) if self._needs_types else None
        for reading in self._readings:
            elements = self._read(reading, preds, target, types, pairs)
            if reading.additive:
                count = elements.counts()
                for index in reading.additive:
                    sums[index], counts[index] = elements.sums(self._errors(index, elements)), count
            for index in reading.maxima:
                maxima[index - self._num_additive_components] = elements.maxima(self._errors(index, elements))
            for index in reading.others:
                groups = range(elements.num_groups) if reading.per_type else (None,)
                elements = elements if self._differentiable(index) else elements.detach()
                deferred[index] = [labelled_rows(elements, group) for group in groups]
        for index in self._whole_batch_components:
            deferred[index] = [whole_batches(preds, target)]
        for index, metric in self._foreign.items():
            foreign[index] = [metric.measure(inputs, device) for inputs in deferred.pop(index)]
        pieces = [piece for index in self._foreign for piece in foreign[index]]
        row = Row.of(
            [*sums, *counts, *(additive for additive, _ in pieces)],
            [*maxima, *(piece for _, piece in pieces)],
            device,
        )
        if torch.is_grad_enabled() and not row.requires_grad:
            row = self._anchored(row, preds, pairs)
        return row, deferred

    def _anchored(self, row: Row, preds: Batch, pairs: Mapping[object, tuple[Tensor, Tensor]]) -> Row:
        """The row, hung on the predictions if gradients flow through those: a rank without data is no validation."""
        read = [prediction for prediction, _ in pairs.values()]
        if self._whole_batch_components:
            read += [value for value in preds.values() if isinstance(value, Tensor)]
        for prediction in read:
            if prediction.requires_grad:
                return Row(row.additive + prediction.reshape(-1)[:0].sum(dtype=torch.float64), row.maxima)
        return row

    def _differentiable(self, index: int) -> bool:
        """Whether gradients flow through a component: those outside of the sum would send 0 × inf = NaN."""
        return not self.do_weighted_sum or bool(self._ordered[index].coeff)

    def _errors(self, index: int, elements: Elements) -> Tensor:
        prediction = elements.prediction if self._differentiable(index) else elements.prediction.detach()
        return cast(ErrorMetric, self._ordered[index].metric).measure(prediction, elements.target)

    def _read(
        self,
        reading: _Reading,
        preds: Batch,
        target: Batch,
        types: Tensor | None,
        pairs: dict[object, tuple[Tensor, Tensor]],
    ) -> Elements:
        key = _identity(reading.modifier)
        if key not in pairs:
            prediction, reference = pairs[key] = reading.modifier(preds, target)
            check_same_shape(prediction, reference, f"Field {str(reading.modifier)!r}")
            if not prediction.dim():
                raise ValueError(
                    f"Field {str(reading.modifier)!r} is a scalar; expected one row per graph, node or edge."
                )
        prediction, reference = pairs[key]
        if not reading.per_type:
            return Elements.read(prediction, reference, ignore_nan=reading.ignore_nan)
        assert_types = cast(Tensor, types)
        if assert_types.shape != prediction.shape[:1]:
            raise ValueError(
                f"Field {str(reading.modifier)!r} has shape {list(prediction.shape)}, but {ATOM_TYPES!r} has shape "
                f"{list(assert_types.shape)}; expected one type for each row."
            )
        return Elements.read(
            prediction,
            reference,
            ignore_nan=reading.ignore_nan,
            types=assert_types,
            num_groups=len(self.type_names),
        )

    def _read_types(self, preds: Batch, target: Batch) -> Tensor:
        types = (target[ATOM_TYPES] if ATOM_TYPES in target else take(preds, ATOM_TYPES, "target")).reshape(-1)
        if not self._checked_types:  # the one look at data, in the first step only: it makes the host wait
            if types.is_floating_point() or types.is_complex() or types.dtype == torch.bool:
                raise TypeError(f"{ATOM_TYPES!r} has dtype {types.dtype}; expected integers, such as torch.int64.")
            if types.numel():
                lowest, highest = torch.stack((types.min(), types.max())).tolist()
                if lowest < 0 or highest >= len(self.type_names):
                    raise ValueError(
                        f"{ATOM_TYPES!r} has indices from {lowest} to {highest}, but there are {len(self.type_names)} "
                        f"type_names {list(self.type_names)}: expected 0 to {len(self.type_names) - 1}. Do data and "
                        f"metrics use the same type_names?"
                    )
                self._checked_types = True
        return types.to(torch.int64)

    def _accumulate(self, row: Row, merged: bool) -> None:
        row = row.detach()
        if merged:
            self._merged = row if self._merged is None else row.merge(self._merged)
        else:
            self._local = row if self._local is None else row.merge(self._local)

    @property
    def _wants_sync(self) -> bool:
        # NequIP's module asks through the metrics
        return self.sync_on_step or any(entry.metric.dist_sync_on_step for entry in self._ordered)

    # --- evaluation ---

    def evaluate(self, row: Row, deferred: Mapping[int, list[Tensor | None]] | None = None) -> Values:
        """Every component, per-type value and the weighted sum from a row; differentiable.

        Args:
            row: statistics in this manager's layout.
            deferred: values of the components that are not in the row, one for each group; None where unknown.
        """
        num_slots = self._num_additive_slots
        sums = row.additive[:num_slots]
        counts = row.additive.detach()[num_slots : 2 * num_slots]  # of targets: no gradient, and none to be computed
        constants = self._constants_on(row.additive.device)

        values: list[Tensor] = []
        has_data: list[Tensor] = []
        if num_slots:
            counted = counts > 0
            safe_counts = counts.clamp(min=1.0)
            has_data.append(counted)
            values.extend(
                span.value(sums[span.start : span.stop], safe_counts[span.start : span.stop])
                if len(self._spans) > 1
                else span.value(sums, safe_counts)
                for span in self._spans
            )
        if self._num_maximum_slots:
            maxima = row.maxima[: self._num_maximum_slots]
            found = maxima != -math.inf
            has_data.append(found)
            values.append(torch.where(found, maxima, 0.0))
        if self._foreign or self._deferred:
            others = self._evaluate_others(row, deferred or {})
            zero = row.additive.new_zeros(())
            values.append(torch.stack([zero if other is None else other.to(zero.device) for other in others]))
            has_data.append(torch.tensor([other is not None for other in others], device=zero.device))
        slots, slot_has_data = _join(values), _join(has_data)

        if self._one_slot_each:
            components, component_has_data = slots, slot_has_data
            reported, reported_has_data = slots, slot_has_data
        else:
            weights = constants.slot_weights * slot_has_data
            empty = slots.new_zeros(len(self._ordered))
            norm = empty.index_add(0, constants.slot_component, weights)
            component_has_data = norm > 0
            components = empty.index_add(0, constants.slot_component, weights * slots)
            components = components / torch.where(component_has_data, norm, constants.one)
            reported = torch.cat((components, slots))
            reported_has_data = torch.cat((component_has_data, slot_has_data))

        weighted_sum = None
        if self.do_weighted_sum:
            # the values of components and types without data are 0 here
            terms = components
            if not self._everything_contributes:
                terms = torch.where(constants.contributes, components, constants.zero)
            weighted_sum = torch.dot(constants.coeffs, terms)
        reported = torch.where(reported_has_data, reported, constants.nan)
        return Values(self._names, self._order, reported, weighted_sum, reported_has_data)

    def _evaluate_others(self, row: Row, deferred: Mapping[int, list[Tensor | None]]) -> list[Tensor | None]:
        """Value of each slot of the metrics that are not ours; None without data."""
        scalars: list[Tensor | None] = []
        additive, maxima = 2 * self._num_additive_slots, self._num_maximum_slots
        for index, foreign in self._foreign.items():
            for _ in range(self._groups(self._ordered[index])):
                additive_end, maxima_end = additive + foreign.num_additive, maxima + foreign.num_maxima
                scalars.append(foreign.value(row.additive[additive:additive_end], row.maxima[maxima:maxima_end]))
                additive, maxima = additive_end, maxima_end
        for index, metrics in self._deferred.items():
            scalars.extend(deferred.get(index, [None] * len(metrics)))
        return scalars

    def compute(self, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        """Values over everything accumulated on all ranks since the last :meth:`reset`, as :meth:`forward` names them.

        All ranks must call it: it merges what has not been merged yet.
        """
        (values,) = compute_together([self])
        return values.as_dict(prefix, suffix)

    def reset(self) -> None:
        """Forget everything accumulated."""
        self._local = self._merged = None
        for metrics in self._deferred.values():
            for metric in metrics:
                metric.reset()

    def _neutral(self) -> Row:
        return Row.neutral(self._num_additive_numbers, self._num_maximum_numbers)

    # --- checkpoints ---

    def get_extra_state(self) -> dict[str, Any]:
        """Coefficients and the row accumulated so far: tensors, numbers and strings only.

        On several ranks, call :func:`merge_accumulated` on all of them first: then every rank holds the same state,
        which any number of ranks may load.
        """
        row = self._neutral()
        for part in (self._merged, self._local):
            row = row if part is None else row.merge(part)
        return {
            "layout": self._layout,
            "coeffs": self.given_coeffs,
            "configured_coeffs": dict(self._configured_coeffs),
            "additive": row.additive,
            "maxima": row.maxima,
            "deferred": [
                [*metric.past, *filter(None, [metric.local_part()])]
                for metrics in self._deferred.values()
                for metric in metrics
            ],
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of :meth:`get_extra_state`, on the same or another number of ranks.

        What was accumulated is dropped, with a warning, if the components have changed since. Coefficients are taken
        over unless the configured ones have changed since: then the new configuration wins, with a warning.
        """
        missing = [key for key in self.get_extra_state() if key not in state]
        if missing:
            raise ValueError(
                f"This is no state of harness.MetricsManager: it has {', '.join(map(str, state)) or 'nothing'}, but no "
                f"{', '.join(missing)}. A checkpoint of another package's manager gives its weights, not its metrics."
            )
        self.reset()
        if dict(state["configured_coeffs"]) == self._configured_coeffs:
            self.set_coeffs(state["coeffs"])
        elif dict(state["coeffs"]) != self.given_coeffs:
            warnings.warn(
                f"The checkpoint was made with the coefficients {dict(state['configured_coeffs'])}, this run is "
                f"configured with {self._configured_coeffs}: the configuration is used.",
                stacklevel=2,
            )
        accumulated = Row(state["additive"].cpu(), state["maxima"].cpu())
        if list(state["layout"]) != self._layout:
            if bool((accumulated.additive != 0).any()):
                warnings.warn(
                    f"The checkpoint's epoch was accumulated for other components: {list(state['layout'])}; these are "
                    f"{self._layout}. The epoch in progress starts anew, later ones are not affected.",
                    stacklevel=2,
                )
            return
        self._merged = accumulated
        metrics = [metric for group in self._deferred.values() for metric in group]
        for metric, parts in zip(metrics, state["deferred"], strict=True):
            metric.past = list(parts)

    # --- layout ---

    def _build_layout(self) -> None:
        """Fix the order of components in the row: sums, maxima, mergeable foreign metrics, deferred ones."""
        own = [entry for entry in self.entries.values() if isinstance(entry.metric, ErrorMetric)]
        sums = [entry for entry in own if cast(ErrorMetric, entry.metric).kind == "sum"]
        functions = list(dict.fromkeys(cast(ErrorMetric, entry.metric).value for entry in sums))
        sums.sort(key=lambda entry: functions.index(cast(ErrorMetric, entry.metric).value))
        maxima = [entry for entry in own if cast(ErrorMetric, entry.metric).kind == "maximum"]
        others = [entry for entry in self.entries.values() if not isinstance(entry.metric, ErrorMetric)]
        reasons = {entry.name: why_not_mergeable(entry.metric) for entry in others}
        others.sort(key=lambda entry: reasons[entry.name] is not None)
        self._ordered = [*sums, *maxima, *others]
        self._num_additive_components, self._num_maximum_components = len(sums), len(maxima)
        self._num_additive_slots = sum(map(self._groups, sums))
        self._num_maximum_slots = sum(map(self._groups, maxima))
        self._one_slot_each = not any(entry.per_type for entry in self._ordered)
        self._layout = [entry.describe() for entry in self._ordered] + list(self.type_names)

        self._spans: list[_Span] = []
        start = 0
        for function in functions:
            members = [entry for entry in sums if cast(ErrorMetric, entry.metric).value is function]
            stop = start + sum(map(self._groups, members))
            self._spans.append(_Span(function, start, stop))
            start = stop

        self._foreign: dict[int, ForeignMetric] = {}
        self._deferred: dict[int, list[DeferredMetric]] = {}
        self._num_additive_numbers = 2 * self._num_additive_slots
        self._num_maximum_numbers = self._num_maximum_slots
        for index, entry in enumerate(self._ordered):
            if entry.name not in reasons:
                continue
            reason = reasons[entry.name]
            if reason is None:
                shape = getattr(entry.field, "shape", None)
                foreign = self._foreign[index] = ForeignMetric(entry.metric, entry.name, shape)
                self._num_additive_numbers += self._groups(entry) * foreign.num_additive
                self._num_maximum_numbers += self._groups(entry) * foreign.num_maxima
            else:
                self._deferred[index] = [
                    DeferredMetric(entry.metric.clone(), entry.name, reason) for _ in range(self._groups(entry))
                ]
        readings: dict[object, _Reading] = {}
        for index, entry in enumerate(self._ordered):
            if entry.field is None:
                continue
            reading = _Reading(entry.field, entry.ignore_nan, entry.per_type)
            reading = readings.setdefault(reading.key, reading)
            if index < len(sums):
                reading.additive.append(index)
            elif index < len(own):
                reading.maxima.append(index)
            else:
                reading.others.append(index)
        self._readings = list(readings.values())
        self._whole_batch_components = [index for index, entry in enumerate(self._ordered) if entry.field is None]
        self._needs_types = any(reading.per_type for reading in self._readings)

        slot_names: list[str] = []
        if not self._one_slot_each:
            for entry in self._ordered:
                slot_names += entry.type_keys(self.type_names) or [""]
        component_names = [entry.name for entry in self._ordered]
        self._names = (*component_names, *slot_names)
        position = {name: index for index, name in enumerate(self._names)}
        order: list[int] = []
        for entry in self.entries.values():
            order += [position[key] for key in entry.type_keys(self.type_names)]
            order.append(position[entry.name])
        self._order = tuple(order)

    def _groups(self, entry: MetricEntry) -> int:
        return len(self.type_names) if entry.per_type else 1

    def _constants_on(self, device: torch.device) -> _Constants:
        if device not in self._constants:
            weights = [weight for entry in self._ordered for weight in self._slot_weights(entry)]
            component = [index for index, entry in enumerate(self._ordered) for _ in range(self._groups(entry))]
            coeffs = [entry.coeff or 0.0 for entry in self._ordered]
            with torch.inference_mode(False):  # they outlive this step, and training saves them for backward
                self._constants[device] = _Constants(
                    torch.tensor(weights, dtype=torch.float64, device=device),
                    torch.tensor(component, dtype=torch.int64, device=device),
                    torch.tensor(coeffs, dtype=torch.float64, device=device),
                    torch.tensor([coeff > 0 for coeff in coeffs], device=device),
                    *(torch.tensor(number, dtype=torch.float64, device=device) for number in (0.0, 1.0, torch.nan)),
                )
        return self._constants[device]

    def _slot_weights(self, entry: MetricEntry) -> Sequence[float]:
        return entry.per_type_coeffs or [1.0] * self._groups(entry)

    def _warn_of_types_without_data(self, values: Values) -> None:
        if self._one_slot_each or self._warned_types:
            return
        present = dict(zip(values.names, values.has_data.tolist(), strict=True))
        type_keys = [key for entry in self.entries.values() for key in entry.type_keys(self.type_names)]
        missing = [key for key in type_keys if not present[key]]
        if missing and any(present.values()):
            self._warned_types = True
            if global_rank(self.process_group) == 0:
                warnings.warn(
                    f"No data in the whole epoch for {', '.join(missing)}: NaN there, and left out of the averages.",
                    stacklevel=3,
                )

    def extra_repr(self) -> str:
        """Components with their coefficients."""
        return "\n".join(f"{entry.describe()}, coeff={entry.coeff}" for entry in self.entries.values())


def step_together(loss: MetricsManager, *monitors: MetricsManager, preds: Batch, target: Batch) -> tuple[Values, ...]:
    """Compute and accumulate a batch in several managers over one merge: the loss, and metrics that only watch.

    Gradients flow through the first manager only. The others see detached predictions.

    Args:
        loss: the manager that gradients flow through, if they do.
        monitors: managers without gradients.
        preds: predictions by field name.
        target: labels by field name.

    Returns:
        Values of each manager.
    """
    managers = (loss, *monitors)
    measured = [loss._measure(preds, target)]
    if monitors:
        watched = detached(preds)
        with torch.no_grad():
            measured += [manager._measure(watched, target) for manager in monitors]
    rows = [row for row, _ in measured]
    merged = rows[0].requires_grad or any(manager._wants_sync for manager in managers)
    num_ranks = data_parallel_size(loss.process_group)
    if merged:
        if num_ranks > 1:
            _refuse_deferred_loss(loss, rows[0])
        rows = merge_rows_over_ranks(rows, loss.process_group)
    values = []
    for manager, row, (_, deferred_inputs) in zip(managers, rows, measured, strict=True):
        with torch.set_grad_enabled(torch.is_grad_enabled() and manager is loss):
            deferred = {
                index: [
                    metric.update(group_inputs, local_value=not merged or num_ranks == 1, device=row.additive.device)
                    for metric, group_inputs in zip(manager._deferred[index], inputs, strict=True)
                ]
                for index, inputs in deferred_inputs.items()
            }
            current = manager.evaluate(row, deferred)
        manager._last_step = current.detach()
        manager._accumulate(row, merged)
        values.append(current)
    return tuple(values)


def compute_together(managers: Sequence[MetricsManager]) -> list[Values]:
    """Values of several managers over everything accumulated on all ranks, over one merge; all ranks must call it."""
    if not managers:
        return []
    group = managers[0].process_group
    locals_ = merge_rows_over_ranks([manager._local or manager._neutral() for manager in managers], group)
    parts = _gather_deferred(managers, group)
    results = []
    for manager, row in zip(managers, locals_, strict=True):
        total = row if manager._merged is None else row.merge(manager._merged)
        deferred = {
            index: [metric.value(parts.pop(0), total.additive.device) for metric in metrics]
            for index, metrics in manager._deferred.items()
        }
        with torch.no_grad():
            values = manager.evaluate(total, deferred)
        manager._last_epoch = values
        manager._warn_of_types_without_data(values)
        results.append(values)
    return results


def merge_accumulated(managers: Sequence[MetricsManager]) -> None:
    """Merge over the ranks what managers have accumulated, so that all ranks' states are the same and complete.

    For checkpoints; all ranks must call it. Values do not change.
    """
    if not managers:
        return
    group = managers[0].process_group
    rows = merge_rows_over_ranks([manager._local or manager._neutral() for manager in managers], group)
    parts = _gather_deferred(managers, group)
    for manager, row in zip(managers, rows, strict=True):
        manager._merged = row if manager._merged is None else row.merge(manager._merged)
        manager._local = None
        for metrics in manager._deferred.values():
            for metric in metrics:
                metric.past += parts.pop(0)
                metric.metric.reset()


def _gather_deferred(managers: Sequence[MetricsManager], group: ProcessGroup | None) -> list[list[Part]]:
    """Stretches of every deferred metric of every manager, from all ranks; no collective if there is none."""
    mine = [metric.local_part() for manager in managers for metrics in manager._deferred.values() for metric in metrics]
    if not mine:
        return []
    gathered = gather_objects(mine, group)
    return [[part for part in parts if part is not None] for parts in zip(*gathered, strict=True)]


def _refuse_deferred_loss(loss: MetricsManager, row: Row) -> None:
    if not row.requires_grad:
        return
    for index, metrics in loss._deferred.items():
        entry = loss._ordered[index]
        if entry.coeff is not None:
            raise ValueError(
                f"Component {entry.name!r} has the coefficient {entry.given_coeff} in a loss on several ranks, but "
                f"{type(entry.metric).__name__} cannot be merged over ranks within a step: {metrics[0].reason}. "
                f"Set its coefficient to null, or train on one rank."
            )


_DeferredInputs = dict[int, list[Any]]
"""Inputs of each deferred component by group; None for a group without data."""
_UNSET = torch.empty(0)


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _identity(modifier: FieldModifier) -> object:
    """Key under which a modifier's result is shared: its content where it has one, else itself."""
    try:
        hash(modifier)
    except TypeError:
        return id(modifier)
    return modifier


def _device_of(preds: Batch) -> torch.device:
    for value in preds.values():
        if isinstance(value, Tensor):
            return value.device
    raise ValueError(f"The predictions hold no tensor. Found the keys: {', '.join(map(str, preds)) or 'none'}.")
