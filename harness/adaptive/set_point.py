"""Set-point: the coefficients that a user gave, which an adaptive scheme multiplies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["SetPoint"]


class SetPoint:
    r"""Coefficients as multiples of those that the user gave.

    .. math:: c_k = \frac{w_k f_k}{\sum_j w_j f_j} \sum_j w_j

    with the given coefficients :math:`w_k`, normalised or not, and the factors :math:`f_k`, which an adaptive scheme
    finds: the sum stays that of the given ones. Components whose coefficient is null or 0 are left as they are.

    Attributes:
        coeffs: :math:`w_k` of the components in the weighted sum.
        factors: :math:`f_k` of those with a coefficient above 0.
    """

    def __init__(self) -> None:
        self.coeffs: dict[str, float] = {}
        self.factors: dict[str, float] = {}
        self._is_moved = False

    def begin(self, loss: Any) -> None:
        """Take up a loss at the start of a training, or where a checkpoint has left it.

        Coefficients that are not those which were set last have been given since, and are the new set-point.

        Args:
            loss: a manager, of this package or NequIP's.
        """
        found = {name: entry.coeff for name, entry in loss.entries.items() if entry.coeff is not None}
        if self._is_moved and _same(found, self._moved):
            loss.set_coeffs(self._moved)  # a manager that normalises what it restores may be off by a rounding
            return
        if not self._is_moved and _same(found, self.coeffs):
            return
        self.coeffs, self._is_moved = found, False
        self.factors = {name: 1.0 for name, coeff in found.items() if coeff > 0}

    def move(self, loss: Any, factors: Mapping[str, float]) -> None:
        """Give a loss the coefficients of new factors; those that are not named stay."""
        self.factors |= factors
        self._is_moved = True
        loss.set_coeffs(self._moved)

    @property
    def _moved(self) -> dict[str, float]:
        multiples = {name: coeff * self.factors.get(name, 1.0) for name, coeff in self.coeffs.items()}
        scale = sum(self.coeffs.values()) / sum(multiples.values())
        return {name: scale * coeff for name, coeff in multiples.items()}

    def state(self) -> dict[str, Any]:
        """State for checkpoints."""
        return {"coeffs": dict(self.coeffs), "factors": dict(self.factors), "is_moved": self._is_moved}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.coeffs, self.factors = dict(state["coeffs"]), dict(state["factors"])
        self._is_moved = bool(state["is_moved"])


def _same(left: Mapping[str, float], right: Mapping[str, float]) -> bool:
    return left.keys() == right.keys() and all(
        math.isclose(value, right[name], rel_tol=1e-9) for name, value in left.items()
    )
