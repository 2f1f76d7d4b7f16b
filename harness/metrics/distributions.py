r"""Metrics whose states are several sums: relative errors, and quantiles by a histogram.

They are metrics of torchmetrics whose states add up, so that they travel in the row like all others. As with other
people's metrics, rows with a missing component are left out whole. A frame of weight w counts as w frames do.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from harness.metrics.errors import check_same_shape
from harness.metrics.vectors import _positive

__all__ = ["ErrorQuantile", "RelativeMeanAbsoluteError", "RelativeRootMeanSquaredError"]


class RelativeMeanAbsoluteError(Metric):
    r"""Sum of the absolute errors over that of the target, :math:`\sum_i |p_i - t_i| / \sum_i |t_i|`; no unit.

    1 is the error of predicting 0 everywhere. MACE prints it for forces, in percent. NaN where all targets are 0.

    Shapes: prediction and target alike, any shape; every element counts once.

    >>> float(RelativeMeanAbsoluteError()(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])))
    0.25
    """

    full_state_update = False
    takes_weights = True
    is_differentiable = True
    higher_is_better = False
    power: ClassVar[int] = 1

    error_sum: Tensor
    target_sum: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("error_sum", "target_sum"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: predictions, any shape.
            target: labels, of the same shape.
            weights: of the rows, ``[rows]``; None if each counts once.

        Raises:
            ValueError: the shapes differ.
        """
        check_same_shape(preds, target, type(self).__name__)
        errors, sizes = ((preds - target).abs().pow(self.power), target.abs().pow(self.power))
        if weights is not None:
            errors, sizes = (each * _as_rows(weights, each) for each in (errors, sizes))
        self.error_sum = self.error_sum + errors.sum(dtype=torch.float64)
        self.target_sum = self.target_sum + sizes.sum(dtype=torch.float64)

    def compute(self) -> Tensor:
        """Value over everything added so far: a float64 scalar, NaN without data or with targets of 0 alone."""
        has_scale = self.target_sum != 0
        return torch.where(has_scale, self.error_sum / torch.where(has_scale, self.target_sum, 1.0), torch.nan)

    def __str__(self) -> str:
        return "rel_mae"


class RelativeRootMeanSquaredError(RelativeMeanAbsoluteError):
    r"""Root of the squared errors over the squared target, :math:`\sqrt{\sum_i (p_i - t_i)^2 / \sum_i t_i^2}`; no unit.

    1 is the error of predicting 0 everywhere. MACE prints it for forces, in percent. NaN where all targets are 0.

    Shapes: prediction and target alike, any shape; every element counts once.

    >>> float(RelativeRootMeanSquaredError()(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])))
    0.5
    """

    power = 2

    def compute(self) -> Tensor:
        """Value over everything added so far; its gradient where all errors are 0 is 0."""
        ratio = super().compute()
        perfect = ratio == 0
        return torch.where(perfect, 0.0, torch.where(perfect, 1.0, ratio).sqrt())

    def __str__(self) -> str:
        return "rel_rmse"


