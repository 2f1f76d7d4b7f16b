"""Norms, cosines, thresholds, relative errors, quantiles and means over structures: values, laws, and from YAML."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.metrics import (
    EnergyForcesWithinThreshold,
    ErrorQuantile,
    FractionWithin,
    MeanCosineSimilarity,
    MeanOverStructures,
    MeanVectorError,
    MetricsManager,
    RelativeMeanAbsoluteError,
    RelativeRootMeanSquaredError,
)
from harness.testing import check_metric


def norms(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt((vectors**2).sum(-1))


def lower_quantile(errors: np.ndarray, quantile: float) -> float:
    """The k-th smallest, k = ⌈qN⌉."""
    return float(np.sort(errors.ravel())[math.ceil(round(quantile * errors.size, 9)) - 1])


ORACLES = {
    "mean_norm": (MeanVectorError(), lambda p, t: norms(p - t).mean(), {}),
    "cosine": (MeanCosineSimilarity(), lambda p, t: ((p * t).sum(-1) / (norms(p) * norms(t))).mean(), {}),
    "within": (FractionWithin(0.7), lambda p, t: (abs(p - t) < 0.7).mean(), {}),
    "rel_mae": (RelativeMeanAbsoluteError(), lambda p, t: abs(p - t).sum() / abs(t).sum(), {}),
    "rel_rmse": (RelativeRootMeanSquaredError(), lambda p, t: math.sqrt(((p - t) ** 2).sum() / (t**2).sum()), {}),
    "q95": (ErrorQuantile(), lambda p, t: lower_quantile(abs(p - t), 0.95), {"rtol": 0.0201}),
    "q50": (
        ErrorQuantile(0.5, relative_error=0.001, vectors=True),
        lambda p, t: lower_quantile(norms(p - t), 0.5),
        {"rtol": 0.0011},
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_laws(name):
    metric, expected, options = ORACLES[name]
    assert str(metric) == name
    is_row_wise = name in ("mean_norm", "cosine", "within")
    held = check_metric(
        metric, expected, per_type=is_row_wise, ranks=(2,) if name in ("cosine", "q95") else (), **options
    )
    assert {"value", "several batches", "merge", "order", "empty batch", "checkpoint"} <= set(held)
    assert ("gradient" in held) == (name not in ("within", "q95", "q50"))


def test_vectors_that_lack_components_count_by_their_fraction():
    preds, target = torch.tensor([[3.0, 4.0, 9.0], [1.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, torch.nan], [0.0] * 3])
    manager = MetricsManager([{"field": "forces", "metric": MeanVectorError(), "ignore_nan": True, "name": "norm"}])
    value = manager({"forces": preds}, {"forces": target})["norm"]
    # 2/3 of a vector of error 5·3/2, the two components' share of three, and one of error 3
    assert float(value) == pytest.approx((3 * 5 + 3 * 3) / 5)
    assert math.isnan(float(MeanVectorError()(preds, target)))


def test_gradients_at_no_error_and_no_vector_are_zero():
    for metric in (MeanVectorError(), MeanCosineSimilarity(), RelativeRootMeanSquaredError()):
        preds = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        target = torch.zeros(2, 3, dtype=torch.float64)
        if isinstance(metric, RelativeRootMeanSquaredError):
            preds, target = torch.ones_like(preds).requires_grad_(), torch.ones_like(target)
        value = metric(preds, target)
        value.backward()
        assert float(value) == 0
        assert preds.grad.abs().max() == 0
    for metric in (MeanVectorError(), MeanCosineSimilarity()):
        with pytest.raises(ValueError, match=r"compares vectors: expected \[..., 3\], found \[4\]"):
            metric(torch.ones(4), torch.ones(4))


def test_a_threshold_is_not_within_and_nan_is_not_hidden():
    target = torch.zeros(4, dtype=torch.float64)
    assert float(FractionWithin(0.5)(torch.tensor([0.5, 0.4, -0.6, 0.0], dtype=torch.float64), target)) == 0.5
    assert math.isnan(float(FractionWithin(0.5)(torch.tensor([0.5, 0.4, torch.nan, 0.0]), target.float())))
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="threshold must be positive and finite"):
            FractionWithin(wrong)
    with pytest.raises(TypeError, match="threshold is a number"):
        FractionWithin("0.1")


def test_relative_errors_without_a_scale_are_not_a_number():
    assert math.isnan(float(RelativeMeanAbsoluteError()(torch.ones(3), torch.zeros(3))))
    assert math.isnan(float(RelativeRootMeanSquaredError().compute()))


# ---- quantiles


@pytest.mark.parametrize("relative_error", [0.1, 0.02, 0.005])
def test_quantiles_are_as_exact_as_they_say(relative_error):
    errors = torch.from_numpy(np.exp(np.random.default_rng(0).normal(-3, 3, 5001)))
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.99, 1.0):
        metric = ErrorQuantile(quantile, relative_error, lowest=1e-9, highest=1e5)
        for part in errors.split(1234):
            metric.update(part, torch.zeros_like(part))
        exact = lower_quantile(errors.numpy(), quantile)
        assert abs(float(metric.compute()) - exact) <= relative_error * exact * (1 + 1e-9)


def test_ends_of_the_range_of_quantiles():
    def value(errors, **options):
        return float(ErrorQuantile(0.5, **options)(torch.tensor(errors, dtype=torch.float64), torch.zeros(len(errors))))

    assert value([1e-9, 0.0, 3.0]) == 0
    assert value([1e9, 1e9, 3.0]) == math.inf
    assert math.isnan(value([1.0, 2.0, math.nan]))
    assert math.isnan(float(ErrorQuantile().compute()))
    assert value([1.0] * 9, lowest=1.0 - 1e-9, highest=1.1) == pytest.approx(1, rel=0.02)
    for options, message in (
        ({"quantile": 1.5}, "quantile is a fraction"),
        ({"relative_error": 1}, "relative_error is above 0 and below 1"),
        ({"lowest": 2, "highest": 1}, "lowest must be below highest"),
    ):
        with pytest.raises(ValueError, match=message):
            ErrorQuantile(**options)
    with pytest.raises(TypeError, match="vectors is true or false"):
        ErrorQuantile(vectors="yes")
    with pytest.raises(ValueError, match="of vectors expects"):
        ErrorQuantile(vectors=True)(torch.ones(3), torch.ones(3))


# ---- structures


NUM_ATOMS = [3, 1, 4, 2, 5]


def batches(scale: float = 0.02, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Five structures; the second lacks its energy, the fourth the force on one atom."""
    random = np.random.default_rng(seed)
    numbers = torch.tensor(NUM_ATOMS)
    energy, forces = torch.tensor(random.normal(size=(5, 1))), torch.tensor(random.normal(size=(15, 3)))
    preds = {
        "total_energy": energy + torch.tensor(random.normal(size=(5, 1))) * scale / 2,
        "forces": forces + torch.tensor(random.normal(size=(15, 3))) * scale / 2,
    }
    target = {
        "total_energy": energy.clone(),
        "forces": forces.clone(),
        "num_atoms": numbers,
        "batch": torch.arange(5).repeat_interleave(numbers),
    }
    target["total_energy"][1] = torch.nan
    target["forces"][9] = torch.nan
    return preds, target


