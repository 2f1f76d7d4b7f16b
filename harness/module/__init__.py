"""The Lightning module, a step as its observers see it, and the keys that its values are logged under."""

from harness.module.lightning import ForceFieldModule, ManagerSource
from harness.module.parameters import ParameterGroup, freeze
from harness.module.reporting import AxesLogger, define_axes, log_to_all
from harness.module.step import (
    LearntWeighting,
    Step,
    StepObserver,
    StepSums,
    current_step,
    is_nth_step,
    is_nth_step_done,
)
from harness.support.lightning_private import logged_step
from harness.support.log_keys import LogKeys

__all__ = [
    "AxesLogger",
    "ForceFieldModule",
    "LearntWeighting",
    "LogKeys",
    "ManagerSource",
    "ParameterGroup",
    "Step",
    "StepObserver",
    "StepSums",
    "current_step",
    "define_axes",
    "freeze",
    "is_nth_step",
    "is_nth_step_done",
    "log_to_all",
    "logged_step",
]
