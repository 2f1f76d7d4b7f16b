r"""Error metrics: elementwise errors :math:`\varphi` and how their sum and count make a value.

Each class is a :class:`torchmetrics.Metric` over two pure functions: ``measure`` maps prediction and target to errors
of the same shape, and ``value`` maps the sum of the errors and their count to the number that is reported. Alone, in a
``MetricCollection`` or in a ``LightningModule`` they keep their own states; a
:class:`~harness.metrics.MetricsManager` calls the two functions and keeps the states of all components in one row.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from harness.fields import FieldModifier
from harness.metrics.row import Elements
from harness.support.checks import is_number

__all__ = [
    "ErrorMetric",
    "HuberLoss",
    "MaximumAbsoluteError",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "RootMeanSquaredError",
    "StratifiedHuberForceLoss",
    "check_same_shape",
    "is_linear",
    "largest",
    "mean",
    "root_mean",
    "total",
]

Value = Callable[[Tensor, Tensor], Tensor]
"""(sum or maximum, count) → value, elementwise on vectors. The count is at least 1 where there is data and replaced by
1 where there is none, where the result is discarded."""


def mean(accumulated: Tensor, count: Tensor) -> Tensor:
    """Sum divided by count."""
    return accumulated / count


def root_mean(accumulated: Tensor, count: Tensor) -> Tensor:
    """Square root of sum divided by count; the gradient at 0, where the root has none, is 0."""
    ratio = accumulated / count
    # `ratio == 0` rather than `ratio > 0` lets a NaN through
    perfect = ratio == 0
    return torch.where(perfect, 0.0, torch.where(perfect, 1.0, ratio).sqrt())


def total(accumulated: Tensor, count: Tensor) -> Tensor:
    """The sum itself."""
    return accumulated


def largest(accumulated: Tensor, count: Tensor) -> Tensor:
    """The maximum itself."""
    return accumulated


def is_linear(metric: ErrorMetric) -> bool:
    r"""Test if the value is a multiple of the sum at a given count, :math:`v(s, n) = s \cdot v(1, n)`.

    Then the parts of a batch contribute :math:`v(s_m, n)` to the value of the whole, with the count :math:`n` of the
    whole, and the gradients of these parts add up to its gradient. True of :func:`mean` and :func:`total`, and of
    your own functions that are declared (``linear_in_sum = True`` on the metric) and found so on made-up numbers.
    """
    if metric.kind != "sum":
        return False
    if metric.value in (mean, total):
        return True
    if not metric.linear_in_sum:
        return False
    sums = torch.logspace(-12, 12, 49, dtype=torch.float64)
    for number in (1.0, 3.0, 1e6):
        count = torch.full_like(sums, number)
        expected = sums * metric.value(torch.ones_like(sums), count)
        if not torch.allclose(metric.value(sums, count), expected, rtol=1e-9, atol=0):
            return False
    return True


class ErrorMetric(Metric, ABC):
    """Base of error metrics that are a function of a sum and a count, or of a maximum.

    A subclass defines :meth:`measure` and ``value`` (one of :func:`mean`, :func:`root_mean`, :func:`total`, or any
    function of the two numbers; then with ``linear_in_sum`` if it is a multiple of the sum), and ``__str__`` for
    automatic names. NaN in, NaN out; without any data the value is NaN.
    """

    kind: ClassVar[Literal["sum", "maximum"]] = "sum"
    """``sum`` of the errors, or their ``maximum``."""
    value: Value = staticmethod(mean)
    """(sum, count) → value."""
    linear_in_sum: ClassVar[bool] = False
    """Declares that your own ``value`` is a multiple of the sum at a given count, which gradient accumulation needs.

    See :func:`is_linear`.
    """
    dimensionless: ClassVar[bool] = False
    """True of a fraction or cosine, whose unit is not that of the target."""
    own_field: FieldModifier | None = None
    """Modifier that the metric is read by, if it is one of certain fields: a component gives no ``field`` then."""

    full_state_update = False
    is_differentiable = True
    higher_is_better = False

    count: Tensor

    def __init__(self, *parameters: object, **kwargs: Any) -> None:
        """Make the two states.

        Args:
            parameters: whatever the errors depend on beside prediction and target, such as the delta of a Huber loss.
            kwargs: of :class:`torchmetrics.Metric`.
        """
        super().__init__(**kwargs)
        # ``MetricCollection`` takes metrics for the same whose states have the same names and, once, the same values:
        # the name distinguishes those that measure different errors.
        self.parameters_of_errors = parameters
        definition = f"{type(self).__name__}{parameters}"
        self._accumulated = f"{self.kind}_{type(self).__name__}_{zlib.crc32(definition.encode()):08x}"
        start, reduction = (0.0, "sum") if self.kind == "sum" else (-math.inf, "max")
        self.add_state(self._accumulated, torch.full((), start, dtype=torch.float64), dist_reduce_fx=reduction)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def accumulated(self) -> Tensor:
        """Sum or maximum of the errors so far: float64 scalar."""
        state: Tensor = getattr(self, self._accumulated)
        return state

    @property
    def sum(self) -> Tensor:
        """Sum of the errors so far, by NequIP's name: float64 scalar.

        Raises:
            AttributeError: of a maximum, which has none.
        """
        if self.kind != "sum":
            raise AttributeError(f"{type(self).__name__} keeps a maximum, `max_error`, and no sum.")
        return self.accumulated

    @abstractmethod
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Errors of each element, of the same shape; must be 0 where prediction and target are both 0."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: predictions, any shape.
            target: labels, of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        check_same_shape(preds, target, type(self).__name__)
        self._add(Elements(preds, target))

    def _add(self, elements: Elements) -> None:
        errors = self.measure(elements.prediction, elements.target)
        if self.kind == "sum":
            accumulated = self.accumulated + elements.sums(errors).squeeze(0)
        else:
            accumulated = torch.maximum(self.accumulated, elements.maxima(errors).squeeze(0))
        setattr(self, self._accumulated, accumulated)
        self.count = self.count + elements.counts().squeeze(0)

    def compute(self) -> Tensor:
        """Value over everything added so far: a float64 scalar, NaN without data."""
        has_data = self.count > 0
        accumulated = torch.where(has_data, self.accumulated, 0.0)
        value = self.value(accumulated, torch.where(has_data, self.count, 1.0))
        return torch.where(has_data, value, torch.nan)


class MeanAbsoluteError(ErrorMetric):
    r"""Mean absolute error, :math:`\frac{1}{N}\sum_i |p_i - t_i|`, in the unit of the target.

    Shapes: prediction and target alike, any shape; every element counts once.

    >>> MeanAbsoluteError()(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(1., dtype=torch.float64)
    """

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Absolute differences."""
        return (prediction - target).abs()

    def __str__(self) -> str:
        return "mae"


class MeanSquaredError(ErrorMetric):
    r"""Mean squared error, :math:`\frac{1}{N}\sum_i (p_i - t_i)^2`, in the square of the target's unit.

    Shapes: prediction and target alike, any shape; every element counts once.

    >>> MeanSquaredError()(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2., dtype=torch.float64)
    """

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Squared differences."""
        return (prediction - target).square()

    def __str__(self) -> str:
        return "mse"


class RootMeanSquaredError(MeanSquaredError):
    r"""Root mean squared error, :math:`\sqrt{\frac{1}{N}\sum_i (p_i - t_i)^2}`, in the unit of the target.

    The root is taken of the mean over all ranks and batches, never averaged over them. Its gradient where all errors
    are 0 is 0.

    >>> RootMeanSquaredError()(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(1.4142, dtype=torch.float64)
    """

    value = staticmethod(root_mean)

    def __str__(self) -> str:
        return "rmse"


class MaximumAbsoluteError(ErrorMetric):
    r"""Largest absolute error, :math:`\max_i |p_i - t_i|`, in the unit of the target.

    Shapes: prediction and target alike, any shape. The gradient goes to the element that holds the maximum.

    >>> MaximumAbsoluteError()(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2., dtype=torch.float64)
    """

    kind = "maximum"
    value = staticmethod(largest)

    @property
    def max_error(self) -> Tensor:
        """Maximum so far, by NequIP's name: float64 scalar, minus infinity without data."""
        return self.accumulated

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Absolute differences."""
        return (prediction - target).abs()

    def __str__(self) -> str:
        return "max_ae"


class HuberLoss(ErrorMetric):
    r"""Huber loss, equal to :class:`torch.nn.HuberLoss` on the concatenated data.

    .. math::
        \varphi(r) = \begin{cases} r^2 / 2 & |r| \le \delta \\ \delta\,(|r| - \delta/2) & |r| > \delta \end{cases}

    Args:
        reduction: ``mean`` over elements, or their ``sum``.
        delta: where the quadratic becomes linear, in the unit of the target; positive.

    Raises:
        ValueError: unknown reduction, or a delta that is not a positive number.

    Source: P. J. Huber, Ann. Math. Statist. 35, 73 (1964).
    """

    def __init__(self, reduction: str = "mean", delta: float = 1.0, **kwargs: Any) -> None:
        checked_delta = _check_positive(delta, "delta")
        super().__init__(_check_reduction(reduction), checked_delta, **kwargs)
        self.reduction = reduction
        self.value = mean if reduction == "mean" else total
        self.delta = checked_delta

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Huber errors."""
        return _huber(prediction - target, self.delta)

    def __str__(self) -> str:
        return "huber"


class StratifiedHuberForceLoss(ErrorMetric):
    r"""Huber loss of vectors whose :math:`\delta` depends on the magnitude of the reference vector.

    A vector whose reference :math:`t` has a magnitude between one lower bound and the next gets the
    :math:`\delta` of that bound; each component :math:`r` of its error gives the Huber error
    :math:`\varphi_\delta(r)` of :class:`HuberLoss`. Below the first bound, if that is above 0, errors are quadratic,
    :math:`r^2/2` (:math:`\delta = \infty`).

    Shapes: prediction and target ``[..., 3]``; the last dimension is the vector. Under ``ignore_nan``, the magnitude
    is that of the labelled components.

    Args:
        delta_dict: ``{lower bound of the magnitude: delta}``, both in the unit of the target (eV/Å), in any order; at
            least two strata, the quadratic one below a first bound above 0 included.
        reduction: ``mean`` over all components of all vectors, or their ``sum``.

    Raises:
        TypeError: ``delta_dict`` is not a mapping of numbers to numbers.
        ValueError: fewer than two strata, a bound that is negative, repeated or not finite, or a delta that is not
            positive.

    Source: the conditional Huber loss of MACE (I. Batatia et al., arXiv:2401.00096).
    """

    def __init__(self, delta_dict: Mapping[float, float], reduction: str = "mean", **kwargs: Any) -> None:
        strata = _check_strata(delta_dict)
        super().__init__(_check_reduction(reduction), strata, **kwargs)
        self.reduction = reduction
        self.value = mean if reduction == "mean" else total
        self.strata = strata

    @property
    def delta_dict(self) -> dict[float, float]:
        """The strata as ``{lower bound: delta}``, sorted: 0 with an infinite delta first, if no bound is 0."""
        # no attribute: those are in the description of a component, which a checkpoint's has to equal
        return dict(self.strata if self.strata[0][0] == 0 else ((0.0, math.inf), *self.strata))

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Huber errors of each component with the δ of its vector's stratum."""
        if target.dim() < 2:
            raise ValueError(
                f"StratifiedHuberForceLoss compares vectors: expected [..., 3], found {list(target.shape)}."
            )
        magnitude = torch.linalg.vector_norm(target, dim=-1, keepdim=True)
        delta = torch.full_like(magnitude, math.inf)
        for bound, stratum_delta in self.strata:
            delta = torch.where(magnitude >= bound, stratum_delta, delta)
        return _huber(prediction - target, delta)

    def __str__(self) -> str:
        return "stratified huber"


def _huber(residual: Tensor, delta: Tensor | float) -> Tensor:
    """Huber errors as q·(|r| − q/2) with q = min(|r|, δ): one expression for both regimes, finite for δ = ∞."""
    magnitude = residual.abs()
    quadratic = torch.clamp(magnitude, max=delta) if isinstance(delta, float) else torch.minimum(magnitude, delta)
    return quadratic * (magnitude - 0.5 * quadratic)


def check_same_shape(prediction: Tensor, target: Tensor, where: str) -> None:
    """Raise if prediction and target differ in shape, which would broadcast into a wrong number of errors."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"{where}: prediction has shape {list(prediction.shape)} and target {list(target.shape)}; they must be "
            f"the same. Reshape one of them (energies are [num_graphs, 1], forces [num_atoms, 3], stress "
            f"[num_graphs, 3, 3])."
        )


def _check_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean' or 'sum', found {reduction!r}.")
    return reduction


def _check_positive(number: float, what: str) -> float:
    if not is_number(number):
        raise TypeError(f"{what} is a number, found {number!r} of type {type(number).__name__}.")
    if not float(number) > 0:
        raise ValueError(f"{what} must be positive, found {number}.")
    return float(number)


def _check_strata(delta_dict: Mapping[float, float]) -> tuple[tuple[float, float], ...]:
    if not isinstance(delta_dict, Mapping):
        raise TypeError(f"delta_dict maps lower bounds to deltas, found {delta_dict!r} ({type(delta_dict).__name__}).")
    strata: dict[float, float] = {}
    for bound, delta in delta_dict.items():
        if not is_number(bound):
            raise TypeError(f"delta_dict's lower bounds are numbers, found {bound!r} ({type(bound).__name__}).")
        if not 0 <= float(bound) < math.inf:
            raise ValueError(f"delta_dict's lower bounds are finite and not negative, found {bound}.")
        if float(bound) in strata:
            raise ValueError(f"delta_dict has the lower bound {bound} twice.")
        strata[float(bound)] = _check_positive(delta, f"The delta of the lower bound {bound}")
    if len(strata) < (1 if strata and min(strata) > 0 else 2):
        raise ValueError(
            f"delta_dict needs at least two strata, found {dict(delta_dict)}. For a single delta use HuberLoss."
        )
    return tuple(sorted(strata.items()))
