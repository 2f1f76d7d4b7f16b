"""Every strategy trains as one process does: real ranks, the real DeepSpeed, and checkpoints that all of them share."""

from __future__ import annotations

import functools
import math
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from support.commands import BIN, ROOT, TINY, Finished, read_csv, run, same, train

from harness import strategies
from harness.train import run_job

# several trainings each; deepspeed compiles a small operation on its first use
pytestmark = pytest.mark.timeout(600)

Seen = dict[str, Any]
WORKER = ROOT / "tests" / "support" / "strategy_ranks.py"
# deepspeed finds the program that compiles its small operation beside the interpreter
EXAMPLE = ROOT / "examples" / "dipole"
SEARCH = {
    "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{EXAMPLE}",
}
SPLIT = ("fsdp", "zero1", "zero2", "zero3")
ALL = ("ddp", "ddp_static_graph", *SPLIT)

# Values are float64 sums of float32 errors. Sums in another order round differently in the network, by some 1e-7 of a
# value and of a parameter (all are below 1) a step; the trainings take 8 steps, in which parameters move by 1e-2.
VALUES, PARAMETERS = 2e-6, 5e-7


def write_frames(path: Path) -> Path:
    """Alloys of 1 to 16 atoms, so that ranks have unequal numbers of atoms, and batches without one of the types."""
    random, frames = np.random.default_rng(0), []
    for number in range(26):
        atoms = bulk("Cu", cubic=number % 2 == 0)
        atoms = atoms.repeat([(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (2, 2, 1)][number % 5])
        atoms.symbols = random.choice(["Cu", "Pd", "Ag"] if number % 8 else ["Cu", "Au"], len(atoms))
        atoms.set_cell(atoms.cell * (1.05 + 0.05 * random.random()), scale_atoms=True)
        atoms.rattle(0.08, rng=random)
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        frames.append(atoms)
    write(path, frames)
    return path


def write_labelled(path: Path) -> Path:
    """Clusters of water, of 3 to 9 atoms, a third of them with a dipole and a half with charges."""
    water = runpy.run_path(str(EXAMPLE / "water.py"))
    random, frames = np.random.default_rng(0), []
    for number in range(26):
        atoms = water["frame"](random, number)
        if number % 3:
            atoms.calc.results.pop("dipole", None)
        if number % 2:
            molecules = torch.tensor(atoms.positions).reshape(-1, 3, 3)
            atoms.arrays["REF_charges"] = water["charges_of"](molecules).reshape(-1).numpy()
        frames.append(atoms)
    write(path, frames, format="extxyz")
    return path


def launch(folder: Path, ranks: int, frames: Path, *cases: str) -> dict[str, list[Seen]]:
    """What each rank has seen of each case."""
    command = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [] if ranks == 1 else ["--nproc-per-node", str(ranks)]
    done = run([*command, str(WORKER), str(frames), str(folder), *cases], folder, timeout=500, **SEARCH)
    assert done.code == 0, done.err[-6000:]
    names = [case.partition("name=")[2] or case for case in cases]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)] for name in names
    }


def deviation(expected: Seen, found: Seen) -> tuple[float, float]:
    """Largest relative deviation of any value, and largest deviation of any parameter."""
    pairs = list(zip(expected["steps"][-len(found["steps"]) :], found["steps"], strict=True))
    pairs += [(expected[when], found[when]) for when in ("epoch", "test")]
    worst, compared = 0.0, 0
    for left, right in pairs:
        assert left.keys() == right.keys()
        for key in left:
            assert math.isnan(left[key]) == math.isnan(right[key]), (key, left[key], right[key])
            if not math.isnan(left[key]):
                worst = max(worst, abs(left[key] - right[key]) / max(abs(left[key]), 1e-3))
                compared += 1
    assert compared > 100
    assert found["parameters"].keys() == expected["parameters"].keys()
    return worst, max(
        float((value - found["parameters"][name]).abs().max()) for name, value in expected["parameters"].items()
    )


