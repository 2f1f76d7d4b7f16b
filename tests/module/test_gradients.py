"""Gradients of components: those of one process on the whole data, measured without disturbing the training."""

from __future__ import annotations

import csv
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import Strategy
from support import oracle
from support.accumulation_cases import TYPES
from support.alloy import build, data, trainer
from support.commands import BIN
from support.lightning_ranks import Ranks
from support.oracle import Component
from support.spawning import spawn
from support.step_cost import counted_collectives
from torch import nn

import harness
from harness import strategies
from harness.callbacks import GradientShare, gradient_share
from harness.data import EmbeddedAlloyDataModule
from harness.distributed import sum_over_ranks
from harness.metrics import Window
from harness.module import ForceFieldModule
from harness.module.gradients import chosen_parameters, compare, local_gradients

alloy = data  # the fixture

PARTS = [
    Component("total_energy", "mse", 2.0, ignore_nan=True, per_atom=True),
    Component("forces", "rmse", 3.0, per_type=True, ignore_nan=True),
    Component("forces", "mae", None, ignore_nan=True),
    Component("stress", "mse", 1.0, ignore_nan=True),
    Component("stress", "max", 0.5, ignore_nan=True),
    Component("stress", "mae", 0.0, ignore_nan=True),
]
LINEAR = [part for part in PARTS if part.error not in ("rmse", "max")]
NAMES = tuple(part.name for part in PARTS if part.coeff is not None)
GRAPHS = [3, 1, 4, 2, 2, 5]


def whole_batch() -> tuple[oracle.Batch, oracle.Batch]:
    return oracle.draw(5, GRAPHS, unlabelled=0.2)


def measure_on_rank(rank: int, world_size: int, cuts: list[int]) -> tuple[Any, ...]:
    """Norms and cosines, and the gradients themselves, of a batch that the ranks share."""
    features, target = oracle.split(*whole_batch(), cuts)[rank]
    theta = oracle.parameters()
    theta.grad = torch.full_like(theta, 7.0)
    manager = oracle.manager(PARTS, TYPES)
    (values,) = harness.step_together(manager, preds=oracle.predict(features, theta), target=target)
    local = local_gradients(values, [theta])
    assert torch.equal(theta.grad, torch.full_like(theta, 7.0))
    with counted_collectives() as collectives:
        total = sum_over_ranks(local.clone())
        found = compare(values, total)
    assert dict(collectives) == ({"SUM": 1} if world_size > 1 else {})
    values.weighted_sum.backward()  # the graph is still there
    assert found.names == NAMES
    return total.numpy(), found.norms.numpy(), found.cosines.numpy(), found.shares.numpy(), found.coeffs.numpy()


@pytest.mark.parametrize(("world_size", "cuts"), [(1, []), (2, [1]), (3, [2, 2])])
def test_norms_and_cosines_are_those_of_one_process(world_size: int, cuts: list[int]) -> None:
    """On three ranks one has no data at all."""
    features, target = whole_batch()
    weighted = [part for part in PARTS if part.coeff is not None]
    gradients = np.stack(
        [
            oracle.gradient([Component(**{**vars(part), "coeff": 1.0})], features, target, TYPES)
            if part.coeff
            else np.zeros(oracle.NUM_PARAMETERS)
            for part in weighted
        ]
    )
    norms = np.sqrt((gradients**2).sum(1))
    coeffs = np.array([part.coeff for part in weighted]) / 6.5
    shares = coeffs * norms / (coeffs * norms).sum()
    results = spawn(world_size, measure_on_rank, cuts) if world_size > 1 else [measure_on_rank(0, 1, cuts)]
    for found, found_norms, found_cosines, found_shares, found_coeffs in results:
        np.testing.assert_allclose(found, gradients, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found_norms, norms, rtol=1e-12)
        np.testing.assert_allclose(found_shares, shares, rtol=1e-12)
        np.testing.assert_allclose(found_coeffs, coeffs, rtol=1e-12)
        with np.errstate(invalid="ignore"):
            cosines = gradients @ gradients.T / np.outer(norms, norms)
        np.testing.assert_allclose(found_cosines, cosines, rtol=1e-12)
        assert np.isnan(found_cosines[-1]).all()
        for each, other in zip(
            results[0], (found, found_norms, found_cosines, found_shares, found_coeffs), strict=True
        ):
            np.testing.assert_array_equal(each, other)  # bitwise


