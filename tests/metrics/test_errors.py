"""The error metrics alone, as any other torchmetrics."""

from __future__ import annotations

import copy
import math
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from support import oracle
from support.spawning import spawn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from harness import (
    HuberLoss,
    MaximumAbsoluteError,
    MeanAbsoluteError,
    MeanSquaredError,
    RootMeanSquaredError,
    StratifiedHuberForceLoss,
)

STRATA = {1.5: 0.2, 0.0: 0.9, 0.5: 0.4}  # not in order

METRICS = {
    "mae": (MeanAbsoluteError, lambda p, t: np.abs(p - t).mean()),
    "mse": (MeanSquaredError, lambda p, t: ((p - t) ** 2).mean()),
    "rmse": (RootMeanSquaredError, lambda p, t: math.sqrt(((p - t) ** 2).mean())),
    "max_ae": (MaximumAbsoluteError, lambda p, t: np.abs(p - t).max()),
    "huber": (HuberLoss, lambda p, t: np.mean([oracle.huber(r, 1.0) for r in (p - t).ravel()])),
    "stratified huber": (
        lambda **kwargs: StratifiedHuberForceLoss(STRATA, **kwargs),
        lambda p, t: oracle.stratified(p, t, STRATA).mean(),
    ),
}
SHAPES = [(1, 3), (7, 3), (4, 1, 3), (5, 3, 3)]


def pair(shape=(5, 3), seed=0, dtype=torch.float64):
    random = np.random.default_rng(seed)
    return tuple(torch.tensor(random.normal(size=shape), dtype=dtype) for _ in range(2))


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in METRICS for shape in SHAPES + [(1,), (6,)] * (name != "stratified huber")],
)
def test_values_are_those_of_numpy(name, shape):
    metric, expected = METRICS[name]
    preds, target = pair(shape)
    value = metric()(preds, target)
    assert value.dtype == torch.float64
    assert value.shape == ()
    np.testing.assert_allclose(value, expected(preds.numpy(), target.numpy()), rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METRICS)
def test_lower_precisions(name, dtype):
    metric, expected = METRICS[name]
    preds, target = pair((50, 3), dtype=dtype)
    value = metric()(preds, target)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(
        value, expected(preds.double().numpy(), target.double().numpy()), rtol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("name", METRICS)
def test_the_epoch_is_that_of_all_batches_together(name):
    metric, expected = METRICS[name]
    metric = metric()
    batches = [pair((rows, 3), rows) for rows in (1, 5, 2)]
    for preds, target in batches:
        np.testing.assert_allclose(metric(preds, target), expected(preds.numpy(), target.numpy()), rtol=1e-13)
    preds, target = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    np.testing.assert_allclose(metric.compute(), expected(preds, target), rtol=1e-13)


@pytest.mark.parametrize("name", METRICS)
def test_names(name):
    assert str(METRICS[name][0]()) == name


@pytest.mark.parametrize("name", METRICS)
def test_no_data_is_nan(name):
    metric = METRICS[name][0]()
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3))
    assert math.isnan(metric.compute())
    metric.update(torch.ones(1, 3), torch.zeros(1, 3))
    assert math.isfinite(metric.compute())


@pytest.mark.parametrize("where", ["prediction", "target"])
@pytest.mark.parametrize("name", METRICS)
def test_nan_in_nan_out(name, where):
    preds, target = pair()
    (preds if where == "prediction" else target)[2, 1] = math.nan
    metric = METRICS[name][0]()
    assert math.isnan(metric(preds, target))
    metric.update(*pair(seed=1))
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("name", METRICS)
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match=r"\[4, 1, 3\].*\[4, 3\]"):
        METRICS[name][0]()(torch.ones(4, 1, 3), torch.ones(4, 3))


# --- gradients ---


@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_those_of_finite_differences(name):
    metric = METRICS[name][0]()
    preds, target = pair((3, 3), seed=3)

    assert torch.autograd.gradcheck(lambda prediction: metric(prediction, target), preds.requires_grad_(), eps=1e-7)


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_prediction_has_a_finite_gradient(name):
    preds = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    value = METRICS[name][0]()(preds, torch.ones(2, 3, dtype=torch.float64))
    value.backward()
    assert value == 0
    assert preds.grad.abs().sum() == 0


def test_the_gradient_of_a_maximum_goes_to_the_element_that_holds_it():
    preds = torch.tensor([[1.0, -4.0], [2.0, 3.0]], requires_grad=True)
    MaximumAbsoluteError()(preds, torch.zeros(2, 2)).backward()
    assert preds.grad.tolist() == [[0, -1], [0, 0]]


def test_ties_share_the_gradient_of_a_maximum():
    preds = torch.tensor([[4.0, -4.0], [2.0, 3.0]], requires_grad=True)
    MaximumAbsoluteError()(preds, torch.zeros(2, 2)).backward()
    assert preds.grad.abs().sum() == 1