def same_training(
    expected: Seen, ranks: list[Seen], values: float = VALUES, parameters: float = PARAMETERS, moved: float = 1e-2
) -> None:
    assert max(float(value.abs().max()) for value in expected["moved"].values()) > moved
    for found in ranks:
        of_values, of_parameters = deviation(expected, found)
        assert of_values < values
        assert of_parameters < parameters


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_frames(tmp_path_factory.mktemp("frames") / "frames.xyz")


PRECISE = ("single,adam,64-true", "single,adam,bf16-mixed", "single,sgd,32-true,clip", "single,sgd,32-true,accumulate")
GROUPS = "adam,32-true,groups"


@pytest.fixture(scope="module")
def alone(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    """One process, without a strategy and with each of them on one rank."""
    cases = ["single,sgd", "single,adam", *PRECISE, f"single,{GROUPS}", *(f"{name},adam" for name in ALL)]
    return launch(tmp_path_factory.mktemp("alone"), 1, frames, *cases)


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(frames: Path, folder_of_two: Path) -> dict[str, list[Seen]]:
    """Two ranks."""
    cases = [f"{name},{optimizer}" for name in ALL for optimizer in ("sgd", "adam")]
    cases += [f"{name},sgd,32-true,{what}" for name in ("fsdp", "zero2", "zero3") for what in ("clip", "accumulate")]
    cases += [f"{name},{GROUPS}" for name in ("ddp", *SPLIT)]
    return launch(folder_of_two, 2, frames, *cases, "ddp,adam,64-true", "ddp,adam,bf16-mixed", "fsdp,adam,bf16-mixed")


@pytest.mark.parametrize("strategy", ALL)
def test_one_rank_is_one_process(alone: dict[str, list[Seen]], strategy: str) -> None:
    same_training(alone["single,adam"][0], alone[f"{strategy},adam"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("strategy", ALL)
def test_two_ranks_train_as_one_process(
    alone: dict[str, list[Seen]], two: dict[str, list[Seen]], strategy: str, optimizer: str
) -> None:
    ranks = two[f"{strategy},{optimizer}"]
    assert all(here != there for here, there in zip(ranks[0]["atoms"], ranks[1]["atoms"], strict=True))
    assert len(ranks[0]["steps"]) == 8
    assert any(math.isnan(step["loss/by_type_Au"]) for step in ranks[0]["steps"])
    assert [seen["scale"] for seen in ranks] == [2, 2]
    same_training(alone[f"single,{optimizer}"][0], ranks)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_gradients_are_clipped_as_in_one_process(
    alone: dict[str, list[Seen]], two: dict[str, list[Seen]], strategy: str
) -> None:
    clipped = alone["single,sgd,32-true,clip"][0]
    assert deviation(alone["single,sgd"][0], clipped)[1] > 1e-3
    same_training(clipped, two[f"{strategy},sgd,32-true,clip"])


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_gradients_are_accumulated_as_in_one_process(
    alone: dict[str, list[Seen]], two: dict[str, list[Seen]], strategy: str
) -> None:
    accumulated = alone["single,sgd,32-true,accumulate"][0]
    plain = alone["single,sgd"][0]["parameters"]
    assert any(float((plain[name] - value).abs().max()) > 1e-3 for name, value in accumulated["parameters"].items())
    same_training(accumulated, two[f"{strategy},sgd,32-true,accumulate"])


@pytest.mark.parametrize("strategy", ["ddp", *SPLIT])
def test_groups_of_parameters_and_frozen_ones(
    alone: dict[str, list[Seen]], two: dict[str, list[Seen]], folder_of_two: Path, strategy: str
) -> None:
    expected = alone[f"single,{GROUPS}"][0]
    assert deviation(alone["single,adam"][0], expected)[1] > 1e-3
    same_training(expected, two[f"{strategy},{GROUPS}"])
    frozen = [name for name, moved in expected["moved"].items() if not moved.any()]
    assert [name.rpartition("schnet.")[2] for name in frozen] == [
        "embedding.weight",
        "interactions.0.lin.weight",
        "interactions.0.lin.bias",
    ]
    for seen in two[f"{strategy},{GROUPS}"]:
        assert not any(seen["moved"][name].any() for name in frozen)
    checkpoint, reference = (
        torch.load(folder_of_two / f"{name}-{GROUPS.replace(',', '-')}-1.ckpt", weights_only=True)
        for name in (strategy, "ddp")
    )
    (state,), (other,) = checkpoint["optimizer_states"], reference["optimizer_states"]
    found = [{key: group[key] for key in ("name", "params", "lr", "weight_decay")} for group in state["param_groups"]]
    assert found == [
        {key: group[key] for key in each} for each, group in zip(found, other["param_groups"], strict=True)
    ]
    assert [group["name"] for group in found] == ["rest", "biases", "group2"]
    for number, values in other["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(state["state"][number][key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_labels_that_some_frames_lack(tmp_path: Path) -> None:
    """Dipoles and charges beside energies and forces, also where a rank, or all, have none of them in a step."""
    labelled, alone, both = write_labelled(tmp_path / "labelled.xyz"), tmp_path / "alone", tmp_path / "both"
    for folder in (alone, both):
        folder.mkdir()
    (whole,) = launch(alone, 1, labelled, "single,adam,32-true,labels").popitem()[1]
    assert len([step for step in whole["steps"] if step["loss/dipole_mse"] > 0]) > 4
    assert {"loss/charges_mae_O", "loss/charges_mae_H"} <= whole["steps"][0].keys()
    assert any(float(moved.abs().max()) > 1e-2 for name, moved in whole["moved"].items() if "model.charges." in name)
    for ranks in launch(both, 2, labelled, *(f"{strategy},adam,32-true,labels" for strategy in SPLIT)).values():
        same_training(whole, ranks, values=5e-6)  # charges of 0.04 e are sums of larger numbers


def test_double_precision(alone: dict[str, list[Seen]], two: dict[str, list[Seen]]) -> None:
    same_training(alone["single,adam,64-true"][0], two["ddp,adam,64-true"], 1e-12, 1e-13)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_mixed_precision(alone: dict[str, list[Seen]], two: dict[str, list[Seen]], strategy: str) -> None:
    """A rank's products are rounded to 8 bits, and what is rounded depends on the shape of a batch."""
    same_training(alone["single,adam,bf16-mixed"][0], two[f"{strategy},adam,bf16-mixed"], 1e-2, 5e-4)


@pytest.mark.slow
def test_a_strategy_that_splits_the_world(alone: dict[str, list[Seen]], frames: Path, tmp_path: Path) -> None:
    """Two by two ranks: two share a batch, and two work on the same part of it."""
    ranks = launch(tmp_path, 4, frames, "fsdp_two_by_two,sgd")["fsdp_two_by_two,sgd"]
    assert [seen["scale"] for seen in ranks] == [2, 2, 2, 2]
    assert ranks[0]["atoms"] == ranks[1]["atoms"] != ranks[2]["atoms"] == ranks[3]["atoms"]
    same_training(alone["single,sgd"][0], ranks)
    assert ranks[0]["drawn"] == alone["single,sgd"][0]["drawn"] != {}


# --- checkpoints ---


@pytest.mark.parametrize("strategy", ALL)
def test_a_checkpoint_is_one_whole_file(two: dict[str, list[Seen]], folder_of_two: Path, strategy: str) -> None:
    found, expected = (
        torch.load(folder_of_two / f"{name}-adam-1.ckpt", weights_only=True) for name in (strategy, "ddp")
    )
    weights = found["state_dict"]
    assert weights.keys() == expected["state_dict"].keys()
    for name, value in two[f"{strategy},adam"][0]["parameters"].items():
        assert type(weights[name]) is torch.Tensor
        assert torch.equal(weights[name], value)
    (state,), (reference,) = found["optimizer_states"], expected["optimizer_states"]
    assert state["state"].keys() == reference["state"].keys()
    assert [group["params"] for group in state["param_groups"]] == [
        group["params"] for group in reference["param_groups"]
    ]
    assert state["param_groups"][0]["lr"] == reference["param_groups"][0]["lr"]
    for number, values in reference["state"].items():
        assert state["state"][number].keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(state["state"][number][key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_checkpoint_is_continued_by_every_strategy_on_any_number_of_ranks(
    alone: dict[str, list[Seen]], two: dict[str, list[Seen]], folder_of_two: Path, frames: Path, tmp_path: Path
) -> None:
    """After the first of two epochs; the whole training of one process is the reference."""
    path = functools.partial("{}/{}-adam-0.ckpt".format, folder_of_two)
    cases = [f"{name},adam,32-true,from={path(name)},name={name}-by-itself" for name in SPLIT]
    cases += [f"{name},adam,32-true,from={path('ddp')},name={name}-from-ddp" for name in SPLIT]
    cases += [f"ddp,adam,32-true,from={path(name)},name=ddp-from-{name}" for name in ("fsdp", "zero1")]
    grouped = functools.partial("{}/{}-{}-0.ckpt".format, folder_of_two)
    kind = GROUPS.replace(",", "-")
    cases += [f"{name},{GROUPS},from={grouped(name, kind)},name={name}-groups" for name in SPLIT]
    cases += [f"zero2,{GROUPS},from={grouped('fsdp', kind)},name=zero2-groups-from-fsdp"]
    for name, ranks in launch(tmp_path, 2, frames, *cases).items():
        assert len(ranks[0]["steps"]) == 4, name
        same_training(alone[f"single,{GROUPS}" if "-groups" in name else "single,adam"][0], ranks)
        if name.endswith("by-itself"):  # to the last bit
            strategy = name.partition("-")[0]
            assert deviation(two[f"{strategy},adam"][0], ranks[0]) == (0, 0)

    cases = [f"single,adam,32-true,from={path(name)},name=single-from-{name}" for name in ("fsdp", "zero2", "zero3")]
    cases += [f"{name},adam,32-true,from={path('zero1')},name={name}-from-zero1" for name in ("zero2", "zero3")]
    for ranks in launch(tmp_path, 1, frames, *cases).values():
        same_training(alone["single,adam"][0], ranks)


@pytest.mark.slow
def test_every_strategy_goes_on_with_other_settings(frames: Path, tmp_path: Path) -> None:
    """Adam's moments under AdamW, with another rate and decay: each strategy as one process, and SGD anew."""
    start = f"32-true,from={tmp_path}/single-adam-0.ckpt"
    kinds = ("adamw", "sgd")
    alone = launch(tmp_path, 1, frames, "single,adam", *(f"single,{kind},{start},name=single-{kind}" for kind in kinds))
    expected = {kind: alone[f"single-{kind}"][0] for kind in kinds}
    assert deviation(expected["adamw"], expected["sgd"])[1] > 1e-3
    strategies = ("ddp", "fsdp", "zero2", "zero3")
    cases = [f"{name},{kind},{start},name={name}-{kind}" for name in strategies for kind in expected]
    for name, ranks in launch(tmp_path, 2, frames, *cases).items():
        assert len(ranks[0]["steps"]) == 4, name
        same_training(expected[name.rpartition("-")[2]], ranks)


# --- on the command line ---


def results(done: Finished) -> list[dict[str, float]]:
    assert done.code == 0, done.err[-4000:]
    return read_csv(done.runs[0])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Values of a training with a test of the best checkpoint."""
    done = train(
        *TINY,
        "logger=csv",
        "strategy=single",
        folder=tmp_path_factory.mktemp("one"),
        timeout=400,
    )
    return results(done)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        ["strategy=fsdp"],
        # the class for tests, which runs on CPUs
        pytest.param(
            ["strategy=deepspeed_zero3", "strategy._target_=support.cpu_deepspeed.CpuZero"], marks=pytest.mark.slow
        ),
    ],
    ids=["fsdp", "zero3"],
)
def test_the_best_checkpoint_is_tested(
    strategy: list[str], one_process: list[dict[str, float]], tmp_path: Path
) -> None:
    arguments = [*TINY, "logger=csv", *strategy]
    done = train(*arguments, folder=tmp_path, ranks=2, timeout=400, **SEARCH)
    rows = results(done)
    assert len(rows) == len(one_process)
    for expected, found in zip(one_process, rows, strict=True):
        assert expected.keys() == found.keys()
        for key in expected:
            assert same(expected[key], found[key], 1e-5), (key, expected[key], found[key])
    assert any("test0_epoch/forces_rmse" in row for row in rows)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=deepspeed_zero2"], ["CUDA", "strategy=ddp"]),
        (["trainer.precision=16-mixed"], ["16-mixed", "GPU", "bf16-mixed"]),
        (["trainer.precision=bf16-true"], ["bf16-true", "positions", "bf16-mixed"]),
        (["strategy=fsdp", "trainer.precision=64-true"], ["64-true", "FSDP", "strategy=ddp"]),
        (["strategy=fsdp", "callbacks=[default,ema]"], ["ExponentialMovingAverage", "strategy=ddp"]),
        (["strategy=deepspeed_zero2", "strategy.stage=4"], ["stage", "4"]),
        (["+strategy.save_distributed_checkpoint=true", "strategy=fsdp"], ["save_distributed_checkpoint", "one file"]),
        (["ckpt_path=${output_dir}"], ["folder", "one file"]),
    ],
)
def test_what_cannot_train_forces_is_refused_before_training(
    overrides: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*TINY, "logger=none", f"output_dir={tmp_path}", *overrides])
    with pytest.raises(SystemExit):
        run_job(config)
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    for word in words:
        assert word in said.err
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (FSDPStrategy, ["FSDP1", "strategy=fsdp"]),
        (DeepSpeedStrategy, ["float32", "strategy=deepspeed_zero2"]),
        (strategies.deep_speed, ["CUDA", "strategy=fsdp"]),
    ],
)
def test_strategies_of_lightning_that_are_refused(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        strategies.check_strategy(make(), "cpu", "32-true")


def test_deepspeed_takes_float32_only() -> None:
    strategy = strategies.deep_speed(stage=1)
    strategies.check_strategy(strategy, "cuda", "32-true")
    for precision in ("64-true", "bf16-mixed", "16-mixed"):
        with pytest.raises(ValueError, match=rf"{precision}.*strategy=ddp"):
            strategies.check_strategy(strategy, "cuda", precision)
    with pytest.raises(ValueError, match="EMAWeightAveraging"):
        strategies.check_strategy(strategy, "cuda", "32-true", [EMAWeightAveraging()])


def test_deepspeed_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"pip install 'potential-harness\[deepspeed\]'"):
        strategies.deep_speed(stage=2)


def test_one_process_is_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert strategies.single_device() == "auto"
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 ranks"):
        strategies.single_device()


def test_parts_that_are_sharded_are_refused() -> None:
    """In a process group of one rank; the error is the same on any number."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="1 of the model has been sharded"):
            strategies.shard_root(model, strategies.fully_sharded())
    finally:
        dist.destroy_process_group()


def test_ranks_share_a_batch_where_no_trainer_says_otherwise() -> None:
    assert strategies.data_parallel_ranks(None) == (0, 1)
    assert strategies.data_parallel_ranks(Trainer(accelerator="cpu", devices=1, logger=False, barebones=True)) == (0, 1)