class ErrorQuantile(Metric):
    r"""Quantile of the absolute errors, to a relative error that is stated: the median, or what 95 % are below.

    The value is within :math:`\pm\varepsilon` of the quantile :math:`x_{(k)}`, the :math:`k`-th smallest error with
    :math:`k = \lceil q N \rceil`. Errors are counted in bins whose bounds grow by
    :math:`\gamma = (1 + \varepsilon) / (1 - \varepsilon)`; bins of batches and ranks add up, in whatever order. Errors
    below ``lowest`` are one bin, whose value is 0; a quantile above ``highest`` is infinite. NaN where any error is.

    Shapes: prediction and target alike, any shape; every element counts once, or every vector with ``vectors``.
    The row grows by a number for each bin: 522 of them by default.

    Args:
        quantile: :math:`q`, above 0 and at most 1.
        relative_error: :math:`\varepsilon`, above 0 and below 1.
        lowest: smallest error that is told from 0, in the unit of the target.
        highest: largest error that is counted as a number, in the unit of the target.
        vectors: whether an error is the norm of the last dimension, such as that of a force.

    Raises:
        TypeError, ValueError: an argument that is out of range.

    >>> median = ErrorQuantile(0.5)(torch.tensor([1.0, 2.0, 9.0]), torch.zeros(3))
    >>> abs(float(median) - 2) < 0.02 * 2
    True

    Source: DDSketch, C. Masson, J. E. Rim, H. K. Lee, Proc. VLDB Endow. 12, 2195 (2019).
    """

    full_state_update = False
    takes_weights = True
    is_differentiable = False
    higher_is_better = False

    numbers: Tensor

    def __init__(
        self,
        quantile: float = 0.95,
        relative_error: float = 0.02,
        lowest: float = 1e-6,
        highest: float = 1e3,
        vectors: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.quantile = _positive(quantile, "quantile")
        self.relative_error = _positive(relative_error, "relative_error")
        self.lowest, self.highest = _positive(lowest, "lowest"), _positive(highest, "highest")
        if not isinstance(vectors, bool):
            raise TypeError(f"vectors is true or false, found {vectors!r}.")
        self.vectors = vectors
        if self.quantile > 1:
            raise ValueError(f"quantile is a fraction above 0 and at most 1, found {quantile}.")
        if self.relative_error >= 1:
            raise ValueError(f"relative_error is above 0 and below 1, found {relative_error}.")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest must be below highest, found {lowest} and {highest}.")
        self._growth = math.log1p(self.relative_error) - math.log1p(-self.relative_error)
        self.num_bins = math.ceil(math.log(self.highest / self.lowest) / self._growth)
        # below the lowest | bins | above the highest | NaN
        self.add_state("numbers", torch.zeros(self.num_bins + 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: predictions, any shape; ``[..., d]`` with ``vectors``.
            target: labels, of the same shape.
            weights: of the rows, ``[rows]``; None if each counts once.

        Raises:
            ValueError: the shapes differ, or they are no vectors.
        """
        check_same_shape(preds, target, type(self).__name__)
        error = (preds - target).detach().to(torch.float64)
        if self.vectors:
            if error.dim() < 2:
                raise ValueError(f"ErrorQuantile of vectors expects [..., 3], found {list(error.shape)}.")
            error = torch.linalg.vector_norm(error, dim=-1)
        counted = torch.ones_like(error) if weights is None else _as_rows(weights, error).expand_as(error)
        error, counted = error.abs().reshape(-1), counted.reshape(-1).to(torch.float64)
        place = torch.ceil((error.clamp(min=self.lowest) / self.lowest).log() / self._growth).clamp(
            0, self.num_bins + 1
        )
        place = torch.where(error.isnan(), self.num_bins + 2, place).to(torch.int64)
        self.numbers = self.numbers.index_add(0, place, counted)

    def compute(self) -> Tensor:
        """Value over everything added so far: a float64 scalar, NaN without data."""
        known = self.numbers[:-1].cumsum(0)
        total = known[-1]
        # of whole numbers the k-th, k = ⌈qN⌉: the rounding of q must not take it one further
        wanted = self.quantile * total * (1 - 1e-12)
        place = (known < wanted).sum()
        middle = self.lowest * torch.exp((place - 0.5) * self._growth) / math.cosh(0.5 * self._growth)
        value = torch.where(place == 0, 0.0, torch.where(place > self.num_bins, torch.inf, middle))
        return torch.where((total > 0) & (self.numbers[-1] == 0), value, torch.nan)

    def __str__(self) -> str:
        return f"q{100 * self.quantile:g}"


def _as_rows(weights: Tensor, values: Tensor) -> Tensor:
    """Weights of rows ``[rows]`` in as many dimensions as ``values`` ``[rows, ...]`` have."""
    return weights.reshape(-1, *[1] * (values.dim() - 1))
