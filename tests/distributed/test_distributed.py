"""Values and gradients on 1 to 4 gloo ranks are those of one process on the whole batch, the same bits on all ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import oracle
from support.oracle import Component
from support.spawning import spawn

import harness
from harness.distributed import gradient_scale

WORLD_SIZES = [1, 2, 3, 4]
TYPES = ("H", "C", "O")
WEIGHTS = (1.0, 3.0, 0.5)


def shards_of(layout: str, world_size: int) -> list[tuple[oracle.Batch, oracle.Batch]]:
    """Features and target of each rank."""
    last = world_size - 1
    shards = [oracle.draw(10 + rank, [2 + rank, 4][: 1 + rank % 2]) for rank in range(world_size)]
    match layout:
        case "one type on one rank only":
            shards = [
                oracle.draw(20 + rank, [3, 5], types=(0,) if rank < last else (0, 1)) for rank in range(world_size)
            ]
        case "a rank without labels":
            shards = [oracle.draw(30 + rank, [3, 2], unlabelled=0.3 if rank else 1.0) for rank in range(world_size)]
        case "an empty rank":
            shards[last] = oracle.draw(0, [])
        case "everything at once":
            shards = [oracle.draw(40 + rank, [1 + 3 * rank, 2], (0, 2), unlabelled=0.4) for rank in range(world_size)]
            shards[last] = oracle.draw(0, [])
            shards[0] = oracle.draw(50, [4], types=(2,), unlabelled=1.0)
    return shards


LAYOUTS = [
    "unequal atoms",
    "one type on one rank only",
    "a rank without labels",
    "an empty rank",
    "everything at once",
]

LOSSES = {error: [Component("forces", error, 1.0, ignore_nan=True)] for error in oracle.METRICS}
LOSSES |= {
    f"{error} by type": [Component("forces", error, 1.0, per_type=True, ignore_nan=True)] for error in oracle.METRICS
}
LOSSES |= {
    f"{error} weighted by type": [Component("forces", error, 1.0, True, WEIGHTS, ignore_nan=True)]
    for error in ("mse", "rmse", "max", "stratified")
}
LOSSES["a loss of many components"] = [
    Component("total_energy", "mse", 1.0, ignore_nan=True, per_atom=True),
    Component("total_energy", "max", 0.5, ignore_nan=True),
    Component("forces", "rmse", 3.0, True, WEIGHTS, ignore_nan=True),
    Component("forces", "huber", 10.0, ignore_nan=True),
    Component("stress", "huber_sum", 0.1, ignore_nan=True),
    Component("stress", "mae", 0.0, ignore_nan=True),
    Component("stress", "rmse", None, ignore_nan=True),
]


def step(rank, world_size, components, shards):
    features, target = shards[rank]
    manager = oracle.manager(components, TYPES)
    theta = oracle.parameters()
    values = manager(oracle.predict(features, theta), target)
    values["weighted_sum"].backward()
    epoch = manager.compute()
    return as_floats(values), as_floats(epoch), theta.grad.numpy()


def as_floats(values):
    return {name: value.item() for name, value in values.items()}


def assert_same_bits(results):
    """Every rank has the same names with the same bits."""
    bits = [{name: value.hex() for name, value in values.items()} for values in results]
    assert all(other == bits[0] for other in bits)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_that_of_one_process(loss, layout, world_size):
    components, shards = LOSSES[loss], shards_of(layout, world_size)
    steps, epochs, gradients = zip(*spawn(world_size, step, components, shards), strict=True)

    features, target = (oracle.join(part) for part in zip(*shards, strict=True))
    expected = oracle.values(components, oracle.predict(features, oracle.parameters()), target, TYPES)
    assert_same_bits([*steps, *epochs])
    assert_close(steps[0], expected)
    gradient = oracle.gradient(components, features, target, TYPES)
    np.testing.assert_allclose(sum(gradients), gradient, rtol=1e-12, atol=1e-12)
    assert np.abs(gradient).sum() > 0 or all(math.isnan(expected[c.name]) for c in components)


def ddp_step(rank, world_size, components, shards):
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(oracle.parameters().detach())

        def forward(self, features):
            return oracle.predict(features, self.theta)

    features, target = shards[rank]
    model = torch.nn.parallel.DistributedDataParallel(Linear())
    loss = oracle.manager(components, TYPES)(model(features), target)["weighted_sum"]
    (loss * gradient_scale()).backward()
    return model.module.theta.grad.numpy()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ddp_hands_the_optimizer_the_gradient_of_one_process(layout, world_size):
    components, shards = LOSSES["a loss of many components"], shards_of(layout, world_size)
    features, target = (oracle.join(part) for part in zip(*shards, strict=True))
    expected = oracle.gradient(components, features, target, TYPES)
    for gradient in spawn(world_size, ddp_step, components, shards):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


# --- maxima ---


def tied_maximum(rank, world_size, errors):
    prediction = torch.tensor(errors[rank], dtype=torch.float64, requires_grad=True)
    manager = oracle.manager([Component("forces", "max", 1.0)])
    value = manager({"forces": prediction}, {"forces": torch.zeros_like(prediction)})["weighted_sum"]
    value.backward()
    return value.item(), prediction.grad.tolist()


def test_the_gradient_of_a_maximum_on_two_ranks_is_shared():
    errors = [[[3.0, 1.0, 0.0]], [[0.0, -3.0, 2.0]], [[1.0, 1.0, 1.0]]]
    results = spawn(3, tied_maximum, errors)
    assert [value for value, _ in results] == [3.0] * 3
    assert [gradient for _, gradient in results] == [[[0.5, 0, 0]], [[0, -0.5, 0]], [[0, 0, 0]]]


def test_a_maximum_of_zero_everywhere_keeps_its_shares():
    results = spawn(2, tied_maximum, [[[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    assert all(value == 0 and np.isfinite(gradient).all() for value, gradient in results)


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_maximum_that_is_not_finite_on_one_rank_is_so_on_all(bad_rank, bad):
    errors = [[[1.0, 2.0, 3.0]] for _ in range(3)]
    errors[bad_rank][0][1] = bad
    values = [value for value, _ in spawn(3, tied_maximum, errors)]
    assert [str(value) for value in values] == [str(bad)] * 3


def test_a_nan_on_one_rank_is_nan_on_all():
    for world_size in (2, 3):
        shards = shards_of("unequal atoms", world_size)
        shards[1][1]["forces"][0, 0] = math.nan
        components = [Component("forces", error, 1.0) for error in oracle.METRICS]
        for values, epoch, _ in spawn(world_size, step, components, shards):
            assert all(math.isnan(value) for value in (*values.values(), *epoch.values()))


# --- epochs ---


def unsynced_epoch(rank, world_size, components, batches_of, sync_on_step):
    manager = oracle.manager(components, TYPES)
    manager.sync_on_step = sync_on_step
    theta = oracle.parameters()
    with torch.inference_mode():
        for features, target in batches_of[rank]:
            manager(oracle.predict(features, theta), target)
    return as_floats(manager.compute()), as_floats(manager.compute())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_epoch_of_unequal_numbers_of_batches(world_size):
    """The last rank has no batch at all."""
    components = [
        Component(field, error, 1.0, per_type=per_type, ignore_nan=True)
        for error in oracle.METRICS
        for field, per_type in [("forces", False), ("forces", True), ("total_energy", False)]
        if field == "forces" or not error.startswith("stratified")
    ]
    batches_of = [
        [oracle.draw(100 * rank + number, [1 + number, 2], unlabelled=0.2) for number in range(world_size - 1 - rank)]
        for rank in range(world_size)
    ]
    batches_of[0].append(oracle.draw(7, [5], unlabelled=0.2))
    batches = [batch for batches in batches_of for batch in batches]
    features, target = (oracle.join(part) for part in zip(*batches, strict=True))
    expected = oracle.values(components, oracle.predict(features, oracle.parameters()), target, TYPES)
    results = spawn(world_size, unsynced_epoch, components, batches_of, False)
    assert_same_bits([values for both in results for values in both])
    assert_close(results[0][0], expected)


def test_an_epoch_without_any_batch_is_nan_on_all_ranks():
    components = [Component("forces", "rmse", 1.0), Component("forces", "max")]
    for first, _ in spawn(2, unsynced_epoch, components, [[], []], False):
        assert math.isnan(first["forces_rmse"])
        assert math.isnan(first["forces_max"])


def training_and_validation(rank, world_size, components, batches_of):
    """Steps with gradients (merged) and without (not merged) in one epoch."""
    manager = oracle.manager(components, TYPES)
    for number, (features, target) in enumerate(batches_of[rank]):
        with torch.set_grad_enabled(number % 2 == 0):
            manager(oracle.predict(features, oracle.parameters()), target)
    return as_floats(manager.compute())


def test_merged_and_unmerged_steps_add_up_in_one_epoch():
    components = LOSSES["a loss of many components"]
    batches_of = [[oracle.draw(10 * rank + number, [2, 3 + rank]) for number in range(4)] for rank in range(2)]
    features, target = (oracle.join(part) for part in zip(*batches_of[0], *batches_of[1], strict=True))
    expected = oracle.values(components, oracle.predict(features, oracle.parameters()), target, TYPES)
    results = spawn(2, training_and_validation, components, batches_of)
    assert_same_bits(results)
    assert_close(results[0], expected)


def steps_that_sync_without_gradients(rank, world_size, components, shards, how):
    manager = oracle.manager(components, TYPES)
    if how == "sync_on_step":
        manager.sync_on_step = True
    else:
        for metric in manager.values():
            metric.dist_sync_on_step = True
    features, target = shards[rank]
    with torch.no_grad():
        return as_floats(manager(oracle.predict(features, oracle.parameters()), target))


@pytest.mark.parametrize("how", ["sync_on_step", "dist_sync_on_step"])
def test_step_values_are_global_when_asked(how):
    components, shards = LOSSES["a loss of many components"], shards_of("unequal atoms", 2)
    features, target = (oracle.join(part) for part in zip(*shards, strict=True))
    expected = oracle.values(components, oracle.predict(features, oracle.parameters()), target, TYPES)
    results = spawn(2, steps_that_sync_without_gradients, components, shards, how)
    assert_same_bits(results)
    assert_close(results[0], expected)


def step_in_pairs(rank, world_size, components, shards):
    groups = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    manager = oracle.manager(components, TYPES)
    manager.process_group = groups[rank // 2]
    features, target = shards[rank]
    theta = oracle.parameters()
    values = manager(oracle.predict(features, theta), target)
    values["weighted_sum"].backward()
    return as_floats(values), theta.grad.numpy(), gradient_scale(manager.process_group)


def test_a_process_group_merges_only_its_own_ranks():
    components, shards = LOSSES["a loss of many components"], shards_of("unequal atoms", 4)
    results = spawn(4, step_in_pairs, components, shards)
    for pair in ([0, 1], [2, 3]):
        features, target = (oracle.join(part) for part in zip(*(shards[rank] for rank in pair), strict=True))
        expected = oracle.values(components, oracle.predict(features, oracle.parameters()), target, TYPES)
        assert_same_bits([results[rank][0] for rank in pair])
        assert_close(results[pair[0]][0], expected)
        gradient = sum(results[rank][1] for rank in pair)
        np.testing.assert_allclose(
            gradient, oracle.gradient(components, features, target, TYPES), rtol=1e-12, atol=1e-12
        )
    assert [scale for *_, scale in results] == [2] * 4


# --- loss and metrics over one merge ---


def step_with_metrics(rank, world_size, loss, metrics, shards):
    managers = [oracle.manager(loss, TYPES), oracle.manager(metrics, TYPES)]
    features, target = shards[rank]
    theta = oracle.parameters()
    of_loss, of_metrics = harness.step_together(*managers, preds=oracle.predict(features, theta), target=target)
    of_loss.weighted_sum.backward()
    assert not of_metrics.reported.requires_grad
    epochs = harness.compute_together(managers)
    return *(values.to_host() for values in (of_loss, of_metrics, *epochs)), theta.grad.numpy()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_metrics_beside_the_loss_leave_it_unchanged(world_size):
    loss = LOSSES["a loss of many components"]
    metrics = [Component("forces", "max", 1.0, True, ignore_nan=True), Component("stress", "mae", 2.0, ignore_nan=True)]
    shards = shards_of("everything at once", world_size)
    features, target = (oracle.join(part) for part in zip(*shards, strict=True))
    preds = oracle.predict(features, oracle.parameters())
    results = spawn(world_size, step_with_metrics, loss, metrics, shards)
    for position, components in enumerate([loss, metrics, loss, metrics]):
        assert_same_bits([result[position] for result in results])
        assert_close(results[0][position], oracle.values(components, preds, target, TYPES))
    expected = oracle.gradient(loss, features, target, TYPES)
    np.testing.assert_allclose(sum(result[-1] for result in results), expected, rtol=1e-12, atol=1e-12)


# --- objects ---


def exchanged(rank, world_size):
    from harness.distributed import any_over_ranks, broadcast_object, gather_to_first

    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    own = {"rank": rank, "long": "x" * 100 * rank}
    return {
        "first": gather_to_first(own),
        "first of pair": gather_to_first(rank, pairs[rank // 2]),
        "sent": broadcast_object(own),
        "sent in pair": broadcast_object(rank, pairs[rank // 2]),
        "any": [any_over_ranks(rank == 3), any_over_ranks(False), any_over_ranks(rank == 3, pairs[rank // 2])],
    }


def test_objects_go_to_the_first_rank_or_come_from_it():
    found = spawn(4, exchanged)
    everyone = [{"rank": rank, "long": "x" * 100 * rank} for rank in range(4)]
    assert [each["first"] for each in found] == [everyone, [], [], []]
    assert [each["first of pair"] for each in found] == [[0, 1], [], [2, 3], []]
    assert [each["sent"]["rank"] for each in found] == [0, 0, 0, 0]
    assert [each["sent in pair"] for each in found] == [0, 0, 2, 2]
    assert [each["any"] for each in found] == [[True, False, rank >= 2] for rank in range(4)]
