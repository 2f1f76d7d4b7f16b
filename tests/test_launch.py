"""The scripts in launch/: run as they are, on this machine; the schedulers themselves are not here."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import BIN, ROOT, TINY, Finished, read_csv, same, wait_for
from slurm import Job

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for pattern in ("*.sh", "*.sbatch", "env/*.sh") for path in LAUNCH.glob(pattern))
ARGUMENTS = (
    *TINY,
    "logger=csv",
    "callbacks.parity=null",
    "trainer.enable_progress_bar=false",
    "trainer.timeout=60",
    "trainer.log_every_n_steps=1",
)


def said_by(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a script prints, with as little in its environment as there can be."""
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_scripts_are_clean() -> None:
    """bash parses them, shellcheck finds nothing, and they stop at errors and unset variables."""
    assert len(SCRIPTS) >= 7
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
        if script.parent == LAUNCH:
            assert "\nset -euo pipefail\n" in script.read_text()
            assert '"$@"' in script.read_text()
    found = subprocess.run(
        [str(BIN / "shellcheck"), "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_readme_names_every_script() -> None:
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert str(path.relative_to(LAUNCH)) in text, path


def test_the_script_for_several_nodes_says_what_it_needs() -> None:
    script = "torchrun_multinode.sh"
    for settings, word in [({}, "HEAD"), ({"HEAD": "a"}, "NODES"), ({"HEAD": "127.0.0.1", "NODES": "two"}, "'two'")]:
        done = said_by(script, TORCHRUN="echo", **settings)
        assert done.returncode != 0
        assert word in done.stderr
    settings = {"HEAD": "127.0.0.1", "NODES": "2", "NODE_RANK": "1", "RANKS_PER_NODE": "4"}
    done = said_by(script, "a=b c", "d", TORCHRUN="echo", **settings)
    assert done.returncode == 0
    assert done.stdout.split("--nproc-per-node")[1] == " 4 -m harness.train a=b c d\n"


# --- SLURM ---


def test_slurm_script_says_what_it_needs(tmp_path: Path) -> None:
    for environment, words in [
        ({"SLURM_SUBMIT_DIR": str(tmp_path)}, f"{tmp_path}/launch has no slurm_task.sh"),
        ({"LAUNCH": "mpirun"}, "LAUNCH is torchrun or srun, found 'mpirun'"),
        ({"LAUNCH": "srun", "SLURM_NTASKS": "3", "SLURM_JOB_NUM_NODES": "2"}, "3 tasks on 2 nodes"),
    ]:
        done = Job(tmp_path / "job", **environment).run()
        assert done.code == 2
        assert words in done.err
    assert "run this script by sbatch" in said_by("slurm.sbatch").stderr


def test_slurm_script_passes_on_arguments_variables_and_exit_code(tmp_path: Path) -> None:
    """Of a job that fails, which nobody has told to leave: it is not put back into the queue; 75 is."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'printf "%s|" "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE" "$NODE_RANK" "$MASTER_PORT" "$@"\n'
        'exit "$((CODE * (RANK == 2)))"\n'
    )
    python.chmod(0o755)
    options = {"nodes": 2, "tasks": 4, "LAUNCH": "srun", "PYTHON": str(python)}
    for code in (0, 3, 75):
        job = Job(tmp_path / str(code), "a=b c", "d='e'", CODE=str(code), **options)
        done = job.run()
        assert done.code == code
        assert job.requeues == (code == 75)
        for rank, place in enumerate(("0|4|2|0", "1|4|2|0", "0|4|2|1", "1|4|2|1")):
            assert f"{rank}|{place}|{10000 + job.number}|-m|harness.train|a=b c|d='e'|" in done.out
    assert Job(tmp_path / "75", CODE="75", **options).requeues == 1
    done = Job(tmp_path / "75", CODE="75", MAX_REQUEUES="1", **options).run()
    assert done.code == 75
    assert "not put back into the queue: that was done 1 times" in done.err


def told_to_leave(folder: Path, **options: Any) -> tuple[Finished, Finished, Job]:
    """A job that comes near its time limit in the third step, and the same after it was put back into the queue."""
    sign = folder.parent / f"{folder.name}.sign"
    wait = f"+callbacks.wait={{_target_: faults_for_tests.WaitAt, step: 3, sign: {sign}}}"
    job = Job(folder, *ARGUMENTS, wait, **options)
    with job.started() as process:
        wait_for(sign.exists, 90, "the third step")
        job.near_its_time_limit(process)
        time.sleep(1)  # for the signal to arrive
        Path(f"{sign}.go").touch()
        stopped = job.finish(process)
    return stopped, job.run(), job


def assert_went_on(stopped: Finished, again: Finished, job: Job) -> None:
    assert stopped.code == 75, stopped.err[-4000:]
    assert "back into the queue" in stopped.out
    assert again.code == 0, again.err[-4000:]
    assert job.requeues == 1
    (folder,) = again.runs
    assert "saved step 3 of epoch 0" in stopped.out
    assert f"goes on from {folder}/checkpoints/last.ckpt" in again.out
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["ranks"] == 2
    # 4 steps in each of 2 epochs, all logged, each once
    assert [row["step"] for row in read_csv(folder) if "train_loss_step/forces_mse" in row] == list(range(8))


@pytest.fixture(scope="module")
def by_srun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Finished, Job]:
    return told_to_leave(tmp_path_factory.mktemp("srun") / "job", tasks=2, LAUNCH="srun")


def test_slurm_job_of_two_tasks_goes_on_after_its_time_limit(by_srun: tuple[Finished, Finished, Job]) -> None:
    assert_went_on(*by_srun)
    assert "auto-requeueing" not in by_srun[0].err  # Lightning's own would put the job back beside the script


@pytest.mark.slow
def test_slurm_job_of_two_nodes_goes_on_after_its_time_limit(
    by_srun: tuple[Finished, Finished, Job], tmp_path: Path
) -> None:
    """One torchrun on each. Values are those of the job of two tasks, and of one that nobody has told to leave."""
    stopped, again, job = told_to_leave(tmp_path / "job", nodes=2, RANKS_PER_NODE="1")
    assert_went_on(stopped, again, job)
    whole = Job(tmp_path / "whole", *ARGUMENTS, nodes=2, RANKS_PER_NODE="1").run()
    assert whole.code == 0, whole.err[-4000:]
    expected = read_csv(whole.runs[0])
    for found in (again, by_srun[1]):
        rows = read_csv(found.runs[0])
        assert len(rows) == len(expected) > 10
        for row, other in zip(rows, expected, strict=True):
            assert row.keys() == other.keys()
            assert all(same(row[key], other[key], 0.0) for key in row)


@pytest.mark.slow
def test_cancelled_slurm_job_is_saved_and_not_put_back(tmp_path: Path) -> None:
    """SIGTERM to the script and to all that runs in the step, twice to torchrun."""
    sign = tmp_path / "sign"
    wait = f"+callbacks.wait={{_target_: faults_for_tests.WaitAt, step: 3, sign: {sign}}}"
    job = Job(tmp_path / "job", *ARGUMENTS, wait, RANKS_PER_NODE="2")
    with job.started() as process:
        wait_for(sign.exists, 90, "the third step")
        job.cancelled(process)
        time.sleep(1)
        Path(f"{sign}.go").touch()
        stopped = job.finish(process)
    assert stopped.code not in (0, 75)
    assert job.requeues == 0
    assert json.loads((stopped.runs[0] / "run.json").read_text())["state"] == "preempted"