def test_a_closed_form() -> None:
    features, target = whole_batch()
    theta = oracle.parameters()
    manager = oracle.manager([Component("forces", "mse", 1.0, ignore_nan=True)])
    (values,) = harness.step_together(manager, preds=oracle.predict(features, theta), target=target)
    inputs, labels = features["forces"].numpy().reshape(-1, oracle.NUM_PARAMETERS), target["forces"].numpy().ravel()
    known = ~np.isnan(labels)
    residual = inputs[known] @ theta.detach().numpy() - labels[known]
    expected = 2 * residual @ inputs[known] / known.sum()
    np.testing.assert_allclose(local_gradients(values, [theta])[0].numpy(), expected, rtol=1e-12)
    scaled = local_gradients(values, [theta], scale=2.0**16)
    assert torch.equal(scaled, local_gradients(values, [theta]))


def window_on_rank(rank: int, world_size: int) -> Any:
    """Micro-batches of unequal size, and of none on one rank."""
    theta = oracle.parameters()
    features, target = whole_batch()
    parts = oracle.split(features, target, [1, 2, 2, 4, 5][: 2 * world_size - 1])[rank::world_size]
    manager = oracle.manager(LINEAR, TYPES)
    window: Window = manager.window([labels for _, labels in parts])
    total: Any = 0.0
    for inputs, labels in parts:
        (values,) = harness.step_together(manager, preds=oracle.predict(inputs, theta), target=labels, window=window)
        total = total + local_gradients(values, [theta])
        values.weighted_sum.backward()
    found = compare(values, sum_over_ranks(total))
    return found.norms.numpy(), found.cosines.numpy(), values.to_host()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_of_micro_batches_add_up(world_size: int) -> None:
    theta = oracle.parameters()
    features, target = whole_batch()
    (values,) = harness.step_together(
        oracle.manager(LINEAR, TYPES), preds=oracle.predict(features, theta), target=target
    )
    expected, reported = compare(values, local_gradients(values, [theta])), values.to_host()
    for norms, cosines, found in spawn(world_size, window_on_rank) if world_size > 1 else [window_on_rank(0, 1)]:
        np.testing.assert_allclose(norms, expected.norms.numpy(), rtol=1e-12)
        np.testing.assert_allclose(cosines, expected.cosines.numpy(), rtol=1e-10)
        assert found == pytest.approx(reported, rel=1e-12)


def test_parameters_by_prefix() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.layer = nn.Linear(2, 1)
    model.layers[0].bias.requires_grad_(False)
    assert list(chosen_parameters(model)) == ["layers.0.weight", "layers.1.weight", "layers.1.bias", "layer.weight",
                                              "layer.bias"]  # fmt: skip
    assert list(chosen_parameters(model, ["layer"])) == ["layer.weight", "layer.bias"]
    assert list(chosen_parameters(model, ["layers.1", "layer.bias"])) == [
        "layers.1.weight", "layers.1.bias", "layer.bias",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"begins with 'lay'. Valid: layers, layer\."):
        chosen_parameters(model, ["layer", "lay"])
    with pytest.raises(ValueError, match=r"begins with 'layers.2'. Valid: layers.0, layers.1\."):
        chosen_parameters(model, ["layers.2"])
    with pytest.raises(ValueError, match=r"'layers.0.bias'. Valid: layers.0.weight\."):
        chosen_parameters(model, ["layers.0.bias"])
    with pytest.raises(ValueError, match="expected some prefixes"):
        chosen_parameters(model, [])


# --- trainings ---


