r"""Many components in one row: :class:`MetricsManager`, the loss and the metrics of a training.

A step reads each distinct field once, measures one local row, merges it over the ranks, evaluates every component,
per-type value and the weighted sum from the merged row, and keeps the row for the epoch. The end of an epoch is the
same evaluation of the accumulated row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from harness.distributed import ProcessGroup, data_parallel_size, gather_objects, rank_in_group
from harness.fields import ATOM_TYPES, Batch, get_field
from harness.metrics.accumulation import Window
from harness.metrics.adapters import DeferredMetric, Part, detached, labelled_rows, whole_batches
from harness.metrics.coefficients import Coefficients
from harness.metrics.components import WEIGHTED_SUM, MetricEntry, check_type_names, parse_entries
from harness.metrics.errors import ErrorMetric, check_same_shape, is_linear
from harness.metrics.layout import Layout, Reading, modifier_key
from harness.metrics.row import Elements, Row, merge_rows_over_ranks
from harness.metrics.values import Evaluated, Values
from harness.schedules import Interval, Schedule, check_interval
from harness.support.device import to_device
from harness.support.text import did_you_mean

__all__ = ["MetricsManager", "Weighting", "compute_together", "merge_accumulated", "step_together"]


@dataclass(frozen=True)
class _Coefficients:
    """Normalised coefficients on a device, in the layout's order; 0 outside of the weighted sum."""

    coeffs: Tensor
    contributes: Tensor
    zero: Tensor


