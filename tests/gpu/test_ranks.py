"""Two ranks that share one GPU: by NCCL, where it allows that, and by gloo on the tensors of the GPU."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.devices import DEVICES, moved
from support.many_measures import everything, frames
from support.spawning import spawn

import harness
from harness.distributed import gradient_scale

ATOMS = [[2, 3, 1, 4], [2, 3, 1, 2]]


def on_rank(rank: int, world_size: int, device: str) -> dict[str, Any]:
    """A step of this rank's frames, the end of the epoch, and the gradient of its predictions."""
    managers = everything()
    preds, target = (moved(part, device) for part in frames(rank, ATOMS[rank]))
    values = harness.step_together(*managers, preds=preds, target=target)
    (values[0].weighted_sum * gradient_scale()).backward()
    return {
        "step": [each.to_host() for each in values],
        "epoch": [each.to_host() for each in harness.compute_together(managers)],
        "gradient": preds["forces"].grad.cpu() / gradient_scale(),
    }


def by_nccl(rank: int, folder: str) -> None:
    """One rank, on the one GPU."""
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    torch.save(on_rank(rank, 2, "cuda"), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_by_gloo_are_one_process(device: str) -> None:
    check(spawn(2, on_rank, device))


@pytest.mark.gpu
def test_two_ranks_by_nccl_are_one_process(tmp_path: Path) -> None:
    try:
        mp.spawn(by_nccl, (str(tmp_path),), nprocs=2)
    except Exception as error:
        if "uplicate GPU" in str(error):
            pytest.skip("NCCL takes a GPU for one rank only: duplicate GPU")
        raise
    check([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)])


def check(found: list[dict[str, Any]]) -> None:
    """Values of both ranks are those of one process, to the same bits, and gradients are its gradients."""
    whole = everything()
    parts = [frames(rank, atoms) for rank, atoms in enumerate(ATOMS)]
    preds = {name: torch.cat([part[0][name] for part in parts]).detach().requires_grad_() for name in parts[0][0]}
    target = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    values = harness.step_together(*whole, preds=preds, target=target)
    values[0].weighted_sum.backward()
    for ranks in found:
        for each, right in zip(ranks["step"], values, strict=True):
            assert each == pytest.approx(right.to_host(), rel=1e-12, abs=1e-12, nan_ok=True)
    assert str(found[0]["step"]) == str(found[1]["step"])  # bitwise
    assert str(found[0]["epoch"]) == str(found[1]["epoch"])
    gradient = torch.cat([each["gradient"] for each in found])
    torch.testing.assert_close(gradient, preds["forces"].grad, rtol=1e-12, atol=1e-14)
