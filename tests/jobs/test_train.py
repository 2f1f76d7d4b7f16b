"""The command line end to end: real processes under torchrun, real W&B files, real error messages."""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.commands import ROOT, SHARED, SIZES, TINY, read_csv, read_wandb, run, same, train

STRESS = ("loss=energy_force_stress", "metrics=energy_force_stress")
DOUBLE = ("data.dtype=float64", "trainer.precision=64-true")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directory of a training on two ranks that logs to W&B and CSV."""
    done = train(
        *SIZES,
        *STRESS,
        *DOUBLE,
        "logger=[wandb,csv]",
        "train_metrics=${metrics}",
        ranks=2,
        folder=tmp_path_factory.mktemp("two"),
    )
    assert done.code == 0, done.err[-4000:]
    (folder,) = done.runs  # all ranks agree on one directory
    (folder / "stdout.txt").write_text(done.out)
    (folder / "stderr.txt").write_text(done.err)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on one rank."""
    done = train(
        *SIZES,
        *STRESS,
        *DOUBLE,
        "logger=csv",
        "train_metrics=${metrics}",
        folder=tmp_path_factory.mktemp("one"),
    )
    assert done.code == 0, done.err[-4000:]
    return done.runs[0]


def test_two_ranks_train_as_one_does(one_rank: Path, two_ranks: Path) -> None:
    alone, together = read_csv(one_rank), read_csv(two_ranks)
    assert len(alone) == len(together)
    compared = 0
    for left, right in zip(alone, together, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            assert same(left[key], right[key], 1e-8), (key, left[key], right[key])
            compared += not math.isnan(left[key])
    assert compared > 250
    stages = {key.partition("/")[0] for row in together for key in row}
    assert stages >= {
        "train_loss_step",
        "train_loss_epoch",
        "train_metric_step",
        "train_metric_epoch",
        "val0_epoch",
        "test0_epoch",
        "loss_coeff",
    }


def test_every_value_is_in_the_one_wandb_run(two_ranks: Path) -> None:
    summary, history = read_wandb(two_ranks)
    logged: dict[str, list[float]] = {}
    for record in history:
        for key, value in record["item"].items():
            logged.setdefault(key, []).append(value)
    written: dict[str, list[float]] = {}
    for row in read_csv(two_ranks):
        for key, value in row.items():
            written.setdefault(key, []).append(value)
    keys = [key for key in written if "/" in key]
    assert len(keys) > 100
    for key in keys:
        assert len(logged[key]) == len(written[key]), key
        for stored, expected in zip(logged[key], written[key], strict=True):
            assert same(float(stored), expected, 1e-9), key
    for name in ("forces_mse_per_type_Cu", "stress_mse", "per_atom_energy_mse", "weighted_sum"):
        assert {f"train_loss_step/{name}", f"train_loss_epoch/{name}"} <= logged.keys()
    for name in ("forces_rmse_per_type_Au", "forces_maxabserr", "stress_mae", "weighted_sum"):
        assert {f"train_metric_step/{name}", f"val0_epoch/{name}", f"test0_epoch/{name}"} <= logged.keys()
    rates = {f"throughput/{name}" for name in ("structures_per_second", "edges_per_second", "data_wait_share")}
    assert rates <= logged.keys()
    config = summary["config"]
    assert config["loss"]["coeffs"] == {"total_energy": 1, "forces": 10, "stress": 100}
    assert config["data"]["cutoff"] == config["cutoff"] == 4.5  # resolved
    assert summary["state"] == "finished"


def test_contributions_add_up_to_the_weighted_sum(two_ranks: Path) -> None:
    rows = [row for row in read_csv(two_ranks) if "train_loss_step/weighted_sum" in row]
    assert len(rows) == 4  # 16 frames in batches of 4: 4 steps an epoch, 2 of them logged
    (coefficients, *_) = [row for row in read_csv(two_ranks) if "loss_coeff/forces_mse" in row]
    for row in rows:
        names = ("per_atom_energy_mse", "forces_mse", "stress_mse")
        total = sum(coefficients[f"loss_coeff/{name}"] * row[f"train_loss_step/{name}"] for name in names)
        assert same(total, row["train_loss_step/weighted_sum"], 1e-12)


def test_what_stands_on_the_screen_in_the_end(two_ranks: Path) -> None:
    screen = (two_ranks / "stdout.txt").read_text()
    for name in ("per_atom_energy_rmse", "forces_maxabserr", "forces_rmse_per_type", "stress_mae", "weighted_sum"):
        assert len(re.findall(rf"│ {name} ", screen)) == 3  # one rank prints two validations and the test
    header = [line for line in screen.splitlines() if "┃ component" in line][-1]
    assert [header.index(symbol) for symbol in ("Cu", "Pd", "Ag", "Au")]
    assert "wandb sync " in screen
    (plot,) = two_ranks.glob("parity_test0.png")
    assert plot.stat().st_size > 10_000
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (two_ranks / "checkpoints" / "best.ckpt").is_file()
    assert str(plot) in screen.replace("\n", "")
    assert re.search(r"Epoch 1: 100%.*weighted_sum=0\.\d+", screen)  # the progress bar


def test_a_checkpoint_alone_predicts_relaxes_and_runs_dynamics(two_ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(two_ranks / "checkpoints" / "best.ckpt", tmp_path / "checkpoints")
    done = run([sys.executable, str(ROOT / "examples" / "use_trained.py"), str(tmp_path)], tmp_path)
    assert done.code == 0, done.err[-3000:]
    assert "knows Cu, Pd, Ag, Au; cutoff 4.5 Å; forces in eV/Å" in done.out
    assert len(re.findall(r"^energy -?\d+\.\d+ eV", done.out, re.MULTILINE)) == 3
    assert done.out.count("Cu force") == 4
    totals = [float(text) for text in re.findall(r"total energy (-?\d+\.\d+) eV", done.out)]
    assert len(totals) == 4
    assert max(totals) - min(totals) < 0.05
    assert 0 < int(done.out.rpartition("neighbour lists ")[2]) < 40


def test_the_loss_falls(one_rank: Path) -> None:
    losses = [row["train_loss_epoch/weighted_sum"] for row in read_csv(one_rank) if "loss_coeff/forces_mse" in row]
    assert losses[-1] < losses[0]


def test_a_run_continues_from_its_last_epoch_and_remembers_the_best(tmp_path: Path) -> None:
    """The second epoch is made worse than the first by a huge learning rate: best and last are not the same."""
    arguments = [*SIZES, "logger=csv", "lr_scheduler=none", "optimizer.lr=0.5"]
    arguments += ["callbacks.parity=null", "callbacks.table=null"]  # the table of the test is the only one then
    first = train(*arguments, "hydra.run.dir=first", folder=tmp_path)
    assert first.code == 0, first.err[-4000:]
    checkpoints = tmp_path / "first" / "checkpoints"
    steps = {
        name: torch.load(checkpoints / f"{name}.ckpt", weights_only=True)["global_step"] for name in ("best", "last")
    }
    scores = [
        row["val0_epoch/weighted_sum"] for row in read_csv(tmp_path / "first") if "val0_epoch/weighted_sum" in row
    ]
    assert steps == {"best": 4 * (1 + scores.index(min(scores))), "last": 8}  # 4 steps in each of 2 epochs

    resume = [*arguments, "max_epochs=3", f"ckpt_path={checkpoints / 'last.ckpt'}", "hydra.run.dir=second"]
    second = train(*resume, folder=tmp_path)
    assert second.code == 0, second.err[-4000:]
    rows = read_csv(tmp_path / "second")
    assert {row["epoch"] for row in rows if "train_loss_epoch/weighted_sum" in row} == {2}
    scores += [row["val0_epoch/weighted_sum"] for row in rows if "val0_epoch/weighted_sum" in row]
    best = "first" if scores.index(min(scores)) < 2 else "second"
    assert f"{best}/checkpoints/best.ckpt" in second.out

    alone = train(*arguments, "train=false", f"ckpt_path={checkpoints / 'best.ckpt'}", folder=tmp_path / "alone")
    assert alone.code == 0, alone.err[-4000:]
    tested, again = (
        [line for line in done.out.splitlines() if line.startswith("│ forces_rmse ")] for done in (first, alone)
    )
    assert tested == again != []


def test_averaged_weights_are_those_that_are_tested(tmp_path: Path) -> None:
    arguments = [*TINY, "logger=none", "callbacks.table=null"]
    averaged = ["callbacks=[default,ema]", "callbacks.ema.decay=0.5", "optimizer.lr=0.05", "hydra.run.dir=ema"]
    done = train(*arguments, *averaged, folder=tmp_path)
    assert done.code == 0, done.err[-4000:]
    best = tmp_path / "ema" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(best, weights_only=True)
    assert any(
        not torch.equal(value, checkpoint["current_model_state"][name])
        for name, value in checkpoint["state_dict"].items()
        if isinstance(value, torch.Tensor)
    )
    alone = train(*arguments, "train=false", f"ckpt_path={best}", folder=tmp_path)
    tables = [[line for line in each.out.splitlines() if line.startswith("│")] for each in (done, alone)]
    assert tables[0] == tables[1]
    assert len(tables[0]) > 10


def test_logger_none_writes_no_logs(tmp_path: Path) -> None:
    ramp = "{_target_: harness.schedules.Linear, start: {forces_rmse: 1}, end: {forces_rmse: 2}, end_epoch: 1}"
    moving = [f"+metrics.schedule={ramp}", "+metrics.schedule.start_epoch=0"]
    done = train(*TINY, "logger=none", "max_epochs=1", *moving, folder=tmp_path)
    assert done.code == 0, done.err[-4000:]
    assert not list(tmp_path.rglob("*.wandb"))
    assert not list(tmp_path.rglob("metrics.csv"))
    assert "forces_rmse" in done.out
    assert "\nwarning: val0_epoch/weighted_sum is monitored, and the schedule" in done.err
    assert "rank_zero_warn(" not in done.err  # no line of code


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.coeffs.force=1"], ["force"]),
        (["+loss.coeffs.force=1"], ["'force'", "Valid keys: total_energy, forces"]),
        (["data=nothing"], ["nothing", "embedded", "file"]),
        pytest.param(
            ["data.batch_size=1", "data.split={val: 4, test: 4}", "ranks=2"], ["1", "2"], marks=pytest.mark.slow
        ),
    ],
)
def test_mistakes_on_the_command_line(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    ranks = 2 if "ranks=2" in overrides else 1
    overrides = [override for override in overrides if override != "ranks=2"]
    sizes = [each for each in TINY if "data=nothing" not in overrides or not each.startswith("data.")]
    done = train(*sizes, "logger=none", *overrides, folder=tmp_path, ranks=ranks)
    assert done.code != 0
    for word in words:
        assert word in done.err, done.err[-3000:]
    assert done.err.count("error: ") <= 1  # said by one rank
    assert "Epoch 0" not in done.out + done.err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_sweep_under_torchrun_is_refused(tmp_path: Path) -> None:
    done = train(*TINY, "--multirun", "loss.coeffs.forces=1,10", ranks=2, folder=tmp_path)
    assert done.code != 0
    assert "--multirun" in done.err


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not there")
@pytest.mark.parametrize(
    ("name", "overrides", "components"),
    [
        (
            "acac",
            [f"data.train={SHARED}/acac/train_300K.xyz", f"data.test={SHARED}/acac/test_MD_300K.xyz"],
            ["forces_rmse_per_type", "per_atom_energy_mae"],
        ),
        pytest.param(
            "mixed",
            [f"data.train={SHARED}/ethanol_methanol/train_eth_meth.xyz"],
            ["forces_rmse"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "carbon",
            [f"data.train={SHARED}/carbon/carbon_100.xyz", "data.keys.forces=force", *STRESS],
            ["stress_rmse", "forces_rmse"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_users_files(name: str, overrides: list[str], components: list[str], tmp_path: Path) -> None:
    arguments = [argument for argument in TINY if not argument.startswith(("data.num_frames", "data.split"))]
    done = train(
        *arguments,
        "data=file",
        "data.num_train=16",
        "data.eval_batch_size=64",
        "max_epochs=1",
        "logger=csv",
        *overrides,
        folder=tmp_path,
        ranks=2,
    )
    assert done.code == 0, done.err[-4000:]
    values = {key: value for row in read_csv(done.runs[0]) for key, value in row.items() if key.startswith("test0")}
    for component in components:
        assert math.isfinite(values[f"test0_epoch/{component}"])
