"""Adapters of torchmetrics: merged in the row, or gathered at the end of an epoch.

A metric whose states all reduce by sum, mean, max or min is a function of additive numbers and maxima, like an
:class:`~harness.metrics.errors.ErrorMetric`: its states after one batch are the batch's contribution to the row
(:class:`MergedAdapter`). A minimum is the maximum of the negative, and a mean is a sum and a number of updates. All
others (lists of samples, custom reductions) keep their own states on each rank; these are gathered at the end of an
epoch and joined as torchmetrics does it (:class:`GatheredAdapter`).

``update`` and ``compute`` of such metrics are their authors' code, and may synchronise host and device; they get only
the rows that count, and are called only where there are any, which makes the host wait as well. A metric that takes
weights gets all rows, those that do not count with weight 0, and its value without data is replaced on the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from harness.fields import NUM_ATOMS, Batch
from harness.metrics.row import Elements
from harness.metrics.torchmetrics_private import (
    REDUCTIONS,
    compute_of_class,
    concatenate,
    default_states,
    reductions,
    set_default_state,
    set_num_updates,
    update_of_class,
)

__all__ = ["GatheredAdapter", "MergedAdapter", "Part", "why_not_mergeable"]

Part = dict[str, Any]
"""States of a metric from one stretch of data on one rank, by name: tensors, or lists of tensors."""


def why_not_mergeable(metric: Metric, shape: tuple[int, ...] | None = None) -> str | None:
    """Reason why a metric's states cannot be part of a row; None if they can.

    Args:
        metric: the metric, whose states are overwritten.
        shape: shape of one row of its inputs, if known; then two made-up batches show whether its update depends on
            earlier batches, as that of a running average does, which torchmetrics has no flag for.
    """
    states, reduction_of = default_states(metric), reductions(metric)
    if not states:
        return "it has no states"
    if metric.full_state_update:
        return "its update needs the whole state (full_state_update=True)"
    for name, default in states.items():
        if not isinstance(default, Tensor):
            return f"its state {name!r} is a list of samples"
        if reduction_of[name] not in REDUCTIONS:
            return f"its state {name!r} is reduced by neither sum, mean, max nor min"
        if default.is_complex():
            return f"its state {name!r} is complex"
    if shape is not None and not _adds_up(metric, shape):
        return "its update depends on the batches before"
    return None


def _adds_up(metric: Metric, shape: tuple[int, ...]) -> bool:
    """True if the states after two batches are those of each batch, merged, or if that cannot be tried."""
    trial = _widen(metric.clone())
    rows = torch.linspace(0.1, 1, 8 * math.prod(shape), dtype=torch.float64, device=trial.device).reshape(8, *shape)
    batches = [(rows[:5], rows[:5] ** 2), (rows[5:], rows[5:].sqrt())]
    merge: dict[str, Any] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
    try:
        apart = []
        for batch in batches:
            trial.reset()
            update_of_class(trial, *batch)
            apart.append({name: getattr(trial, name) for name in default_states(trial)})
        trial.reset()
        for batch in batches:
            update_of_class(trial, *batch)
        for name, default in default_states(trial).items():
            reduction = REDUCTIONS[reductions(trial)[name]]
            # torchmetrics itself takes a mean over batches in one place and over ranks in another
            if reduction == "mean":
                continue
            merged = merge[reduction](apart[0][name], apart[1][name])
            merged = merged - cast(Tensor, default) if reduction == "sum" else merged
            if not torch.allclose(merged.double(), getattr(trial, name).double(), rtol=1e-6, equal_nan=True):
                return False
    except (ValueError, RuntimeError, TypeError, IndexError):
        return True  # its own message comes with the first real batch
    return True


@dataclass(frozen=True)
class _State:
    name: str
    reduction: Literal["sum", "mean", "max", "min"]
    default: Tensor


class MergedAdapter:
    """A torchmetric whose states merge, as functions from a batch to pieces of the row and back to a value.

    Args:
        metric: the metric; its own states are overwritten.
        name: the component's name, for messages.
        shape: shape of one row of its inputs, if known. Some metrics start with scalar states that grow with the
            number of outputs, while the layout of a row must be known before there is data.
    """

    def __init__(self, metric: Metric, name: str, shape: tuple[int, ...] | None = None) -> None:
        self.metric = _widen(metric)
        self.name = name
        grown = {} if shape is None else _grown_states(self.metric, shape)
        self._states = [
            _State(
                state,
                REDUCTIONS[reductions(metric)[state]],
                cast(Tensor, default).detach().cpu().expand(grown.get(state, cast(Tensor, default).shape)).clone(),
            )
            for state, default in default_states(metric).items()
        ]
        self._initial: dict[torch.device, dict[str, Tensor]] = {}
        self._additive = [state for state in self._states if state.reduction in ("sum", "mean")]
        self._extremal = [state for state in self._states if state.reduction in ("max", "min")]
        # the last additive number is the number of updates
        self.num_additive = sum(state.default.numel() for state in self._additive) + 1
        self.num_maxima = sum(state.default.numel() for state in self._extremal)
        self._warned = False

    def measure(self, inputs: tuple[Any, ...] | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pieces of the row of one batch: ``[num_additive]`` and ``[num_maxima]``; neutral without inputs."""
        if inputs is None:
            return (
                torch.zeros(self.num_additive, dtype=torch.float64, device=device),
                torch.full((self.num_maxima,), -math.inf, dtype=torch.float64, device=device),
            )
        self._prepare(device)
        with _explained(self.name, self.metric, inputs):
            update_of_class(self.metric, *inputs)
        pieces = [self._contribution(state, device) for state in self._additive]
        additive = torch.cat([*pieces, torch.ones(1, dtype=torch.float64, device=device)])
        extremes = [self._contribution(state, device) for state in self._extremal]
        maxima = torch.cat(extremes) if extremes else torch.empty(0, dtype=torch.float64, device=device)
        self.metric.reset()
        if len(inputs) < 3:
            return additive, maxima
        counts = (inputs[2] > 0).any()  # not even an update, where all weights are 0
        return torch.where(counts, additive, 0.0), torch.where(counts, maxima, -math.inf)

    def _contribution(self, state: _State, device: torch.device) -> Tensor:
        value: Tensor = getattr(self.metric, state.name)
        if value.numel() != state.default.numel():
            raise ValueError(
                f"Component {self.name!r}: state {state.name!r} of {type(self.metric).__name__} changed its shape from "
                f"{list(state.default.shape)} to {list(value.shape)} with the data. Declare the shape of a row: "
                f"harness.register_field(..., shape=...), or an attribute `shape` of your modifier."
            )
        value = value.reshape(-1).to(torch.float64)
        match state.reduction:
            case "sum":
                return value - self._default(state, device).reshape(-1)
            case "mean" | "max":
                return value
            case "min":
                return -value

    def _default(self, state: _State, device: torch.device) -> Tensor:
        """Initial value of a state in float64, copied to a device once."""
        on_device = self._initial.setdefault(device, {})
        if state.name not in on_device:
            with torch.inference_mode(False):  # it outlives this step
                on_device[state.name] = state.default.to(device, torch.float64)
        return on_device[state.name]

    def value(self, additive: Tensor, maxima: Tensor, needed: bool = False) -> tuple[Tensor, Tensor] | None:
        """Value from merged pieces of the row, and if there is data: a float64 scalar, 0 without, and a bool scalar.

        None without data, or with too little for the metric, where the host has to know that.

        Args:
            additive: the metric's part of the row, ``[num_additive]``.
            maxima: its part of the maxima, ``[num_maxima]``.
            needed: the value is a term of the weighted sum: an error of ``compute`` is raised, not warned of.

        Raises:
            ValueError: ``compute`` of the metric fails, and the value is needed.
        """
        updates = additive[-1]
        has_data = updates > 0
        if not takes_weights(self.metric) and not bool(has_data):
            return None
        self._prepare(additive.device)
        set_num_updates(self.metric, 1 if takes_weights(self.metric) else int(updates))
        for states, pieces in ((self._additive, additive), (self._extremal, maxima)):
            start = 0
            for state in states:
                stop = start + state.default.numel()
                merged = self._state(state, pieces[start:stop].reshape(state.default.shape), updates)
                setattr(self.metric, state.name, merged.to(state.default.dtype))
                start = stop
        try:
            value = _as_scalar(compute_of_class(self.metric), self.metric, self.name)
        except ValueError as error:
            if needed:
                raise ValueError(f"Component {self.name!r} of the weighted sum cannot be computed: {error}") from error
            if not self._warned:
                warnings.warn(f"Component {self.name!r} has no value: {error}", stacklevel=2)
                self._warned = True
            return None
        finally:
            self.metric.reset()
        return torch.where(has_data, value, 0.0), has_data

    def _state(self, state: _State, merged: Tensor, updates: Tensor) -> Tensor:
        """State of the metric from its merged numbers in a row."""
        match state.reduction:
            case "sum":
                return merged + self._default(state, merged.device)
            case "mean":
                return merged / updates
            case "max":
                return merged
            case "min":
                return -merged

    def _prepare(self, device: torch.device) -> None:
        if self.metric.device != device:
            self.metric.to(device)
        self.metric.reset()


