"""Real ranks by the variables of launchers other than torchrun: one training, and the values of torchrun's ranks.

SLURM is not here: two processes get the variables that its manual names, one and a half seconds apart. Where an mpirun
of Open MPI is installed, it starts the ranks itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import ROOT, TINY, Finished, kill_tree, read_csv, run, train

ARGUMENTS = (
    *TINY,
    "logger=csv",
    "trainer.enable_progress_bar=false",
    "trainer.timeout=60",
    "trainer.log_every_n_steps=1",
)


def as_srun_does(rank: int, size: int) -> dict[str, str]:
    place = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": size, "STEP_NUM_TASKS": size, "STEP_ID": 0}
    place |= {"JOB_ID": os.getpid(), "STEP_TASKS_PER_NODE": size, "NTASKS_PER_NODE": size, "JOB_NUM_NODES": 1}
    return {f"SLURM_{name}": str(value) for name, value in place.items()} | {"SLURM_STEP_NODELIST": "a-name-of-no-host"}


def as_mpirun_does(rank: int, size: int) -> dict[str, str]:
    place = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size, "NODE_RANK": rank}
    name = {"PMIX_NAMESPACE": str(os.getpid()), "PMIX_RANK": str(rank)}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in place.items()} | name


def as_mpiexec_does(rank: int, size: int) -> dict[str, str]:
    """Without a name of the start: the ranks of MPICH have the process in common that has started them."""
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size), "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": str(size)}


def environment(**variables: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "140", **variables}


def tasks(
    variables: Callable[[int, int], dict[str, str]],
    folder: Path,
    *overrides: str,
    apart: float = 1.5,
    timeout: float = 150,
    **further: str,
) -> list[Finished]:
    """Two processes that know of each other by the variables of their launcher alone."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(2):
        time.sleep(apart * rank)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "harness.train", *overrides],
                cwd=folder,
                env=environment(**further, **variables(rank, 2)),
                stdout=(folder / f"out.{rank}").open("w"),
                stderr=(folder / f"err.{rank}").open("w"),
                start_new_session=True,
            )
        )
    try:
        deadline = time.monotonic() + timeout
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()
    return [
        Finished(code, (folder / f"out.{rank}").read_text(), (folder / f"err.{rank}").read_text(), folder)
        for rank, code in enumerate(codes)
    ]


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = train(*ARGUMENTS, folder=tmp_path_factory.mktemp("torchrun"), ranks=2)
    assert done.code == 0, done.err[-4000:]
    return done


def assert_the_same_training(folder: Path, by_torchrun: Finished) -> None:
    """One run, of two ranks, with the values of torchrun's, to the last bit."""
    found, expected = sorted(folder.glob("outputs/*/*")), by_torchrun.runs
    assert len(found) == len(expected) == 1
    assert json.loads((found[0] / "run.json").read_text())["ranks"] == 2
    assert json.loads((found[0] / "result.json").read_text())["ranks"] == 2
    rows = read_csv(found[0])
    assert len(rows) > 8
    assert rows == read_csv(expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("variables", [as_srun_does, as_mpirun_does, as_mpiexec_does])
def test_tasks_of_a_launcher_train_together(
    variables: Callable[[int, int], dict[str, str]], by_torchrun: Finished, tmp_path: Path
) -> None:
    """Also with an address and a size left over in the shell, which would lead nowhere."""
    first, second = tasks(variables, tmp_path, *ARGUMENTS, MASTER_ADDR="203.0.113.1", WORLD_SIZE="2")
    assert (first.code, second.code) == (0, 0), first.err[-3000:] + second.err[-3000:]
    assert_the_same_training(tmp_path, by_torchrun)
    assert "epoch" in first.out
    assert "epoch" not in second.out


@pytest.mark.slow
def test_a_real_mpirun(by_torchrun: Finished, tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun.openmpi") or shutil.which("mpirun")
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout if mpirun else ""
    if mpirun is None or "open-mpi.org" not in version:
        pytest.skip("there is no mpirun of Open MPI")
    options = ["-n", "2", "--oversubscribe", "--bind-to", "none"]
    options += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    done = run([mpirun, *options, sys.executable, "-m", "harness.train", *ARGUMENTS], tmp_path)
    assert done.code == 0, done.err[-4000:]
    assert_the_same_training(tmp_path, by_torchrun)


@pytest.mark.slow
def test_a_sweep_in_tasks_is_refused_by_one_of_them(tmp_path: Path) -> None:
    done = tasks(as_srun_does, tmp_path, *ARGUMENTS, "--multirun", "seed=0,1", apart=0)
    assert [each.code for each in done] == [1, 1]
    assert "--multirun under a launcher would run the whole sweep on each of the 2 ranks" in done[0].err
    assert done[1].err == ""
    assert not list(tmp_path.glob("*run*"))


@pytest.mark.slow
def test_variables_of_a_shell(tmp_path: Path) -> None:
    """What is left over is said, and one process trains; what contradicts itself ends with a message."""
    left = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    script = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    done = train(*ARGUMENTS, "max_epochs=1", folder=tmp_path / "left", **left, **script)
    assert done.code == 0, done.err[-3000:]
    assert done.out.count("launch: ") == 2
    assert "launch: WORLD_SIZE=2 without RANK is ignored" in done.out
    assert "launch: one process trains alone, in a SLURM job of 2 tasks" in done.out
    (folder,) = done.runs
    assert json.loads((folder / "run.json").read_text())["ranks"] == 1
    done = train(*ARGUMENTS, folder=tmp_path / "wrong", RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT="1")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert done.err.strip().startswith("error: RANK=2 and WORLD_SIZE=2 contradict each other")
    assert len(done.err.strip().splitlines()) == 1
