"""Managers with every kind of component: weights, sets, groups, means over sets, and all further measures."""

from __future__ import annotations

from typing import Any

import torch
from support import oracle
from support.accumulation_cases import TYPES
from support.frames import weighted
from torch import Tensor

import harness
from harness.metrics import (
    EnergyForcesWithinThreshold,
    ErrorQuantile,
    FractionWithin,
    MeanCosineSimilarity,
    MeanOverStructures,
    MeanVectorError,
    RelativeMeanAbsoluteError,
    RelativeRootMeanSquaredError,
)

GROUPS, SETS = ("bulk", "surface", "vacancy"), ("crystals", "molecules")


def everything() -> list[harness.MetricsManager]:
    """A loss, and metrics that watch."""
    names: dict[str, Any] = {"group_names": GROUPS, "set_names": SETS}
    loss = harness.MetricsManager(
        [
            _entry("energy", harness.PerAtomModifier("total_energy"), harness.MeanSquaredError(), coeff=1.0),
            _entry("by_type", "forces", harness.MeanSquaredError(), coeff=1.0, per_type=True, per_group=True),
            _entry("by_set", "forces", harness.MeanAbsoluteError(), coeff=1.0, per_set_coeffs=dict.fromkeys(SETS, 2)),
            _entry("huber", "forces", harness.HuberLoss(), coeff=0.5, sets=["molecules"], weights="in_sums"),
            _entry("stress", "stress", harness.RootMeanSquaredError(), coeff=1.0, per_set=True, weights=False),
            _entry("relative", "forces", RelativeRootMeanSquaredError(), coeff=0.1),
        ],
        TYPES,
        **names,
    )  # fmt: skip
    watched = harness.MetricsManager(
        [
            _entry("largest", "forces", harness.MaximumAbsoluteError(), per_type=True, per_set=True),
            _entry("norm", "forces", MeanVectorError(), per_group=True),
            _entry("cosine", "forces", MeanCosineSimilarity()),
            _entry("within", "total_energy", FractionWithin(0.5)),
            _entry("relative", "forces", RelativeMeanAbsoluteError(), per_type=True, per_set=True),
            _entry("quantile", "forces", ErrorQuantile(0.5, vectors=True), per_group=True),
            _entry("efwt", None, EnergyForcesWithinThreshold(energy=1.0, forces=2.0)),
            _entry("structures", None, MeanOverStructures("forces")),
        ],
        TYPES,
        **names,
    )
    watched.keep_by_group()
    return [loss, watched]


def _entry(name: str, field: Any, metric: Any, **keys: Any) -> dict[str, Any]:
    masked = {} if field is None else {"ignore_nan": True}
    return {"name": name, "field": field, "metric": metric, **masked, **keys}


def frames(seed: int, atoms: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Predictions that want gradients, and a target with missing labels, weights (some of them 0), sets and groups."""
    features, target = oracle.draw(seed, atoms, unlabelled=0.2)
    preds = {
        name: value.detach().requires_grad_() for name, value in oracle.predict(features, oracle.parameters()).items()
    }
    number = torch.arange(len(atoms))
    target |= weighted(seed, len(atoms))
    target |= {"group_index": number % (len(GROUPS) + 1) - 1, "set_index": number % len(SETS)}
    return preds, target
