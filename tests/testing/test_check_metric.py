"""``harness.testing.check_metric`` passes what is right, and names the law that a wrong metric breaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from support import oracle
from torch import Tensor

import harness
from harness.testing import MetricCheckError, RankFailedError, check_metric, spawn

LAWS = {
    "pickling",
    "value",
    "several batches",
    "reset",
    "state dict",
    "component",
    "merge",
    "order",
    "empty batch",
    "missing labels",
    "checkpoint",
}

ORACLES: dict[str, Callable[[Any, Any], float]] = {
    "mae": lambda p, t: np.abs(p - t).mean(),
    "mse": lambda p, t: ((p - t) ** 2).mean(),
    "rmse": lambda p, t: np.sqrt(((p - t) ** 2).mean()),
    "max": lambda p, t: np.abs(p - t).max(),
    "huber": lambda p, t: np.mean([oracle.huber(r, oracle.HUBER_DELTA) for r in (p - t).ravel()]),
    "huber_sum": lambda p, t: np.sum([oracle.huber(r, oracle.HUBER_DELTA) for r in (p - t).ravel()]),
    "stratified": lambda p, t: oracle.stratified(p, t, oracle.STRATA).mean(),
    "stratified_sum": lambda p, t: oracle.stratified(p, t, oracle.STRATA).sum(),
}


def mean_absolute(prediction: Any, target: Any) -> float:
    return np.abs(prediction - target).mean()


def coefficient_of_determination(prediction: Any, target: Any) -> float:
    residual, spread = ((prediction - target) ** 2).sum(0), ((target - target.mean(0)) ** 2).sum(0)
    return (1 - residual / spread).mean()


# --- right metrics ---


@pytest.mark.parametrize("name", oracle.METRICS)
def test_every_metric_of_the_package_passes(name: str) -> None:
    assert set(check_metric(oracle.METRICS[name](), ORACLES[name], per_type=True)) == LAWS | {
        "atom types",
        "gradient",
        "ranks",
    }


class LogCosh(harness.ErrorMetric):
    """A user's own, defined where the user tests it."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__(scale)
        self.scale = scale

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.log(torch.cosh((prediction - target) / self.scale))


@pytest.mark.parametrize("field", ["total_energy", "forces", "stress", "edge_vectors"])
def test_metric_of_a_user_passes_for_every_level(field: str) -> None:
    laws = check_metric(
        LogCosh(), lambda p, t: np.log(np.cosh((p - t) / 0.5)).mean(), field=field, per_type=field == "forces"
    )
    assert {"gradient", "ranks"} < set(laws)


def test_class_and_single_ranks_and_other_numbers() -> None:
    laws = check_metric(harness.MeanAbsoluteError, mean_absolute, ranks=[3], seed=7, ignore_nan=False)
    assert set(laws) == (LAWS | {"gradient", "ranks"}) - {"missing labels"}
    assert "ranks" not in check_metric(harness.MeanAbsoluteError, mean_absolute, ranks=())


def test_metric_of_torchmetrics_that_merges() -> None:
    laws = check_metric(torchmetrics.R2Score(), coefficient_of_determination)
    assert set(laws) == LAWS | {"gradient", "ranks"}


def test_metric_of_torchmetrics_that_is_gathered() -> None:
    data = [(torch.randn(rows), torch.randn(rows)) for rows in (5, 9, 2)]
    # torchmetrics adds 1e-6 to a denominator
    assert set(check_metric(torchmetrics.SpearmanCorrCoef(), spearman, data=data, rtol=1e-6)) == LAWS | {"ranks"}
    laws = check_metric(torchmetrics.PearsonCorrCoef(), lambda p, t: np.corrcoef(p, t)[0, 1], data=data)
    assert set(laws) == LAWS | {"ranks"}
    with pytest.raises(MetricCheckError, match="cannot be part of a loss on several ranks"):
        check_metric(
            torchmetrics.PearsonCorrCoef(), lambda p, t: np.corrcoef(p, t)[0, 1], data=data, differentiable=True
        )


def spearman(prediction: Any, target: Any) -> float:
    from scipy.stats import spearmanr

    return spearmanr(prediction, target).statistic