# --- Huber ---


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("delta", [0.01, 0.5, 1.0, 100.0])
def test_huber_is_that_of_torch(reduction, delta):
    values, gradients = [], []
    for loss in (HuberLoss(reduction=reduction, delta=delta), torch.nn.HuberLoss(reduction=reduction, delta=delta)):
        preds, target = pair((40, 3))
        preds[0], target[0] = 0.0, delta  # on the edge
        preds[1] = target[1]  # no error
        preds.requires_grad_()
        values.append(loss(preds, target))
        values[-1].backward()
        gradients.append(preds.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("make", [HuberLoss, lambda **kwargs: StratifiedHuberForceLoss(STRATA, **kwargs)])
def test_unknown_reductions(make):
    with pytest.raises(ValueError, match=r"'mean' or 'sum'.*'none'"):
        make(reduction="none")


@pytest.mark.parametrize(
    ("delta", "error"),
    [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)],
)
def test_bad_deltas(delta, error):
    with pytest.raises(error, match="delta"):
        HuberLoss(delta=delta)
    with pytest.raises(error, match=r"delta.*0\.5"):
        StratifiedHuberForceLoss({0: 1.0, 0.5: delta})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("strata", [STRATA, {0.5: 0.4, 1.5: 0.2}, {0: 1, 1: 0.1, 2: 0.01, 3: 10}, {1.0: 0.3}])
def test_strata(strata, reduction):
    preds, target = pair((60, 3))
    metric = StratifiedHuberForceLoss(strata, reduction=reduction)
    errors = oracle.stratified(preds.numpy(), target.numpy(), strata)
    np.testing.assert_allclose(metric(preds, target), getattr(np, reduction)(errors), rtol=1e-13)


def test_a_magnitude_on_a_bound_belongs_to_the_stratum_above():
    target = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, -5.0, 0.0]])
    loss = StratifiedHuberForceLoss({0: 10.0, 5: 1.0}, reduction="sum")
    values = [loss(row + torch.tensor([2.0, 0, 0]), row).item() for row in target[:, None]]
    assert values == [1.0 * (2 - 0.5), 0.5 * 4, 1.0 * (2 - 0.5)]


def test_below_a_first_bound_above_zero_errors_are_quadratic():
    loss = StratifiedHuberForceLoss({1.0: 0.1, 2.0: 0.2})
    target = torch.zeros(1, 3, dtype=torch.float64)
    assert loss(target + 100, target).item() == pytest.approx(0.5 * 100**2, rel=1e-14)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (STRATA, {0.0: 0.9, 0.5: 0.4, 1.5: 0.2}),
        ({0: 1, 5: 2}, {0.0: 1.0, 5.0: 2.0}),
        ({2: 0.2, 1: 0.1}, {0.0: math.inf, 1.0: 0.1, 2.0: 0.2}),  # quadratic below the first bound
    ],
)
def test_delta_dict_is_sorted_and_of_floats(given, expected):
    found = StratifiedHuberForceLoss(given).delta_dict
    assert list(found.items()) == list(expected.items())
    assert {type(number) for pair in found.items() for number in pair} == {float}


def test_metrics_have_the_attributes_of_nequips():
    """Those that its tests, its module and its callbacks read, under the same names."""
    target = torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    summed = {
        MeanAbsoluteError(): 8.0,
        MeanSquaredError(): 26.0,
        RootMeanSquaredError(): 26.0,
        HuberLoss(reduction="sum"): 2.5 + 3.5 + 0.5,
        StratifiedHuberForceLoss({0: 1.0, 2: 10.0}): 12.5 + 0.5,
    }
    for metric, expected in summed.items():
        metric.update(torch.zeros_like(target), target)
        assert (metric.sum.item(), metric.count.item()) == (expected, 6), metric
        assert not hasattr(metric, "max_error")
    assert [metric.reduction for metric in summed if hasattr(metric, "reduction")] == ["sum", "mean"]
    largest = MaximumAbsoluteError()
    assert largest.max_error == -math.inf
    largest.update(torch.zeros_like(target), target)
    assert largest.max_error == 4
    assert not hasattr(largest, "sum")
    assert [str(each) for each in (*summed, largest)] == ["mae", "mse", "rmse", "huber", "stratified huber", "max_ae"]


@pytest.mark.parametrize(
    ("strata", "error", "message"),
    [
        ({}, ValueError, "at least two strata"),
        ({0: 1.0}, ValueError, r"at least two strata.*HuberLoss"),
        ({-1: 1.0, 1: 2.0}, ValueError, r"not negative.*-1"),
        ({0: 1.0, math.inf: 2.0}, ValueError, r"finite.*inf"),
        ({0: 1.0, math.nan: 2.0}, ValueError, r"finite.*nan"),
        ({"0": 1.0, 1: 2.0}, TypeError, r"bounds are numbers.*'0'"),
        ([(0, 1.0), (1, 2.0)], TypeError, "maps lower bounds"),
        (None, TypeError, "maps lower bounds"),
    ],
)
def test_bad_strata(strata, error, message):
    with pytest.raises(error, match=message):
        StratifiedHuberForceLoss(strata)


def test_strata_are_of_vectors():
    with pytest.raises(ValueError, match=r"vectors.*\[4\]"):
        StratifiedHuberForceLoss(STRATA)(torch.ones(4), torch.ones(4))


