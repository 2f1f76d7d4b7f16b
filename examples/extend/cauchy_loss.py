"""A metric of your own, and its check: the Cauchy loss, which lets outliers among the labels weigh little.

python examples/extend/cauchy_loss.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import ErrorMetric
from harness.testing import check_metric


class CauchyLoss(ErrorMetric):
    r"""Mean of :math:`\log(1 + (r / c)^2)` over all elements, with the error :math:`r` and a scale :math:`c`.

    Args:
        scale: :math:`c` in the unit of the field; errors well above it hardly pull.

    Raises:
        ValueError: a scale that is not positive.
    """

    def __init__(self, scale: float = 0.1, **options: Any) -> None:
        if not scale > 0:
            raise ValueError(f"scale is a positive number in the unit of the field, found {scale!r}.")
        super().__init__(scale, **options)  # what the errors depend on: it tells metrics apart
        self.scale = scale

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Errors of each element, of the same shape; 0 where prediction and target are both 0."""
        return torch.log1p(((prediction - target) / self.scale).square())

    def __str__(self) -> str:
        return "cauchy"


def expected(prediction: Any, target: Any) -> float:
    """The right value, in NumPy, from all data at once."""
    return np.log1p(((prediction - target) / 0.2) ** 2).mean()


if __name__ == "__main__":
    laws = check_metric(CauchyLoss(scale=0.2), expected, field="forces", per_type=True)
    print("These laws hold:", ", ".join(laws))
