"""Losses and error metrics: measure a row, merge rows, evaluate components and their weighted sum."""

from harness.metrics.accumulation import Window
from harness.metrics.adapters import DeferredMetric, ForeignMetric
from harness.metrics.coefficients import Coefficients
from harness.metrics.components import WEIGHTED_SUM, MetricEntry, parse_entries
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
from harness.metrics.layout import Layout, Reading, modifier_key
from harness.metrics.manager import MetricsManager, Weighting, compute_together, merge_accumulated, step_together
from harness.metrics.row import Elements, Row, merge_rows_over_ranks
from harness.metrics.values import Evaluated, Report, Values

__all__ = [
    "WEIGHTED_SUM",
    "Coefficients",
    "DeferredMetric",
    "Elements",
    "ErrorMetric",
    "Evaluated",
    "ForeignMetric",
    "HuberLoss",
    "Layout",
    "MaximumAbsoluteError",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "MetricEntry",
    "MetricsManager",
    "Reading",
    "Report",
    "RootMeanSquaredError",
    "Row",
    "StratifiedHuberForceLoss",
    "Value",
    "Values",
    "Weighting",
    "Window",
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
