"""Other people's torchmetrics as components: those that merge travel in the row, the rest wait for the epoch's end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchmetrics
from support import oracle
from support.spawning import RankFailedError, spawn
from support.step_cost import Operators
from torch import Tensor
from torchmetrics import CosineSimilarity, Metric, PearsonCorrCoef, R2Score, SpearmanCorrCoef
from torchmetrics.regression import MeanAbsolutePercentageError

import harness
from harness.metrics.adapters import why_not_mergeable

TYPES = ("H", "C", "O")


class Spread(Metric):
    """One state of each kind that merges; the value mixes them all."""

    full_state_update = False
    total: Tensor
    average: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(2.0), dist_reduce_fx="sum")  # starts above 0 on purpose
        self.add_state("average", torch.tensor(0.0), dist_reduce_fx="mean")
        self.add_state("lowest", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-math.inf), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        residual = preds - target
        self.total = self.total + residual.abs().sum()
        self.average = residual.mean()
        self.lowest = torch.minimum(self.lowest, residual.min())
        self.highest = torch.maximum(self.highest, residual.max())

    def compute(self) -> Tensor:
        return self.total + 10 * self.average + 100 * (self.highest - self.lowest)


class ForceOnHeavyAtoms(Metric):
    """Reads the two whole dictionaries."""

    full_state_update = False
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squares", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        heavy = target["atom_types"] > 0
        self.squares = self.squares + (preds["forces"] - target["forces"])[heavy].square().sum()
        self.count = self.count + 3 * heavy.sum()

    def compute(self) -> Tensor:
        return self.squares / self.count


METRICS = {
    "r2": R2Score,
    "percentage": MeanAbsolutePercentageError,
    "mse": lambda: torchmetrics.MeanSquaredError(),
    "cosine": lambda: CosineSimilarity(reduction="mean"),
    "pearson": PearsonCorrCoef,
    "spearman": SpearmanCorrCoef,
}
FIELD_OF = {"r2": "charge", "pearson": "charge", "spearman": "charge"}
DEFERRED = ["cosine", "pearson", "spearman"]


def draw(seed, atoms, unlabelled=0.0, types=(0, 1, 2)):
    """Predictions and target; ``charge [num_atoms]`` for metrics of scalars."""
    features, target = oracle.draw(seed, atoms, types)
    preds = oracle.predict(features, oracle.parameters())
    random = torch.Generator().manual_seed(seed)
    preds["charge"], target["charge"] = torch.rand(2, len(target["atom_types"]), generator=random, dtype=torch.float64)
    missing = torch.rand(len(target["atom_types"]), generator=random) < unlabelled
    target["forces"][missing], target["charge"][missing] = math.nan, math.nan
    return {key: value.detach() for key, value in preds.items()}, target


def manager_of(names, per_type=False, ignore_nan=False, coeff=None):
    return harness.MetricsManager(
        [
            {
                "name": name,
                "field": FIELD_OF.get(name, "forces"),
                "metric": METRICS[name](),
                "per_type": per_type,
                "ignore_nan": ignore_nan,
                "coeff": coeff,
            }
            for name in names
        ],
        TYPES,
    )


def expected_value(name, preds, target, kind=None):
    """torchmetrics itself on the concatenated, selected data in float64."""
    field = FIELD_OF.get(name, "forces")
    rows = ~target[field].isnan().reshape(len(target[field]), -1).any(1)
    if kind is not None:
        rows &= target["atom_types"] == kind
    return METRICS[name]().set_dtype(torch.float64)(preds[field][rows], target[field][rows]).item()


@pytest.mark.parametrize("unlabelled", [0.0, 0.3])
@pytest.mark.parametrize("name", METRICS)
def test_an_epoch_is_the_metric_on_all_data(name, unlabelled):
    manager = manager_of([name], ignore_nan=unlabelled > 0)
    batches = [draw(seed, [3, 4], unlabelled) for seed in range(3)]
    for preds, target in batches:
        step = manager(preds, target)[name].item()
        np.testing.assert_allclose(step, expected_value(name, preds, target), rtol=1e-6)
    preds, target = (oracle.join(part) for part in zip(*batches, strict=True))
    np.testing.assert_allclose(manager.compute()[name].item(), expected_value(name, preds, target), rtol=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_per_type(name):
    manager = manager_of([name], per_type=True, ignore_nan=True)
    batches = [draw(seed, [7, 8], 0.2) for seed in range(3)]
    for preds, target in batches:
        manager(preds, target)
    preds, target = (oracle.join(part) for part in zip(*batches, strict=True))
    values = manager.compute()
    by_type = [expected_value(name, preds, target, kind) for kind in range(3)]
    np.testing.assert_allclose([values[f"{name}_{kind}"].item() for kind in TYPES], by_type, rtol=1e-6)
    np.testing.assert_allclose(values[name].item(), np.mean(by_type), rtol=1e-6)


def test_states_of_every_kind_merge():
    manager = harness.MetricsManager([{"field": "forces", "metric": Spread(), "name": "spread"}])
    residuals = []
    for seed in range(3):
        preds, target = draw(seed, [2, 1 + seed])
        residuals.append((preds["forces"] - target["forces"]).numpy())
        r = residuals[-1]
        expected = 2 + np.abs(r).sum() + 10 * r.mean() + 100 * (r.max() - r.min())
        np.testing.assert_allclose(manager(preds, target)["spread"].item(), expected, rtol=1e-12)
    r = np.concatenate(residuals)
    expected = 2 + np.abs(r).sum() + 10 * np.mean([r.mean() for r in residuals]) + 100 * (r.max() - r.min())
    np.testing.assert_allclose(manager.compute()["spread"].item(), expected, rtol=1e-12)


def test_without_a_field_the_metric_gets_both_dictionaries():
    manager = harness.MetricsManager([{"field": None, "metric": ForceOnHeavyAtoms(), "name": "heavy", "coeff": 2}])
    batches = [draw(seed, [3, 4]) for seed in range(2)]
    for preds, target in batches:
        manager(preds, target)
    preds, target = (oracle.join(part) for part in zip(*batches, strict=True))
    heavy = (target["atom_types"] > 0).numpy()
    expected = ((preds["forces"] - target["forces"]).numpy()[heavy] ** 2).mean()
    assert manager.compute() == {"heavy": pytest.approx(expected), "weighted_sum": pytest.approx(expected)}


def test_automatic_name_is_that_of_the_class():
    assert list(harness.MetricsManager([{"field": "forces", "metric": Spread}]).entries) == ["F_Spread"]


def test_a_metric_with_more_than_one_number_is_an_error():
    manager = harness.MetricsManager([{"field": "forces", "metric": CosineSimilarity(reduction="none")}])
    with pytest.raises(TypeError, match=r"CosineSimilarity.*shape \[4\].*one number"):
        manager(*draw(0, [4]))


class OfScalars(Spread):
    """Merges, and takes no vectors."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        if preds.dim() > 1:
            raise IndexError("scalars only")
        super().update(preds, target)


