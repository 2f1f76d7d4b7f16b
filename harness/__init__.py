"""Losses and error metrics for training interatomic potentials, exact on any number of ranks."""

from harness.fields import (
    FieldSpec,
    MappedFieldModifier,
    PerAtomModifier,
    field_spec,
    register_field,
    registered_fields,
)
from harness.manager import MetricsManager, Values, compute_together, merge_accumulated, step_together
from harness.metrics import (
    ErrorMetric,
    HuberLoss,
    MaximumAbsoluteError,
    MeanAbsoluteError,
    MeanSquaredError,
    RootMeanSquaredError,
    StratifiedHuberForceLoss,
)
from harness.presets import (
    EnergyForceLoss,
    EnergyForceMetrics,
    EnergyForceStressLoss,
    EnergyForceStressMetrics,
    EnergyOnlyLoss,
    EnergyOnlyMetrics,
)

__version__ = "0.1.0"

__all__ = [
    "EnergyForceLoss",
    "EnergyForceMetrics",
    "EnergyForceStressLoss",
    "EnergyForceStressMetrics",
    "EnergyOnlyLoss",
    "EnergyOnlyMetrics",
    "ErrorMetric",
    "FieldSpec",
    "HuberLoss",
    "MappedFieldModifier",
    "MaximumAbsoluteError",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "MetricsManager",
    "PerAtomModifier",
    "RootMeanSquaredError",
    "StratifiedHuberForceLoss",
    "Values",
    "compute_together",
    "field_spec",
    "merge_accumulated",
    "register_field",
    "registered_fields",
    "step_together",
]