def parts(preds, target):
    """Each structure as a batch of its own."""
    starts = np.cumsum([0, *NUM_ATOMS])
    for number, (start, stop) in enumerate(pairwise(starts)):
        yield (
            {"total_energy": preds["total_energy"][[number]], "forces": preds["forces"][start:stop]},
            {
                "total_energy": target["total_energy"][[number]],
                "forces": target["forces"][start:stop],
                "num_atoms": target["num_atoms"][[number]],
            },
        )


def efwt(preds, target, energy, forces) -> float:
    right = []
    for own, labels in parts(preds, target):
        errors = [abs(own[name] - labels[name]).numpy() for name in ("total_energy", "forces")]
        if not np.isnan(errors[0]).any() and not np.isnan(errors[1]).any():
            right.append(errors[0].max() < energy and errors[1].max() < forces)
    return float(np.mean(right)) if right else math.nan


def by_structure(preds, target, field, error) -> float:
    values = []
    for own, labels in parts(preds, target):
        errors = abs(own[field] - labels[field]).numpy()
        errors = errors[~np.isnan(errors)]
        if errors.size:
            values.append(errors.mean() if error == "mae" else math.sqrt((errors**2).mean()))
    return float(np.mean(values))


COMPONENTS = """
- {name: efwt, metric: {_target_: harness.metrics.EnergyForcesWithinThreshold}}
- {name: loose, metric: {_target_: harness.metrics.EnergyForcesWithinThreshold, energy: 0.05, forces: 0.04}}
- {name: mae, metric: {_target_: harness.metrics.MeanOverStructures}}
- {name: rmse, metric: {_target_: harness.metrics.MeanOverStructures, error: rmse}}
- {name: energy, metric: {_target_: harness.metrics.MeanOverStructures, of: total_energy}}
- {field: forces, metric: {_target_: harness.metrics.MeanVectorError}, ignore_nan: true}
- {field: forces, metric: {_target_: harness.metrics.MeanCosineSimilarity}, ignore_nan: true}
- {field: forces, metric: {_target_: harness.metrics.RelativeMeanAbsoluteError}, ignore_nan: true}
- {field: forces, metric: {_target_: harness.metrics.ErrorQuantile, vectors: true}, ignore_nan: true, name: forces_q95}
- {field: total_energy, metric: {_target_: harness.metrics.FractionWithin, threshold: 0.02}, ignore_nan: true}
"""


