"""Gradients that are sent by one all-reduce behind the backward pass: two ranks train as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.alloy import build, trainer
from support.configs import composed
from support.lightning_ranks import Ranks
from torch import nn

from harness import strategies
from harness.adaptive import UncertaintyWeighting
from harness.data import EmbeddedAlloyDataModule
from harness.job.trainer import make_strategy
from harness.testing import spawn


class Watch(Callback):
    """Gradients as callbacks see them, right after the backward pass; atoms of this rank's batches."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.atoms: list[int] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        found = [weight.grad.norm() for weight in pl_module.parameters() if weight.grad is not None]
        self.norms.append(float(torch.stack(found).norm()))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.atoms.append(len(batch["pos"]))


def fit(rank: int, world_size: int, folder: str, options: dict[str, Any], adaptive: bool = False) -> dict[str, Any]:
    """Values, weights and gradients of two epochs of SchNet."""
    data = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=3, dtype="float64", seed=1
    )
    data.setup()
    weighting = UncertaintyWeighting() if adaptive else None
    module = build(data, weighting=weighting)
    module.model.never_used = nn.Parameter(torch.ones(2, dtype=torch.float64))
    module.model.register_buffer("steps", torch.tensor(7 + rank))
    if rank:  # what the training has is that of rank 0
        with torch.no_grad():
            for weight in module.parameters():
                weight += 0.1
    watch = Watch()
    settings: dict[str, Any] = {"callbacks": [watch], **options}
    if world_size > 1:
        strategy = strategies.flat_data_parallel(cluster_environment=Ranks(rank, world_size))
        settings |= {"devices": world_size, "strategy": strategy}
    running = trainer(Path(folder), **settings)
    running.fit(module, datamodule=data)
    return {
        "weights": {name: value.detach().clone() for name, value in module.named_parameters()},
        "values": {key: float(value) for key, value in running.callback_metrics.items()},
        "norms": watch.norms,
        "atoms": watch.atoms,
        "unused": module.model.never_used.grad is None,
        "steps": int(module.model.steps),
    }


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=["plain", "accumulate", "clip"]
)
def test_two_ranks_train_as_one_process(options: dict[str, Any], tmp_path: Path) -> None:
    expected = fit(0, 1, str(tmp_path), options)
    ranks = spawn(2, fit, str(tmp_path), options)
    assert all(here != there for here, there in zip(ranks[0]["atoms"], ranks[1]["atoms"], strict=True))
    for found in ranks:
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-10, atol=1e-10)
        assert found["values"] == pytest.approx(expected["values"], rel=1e-10, abs=1e-12)
        assert found["unused"]
        assert found["steps"] == 7
        if "accumulate_grad_batches" not in options:  # of whole steps
            assert found["norms"] == pytest.approx(expected["norms"], rel=1e-10)


def test_learnt_coefficients_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    expected = fit(0, 1, str(tmp_path), {}, True)
    learnt = [name for name in expected["weights"] if name.startswith("loss.")]
    assert learnt
    for found in spawn(2, fit, str(tmp_path), {}, True):
        for name in learnt:
            torch.testing.assert_close(found["weights"][name], expected["weights"][name], rtol=1e-10, atol=1e-12)


def average(rank: int, world_size: int) -> dict[str, Any]:
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("both", "one", "none")})
    module["exact"] = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    module["frozen"] = nn.Parameter(torch.zeros(1), requires_grad=False)
    module["both"].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    module["exact"].grad = torch.tensor([1e-12 * (rank + 1)], dtype=torch.float64)
    if rank:
        module["one"].grad = torch.tensor([4.0, 8.0])
    kept = module["both"].grad
    strategies.average_gradients(module)
    assert module["both"].grad is kept
    return {name: None if value.grad is None else value.grad.tolist() for name, value in module.items()}


def test_gradients_of_some_ranks_of_several_dtypes() -> None:
    for found in spawn(2, average):
        expected = {"both": [1.5, 3.0], "one": [2.0, 4.0], "none": None, "exact": [1.5e-12], "frozen": None}
        assert found == expected


def test_options_of_ddp_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no find_unused_parameters\. Leave it out, or choose strategy=ddp"):
        strategies.flat_data_parallel(find_unused_parameters=True)


class LikeNequIP(nn.Module):
    is_compile_graph_model = True


@pytest.mark.parametrize("ranks", [1, 2])
def test_auto_takes_it_for_a_compiled_model(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    plain, compiled = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    compiled[0].compile()
    kinds = {
        name: type(make_strategy(composed("strategy=auto"), model)).__name__
        for name, model in {"plain": plain, "compiled": compiled, "nequip": nn.Sequential(LikeNequIP())}.items()
    }
    flat = "FlatStrategy" if ranks == 2 else "str"
    assert kinds == {"plain": "DDPStrategy" if ranks == 2 else "str", "compiled": flat, "nequip": flat}
    assert type(make_strategy(composed("strategy=ddp"), compiled)).__name__ == "DDPStrategy"
