"""Sweeps from the command line: in one process, with points of several ranks, with Optuna, and through submitit."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support.commands import ROOT, kill_tree, read_csv, run, train
from support.sweeps import LOGGERS, POINT, TORCHRUN, needs_submitit, read, wandb_run

pytestmark = pytest.mark.timeout(600)  # each starts several processes that import torch
SECRET = "a-token-of-the-environment"


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a sweep of two points of two ranks."""
    done = train(
        *TORCHRUN,
        *POINT,
        LOGGERS,
        "name=coefficients",
        "hydra.launcher.nproc_per_node=2",
        "loss.coeffs.forces=1,10",
        "train_metrics=${metrics}",
        "+note=${name}-${oc.env:MY_SECRET_TOKEN}",
        folder=tmp_path_factory.mktemp("sweep"),
        timeout=400,
        MY_SECRET_TOKEN=SECRET,
        RANK="3",  # of a launcher that is none of ours
        MASTER_PORT="1",
    )
    assert done.code == 0, done.err[-4000:]
    (done.folder / "stdout.txt").write_text(done.out)
    return done.folder / "sweep"


@pytest.mark.slow
def test_each_point_of_ranks_has_a_directory_and_a_run(of_ranks: Path) -> None:
    points = [of_ranks / str(number) for number in range(2)]
    assert {each.name for each in of_ranks.iterdir() if (each / ".hydra").is_dir()} == {each.name for each in points}
    expected = [1, 10]
    objectives = set()
    for folder, forces in zip(points, expected, strict=True):
        logged = wandb_run(folder)  # one for both ranks
        assert logged["display_name"] == f"forces={forces}"
        assert logged["run_group"] == "coefficients/sweep"
        assert logged["state"] == "finished"
        assert logged["config"]["loss"]["coeffs"] == {"forces": forces, "total_energy": 1}
        assert logged["config"]["trainer"]["devices"] == 2  # which only the ranks know

        state, result = read(folder, "run.json"), read(folder, "result.json")
        assert (state["state"], state["ranks"], result["ranks"]) == ("finished", 2, 2)
        assert state["overrides"][-3] == f"loss.coeffs.forces={forces}"
        assert state["started"] <= state["ended"]
        assert (state["point"], state["monitor"]) == (int(folder.name), "val0_epoch/weighted_sum")
        assert (state["project"], state["group"]) == ("harness", logged["run_group"])
        assert result["monitor"] == "val0_epoch/weighted_sum"
        assert result["objective"] == result["values"]["val0_epoch/weighted_sum"]
        assert result["seconds"] > 0
        last: dict[str, float] = {}
        for row in read_csv(folder):
            last |= row
        assert len(result["values"]) > 20
        for key, value in result["values"].items():
            assert value == pytest.approx(last[key], rel=1e-12), key
        objectives.add(result["objective"])
        overrides = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
        assert overrides == state["overrides"]
    assert len(objectives) == 2
    plan = read(of_ranks, "sweep.json")
    assert plan["swept"] == ["loss.coeffs.forces"]
    assert [point["loss.coeffs.forces"] for point in plan["points"]] == list(map(str, expected))
    assert (plan["planned"], plan["group"]) == (2, "coefficients/sweep")
    screen = (of_ranks.parent / "stdout.txt").read_text()
    assert screen.count("finished in") == screen.count("output      ") == 2  # one rank of each prints


