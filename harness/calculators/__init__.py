"""ASE calculators of trained models."""

from harness.calculators.calculator import HarnessCalculator
from harness.calculators.skin import SkinNeighbors

__all__ = ["HarnessCalculator", "SkinNeighbors"]
