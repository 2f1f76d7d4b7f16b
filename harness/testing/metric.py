r"""Laws of a metric, tried out: values of an oracle, whatever the batches, their order, and the ranks they fall on.

A metric is right in a training if its value is a function of *all* data, :math:`v(\cup_b D_b)`, and not of how the
data were cut into batches :math:`D_b`, in which order these came, or which rank held them. :func:`check_metric` tries
it with data that are cut unevenly, and compares with a function of the user's on the concatenated arrays.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from harness.fields import ATOM_TYPES, Batch, field_spec, get_field
from harness.metrics import ErrorMetric, MetricsManager, merge_accumulated
from harness.support.checks import is_whole_number
from harness.testing.ranks import RankFailedError, spawn

__all__ = ["MetricCheckError", "Oracle", "check_metric"]

Oracle = Callable[[Any, Any], float]
"""(prediction, target) → value; both are NumPy float64 arrays ``[rows, ...]`` of all data, without missing labels."""

_ROWS = (7, 2, 0, 9, 3, 5)  # of the batches that are made: unequal, one empty
_TYPE_NAMES = ("A", "B", "C", "absent")
_NAME = "value"
_ORDERS = 3  # random cuts and orders that are tried
_SLOPES = 12  # elements whose gradient is compared with a difference of the oracle
_NEAR = 1e-5  # distance of that difference

_HINTS = {
    "pickling": "Metrics are sent to ranks, copied for several data sets and cloned for components. Define the class "
    "at the top of a module, and keep no lambda, lock or open file as an attribute.",
    "value": "Either the metric or the oracle is wrong: the oracle gets prediction and target as NumPy float64 arrays.",
    "several batches": "Keep sums and counts as states and divide in compute(): a mean of means of batches weighs a "
    "small batch as much as a large one.",
    "reset": "reset() restores the states of add_state() only; keep nothing else between batches.",
    "state dict": "States of add_state() are all that checkpoints and other ranks get: what update() keeps in another "
    "attribute is lost.",
    "component": "The metric cannot be a component of a MetricsManager.",
    "merge": "Each state needs the dist_reduce_fx by which it adds up over batches and ranks: 'sum' for sums and "
    "counts, 'max' or 'min' for extremes.",
    "order": "The value depends on how data are cut into batches, or on their order: update() may use nothing but its "
    "arguments and states that add up.",
    "empty batch": "A rank or batch without data must change nothing, and no data at all must be NaN.",
    "missing labels": "Rows without a label reach measure() as 0 in prediction and target, where the error, and its "
    "gradient, must be 0; a NaN that is not masked must not be hidden.",
    "atom types": "The errors of a row may depend on nothing but that row.",
    "checkpoint": "States must hold everything, as tensors that load with weights_only=True.",
    "gradient": "measure(), update() and compute() must be differentiable in the predictions; if the metric is not "
    "meant to be, set is_differentiable = False or pass differentiable=False.",
    "ranks": "States that do not add up by their dist_reduce_fx, a collective within update() or compute(), or numbers "
    "drawn at random give ranks another value than one process.",
}


class MetricCheckError(AssertionError):
    """A metric breaks a law.

    Attributes:
        law: name of the law.
        found: value of the metric; None if it raised.
        expected: value of the oracle, or of one process; None if it raised.
    """

    def __init__(self, message: str, law: str, found: object = None, expected: object = None) -> None:
        super().__init__(message)
        self.law = law
        self.found = found
        self.expected = expected


def check_metric(
    metric: Metric | type[Metric],
    oracle: Oracle,
    *,
    field: str = "forces",
    data: Sequence[tuple[Tensor, Tensor]] | None = None,
    per_type: bool = False,
    ignore_nan: bool = True,
    differentiable: bool | None = None,
    ranks: Sequence[int] = (1, 2, 3, 4),
    rtol: float = 1e-9,
    atol: float = 1e-12,
    seed: int = 0,
    timeout: float = 60.0,
) -> tuple[str, ...]:
    r"""Take a metric through the laws that a training on any number of ranks relies on.

    The metric is tried by itself (pickled and copied, on one batch and several, reset, from its state dict) and as a
    component of a :class:`~harness.metrics.MetricsManager`: rows that merge, random cuts and orders, empty batches,
    missing labels, values by atom type, a checkpoint in mid-epoch, gradients, and real gloo ranks, of which some have
    no data. Each value must be that of the oracle, and each rank's gradient that of one process on the whole batch.

    Args:
        metric: an :class:`~harness.metrics.ErrorMetric` or any other :class:`torchmetrics.Metric`; it is copied.
        oracle: function from all predictions and targets, NumPy float64 ``[rows, ...]``, to the right value.
        field: registered field whose level and shape the made-up data have.
        data: pairs (prediction, target) ``[rows, ...]`` of several batches, in place of made-up ones, for metrics that
            need positive numbers, class labels or probabilities.
        per_type: try values by atom type too; the field must be one of nodes.
        ignore_nan: try missing labels too, if targets are floating-point numbers.
        differentiable: try gradients; None for what the metric says of itself (``is_differentiable``).
        ranks: numbers of ranks to try; none for a check in this process only.
        rtol: relative tolerance of values.
        atol: absolute tolerance of values.
        seed: of the made-up data, cuts and orders.
        timeout: seconds for the ranks of a group to answer.

    Returns:
        Names of the laws that hold.

    Raises:
        MetricCheckError: the metric breaks a law: its name, the value found, the value expected, and the likely fix.
        KeyError, TypeError, ValueError: arguments that cannot be used.

    Example:
        >>> from harness.metrics import MeanAbsoluteError
        >>> laws = check_metric(MeanAbsoluteError(), lambda p, t: abs(p - t).mean(), ranks=())
        >>> laws[:3]
        ('pickling', 'value', 'several batches')
    """
    if isinstance(metric, type):
        metric = metric()
    if not isinstance(metric, Metric):
        raise TypeError(f"`metric` is a torchmetrics.Metric or a class of them, found {metric!r}.")
    batches, level = _batches(field, data, seed)
    if per_type and level != "node":
        raise ValueError(
            f"per_type needs a field with one row for each atom (level node); {field!r} is a {level} field."
        )
    wrong = [number for number in ranks if not is_whole_number(number) or number < 1]
    if wrong:
        raise ValueError(f"`ranks` are numbers of ranks from 1 on, found {wrong[0]!r}.")
    case = _Case(
        metric=metric,
        field=_GivenField(level, tuple(batches[0].target.shape[1:])),
        batches=tuple(batches),
        differentiable=bool(metric.is_differentiable) if differentiable is None else differentiable,
        per_type=False,
        ignore_nan=False,
    )
    check = _Check(case, oracle, differentiable, rtol, atol, seed, timeout)
    with warnings.catch_warnings():
        # a type without data, a metric that refuses few samples: what is tried here on purpose
        warnings.simplefilter("ignore")
        check.by_itself()
        check.as_component()
        if ignore_nan and batches[0].target.is_floating_point():
            check.missing_labels()
        if per_type:
            check.atom_types()
        check.checkpoint()
        if check.case.differentiable:
            check.gradient()
        for number in ranks:
            check.on_ranks(number)
    return tuple(check.held)


@dataclass(frozen=True)
class _GivenField:
    """A modifier that reads the data of the check, whatever their shape."""

    level: str
    shape: tuple[int, ...]

    def __call__(self, preds: Batch, target: Batch) -> tuple[Tensor, Tensor]:
        return get_field(preds, _NAME, "predictions"), self.target_of(target)

    def target_of(self, target: Batch) -> Tensor:
        return get_field(target, _NAME, "target")


@dataclass(frozen=True)
class _Data:
    """Rows of a batch: ``prediction`` and ``target`` ``[rows, ...]``, ``types`` int64 ``[rows]``."""

    prediction: Tensor
    target: Tensor
    types: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, index: Tensor | slice) -> _Data:
        return _Data(self.prediction[index], self.target[index], self.types[index])

    def arrays(self) -> tuple[Any, Any]:
        return self.prediction.detach().double().numpy().copy(), self.target.double().numpy().copy()

    @staticmethod
    def joined(parts: Sequence[_Data]) -> _Data:
        return _Data(
            torch.cat([part.prediction for part in parts]),
            torch.cat([part.target for part in parts]),
            torch.cat([part.types for part in parts]),
        )


@dataclass(frozen=True)
class _Case:
    """A metric and its data; what the ranks are sent."""

    metric: Metric
    field: _GivenField
    batches: tuple[_Data, ...]
    differentiable: bool
    per_type: bool
    ignore_nan: bool

    def manager(self) -> MetricsManager:
        entry = {
            "name": _NAME,
            "metric": copy.deepcopy(self.metric),
            "field": self.field,
            "per_type": self.per_type,
            "ignore_nan": self.ignore_nan,
        }
        return MetricsManager([entry], _TYPE_NAMES, sync_on_step=True)

    def dealt(self, num_ranks: int, order: Sequence[int]) -> list[list[_Data]]:
        """Batch of every rank in every step: the batches in turn, and empty ones where there are no more."""
        nothing = self.batches[0].rows(slice(0, 0))
        turn = [self.batches[index] for index in order]
        turn += [nothing] * (-len(turn) % num_ranks)
        return [turn[start : start + num_ranks] for start in range(0, len(turn), num_ranks)]


def _forward(manager: MetricsManager, data: _Data) -> dict[str, Tensor]:
    values: dict[str, Tensor] = manager({_NAME: data.prediction}, {_NAME: data.target, ATOM_TYPES: data.types})
    return values


def _epoch(manager: MetricsManager, batches: Sequence[_Data]) -> dict[str, float]:
    with torch.no_grad():
        for batch in batches:
            _forward(manager, batch)
        return {name: value.item() for name, value in manager.compute().items()}


class _Check:
    """The laws; each method raises, or notes the laws that hold."""

    def __init__(
        self,
        case: _Case,
        oracle: Oracle,
        differentiable: bool | None,
        rtol: float,
        atol: float,
        seed: int,
        timeout: float,
    ) -> None:
        self.case = case
        self.oracle = oracle
        self.differentiable = differentiable
        self.rtol = rtol
        self.atol = atol
        self.random = np.random.default_rng(seed)
        self.timeout = timeout
        self.whole = _Data.joined(case.batches)
        self.expected = self.right(self.whole)
        self.merges = True
        self.held: list[str] = []

    # --- comparing ---

    def right(self, data: _Data) -> float:
        """Value of the oracle; NaN without data."""
        return float(self.oracle(*data.arrays())) if len(data) else math.nan

    def agree(self, law: str, where: str, found: object, expected: float, rtol: float = 0, atol: float = 0) -> None:
        """Raise if a value is not the expected one."""
        if isinstance(found, Tensor) and found.numel() != 1:
            self.fail(law, f"{where}, compute() returns a tensor of shape {list(found.shape)}, not one number", found)
        number = float(found)  # type: ignore[arg-type]
        both_nan = math.isnan(number) and math.isnan(expected)
        if not both_nan and not math.isclose(number, expected, rel_tol=rtol or self.rtol, abs_tol=atol or self.atol):
            self.fail(law, f"{where}, found {number!r}, expected {expected!r}", number, expected)

    def fail(self, law: str, what: str, found: object = None, expected: object = None) -> None:
        name = type(self.case.metric).__name__
        raise MetricCheckError(f"{name} breaks the law {law!r}: {what}. {_HINTS[law]}", law, found, expected)

    @contextmanager
    def law(self, law: str) -> Iterator[None]:
        """Context of one law: an exception in it is reported as a breach of the law."""
        try:
            yield
        except MetricCheckError:
            raise
        except Exception as error:
            name = type(self.case.metric).__name__
            hint = _HINTS[law]
            if law == "value":
                hint = (
                    f"update() gets prediction and target of shape {list(self.whole.target.shape)}, as the field has "
                    f"them: choose another `field`, or give `data` of the kind that the metric takes."
                )
            message = f"{name} breaks the law {law!r}: {type(error).__name__}: {str(error).rstrip('.')}. {hint}"
            raise MetricCheckError(message, law) from error
        if law not in self.held:
            self.held.append(law)

    # --- by itself, as a torchmetrics.Metric ---

    def by_itself(self) -> None:
        full = [batch for batch in self.case.batches if len(batch)]
        with self.law("pickling"):
            self.copies()
        with self.law("value"):
            if isinstance(self.case.metric, ErrorMetric):
                self.one_error_each(self.case.metric)
            found = _update(self.metric(), [self.whole]).compute()
            self.agree("value", f"on one batch of {len(self.whole)} rows", found, self.expected)
        with self.law("several batches"):
            metric = _update(self.metric(), full)
            where = f"after {len(full)} batches of {', '.join(str(len(batch)) for batch in full)} rows"
            self.agree("several batches", where, metric.compute(), self.expected)
        with self.law("reset"):
            metric.reset()
            found = _update(metric, [full[0]]).compute()
            fresh = _update(self.metric(), [full[0]]).compute()
            self.agree("reset", "on a batch after reset()", found, fresh.item())
        with self.law("pickling"):
            for how, metric in self.copies().items():
                found = _update(metric, full).compute()
                self.agree("pickling", f"with a metric that went through {how}", found, self.expected)
            metric = pickle.loads(pickle.dumps(_update(self.metric(), full[:2])))
            found = _update(metric, full[2:]).compute()
            self.agree(
                "pickling", f"with a metric that was pickled after {len(full[:2])} batches", found, self.expected
            )
        with self.law("state dict"):
            metric = _update(self.metric(), full)
            metric.persistent(True)
            fresh = self.metric()
            fresh.load_state_dict(metric.state_dict())
            self.agree("state dict", "with a fresh metric that loaded the state dict", fresh.compute(), self.expected)
        with self.law("merge"):
            for _ in range(_ORDERS):
                parts = [_update(self.metric(), [full[index]]) for index in self.random.permutation(len(full))]
                found = _gathered(parts)
                self.agree("merge", f"from the states of {len(parts)} ranks in any order", found, self.expected)
        if isinstance(self.case.metric, ErrorMetric):
            with self.law("empty batch"):
                nothing = self.whole.rows(slice(0, 0))
                found = _update(self.metric(), [nothing, *full, nothing]).compute()
                self.agree("empty batch", "with an empty batch first and last", found, self.expected)
                self.agree("empty batch", "without any data", _update(self.metric(), [nothing]).compute(), math.nan)

    def one_error_each(self, metric: ErrorMetric) -> None:
        target = self.whole.target
        errors = metric.measure(self.whole.prediction, target)
        if errors.shape != target.shape:
            self.fail(
                "value",
                f"measure() returns errors of shape {list(errors.shape)} for a target of shape {list(target.shape)}, "
                f"expected one error for each element",
            )

    def metric(self) -> Metric:
        """A fresh copy, in float64."""
        metric = copy.deepcopy(self.case.metric)
        metric.reset()
        return metric if isinstance(metric, ErrorMetric) else metric.set_dtype(torch.float64)

    def copies(self) -> dict[str, Metric]:
        metric = self.metric()
        return {
            "pickle": pickle.loads(pickle.dumps(metric)),
            "copy.deepcopy": copy.deepcopy(metric),
            "clone()": metric.clone(),
        }

    # --- as a component ---

    def as_component(self) -> None:
        with self.law("component"):
            manager = self.case.manager()
            self.merges = not manager.get_extra_state()["deferred"]
            if not self.merges and self.differentiable is None:
                # gathered at the end of an epoch, it cannot be a part of the loss on several ranks
                self.case = replace(self.case, differentiable=False)
            self.agree("component", "on one batch", _epoch(manager, [self.whole])[_NAME], self.expected)
        if self.merges:
            with self.law("merge"):
                self.merge()
        with self.law("order"):
            for _ in range(_ORDERS):
                cut = self.cut()
                sizes = ", ".join(str(len(batch)) for batch in cut)
                found = _epoch(self.case.manager(), cut)[_NAME]
                self.agree("order", f"with the rows in another order and in batches of {sizes}", found, self.expected)
        with self.law("empty batch"):
            nothing = self.whole.rows(slice(0, 0))
            found = _epoch(self.case.manager(), [nothing, *self.case.batches, nothing])[_NAME]
            self.agree("empty batch", "with an empty batch first and last", found, self.expected)
            self.agree("empty batch", "without any data", _epoch(self.case.manager(), [nothing])[_NAME], math.nan)

    def merge(self) -> None:
        """Rows of the batches merge, in any order, into the row of all data."""
        manager = self.case.manager()
        with torch.no_grad():
            rows = [
                manager.measure({_NAME: batch.prediction}, {_NAME: batch.target, ATOM_TYPES: batch.types})
                for batch in self.case.batches
            ]
            for _ in range(_ORDERS):
                pending = [rows[index] for index in self.random.permutation(len(rows))]
                while len(pending) > 1:  # pairs of neighbours, wherever: not only from the left
                    at = int(self.random.integers(len(pending) - 1))
                    pending[at : at + 2] = [pending[at].merge(pending[at + 1])]
                found = manager.evaluate(pending[0]).as_dict()[_NAME]
                self.agree("merge", f"from {len(rows)} merged rows", found, self.expected)

    def cut(self) -> list[_Data]:
        """All rows in a random order, in batches of random sizes."""
        order = torch.from_numpy(self.random.permutation(len(self.whole)))
        cuts = sorted(self.random.integers(0, len(self.whole) + 1, size=4).tolist())
        edges = [0, *cuts, len(self.whole)]
        shuffled = self.whole.rows(order)
        return [shuffled.rows(slice(*edges[at : at + 2])) for at in range(len(edges) - 1)]

    def missing_labels(self) -> None:
        metric = self.case.metric
        with self.law("missing labels"):
            if isinstance(metric, ErrorMetric):
                zeros = torch.zeros_like(self.whole.target)
                largest = float(metric.measure(zeros, zeros).abs().max())
                self.agree("missing labels", "as the error of prediction 0 and target 0", largest, 0.0)
            case = replace(self.case, ignore_nan=True)
            labelled, batches = [], []
            for batch in self.case.batches:
                has_label = torch.from_numpy(self.random.random(len(batch)) > 0.3)
                labelled.append(batch.rows(has_label))
                target = batch.target.clone()
                target[~has_label] = math.nan
                batches.append(replace(batch, target=target))
            known = _Data.joined(labelled)
            missing = f"with {len(self.whole) - len(known)} of {len(self.whole)} rows unlabelled and ignore_nan"
            self.agree("missing labels", missing, _epoch(case.manager(), batches)[_NAME], self.right(known))
            none = [replace(batch, target=torch.full_like(batch.target, math.nan)) for batch in self.case.batches]
            self.agree("missing labels", "without any label", _epoch(case.manager(), none)[_NAME], math.nan)
            if isinstance(metric, ErrorMetric):
                self.masked_elements()

    def masked_elements(self) -> None:
        """A masked element gives no error and no gradient; a NaN that is not masked shows."""
        target = self.whole.target.clone()
        masked = torch.from_numpy(self.random.random(tuple(target.shape)) < 0.3)
        masked.view(-1)[0] = True
        target[masked] = math.nan
        holed = replace(self.whole, target=target)
        if self.case.differentiable:
            value, (slope,) = _value_and_slopes(replace(self.case, ignore_nan=True).manager(), [holed])
            if not math.isfinite(value) or not bool(slope.isfinite().all()) or bool((slope[masked] != 0).any()):
                largest = float(slope[masked].abs().max())
                self.fail(
                    "missing labels",
                    f"with single elements masked the value is {value} and the largest gradient of a masked prediction "
                    f"{largest}, expected finite numbers and 0",
                    largest,
                    0.0,
                )
        found = _epoch(self.case.manager(), [holed])[_NAME]
        self.agree("missing labels", "with a label that is NaN and no ignore_nan", found, math.nan)

    def atom_types(self) -> None:
        with self.law("atom types"):
            found = _epoch(replace(self.case, per_type=True).manager(), self.case.batches)
            self.agree_by_type("atom types", "of all batches", found)

    def agree_by_type(self, law: str, where: str, found: dict[str, float]) -> None:
        by_type = []
        for index, name in enumerate(_TYPE_NAMES):
            rows = self.whole.rows(self.whole.types == index)
            by_type.append(self.right(rows))
            self.agree(law, f"for type {name} with {len(rows)} rows, {where}", found[f"{_NAME}_{name}"], by_type[-1])
        known = [value for value in by_type if not math.isnan(value)]
        average = math.fsum(known) / len(known) if known else math.nan
        self.agree(law, f"as the average over types with data, {where}", found[_NAME], average)

    def checkpoint(self) -> None:
        with self.law("checkpoint"):
            half = len(self.case.batches) // 2
            for split in (half, len(self.case.batches)):
                before, after = self.case.manager(), self.case.manager()
                with torch.no_grad():
                    for batch in self.case.batches[:split]:
                        _forward(before, batch)
                after.load_state_dict(_saved_and_loaded(before.state_dict()))
                found = _epoch(after, self.case.batches[split:])[_NAME]
                self.agree("checkpoint", f"resumed from a checkpoint after {split} batches", found, self.expected)

    def gradient(self) -> None:
        """The gradient of one process is the slope of the oracle."""
        with self.law("gradient"):
            if not self.merges:
                self.fail(
                    "gradient",
                    "its states cannot be merged within a step, so that it cannot be part of a loss on several ranks",
                )
            _, (slope,) = _value_and_slopes(self.case.manager(), [self.whole])
            prediction, target = self.whole.arrays()
            chosen = self.random.permutation(prediction.size)[:_SLOPES]
            tolerance = 1e-7 * (1 + abs(self.expected))
            for element in chosen:
                values = []
                for sign in (1, -1):
                    moved = prediction.copy()
                    moved.reshape(-1)[element] += sign * _NEAR
                    values.append(float(self.oracle(moved, target.copy())))
                expected = (values[0] - values[1]) / (2 * _NEAR)
                found = slope.reshape(-1)[element]
                where = f"with respect to prediction {np.unravel_index(element, prediction.shape)}".replace(
                    "np.int64", ""
                )
                self.agree("gradient", where, found, expected, rtol=1e-4, atol=tolerance)

    # --- on ranks ---

    def on_ranks(self, number: int) -> None:
        """Steps, epochs and gradients of real ranks are those of one process, also where the ranks are permuted."""
        law = "ranks"
        orders = [list(range(len(self.case.batches))), self.random.permutation(len(self.case.batches)).tolist()]
        with self.law(law):
            try:
                answers = spawn(number, _on_rank, self.case, orders, timeout=self.timeout)
            except (RankFailedError, TimeoutError) as error:
                self.fail(law, f"on {number} ranks {type(error).__name__}: {error}")
            for index, order in enumerate(orders):
                for rank, answer in enumerate(answers):
                    on = f"on rank {rank} of {number}{' with the batches on other ranks' if index else ''}"
                    epoch = answer[index]["epoch"]
                    self.agree(law, f"over the epoch {on}", epoch, self.expected)
                    if repr(epoch) != repr(answers[0][index]["epoch"]):
                        self.fail(law, f"{on} the value is {epoch!r}, on rank 0 {answers[0][index]['epoch']!r}", epoch)
                    self.steps_of_rank(on, rank, self.case.dealt(number, order), answer[index])
                resumed = self.case.manager()
                resumed.load_state_dict(_loaded(answers[0][index]["state"]))
                found = _epoch(resumed, [])[_NAME]
                self.agree(law, f"resumed in one process from a checkpoint of {number} ranks", found, self.expected)

    def steps_of_rank(self, on: str, rank: int, steps: list[list[_Data]], answer: dict[str, Any]) -> None:
        if not self.merges:
            return
        for step, parts in enumerate(steps):
            together = _Data.joined(parts)
            reference = self.case.manager()
            if not self.case.differentiable:
                # not the oracle: a metric may refuse the few rows of a step, such as a coefficient of determination
                expected = _epoch(reference, [together])[_NAME]
                self.agree("ranks", f"in step {step} {on}", answer["steps"][step], expected)
                continue
            expected, slopes = _value_and_slopes(reference, parts)
            self.agree("ranks", f"in step {step} {on}", answer["steps"][step], expected)
            found, slope = answer["slopes"][step], slopes[rank]
            if not torch.allclose(found, slope, rtol=self.rtol, atol=self.atol):
                at = int((found - slope).abs().argmax())
                pair = found.reshape(-1)[at].item(), slope.reshape(-1)[at].item()
                self.fail(
                    "ranks",
                    f"in step {step} {on} the gradient of a prediction is {pair[0]!r}, expected {pair[1]!r} as in one "
                    f"process on the whole batch",
                    *pair,
                )


def _on_rank(rank: int, world_size: int, case: _Case, orders: list[list[int]]) -> list[dict[str, Any]]:
    """Values of the steps and of the epoch, gradients, and a checkpoint, for each order of the batches."""
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for order in orders:
            manager = case.manager()
            answer: dict[str, Any] = {"steps": [], "slopes": []}
            for parts in case.dealt(world_size, order):
                if case.differentiable:
                    value, (slope,) = _value_and_slopes(manager, [parts[rank]])
                    answer["slopes"].append(slope)
                else:
                    with torch.no_grad():
                        value = _forward(manager, parts[rank])[_NAME].item()
                answer["steps"].append(value)
            merge_accumulated([manager])
            answer["state"] = _saved(manager.state_dict())
            answer["epoch"] = manager.compute()[_NAME].item()
            answers.append(answer)
    return answers


def _value_and_slopes(manager: MetricsManager, parts: Sequence[_Data]) -> tuple[float, list[Tensor]]:
    """Value of a step on the parts together, and its gradient with respect to the predictions of each part."""
    predictions = [part.prediction.detach().clone().requires_grad_() for part in parts]
    joined = replace(_Data.joined(parts), prediction=torch.cat(predictions))
    values = _forward(manager, joined)
    if not values[_NAME].requires_grad:  # no data, or a metric that cuts its graph
        return values[_NAME].item(), [torch.zeros_like(prediction) for prediction in predictions]
    return values[_NAME].item(), list(torch.autograd.grad(values[_NAME], predictions))


def _update(metric: Metric, batches: Sequence[_Data]) -> Metric:
    for batch in batches:
        metric.update(batch.prediction, batch.target)
    return metric


def _gathered(metrics: Sequence[Metric]) -> Tensor:
    """Value from the states of several ranks, by torchmetrics' own synchronisation with made-up messages."""
    sent: list[list[Tensor]] = []
    for metric in metrics:
        own: list[Tensor] = []
        # it hands over one tensor after the other, and wants those of all ranks
        copy.deepcopy(metric).sync(partial(_send, own), distributed_available=lambda: True)
        sent.append(own)
    received = zip(*sent, strict=True)
    first = copy.deepcopy(metrics[0])
    first.sync(lambda tensor, group=None: list(next(received)), distributed_available=lambda: True)
    compute: Callable[[Metric], Tensor] = cast(Any, type(first)).compute
    return compute(first)  # that of the instance would synchronise once more