@pytest.mark.slow
def test_no_file_of_a_sweep_holds_a_secret(of_ranks: Path) -> None:
    """Of the environment, which a setting refers to."""
    files = [path for path in of_ranks.rglob("*") if path.is_file()]
    assert {"0.done", "run.json", "config.yaml"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
def test_the_report_of_a_sweep_of_ranks(of_ranks: Path, tmp_path: Path) -> None:
    """Two points in the order of the monitored value, and the front of their errors, in terminal, CSV, PNG and W&B."""
    done = run([sys.executable, "-m", "harness.sweep", str(of_ranks), "--output", str(tmp_path / "report")], tmp_path)
    assert done.code == 0, done.err[-4000:]
    with (tmp_path / "report" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = {number: read(of_ranks / str(number), "result.json") for number in range(2)}
    assert [row["point"] for row in rows] == sorted(
        map(str, results), key=lambda number: results[int(number)]["objective"]
    )
    errors = {}
    for place, row in enumerate(rows, start=1):
        values = results[int(row["point"])]["values"]
        assert (row["rank"], row["state"], row["ranks"]) == (str(place), "finished", "2")
        assert f"forces={row['loss.coeffs.forces']}" in wandb_run(of_ranks / row["point"])["display_name"]
        for key in ("val0_epoch/weighted_sum", "test0_epoch/forces_rmse", "test0_epoch/total_energy_mae"):
            assert float(row[key]) == pytest.approx(values[key], rel=1e-12)
        errors[row["point"]] = values["test0_epoch/per_atom_energy_rmse"], values["test0_epoch/forces_rmse"]
    front = {
        point
        for point, mine in errors.items()
        if not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in errors.values())
    }
    assert {row["point"] for row in rows if row["front"] == "True"} == front
    assert front
    assert (tmp_path / "report" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    logged = wandb_run(tmp_path / "report")
    assert logged["run_group"] == "coefficients/sweep"
    assert (logged["state"], logged["summary"]["sweep/finished"]) == ("finished", 2)
    assert logged["summary"]["sweep/best"] == min(each["objective"] for each in results.values())
    assert logged["summary"]["sweep/pareto"]["_type"] == "images/separated"
    assert logged["summary"]["sweep/points"]["_type"] == "table-file"


@pytest.mark.slow
def test_a_sweep_in_one_process_trains_what_ranks_of_their_own_do(of_ranks: Path, tmp_path: Path) -> None:
    """The last of three points, after one that has failed: as if it were alone, with a W&B run of its own."""
    # an option among the overrides, where people write it too
    done = train(*POINT, LOGGERS, "--multirun", "loss.coeffs.forces=10,-1,1", "name=plain", folder=tmp_path)
    assert done.code == 1
    assert done.err.count("found -1") == 2  # when it happened, and in the end
    assert "failed points of the sweep: point 1 (forces=-1)" in done.err
    assert "report      harness-sweep sweep\n" in done.out
    assert "Traceback" not in done.err
    plan = read(tmp_path / "sweep", "sweep.json")
    assert plan["command"][-2:] == ["loss.coeffs.forces=10,-1,1", "name=plain"]
    assert (plan["swept"], plan["planned"]) == (["loss.coeffs.forces"], 3)
    assert [point["loss.coeffs.forces"] for point in plan["points"]] == ["10", "-1", "1"]
    assert (plan["monitor"], plan["project"], plan["group"]) == ("val0_epoch/weighted_sum", "harness", "plain/sweep")
    points = [tmp_path / "sweep" / str(number) for number in range(3)]
    assert [read(each, "run.json")["name"] for each in (points[0], points[2])] == ["forces=10", "forces=1"]
    assert [read(each, "run.json")["state"] for each in points] == ["finished", "failed", "finished"]
    assert "must be finite and not negative, found -1" in read(points[1], "run.json")["error"]
    assert not (points[1] / "result.json").exists()
    for number, other in ((0, 1), (2, 0)):
        assert wandb_run(points[number])["run_group"] == "plain/sweep"
        values, of_two = (read(each, "result.json")["values"] for each in (points[number], of_ranks / str(other)))
        assert values.keys() == of_two.keys()
        for key, value in values.items():
            assert value == pytest.approx(of_two[key], rel=1e-4), key


@pytest.mark.slow
@needs_submitit
def test_two_tasks_of_submitit_are_two_ranks(of_ranks: Path, tmp_path: Path) -> None:
    done = train(
        "--multirun",
        *POINT,
        LOGGERS,
        "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2",
        "loss.coeffs.forces=10",
        folder=tmp_path,
    )
    logs = "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*_log.err"))
    assert done.code == 0, done.err[-2000:] + logs[-2000:]
    folder = tmp_path / "sweep" / "0"
    result = read(folder, "result.json")
    assert result["ranks"] == 2
    assert result["values"] == pytest.approx(read(of_ranks / "1", "result.json")["values"], rel=1e-9)
    assert wandb_run(folder)["state"] == "finished"


@pytest.mark.slow
def test_another_node_joins_a_sweep(of_ranks: Path, tmp_path: Path) -> None:
    """Two agents on this host, of one rank each, that meet at an address as two nodes would."""
    command = [sys.executable, "-m", "harness.launcher", "sweep", "--node-rank", "1"]
    with (tmp_path / "out").open("w") as out:
        joining = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out
        )
    try:
        nodes = ["hydra.launcher.nproc_per_node=1", "hydra.launcher.nnodes=2"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"hydra.launcher.rdzv_endpoint=127.0.0.1:{probe.getsockname()[1]}"
        done = train(
            *TORCHRUN,
            *POINT,
            "logger=none",
            *nodes,
            address,
            "loss.coeffs.forces=1,-1,10",
            folder=tmp_path,
            timeout=400,
        )
        assert done.code == 1
        assert joining.wait(30) == 0, (tmp_path / "out").read_text()[-3000:]
    finally:
        kill_tree(joining.pid)
    assert "failed points of the sweep: point 1 (forces=-1)\n" in done.err
    for number, other in ((0, 0), (2, 1)):
        result = read(tmp_path / "sweep" / str(number), "result.json")
        assert result["ranks"] == 2
        assert result["values"] == read(of_ranks / str(other), "result.json")["values"]


def test_the_command_of_a_wandb_sweep_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own functions make the command line of a point, as its agent does."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    sweep = OmegaConf.to_container(OmegaConf.create((ROOT / "launch" / "wandb_sweep.yaml").read_text()))
    assert isinstance(sweep, dict)
    ranges = sweep["parameters"]
    assert all(
        each["distribution"] == "log_uniform_values" and 0 < each["min"] < each["max"] for each in ranges.values()
    )
    drawn = create_sweep_command_args({"args": {name: {"value": each["min"]} for name, each in ranges.items()}})
    macros = {**drawn, "env": ["/usr/bin/env"], "program": [sweep["program"]]}
    command: list[str] = []
    for part in create_sweep_command(list(sweep["command"])):
        command += macros[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
    assert command[:2] == ["/usr/bin/env", "torchrun"]
    overrides = command[command.index("harness.train") + 1 :]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    assert config.loss.coeffs.forces == 0.01
    assert config.hydra.run.dir == "outputs/coefficients/abc"
    assert sweep["metric"] == {"name": config.monitor, "goal": "minimize"}
