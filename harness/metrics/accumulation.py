r"""Gradient accumulation: micro-batches whose gradients add up to that of the one batch that they make up.

A component with sum :math:`s` and count :math:`n` whose value is linear in the sum, :math:`v(s, n) = s \cdot v(1, n)`,
is for micro-batches :math:`m = 1 \dots k` with the coefficients :math:`c_j`

.. math::
    \text{weighted\_sum} = \sum_j c_j\, v_j\Big(\sum_m s_{jm},\ n_j\Big)
    = \sum_m \underbrace{\sum_j c_j\, v_j(s_{jm}, n_j)}_{L_m}, \qquad n_j = \sum_m n_{jm}

so that the gradients of the parts :math:`L_m`, simply added, are the gradient of the whole, however unequal the
micro-batches are. The counts :math:`n_j` depend on targets alone: they are known before the first backward pass. A
mean of the micro-batches' means is another number.

An accumulation window (:class:`Window`) is the micro-batches of one step of the optimizer. An ordinary step is a window
of one, whose counts are those of its own row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from harness.metrics.coefficients import Coefficients
from harness.metrics.components import MetricEntry
from harness.metrics.errors import ErrorMetric, is_linear
from harness.metrics.layout import Layout
from harness.metrics.row import Row

__all__ = ["Window", "check_linear"]


class Window:
    """An accumulation window: the micro-batches of one step, their number of elements, and their rows so far.

    Made by :meth:`harness.metrics.MetricsManager.window`, and used up by as many calls of
    :func:`harness.metrics.step_together` as it has micro-batches.

    Args:
        layout: of the loss.
        coefficients: of the loss, which must not change before the window is complete.
        num_micro_batches: number of micro-batches.
        counts: elements of this rank in each slot of sums, known from the targets of all micro-batches: float64
            ``[num_slots]``, 0 for components outside of the weighted sum. None for a window of one, whose counts are
            those of its own row.
    """

    def __init__(
        self, layout: Layout, coefficients: Coefficients, num_micro_batches: int = 1, counts: Tensor | None = None
    ) -> None:
        self._layout = layout
        self._coefficients = coefficients
        self.counts = counts
        """Announced elements of this rank, those of all ranks from the first micro-batch on; None if not announced."""
        self.num_micro_batches = num_micro_batches
        self.num_done = 0
        """Micro-batches that came so far."""
        self.is_merged = False
        """True once ``counts`` are those of all ranks."""
        self._so_far: dict[int, Row] = {}

    @property
    def is_complete(self) -> bool:
        """True once the last micro-batch has come, and the optimizer may step."""
        return self.num_done == self.num_micro_batches

    def begin(self, layout: Layout, coefficients: Coefficients) -> None:
        """Count the next micro-batch in.

        Raises:
            ValueError: all have come already, the loss is not that which the window was made for, or its coefficients
                have changed.
        """
        if layout is not self._layout:
            raise ValueError("The window was made by another manager than the loss: make it with loss.window(targets).")
        if coefficients != self._coefficients:
            raise ValueError(
                f"The coefficients changed in the middle of a step, after {self.num_done} of its "
                f"{self.num_micro_batches} micro-batches, from {self._coefficients} to {coefficients}: the sum of "
                f"their gradients would be that of no loss. Change them between steps, where the window is complete."
            )
        if self.is_complete:
            raise ValueError(
                f"The window was made for {self.num_micro_batches} micro-batches, and all of them have come. Make one "
                f"with loss.window(targets) for each step of the optimizer, from the targets of all its micro-batches."
            )
        self.num_done += 1

    def announcement(self) -> list[Row]:
        """Rows to be merged over the ranks beside the first micro-batch's: the counts, if any are announced."""
        return [] if self.counts is None or self.is_merged else [Row.of([self.counts], [], self.counts.device)]

    def take_merged(self, announcement: Iterable[Row]) -> None:
        """Take over the counts of all ranks from the merged :meth:`announcement`."""
        for row in announcement:
            self.counts, self.is_merged = row.additive.detach(), True

    def add(self, index: int, row: Row) -> Row:
        """Row of the micro-batches so far of the manager number ``index``, this one's included.

        It has no graph, but in a window of one without announced counts, whose values are differentiable.
        """
        if self.counts is None:
            return row
        so_far = self._so_far.get(index)
        self._so_far[index] = row.detach() if so_far is None else so_far.merge(row.detach())
        return self._so_far[index]

    def check(self) -> None:
        """Compare the elements found with those that were announced; makes the host wait.

        Raises:
            ValueError: a component of the weighted sum had another number of them.
        """
        if self.counts is None:
            return
        announced, found = torch.stack((self.counts, self._layout.counts(self._so_far[0]))).tolist()
        surprising, start = [], 0
        # sums of weights are added up in another order
        same = functools.partial(math.isclose, rel_tol=1e-9)
        for position, entry in enumerate(self._layout.components[: self._layout.num_sums]):
            stop = start + self._layout.num_slots(entry)
            pairs = zip(announced[start:stop], found[start:stop], strict=True)
            if self._coefficients.coeffs[position] and not all(same(*pair) for pair in pairs):
                surprising.append(f"{entry.name}: {announced[start:stop]} announced, {found[start:stop]} found")
            start = stop
        if surprising:
            raise ValueError(
                f"The micro-batches of a step had other elements than their targets had announced: "
                f"{'; '.join(surprising)}. Does a hook change labels after the data loader has handed them over, or "
                f"were these the targets of other micro-batches?"
            )


def check_linear(
    components: Iterable[MetricEntry], weighted: Collection[str], given_coeffs: Mapping[str, float | None]
) -> None:
    """Refuse components of the weighted sum whose gradients in micro-batches do not add up to that of the whole.

    Args:
        components: of the loss.
        weighted: names of those that are in the weighted sum, now or at another epoch.
        given_coeffs: coefficients by name, for the message.

    Raises:
        ValueError: a component whose value is not linear in a sum of errors, or whose modifier has no ``target_of``.
    """
    for entry in components:
        if entry.name not in weighted:
            continue
        where = f"Component {entry.name!r} has the coefficient {given_coeffs[entry.name]}, but"
        if not isinstance(entry.metric, ErrorMetric) or not is_linear(entry.metric):
            raise ValueError(
                f"{where} {_why_not_linear(entry.metric)}, so that gradients of micro-batches do not add up to that of "
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


def _why_not_linear(metric: Metric) -> str:
    """Reason why parts of a batch do not add up to the metric's value."""
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
