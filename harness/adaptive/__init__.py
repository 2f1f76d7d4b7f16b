"""Adaptive weighting: coefficients that follow what a training shows. It has state, and checkpoints keep it."""

from __future__ import annotations

from harness.adaptive.gradient_balance import GradientBalance
from harness.adaptive.softadapt import SoftAdapt
from harness.adaptive.uncertainty import UncertaintyWeighting

__all__ = ["GradientBalance", "SoftAdapt", "UncertaintyWeighting"]
