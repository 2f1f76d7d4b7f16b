"""Sweeps in which points fail or are killed, that are ended, and that cannot start; and failures under Optuna."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from support.bad_input import captured, command_line
from support.commands import ROOT, kill_tree, read_csv, run, train, wait_for
from support.sweeps import POINT, TORCHRUN, needs_optuna, read

from harness.sweep import rank, read_sweep

pytestmark = pytest.mark.timeout(600)  # each starts several processes that import torch


@pytest.mark.slow
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


@pytest.mark.slow
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
def test_mistakes_are_told_and_leave_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = captured(lambda: command_line(["--multirun", *POINT, *arguments]))
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
