"""Callbacks: reports and pictures, coefficients of NequIP's kind, checkpoints to resume from, and guards."""

from __future__ import annotations

from harness.callbacks.averaged_weights import ExponentialMovingAverage
from harness.callbacks.best_epoch import BestEpoch
from harness.callbacks.coefficient_curve import CoefficientCurve
from harness.callbacks.gradient_share import GradientShare
from harness.callbacks.learning_rate import UsedLearningRates
from harness.callbacks.nequip import LinearLossCoefficientScheduler, LossCoefficientMonitor, LossCoefficientScheduler
from harness.callbacks.nonfinite import NonFiniteError, NonFiniteGuard
from harness.callbacks.parity import ParityPlot
from harness.callbacks.per_group import PerGroupReport
from harness.callbacks.per_type import PerTypeReport
from harness.callbacks.progress import LossProgressBar
from harness.callbacks.resume import ResumeCheckpoint
from harness.callbacks.throughput import ThroughputMonitor
from harness.callbacks.validation_table import ValidationTable
from harness.runs import REQUEUE_EXIT_CODE, Preempted

__all__ = [
    "REQUEUE_EXIT_CODE",
    "BestEpoch",
    "CoefficientCurve",
    "ExponentialMovingAverage",
    "GradientShare",
    "LinearLossCoefficientScheduler",
    "LossCoefficientMonitor",
    "LossCoefficientScheduler",
    "LossProgressBar",
    "NonFiniteError",
    "NonFiniteGuard",
    "ParityPlot",
    "PerGroupReport",
    "PerTypeReport",
    "Preempted",
    "ResumeCheckpoint",
    "ThroughputMonitor",
    "UsedLearningRates",
    "ValidationTable",
]
