r"""Coefficients that change during a training: pure functions of the epoch, which nest.

A schedule is called with an epoch, and with the learning rate where it needs it, and returns the coefficients that
hold then, by name. It has no state: a training that is continued at an epoch has the coefficients of that epoch.

    >>> ramp = Linear({"forces_mse": 0}, {"forces_mse": 10}, start_epoch=0, end_epoch=20)
    >>> later = Constant({"forces_mse": 10, "per_atom_energy_mse": 100})
    >>> Join([ramp, later], boundaries=[50])(5)
    {'forces_mse': 2.5}

**Coefficients** are given as users give them to a loss: ``{component: number}``, finite and at least 0; the loss
normalises them, or takes them as given. ``{component: {type: number}}`` are the weights of a component's average over
the atom types. They go by the names that the per-type values are reported under, ``{component}_{type}``, so that
``{"forces_mse": {"H": 5, "O": 1}}`` and ``{"forces_mse_H": 5, "forces_mse_O": 1}`` are the same. A name that is absent
at an epoch is one that the schedule does not touch then: the coefficient that the loss was given holds. 0 is not
absence: the component stays in the sum, with no weight.

**Epochs** are absolute, in every schedule and also inside of :class:`Join`: 0 is the start of the training. Fractions
are the steps within an epoch.
"""

from harness.schedules.combined import Join, Scale, Together
from harness.schedules.ramps import Cosine, Exponential, LearningRateCoupled, Linear, Ramp
from harness.schedules.schedule import (
    NO_SETTINGS,
    Interval,
    Schedule,
    Settings,
    as_schedule,
    check_interval,
    described,
    unreached,
)
from harness.schedules.stages import Constant, PiecewiseConstant, Stage

__all__ = [
    "NO_SETTINGS",
    "Constant",
    "Cosine",
    "Exponential",
    "Interval",
    "Join",
    "LearningRateCoupled",
    "Linear",
    "PiecewiseConstant",
    "Ramp",
    "Scale",
    "Schedule",
    "Settings",
    "Stage",
    "Together",
    "as_schedule",
    "check_interval",
    "described",
    "unreached",
]
