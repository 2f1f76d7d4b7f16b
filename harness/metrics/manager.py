r"""Many components in one row: :class:`MetricsManager`, the loss and the metrics of a training.

A step reads each distinct field once, measures one local row, merges it over the ranks, evaluates every component,
per-type value and the weighted sum from the merged row, and keeps the row for the epoch. The end of an epoch is the
same evaluation of the accumulated row. Behind a :meth:`MetricsManager.window` the gradient needs no merged row, which
is then not waited for, see :mod:`harness.metrics.running`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.distributed import data_parallel_size, max_over_ranks
from harness.fields import Batch
from harness.metrics.accumulation import Window, check_linear
from harness.metrics.coefficients import Normalisation
from harness.metrics.components import WEIGHTED_SUM
from harness.metrics.measured import MeasuredComponents
from harness.metrics.splits import DataNames
from harness.metrics.together import compute_together, step_together
from harness.metrics.values import NamedValues, Values
from harness.schedules import Interval, Schedule, check_interval

__all__ = ["MetricsManager"]


class MetricsManager(MeasuredComponents):
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
        super().__init__(metrics, names, coefficients, sync_on_step)
        check_interval(schedule_interval, "`schedule_interval`")
        if schedule is not None:
            self.follow(schedule, schedule_interval)
        self._checked_accumulation: set[str] | None = None  # components that gradients may be accumulated of
        self._announces: tuple[set[str], bool] = (set(), False)  # weighted components, and if they can be counted

    # --- a step, and an epoch ---

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

    def compute(self, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        """Values over everything accumulated on all ranks since the last :meth:`reset`, as :meth:`forward` names them.

        All ranks must call it: it merges what has not been merged yet.
        """
        (values,) = compute_together([self])
        return values.as_dict(prefix, suffix)

    # --- a step whose elements are counted before its forward pass ---

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
        self.epoch_row.settle()
        if targets is None:
            return Window(self.layout, self.coefficients)
        if self._checked_accumulation != self.ever_weighted:  # a schedule moves within what has been checked
            self.check_accumulation()
        if not targets:
            raise ValueError("A window needs the targets of at least one micro-batch, found none.")
        return Window(self.layout, self.coefficients, list(map(self.count, targets)), self.process_group)

    # --- names and values for the host ---

    @property
    def metrics_values_step(self) -> dict[str, float | None]:
        """Every component of the last step; read on access, since it makes the host wait for the device."""
        return _by_component(self._last_step, self.keys())

    @property
    def _last_step(self) -> Values | None:
        if self.epoch_row.last_step is None:
            return None
        step, position = self.epoch_row.last_step
        return step.value(position).detach()

    @property
    def metrics_values_epoch(self) -> dict[str, float | None]:
        """Every component of the last :meth:`compute`."""
        return _by_component(self._last_epoch, self.keys())

    @property
    def value_names(self) -> list[str]:
        """Names of everything that is reported: components, per-type values, and the weighted sum if there is one."""
        names = [self.layout.names[index] for index in self.layout.order]
        return [*names, WEIGHTED_SUM] if self.do_weighted_sum else names

    def extra_repr(self) -> str:
        """Components with their coefficients."""
        return "\n".join(f"{entry.describe()}, coeff={entry.coeff}" for entry in self.entries.values())


def _by_component(values: Values | None, names: Sequence[str]) -> dict[str, float | None]:
    if values is None:
        return dict.fromkeys(names)
    numbers = values.to_host()
    return {name: numbers[name] for name in names}