class GatheredAdapter:
    """A torchmetric whose states do not merge: kept on each rank, and gathered at the end of an epoch.

    Args:
        metric: the metric.
        name: the component's name, for messages.
        reason: why it does not merge, see :func:`why_not_mergeable`.
    """

    def __init__(self, metric: Metric, name: str, reason: str) -> None:
        self.metric = _widen(metric)
        self.name = name
        self.reason = reason
        self._scratch = metric.clone()
        self.past: list[Part] = []
        """Parts that all ranks hold alike, from a checkpoint."""

    def update(self, inputs: tuple[Any, ...] | None, *, local_value: bool, device: torch.device) -> Tensor | None:
        """Add a batch.

        Args:
            inputs: of ``update``; None for a batch without data.
            local_value: this rank's batch is all of the step, so that its value is that of the step.
            device: of the states.

        Returns:
            Value of the batch, a float64 scalar; None without data or ``local_value``.
        """
        if inputs is None:
            return None
        for metric in (self.metric, self._scratch):
            if metric.device != device:
                metric.to(device)
        with torch.no_grad(), _explained(self.name, self.metric, inputs):
            self.metric.update(*_detached(inputs))
        if not local_value:
            return None
        self._scratch.reset()
        update_of_class(self._scratch, *inputs)
        set_num_updates(self._scratch, 1)
        value = _as_scalar(compute_of_class(self._scratch), self.metric, self.name)
        self._scratch.reset()
        return value

    def local_part(self) -> Part | None:
        """States of this rank since the last reset, on the CPU; None if there was no update."""
        if not self.metric.update_called:
            return None
        return {name: _to_cpu(getattr(self.metric, name)) for name in default_states(self.metric)}

    def value(self, parts: Sequence[Part], device: torch.device) -> Tensor | None:
        """Value over the given parts and the past, joined by the reductions of the states; None without parts."""
        parts = [*self.past, *parts]
        if not parts:
            return None
        scratch = self._scratch.to(device)
        scratch.reset()
        set_num_updates(scratch, 1)
        for name, default in default_states(scratch).items():
            reduce = reductions(scratch)[name]
            values = [part[name] for part in parts]
            joined: Any
            if isinstance(default, list):
                joined = [sample.to(device) for value in values for sample in value]
                if reduce is not None and reduce is not concatenate:
                    joined = cast(Any, reduce)(joined)
            elif len(values) == 1:
                joined = values[0].to(device)
            else:
                joined = torch.stack([value.to(device) for value in values])
                joined = joined if reduce is None else cast(Any, reduce)(joined)
            setattr(scratch, name, joined)
        value = _as_scalar(compute_of_class(scratch), scratch, self.name)
        scratch.reset()
        return value

    def reset(self) -> None:
        """Drop all states, and those of the past."""
        self.metric.reset()
        self.past = []


