"""Uncertainty weighting: log variances of the components, learnt beside the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from harness.metrics import Values
from harness.support.checks import is_number

__all__ = ["UncertaintyWeighting"]

_LIMIT = 50.0
"""Bound of log variances: variances from 2e-22 to 5e21, where a component without any error would lead beyond."""


class UncertaintyWeighting(nn.Module):
    r"""Weights each component by the inverse of a variance that is learnt with the model.

    With the user's coefficients, divided by their sum :math:`W`, as :math:`w_k`, and the values :math:`v_k`, the log
    variances :math:`s_k` minimise

    .. math:: \frac12 \sum_k w_k \left( e^{-s_k} v_k + s_k \right)

    so that :math:`s_k = \ln v_k` once they have settled, and every component contributes its :math:`w_k`: the user's
    coefficients are the shares in the sum that is aimed at, whatever the units of the components. The model is trained
    on the weighted sum with the coefficients

    .. math:: c_k = W \frac{w_k e^{-s_k}}{\sum_j w_j e^{-s_j}}

    (:math:`W = 1` where they are normalised), whose scale does not change with the variances, so that learning rates
    keep their meaning; through them no gradient flows. What is logged as coefficients are these :math:`c_k`;
    ``loss.coeffs``, on the host, are the set-point :math:`W w_k`. A component without data in a step does not move its
    variance.

    The log variances are one float32 parameter of the loss, in checkpoints and in the same optimizer as the model's
    parameters: its learning rate moves them, its weight decay pulls them to 0, that is, back to the user's
    coefficients, and clipping of gradients counts them in. With Adam they move by about a learning rate each step;
    ``speed`` multiplies that.

    A step costs no further communication, and the host does not wait: the values are merged, so that every rank has the
    whole gradient of the variances.

    Args:
        initial_log_variance: where all :math:`s_k` begin; coefficients are the user's then.
        speed: the log variances are this times the parameter.

    Raises:
        ValueError: a number out of range.

    References:
        Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics, CVPR 2018 (arXiv:1705.07115).
    """

    def __init__(self, initial_log_variance: float = 0.0, speed: float = 1.0) -> None:
        super().__init__()
        for name, value in (("initial_log_variance", initial_log_variance), ("speed", speed)):
            if not is_number(value) or not math.isfinite(value):
                raise ValueError(f"{name} is a finite number, found {value!r}.")
        if abs(initial_log_variance) > _LIMIT:
            raise ValueError(f"initial_log_variance is within ±{_LIMIT:g}, found {initial_log_variance}.")
        if speed <= 0:
            raise ValueError(f"speed is above 0, found {speed}.")
        self.initial_log_variance = float(initial_log_variance)
        self.speed = float(speed)
        self.names: tuple[str, ...] = ()
        """Components, in the order of the log variances."""
        self.register_parameter("log_variances", None)

    def prepare(self, names: Sequence[str]) -> None:
        """Make the log variances of these components."""
        self.names = tuple(names)
        start = torch.full((len(names),), self.initial_log_variance / self.speed, dtype=torch.float32)
        self.log_variances = nn.Parameter(start)

    def _exponents(self) -> Tensor:
        """The log variances: float64 ``[num_components]``."""
        if self.log_variances is None:
            raise ValueError("UncertaintyWeighting has no components yet: hand it to a loss, loss.weigh_by(...).")
        parameter = cast(Tensor, self.log_variances)
        return (self.speed * parameter.to(torch.float64)).clamp(-_LIMIT, _LIMIT)

    def forward(self, coeffs: Tensor) -> Tensor:
        """Coefficients of the same sum as those that were given: float64 ``[num_components]``; without a gradient."""
        weights = coeffs * torch.exp(-self._exponents().detach())
        return weights * (coeffs.sum() / weights.sum())

    def objective(self, values: Values) -> Tensor:
        """Objective of the log variances, from the values of a step; its gradient does not reach the model."""
        if values.coeffs is None:
            raise ValueError("No component of the loss has a coefficient: there is nothing to weigh.")
        exponents = self._exponents()
        number = len(exponents)
        # the coefficients of a step tell those that were given
        given = values.coeffs * torch.exp(exponents.detach())
        given = given / given.sum()
        counts = values.has_data[:number] & (given > 0)
        errors = torch.where(counts, values.reported[:number].detach(), 0.0)
        return 0.5 * (torch.where(counts, given, 0.0) * (torch.exp(-exponents) * errors + exponents)).sum()

    def extra_repr(self) -> str:
        """Names of the components."""
        return f"{', '.join(self.names)}, speed={self.speed}"