def _send(sent: list[Tensor], tensor: Tensor, group: Any = None) -> list[Tensor]:
    sent.append(tensor)
    return [tensor]


def _saved(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _loaded(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return state


def _saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    return _loaded(_saved(state))


def _batches(field: str, data: Sequence[tuple[Tensor, Tensor]] | None, seed: int) -> tuple[list[_Data], str]:
    """Batches of the check, and the level of the field.

    Raises:
        KeyError, TypeError, ValueError: an unknown field, or data that are no pairs of tensors of one shape.
    """
    spec, random = field_spec(field), np.random.default_rng(seed)
    if data is None:
        if spec.shape is None:
            raise ValueError(
                f"The shape of a row of the field {field!r} is not known. Give it to harness.register_field({field!r}, "
                f"{spec.level!r}, shape=...), or give `data`."
            )
        shape = spec.shape
        pairs = [(_normal(random, (rows, *shape)), _normal(random, (rows, *shape))) for rows in _ROWS]
    else:
        pairs = [_checked_pair(position, pair) for position, pair in enumerate(data)]
        if sum(len(target) > 0 for _, target in pairs) < 2:
            raise ValueError(f"`data` needs at least two batches with rows, found {len(pairs)} batches.")
    types = [torch.from_numpy(random.integers(0, len(_TYPE_NAMES) - 1, len(target))) for _, target in pairs]
    return [_Data(*pair, kinds) for pair, kinds in zip(pairs, types, strict=True)], spec.level


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random.normal(size=shape))


def _checked_pair(position: int, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(side, Tensor) for side in pair):
        raise TypeError(f"data[{position}] is a pair of tensors (prediction, target), found {type(pair).__name__}.")
    prediction, target = (
        side.detach().cpu().double() if side.is_floating_point() else side.detach().cpu() for side in pair
    )
    if prediction.shape != target.shape or not target.dim():
        raise ValueError(
            f"data[{position}] has a prediction of shape {list(prediction.shape)} and a target of shape "
            f"{list(target.shape)}; expected the same, [rows, ...]."
        )
    return prediction, target
