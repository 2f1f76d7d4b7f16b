"""Callbacks: progress bar, tables and plots, checkpoints to go on from, and what ends a training that went wrong."""

from __future__ import annotations

from harness.callbacks.nonfinite import NonFiniteError, NonFiniteGuard
from harness.callbacks.parity import ParityPlot
from harness.callbacks.progress import LossProgressBar
from harness.callbacks.resume import REQUEUE_EXIT_CODE, Preempted, ResumeCheckpoint

__all__ = [
    "REQUEUE_EXIT_CODE",
    "LossProgressBar",
    "NonFiniteError",
    "NonFiniteGuard",
    "ParityPlot",
    "Preempted",
    "ResumeCheckpoint",
]