# --- the protocol of torchmetrics ---


@pytest.mark.parametrize("name", METRICS)
def test_reset_clone_and_pickle(name):
    metric = METRICS[name][0]()
    assert isinstance(metric, Metric)
    metric.update(*pair())
    expected = metric.compute()
    twins = [metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))]
    for twin in twins:
        assert twin.compute() == expected
        twin.update(torch.ones(1, 3) * 50, torch.zeros(1, 3))
        assert twin.compute() != expected
    metric.reset()
    metric.update(*pair())
    assert metric.compute() == expected


@pytest.mark.parametrize("name", METRICS)
def test_state_dict(name):
    metric, other = METRICS[name][0](), METRICS[name][0]()
    for each in (metric, other):
        each.persistent(True)
    metric.update(*pair())
    other.load_state_dict(metric.state_dict())
    metric.update(*pair(seed=1))
    other.update(*pair(seed=1))
    assert other.compute() == metric.compute()


@pytest.mark.parametrize("name", METRICS)
def test_states_merge(name):
    make, expected = METRICS[name]
    one, other, empty = make(), make(), make()
    one.update(*pair((3, 3), 1))
    other.update(*pair((5, 3), 2))
    preds, target = (torch.cat(part).numpy() for part in zip(pair((3, 3), 1), pair((5, 3), 2), strict=True))
    one.merge_state(other)
    one.merge_state(empty)
    np.testing.assert_allclose(one.compute(), expected(preds, target), rtol=1e-13)


def test_a_collection():
    collection = MetricCollection({name.replace(" ", "_"): make() for name, (make, _) in METRICS.items()})
    batches = [pair((4, 3), seed) for seed in range(3)]
    for preds, target in batches:
        collection(preds, target)
    preds, target = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    values = collection.compute()
    for name, (_, expected) in METRICS.items():
        np.testing.assert_allclose(values[name.replace(" ", "_")], expected(preds, target), rtol=1e-13, err_msg=name)


def test_a_collection_keeps_different_metrics_apart():
    """torchmetrics shares the states of metrics whose states look alike after the first batch."""
    collection = MetricCollection(
        {
            "mae": MeanAbsoluteError(),
            "mse": MeanSquaredError(),
            "near": HuberLoss(delta=1.0),
            "far": HuberLoss(delta=2.0),
        }
    )
    zeros = torch.zeros(2, 3)
    collection.update(zeros + 1, zeros)
    collection.update(zeros + 3, zeros)
    values = {name: value.item() for name, value in collection.compute().items()}
    assert values == {"mae": 2, "mse": 5, "near": (0.5 + 2.5) / 2, "far": (0.5 + 4) / 2}


def test_inside_a_lightning_module(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.loss, self.error, self.largest = HuberLoss(), RootMeanSquaredError(), MaximumAbsoluteError()
            self.seen = []

        def training_step(self, batch, index):
            loss = self.loss(self.layer(batch), batch)
            self.log("loss", self.loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch, index):
            prediction = self.layer(batch)
            self.seen.append((prediction - batch).numpy())
            self.error(prediction, batch)
            self.largest.update(prediction, batch)
            self.log("error", self.error, on_step=True, on_epoch=True)
            self.log("largest", self.largest, on_epoch=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    data = DataLoader(torch.randn(10, 3), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data, data)
    residual = np.concatenate(module.seen[-3:])
    assert trainer.callback_metrics["error_epoch"].item() == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-6)
    assert trainer.callback_metrics["largest"].item() == pytest.approx(np.abs(residual).max(), rel=1e-6)
    assert math.isfinite(trainer.callback_metrics["loss"])


def synchronised(rank, world_size, names, batches):
    values = {}
    for name in names:
        metric = METRICS[name][0]()
        if batches[rank] is not None:
            metric.update(*batches[rank])
        else:
            metric._update_count = 1  # a rank without data, and no warning about it
        values[name] = [metric.compute().item(), metric.compute().item()]
    return values


@pytest.mark.parametrize("empty", [False, True])
def test_torchmetrics_synchronises_a_metric_alone(empty):
    batches = [pair((3, 3), 1), pair((6, 3), 2)]
    results = spawn(2, synchronised, list(METRICS), [batches[0], None] if empty else batches)
    preds, target = (torch.cat(part).numpy() for part in zip(*batches[: 1 if empty else 2], strict=True))
    assert results[0] == results[1]
    for name, (_, expected) in METRICS.items():
        np.testing.assert_allclose(results[0][name], expected(preds, target), rtol=1e-13, err_msg=name)


def steps_synchronised(rank, world_size, batches):
    metric = RootMeanSquaredError(dist_sync_on_step=True)
    return metric(*batches[rank]).item(), metric.compute().item()


def test_torchmetrics_synchronises_a_step_alone():
    batches = [pair((3, 3), 1), pair((6, 3), 2)]
    preds, target = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    expected = METRICS["rmse"][1](preds, target)
    for values in spawn(2, steps_synchronised, batches):
        np.testing.assert_allclose(values, expected, rtol=1e-13)
