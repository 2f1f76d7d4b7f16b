"""The Lightning module, a step as its observers see it, and the keys that its values are logged under."""

from harness.module.lightning import ForceFieldModule, ManagerSource
from harness.module.log_keys import LogKeys
from harness.module.reporting import AxesLogger, define_axes, log_to_all
from harness.module.step import LearntWeighting, Step, StepObserver, StepSums, is_nth_step
from harness.support.lightning_private import logged_step

__all__ = [
    "AxesLogger",
    "ForceFieldModule",
    "LearntWeighting",
    "LogKeys",
    "ManagerSource",
    "Step",
    "StepObserver",
    "StepSums",
    "define_axes",
    "is_nth_step",
    "log_to_all",
    "logged_step",
]