def takes_weights(metric: Metric) -> bool:
    """True for a metric of several sums whose ``update`` takes weights; declared by an attribute of this name."""
    return bool(getattr(metric, "takes_weights", False))


def labelled_rows(elements: Elements, group: int | None) -> tuple[Tensor, ...] | None:
    """Prediction and target of the rows without a missing element and of the given type; None if there are none.

    torchmetrics has no masks, so rows are taken by boolean indexing, which synchronises host and device.
    """
    prediction, target = elements.prediction, elements.target
    rows = _rows_that_count(elements, group)
    if rows is not None:
        prediction, target = prediction[rows], target[rows]
    return (prediction, target) if target.numel() else None


def weighted_rows(elements: Elements, group: int | None) -> tuple[Tensor, ...] | None:
    """Prediction, target and float64 weights of all rows, for a metric that takes weights; None if there are no rows.

    Rows that :func:`labelled_rows` leaves out are 0 and have weight 0. Without such rows, there are no weights.
    """
    prediction, target = elements.prediction, elements.target
    if not target.numel():
        return None
    rows = _rows_that_count(elements, group)
    if rows is None:
        return prediction, target
    weights = rows.to(torch.float64) if elements.weights is None else torch.where(rows, elements.weights, 0.0)
    rows = rows.reshape(-1, *[1] * (target.dim() - 1))
    return torch.where(rows, prediction, 0), torch.where(rows, target, 0), weights


