"""Steps and epoch ends of several managers, over one merge: the loss, and metrics that only watch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.distributed import ProcessGroup, data_parallel_size, gather_objects
from harness.fields import Batch
from harness.metrics.accumulation import Window
from harness.metrics.adapters import Part, detached
from harness.metrics.measured import MeasuredComponents
from harness.metrics.row import MergingRows, Row, merge_rows_over_ranks
from harness.metrics.running import RunningStep, Share
from harness.metrics.values import Values

__all__ = ["begin_step", "compute_together", "merge_accumulated", "step_together"]


def begin_step(
    loss: MeasuredComponents,
    *monitors: MeasuredComponents,
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
        window: accumulation window, made by :meth:`~harness.metrics.MetricsManager.window` of the loss; None for a
            step of one batch.
        signals: numbers of this rank, float64 ``[num_signals]``, summed over the ranks where the rows are merged, in
            the same all-reduce: :meth:`RunningStep.signals`.

    Raises:
        ValueError: the window is not one of this loss, is complete already, or was made of other targets.
    """
    managers = (loss, *monitors)
    if window is None:
        loss.epoch_row.settle()
        window = Window(loss.layout, loss.coefficients)
    window.begin(loss.layout, loss.coefficients)
    measured = [loss.reader.measure(preds, target, loss.coefficients)]
    if monitors:
        watched = detached(preds)
        with torch.no_grad():
            measured += [manager.reader.measure(watched, target, manager.coefficients) for manager in monitors]
    own = [row for row, _ in measured]
    merged = own[0].requires_grad or window.is_announced or any(manager.wants_sync for manager in managers)
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
        gathered = manager.update_gathered(inputs, row.additive.device, alone, manager is loss) if inputs else {}
        coeffs = manager.coeffs_on(row.additive.device) if manager.do_weighted_sum else None
        shares.append(
            Share(manager.epoch_row, functools.partial(manager.evaluate_with, manager.coefficients, coeffs, gathered))
        )
    step = RunningStep(window, shares, rows, merged, signals is not None)
    if not window.is_announced:
        step.value()  # with its graph, and with what torchmetrics keep of this batch
    else:
        step.part_is(shares[0].evaluate(own[0], window.counts))
        if window.is_complete and not (loss.checked_window or torch.compiler.is_compiling()):
            step.settle()
            window.check()  # of the first window only: it makes the host wait
            loss.checked_window = True
    return step


def step_together(
    loss: MeasuredComponents,
    *monitors: MeasuredComponents,
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
        window: accumulation window, made by :meth:`~harness.metrics.MetricsManager.window` of the loss; None for a
            step of one batch.

    Returns:
        Values of each manager.

    Raises:
        ValueError: the window is not one of this loss, is complete already, or was made of other targets.
    """
    step = begin_step(loss, *monitors, preds=preds, target=target, window=window)
    values = step.values()
    step.release()
    return values


def compute_together(managers: Sequence[MeasuredComponents]) -> list[Values]:
    """Values of several managers over everything accumulated on all ranks, over one merge; all ranks must call it."""
    if not managers:
        return []
    group = managers[0].process_group
    locals_ = merge_rows_over_ranks(
        [manager.epoch_row.local or manager.layout.neutral() for manager in managers], group
    )
    parts = _gather_parts(managers, group)
    results = []
    for manager, row in zip(managers, locals_, strict=True):
        merged = manager.epoch_row.merged
        total = row if merged is None else row.merge(merged)
        gathered = {
            index: [adapter.value(parts.pop(0), total.additive.device) for adapter in adapters]
            for index, adapters in manager.layout.gathered.items()
        }
        with torch.no_grad():
            values = manager.evaluate(total, gathered)
        manager.take_epoch(values)
        results.append(values)
    return results


def merge_accumulated(managers: Sequence[MeasuredComponents]) -> None:
    """Merge over the ranks what managers have accumulated, so that all ranks' states are the same and complete.

    For checkpoints; all ranks must call it. Values do not change.
    """
    if not managers:
        return
    group = managers[0].process_group
    rows = merge_rows_over_ranks([manager.epoch_row.local or manager.layout.neutral() for manager in managers], group)
    parts = _gather_parts(managers, group)
    for manager, row in zip(managers, rows, strict=True):
        manager.epoch_row.merge_local(row)
        for adapter in manager.gathered_adapters:
            adapter.past += parts.pop(0)
            adapter.metric.reset()


def _gather_parts(managers: Sequence[MeasuredComponents], group: ProcessGroup | None) -> list[list[Part]]:
    """Parts of every gathered metric of every manager, from all ranks; no collective if there is none."""
    mine = [adapter.local_part() for manager in managers for adapter in manager.gathered_adapters]
    if not mine:
        return []
    gathered = gather_objects(mine, group)
    return [[part for part in parts if part is not None] for parts in zip(*gathered, strict=True)]


def _refuse_gathered_loss(loss: MeasuredComponents, row: Row) -> None:
    if not row.requires_grad:
        return
    for position, adapters in loss.layout.gathered.items():
        entry = loss.layout.components[position]
        if loss.coefficients.coeffs[position] is not None:
            raise ValueError(
                f"Component {entry.name!r} has the coefficient {loss.given_coeffs[entry.name]} in a loss on several "
                f"ranks, but {type(entry.metric).__name__} cannot be merged over ranks within a step: "
                f"{adapters[0].reason}. Set its coefficient to null, or train on one rank."
            )
