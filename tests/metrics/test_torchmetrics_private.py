"""Every undocumented name of torchmetrics that the package uses: these tests fail if a version changes one of them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torchmetrics import Metric

import harness
from harness.metrics import torchmetrics_private as private

PRIVATE = ("_defaults", "_reductions", "_update_count")


class Example(Metric):
    """A state of each reduction, and a list of samples."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for reduction in ("sum", "mean", "max", "min"):
            self.add_state(reduction, torch.tensor(3.0), dist_reduce_fx=reduction)
        self.add_state("samples", [], dist_reduce_fx="cat")
        self.add_state("each", torch.zeros(2), dist_reduce_fx=None)

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.sum = self.sum + (preds - target).sum()

    def compute(self) -> torch.Tensor:
        return self.sum


def test_initial_values_of_states() -> None:
    metric = Example()
    states = private.default_states(metric)
    assert list(states) == ["sum", "mean", "max", "min", "samples", "each"]
    assert states["sum"] == 3
    assert states["samples"] == []
    private.set_default_state(metric, "sum", torch.tensor(5.0, dtype=torch.float64))
    metric.reset()
    assert metric.sum.dtype == torch.float64
    assert metric.sum == 5


def test_reductions_of_states() -> None:
    of_state = private.reductions(Example())
    names = {state: private.REDUCTIONS.get(of_state[state]) for state in ("sum", "mean", "max", "min")}
    assert names == {"sum": "sum", "mean": "mean", "max": "max", "min": "min"}
    assert of_state["samples"] is private.concatenate
    assert of_state["each"] is None
    rows = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    found = {name: reduce(rows).tolist() for reduce, name in private.REDUCTIONS.items()}
    assert found == {"sum": [4, 7], "mean": [2, 3.5], "max": [3, 5], "min": [1, 2]}
    assert private.concatenate(list(rows)).tolist() == [1, 5, 3, 2]


def test_number_of_updates() -> None:
    metric = torchmetrics.MeanSquaredError()
    assert not metric.update_called
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        metric.compute()
    metric.reset()
    private.set_num_updates(metric, 2)
    assert metric.update_called
    assert metric.update_count == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()
    metric.reset()
    assert not metric.update_called


def test_gradients_flow_through_the_functions_of_the_class() -> None:
    metric, target = Example(), torch.ones(3)
    preds = torch.zeros(3, requires_grad=True)
    metric.update(preds, target)
    assert not metric.sum.requires_grad  # that of the instance is wrapped, which is why the class's own is called
    metric.reset()
    private.update_of_class(metric, preds, target)
    value = private.compute_of_class(metric)
    value.backward()
    assert preds.grad is not None
    assert preds.grad.tolist() == [1, 1, 1]
    private.update_of_class(metric, preds, target)
    assert private.compute_of_class(metric) == -3  # 3 - 3 - 3: nothing was cached, and no update counted
    assert not metric.update_called


def test_compositions() -> None:
    first, second = torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()
    assert private.is_composition(first + second)
    assert private.is_composition(first / 2)
    assert not private.is_composition(first)


def test_nothing_else_reaches_into_torchmetrics() -> None:
    package = Path(harness.__file__).parent
    expressions = [rf"\.{name}\b" for name in PRIVATE] + [r"torchmetrics\.(?:utilities|metric)\b", r"\bdim_zero_"]
    found: dict[str, Any] = {
        str(file.relative_to(package)): re.findall("|".join(expressions), file.read_text())
        for file in package.glob("**/*.py")
    }
    at_home = "metrics/torchmetrics_private.py"
    assert {match.lstrip(".") for match in found.pop(at_home)} >= {*PRIVATE, "dim_zero_"}
    assert set(found.pop("support/deferred.py")) == {"torchmetrics.utilities"}  # by name alone; see tests/test_start.py
    assert {file: names for file, names in found.items() if names} == {}
