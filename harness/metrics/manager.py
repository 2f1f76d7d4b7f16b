r"""Many components in one row: :class:`MetricsManager`, the loss and the metrics of a training.

A step reads each distinct field once, measures one local row, merges it over the ranks, evaluates every component,
per-type value and the weighted sum from the merged row, and keeps the row for the epoch. The end of an epoch is the
same evaluation of the accumulated row. Behind a :meth:`MetricsManager.window` the gradient needs no merged row, which
is then not waited for, see :mod:`harness.metrics.running`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.distributed import ProcessGroup, data_parallel_size, gather_objects, max_over_ranks, rank_in_group
from harness.fields import Batch
from harness.metrics.accumulation import Window, check_linear
from harness.metrics.adapters import GatheredAdapter, Part, detached
from harness.metrics.coefficients import Coefficients, Normalisation, WeightedComponents
from harness.metrics.components import WEIGHTED_SUM, parse_entries
from harness.metrics.errors import ErrorMetric
from harness.metrics.layout import GatheredValues, Layout
from harness.metrics.measure import AdapterInputs, BatchReader
from harness.metrics.row import MergingRows, Row, merge_rows_over_ranks
from harness.metrics.running import EpochRow, RunningStep, Share
from harness.metrics.splits import DataNames
from harness.metrics.values import NamedValues, Values
from harness.schedules import Interval, Schedule, check_interval

__all__ = ["MetricsManager", "begin_step", "compute_together", "merge_accumulated", "step_together"]


class MetricsManager(WeightedComponents):
    r"""Losses and error metrics as managed components of one weighted sum.

    Each component reads a field of predictions and target and reduces an error over it, for all atoms or by atom type.
    The manager is a mapping from names to metrics, its coefficients are those of :class:`WeightedComponents
    <harness.metrics.coefficients.WeightedComponents>`, and it keeps the row of the epoch.
    With the coefficients :math:`c_k` (normalised to :math:`\sum_k c_k = 1`, or as given) and the values :math:`v_k`

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
            * ``ignore_nan``: leave out elements whose target is NaN; default: True for fields that are registered as
              labels that may be missing, and False for others.
            * ``weights``: a frame of weight w counts as w frames (true, by default), w times in the sum alone
              (``in_sums``), or once (false).
            * ``sets``: names of the data sets whose frames count; all that have the label if not given.
            * ``per_set``, ``per_group``: one value for each set or group of frames beside that of the whole, reported
              as ``{name}@{set}`` and ``{name}@{group}``.
            * ``per_set_coeffs``: ``{set: weight}``; the component is the weighted mean of its values of the sets.
        type_names: names of the atom types, in the order of the indices in ``atom_types``; needed by ``per_type``.
        group_names: names of the groups of frames, in the order of ``group_index``; needed by ``per_group``.
        set_names: names of the data sets, in the order of ``set_index``; needed by ``sets`` and ``per_set``.
        labelled_sets: names of the sets that have a label, by its field. Frames of the other sets are left out of the
            components that compare with it.
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`; those that it does not name stay as given.
        schedule_interval: how often a training moves on along the schedule: at the start of every ``epoch``, or at
            every ``step``, with fractions of epochs.
        coefficients: ``normalised``: coefficients are divided by their sum. ``as_given``: the weighted sum is the plain
            sum of coefficient × value.
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
        group_names: Sequence[str] | None = None,
        set_names: Sequence[str] | None = None,
        labelled_sets: Mapping[str, Collection[str]] | None = None,
        schedule: Schedule | None = None,
        schedule_interval: Interval = "epoch",
        coefficients: Normalisation = "normalised",
        sync_on_step: bool = False,
    ) -> None:
        names = DataNames.of(type_names, group_names, set_names, labelled_sets)
        if not isinstance(sync_on_step, bool):
            raise TypeError(f"`sync_on_step` is true or false, found {sync_on_step!r}.")
        components = parse_entries(metrics, names)
        layout = Layout(list(components.values()), names)
        super().__init__(components, layout.components, names.types, coefficients)
        self.names = names
        self.sync_on_step = sync_on_step
        self.process_group: ProcessGroup | None = None
        """The ranks that share a batch, if a strategy splits the world; None for all."""
        self._metrics = nn.ModuleList(entry.metric for entry in components.values())
        self._layout = layout
        self._reader = BatchReader(layout.components, layout.merged, names)
        check_interval(schedule_interval, "`schedule_interval`")
        if schedule is not None:
            self.follow(schedule, schedule_interval)
        self._epoch = EpochRow()
        self._last_epoch: Values | None = None
        self._checked_accumulation: set[str] | None = None  # components that gradients may be accumulated of
        self._announces: tuple[set[str], bool] = (set(), False)  # weighted components, and if they can be counted
        self._checked_window = False
        self._warned_types = False

    @property
    def metrics_values_step(self) -> dict[str, float | None]:
        """Every component of the last step; read on access, since it makes the host wait for the device."""
        return _by_component(self._last_step, self.keys())

    @property
    def _last_step(self) -> Values | None:
        if self._epoch.last_step is None:
            return None
        step, position = self._epoch.last_step
        return step.value(position).detach()

    @property
    def metrics_values_epoch(self) -> dict[str, float | None]:
        """Every component of the last :meth:`compute`."""
        return _by_component(self._last_epoch, self.keys())

    @property
    def value_names(self) -> list[str]:
        """Names of everything that is reported: components, per-type values, and the weighted sum if there is one."""
        names = [self._layout.names[index] for index in self._layout.order]
        return [*names, WEIGHTED_SUM] if self.do_weighted_sum else names

    def keep_by_group(self) -> None:
        """Keep the errors of every component by group too, and count the frames of each group, for tables.

        Without groups nothing changes.
        Metrics of other packages are kept by group only where ``per_group`` asks for it, since each group costs an
        update of its own. Names of values do not change. A group whose frames all have weight 0 has the values of
        these, each counted once, where other values leave them out.

        Raises:
            RuntimeError: a batch has been accumulated.
        """
        own = {name: entry for name, entry in self._components.items() if isinstance(entry.metric, ErrorMetric)}
        is_split = bool(own) or any(split.by == "group" for each in self._components.values() for split in each.splits)
        if not self.names.groups or not is_split or self._layout.num_counted_groups:
            return
        if not self._epoch.is_empty:
            raise RuntimeError("Errors are kept by group from the first batch of an epoch on: call reset() before.")
        for name, entry in own.items():
            others = [split for split in entry.splits if split.by != "group"]
            by_group = self.names.split_by_group(name, is_shown=len(others) < len(entry.splits))
            by_group = replace(by_group, counts_weightless=entry.weights == "everywhere")
            self._components[name] = replace(entry, splits=(*others, by_group))
        layout = self._layout = Layout(list(self._components.values()), self.names, counts_frames=True)
        self._reader = BatchReader(layout.components, layout.merged, self.names, layout.num_counted_groups)
        self.order_as(self._layout.components)

    # --- a step ---

    def forward(self, preds: Batch, target: Batch, prefix: str = "", suffix: str = "") -> NamedValues:
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
            coefficient: float64 scalars by name, a dictionary that makes them when they are asked for.

        Raises:
            KeyError: a field is missing.
            ValueError: prediction and target differ in shape, or an atom type is out of range.
        """
        (values,) = step_together(self, preds=preds, target=target)
        return values.by_name(prefix, suffix)

    def measure(self, preds: Batch, target: Batch) -> Row:
        """Local row of a batch; differentiable, nothing is kept or sent."""
        return self._reader.measure(preds, target, self.coefficients)[0]

    def count(self, target: Batch) -> Tensor:
        """Number of elements of each component of the weighted sum, by type if it is per type: float64 ``[num_slots]``.

        It is that of :meth:`measure`, without predictions. Slots of components outside of the weighted sum are 0.
        """
        return self._reader.count(target, self.coefficients)

    def counted_rows(self, name: str, target: Batch, reference: Tensor) -> Tensor | None:
        """Mask of the rows of a component's field whose frames count by their set and weight; None if all do.

        Args:
            name: of the component, which has a field.
            target: labels by field name.
            reference: the label of the field, ``[rows, ...]``.
        """
        return self._reader.counted_rows(self._components[name], target, reference)

    # --- a step of several micro-batches ---

    def check_accumulation(self) -> None:
        """Refuse components of the weighted sum whose gradients in micro-batches do not add up to that of the whole.

        See :mod:`harness.metrics.accumulation`.

        Raises:
            ValueError: a component with a coefficient whose value is not linear in a sum of errors, or whose modifier
                has no ``target_of`` that reads the target alone.
        """
        if not self.do_weighted_sum:
            raise ValueError("No component has a coefficient, so there is no gradient to accumulate.")
        check_linear(self._components.values(), self.ever_weighted, self.given_coeffs)
        self._checked_accumulation = self.ever_weighted

    def announces(self, target: Batch) -> bool:
        """Answer if a step of one batch can be a :meth:`window` of its targets; all ranks must call it.

        True on several ranks, for a loss whose gradients in micro-batches add up, see :meth:`check_accumulation`, and
        targets with all that its elements are counted by, on every rank. The ranks are asked once: what a schedule
        moves changes nothing.
        """
        if self._announces[0] != self.ever_weighted:
            counts = data_parallel_size(self.process_group) > 1
            if counts:
                try:
                    self.check_accumulation()
                    self.count(target)
                except (KeyError, TypeError, ValueError):  # with a better message where the batch is measured
                    counts = False
                unable = torch.tensor([float(not counts)], dtype=torch.float64)
                counts = not bool(max_over_ranks(unable, self.process_group))
            self._announces = self.ever_weighted, counts
        return self._announces[1]

    def window(self, targets: Sequence[Batch] | None = None) -> Window:
        """Accumulation window of a step, from the targets of all its micro-batches, before the first forward pass.

        Hand it to :func:`step_together` with each micro-batch. All ranks make one at the same time, of as many
        micro-batches; these may be empty on some ranks. The number of elements of all ranks is on its way from then on,
        in an all-reduce that is not waited for before the first micro-batch is measured.

        Args:
            targets: labels of each micro-batch of this rank by field name, with ``atom_types`` and ``num_atoms`` where
                a component needs them. None for an ordinary step, of one batch whose elements are not counted before.

        Raises:
            ValueError: see :meth:`check_accumulation`; or there are no targets.
            KeyError: a field is missing.
        """
        self._epoch.settle()
        if targets is None:
            return Window(self._layout, self.coefficients)
        if self._checked_accumulation != self.ever_weighted:  # a schedule moves within what has been checked
            self.check_accumulation()
        if not targets:
            raise ValueError("A window needs the targets of at least one micro-batch, found none.")
        return Window(self._layout, self.coefficients, list(map(self.count, targets)), self.process_group)

    def undo_step(self) -> None:
        """Take the last step out of what has been accumulated, such as one that was not trained on.

        That is the last batch, or all micro-batches of the last :meth:`window`. Metrics that are gathered at the end of
        an epoch keep it.
        """
        self._epoch.undo_step()

    @property
    def _wants_sync(self) -> bool:
        # NequIP's module asks through the metrics
        return self.sync_on_step or any(metric.dist_sync_on_step for metric in self._metrics)

    # --- evaluation ---

    def evaluate(self, row: Row, gathered: GatheredValues | None = None) -> Values:
        """Every component, per-type value and the weighted sum from a row; differentiable.

        Args:
            row: statistics in this manager's layout.
            gathered: values of the components that are not in the row, by position, one for each group; None where
                unknown.
        """
        coeffs = self.coeffs_on(row.additive.device) if self.do_weighted_sum else None
        return self._evaluate(self.coefficients, coeffs, gathered or {}, row)

    def _evaluate(
        self,
        coefficients: Coefficients,
        coeffs: Tensor | None,
        gathered: GatheredValues,
        row: Row,
        counts: Tensor | None = None,
    ) -> Values:
        """Values of a row with the coefficients of some moment, and with other counts than its own if given."""
        layout, evaluated = self._layout, self._layout.evaluate(row, coefficients, gathered, counts)
        return Values(
            layout.names,
            layout.order,
            evaluated,
            None if coeffs is None else coefficients.weighted_sum(evaluated.components, coeffs),
            coeffs,
            coefficients.weighted,
            layout.counted,
            layout.by_group,
            layout.frames_by_group(row),
        )

    def compute(self, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        """Values over everything accumulated on all ranks since the last :meth:`reset`, as :meth:`forward` names them.

        All ranks must call it: it merges what has not been merged yet.
        """
        (values,) = compute_together([self])
        return values.as_dict(prefix, suffix)

    def so_far(self) -> Values:
        """Values over what has been merged over the ranks since the last :meth:`reset`, as every training step is.

        Nothing is sent, so that one rank may call it alone. Metrics that are gathered at the end of an epoch are NaN.
        """
        with torch.no_grad():
            return self.evaluate(self._epoch.merged or self._layout.neutral())

    def reset(self) -> None:
        """Drop everything accumulated."""
        self._epoch.replace()
        for adapter in self._gathered_adapters:
            adapter.reset()

    def _update_gathered(
        self, inputs: AdapterInputs, device: torch.device, is_alone: bool, has_graph: bool
    ) -> dict[int, list[Tensor | None]]:
        """Add a batch to the metrics that are gathered at the end of an epoch.

        Args:
            inputs: of a batch, by position and slot.
            device: of the states.
            is_alone: this rank's batch is all of the step, whose values are then known.
            has_graph: values are differentiable where gradients are.

        Returns:
            Values of the step, None where they are not known.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_graph):
            return {
                index: [
                    adapter.update(of_group, local_value=is_alone, device=device)
                    for adapter, of_group in zip(self._layout.gathered[index], groups, strict=True)
                ]
                for index, groups in inputs.items()
            }

    @property
    def _gathered_adapters(self) -> list[GatheredAdapter]:
        return [adapter for adapters in self._layout.gathered.values() for adapter in adapters]

    # --- checkpoints ---

    def get_extra_state(self) -> dict[str, Any]:
        """Coefficients and the row accumulated so far: tensors, numbers and strings only.

        On several ranks, call :func:`merge_accumulated` on all of them first: then every rank holds the same state,
        which any number of ranks may load.
        """
        row = self._layout.neutral()
        for part in (self._epoch.merged, self._epoch.local):
            row = row if part is None else row.merge(part)
        return {
            "layout": list(self._layout.description),
            "coeffs": self._coefficient_state(),
            "additive": row.additive,
            "maxima": row.maxima,
            # the key of version 0.1.0, whose checkpoints go on
            "deferred": [[*adapter.past, *filter(None, [adapter.local_part()])] for adapter in self._gathered_adapters],
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
        self._restore_coefficients(state["coeffs"])
        accumulated = Row(state["additive"].cpu(), state["maxima"].cpu())
        if list(state["layout"]) != self._layout.description:
            if bool((accumulated.additive != 0).any()):
                warnings.warn(
                    f"The checkpoint's epoch was accumulated for other components: {list(state['layout'])}; these are "
                    f"{self._layout.description}. The epoch in progress starts anew, later ones are not affected.",
                    stacklevel=2,
                )
            return
        self._epoch.replace(accumulated)
        for adapter, parts in zip(self._gathered_adapters, state["deferred"], strict=True):
            adapter.past = list(parts)

    def _warn_of_types_without_data(self, values: Values) -> None:
        if self._warned_types or not any(entry.per_type for entry in self._components.values()):
            return
        present = dict(zip(values.names, values.has_data.tolist(), strict=True))
        type_keys = [key for entry in self._components.values() for key in entry.type_keys(self.type_names)]
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


def begin_step(
    loss: MetricsManager,
    *monitors: MetricsManager,
    preds: Batch,
    target: Batch,
    window: Window | None = None,
    signals: Tensor | None = None,
) -> RunningStep:
    """Begin a step of several managers over one merge, as :func:`step_together` makes one.

    In a window with announced counts, backward of :attr:`RunningStep.own` needs no other rank's row: the rows are sent,
    and whoever reads the values of all ranks waits for them. Otherwise they are merged at once.

    Args:
        loss: the manager that gradients flow through, if they do.
        monitors: managers without gradients.
        preds: predictions by field name.
        target: labels by field name.
        window: accumulation window, made by :meth:`MetricsManager.window` of the loss; None for a step of one batch.
        signals: numbers of this rank, float64 ``[num_signals]``, summed over the ranks where the rows are merged, in
            the same all-reduce: :meth:`RunningStep.signals`.

    Raises:
        ValueError: the window is not one of this loss, is complete already, or was made of other targets.
    """
    managers = (loss, *monitors)
    window = loss.window() if window is None else window
    window.begin(loss._layout, loss.coefficients)
    measured = [loss._reader.measure(preds, target, loss.coefficients)]
    if monitors:
        watched = detached(preds)
        with torch.no_grad():
            measured += [manager._reader.measure(watched, target, manager.coefficients) for manager in monitors]
    own = [row for row, _ in measured]
    merged = own[0].requires_grad or window.is_announced or any(manager._wants_sync for manager in managers)
    num_ranks = data_parallel_size(loss.process_group)
    if merged and num_ranks > 1:
        _refuse_gathered_loss(loss, own[0])
    sent = own if signals is None else [*own, Row.of([signals], [], signals.device)]
    rows: MergingRows | list[Row] = sent
    if window.is_announced:
        rows = MergingRows(sent, loss.process_group)
    elif merged:
        rows = merge_rows_over_ranks(sent, loss.process_group)
    # the value of a gathered metric is known for one batch on one rank only
    alone = (not merged or num_ranks == 1) and window.num_micro_batches == 1
    shares = []
    for manager, (row, inputs) in zip(managers, measured, strict=True):
        gathered = manager._update_gathered(inputs, row.additive.device, alone, manager is loss) if inputs else {}
        coeffs = manager.coeffs_on(row.additive.device) if manager.do_weighted_sum else None
        shares.append(
            Share(manager._epoch, functools.partial(manager._evaluate, manager.coefficients, coeffs, gathered))
        )
    step = RunningStep(window, shares, rows, merged, signals is not None)
    if not window.is_announced:
        step.value()  # with its graph, and with what torchmetrics keep of this batch
    else:
        step.part_is(shares[0].evaluate(own[0], window.counts))
        if window.is_complete and not (loss._checked_window or torch.compiler.is_compiling()):
            step.settle()
            window.check()  # of the first window only: it makes the host wait
            loss._checked_window = True
    return step


def step_together(
    loss: MetricsManager,
    *monitors: MetricsManager,
    preds: Batch,
    target: Batch,
    window: Window | None = None,
) -> tuple[Values, ...]:
    """Compute and accumulate a batch in several managers over one merge: the loss, and metrics that only watch.

    Gradients flow through the first manager only. The others see detached predictions.

    In an accumulation ``window`` of several micro-batches, the batch is one of them. Values are then those of its
    micro-batches so far, in the end those of the whole; the gradients of ``weighted_sum`` and of each component are
    this micro-batch's parts of those of the whole, and the parts are to be added, not averaged.

    Args:
        loss: the manager that gradients flow through, if they do.
        monitors: managers without gradients.
        preds: predictions by field name.
        target: labels by field name.
        window: accumulation window, made by :meth:`MetricsManager.window` of the loss; None for a step of one batch.

    Returns:
        Values of each manager.

    Raises:
        ValueError: the window is not one of this loss, is complete already, or was made of other targets.
    """
    step = begin_step(loss, *monitors, preds=preds, target=target, window=window)
    values = step.values()
    step.release()
    return values


def compute_together(managers: Sequence[MetricsManager]) -> list[Values]:
    """Values of several managers over everything accumulated on all ranks, over one merge; all ranks must call it."""
    if not managers:
        return []
    group = managers[0].process_group
    locals_ = merge_rows_over_ranks([manager._epoch.local or manager._layout.neutral() for manager in managers], group)
    parts = _gather_parts(managers, group)
    results = []
    for manager, row in zip(managers, locals_, strict=True):
        merged = manager._epoch.merged
        total = row if merged is None else row.merge(merged)
        gathered = {
            index: [adapter.value(parts.pop(0), total.additive.device) for adapter in adapters]
            for index, adapters in manager._layout.gathered.items()
        }
        with torch.no_grad():
            values = manager.evaluate(total, gathered)
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
    rows = merge_rows_over_ranks([manager._epoch.local or manager._layout.neutral() for manager in managers], group)
    parts = _gather_parts(managers, group)
    for manager, row in zip(managers, rows, strict=True):
        manager._epoch.merge_local(row)
        for adapter in manager._gathered_adapters:
            adapter.past += parts.pop(0)
            adapter.metric.reset()


def _gather_parts(managers: Sequence[MetricsManager], group: ProcessGroup | None) -> list[list[Part]]:
    """Parts of every gathered metric of every manager, from all ranks; no collective if there is none."""
    mine = [adapter.local_part() for manager in managers for adapter in manager._gathered_adapters]
    if not mine:
        return []
    gathered = gather_objects(mine, group)
    return [[part for part in parts if part is not None] for parts in zip(*gathered, strict=True)]


def _refuse_gathered_loss(loss: MetricsManager, row: Row) -> None:
    if not row.requires_grad:
        return
    for position, adapters in loss._layout.gathered.items():
        entry = loss._layout.components[position]
        if loss.coefficients.coeffs[position] is not None:
            raise ValueError(
                f"Component {entry.name!r} has the coefficient {loss.given_coeffs[entry.name]} in a loss on several "
                f"ranks, but {type(entry.metric).__name__} cannot be merged over ranks within a step: "
                f"{adapters[0].reason}. Set its coefficient to null, or train on one rank."
            )


def _by_component(values: Values | None, names: Sequence[str]) -> dict[str, float | None]:
    if values is None:
        return dict.fromkeys(names)
    numbers = values.to_host()
    return {name: numbers[name] for name in names}
