"""Adaptive weighting: coefficients that follow values or gradients of the training. Its state is in checkpoints."""

from __future__ import annotations

from harness.adaptive.gradient_balance import GradientBalance
from harness.adaptive.softadapt import SoftAdapt
from harness.adaptive.uncertainty import UncertaintyWeighting

__all__ = ["GradientBalance", "SoftAdapt", "UncertaintyWeighting"]
