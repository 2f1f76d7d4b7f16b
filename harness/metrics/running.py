"""A step whose sums are on their way to all ranks, and the row of the epoch that takes them up when they have come.

Behind a window with announced counts, a backward pass needs nothing of the other ranks (see
:mod:`harness.metrics.accumulation`): the row is sent and not waited for. Whoever reads values waits; all others find
them there, since the gradients of the step, which all ranks wait for, are sent later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from harness.metrics.accumulation import Window
from harness.metrics.row import MergingRows, Row
from harness.metrics.values import Values

__all__ = ["EpochRow", "RunningStep", "Share"]


class EpochRow:
    """Row of an epoch so far: the part that all ranks share, that of this rank alone, and steps that are on their way.

    Attributes:
        local: of batches that have not been merged over the ranks; None without any.
        last_step: the last step, and the position of the manager in it; None before any.
    """

    def __init__(self) -> None:
        self._running: deque[RunningStep] = deque()
        self._merged: Row | None = None
        self.local: Row | None = None
        self.last_step: tuple[RunningStep, int] | None = None
        self._before_step: tuple[Row | None, Row | None] = (None, None)

    @property
    def merged(self) -> Row | None:
        """Row of the steps that have been merged over the ranks, those on their way included; None without any."""
        self.settle()
        return self._merged

    @property
    def is_empty(self) -> bool:
        """True if nothing has been added."""
        return self.merged is None and self.local is None

    def expect(self, step: RunningStep) -> None:
        """Take note of a step on its way, which will be added before anything is read."""
        self._running.append(step)

    def settle(self, until: RunningStep | None = None) -> None:
        """Wait for the steps on their way, in their order, up to one of them; those have been sent by all ranks."""
        while self._running and self._running[0] is not until:
            self._running[0].settle()

    def add(self, row: Row, *, is_merged: bool, begins: bool) -> None:
        """Add the row of a batch.

        Args:
            row: of all ranks, or of this one.
            is_merged: it is that of all ranks.
            begins: it is the first of a step.
        """
        row = row.detach()
        if begins:
            self._before_step = self.local, self._merged
        if is_merged:
            self._merged = row if self._merged is None else row.merge(self._merged)
        else:
            self.local = row if self.local is None else row.merge(self.local)

    def arrived(self, step: RunningStep) -> None:
        """Forget a step that was on its way, the first of them."""
        if self._running and self._running[0] is step:
            self._running.popleft()

    def undo_step(self) -> None:
        """Take the last step out again."""
        self.settle()
        self.local, self._merged = self._before_step

    def merge_local(self, row: Row) -> None:
        """Take over the row of all ranks that ``local`` was merged to."""
        self.local, self._merged = None, row if self.merged is None else row.merge(self.merged)

    def replace(self, merged: Row | None = None) -> None:
        """Start anew, from a row that all ranks share, or from nothing."""
        self.settle()
        self.local, self._merged, self._before_step = None, merged, (None, None)


@dataclass(frozen=True)
class Share:
    """Share of one manager in a step.

    Attributes:
        epoch: row that the step's is added to.
        evaluate: values of a row, with the coefficients of the step.
    """

    epoch: EpochRow
    evaluate: Callable[..., Values]


class RunningStep:
    """A step of a loss and of metrics that watch, whose row may still be on its way to all ranks.

    Made by :func:`harness.metrics.begin_step`.

    Args:
        window: accumulation window, with the step's batch counted in.
        shares: of the loss, and of the metrics.
        rows: of these managers, and of the signals if there are any: of all ranks, on their way to all ranks, or of
            this rank where they are not merged.
        is_merged: they are those of all ranks.
        has_signals: the last row is that of the signals.

    Attributes:
        is_whole: the batch is the last of its window.
    """

    def __init__(
        self,
        window: Window,
        shares: Sequence[Share],
        rows: MergingRows | list[Row],
        is_merged: bool,
        has_signals: bool,
    ) -> None:
        self._window, self._shares = window, tuple(shares)
        self._is_merged, self._has_signals, self._begins = is_merged, has_signals, window.num_done == 1
        self.is_whole = window.is_complete
        self._so_far: list[Row] = []
        self._signals: Tensor | None = None
        self._values: dict[int, Values] = {}
        self._part: Values | None = None
        self._merging: MergingRows | None = None
        for position, share in enumerate(self._shares):
            share.epoch.last_step = self, position
        if isinstance(rows, MergingRows):
            self._merging = rows
            for share in shares:
                share.epoch.expect(self)
        else:
            self._take(rows)

    @property
    def own(self) -> Values:
        """Values of the loss that this rank's backward pass starts from, differentiable.

        In a window with announced counts they are those of this rank's part of the whole, which add up to it over
        micro-batches and ranks, and nothing is waited for. Otherwise they are those of all ranks.
        """
        return self.value(0) if self._part is None else self._part

    def part_is(self, part: Values) -> None:
        """Take over the values of this rank's part."""
        self._part = part

    def value(self, position: int = 0) -> Values:
        """Values of a manager, the first of which is the loss; waits for the sums of all ranks.

        Those of the loss are differentiable until :meth:`release`: their gradient is that of :attr:`own`.
        """
        if position not in self._values:
            self.settle()
            has_graph = torch.is_grad_enabled() and position == 0 and self._part is None
            with torch.set_grad_enabled(has_graph):
                values = self._shares[position].evaluate(self._so_far[position])
            if position == 0 and self._part is not None:
                values = _with_gradient_of(self._part, values)
            self._values[position] = values
        return self._values[position]

    def values(self) -> tuple[Values, ...]:
        """Values of all managers, see :meth:`value`."""
        return tuple(map(self.value, range(len(self._shares))))

    def signals(self) -> Tensor | None:
        """Sums of the signals over the ranks, which are waited for: float64 ``[num_signals]``; None without any."""
        self.settle()
        return self._signals

    def settle(self) -> None:
        """Wait for the rows of all ranks, and add them to those of the epoch, behind those of earlier steps."""
        if self._merging is None:
            return
        for share in self._shares:
            share.epoch.settle(until=self)
        self._take(self._merging.wait())
        self._merging = None
        for share in self._shares:
            share.epoch.arrived(self)

    def _take(self, rows: list[Row]) -> None:
        if self._has_signals:
            self._signals = rows[-1].additive.detach()
        for position, (share, row) in enumerate(zip(self._shares, rows, strict=False)):
            share.epoch.add(row, is_merged=self._is_merged, begins=self._begins)
            self._so_far.append(self._window.add(position, row))

    def release(self) -> None:
        """Let go of the graph, once the backward pass is done."""
        self._part = self._part and self._part.detach()
        self._values = {position: values.detach() for position, values in self._values.items()}
        self._so_far = [row.detach() for row in self._so_far]


def _with_gradient_of(part: Values, current: Values) -> Values:
    """Values of all ranks and micro-batches so far, with the gradient of this one's part of the whole."""
    if part.weighted_sum is None or current.weighted_sum is None:
        return current
    return current.with_values(
        current.evaluated.map(_ValueAndGradient.of, part.evaluated),
        _ValueAndGradient.of(current.weighted_sum, part.weighted_sum),
    )


class _ValueAndGradient(torch.autograd.Function):
    """The value of one tensor with the gradient of another, whatever their numbers are."""

    @classmethod
    def of(cls, value: Tensor, gradient: Tensor) -> Tensor:
        return cast(Tensor, cls.apply(value, gradient)) if gradient.requires_grad else value  # type: ignore[no-untyped-call]

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Any) -> tuple[None, Tensor]:
        return None, grad_outputs[0]
