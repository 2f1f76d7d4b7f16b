"""What a step costs: collectives, host-device synchronisation and operators, whatever the number of components."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.oracle import Component
from support.spawning import spawn
from support.step_cost import Operators, counted_collectives

import harness

FEW = [Component("forces", "mse", 1.0)]
MANY = [
    Component("total_energy", "mse", 1.0, ignore_nan=True, per_atom=True),
    Component("forces", "mse", 1.0, per_type=True, ignore_nan=True),
    Component("forces", "rmse", 1.0, per_type=True, ignore_nan=True),
    Component("forces", "huber", 0.0),
    Component("forces", "stratified", None, per_type=True),
    Component("stress", "mae", 1.0, ignore_nan=True),
]
MAXIMA = [Component("forces", "max", 1.0, per_type=True, ignore_nan=True), Component("stress", "max")]


def by_group(components, names, num_groups=0):
    """Manager of data with groups and weights, which keeps every component by group."""
    groups = [f"G{index}" for index in range(num_groups)]
    entries = [component.entry(names) for component in components]
    manager = harness.MetricsManager(entries, names, group_names=groups)
    manager.keep_by_group()
    return manager


def frames_of(target, num_groups=0):
    """Weight and group of each frame."""
    num_frames = len(target["num_atoms"])
    weights = {name: torch.arange(num_frames, dtype=torch.float64) for name in ("weight", "forces_weight")}
    return {**weights, "group_index": torch.arange(num_frames) % num_groups} if num_groups else {}


def collectives_of(rank, world_size, loss, metrics, num_types, num_groups=0):
    """Collectives of a training step, of a validation step and of the end of an epoch."""
    names = [f"T{index}" for index in range(num_types)]
    managers = [by_group(loss, names, num_groups), by_group(metrics, names, num_groups)]
    features, target = oracle.draw(rank, [2, 3], types=range(num_types))
    target |= frames_of(target, num_groups)
    preds = oracle.predict(features, oracle.parameters())
    with counted_collectives() as training:
        harness.step_together(*managers, preds=preds, target=target)[0].weighted_sum.backward()
    with counted_collectives() as validation, torch.no_grad():
        harness.step_together(*managers, preds=preds, target=target)
        managers[1](preds, target)
    with counted_collectives() as epoch:
        for values in harness.compute_together(managers):
            values.to_host()
    return dict(training), dict(validation), dict(epoch)


@pytest.mark.parametrize("num_types", [1, 89])
@pytest.mark.parametrize(
    ("loss", "metrics", "expected"),
    [
        (FEW, FEW, {"SUM": 1}),
        (MANY, MANY, {"SUM": 1}),
        (MANY, MANY + MAXIMA, {"SUM": 1, "MAX": 1}),
        (MANY + MAXIMA, MAXIMA, {"SUM": 1, "MAX": 1}),
    ],
    ids=["few", "many", "maxima in the metrics", "maxima in both"],
)
def test_collectives(loss, metrics, expected, num_types):
    for training, validation, epoch in spawn(2, collectives_of, loss, metrics, num_types):
        assert training == expected
        assert validation == {}
        assert epoch == expected


@pytest.mark.parametrize("num_groups", [2, 200])
def test_weights_and_groups_take_no_further_collective(num_groups):
    expected = {"SUM": 1, "MAX": 1}
    for training, validation, epoch in spawn(2, collectives_of, MANY, MANY + MAXIMA, 3, num_groups):
        assert (training, validation, epoch) == (expected, {}, expected)


def operators_of_a_step(num_types, components, monitors=MANY + MAXIMA, num_groups=0):
    names = [f"T{index}" for index in range(num_types)]
    managers = [by_group(components, names, num_groups), by_group(monitors, names, num_groups)]
    features, target = oracle.draw(0, [2, 3, 4], types=range(num_types), unlabelled=0.3)
    target |= frames_of(target, num_groups)
    preds = oracle.predict(features, oracle.parameters())
    harness.step_together(*managers, preds=preds, target=target)  # the first one looks at the types
    with Operators() as operators:
        harness.step_together(*managers, preds=preds, target=target)[0].weighted_sum.backward()
    return operators


def test_the_counter_sees_what_it_looks_for():
    values = torch.arange(4.0)
    with Operators() as operators:
        values[values > 1].sum().item()
        values.nonzero()
    assert set(operators.waits) >= {"aten::index with a mask", "aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.parametrize("num_types", [1, 3, 89])
def test_a_step_does_not_wait_for_the_device(num_types):
    assert operators_of_a_step(num_types, MANY + MAXIMA).waits == []


def test_operators_do_not_depend_on_the_number_of_types():
    one, many = (operators_of_a_step(num_types, MANY + MAXIMA).names for num_types in (1, 89))
    assert one == many
    assert one.total() > 50


def test_weights_and_groups_do_not_wait_and_cost_the_same_for_any_number():
    few, many = (operators_of_a_step(3, MANY + MAXIMA, num_groups=number) for number in (2, 200))
    assert few.waits == many.waits == []
    assert few.names == many.names


def test_a_step_of_data_with_weights_and_groups_that_nobody_asks_for_costs_no_more():
    names = ["H", "C", "O"]
    features, target = oracle.draw(0, [2, 3, 4], unlabelled=0.3)
    entries = [component.entry(names) | {"weights": False} for component in MANY + MAXIMA]
    counted = []
    for manager, labels in (
        (oracle.manager(MANY + MAXIMA, names), target),
        (
            harness.MetricsManager(entries, names, group_names=["a", "b"], set_names=["c"]),
            target | frames_of(target, 2),
        ),
    ):
        manager(oracle.predict(features, oracle.parameters()), labels)
        with Operators() as operators:
            manager(oracle.predict(features, oracle.parameters()), labels)["weighted_sum"].backward()
        counted.append(operators.names)
    assert counted[0] == counted[1]


def test_a_step_looks_at_no_number():
    """The meta device has shapes and no numbers: whatever asks for one is an error there."""
    manager = oracle.manager(MANY + MAXIMA, ["H", "C", "O"])
    features, target = oracle.draw(0, [2, 3, 4], unlabelled=0.3)
    manager(oracle.predict(features, oracle.parameters()), target)  # the first one looks at the types
    manager.reset()
    on_meta = {key: value.to("meta") for key, value in target.items()}
    preds = {key: torch.empty_like(on_meta[key], requires_grad=True) for key in features}
    manager(preds, on_meta)["weighted_sum"].backward()
    manager(preds, on_meta)["weighted_sum"].backward()
    assert preds["forces"].grad.shape == target["forces"].shape


def test_numbers_reach_the_host_in_one_copy():
    manager = oracle.manager(MANY + MAXIMA, ["H", "C", "O"])
    features, target = oracle.draw(0, [2, 3, 4], unlabelled=0.3)
    (values,) = harness.step_together(manager, preds=oracle.predict(features, oracle.parameters()), target=target)
    with Operators() as operators:
        numbers = values.to_host()
    assert all(isinstance(number, float) for number in numbers.values())
    assert operators.waits == []  # one tolist() of one vector, no item() for each number


def test_fields_are_read_once_a_step():
    class Counting:
        level = "node"
        reads = 0

        def __call__(self, preds, target):
            self.reads += 1
            return preds["forces"], target["forces"]

    field = Counting()
    metrics = [harness.MeanAbsoluteError, harness.RootMeanSquaredError, harness.MaximumAbsoluteError]
    manager = harness.MetricsManager(
        [
            {"name": f"{metric.__name__}_{ignore_nan}", "field": field, "metric": metric, "ignore_nan": ignore_nan}
            for metric in metrics
            for ignore_nan in (True, False)
        ]
    )
    manager({"forces": torch.ones(2, 3)}, {"forces": torch.zeros(2, 3)})
    assert field.reads == 1
