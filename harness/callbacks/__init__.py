"""Callbacks: progress bar, parity plots, gradients of components, checkpoints to go on from."""

from __future__ import annotations

from harness.callbacks.gradient_share import GradientShare
from harness.callbacks.parity import ParityPlot
from harness.callbacks.progress import LossProgressBar
from harness.callbacks.resume import REQUEUE_EXIT_CODE, Preempted, ResumeCheckpoint

__all__ = ["REQUEUE_EXIT_CODE", "GradientShare", "LossProgressBar", "ParityPlot", "Preempted", "ResumeCheckpoint"]
