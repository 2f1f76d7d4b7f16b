"""Norms, cosines, thresholds, relative errors, quantiles and means over structures: values, laws, and from YAML."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from support import oracle
from support.frames import weighted
from support.spawning import spawn

import harness
from harness.callbacks.tables import component_unit
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
    starts = np.cumsum([0, *target["num_atoms"].tolist()])
    for number, (start, stop) in enumerate(pairwise(starts)):
        yield (
            {"total_energy": preds["total_energy"][[number]], "forces": preds["forces"][start:stop]},
            {
                "total_energy": target["total_energy"][[number]],
                "forces": target["forces"][start:stop],
                "num_atoms": target["num_atoms"][[number]],
            },
        )


def are_right(preds, target, energy, forces) -> np.ndarray:
    """1 or 0 for each structure, NaN for one that lacks a label."""
    right = []
    for own, labels in parts(preds, target):
        errors = [abs(own[name] - labels[name]).numpy() for name in ("total_energy", "forces")]
        known = not np.isnan(errors[0]).any() and not np.isnan(errors[1]).any()
        right.append(float(errors[0].max() < energy and errors[1].max() < forces) if known else math.nan)
    return np.array(right)


def own_errors(preds, target, field, error) -> np.ndarray:
    """Error of each structure, NaN for one without any label."""
    values = []
    for own, labels in parts(preds, target):
        errors = abs(own[field] - labels[field]).numpy()
        errors = errors[~np.isnan(errors)]
        mean = (errors if error == "mae" else errors**2).mean() if errors.size else math.nan
        values.append(mean if error == "mae" else math.sqrt(mean))
    return np.array(values)


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
        "efwt": np.nanmean(are_right(preds, target, 0.02, 0.03)),
        "loose": np.nanmean(are_right(preds, target, 0.05, 0.04)),
        "mae": np.nanmean(own_errors(preds, target, "forces", "mae")),
        "rmse": np.nanmean(own_errors(preds, target, "forces", "rmse")),
        "energy": np.nanmean(own_errors(preds, target, "total_energy", "mae")),
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


def test_an_error_at_the_threshold_is_not_within():
    labels = {"total_energy": torch.zeros(3, 1), "forces": torch.zeros(3, 3), "num_atoms": torch.ones(3).long()}
    preds = {name: labels[name].clone() for name in ("total_energy", "forces")}
    preds["total_energy"][0], preds["forces"][1, 2] = 0.5, -0.25
    assert float(EnergyForcesWithinThreshold(0.5, 0.25)(preds, labels)) == pytest.approx(1 / 3)
    assert float(EnergyForcesWithinThreshold(0.51, 0.26)(preds, labels)) == 1


def test_a_structure_without_error_has_no_gradient():
    target = {"forces": torch.zeros(3, 3), "num_atoms": torch.tensor([1, 2])}
    forces = torch.tensor([[0.0] * 3, [3.0, 0.0, 0.0], [0.0] * 3], requires_grad=True)
    value = MeanOverStructures(error="rmse")({"forces": forces}, target)
    assert float(value.detach()) == pytest.approx(math.sqrt(9 / 6) / 2)
    value.backward()
    expected = torch.zeros(3, 3)
    expected[1, 0] = 0.5 * 3 / 6 / math.sqrt(9 / 6)
    torch.testing.assert_close(forces.grad, expected)


def test_weights_of_structures_count_in_a_metric_alone():
    """Without a manager, as torchmetrics are used: the weights of the frame and of the one label that is read."""
    features, target = drawn(1, [2, 1, 3, 2])
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    metrics = (
        EnergyForcesWithinThreshold(1.5, 2.5),
        MeanOverStructures("forces", "rmse"),
        MeanOverStructures("total_energy"),
    )
    for (name, (values, weights)), metric in zip(numbers_of(features, target).items(), metrics, strict=True):
        assert len(set(weights.tolist())) > 1
        assert_close(float(metric(preds, target)), mean_of(values, weights, np.ones(4, bool)), name)


def test_a_structure_counts_once_whatever_its_size():
    target = {"forces": torch.zeros(4, 3), "num_atoms": torch.tensor([1, 3]), "batch": torch.tensor([0, 1, 1, 1])}
    preds = {"forces": torch.tensor([[1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3])}
    assert float(MeanOverStructures()(preds, target)) == 0.5
    with pytest.raises(ValueError, match="error is 'mae' or 'rmse', found 'mse'"):
        MeanOverStructures(error="mse")
    with pytest.raises(ValueError, match="of is a field of nodes or graphs"):
        MeanOverStructures(of="edge_cell_shift")


# ---- structures by set and group, and with weights


GROUPS, SETS = ("bulk", "surface", "vacancy"), ("crystals", "molecules")
NAMES = ("efwt", "forces_rmse_by_structure", "total_energy_mae_by_structure")


def of_structures(**keys):
    """Manager of components of structures with further keys; two of them are trained."""
    metrics = (
        EnergyForcesWithinThreshold(1.5, 2.5),
        MeanOverStructures("forces", "rmse"),
        MeanOverStructures("total_energy"),
    )
    entries = [{"metric": metric, "coeff": coeff, **keys} for metric, coeff in zip(metrics, (None, 1, 2), strict=True)]
    return MetricsManager(entries, group_names=GROUPS, set_names=SETS)


def drawn(seed: int, atoms: list[int]):
    """Features and labels of frames with weights, in sets and in groups, some in none."""
    features, target = oracle.draw(seed, atoms, unlabelled=0.1)
    generator = torch.Generator().manual_seed(seed)
    target["group_index"] = torch.randint(-1, len(GROUPS), (len(atoms),), generator=generator)
    target["set_index"] = torch.randint(0, len(SETS), (len(atoms),), generator=generator)
    return features, target | weighted(seed, len(atoms))


def numbers_of(features, target):
    """Number and weight of each structure, by component."""
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    weights = {name: target[name].numpy() for name in ("weight", "forces_weight", "energy_weight")}
    numbers = (
        are_right(preds, target, 1.5, 2.5),
        own_errors(preds, target, "forces", "rmse"),
        own_errors(preds, target, "total_energy", "mae"),
    )
    own = weights["weight"], weights["weight"] * weights["forces_weight"], weights["weight"] * weights["energy_weight"]
    return dict(zip(NAMES, zip(numbers, own, strict=True), strict=True))


def mean_of(numbers, weights, chosen) -> float:
    """Weighted mean of the structures that are chosen and have a number."""
    chosen = chosen & ~np.isnan(numbers) & (weights > 0)
    return float(np.average(numbers[chosen], weights=weights[chosen])) if chosen.any() else math.nan


def gradient_of(features, target, weights):
    """Gradient of the two trained components by a loop over structures."""
    theta = oracle.parameters()
    terms = {"forces": [], "total_energy": []}
    for (own, labels), *of_frame in zip(parts(oracle.predict(features, theta), target), *weights, strict=True):
        for (field, found), weight in zip(terms.items(), of_frame, strict=True):
            errors = (own[field] - labels[field])[~labels[field].isnan()]
            if errors.numel() and weight:
                found.append((weight, errors.square().mean().sqrt() if field == "forces" else errors.abs().mean()))
    means = [sum(w * v for w, v in found) / sum(w for w, _ in found) for found in terms.values()]
    ((means[0] + 2 * means[1]) / 3).backward()
    return theta.grad.numpy()


def assert_close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_structures_have_values_of_sets_and_groups_with_weights(seed):
    features, target = drawn(seed, [2, 1, 3, 2, 4, 1, 2, 3])
    numbers = numbers_of(features, target)
    manager, some = of_structures(per_set=True, per_group=True), of_structures(sets=["molecules"], per_group=True)
    mean = of_structures(per_set_coeffs={"crystals": 1, "molecules": 3})
    plain, in_sums = of_structures(weights=False), of_structures(weights="in_sums")
    plain.keep_by_group()
    for cut, labels in oracle.split(features, target, [3, 3, 5]):
        with torch.no_grad():
            harness.step_together(
                manager, some, mean, plain, in_sums, preds=oracle.predict(cut, oracle.parameters()), target=labels
            )
    report, of_set, of_mean, unweighted, of_sums = (
        values.to_report() for values in harness.compute_together([manager, some, mean, plain, in_sums])
    )
    everywhere = np.ones(len(target["weight"]), bool)
    index = {field: target[field].numpy() for field in ("set_index", "group_index")}
    for name, (values, weights) in numbers.items():
        assert_close(report.values[name], mean_of(values, weights, everywhere), name)
        assert_close(of_set.values[name], mean_of(values, weights, index["set_index"] == 1), name)
        assert_close(unweighted.values[name], mean_of(values, np.ones_like(weights), everywhere), name)
        known = ~np.isnan(values)
        assert_close(of_sums.values[name], (weights[known] * values[known]).sum() / known.sum(), name)
        of_sets = [mean_of(values, weights, index["set_index"] == number) for number in range(len(SETS))]
        assert_close([report.values[f"{name}@{each}"] for each in SETS], of_sets, name)
        having = [number for number in range(len(SETS)) if not math.isnan(of_sets[number])]
        expected = np.average([of_sets[number] for number in having], weights=[(1, 3)[number] for number in having])
        assert_close(of_mean.values[name], expected, name)
        for number, group in enumerate(GROUPS):
            in_group = index["group_index"] == number
            assert_close(report.values[f"{name}@{group}"], mean_of(values, weights, in_group), f"{name}@{group}")
            both = in_group & (index["set_index"] == 1)
            assert_close(of_set.values[f"{name}@{group}"], mean_of(values, weights, both), f"{name}@{group}")
            expected = mean_of(values, np.ones_like(weights), in_group)
            assert_close(unweighted.by_group[name][number], expected, f"{name}@{group}")
    of_weights = [numbers[name][1] for name in NAMES[1:]]
    expected = gradient_of(features, target, of_weights)
    theta = oracle.parameters()
    manager(oracle.predict(features, theta), target)["weighted_sum"].backward()
    assert_close(theta.grad.numpy(), expected)
    pieces = oracle.split(features, target, [2, 6])  # micro-batches add up, too
    window, theta = manager.window([labels for _, labels in pieces]), oracle.parameters()
    for piece, labels in pieces:
        (step,) = harness.step_together(manager, preds=oracle.predict(piece, theta), target=labels, window=window)
        step.weighted_sum.backward()
    assert_close(theta.grad.numpy(), expected)


def structures_on_rank(rank, world_size):
    """Two batches of a rank, of which the second rank's last one has no frames; gradients are of this rank's part."""
    manager, theta = of_structures(per_set=True, per_group=True), oracle.parameters()
    for number, (features, target) in enumerate(batches_of_rank(rank)):
        if rank and number:
            features, target = oracle.split(features, target, [0])[0]
            target = {name: value for name, value in target.items() if not name.endswith(("_index", "weight"))}
        manager(oracle.predict(features, theta), target)["weighted_sum"].backward()
    (values,) = harness.compute_together([manager])
    return values.to_report().values, theta.grad.numpy()


def batches_of_rank(rank):
    return [drawn(10 * rank + number, [[3, 1, 2], [2, 2, 4]][number]) for number in range(2)]


def test_structures_on_ranks_are_those_of_one_process():
    ranks = spawn(2, structures_on_rank)
    assert str(ranks[0][0]) == str(ranks[1][0])
    (first, second), (third, _) = batches_of_rank(0), batches_of_rank(1)
    manager, theta = of_structures(per_set=True, per_group=True), oracle.parameters()
    for pieces in ([first, third], [second]):
        features, target = (oracle.join(each) for each in zip(*pieces, strict=True))
        manager(oracle.predict(features, theta), target)["weighted_sum"].backward()
    (values,) = harness.compute_together([manager])
    for name, expected in values.to_report().values.items():
        assert_close(ranks[0][0][name], expected, name)
    assert_close(ranks[0][1] + ranks[1][1], theta.grad.numpy())


def test_components_of_structures_know_their_fields_labels_and_units():
    entries = [{"metric": EnergyForcesWithinThreshold()}, {"metric": MeanOverStructures("forces")}]
    manager = MetricsManager(entries, set_names=SETS, labelled_sets={"forces": ["molecules"]})
    efwt, mean = manager.entries.values()
    assert (efwt.sets, mean.sets) == ((1,), (1,))  # sets without forces are left out by themselves
    assert (component_unit(efwt), component_unit(mean)) == ("", "eV/Å")
    with pytest.raises(ValueError, match="MeanOverStructures reads fields of its own; leave `field` out"):
        MetricsManager([{"metric": MeanOverStructures(), "field": "forces"}])
    with pytest.raises(ValueError, match=r"`per_type` needs .* forces_mae_by_structure is a graph field"):
        MetricsManager([{"metric": MeanOverStructures(), "per_type": True}], ["H"])
