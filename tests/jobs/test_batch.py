"""The scripts for PBS and LSF in launch/, run as they are with stand-ins for the schedulers' commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.batch import BatchJob, LsfJob, PbsJob
from support.commands import ROOT, TINY, read_csv, wait_for

ARGUMENTS = (
    *TINY,
    "logger=csv",
    "trainer.enable_progress_bar=false",
    "trainer.timeout=60",
    "trainer.log_every_n_steps=1",
)

# kind of job, its options, and the ranks per node that it starts itself; None with one torchrun on each node
WAYS: dict[str, tuple[type[BatchJob], dict[str, Any], int | None]] = {
    "PBS, torchrun by MPICH": (PbsJob, {"DIALECT": "mpich"}, None),
    "PBS, torchrun by PALS": (PbsJob, {"DIALECT": "pals", "MPIEXEC_OPTIONS": "--cpu-bind none"}, None),
    "PBS, torchrun by Open MPI": (PbsJob, {"DIALECT": "openmpi"}, None),
    "PBS, ranks by MPICH": (PbsJob, {"DIALECT": "mpich", "LAUNCH": "mpiexec", "RANKS_PER_NODE": "2"}, 2),
    "PBS, ranks by PALS": (PbsJob, {"DIALECT": "pals", "LAUNCH": "mpiexec", "RANKS_PER_NODE": "2"}, 2),
    "PBS, ranks by Open MPI": (PbsJob, {"DIALECT": "openmpi", "LAUNCH": "mpiexec", "RANKS_PER_NODE": "2"}, 2),
    "LSF, torchrun by jsrun": (LsfJob, {}, None),
    "LSF, torchrun by blaunch": (LsfJob, {"has_jsrun": False}, None),
    "LSF, ranks by jsrun": (LsfJob, {"LAUNCH": "jsrun", "RANKS_PER_NODE": "2"}, 2),
}


def command(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_scripts_say_what_they_need(tmp_path: Path) -> None:
    cases: list[tuple[type[BatchJob], dict[str, str], str]] = [
        (PbsJob, {"LAUNCH": "srun"}, "LAUNCH is torchrun or mpiexec, found 'srun'"),
        (PbsJob, {"LAUNCH": "mpiexec"}, "LAUNCH=mpiexec needs RANKS_PER_NODE, a number, found ''"),
        (PbsJob, {"LAUNCH_DIR": str(tmp_path)}, f"{tmp_path} has no mpi_task.sh"),
        (LsfJob, {"LAUNCH": "srun"}, "LAUNCH is torchrun or jsrun, found 'srun'"),
        (
            LsfJob,
            {"LAUNCH": "jsrun", "RANKS_PER_NODE": "gpu"},
            "LAUNCH=jsrun needs RANKS_PER_NODE, a number, found 'gpu'",
        ),
        (LsfJob, {"LAUNCH_DIR": str(tmp_path)}, f"{tmp_path} has no mpi_task.sh"),
    ]
    for number, (kind, environment, words) in enumerate(cases):
        done = kind(tmp_path / str(number), **environment).run()
        assert done.code == 2, done.err
        assert words in done.err
    done = LsfJob(tmp_path / "blaunch", has_jsrun=False, LAUNCH="jsrun", RANKS_PER_NODE="2").run()
    assert "there is no jsrun on PATH" in done.err
    for script, words in [("pbs.sh", "run this script by qsub"), ("lsf.sh", "run this script by bsub")]:
        alone = {"PATH": "/usr/bin:/bin"}
        done = subprocess.run([ROOT / "launch" / script], env=alone, capture_output=True, text=True, timeout=20)
        assert words in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_scripts_pass_on_arguments_variables_and_exit_codes(way: str, tmp_path: Path) -> None:
    """To commands that stand for Python and torchrun, on two nodes; a task that fails kills no other one."""
    kind, options, ranks = WAYS[way]
    # one write for each line: two tasks have one output
    python = command(
        tmp_path / "python",
        "place=${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-$JSM_NAMESPACE_RANK}}\n"
        'line=$(printf "%s|" "rank $place" "$MASTER_ADDR" "$((MASTER_PORT > 0))" "$@")\necho "$line"\n'
        '[[ $place == 1 ]] || sleep 0.2\nexit "$((CODE * (place == 1)))"',
    )
    torchrun = command(
        tmp_path / "torchrun",
        'line=$(printf "%s|" "node $NODE_RANK" "$HEAD" "$((PORT > 0))" "$@")\necho "$line"\n'
        '[[ $NODE_RANK == 1 ]] || sleep 0.2\nexit "$((CODE * (NODE_RANK == 1)))"',
    )
    for code in (3, 75):
        arguments = "a=b 'c=[d e]' \"f='g, h'\""
        further = {"CODE": str(code), "PYTHON": python, "TORCHRUN": torchrun, **options}
        job = kind(tmp_path / str(code), arguments, hosts=2, **further)
        done = job.run()
        assert done.code == code, done.err
        assert job.queued.exists() == (code == 75 and kind is PbsJob)
        assert ("back into the queue" in done.out) == (code == 75)
        lines = done.out.splitlines()
        for number in range(2 * (ranks or 1)):
            start = f"{'node' if ranks is None else 'rank'} {number}|host0|1|"
            (line,) = [line for line in lines if line.startswith(start)]
            assert line.endswith("-m|harness.train|resume=auto|a=b|c=[d e]|f='g, h'|"), line
        assert not list(job.folder.iterdir())  # nothing is left behind


def test_a_job_that_may_not_be_put_back_says_so(tmp_path: Path) -> None:
    torchrun = command(tmp_path / "torchrun", "exit 75")
    done = PbsJob(tmp_path / "job", TORCHRUN=torchrun, MAY_NOT_RERUN="1").run()
    assert done.code == 75
    assert "submit the same command again, it goes on from its checkpoint" in done.err


def test_a_task_that_is_killed_is_an_error(tmp_path: Path) -> None:
    torchrun = command(tmp_path / "torchrun", 'kill -KILL "$PPID"; sleep 0.1')
    for kind in (PbsJob, LsfJob):
        done = kind(tmp_path / kind.__name__, TORCHRUN=torchrun).run()
        assert done.code not in (0, 75)
        wait_for(lambda: not _tasks_of(tmp_path), 20, "the end of what watches the task")


def _tasks_of(folder: Path) -> list[str]:
    """Process IDs of tasks whose environment names a folder."""
    wanted, found = f"STATE={folder}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it ended meanwhile
            if wanted in environment.read_bytes():
                found.append(environment.parent.name)
    return found


@pytest.mark.parametrize(
    "way", ["PBS, torchrun by MPICH", "PBS, ranks by Open MPI", "LSF, torchrun by blaunch", "LSF, ranks by jsrun"]
)
@pytest.mark.parametrize("end", ["time limit", "killed by its user"])
def test_scripts_tell_the_ranks_to_leave(way: str, end: str, tmp_path: Path) -> None:
    """Commands that stand for Python and torchrun leave as those do, on both nodes."""
    kind, options, ranks = WAYS[way]
    sign = tmp_path / "sign"
    leave = 75 if ranks else 1  # torchrun's own code, whatever its ranks end with
    stand_in = command(
        tmp_path / "command", f"trap 'exit {leave}' TERM\ntouch \"$SIGN.$$\"\nwhile true; do sleep 0.05; done"
    )
    # PBS has no warning: the script counts by itself
    limit = {"LIMIT": "00:00:04", "SAVE_BEFORE": "2"} if kind is PbsJob and end == "time limit" else {}
    job = kind(tmp_path / "job", hosts=2, SIGN=str(sign), PYTHON=stand_in, TORCHRUN=stand_in, **options, **limit)
    with job.started() as process:
        wait_for(lambda: len(list(tmp_path.glob("sign.*"))) == 2 * (ranks or 1), 20, "the start")
        if end == "time limit" and kind is LsfJob:
            job.signal_all(process, signal.SIGUSR1)
        elif end != "time limit":
            process.send_signal(signal.SIGTERM)
        done = job.finish(process, 20)
    assert done.code == (143 if kind is LsfJob and end != "time limit" else 75), done.err
    assert ("back into the queue" in done.out) == (end == "time limit")
    assert job.queued.exists() == (kind is PbsJob and end == "time limit")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["PBS, ranks by Open MPI", "LSF, torchrun by jsrun"])
def test_a_job_goes_on_after_its_time_limit(way: str, tmp_path: Path) -> None:
    """Two ranks, by a launcher's own variables and by two torchruns."""
    kind, options, ranks = WAYS[way]
    sign = tmp_path / "sign"
    wait = f"'+callbacks.wait={{_target_: support.failures_for_tests.WaitAt, step: 3, sign: {sign}}}'"
    options = {**options, "HEAD": "127.0.0.1"} | ({} if ranks else {"RANKS_PER_NODE": "1"})
    job = kind(tmp_path / "job", " ".join([*ARGUMENTS, wait]), hosts=1 if ranks else 2, **options)
    with job.started() as process:
        wait_for(sign.exists, 90, "the third step")
        job.signal_all(process, signal.SIGUSR1) if kind is LsfJob else os.kill(process.pid, signal.SIGUSR1)
        time.sleep(2)  # the tasks look once a second
        Path(f"{sign}.go").touch()
        stopped = job.finish(process)
    assert stopped.code == 75, stopped.err[-4000:]
    again = job.run()
    assert again.code == 0, again.err[-4000:]
    (folder,) = again.runs
    assert "saved step 3 of epoch 0" in stopped.out
    assert f"goes on from {folder}/checkpoints/last.ckpt" in again.out
    record = json.loads((folder / "run.json").read_text())
    assert (record["state"], record["ranks"]) == ("finished", 2)
    # 4 steps in each of 2 epochs, all logged, each once
    assert [row["step"] for row in read_csv(folder) if "train_loss_step/forces_mse" in row] == list(range(8))