def test_data_of_a_user_of_integers_or_positive_numbers() -> None:
    labels = [(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])), (torch.tensor([1]), torch.tensor([1]))]
    laws = check_metric(torchmetrics.classification.BinaryAccuracy(), lambda p, t: (p == t).mean(), data=labels)
    assert "missing labels" not in laws, "integers have no NaN"
    positive = [(torch.rand(n, 2) + 1, torch.rand(n, 2) + 1) for n in (4, 0, 3)]
    logarithmic = torchmetrics.MeanSquaredLogError()
    laws = check_metric(logarithmic, lambda p, t: ((np.log1p(p) - np.log1p(t)) ** 2).mean(), data=positive)
    assert {"gradient", "missing labels"} < set(laws)


def test_metric_is_left_as_it_was() -> None:
    metric = harness.MeanAbsoluteError()
    metric.update(torch.tensor([1.0]), torch.tensor([3.0]))
    check_metric(metric, mean_absolute, ranks=())
    assert metric.compute().item() == 2


# --- wrong ones ---


class MeanOfMeans(torchmetrics.Metric):
    """Each batch has the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total = self.total + (preds - target).abs().mean()
        self.batches = self.batches + 1

    def compute(self) -> Tensor:
        return self.total / self.batches


class CountsAreLost(torchmetrics.Metric):
    """Right on one rank; the count of several is that of the largest."""

    reduction: str | None = "max"

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("number", torch.zeros(()), dist_reduce_fx=self.reduction)

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total = self.total + (preds - target).abs().sum()
        self.number = self.number + target.numel()

    def compute(self) -> Tensor:
        return self.total / self.number


class CountsAreStacked(CountsAreLost):
    """Right on one rank; several give as many values."""

    reduction = None


class NotPicklable(harness.MeanAbsoluteError):
    def __init__(self) -> None:
        super().__init__()
        self.transform = lambda value: value


class KeepsPythonState(torchmetrics.Metric):
    """The count is no state."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.number = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total = self.total + (preds - target).abs().sum()
        self.number += target.numel()

    def compute(self) -> Tensor:
        return self.total / self.number

    def reset(self) -> None:
        super().reset()
        self.number = 0


class IsNotReset(KeepsPythonState):
    def reset(self) -> None:
        torchmetrics.Metric.reset(self)


