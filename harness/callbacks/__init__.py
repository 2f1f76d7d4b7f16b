"""Callbacks: what a training shows, what moves its coefficients, and checkpoints to go on from."""

from __future__ import annotations

from harness.callbacks.coefficients import (
    LinearLossCoefficientScheduler,
    LossCoefficientMonitor,
    LossCoefficientScheduler,
)
from harness.callbacks.curve import CoefficientCurve
from harness.callbacks.gradient_share import GradientShare
from harness.callbacks.parity import ParityPlot
from harness.callbacks.progress import LossProgressBar
from harness.callbacks.resume import REQUEUE_EXIT_CODE, Preempted, ResumeCheckpoint

__all__ = [
    "REQUEUE_EXIT_CODE",
    "CoefficientCurve",
    "GradientShare",
    "LinearLossCoefficientScheduler",
    "LossCoefficientMonitor",
    "LossCoefficientScheduler",
    "LossProgressBar",
    "ParityPlot",
    "Preempted",
    "ResumeCheckpoint",
]
