"""The data module and the force field on real processes: shares of the batches, and gradients of all ranks together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.spawning import spawn
from torch.nn.parallel import DistributedDataParallel

from harness.data import EmbeddedAlloyDataModule, collate, embedded_alloy_file
from harness.models import ForceField, schnet_force_field

NUM_RANKS = 3


def data_module(cache_dir: Path) -> EmbeddedAlloyDataModule:
    # two validation frames: the third rank has none
    module = EmbeddedAlloyDataModule(
        num_frames=15, split={"val": 2}, cache_dir=cache_dir, cutoff=3.5, batch_size=6, dtype="float64"
    )
    module.setup()
    return module


def model(module: EmbeddedAlloyDataModule) -> ForceField:
    sizes = {"hidden_channels": 6, "num_filters": 6, "num_interactions": 1, "num_gaussians": 5}
    return schnet_force_field(module.statistics, cutoff=3.5, seed=0, **sizes).double().train()


def loss_of_forces(predicted: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (predicted["forces"] - batch["forces"]).square().sum()


def run_rank(rank: int, world_size: int, directory: Path) -> dict[str, list[Any]]:
    module = data_module(directory)
    train, (val_loader,) = list(module.train_dataloader()), module.val_dataloader()
    val = list(val_loader)
    replica = DistributedDataParallel(model(module))
    for batch in (train[0], val[0]):  # a loss of forces alone, and a rank without graphs: neither may hang
        replica.zero_grad()
        (world_size * loss_of_forces(replica(batch), batch)).backward()
    return {
        "train": [batch["frame_index"].tolist() for batch in train],
        "val": [batch["frame_index"].tolist() for batch in val],
        "gradients": [parameter.grad.clone() for parameter in replica.parameters() if parameter.grad is not None],
    }


def test_ranks_share_the_batches_and_gradients_of_one(tmp_path: Path) -> None:
    embedded_alloy_file(15, cache_dir=tmp_path)
    ranks = spawn(NUM_RANKS, run_rank, tmp_path)

    module = data_module(tmp_path)
    for step, batch in enumerate(module.train_dataloader()):
        shares = [saved["train"][step] for saved in ranks]
        assert all(shares)
        assert sorted(index for share in shares for index in share) == sorted(batch["frame_index"].tolist())
    assert [saved["val"] for saved in ranks] == [[[0]], [[1]], [[]]]

    alone, batch = model(module), collate([module.val_sets[0][index] for index in range(2)])
    loss_of_forces(alone(batch), batch).backward()
    for saved in ranks:
        for parameter, gradient in zip(alone.parameters(), saved["gradients"], strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
