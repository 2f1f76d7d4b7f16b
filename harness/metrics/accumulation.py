r"""The micro-batches of one step: gradient accumulation that gives the gradient of the one batch that they make up.

A component with sum :math:`s` and count :math:`n` whose value is linear in the sum, :math:`v(s, n) = s \cdot v(1, n)`,
is for micro-batches :math:`m = 1 \dots k` with the coefficients :math:`c_j`

.. math::
    \text{weighted\_sum} = \sum_j c_j\, v_j\Big(\sum_m s_{jm},\ n_j\Big)
    = \sum_m \underbrace{\sum_j c_j\, v_j(s_{jm}, n_j)}_{L_m}, \qquad n_j = \sum_m n_{jm}

so that the gradients of the parts :math:`L_m`, simply added, are the gradient of the whole, however unequal the
micro-batches are. The counts :math:`n_j` depend on targets alone: they are known before the first backward pass. A
mean of the micro-batches' means is something else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.metrics.layout import Layout
from harness.metrics.row import Row

__all__ = ["Window"]


class Window:
    """How many elements the micro-batches of a step have together, and what those that came so far add up to.

    Made by :meth:`harness.metrics.MetricsManager.window` from the targets of all of them, used up by as many calls of
    :func:`harness.metrics.step_together`.

    Args:
        layout: of the loss.
        counts: elements of this rank in each slot of sums: float64 ``[num_slots]``; 0 for what is not in the sum.
        num_micro_batches: number of micro-batches.
        coeffs: of the loss, in the layout's order, which must not change before the window is complete.
    """

    def __init__(
        self, layout: Layout, counts: Tensor, num_micro_batches: int, coeffs: tuple[float | None, ...]
    ) -> None:
        self._layout = layout
        self._coeffs = coeffs
        self.counts = counts
        """Elements of this rank; those of all ranks from the first micro-batch on."""
        self.num_micro_batches = num_micro_batches
        self.num_done = 0
        """Micro-batches that came so far."""
        self.is_merged = False
        """Whether ``counts`` are those of all ranks."""
        self._so_far: dict[int, Row] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the last micro-batch has come, and the optimizer may step."""
        return self.num_done == self.num_micro_batches

    def begin(self, layout: Layout, coeffs: tuple[float | None, ...]) -> None:
        """Count the next micro-batch in.

        Raises:
            ValueError: all have come already, or the loss is another than the window was made for.
        """
        if layout is not self._layout:
            raise ValueError("The window was made by another manager than the loss: make it with loss.window(targets).")
        if coeffs != self._coeffs:
            raise ValueError(
                f"The coefficients changed in the middle of a step, after {self.num_done} of its "
                f"{self.num_micro_batches} micro-batches, from {self._coeffs} to {coeffs}: the sum of their gradients "
                f"would be that of no loss. Change them between steps, where the window is complete."
            )
        if self.is_complete:
            raise ValueError(
                f"The window was made for {self.num_micro_batches} micro-batches, and all of them have come. Make one "
                f"with loss.window(targets) for each step of the optimizer, from the targets of all its micro-batches."
            )
        self.num_done += 1

    def announcement(self) -> Row:
        """The counts as a row, to be merged over the ranks together with the first micro-batch."""
        return Row.of([self.counts], [], self.counts.device)

    def merged(self, announcement: Row) -> None:
        """Take over the counts of all ranks."""
        self.counts, self.is_merged = announcement.additive.detach(), True

    def add(self, index: int, row: Row) -> Row:
        """Row of the micro-batches so far of the manager number ``index``, this one's included; without a graph."""
        so_far = self._so_far.get(index)
        self._so_far[index] = row.detach() if so_far is None else so_far.merge(row.detach())
        return self._so_far[index]

    def surprises(self) -> list[str]:
        """Components that had another number of elements than the targets had announced; makes the host wait."""
        announced, found = torch.stack((self.counts, self._layout.counts(self._so_far[0]))).tolist()
        surprising, start = [], 0
        for position, entry in enumerate(self._layout.components[: self._layout.num_sums]):
            stop = start + self._layout.groups(entry)
            if self._coeffs[position] and announced[start:stop] != found[start:stop]:
                surprising.append(f"{entry.name}: {announced[start:stop]} announced, {found[start:stop]} found")
            start = stop
        return surprising