class ScalesByTheFirstBatch(harness.MeanAbsoluteError):
    """Alone and in one batch it is right."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(()))

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.first == 0 and target.shape[0] < 20:
            self.first = self.first + 2.0
            return 2 * super().measure(prediction, target)
        return super().measure(prediction, target)


class HidesMissingLabels(harness.MeanAbsoluteError):
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().measure(prediction, target).nan_to_num()


class SomethingForNothing(harness.MeanAbsoluteError):
    """An error of 1 where prediction and target are 0."""

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.exp(-(target**2)) * torch.ones_like(prediction)


class NormalisedByTheBatch(harness.MeanAbsoluteError):
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().measure(prediction, target) / target.abs().amax() if target.numel() else prediction - target


class CutsTheGraph(harness.MeanAbsoluteError):
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().measure(prediction.detach(), target)


class DependsOnTheRank(harness.MeanAbsoluteError):
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        import torch.distributed as dist

        factor = 1 + dist.get_rank() if dist.is_initialized() else 1
        return factor * super().measure(prediction, target)


class WaitsForOthers(harness.MeanAbsoluteError):
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 0:
            dist.barrier()
        return super().measure(prediction, target)


class ScalarPerRow(harness.MeanAbsoluteError):
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().measure(prediction, target).mean(-1)


def wrong_oracle(prediction: Any, target: Any) -> float:
    return np.abs(prediction - target).sum() / len(target)  # vectors, not components


def by_largest_label(prediction: Any, target: Any) -> float:
    return mean_absolute(prediction, target) / np.abs(target).max()


def constant(prediction: Any, target: Any) -> float:
    return np.exp(-(target**2)).mean()


@pytest.mark.parametrize(
    ("metric", "right", "law", "message"),
    [
        (harness.MeanAbsoluteError, wrong_oracle, "value", "found 1.*, expected 3.*or the oracle is wrong"),
        (
            MeanOfMeans,
            mean_absolute,
            "several batches",
            "batches of 7, 2, 9, 3, 5 rows, found .*, expected .*Keep sums",
        ),
        (CountsAreLost, mean_absolute, "merge", "states of 5 ranks .*, found .*, expected .*dist_reduce_fx"),
        (CountsAreStacked, mean_absolute, "merge", r"states of 5 ranks.*shape \[5\], not one number.*dist_reduce_fx"),
        (NotPicklable, mean_absolute, "pickling", "pickle.*lambda.*keep no lambda"),
        (KeepsPythonState, mean_absolute, "state dict", "fresh metric.*found .*, expected .*is lost"),
        (IsNotReset, mean_absolute, "reset", "found .*, expected .*reset.. restores the states"),
        (ScalesByTheFirstBatch, mean_absolute, "several batches", "found .*, expected"),
        (HidesMissingLabels, mean_absolute, "missing labels", "no ignore_nan, found .*, expected nan"),
        (SomethingForNothing, constant, "missing labels", "prediction 0 and target 0, found 1.0, expected 0.0"),
        (NormalisedByTheBatch, by_largest_label, "several batches", "found .*, expected"),
        (CutsTheGraph, mean_absolute, "gradient", "with respect to prediction .*found 0.0, expected -?0.0128.*differ"),
        (DependsOnTheRank, mean_absolute, "ranks", "on rank 0 of 2, found .*, expected"),
        (ScalarPerRow, mean_absolute, "value", "one error for each element"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrong_ones_are_told_the_law(metric: type, right: Callable[..., float], law: str, message: str) -> None:
    with pytest.raises(MetricCheckError, match=f"(?s){message}") as caught:
        check_metric(metric(), right)
    assert caught.value.law == law
    assert str(caught.value).startswith(f"{metric.__name__} breaks the law {law!r}: ")


def test_found_and_expected_are_attributes() -> None:
    with pytest.raises(MetricCheckError) as caught:
        check_metric(harness.MeanAbsoluteError(), lambda p, t: 0.0)
    assert isinstance(caught.value, AssertionError)
    assert caught.value.expected == 0
    assert caught.value.found > 0  # type: ignore[operator]


def test_rank_that_waits_for_ever_is_an_error_in_time() -> None:
    with pytest.raises(MetricCheckError, match=r"on 2 ranks .*collective") as caught:
        check_metric(WaitsForOthers(), mean_absolute, ranks=[2], timeout=5)
    assert caught.value.law == "ranks"


def test_class_within_a_function_is_explained() -> None:
    class Local(harness.MeanAbsoluteError):
        pass

    with pytest.raises(MetricCheckError, match=r"Local.*Define the class at the top of a module") as caught:
        check_metric(Local(), mean_absolute)
    assert caught.value.law == "pickling"


def test_module_that_ranks_cannot_import_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("made_of_nothing")
    exec("def answer(rank, world_size):\n    return rank\n", vars(module))
    monkeypatch.setitem(sys.modules, "made_of_nothing", module)
    with pytest.raises(
        RankFailedError, match=r"(?s)Rank 0.*cannot import what it was sent.*Rank 1.*importmode|import-mode"
    ):
        spawn(2, module.answer)


def test_what_is_no_metric_or_no_data_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torchmetrics.Metric.*found 3"):
        check_metric(3, mean_absolute)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"per_type needs .*'stress' is a graph field"):
        check_metric(LogCosh(), mean_absolute, field="stress", per_type=True)
    with pytest.raises(KeyError, match="Unknown field 'velocity'"):
        check_metric(LogCosh(), mean_absolute, field="velocity")
    with pytest.raises(ValueError, match="from 1 on, found 0"):
        check_metric(LogCosh(), mean_absolute, ranks=[2, 0])
    with pytest.raises(ValueError, match=r"data\[0\] has a prediction of shape \[2\] and a target of shape \[3\]"):
        check_metric(LogCosh(), mean_absolute, data=[(torch.ones(2), torch.ones(3))])
    with pytest.raises(TypeError, match=r"data\[0\] is a pair of tensors"):
        check_metric(LogCosh(), mean_absolute, data=[torch.ones(2)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least two batches"):
        check_metric(LogCosh(), mean_absolute, data=[(torch.ones(2), torch.ones(2))])


def test_tester_needs_no_test_framework() -> None:
    check = "import sys, harness.testing; print([n for n in ('pytest', 'hypothesis', 'lightning') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
