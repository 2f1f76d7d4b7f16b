"""Callbacks: what a training shows, what moves its coefficients, what it goes on from, and what ends it if it must."""

from __future__ import annotations

from harness.callbacks.coefficients import (
    LinearLossCoefficientScheduler,
    LossCoefficientMonitor,
    LossCoefficientScheduler,
)
from harness.callbacks.curve import CoefficientCurve
from harness.callbacks.nonfinite import NonFiniteError, NonFiniteGuard
from harness.callbacks.parity import ParityPlot
from harness.callbacks.progress import LossProgressBar
from harness.callbacks.resume import REQUEUE_EXIT_CODE, Preempted, ResumeCheckpoint

__all__ = [
    "REQUEUE_EXIT_CODE",
    "CoefficientCurve",
    "LinearLossCoefficientScheduler",
    "LossCoefficientMonitor",
    "LossCoefficientScheduler",
    "LossProgressBar",
    "NonFiniteError",
    "NonFiniteGuard",
    "ParityPlot",
    "Preempted",
    "ResumeCheckpoint",
]
