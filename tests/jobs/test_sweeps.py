"""Sweeps from the command line: in one process, with points of several ranks, with Optuna, and through submitit."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support.commands import BIN, ROOT, TINY, kill_tree, read_csv, run, train, wait_for

from harness.sweep import rank, read_sweep

POINT = (
    *(each for each in TINY if not each.startswith("max_epochs")),
    "max_epochs=1",
    "callbacks.parity=null",
    "callbacks.coefficients=null",
    "callbacks.learning_rate=null",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "hydra.sweep.dir=sweep",
)
pytestmark = pytest.mark.timeout(600)  # each starts several processes that import torch

SECRET = "a-token-of-the-environment"
TORCHRUN = ("--multirun", "hydra/launcher=torchrun")
LOGGERS = "logger=[wandb,csv]"
needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="the extra `sweep` is not installed"
)
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="the extra `sweep` is not installed"
)


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def wandb_run(folder: Path) -> dict[str, Any]:
    """What the one offline W&B run of a point says of itself: name, group, config and how it ended."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [str(BIN / "wandb"), "leet", "inspect", "--json"]
    lines = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in lines.splitlines() if '"type":"run"' in line]
    summary = subprocess.run(
        [*command, "--summary", str(file)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return {**next(each["run"] for each in records if each["type"] == "run"), **json.loads(summary)}


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
        assert logged["config"]["loss"]["coeffs"] == {"forces": forces, "total_energy": 10}
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


def test_no_file_of_a_sweep_holds_a_secret(of_ranks: Path) -> None:
    """Of the environment, which a setting refers to."""
    files = [path for path in of_ranks.rglob("*") if path.is_file()]
    assert {"0.done", "run.json", "config.yaml"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


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


def test_a_point_that_fails_is_told_by_its_rank_and_the_other_goes_on(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nown: of ${name}\n")
    point = [*POINT, "logger=csv", "hydra.launcher.nproc_per_node=1", "hydra.launcher.parallel=2"]
    point += ["+hydra.job.env_set.MY_TOKEN=${name}-${oc.env:HOME}", "+note=${oc.env:MY_TOKEN}"]
    point += ["experiment=own", "+hydra.callbacks.seen._target_=support.failures_for_tests.NotesJobs"]
    point += [f"+values.{key}={value}" for key, value in VALUES.items()]
    places = "hydra.sweep.subdir=point_${hydra.job.num}"
    done = train("--config-dir", "mine", *TORCHRUN, *point, places, "loss.coeffs.forces=-1,10", folder=tmp_path)
    assert done.code == 1
    assert "error: point 0 (forces=-1) failed: The coefficient of 'forces_mse' must be finite" in done.err
    assert "Traceback" not in done.err
    assert "point 1 (forces=10): finished" in done.out
    # side by side, each with its output in a file of its own
    assert "output      " not in done.out
    folders = [tmp_path / "sweep" / f"point_{number}" for number in range(2)]
    said = [(folder / "console.log").read_text() for folder in folders]
    assert f"writes to {folders[0] / 'console.log'}" in done.out
    assert "found -1" in said[0]
    assert said[1].count("output      ") == 1
    states = [read(folder, "run.json") for folder in folders]
    assert [each["state"] for each in states] == ["failed", "finished"]
    assert "found -1" in states[0]["error"]
    assert not (folders[0] / "result.json").exists()
    # the rank has composed what the sweep has
    config = OmegaConf.load(folders[1] / "csv" / "hparams.yaml")
    assert config.own == "of train"
    assert config.note == "***"  # taken from the environment, which hydra.job.env_set has changed
    assert OmegaConf.to_container(config["values"]) == {
        "text": 'it\'s $HOME, "quoted" = {a: [1]}',
        "nested": {"list": [1, "two words", None], "dict": {"x": "$y"}},
        "escaped": "${name}",
        "of_point": "1 forces=10 x/sweep",
        "of_launcher": 1,
        "folder": str(folders[1]),
    }
    # callbacks of Hydra's are called by the sweep, once for each point
    notes = sorted((tmp_path / "jobs.txt").read_text().splitlines())
    assert notes == ["end COMPLETED", "end FAILED", *["start harness.train.run_job"] * 2]


VALUES = {
    "text": "'it\\'s $HOME, \"quoted\" = {a: [1]}'",
    "nested": "{list: [1, 'two words', null], dict: {x: '$y'}}",
    "escaped": "'\\${name}'",
    "of_point": "'${hydra:job.num} ${harness.point_name:} ${harness.group:x}'",
    "of_launcher": "${hydra:launcher.nproc_per_node}",
    "folder": "${hydra:runtime.output_dir}",
}
"""Overrides that a shell, Hydra or OmegaConf could mistake for something else on their way to the ranks."""


def test_the_first_point_that_fails_ends_a_sweep_if_asked(tmp_path: Path) -> None:
    point = [*POINT, "logger=none", "hydra.launcher.nproc_per_node=1", "hydra.launcher.fail_fast=true"]
    done = train(*TORCHRUN, *point, "loss.coeffs.forces=-1,10", folder=tmp_path)
    assert done.code == 1
    assert "The sweep ends here, since fail_fast is true." in done.err
    assert [each.name for each in (tmp_path / "sweep").iterdir() if each.name.isdigit()] == ["0"]


@needs_optuna
def test_optuna_finds_a_front_of_two_objectives(tmp_path: Path) -> None:
    sampler = ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=2"]  # which draws one of each
    drawn = "loss.coeffs.forces=choice(-1,1,1000)"
    done = train(*POINT, "sweep=pareto", *sampler, drawn, "logger=csv", folder=tmp_path)
    assert done.code == 1, done.err[-4000:]  # since a point has failed
    assert done.err.count("failed points of the sweep: point") == 1
    plan = read(tmp_path / "sweep", "sweep.json")
    assert (plan["swept"], plan["planned"], plan["points"]) == (["loss.coeffs.forces"], 3, None)
    assert plan["objectives"] == ["val0_epoch/per_atom_energy_rmse", "val0_epoch/forces_rmse"]
    values, failed = [], 0
    for number in range(3):
        folder = tmp_path / "sweep" / str(number)
        if read(folder, "run.json")["state"] == "failed":
            failed += 1
            continue
        objectives = read(folder, "result.json")["objectives"]
        assert list(objectives) == ["val0_epoch/per_atom_energy_rmse", "val0_epoch/forces_rmse"]
        values.append(tuple(objectives.values()))
    assert failed == 1  # of forces=-1, which ends neither the sweep nor the study
    assert len(set(values)) == 2
    better = [
        each
        for each in values
        if not any(other != each and other[0] <= each[0] and other[1] <= each[1] for other in values)
    ]
    solutions = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml").solutions
    assert {tuple(each["values"]) for each in solutions} == set(better)
    found = rank(
        read_sweep(tmp_path / "sweep"), energy="val0_epoch/per_atom_energy_rmse", forces="val0_epoch/forces_rmse"
    )
    assert found.sweep.planned == 3
    assert found.sweep.swept == ["loss.coeffs.forces"]
    assert sorted(point.state for point in found.sweep.points) == ["failed", "finished", "finished"]
    axes = found.axes or ()
    assert {tuple(point.values[axis] for axis in axes) for point in found.front} == set(better)


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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_ended_leaves_nothing_behind_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.train", *TORCHRUN, *POINT, "logger=csv", "test=false"]
    command += ["max_epochs=20", "hydra.launcher.nproc_per_node=2", "loss.coeffs.forces=1,10"]
    with (tmp_path / "out").open("w") as out:
        sweep = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )
    try:
        first = tmp_path / "sweep" / "0"
        wait_for((first / "checkpoints" / "last.ckpt").is_file, 120, "a first checkpoint")
        assert len(processes_of(tmp_path)) >= 4  # the sweep, an agent and two ranks
        sweep.send_signal(number)
        assert sweep.wait(60) == (75 if number == signal.SIGTERM else -9)
        wait_for(lambda: not processes_of(tmp_path), 40, "the end of all ranks")
    finally:
        kill_tree(sweep.pid)
    assert read(first, "run.json")["state"] == "preempted"
    assert torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] < 19
    again = run([*command, "resume=auto"], tmp_path, timeout=300)
    assert again.code == 0, again.err[-3000:]
    assert again.out.count("goes on from") == 1
    for point in (first, tmp_path / "sweep" / "1"):
        epochs = [row["epoch"] for row in read_csv(point) if "train_loss_epoch/weighted_sum" in row]
        assert epochs == list(range(20))
    results = [(each / "result.json").stat().st_mtime_ns for each in (first, tmp_path / "sweep" / "1")]
    once_more = run([*command, "resume=auto"], tmp_path, timeout=300)
    assert once_more.code == 0, once_more.err[-3000:]
    assert once_more.out.count("finished before") == 2
    assert results == [(each / "result.json").stat().st_mtime_ns for each in (first, tmp_path / "sweep" / "1")]


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_in_one_process_which_goes_on_when_asked(tmp_path: Path) -> None:
    """A sweep that an experiment of the user's own asks for, so that the command line does not tell that it is one."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "many.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {loss.coeffs.forces: '1,10'}}}\n"
    )
    given = [each for each in POINT if not each.startswith("hydra.sweep.dir")]
    command = [sys.executable, "-m", "harness.train", "--config-dir", "mine", "experiment=many", *given]
    command += ["logger=none", "max_epochs=30", "test=false", "resume=auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out").open("w") as out:
        # a suite that runs in the background may have been told to ignore it, and hand that on
        hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out, preexec_fn=hears)
    try:
        wait_for(lambda: list(tmp_path.glob("multirun/train/*/0/checkpoints/last.ckpt")), 120, "a first checkpoint")
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(60) == 130
    finally:
        kill_tree(sweep.pid)
    said = (tmp_path / "out").read_text()
    assert "stopped: interrupted. The same command with resume=auto goes on." in said
    assert "Traceback" not in said
    (folder,) = tmp_path.glob("multirun/train/*")
    assert read(folder / "0", "run.json")["state"] == "interrupted"
    assert not (folder / "1").exists()
    again = run(command, tmp_path, timeout=300)
    assert again.code == 0, again.err[-3000:]
    assert again.out.count("goes on from") == 1
    assert list(tmp_path.glob("multirun/train/*")) == [folder]
    assert [read(folder / number, "run.json")["state"] for number in "01"] == ["finished", "finished"]


@pytest.mark.slow
def test_the_ranks_of_a_point_start_again_after_one_was_killed(tmp_path: Path) -> None:
    kill = "+callbacks.kill={_target_: support.failures_for_tests.KillAt, step: 6, rank: 1}"
    again = ["hydra.launcher.nproc_per_node=2", "hydra.launcher.max_restarts=1", "max_epochs=2", kill]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    given = [*POINT, "logger=csv", *again, "loss.coeffs.forces=10"]
    done = train(*TORCHRUN, *given, folder=tmp_path, timeout=300, PYTHONPATH=paths)
    assert done.code == 0, done.err[-4000:]
    assert done.out.count("goes on from") == 1
    assert read(tmp_path / "sweep" / "0", "run.json")["state"] == "finished"
    steps = [row["step"] for row in read_csv(tmp_path / "sweep" / "0") if "train_loss_step/forces_mse" in row]
    assert steps == sorted(set(steps))


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


def processes_of(folder: Path) -> list[int]:
    """Those whose command line or working directory is in a folder, without those that have ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, place = (process / "cmdline").read_bytes().decode(), os.readlink(process / "cwd")
        except OSError:
            continue
        if "harness." in command and Path(place).is_relative_to(folder):
            found.append(int(process.name))
    return found


# --- without a training ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["loss.coeffs.forces=tag(log,interval(0.1,100))"], "a range of values needs a sampler"),
        ([TORCHRUN[1], "hydra.launcher.nproc_pernode=2"], "Did you mean hydra.launcher.nproc_per_node"),
        (["hydra.sweeper.n_trials=3"], "It is one of sweep=optuna and sweep=pareto"),
        ([TORCHRUN[1], "hydra.launcher.nproc_per_node=0"], "nproc_per_node is a number, at least 1, or auto, found 0"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = train("--multirun", *POINT, *arguments, folder=tmp_path)
    assert done.code == 1
    assert words in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "sweep").exists()


def test_two_sweeps_in_one_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep" / ".launch").mkdir(parents=True)
    (tmp_path / "sweep" / ".launch" / "0.json").touch()
    with FileLock(tmp_path / "sweep" / ".lock"):
        done = train(*TORCHRUN, *POINT, "loss.coeffs.forces=1,10", folder=tmp_path)
    assert done.code == 1
    assert "belongs to a sweep that is still going on" in done.err
    assert [path.name for path in (tmp_path / "sweep" / ".launch").iterdir()] == ["0.json"]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {".launch", ".lock"}


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