@pytest.mark.parametrize("metric", [PearsonCorrCoef, SpearmanCorrCoef, OfScalars])
@pytest.mark.parametrize(("field", "shape"), [("forces", r"\[4, 3\]"), ("stress", r"\[1, 3, 3\]")])
def test_a_metric_that_cannot_take_the_shape_is_named_with_its_component(metric, field, shape):
    manager = harness.MetricsManager([{"name": "mine", "field": field, "metric": metric}])
    with pytest.raises(
        ValueError, match=f"Component 'mine': {metric.__name__} cannot take .*{shape}.*R2Score.*flatten"
    ):
        manager(*draw(0, [4]))


def test_a_metric_with_several_outputs():
    """R² of a vector is the mean over its components; the shape of its states is not known before there is data."""
    manager = harness.MetricsManager([{"name": "r2", "field": "forces", "metric": R2Score()}])
    batches = [draw(seed, [3, 4]) for seed in range(2)]
    for preds, target in batches:
        manager(preds, target)
    preds, target = (oracle.join(part) for part in zip(*batches, strict=True))
    expected = R2Score().set_dtype(torch.float64)(preds["forces"], target["forces"])
    np.testing.assert_allclose(manager.compute()["r2"], expected, rtol=1e-12)


def test_the_original_metric_is_left_alone():
    metric = R2Score()
    manager = harness.MetricsManager([{"field": "charge", "metric": metric}])
    manager(*draw(0, [4]))
    assert not metric.update_called
    assert metric.total == 0


