"""Callbacks that show results; they read values and never reach into a manager's row."""

from harness.callbacks.parity import ParityPlot
from harness.callbacks.progress import LossProgressBar

__all__ = ["LossProgressBar", "ParityPlot"]
