"""Losses and error metrics for training interatomic potentials, exact on any number of ranks."""

from typing import TYPE_CHECKING, Any

from harness.fields import (
    FieldSpec,
    MappedFieldModifier,
    PerAtomModifier,
    field_spec,
    register_field,
    registered_fields,
)
from harness.metrics import (
    ErrorMetric,
    HuberLoss,
    MaximumAbsoluteError,
    MeanAbsoluteError,
    MeanSquaredError,
    MetricsManager,
    RootMeanSquaredError,
    StratifiedHuberForceLoss,
    Values,
    Window,
    compute_together,
    merge_accumulated,
    step_together,
)
from harness.presets import (
    EnergyForceLoss,
    EnergyForceMetrics,
    EnergyForceStressLoss,
    EnergyForceStressMetrics,
    EnergyOnlyLoss,
    EnergyOnlyMetrics,
)

if TYPE_CHECKING:
    from harness.module import ForceFieldModule
    from harness.trained import load_model

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
    "ForceFieldModule",
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
    "Window",
    "compute_together",
    "field_spec",
    "load_model",
    "merge_accumulated",
    "register_field",
    "registered_fields",
    "step_together",
]


def __getattr__(name: str) -> Any:
    """Names that need Lightning, on first use: losses and metrics alone need none."""
    if name == "ForceFieldModule":
        from harness.module import ForceFieldModule

        return ForceFieldModule
    if name == "load_model":
        from harness.trained import load_model

        return load_model
    raise AttributeError(f"module 'harness' has no attribute {name!r}. Public names: {', '.join(__all__)}.")
