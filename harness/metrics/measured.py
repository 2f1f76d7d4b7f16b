r"""Components with a row: measured of batches, evaluated, and accumulated over an epoch.

:class:`MeasuredComponents` is what a step of several managers needs of each (:mod:`harness.metrics.together`), and all
that a checkpoint keeps of one; :class:`~harness.metrics.MetricsManager` is what users see.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.distributed import ProcessGroup, rank_in_group
from harness.fields import Batch
from harness.metrics.adapters import GatheredAdapter
from harness.metrics.coefficients import Coefficients, Normalisation, WeightedComponents
from harness.metrics.components import parse_entries
from harness.metrics.errors import ErrorMetric
from harness.metrics.layout import GatheredValues, Layout
from harness.metrics.measure import AdapterInputs, BatchReader
from harness.metrics.row import Row
from harness.metrics.running import EpochRow
from harness.metrics.splits import DataNames
from harness.metrics.values import Values

__all__ = ["MeasuredComponents"]


class MeasuredComponents(WeightedComponents):
    """Components whose batches are measured as rows, and rows evaluated.

    Args:
        metrics: a list of dictionaries, see :class:`~harness.metrics.MetricsManager`.
        names: names that indices in batches stand for.
        coefficients: ``normalised`` or ``as_given``.
        sync_on_step: merge over the ranks in every step, also where no gradients flow.

    Attributes:
        layout: order of the components in a row.
        reader: measures batches.
        epoch_row: row accumulated since the last :meth:`reset`.
        process_group: the ranks that share a batch, if a strategy splits the world; None for all.
        checked_window: the elements of a window have been compared with those that were announced.
    """

    def __init__(
        self,
        metrics: Sequence[Mapping[str, Any]],
        names: DataNames,
        coefficients: Normalisation = "normalised",
        sync_on_step: bool = False,
    ) -> None:
        components = parse_entries(metrics, names)
        layout = Layout(list(components.values()), names)
        super().__init__(components, layout.components, names.types, coefficients)
        self.names = names
        self.sync_on_step = sync_on_step
        self.process_group: ProcessGroup | None = None
        self.layout = layout
        self.reader = BatchReader(layout.components, layout.merged, names)
        self.epoch_row = EpochRow()
        self.checked_window = False
        self._metrics = nn.ModuleList(entry.metric for entry in components.values())
        self._last_epoch: Values | None = None
        self._warned_types = False

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
        if not self.names.groups or not is_split or self.layout.num_counted_groups:
            return
        if not self.epoch_row.is_empty:
            raise RuntimeError("Errors are kept by group from the first batch of an epoch on: call reset() before.")
        for name, entry in own.items():
            others = [split for split in entry.splits if split.by != "group"]
            by_group = self.names.split_by_group(name, is_shown=len(others) < len(entry.splits))
            by_group = replace(by_group, counts_weightless=entry.weights == "everywhere")
            self._components[name] = replace(entry, splits=(*others, by_group))
        layout = self.layout = Layout(list(self._components.values()), self.names, counts_frames=True)
        self.reader = BatchReader(layout.components, layout.merged, self.names, layout.num_counted_groups)
        self.order_as(self.layout.components)

    # --- batch to row, row to values ---

    def measure(self, preds: Batch, target: Batch) -> Row:
        """Local row of a batch; differentiable, nothing is kept or sent."""
        return self.reader.measure(preds, target, self.coefficients)[0]

    def count(self, target: Batch) -> Tensor:
        """Number of elements of each component of the weighted sum, by type if it is per type: float64 ``[num_slots]``.

        It is that of :meth:`measure`, without predictions. Slots of components outside of the weighted sum are 0.
        """
        return self.reader.count(target, self.coefficients)

    def counted_rows(self, name: str, target: Batch, reference: Tensor) -> Tensor | None:
        """Mask of the rows of a component's field whose frames count by their set and weight; None if all do.

        Args:
            name: of the component, which has a field.
            target: labels by field name.
            reference: the label of the field, ``[rows, ...]``.
        """
        return self.reader.counted_rows(self._components[name], target, reference)

    def evaluate(self, row: Row, gathered: GatheredValues | None = None) -> Values:
        """Every component, per-type value and the weighted sum from a row; differentiable.

        Args:
            row: statistics in this manager's layout.
            gathered: values of the components that are not in the row, by position, one for each group; None where
                unknown.
        """
        coeffs = self.coeffs_on(row.additive.device) if self.do_weighted_sum else None
        return self.evaluate_with(self.coefficients, coeffs, gathered or {}, row)

    def evaluate_with(
        self,
        coefficients: Coefficients,
        coeffs: Tensor | None,
        gathered: GatheredValues,
        row: Row,
        counts: Tensor | None = None,
    ) -> Values:
        """Values of a row with the coefficients of some moment, and with other counts than its own if given."""
        layout, evaluated = self.layout, self.layout.evaluate(row, coefficients, gathered, counts)
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

    # --- what has been accumulated ---

    def so_far(self) -> Values:
        """Values over what has been merged over the ranks since the last :meth:`reset`, as every training step is.

        Nothing is sent, so that one rank may call it alone. Metrics that are gathered at the end of an epoch are NaN.
        """
        with torch.no_grad():
            return self.evaluate(self.epoch_row.merged or self.layout.neutral())

    def reset(self) -> None:
        """Drop everything accumulated."""
        self.epoch_row.replace()
        for adapter in self.gathered_adapters:
            adapter.reset()

    def update_gathered(
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
                    for adapter, of_group in zip(self.layout.gathered[index], groups, strict=True)
                ]
                for index, groups in inputs.items()
            }

    @property
    def gathered_adapters(self) -> list[GatheredAdapter]:
        """Adapters of the metrics that are gathered at the end of an epoch."""
        return [adapter for adapters in self.layout.gathered.values() for adapter in adapters]

    def undo_step(self) -> None:
        """Take the last step out of what has been accumulated, such as one that was not trained on.

        That is the last batch, or all micro-batches of the last :meth:`window`. Metrics that are gathered at the end of
        an epoch keep it.
        """
        self.epoch_row.undo_step()

    @property
    def wants_sync(self) -> bool:
        """True if steps without gradients are merged over the ranks too; NequIP's module asks through the metrics."""
        return self.sync_on_step or any(metric.dist_sync_on_step for metric in self._metrics)

    def take_epoch(self, values: Values) -> None:
        """Keep the values of an epoch, and warn of atom types without data in it."""
        self._last_epoch = values
        self._warn_of_types_without_data(values)

    # --- checkpoints ---

    def get_extra_state(self) -> dict[str, Any]:
        """Coefficients and the row accumulated so far: tensors, numbers and strings only.

        On several ranks, call :func:`merge_accumulated` on all of them first: then every rank holds the same state,
        which any number of ranks may load.
        """
        row = self.layout.neutral()
        for part in (self.epoch_row.merged, self.epoch_row.local):
            row = row if part is None else row.merge(part)
        return {
            "layout": list(self.layout.description),
            "coeffs": self._coefficient_state(),
            "additive": row.additive,
            "maxima": row.maxima,
            # the key of version 0.1.0, whose checkpoints go on
            "deferred": [[*adapter.past, *filter(None, [adapter.local_part()])] for adapter in self.gathered_adapters],
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
        if list(state["layout"]) != self.layout.description:
            if bool((accumulated.additive != 0).any()):
                warnings.warn(
                    f"The checkpoint's epoch was accumulated for other components: {list(state['layout'])}; these are "
                    f"{self.layout.description}. The epoch in progress starts anew, later ones are not affected.",
                    stacklevel=2,
                )
            return
        self.epoch_row.replace(accumulated)
        for adapter, parts in zip(self.gathered_adapters, state["deferred"], strict=True):
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
