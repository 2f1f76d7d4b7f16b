"""Gradients of terms in and outside of the weighted sum: whatever the order, and for every parameter under DDP."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torchmetrics
from support.spawning import spawn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

import harness
from harness.distributed import gradient_scale

TARGET = {
    "forces": torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "charge": torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
}


def forces() -> torch.Tensor:
    return torch.zeros(6, 3, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_the_order_of_components_does_not_matter(order: tuple[int, ...]) -> None:
    components: list[dict[str, Any]] = [
        {"name": "watched", "field": "forces", "metric": torchmetrics.MeanAbsoluteError()},
        {"name": "theirs", "field": "forces", "metric": torchmetrics.MeanSquaredError(), "coeff": 1},
        {"name": "own", "field": "forces", "metric": harness.MeanSquaredError(), "coeff": 1},
    ]
    prediction = forces()
    values = harness.MetricsManager([components[index] for index in order])({"forces": prediction}, TARGET)
    values["weighted_sum"].backward()
    expected = -2 * TARGET["forces"] / TARGET["forces"].numel()
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-12, atol=1e-12)


class RootOfSum(Metric):
    """A user's metric of whole batches with an infinite slope at 0."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds: Any, target: Any) -> None:
        self.total = self.total + (preds["forces"] ** 2).sum()

    def compute(self) -> torch.Tensor:
        return self.total.sqrt()


@pytest.mark.parametrize("coeff", [0, None])
def test_whole_batch_metrics_outside_the_sum_send_no_gradient(coeff: float | None) -> None:
    manager = harness.MetricsManager(
        [
            {"name": "root", "field": None, "metric": RootOfSum(), "coeff": coeff},
            {"name": "own", "field": "forces", "metric": harness.MeanSquaredError(), "coeff": 1},
        ]
    )
    prediction = forces()
    manager({"forces": prediction}, TARGET)["weighted_sum"].backward()
    expected = -2 * TARGET["forces"] / TARGET["forces"].numel()
    torch.testing.assert_close(prediction.grad, expected, rtol=1e-12, atol=1e-12)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.force_head = nn.Linear(3, 3).double()
        self.charge_head = nn.Linear(3, 1).double()

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"forces": self.force_head(features), "charge": self.charge_head(features)}


def train_two_heads(rank: int, world_size: int, coeff: float | None) -> list[float]:
    torch.manual_seed(0)
    model = TwoHeads()
    wrapped = DistributedDataParallel(model)
    manager = harness.MetricsManager(
        [
            {"field": "forces", "metric": harness.MeanSquaredError(), "coeff": 1},
            {"field": "charge", "metric": harness.RootMeanSquaredError(), "coeff": coeff},
        ]
    )
    for _ in range(3):  # DDP complains in the step after the one without a gradient
        model.zero_grad()
        values = manager(wrapped(TARGET["forces"]), TARGET)
        (values["weighted_sum"] * gradient_scale()).backward()
    gradient = model.charge_head.weight.grad
    return [float(gradient.abs().sum()), float(model.force_head.weight.grad.abs().sum())]


@pytest.mark.parametrize("coeff", [0, None, 1])
def test_a_head_of_the_model_may_be_used_outside_the_sum_only(coeff: float | None) -> None:
    for charge, force in spawn(2, train_two_heads, coeff):
        assert (charge > 0) == bool(coeff)
        assert force > 0


def test_errors_of_the_wrong_shape_are_refused() -> None:
    class PerRow(harness.ErrorMetric):
        def measure(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (prediction - target).norm(dim=-1)

    manager = harness.MetricsManager([{"field": "forces", "metric": PerRow()}])
    assert manager.keys() == ["F_PerRow"]
    with pytest.raises(ValueError, match=r"F_PerRow.*one error for each element"):
        manager({"forces": forces()}, TARGET)


def test_modifiers_that_return_something_else_are_refused() -> None:
    class Alone:
        level = "node"

        def __call__(self, preds: Any, target: Any) -> Any:
            return preds["forces"]

    manager = harness.MetricsManager([{"field": Alone(), "metric": harness.MeanSquaredError(), "name": "alone"}])
    with pytest.raises(TypeError, match="returns two tensors"):
        manager({"forces": forces()}, TARGET)


def test_a_step_compiles() -> None:
    manager = harness.EnergyForceLoss(
        coeffs={"total_energy": None, "forces": 1}, per_type_forces_coeffs={"H": 1, "O": 2}, type_names=["H", "O"]
    )
    types = torch.tensor([0, 1, 0, 1, 1, 0])
    energies = {"total_energy": torch.zeros(2, 1), "num_atoms": torch.tensor([3, 3]), "atom_types": types}

    def step(prediction: torch.Tensor) -> torch.Tensor:
        return manager.evaluate(
            manager.measure({"forces": prediction, **energies}, {**TARGET, **energies})
        ).weighted_sum

    eager, compiled = forces(), forces()
    step(eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-12, atol=1e-12)