class Weighting(Protocol):
    """Changes coefficients on the device, from something that is learnt; an ``nn.Module``."""

    def prepare(self, names: Sequence[str]) -> None:
        """Make what is learnt, for these components in this order."""

    def __call__(self, coeffs: Tensor) -> Tensor:
        """Normalised coefficients from those that were given: float64 ``[num_components]``, 0 where they are 0."""


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
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`; those that it does not name stay as given.
        schedule_interval: how often a training moves on along the schedule: at the start of every ``epoch``, or at
            every ``step``, with fractions of epochs.
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
        schedule: Schedule | None = None,
        schedule_interval: Interval = "epoch",
        sync_on_step: bool = False,
    ) -> None:
        super().__init__()
        self.type_names = check_type_names(type_names)
        if not isinstance(sync_on_step, bool):
            raise TypeError(f"`sync_on_step` is true or false, found {sync_on_step!r}.")
        self.sync_on_step = sync_on_step
        self.process_group: ProcessGroup | None = None
        """The ranks that share a batch, if a strategy splits the world; None for all."""
        self.entries = parse_entries(metrics, self.type_names)
        self._metrics = nn.ModuleList(entry.metric for entry in self.entries.values())
        self._layout = Layout(list(self.entries.values()), self.type_names)
        self.weighting: Weighting | None = None
        """What changes the coefficients on the device, see :meth:`weigh_by`."""
        self._checked_accumulation: set[str] | None = None  # components that gradients may be accumulated of
        self._coeffs = Coefficients(self.entries, self.type_names)
        self._coefficients_changed()
        check_interval(schedule_interval, "`schedule_interval`")
        if schedule is not None:
            self.follow(schedule, schedule_interval)
        self._local: Row | None = None
        self._merged: Row | None = None
        self._before_step: tuple[Row | None, Row | None] = (None, None)
        self._last_step: Values | None = None
        self._last_epoch: Values | None = None
        self._checked_types = False
        self._checked_window = False
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
        names = [self._layout.names[index] for index in self._layout.order]
        return [*names, WEIGHTED_SUM] if self.do_weighted_sum else names

    # --- coefficients ---

    @property
    def given_coeffs(self) -> dict[str, float | None]:
        """Coefficients as given or scheduled, by component."""
        return {name: entry.given_coeff for name, entry in self.entries.items()}

    @property
    def coeffs(self) -> dict[str, float | None]:
        """Normalised coefficients by component; None for those outside of the weighted sum."""
        return {name: entry.coeff for name, entry in self.entries.items()}

    def effective_coeffs(self) -> dict[str, float]:
        """Normalised coefficients of the components in the weighted sum, as a step uses them.

        They differ from :attr:`coeffs` where something is learnt; then the host waits for the device.
        """
        given = {name: coeff for name, coeff in self.coeffs.items() if coeff is not None}
        if self.weighting is None:
            return given
        device = next(cast(nn.Module, self.weighting).parameters()).device
        with torch.no_grad():
            used = self._coeffs_on(device).tolist()
        by_name = {entry.name: coeff for entry, coeff in zip(self._layout.components, used, strict=True)}
        return {name: by_name[name] for name in given}

    @property
    def type_weights(self) -> dict[str, float]:
        """Weights of atom types that were given or scheduled, by ``{name}_{type}``; they sum to 1 in a component."""
        return self._coeffs.type_weights

    @property
    def ever_weighted(self) -> set[str]:
        """Components that are in the weighted sum now, or at another epoch of the schedule."""
        return self._coeffs.ever_weighted

    def set_coeffs(self, coeffs: Mapping[str, float | Mapping[str, float] | None]) -> None:
        """Change some coefficients; the others stay as they were given, and all are normalised anew.

        Args:
            coeffs: ``{component: coefficient}``; None takes a component out of the weighted sum. A dictionary
                ``{type: weight}`` in place of the coefficient changes weights of a ``per_type`` component's types.

        Raises:
            KeyError: an unknown component; the valid ones are listed. Nothing is changed then.
            ValueError: a coefficient that is negative or not finite, or only zeros; or one that a schedule drives.
        """
        self._coeffs.change(coeffs)
        self._coefficients_changed()

    @property
    def schedule(self) -> Schedule | None:
        """What drives coefficients by epoch."""
        return self._coeffs.schedule

    @property
    def schedule_interval(self) -> Interval:
        """How often a training moves on along the schedule: ``epoch`` or ``step``."""
        return self._coeffs.interval

    @property
    def position(self) -> tuple[float, float | None]:
        """Epoch, and relative learning rate where it matters, that the schedule was moved to last."""
        return self._coeffs.position

    def follow(self, schedule: Schedule | None, interval: Interval = "epoch") -> None:
        """Let a schedule drive coefficients from now on, in place of the one before; None for none.

        Args:
            schedule: coefficients as a function of the epoch.
            interval: how often a training moves on: at the start of every ``epoch``, or at every ``step``, with
                fractions of epochs.

        Raises:
            TypeError: no schedule.
            ValueError: it names a component or type that there is not, or leaves nothing at some epoch; or an unknown
                interval.
        """
        self._coeffs.follow(schedule, interval)
        self._coefficients_changed()

    def move_to(self, epoch: float, learning_rate: float | None = None) -> None:
        """Take up the coefficients of an epoch; any epoch, in any order, and not in the middle of a step.

        Args:
            epoch: number of the epoch, with a fraction within it.
            learning_rate: the learning rate divided by that of the start, for schedules that follow it.

        Raises:
            ValueError: no epoch, or no learning rate for a schedule that follows it.
        """
        if self._coeffs.move_to(epoch, learning_rate):
            self._coefficients_changed()

    def weigh_by(self, weighting: Weighting) -> None:
        """Let something that is learnt change the coefficients on the device, from those given or scheduled."""
        weighting.prepare([entry.name for entry in self._layout.components])
        self.weighting = weighting

    def _coefficients_changed(self) -> None:
        self.do_weighted_sum = bool(self._coeffs.weighted)
        self._everything_contributes = all(entry.coeff for entry in self.entries.values())
        self._weighted = tuple(
            position for position, entry in enumerate(self._layout.components) if entry.coeff is not None
        )
        self._coefficients: dict[torch.device, _Coefficients] = {}
        if self.ever_weighted != self._checked_accumulation:  # a schedule moves within what has been checked
            self._checked_accumulation = None
        self._layout.weights_changed()

    def _entry(self, name: str) -> MetricEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise KeyError(
                f"Unknown component {name!r}. {did_you_mean(name, self.entries)}Valid names: {', '.join(self.entries)}."
            ) from None

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
        device, layout = _device_of(preds), self._layout
        sums: list[Tensor] = [_UNSET] * layout.num_sums
        counts: list[Tensor] = [_UNSET] * layout.num_sums
        maxima: list[Tensor] = [_UNSET] * layout.num_maxima
        inputs: dict[int, list[Any]] = {}
        pairs: dict[object, tuple[Tensor, Tensor]] = {}
        types = self._read_types(preds, target) if any(reading.per_type for reading in layout.readings) else None
        reached: set[object] = set()  # readings that gradients flow to
        for reading in layout.readings:
            elements = self._read(reading, preds, target, types, pairs)
            cut = elements if all(map(self._differentiable, reading.positions)) else elements.detach()
            count = elements.counts() if reading.counted else _UNSET
            for position in reading.positions:
                seen = elements if self._differentiable(position) else cut
                if seen is elements:
                    reached.add(modifier_key(reading.modifier))
                if position < layout.num_sums:
                    sums[position], counts[position] = seen.sums(self._errors(position, seen)), count
                elif position < layout.num_sums + layout.num_maxima:
                    maxima[position - layout.num_sums] = seen.maxima(self._errors(position, seen))
                else:
                    groups = range(elements.num_groups) if reading.per_type else (None,)
                    inputs[position] = [labelled_rows(seen, group) for group in groups]
        for position in layout.whole_batches:
            seen_whole = preds if self._differentiable(position) else detached(preds)
            inputs[position] = [whole_batches(seen_whole, target)]
        pieces = [metric.measure(group, device) for at, metric in layout.foreign.items() for group in inputs[at]]
        row = Row.of(
            [*sums, *counts, *(additive for additive, _ in pieces)],
            [*maxima, *(piece for _, piece in pieces)],
            device,
        )
        if torch.is_grad_enabled():
            # Predictions that no gradient flows to, because their terms are outside of the sum or this rank has no data
            # for them, hang on the row all the same: the rank takes part in the merge as in a training step.
            cut_off = [pair[0] for key, pair in pairs.items() if key not in reached or not row.requires_grad]
            if layout.whole_batches:
                cut_off += [value for value in preds.values() if isinstance(value, Tensor)]
            row = _hung_on(row, cut_off)
        return row, {position: inputs[position] for position in layout.deferred}

    def _differentiable(self, position: int) -> bool:
        """Whether gradients flow through a component: those outside of the sum would send 0 × inf = NaN."""
        return not self.do_weighted_sum or bool(self._layout.components[position].coeff)

    def _errors(self, position: int, elements: Elements) -> Tensor:
        entry = self._layout.components[position]
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
            prediction, reference = pairs[key] = _check_pair(reading.modifier(preds, target), reading.modifier)
            check_same_shape(prediction, reference, f"Field {str(reading.modifier)!r}")
            if not prediction.dim():
                raise ValueError(
                    f"Field {str(reading.modifier)!r} is a scalar; expected one row per graph, node or edge."
                )
        return Elements.read(
            *pairs[key], ignore_nan=reading.ignore_nan, **self._grouping(reading, pairs[key][1], types)
        )

    def _grouping(self, reading: Reading, reference: Tensor, types: Tensor | None) -> dict[str, Any]:
        """What :class:`Elements` needs to know of atom types."""
        if not reading.per_type:
            return {}
        row_types = cast(Tensor, types)
        if row_types.shape != reference.shape[:1]:
            raise ValueError(
                f"Field {str(reading.modifier)!r} has shape {list(reference.shape)}, but {ATOM_TYPES!r} has shape "
                f"{list(row_types.shape)}; expected one type for each row."
            )
        return {"types": row_types, "num_groups": len(self.type_names)}

    def _read_types(self, preds: Batch, target: Batch) -> Tensor:
        types = (target[ATOM_TYPES] if ATOM_TYPES in target else get_field(preds, ATOM_TYPES, "target")).reshape(-1)
        # the one look at data, in the first step only: it makes the host wait
        if not self._checked_types and not torch.compiler.is_compiling():
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

    # --- a step of several micro-batches ---

    def check_accumulation(self) -> None:
        """Refuse components of the weighted sum whose gradient micro-batches do not make up, see
        :mod:`harness.metrics.accumulation`.

        Raises:
            ValueError: a component with a coefficient whose value is not linear in a sum of errors, or whose modifier
                does not say what it reads from the target alone.
        """
        if not self.do_weighted_sum:
            raise ValueError("No component has a coefficient, so there is no gradient to accumulate.")
        for entry in self.entries.values():
            if entry.name not in self.ever_weighted:
                continue
            metric, where = entry.metric, f"Component {entry.name!r} has the coefficient {entry.given_coeff}, but"
            if not isinstance(metric, ErrorMetric) or not is_linear(metric):
                raise ValueError(
                    f"{where} {_why_not_linear(metric)}, so that gradients of micro-batches do not add up to that of "
                    f"the batch that they make up. Instead: a mean of errors such as MeanSquaredError; a coefficient "
                    f"of null for {entry.name!r}, which is then reported but not in the loss; or "
                    f"accumulate_grad_batches=1 with a larger batch."
                )
            if not callable(getattr(entry.field, "target_of", None)):
                raise ValueError(
                    f"{where} its modifier {entry.field} of type {type(entry.field).__name__} has no method "
                    f"`target_of`. To accumulate gradients, the number of elements must be known before there are "
                    f"predictions: add `def target_of(self, target)` that returns the target as the call returns it "
                    f"second."
                )
        self._checked_accumulation = self.ever_weighted

    def window(self, targets: Sequence[Batch]) -> Window:
        """The micro-batches that make up a step, from the targets of all of them, before the first backward pass.

        Hand it to :func:`step_together` with each micro-batch. All ranks make one at the same time, of as many
        micro-batches; these may be empty on some ranks.

        Args:
            targets: labels of each micro-batch of this rank by field name, with ``atom_types`` and ``num_atoms`` where
                a component needs them.

        Raises:
            ValueError: see :meth:`check_accumulation`; or there are no targets.
            KeyError: a field is missing.
        """
        if self._checked_accumulation is None:
            self.check_accumulation()
        if not targets:
            raise ValueError("A window needs the targets of at least one micro-batch, found none.")
        counts = self.count(targets[0])
        for target in targets[1:]:
            counts = counts + self.count(target)
        return Window(self._layout, counts, len(targets), self._ordered_coeffs)

    def count(self, target: Batch) -> Tensor:
        """Number of elements of each component of the weighted sum, by type if it is per type: float64 ``[num_slots]``.

        It is that of :meth:`measure`, without predictions. Slots of components outside of the weighted sum are 0.
        """
        layout = self._layout
        counts: dict[int, Tensor] = {}
        types: Tensor | None = None
        for reading in layout.readings:
            weighted = [at for at in reading.positions if at < layout.num_sums and layout.components[at].coeff]
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
            else torch.zeros(layout.groups(entry), dtype=torch.float64, device=device)
            for position, entry in enumerate(layout.components[: layout.num_sums])
        ]
        return Row.of(pieces, [], device).additive

    @property
    def _ordered_coeffs(self) -> tuple[float | None, ...]:
        return *(entry.coeff for entry in self._layout.components), *self._layout.type_weights

    def _part_of(self, window: Window, row: Row) -> tuple[Tensor, Tensor]:
        """What a micro-batch contributes to the window's reported values and weighted sum; differentiable."""
        evaluated = self._layout.evaluate(row, {}, window.counts)
        return evaluated.reported, self._weighted_sum(evaluated, self._coeffs_on(evaluated.components.device))

    def _check_window(self, window: Window) -> None:
        """The one look at what came of a window, at the end of the first: it makes the host wait."""
        if self._checked_window or torch.compiler.is_compiling():
            return
        surprises = window.surprises()
        if surprises:
            raise ValueError(
                f"The micro-batches of a step had other elements than their targets had announced: "
                f"{'; '.join(surprises)}. Does a hook change labels after the data loader has handed them over, or "
                f"were these the targets of other micro-batches?"
            )
        self._checked_window = True

    def undo_step(self) -> None:
        """Take the last step out of what has been accumulated, such as one that was not trained on.

        That is the last batch, or all micro-batches of the last :meth:`window`. Metrics of others that do not merge
        keep it.
        """
        self._local, self._merged = self._before_step

    def _accumulate(self, row: Row, merged: bool, begins: bool) -> None:
        row = row.detach()
        if begins:
            self._before_step = self._local, self._merged
        if merged:
            self._merged = row if self._merged is None else row.merge(self._merged)
        else:
            self._local = row if self._local is None else row.merge(self._local)

    @property
    def _wants_sync(self) -> bool:
        # NequIP's module asks through the metrics
        return self.sync_on_step or any(entry.metric.dist_sync_on_step for entry in self.entries.values())

    # --- evaluation ---

    def evaluate(self, row: Row, deferred: Mapping[int, list[Tensor | None]] | None = None) -> Values:
        """Every component, per-type value and the weighted sum from a row; differentiable.

        Args:
            row: statistics in this manager's layout.
            deferred: values of the components that are not in the row, one for each group; None where unknown.
        """
        layout, evaluated = self._layout, self._layout.evaluate(row, deferred or {})
        coeffs = self._coeffs_on(evaluated.components.device) if self.do_weighted_sum else None
        return Values(
            layout.names,
            layout.order,
            evaluated.reported,
            None if coeffs is None else self._weighted_sum(evaluated, coeffs),
            evaluated.has_data,
            coeffs,
            self._weighted,
            evaluated.counts,
            layout.counted,
        )

    def _weighted_sum(self, evaluated: Evaluated, coeffs: Tensor) -> Tensor:
        terms = evaluated.components
        if not self._everything_contributes:
            known = self._coefficients_on(terms.device)
            terms = torch.where(known.contributes, terms, known.zero)
        return torch.dot(coeffs, terms)

    def _coeffs_on(self, device: torch.device) -> Tensor:
        """Normalised coefficients on a device: what was given or scheduled, and then learnt."""
        coeffs = self._coefficients_on(device).coeffs
        return coeffs if self.weighting is None else self.weighting(coeffs)

    def _coefficients_on(self, device: torch.device) -> _Coefficients:
        if device not in self._coefficients:
            coeffs = to_device([entry.coeff or 0.0 for entry in self._layout.components], device)
            with torch.inference_mode(False):  # they outlive this step, and training saves them for backward
                zero = torch.zeros((), dtype=torch.float64, device=device)
                self._coefficients[device] = _Coefficients(coeffs, coeffs > 0, zero)
        return self._coefficients[device]

    def compute(self, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        """Values over everything accumulated on all ranks since the last :meth:`reset`, as :meth:`forward` names them.

        All ranks must call it: it merges what has not been merged yet.
        """
        (values,) = compute_together([self])
        return values.as_dict(prefix, suffix)

    def so_far(self) -> Values:
        """Values over what has been merged over the ranks since the last :meth:`reset`, as every training step is.

        Nothing is sent, so that one rank may ask alone. Metrics of others that do not merge are NaN.
        """
        with torch.no_grad():
            return self.evaluate(self._merged or self._layout.neutral())

    def reset(self) -> None:
        """Forget everything accumulated."""
        self._local = self._merged = None
        self._before_step = (None, None)
        for metric in self._deferred_metrics:
            metric.reset()

    @property
    def _deferred_metrics(self) -> list[DeferredMetric]:
        return [metric for metrics in self._layout.deferred.values() for metric in metrics]

    # --- checkpoints ---

    def get_extra_state(self) -> dict[str, Any]:
        """Coefficients and the row accumulated so far: tensors, numbers and strings only.

        On several ranks, call :func:`merge_accumulated` on all of them first: then every rank holds the same state,
        which any number of ranks may load.
        """
        row = self._layout.neutral()
        for part in (self._merged, self._local):
            row = row if part is None else row.merge(part)
        return {
            "layout": list(self._layout.description),
            "coeffs": self._coeffs.state(),
            "additive": row.additive,
            "maxima": row.maxima,
            "deferred": [[*metric.past, *filter(None, [metric.local_part()])] for metric in self._deferred_metrics],
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
        self._coeffs.restore(state["coeffs"])
        self._coefficients_changed()
        accumulated = Row(state["additive"].cpu(), state["maxima"].cpu())
        if list(state["layout"]) != self._layout.description:
            if bool((accumulated.additive != 0).any()):
                warnings.warn(
                    f"The checkpoint's epoch was accumulated for other components: {list(state['layout'])}; these are "
                    f"{self._layout.description}. The epoch in progress starts anew, later ones are not affected.",
                    stacklevel=2,
                )
            return
        self._merged = accumulated
        for metric, parts in zip(self._deferred_metrics, state["deferred"], strict=True):
            metric.past = list(parts)

    def _warn_of_types_without_data(self, values: Values) -> None:
        if self._warned_types or not any(entry.per_type for entry in self.entries.values()):
            return
        present = dict(zip(values.names, values.has_data.tolist(), strict=True))
        type_keys = [key for entry in self.entries.values() for key in entry.type_keys(self.type_names)]
        missing = [key for key in type_keys if not present[key]]
        if missing and any(present.values()):
            self._warned_types = True
            if rank_in_group(self.process_group) == 0:
                warnings.warn(
                    f"No data in the whole epoch for {', '.join(missing)}: NaN there, and left out of the averages.",
                    stacklevel=3,
                )

    def extra_repr(self) -> str:
        """Components with their coefficients."""
        return "\n".join(f"{entry.describe()}, coeff={entry.coeff}" for entry in self.entries.values())


def step_together(
    loss: MetricsManager,
    *monitors: MetricsManager,
    preds: Batch,
    target: Batch,
    window: Window | None = None,
    signals: Tensor | None = None,
) -> tuple[Values, ...]:
    """Compute and accumulate a batch in several managers over one merge: the loss, and metrics that only watch.

    Gradients flow through the first manager only. The others see detached predictions.

    With a ``window``, the batch is one of the micro-batches that make up a step. Values are then those of its
    micro-batches so far, in the end those of the whole; the gradients of ``weighted_sum`` and of each component are
    this micro-batch's parts of those of the whole, and the parts are to be added, not averaged. The window's counts
    travel with the first merge.

    Args:
        loss: the manager that gradients flow through, if they do.
        monitors: managers without gradients.
        preds: predictions by field name.
        target: labels by field name.
        window: what :meth:`MetricsManager.window` of the loss has made of the targets of all micro-batches of the step.
        signals: numbers of this rank, ``[num_signals]`` float64, that travel with the rows; they are replaced by their
            sums over the ranks where the rows are merged.

    Returns:
        Values of each manager.

    Raises:
        ValueError: the window is not one of this loss, is complete already, or was made of other targets.
    """
    managers = (loss, *monitors)
    if window is not None:
        window.begin(loss._layout, loss._ordered_coeffs)
    measured = [loss._measure(preds, target)]
    if monitors:
        watched = detached(preds)
        with torch.no_grad():
            measured += [manager._measure(watched, target) for manager in monitors]
    rows = [row for row, _ in measured]
    merged = rows[0].requires_grad or window is not None or any(manager._wants_sync for manager in managers)
    num_ranks = data_parallel_size(loss.process_group)
    if merged:
        if num_ranks > 1:
            _refuse_deferred_loss(loss, rows[0])
        announced = [] if window is None or window.is_merged else [window.announcement()]
        told = [] if signals is None else [Row.of([signals], [], signals.device)]
        rows = merge_rows_over_ranks([*rows, *announced, *told], loss.process_group)
        if signals is not None:
            signals.copy_(rows.pop().additive.detach())
        if window is not None and announced:
            window.merged(rows.pop())
    # what does not merge is known of a batch on one rank only, not of several together
    alone = (not merged or num_ranks == 1) and (window is None or window.num_micro_batches == 1)
    values = []
    for position, (manager, row, (_, deferred_inputs)) in enumerate(zip(managers, rows, measured, strict=True)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and manager is loss):
            deferred = {
                index: [
                    metric.update(group_inputs, local_value=alone, device=row.additive.device)
                    for metric, group_inputs in zip(manager._layout.deferred[index], inputs, strict=True)
                ]
                for index, inputs in deferred_inputs.items()
            }
            if window is None:
                current = manager.evaluate(row, deferred)
            else:
                current = manager.evaluate(window.add(position, row), deferred)
                if manager is loss and current.weighted_sum is not None:
                    components, part = loss._part_of(window, row)  # give the gradient, and add exactly zero
                    zeros = torch.where(components.isfinite(), components - components.detach(), 0.0)
                    current = replace(
                        current,
                        reported=current.reported + zeros,
                        weighted_sum=current.weighted_sum + (part - part.detach()),
                    )
        manager._last_step = current.detach()
        manager._accumulate(row, merged, begins=window is None or window.num_done == 1)
        values.append(current)
    if window is not None and window.is_complete:
        loss._check_window(window)
    return tuple(values)


def compute_together(managers: Sequence[MetricsManager]) -> list[Values]:
    """Values of several managers over everything accumulated on all ranks, over one merge; all ranks must call it."""
    if not managers:
        return []
    group = managers[0].process_group
    locals_ = merge_rows_over_ranks([manager._local or manager._layout.neutral() for manager in managers], group)
    parts = _gather_deferred(managers, group)
    results = []
    for manager, row in zip(managers, locals_, strict=True):
        total = row if manager._merged is None else row.merge(manager._merged)
        deferred = {
            index: [metric.value(parts.pop(0), total.additive.device) for metric in metrics]
            for index, metrics in manager._layout.deferred.items()
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
    rows = merge_rows_over_ranks([manager._local or manager._layout.neutral() for manager in managers], group)
    parts = _gather_deferred(managers, group)
    for manager, row in zip(managers, rows, strict=True):
        manager._merged = row if manager._merged is None else row.merge(manager._merged)
        manager._local = None
        for metric in manager._deferred_metrics:
            metric.past += parts.pop(0)
            metric.metric.reset()


def _gather_deferred(managers: Sequence[MetricsManager], group: ProcessGroup | None) -> list[list[Part]]:
    """Stretches of every deferred metric of every manager, from all ranks; no collective if there is none."""
    mine = [metric.local_part() for manager in managers for metric in manager._deferred_metrics]
    if not mine:
        return []
    gathered = gather_objects(mine, group)
    return [[part for part in parts if part is not None] for parts in zip(*gathered, strict=True)]


def _refuse_deferred_loss(loss: MetricsManager, row: Row) -> None:
    if not row.requires_grad:
        return
    for position, metrics in loss._layout.deferred.items():
        entry = loss._layout.components[position]
        if entry.coeff is not None:
            raise ValueError(
                f"Component {entry.name!r} has the coefficient {entry.given_coeff} in a loss on several ranks, but "
                f"{type(entry.metric).__name__} cannot be merged over ranks within a step: {metrics[0].reason}. "
                f"Set its coefficient to null, or train on one rank."
            )


def _why_not_linear(metric: Metric) -> str:
    """Why parts of a batch do not add up to the metric's value."""
    name = type(metric).__name__
    if not isinstance(metric, ErrorMetric):
        return f"{name} of torchmetrics does not say how it depends on its sums"
    if metric.kind == "maximum":
        return f"{name} is a maximum, which one of the micro-batches holds"
    if metric.linear_in_sum:
        return f"the value of {name} is not a multiple of its sum of errors, although declared so (linear_in_sum)"
    return (
        f"the value of {name} is not known to be a multiple of its sum of errors, as a mean is and a root is not "
        f"(declare linear_in_sum = True on a metric of your own where it is)"
    )


_DeferredInputs = dict[int, list[Any]]
"""Inputs of each deferred component by group; None for a group without data."""
_UNSET = torch.empty(0)


def _hung_on(row: Row, predictions: Sequence[Tensor]) -> Row:
    """The row plus zeros that hang on predictions, so that these get a gradient of exactly 0 instead of none.

    DDP waits for a gradient of every parameter, also of those that only a component outside of the sum depends on.
    """
    zeros = [each.reshape(-1)[:0].sum(dtype=torch.float64) for each in predictions if each.requires_grad]
    return Row(row.additive + sum(zeros), row.maxima) if zeros else row


def _check_pair(pair: object, modifier: object) -> tuple[Tensor, Tensor]:
    """What a modifier returned, if it is a prediction and a target that can be subtracted."""
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
