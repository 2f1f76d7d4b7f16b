"""Report of a sweep, finished or not: a ranked table, and the Pareto front of energy and force errors."""

from harness.sweep.command import main
from harness.sweep.points import Sweep, SweepPoint
from harness.sweep.ranking import RankedSweep, rank
from harness.sweep.reading import read_sweep

__all__ = ["RankedSweep", "Sweep", "SweepPoint", "main", "rank", "read_sweep"]
