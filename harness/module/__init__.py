"""The Lightning module, and a step as its observers see it."""

from harness.module.lightning import ForceFieldModule, ManagerSource
from harness.module.step import AxesLogger, LearntWeighting, Step, StepObserver, logged_step

__all__ = ["AxesLogger", "ForceFieldModule", "LearntWeighting", "ManagerSource", "Step", "StepObserver", "logged_step"]
