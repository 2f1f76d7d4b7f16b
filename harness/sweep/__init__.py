"""Report of a sweep, finished or not: a ranked table, and the Pareto front of energy and force errors."""

from harness.sweep.command import main
from harness.sweep.ranking import Report, report
from harness.sweep.reading import Point, Sweep, read_sweep

__all__ = ["Point", "Report", "Sweep", "main", "read_sweep", "report"]