def test_too_little_data_is_nan_with_a_warning_and_not_an_error():
    manager = manager_of(["r2"])
    with pytest.warns(UserWarning, match=r"'r2' has no value.*two samples"):
        assert math.isnan(manager(*draw(0, [1]))["r2"])
    manager(*draw(1, [3]))
    assert math.isfinite(manager.compute()["r2"])


# --- gradients and ranks ---


def r2_loss_gradient(preds, target):
    """R² and its gradient by hand: 1 − Σ(t−p)²/Σ(t−t̄)²."""
    prediction = preds["charge"].clone().requires_grad_()
    labelled = ~target["charge"].isnan()
    p, t = prediction[labelled], target["charge"][labelled]
    value = 1 - (t - p).square().sum() / (t - t.mean()).square().sum()
    value.backward()
    return value.item(), prediction.grad


def test_gradients_flow_through_a_metric_with_a_coefficient():
    preds, target = draw(0, [4, 5], unlabelled=0.3)
    value, gradient = r2_loss_gradient(preds, target)
    preds["charge"].requires_grad_()
    loss = manager_of(["r2"], ignore_nan=True, coeff=3.0)(preds, target)["weighted_sum"]
    loss.backward()
    np.testing.assert_allclose(loss.item(), value, rtol=1e-12)
    np.testing.assert_allclose(preds["charge"].grad, gradient, rtol=1e-10, atol=1e-12)


def r2_step(rank, world_size, shards, with_mse):
    preds, target = shards[rank]
    preds["charge"].requires_grad_()
    preds["forces"].requires_grad_()
    components = [{"name": "r2", "field": "charge", "metric": R2Score(), "coeff": 1, "ignore_nan": True}]
    if with_mse:
        mse = {"name": "mse", "field": "forces", "metric": harness.MeanSquaredError, "ignore_nan": True}
        components.append(mse)
    values = harness.MetricsManager(components)(preds, target)
    values["weighted_sum"].backward()
    gradient = preds["charge"].grad
    return values["r2"].item(), torch.zeros_like(preds["charge"]) if gradient is None else gradient.clone()


