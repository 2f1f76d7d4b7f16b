r"""Error metrics of vectors and of thresholds: norms, cosines, and the fraction of errors within a threshold.

Each is a sum and a count as the metrics of :mod:`harness.metrics.errors` are. What belongs to a vector is shared out
over its components, so that missing components add nothing, and weights of frames count as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.metrics.errors import ErrorMetric
from harness.support.checks import is_number

__all__ = ["FractionWithin", "MeanCosineSimilarity", "MeanVectorError", "within"]


class MeanVectorError(ErrorMetric):
    r"""Mean norm of the error of vectors, :math:`\frac{1}{N}\sum_i \lVert p_i - t_i \rVert_2`, in the target's unit.

    Of forces it is the mean distance between predicted and reference force, which fairchem trains with as ``l2mae``.
    Its gradient where an error is 0 is 0.

    Shapes: prediction and target ``[..., d]``; the last dimension is the vector. A vector that lacks components under
    ``ignore_nan`` counts by the fraction that it has.

    >>> MeanVectorError()(torch.tensor([[3.0, 4.0, 0.0]]), torch.zeros(1, 3))
    tensor(5., dtype=torch.float64)
    """

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        r"""Parts :math:`d\, r_k^2 / \lVert r \rVert` of each component, which sum up to :math:`d` times the norm."""
        _check_vectors(self, target)
        error = prediction - target
        squares = error.square().sum(dim=-1, keepdim=True)
        perfect = squares == 0  # rather than `squares > 0`, which would hide a NaN
        norm = torch.where(perfect, 1.0, squares).sqrt()
        return error.shape[-1] * error.square() / norm

    def __str__(self) -> str:
        return "mean_norm"


class MeanCosineSimilarity(ErrorMetric):
    r"""Mean cosine of the angle between predicted and reference vectors, from -1 to 1; larger is better.

    .. math:: \frac{1}{N} \sum_i \frac{p_i \cdot t_i}{\lVert p_i \rVert\, \lVert t_i \rVert}

    A vector of norm 0, predicted or reference, counts with 0, as in OC20; so does one without any label.

    Shapes: prediction and target ``[..., d]``; the last dimension is the vector. Under ``ignore_nan``, the cosine is
    that of the labelled components, and counts by their fraction.

    >>> MeanCosineSimilarity()(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [-1.0, 1.0]]))
    tensor(0.5000, dtype=torch.float64)

    Source: L. Chanussot et al., ACS Catal. 11, 6059 (2021).
    """

    higher_is_better = True
    dimensionless = True

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        r"""Parts :math:`d\, p_k t_k / (\lVert p \rVert \lVert t \rVert)` of each component."""
        _check_vectors(self, target)
        squares = prediction.square().sum(dim=-1, keepdim=True), target.square().sum(dim=-1, keepdim=True)
        norms = [torch.where(square == 0, 1.0, square).sqrt() for square in squares]
        return target.shape[-1] * (prediction / norms[0]) * (target / norms[1])

    def __str__(self) -> str:
        return "cosine"


def within(accumulated: Tensor, count: Tensor) -> Tensor:
    """One minus the mean: the fraction of elements that were not counted as outside."""
    return 1 - accumulated / count


class FractionWithin(ErrorMetric):
    r"""Fraction of errors below a threshold, :math:`\frac{1}{N} \#\{i : |p_i - t_i| < \tau\}`; larger is better.

    Of ``total_energy`` with 0.02 eV it is OC20's EwT, a number from 0 to 1 (there in percent). It has no gradient.

    Shapes: prediction and target alike, any shape; every element counts once.

    Args:
        threshold: :math:`\tau`, in the unit of the target; positive.

    Raises:
        TypeError, ValueError: a threshold that is not a positive number.

    >>> FractionWithin(0.5)(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(0.5000, dtype=torch.float64)

    Source: L. Chanussot et al., ACS Catal. 11, 6059 (2021).
    """

    value = staticmethod(within)
    is_differentiable = False
    higher_is_better = True
    dimensionless = True

    def __init__(self, threshold: float, **kwargs: Any) -> None:
        checked = _positive(threshold, "threshold")
        super().__init__(checked, **kwargs)
        self.threshold = checked

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """1 where an error is not below the threshold, 0 where it is; NaN for NaN."""
        error = (prediction - target).detach().abs()
        return torch.where(error.isnan(), error, (error >= self.threshold).to(error.dtype))

    def __str__(self) -> str:
        return "within"


def _check_vectors(metric: ErrorMetric, target: Tensor) -> None:
    if target.dim() < 2:
        raise ValueError(f"{type(metric).__name__} compares vectors: expected [..., 3], found {list(target.shape)}.")


def _positive(number: object, what: str) -> float:
    if not is_number(number):
        raise TypeError(f"{what} is a number, found {number!r} of type {type(number).__name__}.")
    if not 0 < float(number) < float("inf"):
        raise ValueError(f"{what} must be positive and finite, found {number}.")
    return float(number)