@pytest.mark.parametrize("seed", range(3))
def test_measures_from_yaml_on_one_batch_and_on_many(seed):
    preds, target = batches(seed=seed)
    found = []
    for data in ([(preds, target)], list(parts(preds, target))):
        manager = MetricsManager(instantiate(OmegaConf.create(COMPONENTS), _convert_="all"))
        for own, labels in data:
            manager(own, labels)
        found.append({name: float(value) for name, value in manager.compute().items()})
    expected = {
        "efwt": efwt(preds, target, 0.02, 0.03),
        "loose": efwt(preds, target, 0.05, 0.04),
        "mae": by_structure(preds, target, "forces", "mae"),
        "rmse": by_structure(preds, target, "forces", "rmse"),
        "energy": by_structure(preds, target, "total_energy", "mae"),
    }
    assert found[0] == pytest.approx(found[1], rel=1e-12, nan_ok=True)
    assert {name: found[0][name] for name in expected} == pytest.approx(expected, rel=1e-12)
    known = ~target["forces"].isnan().any(1)
    error = norms((preds["forces"] - target["forces"])[known].numpy())
    assert found[0]["F_mean_norm"] == pytest.approx(error.mean(), rel=1e-12)
    assert found[0]["forces_q95"] == pytest.approx(lower_quantile(error, 0.95), rel=0.0201)


def test_thresholds_tell_structures_apart():
    preds, target = batches(scale=0.0)
    target = {name: value.nan_to_num(1.0) if value.is_floating_point() else value for name, value in target.items()}
    exact = {name: target[name].clone() for name in preds}
    metric = EnergyForcesWithinThreshold()
    assert float(metric(exact, target)) == 1
    exact["forces"][0, 1] += 0.031  # of the first structure
    exact["total_energy"][2] += 0.021
    assert float(metric(exact, target)) == pytest.approx(3 / 5)
    exact["forces"][14, 1] = torch.nan
    assert math.isnan(float(metric(exact, target)))


def test_a_structure_counts_once_whatever_its_size():
    target = {"forces": torch.zeros(4, 3), "num_atoms": torch.tensor([1, 3]), "batch": torch.tensor([0, 1, 1, 1])}
    preds = {"forces": torch.tensor([[1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3])}
    assert float(MeanOverStructures()(preds, target)) == 0.5
    with pytest.raises(ValueError, match="error is 'mae' or 'rmse', found 'mse'"):
        MeanOverStructures(error="mse")
    with pytest.raises(ValueError, match="of is a field of nodes or graphs"):
        MeanOverStructures(of="edge_cell_shift")
