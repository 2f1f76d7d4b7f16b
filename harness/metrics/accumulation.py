r"""Gradient accumulation: micro-batches whose gradients add up to that of the one batch that they make up.

A component with sum :math:`s` and count :math:`n` whose value is linear in the sum, :math:`v(s, n) = s \cdot v(1, n)`,
is for micro-batches :math:`m = 1 \dots k` with the coefficients :math:`c_j`

.. math::
    \text{weighted\_sum} = \sum_j c_j\, v_j\Big(\sum_m s_{jm},\ n_j\Big)
    = \sum_m \underbrace{\sum_j c_j\, v_j(s_{jm}, n_j)}_{L_m}, \qquad n_j = \sum_m n_{jm}

so that the gradients of the parts :math:`L_m`, simply added, are the gradient of the whole, however unequal the
micro-batches are. The counts :math:`n_j` depend on targets alone: they are known before the first backward pass. A
mean of the micro-batches' means is another number.

An accumulation window (:class:`Window`) is the micro-batches of one step of the optimizer, and an ordinary step is a
window of one. The sum over ranks is split as that over micro-batches is: with the counts of all ranks, the part of each
rank's own row is all that its backward pass needs. So the counts are sent when the window is made, and travel while the
model makes its predictions; nobody waits for the sums. A loss that is not linear, or a batch whose counts nobody has
announced, is evaluated from the row of all ranks, which is waited for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from harness.distributed import ProcessGroup
from harness.metrics.coefficients import Coefficients
from harness.metrics.components import MetricEntry
from harness.metrics.errors import ErrorMetric, is_linear
from harness.metrics.layout import Layout
from harness.metrics.row import MergingRows, Row

__all__ = ["Window", "check_linear"]


class Window:
    """An accumulation window: the micro-batches of one step, their number of elements, and their rows so far.

    Made by :meth:`harness.metrics.MetricsManager.window`, and used up by as many calls of
    :func:`harness.metrics.step_together` as it has micro-batches.

    Args:
        layout: of the loss.
        coefficients: of the loss, which must not change before the window is complete.
        counts: elements of this rank in each slot of sums, known from the targets of each micro-batch: float64
            ``[num_slots]``, 0 for components outside of the weighted sum. Their sum over micro-batches and ranks is
            under way from now on. None for one batch whose counts are those of its own row.
        group: the data-parallel ranks; None for all.
    """

    def __init__(
        self,
        layout: Layout,
        coefficients: Coefficients,
        counts: Sequence[Tensor] = (),
        group: ProcessGroup | None = None,
    ) -> None:
        self._layout = layout
        self._coefficients = coefficients
        self.num_micro_batches = max(len(counts), 1)
        self.num_done = 0
        """Micro-batches that came so far."""
        self._announced: MergingRows | None = None
        self._counts: Tensor | None = None
        self._so_far: dict[int, Row] = {}
        if counts:
            own = functools.reduce(torch.add, counts)
            self._announced = MergingRows([Row.of([own], [], own.device)], group)

    @property
    def is_announced(self) -> bool:
        """True if the counts have been announced from targets, and gradients are those of this rank's part."""
        return self._announced is not None

    @property
    def counts(self) -> Tensor | None:
        """Announced elements of all ranks, which are waited for; None if they have not been announced."""
        if self._counts is None and self._announced is not None:
            self._counts = self._announced.wait()[0].additive
        return self._counts

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
        if coefficients is not self._coefficients and coefficients != self._coefficients:
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

    def add(self, index: int, row: Row) -> Row:
        """Row of the micro-batches so far of the manager number ``index``, this one's included.

        It has no graph, but in a window without announced counts, whose values are differentiable.
        """
        if not self.is_announced:
            return row
        so_far = self._so_far.get(index)
        self._so_far[index] = row.detach() if so_far is None else so_far.merge(row.detach())
        return self._so_far[index]

    def check(self) -> None:
        """Compare the elements found with those that were announced; makes the host wait.

        Raises:
            ValueError: a component of the weighted sum had another number of them.
        """
        counts = self.counts
        if counts is None:
            return
        announced, found = torch.stack((counts, self._layout.counts(self._so_far[0]))).tolist()
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
                f"{'; '.join(surprising)}. Does a hook, or the model, change labels after the data loader has handed "
                f"them over, or were these the targets of other micro-batches?"
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