@pytest.mark.parametrize("with_mse", [True, False], ids=["beside our own", "alone"])
@pytest.mark.parametrize("last", ["labelled", "unlabelled", "empty"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_loss_of_a_merged_metric_on_ranks(world_size, last, with_mse):
    shards = [draw(rank, [3, 2 + rank]) for rank in range(world_size)]
    if world_size > 1 and last != "labelled":
        shards[-1] = draw(9, [4], unlabelled=1.0) if last == "unlabelled" else draw(9, [])
    preds, target = (oracle.join(part) for part in zip(*shards, strict=True))
    value, gradient = r2_loss_gradient(preds, target)
    values, gradients = zip(*spawn(world_size, r2_step, shards, with_mse, timeout=15), strict=True)
    assert len({value.hex() for value in values}) == 1
    np.testing.assert_allclose(values[0], value, rtol=1e-12)
    np.testing.assert_allclose(torch.cat(gradients), gradient, rtol=1e-10, atol=1e-12)


def validate(rank, world_size, names, batches_of, per_type):
    manager = manager_of(names, per_type=per_type, ignore_nan=True)
    with torch.inference_mode():
        for preds, target in batches_of[rank]:
            manager(preds, target)
    return [{name: value.item() for name, value in manager.compute().items()} for _ in range(2)]


@pytest.mark.parametrize("per_type", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_on_ranks_is_the_metric_on_all_data(world_size, per_type):
    """Unequal numbers of batches; with three ranks or more the last has none."""
    batches_of = [
        [draw(10 * rank + number, [5, 6], 0.2) for number in range(1 + rank % 2)] if rank < 2 else []
        for rank in range(world_size)
    ]
    batches = [batch for batches in batches_of for batch in batches]
    preds, target = (oracle.join(part) for part in zip(*batches, strict=True))
    results = spawn(world_size, validate, list(METRICS), batches_of, per_type)
    bits = [{name: v.hex() for name, v in values.items()} for both in results for values in both]
    assert all(other == bits[0] for other in bits)
    for name in METRICS:
        kinds = range(3) if per_type else [None]
        expected = np.mean([expected_value(name, preds, target, kind) for kind in kinds])
        np.testing.assert_allclose(results[0][0][name], expected, rtol=1e-6, err_msg=name)


def gathered_in_a_loss(rank, world_size, name, coeff, beside_ours):
    preds, target = draw(rank, [4, 5])
    preds["forces"].requires_grad_()
    preds["charge"].requires_grad_()
    field = FIELD_OF.get(name, "forces")
    components = [{"name": name, "field": field, "metric": METRICS[name](), "coeff": coeff}]
    if beside_ours:
        components.append({"name": "mse", "field": "forces", "metric": harness.MeanSquaredError, "coeff": 1})
    manager = harness.MetricsManager(components)
    try:
        values = manager(preds, target)
    except ValueError as error:
        return str(error)
    values["weighted_sum"].backward()
    assert math.isnan(values[name])  # this rank alone cannot know it
    return manager.compute()[name].item()


@pytest.mark.parametrize("beside_ours", [True, False], ids=["beside our own", "alone"])
@pytest.mark.parametrize("name", DEFERRED)
def test_a_metric_that_does_not_merge_is_refused_in_a_loss_on_ranks(name, beside_ours):
    for message in spawn(2, gathered_in_a_loss, name, 1.0, beside_ours):
        assert isinstance(message, str), "no error"
        assert repr(name) in message
        assert type(METRICS[name]()).__name__ in message
        assert "state" in message


@pytest.mark.parametrize("name", DEFERRED)
def test_without_a_coefficient_it_is_merged_at_the_end_of_the_epoch(name):
    preds, target = (oracle.join(part) for part in zip(*(draw(rank, [4, 5]) for rank in range(2)), strict=True))
    values = spawn(2, gathered_in_a_loss, name, None, True)
    assert values[0] == values[1]
    np.testing.assert_allclose(values[0], expected_value(name, preds, target), rtol=1e-6)


def test_on_one_rank_it_may_have_a_coefficient():
    preds, target = draw(0, [4, 5])
    preds["forces"].requires_grad_()
    manager_of(["cosine"], coeff=1.0)(preds, target)["weighted_sum"].backward()
    assert preds["forces"].grad.abs().sum() > 0


def fail_on(rank, world_size, bad_rank):
    if rank == bad_rank:
        raise ValueError("a mistake")
    torch.distributed.barrier()


def test_spawn_tells_which_rank_failed_and_recovers():
    with pytest.raises(RankFailedError, match=r"(?s)Rank 1 failed.*a mistake.*Ranks \[0\] did not answer"):
        spawn(2, fail_on, 1)
    assert spawn(2, fail_on, None) == [None, None]


class RunningAverage(Metric):
    """Looks back at earlier batches, and does not say so: torchmetrics' default for `full_state_update` is None."""

    def __init__(self):
        super().__init__()
        self.add_state("average", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.average = 0.9 * self.average + 0.1 * (preds - target).abs().mean()

    def compute(self):
        return self.average


class PlainSum(Metric):
    """A user's metric with the defaults of torchmetrics."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.total = self.total + (preds - target).abs().sum()

    def compute(self):
        return self.total


def test_a_metric_that_looks_back_does_not_merge_and_is_still_right():
    assert "batches before" in why_not_mergeable(RunningAverage(), (3,))
    assert why_not_mergeable(PlainSum(), (3,)) is None
    manager = harness.MetricsManager([{"name": "running", "field": "forces", "metric": RunningAverage()}])
    alone = RunningAverage()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        prediction, target = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
        manager({"forces": prediction}, {"forces": target})
        alone.update(prediction, target)
    torch.testing.assert_close(manager.compute()["running"], alone.compute().double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "metric",
    [
        torchmetrics.MeanSquaredError() + torchmetrics.MeanAbsoluteError(),
        torchmetrics.MinMaxMetric(torchmetrics.MeanSquaredError()),
        torchmetrics.wrappers.Running(torchmetrics.MeanSquaredError(), 2),
    ],
)
def test_metrics_that_hold_other_metrics_are_refused(metric):
    with pytest.raises(ValueError, match="Give plain metrics"):
        harness.MetricsManager([{"name": "nested", "field": "forces", "metric": metric}])


def test_a_term_of_the_sum_that_cannot_be_computed_is_an_error():
    one = {"total_energy": torch.ones(1, 1)}
    watched = harness.MetricsManager([{"name": "r2", "field": "total_energy", "metric": torchmetrics.R2Score()}])
    with pytest.warns(UserWarning, match="'r2' has no value"):
        assert watched(one, one)["r2"].isnan()
    needed = harness.MetricsManager(
        [{"name": "r2", "field": "total_energy", "metric": torchmetrics.R2Score(), "coeff": 1}]
    )
    with pytest.raises(ValueError, match="'r2' of the weighted sum"):
        needed(one, one)


class Unguarded(Metric):
    """Mean of the roots of the errors, whose slope is infinite at 0 and whose value is no number without data."""

    full_state_update = False
    total: Tensor
    count: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(-math.inf), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        roots = (preds - target).abs().sqrt().flatten(1).sum(1)
        self.total = self.total + (roots if weights is None else roots * weights).sum()
        self.count = self.count + (len(roots) if weights is None else weights.sum())
        self.largest = torch.maximum(self.largest, (roots if weights is None else roots * (weights > 0)).amax())

    def compute(self) -> Tensor:
        return self.total / self.count + self.largest.detach()


class TakesWeights(Unguarded):
    takes_weights = True


@pytest.mark.parametrize("unlabelled", [0.0, 0.2, 1.0])
def test_rows_of_weight_0_are_rows_that_are_left_out(unlabelled):
    """Without a wait of the host; an absent type and a batch without labels are no data, and give no gradient."""
    found = []
    for metric in (Unguarded(), TakesWeights()):
        entries = [
            {"name": "roots", "field": "forces", "metric": metric, "coeff": 1, "per_type": True, "ignore_nan": True},
            {"name": "mse", "field": "total_energy", "metric": harness.MeanSquaredError(), "coeff": 1},
        ]
        manager = harness.MetricsManager(entries, TYPES)
        for seed, atoms in ((0, [2, 3]), (1, [1])):
            preds, target = draw(seed, atoms, unlabelled=unlabelled, types=(0, 2))
            target["total_energy"] = torch.zeros(len(atoms), 1, dtype=torch.float64)
            target["forces"][:, 0] *= 1 if unlabelled < 1 else math.nan
            preds = {
                "forces": preds["forces"].detach().requires_grad_(),
                "total_energy": torch.ones_like(target["total_energy"], requires_grad=True),
            }
            with Operators() as operators:
                values = manager(preds, target)
                values["weighted_sum"].backward()
            assert seed == 0 or (operators.waits == []) == isinstance(metric, TakesWeights)
            assert math.isnan(values["roots_C"])
            gradient = preds["forces"].grad if preds["forces"].grad is not None else torch.zeros_like(preds["forces"])
            assert gradient.isfinite().all()
            found += [{name: value.item() for name, value in values.items()}, gradient]
        found.append({name: value.item() for name, value in manager.compute().items()})
    plain, weighted = found[: len(found) // 2], found[len(found) // 2 :]
    for one, other in zip(plain, weighted, strict=True):
        if isinstance(one, dict):
            assert other == pytest.approx(one, rel=1e-12, nan_ok=True)
        else:
            torch.testing.assert_close(other, one, rtol=1e-12, atol=0)
