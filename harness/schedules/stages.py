"""Schedules of constant coefficients: one set for good, one stage of a training, or one set after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.schedules.arguments import (
    Coefficients,
    Frozen,
    number_of,
    read_coefficients,
    read_epoch,
    read_optimizer_settings,
    union,
)
from harness.schedules.schedule import Schedule, Settings
from harness.support.checks import is_number

__all__ = ["Constant", "PiecewiseConstant", "Stage"]


@dataclass(frozen=True)
class Constant(Schedule):
    r"""The same coefficients at all times; without any, those that the loss was given.

    .. math:: c_k(e) = \text{coeffs}_k

    Args:
        coeffs: coefficients by component, or by component and atom type.

    Raises:
        TypeError, ValueError: a mistake in the coefficients, with its name and what is valid.

    Example:
        >>> Constant({"per_atom_energy_mse": 1, "forces_mse": {"H": 5, "O": 1}})(0)
        {'per_atom_energy_mse': 1.0, 'forces_mse_H': 5.0, 'forces_mse_O': 1.0}
        >>> Constant({})(0)
        {}

    As ``optax.constant_schedule`` (https://optax.readthedocs.io).
    """

    coeffs: Coefficients

    def __post_init__(self) -> None:
        self._set(coeffs=read_coefficients(self.coeffs, "Constant: `coeffs`", may_be_empty=True))

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """The coefficients."""
        return dict(self.coeffs)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return tuple(self.coeffs)


@dataclass(frozen=True)
class Stage(Constant):
    r"""Constant coefficients with settings of the optimizer and of averaged weights that hold as long as they do.

    A part of a :class:`Join`, whose boundaries say when; alone, it holds all along.

    Args:
        coeffs: coefficients as in :class:`Constant`; empty for those that the loss was given.
        optimizer: settings of the optimizer in the place of its own. ``lr`` is then the learning rate, whatever the
            scheduler says: of a group of parameters with a factor, times that factor. Other settings, such as
            ``weight_decay`` and ``betas``, hold in the groups that have none of their own. None for none.
        average_decay: decay of the exponential moving average of the weights, at least 0 and below 1; 0 lets the
            average be the weights themselves. None for the callback's own.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or settings, with what is valid.

    Example:
        >>> second = Stage({"per_atom_energy_mse": 1000, "forces_mse": 100}, optimizer={"lr": 0.001})
        >>> two_stages = Join([Constant({}), second], boundaries=[75])
        >>> two_stages(75)
        {'per_atom_energy_mse': 1000.0, 'forces_mse': 100.0}
        >>> dict(two_stages.settings(74).optimizer), dict(two_stages.settings(75).optimizer)
        ({}, {'lr': 0.001})

    The second stage of ``mace_run_train`` (``--stage_two``, formerly ``--swa``): Batatia et al., NeurIPS 2022.
    """

    optimizer: Mapping[str, Any] | None = field(default_factory=dict)
    average_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average_decay is not None and (not is_number(self.average_decay) or not 0 <= self.average_decay < 1):
            raise ValueError(
                f"Stage: `average_decay` is at least 0 and below 1, or null for that of the callback, found "
                f"{self.average_decay!r}."
            )
        self._set(optimizer=read_optimizer_settings(self.optimizer))

    def settings(self, epoch: float) -> Settings:
        """The settings of the stage."""
        return Settings(self.optimizer or {}, self.average_decay)

    @property
    def has_settings(self) -> bool:
        """True if the stage has settings beside the coefficients."""
        return bool(self.settings(0))


@dataclass(frozen=True)
class PiecewiseConstant(Schedule):
    r"""For each name the coefficient of the last milestone so far that names it.

    .. math:: c_k(e) = m_k(e'), \qquad e' = \max \{\text{milestones} \le e \text{ that name } k\}

    A component that a milestone does not name keeps its coefficient. Before the first milestone that names it, the
    loss's own coefficient holds.

    Args:
        milestones: ``{epoch: coefficients}``, in any order; epochs may be written as text, as in YAML.

    Raises:
        TypeError, ValueError: a mistake in the milestones, with the epoch and what is valid.

    Example:
        >>> schedule = PiecewiseConstant({0: {"forces_mse": 10, "stress_mse": 1}, 100: {"forces_mse": 1}})
        >>> schedule(99.5)
        {'forces_mse': 10.0, 'stress_mse': 1.0}
        >>> schedule(100)
        {'forces_mse': 1.0, 'stress_mse': 1.0}

    Written as the ``schedule`` of NequIP's ``LossCoefficientScheduler`` (https://nequip.readthedocs.io), which drops
    a component that a milestone does not name.
    """

    milestones: Mapping[Any, Coefficients]

    def __post_init__(self) -> None:
        what = "PiecewiseConstant: `milestones`"
        if not isinstance(self.milestones, Mapping) or not self.milestones:
            raise TypeError(
                f"{what} maps epochs to coefficients, such as {{0: {{forces_mse: 10}}}}, found {self.milestones!r}."
            )
        read: dict[float, Coefficients] = {}
        for key, coeffs in self.milestones.items():
            epoch = read_epoch(number_of(key), f"{what}: a milestone")
            if epoch in read:
                raise ValueError(f"{what}: epoch {epoch:g} stands there twice. Join the two into one.")
            read[epoch] = read_coefficients(coeffs, f"{what}: epoch {epoch:g}")
        self._set(milestones=Frozen(dict(sorted(read.items()))))

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients of the last milestones."""
        current: dict[str, float] = {}
        for milestone, coeffs in self.milestones.items():
            if milestone <= epoch:
                current.update(coeffs)
        return current

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return union(self.milestones.values())

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The milestones."""
        return tuple(self.milestones)
