"""Coefficients that change during a training: pure functions of the epoch, which nest."""

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
