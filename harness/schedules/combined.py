"""Schedules of schedules: one after another, several together, and one whose coefficients are multiplied."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from harness.schedules.arguments import read_epoch, union
from harness.schedules.schedule import Schedule, Settings, as_schedule, read_schedules

__all__ = ["Join", "Scale", "Together"]


@dataclass(frozen=True)
class Join(Schedule):
    r"""One schedule after the other; at a boundary the later one holds.

    .. math:: c(e) = s_i(e), \qquad b_{i-1} \le e < b_i

    Each is called with the epoch of the training, not with that since its own beginning as in
    ``optax.join_schedules``: a ``Linear`` that follows a boundary of 50 is given a ``start_epoch`` of 50 or later.
    What the schedule that holds does not name has the loss's own coefficient, whatever came before.

    Args:
        schedules: in the order of time.
        boundaries: epochs between them, one less than there are schedules, rising.

    Raises:
        TypeError, ValueError: something that is no schedule, or boundaries that do not fit.

    Example:
        >>> two_stages = Join([Constant({}), Constant({"per_atom_energy_mse": 1000})], boundaries=[75])
        >>> two_stages(74), two_stages(75)
        ({}, {'per_atom_energy_mse': 1000.0})

    As ``optax.join_schedules`` (https://optax.readthedocs.io). Two stages, the second with more weight on the energy,
    are those of MACE: Batatia et al., NeurIPS 2022.
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[float]

    def __post_init__(self) -> None:
        if not isinstance(self.boundaries, Sequence) or isinstance(self.boundaries, str):
            raise TypeError(f"Join: `boundaries` is a list of epochs, found {self.boundaries!r}.")
        self._set(
            schedules=read_schedules(self.schedules, "Join"),
            boundaries=tuple(read_epoch(epoch, f"Join: `boundaries[{i}]`") for i, epoch in enumerate(self.boundaries)),
        )
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ValueError(
                f"Join: {len(self.schedules)} schedules have {len(self.schedules) - 1} boundaries between them, found "
                f"{len(self.boundaries)}: {list(self.boundaries)}."
            )
        if any(later <= earlier for earlier, later in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"Join: `boundaries` rise strictly, found {list(self.boundaries)}.")

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients of the schedule that holds."""
        return self._of(epoch)(epoch, learning_rate)

    def settings(self, epoch: float) -> Settings:
        """Settings of the schedule that holds."""
        return self._of(epoch).settings(epoch)

    def _of(self, epoch: float) -> Schedule:
        return self.schedules[bisect_right(self.boundaries, epoch)]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return union(schedule.names for schedule in self.schedules)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The boundaries, and the breakpoints of every schedule while it holds."""
        begins, ends = (-math.inf, *self.boundaries), (*self.boundaries, math.inf)
        inner = {
            breakpoint
            for schedule, begin, end in zip(self.schedules, begins, ends, strict=True)
            for breakpoint in schedule.breakpoints
            if begin <= breakpoint < end
        }
        return tuple(sorted({*self.boundaries, *inner}))

    @property
    def _parts(self) -> Sequence[Schedule]:
        return self.schedules


@dataclass(frozen=True)
class Scale(Schedule):
    r"""A schedule times the factors that another one gives for some of its names.

    .. math:: c_k(e) = s_k(e)\, f_k(e)

    with a factor of 1 for what ``by`` does not name. Where ``schedule`` does not set a name at an epoch, there is
    nothing to be multiplied: it is absent, and the loss's own coefficient holds unchanged.

    Args:
        schedule: gives coefficients.
        by: gives factors, at least 0, for some of the same names.

    Raises:
        TypeError: one of the two is no schedule.
        ValueError: ``by`` names what ``schedule`` never sets; the valid names are listed.

    Example:
        >>> stages = PiecewiseConstant({0: {"forces_mse": 10}, 50: {"forces_mse": 4}})
        >>> warm_up = Linear({"forces_mse": 0}, {"forces_mse": 1}, start_epoch=0, end_epoch=10)
        >>> schedule = Scale(stages, by=warm_up)
        >>> schedule(5), schedule(20), schedule(50)
        ({'forces_mse': 5.0}, {'forces_mse': 10.0}, {'forces_mse': 4.0})

    As ``optax.scale_by_schedule`` (https://optax.readthedocs.io), which multiplies updates by a schedule.
    """

    schedule: Schedule
    by: Schedule

    def __post_init__(self) -> None:
        self._set(
            schedule=as_schedule(self.schedule, "Scale: `schedule`"),
            by=as_schedule(self.by, "Scale: `by`"),
        )
        unknown = [name for name in self.by.names if name not in self.schedule.names]
        if unknown:
            raise ValueError(
                f"Scale: `by` names {', '.join(unknown)}, which `schedule` never sets. It sets "
                f"{', '.join(self.schedule.names) or 'nothing'}. A factor multiplies what `schedule` gives: name the "
                f"coefficient there too."
            )

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients times factors."""
        factors = self.by(epoch, learning_rate)
        coeffs = self.schedule(epoch, learning_rate)
        return {name: coeff * factors[name] if name in factors else coeff for name, coeff in coeffs.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return self.schedule.names

    @property
    def _parts(self) -> Sequence[Schedule]:
        return (self.schedule, self.by)


@dataclass(frozen=True)
class Together(Schedule):
    r"""Several schedules at the same time, each of other names.

    .. math:: c_k(e) = s_{i,k}(e), \qquad s_i \text{ the one schedule that names } k

    Args:
        schedules: no two of them set the same name.

    Raises:
        TypeError: something that is no schedule.
        ValueError: two schedules set the same name.

    Example:
        >>> energy = Linear({"per_atom_energy_mse": 0}, {"per_atom_energy_mse": 8}, start_epoch=0, end_epoch=10)
        >>> forces = Cosine({"forces_mse": 8}, {"forces_mse": 0}, start_epoch=0, end_epoch=10)
        >>> Together([energy, forces])(5)
        {'per_atom_energy_mse': 4.0, 'forces_mse': 4.0}

    As ``optax.partition`` (https://optax.readthedocs.io), which gives each part of the parameters a transformation of
    its own.
    """

    schedules: Sequence[Schedule]

    def __post_init__(self) -> None:
        self._set(schedules=read_schedules(self.schedules, "Together"))
        owner: dict[str, int] = {}
        for position, schedule in enumerate(self.schedules):
            for name in schedule.names:
                if name in owner:
                    raise ValueError(
                        f"Together: schedules[{owner[name]}] and schedules[{position}] both set {name}. Each name is "
                        f"set by one of them; for one after the other use Join, for a product Scale."
                    )
                owner[name] = position

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients of all of them."""
        together: dict[str, float] = {}
        for schedule in self.schedules:
            together |= schedule(epoch, learning_rate)
        return together

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return union(schedule.names for schedule in self.schedules)

    @property
    def _parts(self) -> Sequence[Schedule]:
        return self.schedules