class Kept(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if step is not None and any(key.startswith("gradient_") for key in metrics):
            self.rows.setdefault(step, {}).update(metrics)


class Norms(Callback):
    """Norm of the gradient that the optimizer is given, of the model."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [each.grad for each in pl_module.model.parameters() if each.grad is not None]
        self.norms.append(float(torch.cat([each.double().reshape(-1) for each in gradients]).norm()))


def fit(
    folder: Path, data: EmbeddedAlloyDataModule, callbacks: list[Callback], dtype: torch.dtype, **options: Any
) -> tuple[list[torch.Tensor], dict[int, dict[str, float]]]:
    """Parameters after a training, and gradients that it has logged."""
    module, kept = build(data, optimizer=functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)), Kept()
    running = trainer(folder, callbacks=callbacks, logger=kept, max_epochs=1, **options)
    running.fit(module.to(dtype), datamodule=data)
    return [each.detach().clone() for each in module.model.parameters()], kept.rows


def own_data(batch_size: int = 4, dtype: str = "float64") -> EmbeddedAlloyDataModule:
    made = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=batch_size, dtype=dtype, seed=1
    )
    made.setup()
    return made


def norm_of_the_sum(row: dict[str, float], names: list[str]) -> float:
    """Norm of the whole gradient, from what is logged of its parts."""
    square = sum(row[f"gradient_norm/{name}"] ** 2 for name in names)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            cosine = row[f"gradient_cosine/{first}:{second}"]
            square += 2 * cosine * row[f"gradient_norm/{first}"] * row[f"gradient_norm/{second}"]
    return float(np.sqrt(square))


WEIGHTED = ["per_atom_energy_mse", "forces_mse", "stress_mse"]


def check_rows(rows: dict[int, dict[str, float]], norms: list[float], steps: list[int], tolerance: float) -> None:
    """What is logged makes up the gradient that the optimizer has got."""
    assert sorted(rows) == steps
    for step in steps:
        assert sum(rows[step][f"gradient_share/{name}"] for name in WEIGHTED) == pytest.approx(1)
        assert sum("gradient_cosine/" in key for key in rows[step]) == 3
        assert norm_of_the_sum(rows[step], WEIGHTED) == pytest.approx(norms[step], rel=tolerance)


@pytest.mark.parametrize(
    ("options", "batch_size", "steps"), [({}, 4, [1, 3]), ({"accumulate_grad_batches": 3}, 2, [1])]
)
def test_a_training_is_not_disturbed(
    alloy: EmbeddedAlloyDataModule, tmp_path: Path, options: dict[str, Any], batch_size: int, steps: list[int]
) -> None:
    data = alloy if batch_size == 4 else own_data(batch_size)
    alone, nothing = fit(tmp_path, data, [], torch.float64, **options)
    norms = Norms()
    watched, rows = fit(tmp_path, data, [GradientShare(2), norms], torch.float64, **options)
    assert nothing == {}
    assert all(map(torch.equal, alone, watched))
    check_rows(rows, norms.norms, steps, 1e-9)


def test_mixed_precision(tmp_path: Path) -> None:
    """Gradients of components round on their own: they make up the whole as far as bfloat16 goes."""
    data, norms = own_data(dtype="float32"), Norms()
    alone, _ = fit(tmp_path, data, [], torch.float32, precision="bf16-mixed")
    watched, rows = fit(tmp_path, data, [GradientShare(1), norms], torch.float32, precision="bf16-mixed")
    assert all(map(torch.equal, alone, watched))
    check_rows(rows, norms.norms, [0, 1, 2, 3], 0.02)


def strategy_on_rank(name: str, environment: Ranks) -> Strategy:
    if not name.startswith("zero"):
        return strategies.data_parallel(cluster_environment=environment, static_graph=name == "ddp_static_graph")
    os.environ |= {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    from support.cpu_deepspeed import CpuZero

    return CpuZero(stage=int(name[-1]), cluster_environment=environment)


def fit_on_rank(rank: int, world_size: int, folder: Path, names: list[str]) -> list[Any]:
    """With and without a measurement under each strategy: whether they end alike, and what was logged."""
    seen = []
    for name in names:
        dtype, data = (
            (torch.float32, own_data(dtype="float32")) if name.startswith("zero") else (torch.float64, own_data())
        )
        ends: list[Any] = []
        norms, rows = Norms(), {}
        # DeepSpeed has the gradients elsewhere
        for callbacks in ([], [GradientShare(2), *([] if name.startswith("zero") else [norms])]):
            strategy = strategy_on_rank(name, Ranks(rank, world_size))
            end, rows = fit(folder, data, callbacks, dtype, strategy=strategy, devices=world_size)
            ends.append(end)
        seen.append((all(map(torch.equal, *ends)), rows, norms.norms))
    return seen


def test_ranks_are_not_disturbed(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    norms = Norms()
    _, expected = fit(tmp_path, alloy, [GradientShare(2), norms], torch.float64)
    names = ["ddp", "ddp_static_graph", "zero1", "zero2"]
    ranks = spawn(2, fit_on_rank, tmp_path, names, timeout=250)
    for name, found, other in zip(names, *ranks, strict=True):
        assert found[0], name
        assert other[0], name
        assert other[1] == {}  # rank 0 logs
        tolerance = 1e-4 if name.startswith("zero") else 1e-9
        assert found[1].keys() == expected.keys()
        for step, row in expected.items():
            assert found[1][step] == pytest.approx(row, rel=tolerance, abs=tolerance), name
        if name == "ddp":
            for _, _, of_rank in (found, other):
                assert of_rank == pytest.approx(norms.norms, rel=1e-9)


def test_a_few_parameters(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    module = build(alloy)
    prefix = next(iter(chosen_parameters(module.model))).rpartition(".")[0]
    logger = CSVLogger(tmp_path, name="", version="csv")
    running = trainer(tmp_path, callbacks=[GradientShare(4, [prefix]), GradientShare(5)], logger=logger, max_epochs=1)
    with pytest.warns(UserWarning, match="every 5th step, and the training has 4: it ends before the first") as told:
        running.fit(module, datamodule=alloy)
    assert len([each for each in told if "before the first measurement" in str(each.message)]) == 1
    header = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"gradient_share/{name}" for name in WEIGHTED} <= set(header)


def test_by_default_a_few_logged_steps_are_measured(
    alloy: EmbeddedAlloyDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third and sixth of those that are logged, here; other steps have all values but these."""
    monkeypatch.setattr(gradient_share, "EVERY_NTH_LOGGED_STEP", 3)
    logger = CSVLogger(tmp_path, name="", version="csv")
    running = trainer(tmp_path, callbacks=[GradientShare()], logger=logger, max_epochs=4, log_every_n_steps=2)
    running.fit(build(alloy), datamodule=alloy)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss_step/weighted_sum"]] == [1, 3, 5, 7, 9, 11, 13, 15]
    measured = {int(row["step"]): row for row in rows if row[f"gradient_share/{WEIGHTED[0]}"]}
    assert list(measured) == [5, 11]
    for row in measured.values():
        assert sum(name.startswith("gradient_") and cell != "" for name, cell in row.items()) == 9


# --- what is refused ---


def test_what_cannot_be_measured_is_refused(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    from support.cpu_deepspeed import CpuZero

    for strategy in (strategies.fully_sharded(), CpuZero(stage=3)):
        running = trainer(tmp_path, strategy=strategy)
        with pytest.raises(ValueError, match=r"splits the parameters over the ranks.*strategy=ddp"):
            GradientShare().setup(running, build(alloy), "fit")
    running = trainer(tmp_path, callbacks=[GradientShare(1, ["readout"])])
    with pytest.raises(ValueError, match="begins with 'readout'"):
        running.fit(build(alloy), datamodule=alloy)

    module = build(alloy)
    next(module.model.children()).compile()  # nothing is compiled before it is called
    with pytest.raises(ValueError, match=r"torch\._functorch\.config\.donated_buffer = False"):
        GradientShare().setup(running, module, "fit")
    with torch._functorch.config.patch(donated_buffer=False):
        GradientShare().setup(running, module, "fit")

    class Other(ForceFieldModule.__bases__[0]):  # type: ignore[misc,name-defined]
        """A Lightning module of somebody else's."""

    with pytest.raises(TypeError, match="which shows its steps"):
        GradientShare().setup(running, Other(), "fit")


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_numbers_of_steps_are_whole(number: Any) -> None:
    with pytest.raises(ValueError, match="every_n_steps is a whole number"):
        GradientShare(number)


@pytest.mark.parametrize("parameters", ["readout", [1]])
def test_prefixes_are_a_list_of_names(parameters: Any) -> None:
    with pytest.raises(TypeError, match="list of prefixes"):
        GradientShare(1, parameters)
