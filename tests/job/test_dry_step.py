"""The step before a training: it changes nothing of what is trained afterwards."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from support.bad_input import BASE, composed, write_files
from support.bad_parts import Pairs

import harness
from harness.data import AtomsDataModule, collate
from harness.job import execute, prepare
from harness.job.dry_step import check_batch, check_first_batch
from harness.models import schnet_force_field
from harness.module import ForceFieldModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write_files(made)
    return made


def data_of(folder: Path, **options: Any) -> AtomsDataModule:
    module = AtomsDataModule(folder / "frames.xyz", split={"val": 3}, cutoff=3.5, batch_size=4, **options)
    module.setup()
    return module


def module_of(data: AtomsDataModule, model: torch.nn.Module | None = None) -> ForceFieldModule:
    if model is None:
        model = schnet_force_field(
            data.statistics, cutoff=3.5, hidden_channels=4, num_filters=4, num_interactions=1, num_gaussians=4, seed=0
        )
    return ForceFieldModule(
        model,
        harness.EnergyForceLoss({"total_energy": 1, "forces": 1}),
        val_metrics=harness.EnergyForceMetrics({"forces_rmse": 1}),
        train_metrics=harness.EnergyForceMetrics(),
        type_names=data.type_names,
    )


def trainer(precision: Any = "32-true") -> Trainer:
    return Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)


class AddsMessages(torch.nn.Module):
    """Adds a layer's outputs to float32 sums by ``index_add``, which takes one dtype alone; or has a fault."""

    def __init__(self, fault: bool) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.fault = fault

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.fault:
            raise IndexError("no such neighbour")
        position = batch["pos"].clone().requires_grad_()
        sums = position.new_zeros(len(batch["num_atoms"]), 1).index_add(0, batch["batch"], self.layer(position).sin())
        with torch.autocast("cpu", enabled=False):
            (slope,) = torch.autograd.grad(sums.sum(), position, create_graph=self.training)
        return {"total_energy": sums, "forces": -slope}


def test_a_model_that_fails_under_mixed_precision_alone_is_told_with_the_remedy(folder: Path) -> None:
    data = data_of(folder)
    check_first_batch(module_of(data, AddsMessages(fault=False)), data, trainer("32-true"), train=True)
    with pytest.raises(
        ValueError, match=r"raises RuntimeError: .*same scalar type.*not made for bf16-mixed. Give precision=float32"
    ):
        check_first_batch(module_of(data, AddsMessages(fault=False)), data, trainer("bf16-mixed"), train=True)
    with pytest.raises(ValueError, match=r"raises IndexError: no such neighbour$"):
        check_first_batch(module_of(data, AddsMessages(fault=True)), data, trainer("bf16-mixed"), train=True)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_nothing_changes(folder: Path, precision: Any) -> None:
    data = data_of(folder)
    module = module_of(data).train()
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(2), np.random.rand(2), random.random()  # noqa: NPY002
    torch.manual_seed(3)
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    check_first_batch(module, data, trainer(precision), train=True)
    assert np.array_equal(np.random.get_state()[1], states[0][1])  # noqa: NPY002
    assert random.getstate() == states[1]
    assert torch.equal(torch.rand(2), expected[0])
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if isinstance(value, torch.Tensor))
    for manager in (module.loss, module.train_metrics, module.val_metrics[0]):
        assert manager.epoch_row.is_empty
        assert manager.epoch_row.last_step is None
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert next(iter(data.train_dataloader()))["frame_index"].tolist() == first_batch(folder)


def first_batch(folder: Path) -> list[int]:
    return next(iter(data_of(folder).train_dataloader()))["frame_index"].tolist()


