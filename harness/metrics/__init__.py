"""Losses and error metrics: measure a row, merge rows, evaluate components and their weighted sum."""

from harness.metrics.accumulation import Window
from harness.metrics.adapters import GatheredAdapter, MergedAdapter
from harness.metrics.coefficients import Coefficients, Normalisation, WeightedComponents, Weighting
from harness.metrics.components import WEIGHTED_SUM, MetricEntry, WeightedEntry, parse_entries
from harness.metrics.distributions import ErrorQuantile, RelativeMeanAbsoluteError, RelativeRootMeanSquaredError
from harness.metrics.errors import (
    ErrorMetric,
    HuberLoss,
    MaximumAbsoluteError,
    MeanAbsoluteError,
    MeanSquaredError,
    RootMeanSquaredError,
    StratifiedHuberForceLoss,
    Value,
    check_same_shape,
    is_linear,
    largest,
    mean,
    root_mean,
    total,
)
from harness.metrics.layout import Layout
from harness.metrics.manager import MetricsManager
from harness.metrics.measure import BatchReader, Reading, modifier_key
from harness.metrics.measured import MeasuredComponents
from harness.metrics.row import Elements, Row, merge_rows_over_ranks
from harness.metrics.running import RunningStep
from harness.metrics.structures import EnergyForcesWithinThreshold, MeanOverStructures
from harness.metrics.together import begin_step, compute_together, merge_accumulated, step_together
from harness.metrics.values import Evaluated, NamedValues, Report, Values
from harness.metrics.vectors import FractionWithin, MeanCosineSimilarity, MeanVectorError

__all__ = [
    "WEIGHTED_SUM",
    "BatchReader",
    "Coefficients",
    "Elements",
    "EnergyForcesWithinThreshold",
    "ErrorMetric",
    "ErrorQuantile",
    "Evaluated",
    "FractionWithin",
    "GatheredAdapter",
    "HuberLoss",
    "Layout",
    "MaximumAbsoluteError",
    "MeanAbsoluteError",
    "MeanCosineSimilarity",
    "MeanOverStructures",
    "MeanSquaredError",
    "MeanVectorError",
    "MeasuredComponents",
    "MergedAdapter",
    "MetricEntry",
    "MetricsManager",
    "NamedValues",
    "Normalisation",
    "Reading",
    "RelativeMeanAbsoluteError",
    "RelativeRootMeanSquaredError",
    "Report",
    "RootMeanSquaredError",
    "Row",
    "RunningStep",
    "StratifiedHuberForceLoss",
    "Value",
    "Values",
    "WeightedComponents",
    "WeightedEntry",
    "Weighting",
    "Window",
    "begin_step",
    "check_same_shape",
    "compute_together",
    "is_linear",
    "largest",
    "mean",
    "merge_accumulated",
    "merge_rows_over_ranks",
    "modifier_key",
    "parse_entries",
    "root_mean",
    "step_together",
    "total",
]
