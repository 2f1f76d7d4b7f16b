"""Losses and error metrics for training interatomic potentials, exact on any number of ranks."""

from typing import TYPE_CHECKING

from harness.support.lazy import names_of

if TYPE_CHECKING:
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
    from harness.module import ForceFieldModule
    from harness.presets import (
        EnergyForceLoss,
        EnergyForceMetrics,
        EnergyForceStressLoss,
        EnergyForceStressMetrics,
        EnergyOnlyLoss,
        EnergyOnlyMetrics,
    )
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

# on first use: a command that has nothing to train imports no torch, and losses and metrics alone need no Lightning
__getattr__, __dir__ = names_of(
    __name__,
    {
        "harness.fields": (
            "FieldSpec",
            "MappedFieldModifier",
            "PerAtomModifier",
            "field_spec",
            "register_field",
            "registered_fields",
        ),
        "harness.metrics": (
            "ErrorMetric",
            "HuberLoss",
            "MaximumAbsoluteError",
            "MeanAbsoluteError",
            "MeanSquaredError",
            "MetricsManager",
            "RootMeanSquaredError",
            "StratifiedHuberForceLoss",
            "Values",
            "Window",
            "compute_together",
            "merge_accumulated",
            "step_together",
        ),
        "harness.module": ("ForceFieldModule",),
        "harness.presets": (
            "EnergyForceLoss",
            "EnergyForceMetrics",
            "EnergyForceStressLoss",
            "EnergyForceStressMetrics",
            "EnergyOnlyLoss",
            "EnergyOnlyMetrics",
        ),
        "harness.trained": ("load_model",),
    },
)