def test_a_training_is_bitwise_the_same_with_and_without(folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, asked in (("with", "true"), ("without", "false")):
        settings = [
            *BASE,
            f"data.train={folder}/frames.xyz",
            f"dry_step={asked}",
            "callbacks.parity=null",
            "max_epochs=2",
        ]
        config = composed([*BASE, *settings])
        config.output_dir = str(tmp_path / name)
        execute(prepare(config))
        checkpoint = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append({k: v for k, v in checkpoint["state_dict"].items() if isinstance(v, torch.Tensor)})
    assert weights[0].keys() == weights[1].keys() != set()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Counting(Pairs):
    """Changes itself in every forward pass, in a buffer and in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.calls = 0

    def forward(self, batch: Any) -> Any:
        self.calls += 1
        self.mean += 1
        torch.rand(1)
        return super().forward(batch)


def test_a_model_that_changes_itself_is_left_as_it_is(folder: Path) -> None:
    data = data_of(folder)
    module = module_of(data, Counting())
    check_first_batch(module, data, trainer(), train=True)
    assert module.model.calls == 0
    assert module.model.mean.item() == 0


def compiled_by_torch(folder: Path, backend: Any) -> torch.nn.Module:
    """A model of which ``torch.compile`` has wrapped the part that has the parameters."""
    model = module_of(data_of(folder)).model
    model.energy_model = torch.compile(model.energy_model, backend=backend, dynamic=True)
    return model


def compiled_by_nequip(folder: Path, backend: Any) -> torch.nn.Module:
    pytest.importorskip("nequip")
    from harness.models.nequip import nequip_force_field

    sizes = {"num_layers": 1, "num_features": 2, "radial_mlp_width": 4, "parity": False}
    return nequip_force_field(data_of(folder).statistics, cutoff=3.5, compile_mode="compile", **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [compiled_by_torch, pytest.param(compiled_by_nequip, marks=pytest.mark.slow)])
def test_nothing_is_compiled_for_it(folder: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training compiles for itself, on its device: once, and not once more for a copy."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **{**options, "backend": backend}))
    data = data_of(folder)
    module = module_of(data, compiled(folder, backend))
    check_first_batch(module, data, trainer(), train=True)
    assert not graphs
    module.train()(next(iter(data.train_dataloader())))
    assert graphs


class NoCopies(Pairs):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is only one of me")


def test_a_model_that_cannot_be_copied_is_not_tried(folder: Path) -> None:
    data = data_of(folder)
    check_first_batch(module_of(data, NoCopies(lambda predictions: None)), data, trainer(), train=True)


class NeedsItsTrainer(LightningDataModule):
    def train_dataloader(self) -> Any:
        raise AttributeError(self.trainer.world_size)


def test_data_that_need_their_trainer_are_not_looked_at(folder: Path) -> None:
    check_first_batch(module_of(data_of(folder)), NeedsItsTrainer(), trainer(), train=True)


def test_a_good_batch_passes(folder: Path) -> None:
    data = data_of(folder)
    check_batch(next(iter(data.train_dataloader())), data.type_names)


def test_one_set_alone_of_the_two_is_enough(folder: Path) -> None:
    data = data_of(folder)
    wrong = Pairs(lambda predictions: {"total_energy": predictions["total_energy"]})
    with pytest.raises(ValueError, match=r"training batch: Field 'forces' is missing from the predictions"):
        check_first_batch(module_of(data, wrong), data, trainer(), train=True)
    with pytest.raises(ValueError, match=r"validation batch: Field 'forces' is missing from the predictions"):
        check_first_batch(module_of(data, wrong), data, trainer(), train=False)


class NeedsAtoms(Pairs):
    """Fails for a batch without graphs, though it may say otherwise."""

    def __init__(self, mistake: str = "", takes_empty_batches: bool = False) -> None:
        super().__init__()
        self.takes_empty_batches, self.mistake = takes_empty_batches, mistake
        self.more = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: Any) -> Any:
        if len(batch["num_atoms"]):
            predictions = super().forward(batch)
            return {**predictions, "forces": predictions["forces"] + self.more}
        if self.mistake == "raises":
            raise RuntimeError("cannot reshape tensor of 0 elements")
        return {"total_energy": torch.zeros(0, 1), "forces": torch.zeros(0, 3) + 0 * self.weights[:1]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_without_graphs_is_tried_where_a_rank_may_have_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    data = data_of(folder)
    module = module_of(data, NeedsAtoms("raises"))
    check_first_batch(module, data, trainer(), train=True)  # it is not called for them
    assert set(module.predicted_rows.of_no_graphs(module.model, collate([]))) == {"total_energy", "forces"}
    lying = module_of(data, NeedsAtoms("raises", takes_empty_batches=True))
    if ranks == 1:
        check_first_batch(lying, data, trainer(), train=True)
        return
    for train in (True, False):
        kind = "training" if train else "validation"
        words = f"fails on a {kind} batch without graphs.*takes_empty_batches is true.*cannot reshape tensor"
        with pytest.raises(ValueError, match=words):
            check_first_batch(lying, data, trainer(), train=train)
    unconnected = module_of(data, NeedsAtoms(takes_empty_batches=True))
    waits = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"No gradient reaches more from a training batch without graphs"):
        check_first_batch(unconnected, data, waits, train=True)
    check_first_batch(unconnected, data, trainer(), train=True)  # where nothing waits for it