def _rows_that_count(elements: Elements, group: int | None) -> Tensor | None:
    """Mask of the rows without a missing element and of the given type, bool ``[rows]``; None if all are."""
    if elements.mask is None and group is None:
        return None
    rows = torch.ones(elements.target.shape[0], dtype=torch.bool, device=elements.target.device)
    if elements.mask is not None:
        rows &= elements.mask.flatten(1).all(1) if elements.mask.dim() > 1 else elements.mask
    if group is not None and elements.types is not None:
        rows &= elements.types == group
    return rows


def whole_batches(preds: Batch, target: Batch) -> tuple[Batch, Batch] | None:
    """Both dictionaries, or None for a batch without graphs."""
    num_atoms = target.get(NUM_ATOMS)
    return None if num_atoms is not None and not num_atoms.numel() else (preds, target)


def _widen(metric: Metric) -> Metric:
    """The metric with its floating states in float64; integers and booleans keep their dtype."""
    for name, default in default_states(metric).items():
        if isinstance(default, Tensor) and default.is_floating_point():
            set_default_state(metric, name, default.to(torch.float64))
    metric.reset()
    return metric


def _grown_states(metric: Metric, shape: tuple[int, ...]) -> dict[str, torch.Size]:
    """Shapes of the states after a batch of made-up rows; none if the metric does not take such rows."""
    rows = torch.linspace(0, 1, 4 * math.prod(shape), dtype=torch.float64, device=metric.device).reshape(4, *shape)
    try:
        update_of_class(metric, rows, rows**2)
        return {
            name: getattr(metric, name).shape
            for name, default in default_states(metric).items()
            if isinstance(default, Tensor) and default.numel() == 1
        }
    except (ValueError, RuntimeError, TypeError, IndexError):
        return {}  # its own message comes with the first real batch
    finally:
        metric.reset()


def detached(batch: Batch) -> dict[str, Any]:
    """The batch with its tensors detached."""
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in batch.items()}


def _detached(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs without a graph, so that states kept for the epoch do not keep every step's graph alive."""
    return tuple(value.detach() if isinstance(value, Tensor) else detached(value) for value in inputs)


def _to_cpu(state: Any) -> Any:
    return [sample.detach().cpu() for sample in state] if isinstance(state, list) else state.detach().cpu().clone()


@contextmanager
def _explained(name: str, metric: Metric, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Name the component in an error of a metric that cannot take the inputs, and what helps against their shape."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        found = " and ".join(str(list(value.shape)) if isinstance(value, Tensor) else "a batch" for value in inputs)
        fix = (
            "Use a metric that takes rows of several numbers, such as R2Score or CosineSimilarity for forces, or "
            "flatten them in a `field` of your own: a callable (preds, target) -> (prediction, target) with a `level`."
        )
        raise ValueError(
            f"Component {name!r}: {type(metric).__name__} cannot take predictions and targets of shape {found} "
            f"({' '.join(str(error).split())}). {fix}"
        ) from error


def _as_scalar(value: Any, metric: Metric, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"Component {name!r}: {type(metric).__name__} returned {found}; a component is one number. Choose the "
            f"metric's averaging option (such as multioutput='uniform_average' or reduction='mean')."
        )
    return value.reshape(()).to(torch.float64)
