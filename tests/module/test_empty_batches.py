"""Ranks without frames: a model that cannot be called for them trains as in one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from support.alloy import trainer
from support.lightning_ranks import Ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

import harness
from harness import strategies
from harness.data import EmbeddedAlloyDataModule, collate, empty_batch
from harness.models import ForceField, ScaleShift, schnet_force_field
from harness.models.geometry import edge_lengths, edge_vectors
from harness.module import ForceFieldModule
from harness.module.empty_batches import PredictedRows, empty_like, has_graphs, skip_empty_batches, takes_empty_batches
from harness.testing import spawn


class NeedsAtoms(nn.Module):
    """A model with its own forces, which fails for a batch without graphs."""

    def __init__(self, num_types: int) -> None:
        super().__init__()
        self.by_type = nn.Embedding(num_types, 4)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if batch["pos"].shape[0] == 0:
            raise RuntimeError("cannot reshape tensor of 0 elements into shape [0, -1]")
        position = batch["pos"].detach().requires_grad_()
        lengths = edge_lengths(edge_vectors({**batch, "pos": position})).unsqueeze(-1)
        center, neighbor = batch["edge_index"]
        inputs = torch.cat((self.by_type(batch["atom_types"][neighbor]), torch.exp(-lengths)), dim=-1)
        of_edges = self.layers(inputs) * (1 - lengths / 4.5).clamp(min=0).square()
        energy = position.new_zeros(len(batch["num_atoms"]), 1).index_add(0, batch["batch"][center], of_edges)
        (gradient,) = torch.autograd.grad(energy.sum(), position, create_graph=self.training)
        return {"total_energy": energy, "forces": 0.0 * energy.sum() - gradient, "mine": energy.expand(-1, 2)}


class Uneven(LightningDataModule):
    """Frames of the alloy in batches whose last one has a frame for the first rank only."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.data = EmbeddedAlloyDataModule(
            num_frames=12, split={"val": 5, "test": 0}, cutoff=4.0, batch_size=2, dtype="float64", seed=1
        )
        self.data.setup()

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        batches = [list(range(start, min(start + 2, len(dataset)))) for start in range(0, len(dataset), 2)]
        assert len(batches[-1]) == 1
        own = [batch[self.rank :: self.world_size] for batch in batches]
        return DataLoader(
            dataset,
            batch_sampler=own,
            collate_fn=functools.partial(collate, dtype=torch.float64),  # type: ignore[arg-type]
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.data.train_set)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.data.val_sets[0])


def fit(rank: int, world_size: int, folder: str, strategy: str) -> dict[str, Any]:
    """Values and weights of three epochs."""
    seed_everything(3, verbose=False)
    data = Uneven(rank, world_size)
    module = ForceFieldModule(
        NeedsAtoms(len(data.data.type_names)).double(),
        loss=harness.EnergyForceLoss({"total_energy": 1, "forces": 10}),
        val_metrics=harness.EnergyForceMetrics,
        type_names=data.data.type_names,
        optimizer=functools.partial(torch.optim.Adam, lr=1e-2),
    )
    options: dict[str, Any] = {"max_epochs": 3}
    if world_size > 1:
        made = {
            "ddp": strategies.data_parallel,
            "static": functools.partial(strategies.data_parallel, static_graph=True),
        }
        if strategy in made:
            options["strategy"] = made[strategy](cluster_environment=Ranks(rank, world_size))
        else:
            options |= {"strategy": strategies.fully_sharded(), "plugins": [Ranks(rank, world_size)]}
        options["devices"] = world_size
    running = trainer(Path(folder), **options)
    running.fit(module, datamodule=data)
    weights = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.named_parameters()
    }
    return {"weights": weights, "values": {key: float(value) for key, value in running.callback_metrics.items()}}


@pytest.mark.parametrize("strategy", ["ddp", "static", "fsdp"])
def test_two_ranks_of_which_one_has_no_frames_train_as_one_process(strategy: str, tmp_path: Path) -> None:
    expected = fit(0, 1, str(tmp_path), "single")
    assert {"train_loss_epoch/forces_mse", "val0_epoch/forces_rmse"} <= expected["values"].keys()
    for found in spawn(2, fit, str(tmp_path), strategy):
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-10, atol=1e-10)
        assert found["values"] == pytest.approx(expected["values"], rel=1e-10, abs=1e-12)


def test_predictions_of_no_graphs_have_no_rows_and_hang_on_every_trained_parameter() -> None:
    model = NeedsAtoms(3).double()
    model.by_type.requires_grad_(False)
    batch = empty_batch(torch.float64)
    rows = PredictedRows(["total_energy", "forces", "stress", "unregistered"])
    found = rows.of_no_graphs(model, batch)
    shapes = {"total_energy": (0, 1), "forces": (0, 3), "stress": (0, 3, 3), "unregistered": (0,)}
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    for value in found.values():
        model.zero_grad()
        value.sum().backward(retain_graph=True)
        assert [bool((weight.grad == 0).all()) for weight in model.layers.parameters()] == [True] * 4
        assert model.by_type.weight.grad is None
    assert not any(value.requires_grad for value in rows.of_no_graphs(model.eval(), batch).values())


def test_predictions_that_no_metric_reads_are_there_once_the_model_has_made_some() -> None:
    rows, model = PredictedRows(["forces"]), NeedsAtoms(1)
    rows.remember(
        {"forces": torch.zeros(4, 3), "mine": torch.zeros(2, 7, dtype=torch.float64), "edge_index": torch.ones(2)}
    )
    rows.remember({"other": torch.zeros(2)})
    found = rows.of_no_graphs(model, empty_batch())
    assert {name: (tuple(value.shape), value.dtype) for name, value in found.items()} == {
        "forces": ((0, 3), torch.float32),
        "mine": ((0, 7), torch.float64),
        "edge_index": ((0,), torch.float32),
    }


def test_what_a_batch_without_graphs_is() -> None:
    batch = {"num_atoms": torch.tensor([2]), "pos": torch.zeros(2, 3), "edge_index": torch.zeros(2, 0)}
    assert has_graphs(batch)
    assert not has_graphs(empty_like(batch))
    assert not has_graphs(empty_batch())
    assert not has_graphs({"forces": torch.zeros(0, 3)})
    assert has_graphs({"forces": torch.zeros(1, 3)})
    assert has_graphs({"mine": torch.zeros(0)})  # nothing is known of it
    assert empty_like(batch)["edge_index"].shape == (2, 0)


def test_models_say_if_they_take_empty_batches(alloy_statistics: Any) -> None:
    own = schnet_force_field(alloy_statistics, cutoff=4.0)
    assert takes_empty_batches(own)
    assert takes_empty_batches(copy.deepcopy(own))
    of_a_user = ForceField(ScaleShift(NeedsAtoms(3), [1.0] * 3, [0.0] * 3))
    assert not takes_empty_batches(of_a_user)
    skip_empty_batches(of_a_user, PredictedRows(["forces"]))
    skip_empty_batches(of_a_user, PredictedRows(["forces"]))
    assert type(of_a_user).__mro__.count(ForceField) == 1
    assert takes_empty_batches(of_a_user)
    assert of_a_user(empty_batch())["forces"].shape == (0, 3)


@pytest.fixture
def alloy_statistics() -> Any:
    return Uneven(0, 1).data.statistics
