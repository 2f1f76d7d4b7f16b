"""Schedules that move from one set of coefficients to another, by the epoch or by the learning rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from harness.schedules.arguments import Coefficients, check_same_names, read_coefficients, read_epoch
from harness.schedules.schedule import Schedule

__all__ = ["Cosine", "Exponential", "LearningRateCoupled", "Linear", "Ramp"]


@dataclass(frozen=True)
class Ramp(Schedule):
    """From some coefficients to others between two epochs; base of ramps, and of your own, which define the curve.

    Args:
        start: coefficients up to ``start_epoch``.
        end: coefficients from ``end_epoch`` on, of the same names.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.
    """

    start: Coefficients
    end: Coefficients
    start_epoch: float
    end_epoch: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        self._set(
            start=read_coefficients(self.start, f"{name}: `start`"),
            end=read_coefficients(self.end, f"{name}: `end`"),
            start_epoch=read_epoch(self.start_epoch, f"{name}: `start_epoch`"),
            end_epoch=read_epoch(self.end_epoch, f"{name}: `end_epoch`"),
        )
        check_same_names(name, start=self.start, end=self.end)
        if not self.start_epoch < self.end_epoch:
            raise ValueError(
                f"{name}: `start_epoch` is before `end_epoch`, found {self.start_epoch:g} and {self.end_epoch:g}. For "
                f"a jump use PiecewiseConstant or Join."
            )

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients between the two ends, and exactly those at and beyond them."""
        if epoch <= self.start_epoch:
            return dict(self.start)
        if epoch >= self.end_epoch:
            return {name: self.end[name] for name in self.names}
        progress = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        between = {}
        for name, start in self.start.items():
            low, high = sorted((start, self.end[name]))
            between[name] = min(max(self.between(start, self.end[name], progress), low), high)  # rounding may lead out
        return between

    @abstractmethod
    def between(self, start: float, end: float, progress: float) -> float:
        """Coefficient at a progress between 0 and 1."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return tuple(self.start)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Start and end of the ramp."""
        return (self.start_epoch, self.end_epoch)


@dataclass(frozen=True)
class Linear(Ramp):
    r"""Along a straight line from some coefficients to others.

    .. math:: c_k(e) = (1 - t)\, \text{start}_k + t\, \text{end}_k, \qquad
        t = \frac{e - \text{start\_epoch}}{\text{end\_epoch} - \text{start\_epoch}} \text{ within } [0, 1]

    Before and after, the coefficients are exactly those of the start and of the end. A ramp from 0 has its component
    in the sum from the beginning.

    Args:
        start: coefficients up to ``start_epoch``.
        end: coefficients from ``end_epoch`` on, of the same names.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.

    Example:
        >>> Linear({"forces_mse": 0}, {"forces_mse": 10}, start_epoch=10, end_epoch=20)(12.5)
        {'forces_mse': 2.5}

    As ``optax.linear_schedule`` (https://optax.readthedocs.io).
    """

    def between(self, start: float, end: float, progress: float) -> float:
        """A point of the straight line."""
        return (1 - progress) * start + progress * end


@dataclass(frozen=True)
class Cosine(Ramp):
    r"""Along half a cosine from some coefficients to others: slowly at both ends.

    .. math:: c_k(e) = \text{end}_k + (\text{start}_k - \text{end}_k) \frac{1 + \cos(\pi t)}{2}, \qquad
        t = \frac{e - \text{start\_epoch}}{\text{end\_epoch} - \text{start\_epoch}} \text{ within } [0, 1]

    Args:
        start: coefficients up to ``start_epoch``.
        end: coefficients from ``end_epoch`` on, of the same names.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.

    Example:
        >>> Cosine({"forces_mse": 1}, {"forces_mse": 9}, start_epoch=0, end_epoch=10)(5)
        {'forces_mse': 5.0}

    The shape is that of Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """

    def between(self, start: float, end: float, progress: float) -> float:
        """A point of half a cosine."""
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Exponential(Ramp):
    r"""By the same factor in every epoch from some coefficients to others: a straight line of their logarithms.

    .. math:: c_k(e) = \text{start}_k^{1 - t}\; \text{end}_k^{t}, \qquad
        t = \frac{e - \text{start\_epoch}}{\text{end\_epoch} - \text{start\_epoch}} \text{ within } [0, 1]

    Args:
        start: coefficients up to ``start_epoch``, above 0.
        end: coefficients from ``end_epoch`` on, of the same names, above 0.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.

    Example:
        >>> Exponential({"forces_mse": 1000}, {"forces_mse": 10}, start_epoch=0, end_epoch=10)(5)
        {'forces_mse': 100.0}

    As ``optax.exponential_decay`` (https://optax.readthedocs.io), with the end in the place of a rate.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, coeffs in (("start", self.start), ("end", self.end)):
            zeros = [name for name, value in coeffs.items() if value == 0]
            if zeros:
                raise ValueError(
                    f"Exponential: `{what}` has 0 for {', '.join(zeros)}, where no factor leads to. Use Linear for a "
                    f"ramp from or to 0."
                )

    def between(self, start: float, end: float, progress: float) -> float:
        """A geometric mean of the two ends."""
        return float(start ** (1 - progress) * end**progress)


@dataclass(frozen=True)
class LearningRateCoupled(Schedule):
    r"""From some coefficients to others as the learning rate falls.

    .. math:: c_k = \text{limit}_k + (\text{start}_k - \text{limit}_k) \frac{\mathrm{lr}(e)}{\mathrm{lr}_0}

    which is ``start`` at the learning rate :math:`\mathrm{lr}_0` that the optimizer was given and would be ``limit`` at
    one of 0. A learning rate above :math:`\mathrm{lr}_0` leads beyond ``start``; the result is never below 0.

    Args:
        start: coefficients at the learning rate that the optimizer was given.
        limit: coefficients that are approached as the learning rate falls to 0, of the same names.

    Raises:
        TypeError, ValueError: a mistake in the coefficients; when called, no learning rate.

    Example:
        >>> LearningRateCoupled(start={"forces_mse": 1000}, limit={"forces_mse": 1})(10, learning_rate=0.5)
        {'forces_mse': 500.5}

    The prefactors of DeePMD-kit: Wang et al., Comput. Phys. Commun. 228, 178 (2018).
    """

    start: Coefficients
    limit: Coefficients

    def __post_init__(self) -> None:
        self._set(
            start=read_coefficients(self.start, "LearningRateCoupled: `start`"),
            limit=read_coefficients(self.limit, "LearningRateCoupled: `limit`"),
        )
        check_same_names("LearningRateCoupled", start=self.start, limit=self.limit)

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients at a learning rate.

        Raises:
            ValueError: the learning rate is not given, not finite or below 0.
        """
        if learning_rate is None or not 0 <= learning_rate < math.inf:
            raise ValueError(
                f"LearningRateCoupled needs the learning rate, as a part of that which the optimizer was given: a "
                f"finite number of at least 0; found {learning_rate!r}."
            )
        # written so that a ratio of 1 gives `start` to the last bit
        return {
            name: max(start * learning_rate + self.limit[name] * (1 - learning_rate), 0.0)
            for name, start in self.start.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return tuple(self.start)

    @property
    def needs_learning_rate(self) -> bool:
        """Always."""
        return True
