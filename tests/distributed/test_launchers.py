"""Which rank of a job a process is, from the variables that launchers set: the table, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from harness.distributed import launched_on_node, launched_rank, launched_ranks
from harness.distributed.launchers import LAUNCHERS, LaunchError, Ranks, find_ranks, take_ranks

ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def torch_variables(
    rank: int = 1, size: int = 2, local_rank: int = 1, local_size: int = 2, **more: str
) -> dict[str, str]:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {name: str(value) for name, value in place.items()} | ADDRESS | more


def batch_script(tasks: int = 2, nodes: int = 1) -> dict[str, str]:
    """Of the script of ``sbatch``: it has a SLURM_PROCID, and is no task of ``srun``."""
    each = tasks // nodes
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost" if nodes == 1 else f"gpu[07-{6 + nodes:02}]",
        "SLURM_NTASKS": str(tasks),
        "SLURM_TASKS_PER_NODE": str(each) if nodes == 1 else f"{each}(x{nodes})",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }


def srun(rank: int = 1, tasks: int = 2, nodes: int = 1, job_tasks: int | None = None) -> dict[str, str]:
    job, step = batch_script(tasks if job_tasks is None else job_tasks, nodes), batch_script(tasks, nodes)
    return job | {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % (tasks // nodes)),
        "SLURM_NODEID": str(rank // (tasks // nodes)),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": step["SLURM_TASKS_PER_NODE"],
        "SLURM_STEP_NODELIST": step["SLURM_JOB_NODELIST"],
    }


def open_mpi(rank: int = 1, size: int = 2, local_size: int | None = None) -> dict[str, str]:
    """As Open MPI 4.1 sets them."""
    each = size if local_size is None else local_size
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % each),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(each),
        "OMPI_COMM_WORLD_NODE_RANK": str(rank % each),
        "OMPI_MCA_ess_base_jobid": "796852225",
        "PMIX_RANK": str(rank),
        "PMIX_NAMESPACE": "796852225",
    }


def mpich(rank: int = 1, size: int = 2) -> dict[str, str]:
    """As MPICH 4.0 sets them: the start has no name."""
    place = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": size}
    return {"PMI_FD": "6", **{name: str(value) for name, value in place.items()}}


def pals(rank: int = 3, size: int = 4, local_size: int = 2) -> dict[str, str]:
    place = {"PALS_RANKID": rank, "PMI_RANK": rank, "PMI_SIZE": size, "PALS_LOCAL_RANKID": rank % local_size}
    place |= {"PMI_LOCAL_RANK": rank % local_size, "PMI_LOCAL_SIZE": local_size, "PALS_NODEID": rank // local_size}
    return {"PALS_APID": "8d2c", **{name: str(value) for name, value in place.items()}}


def jsrun(rank: int = 1, size: int = 2, local_size: int = 2) -> dict[str, str]:
    place = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % local_size, "LOCAL_SIZE": local_size}
    names = {f"JSM_NAMESPACE_{name}": str(value) for name, value in place.items()}
    return {"LSB_JOBID": "815", **open_mpi(rank, size, local_size), **names}


def submitit(rank: int = 1, size: int = 2) -> dict[str, str]:
    place = {"GLOBALID": rank, "NTASKS": size, "LOCALID": rank, "NODEID": 0, "JOB_NUM_NODES": 1, "JOB_ID": 99}
    return {"SUBMITIT_EXECUTOR": "local", **{f"SUBMITIT_LOCAL_{name}": str(value) for name, value in place.items()}}


MVAPICH = {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}
MVAPICH |= {"MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}

PLACES: dict[str, tuple[dict[str, str], tuple[Any, ...]]] = {
    # rank, world size, local rank, local world size, node, address
    "srun": (srun(), (1, 2, 1, 2, 0, "127.0.0.1")),
    "srun, two nodes": (srun(3, 4, 2), (3, 4, 1, 2, 1, "gpu07")),
    "srun, two nodes, an address": (srun(3, 4, 2) | ADDRESS, (3, 4, 1, 2, 1, "10.0.0.1")),
    "srun of fewer tasks than the job has": (srun(1, 2, job_tasks=8), (1, 2, 1, 2, 0, "127.0.0.1")),
    "srun, with a size that the script has set": (srun() | {"WORLD_SIZE": "2"}, (1, 2, 1, 2, 0, "127.0.0.1")),
    "srun --mpi=pmi2": (srun() | {"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, 1, 2, 0, "127.0.0.1")),
    "srun --mpi=pmix": (srun() | {"PMIX_RANK": "1"}, (1, 2, 1, 2, 0, "127.0.0.1")),
    "mpirun": (open_mpi(), (1, 2, 1, 2, 0, "127.0.0.1")),
    "mpirun, two nodes, an address": (open_mpi(3, 4, 2) | ADDRESS, (3, 4, 1, 2, 1, "10.0.0.1")),
    "mpirun in a script of sbatch": (open_mpi() | batch_script(8), (1, 2, 1, 2, 0, "127.0.0.1")),
    "mpirun whose daemons srun has started": (
        open_mpi(3, 4, 2) | srun(1, 2, nodes=2) | ADDRESS,
        (3, 4, 1, 2, 1, "10.0.0.1"),
    ),
    "mpirun, RANK left over": (open_mpi() | {"RANK": "5"}, (1, 2, 1, 2, 0, "127.0.0.1")),
    "mpiexec of MPICH": (mpich(), (1, 2, 1, 2, 0, "127.0.0.1")),
    "mpiexec of MVAPICH": (MVAPICH, (1, 2, 1, 2, 0, "127.0.0.1")),
    "mpiexec of PALS": (pals() | ADDRESS, (3, 4, 1, 2, 1, "10.0.0.1")),
    "jsrun": (jsrun(), (1, 2, 1, 2, 0, "127.0.0.1")),
    "jsrun, two nodes": (jsrun(2, 4) | ADDRESS, (2, 4, 0, 2, 1, "10.0.0.1")),
    "submitit": (submitit(), (1, 2, 1, 2, 0, "127.0.0.1")),
    "submitit from a shell with variables": (
        submitit() | ADDRESS | {"RANK": "0", "WORLD_SIZE": "1"},
        (1, 2, 1, 2, 0, "127.0.0.1"),
    ),
    "submitit from a task of srun": (submitit() | srun(0, 1), (1, 2, 1, 2, 0, "127.0.0.1")),
    "ranks without their node": (
        {"RANK": "1", "WORLD_SIZE": "2", **ADDRESS},
        (1, 2, 0, 1, 1, "10.0.0.1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_tasks_are_ranks(name: str) -> None:
    variables, expected = PLACES[name]
    found = find_ranks(variables, lambda name: f"mpiexec, not {name}")
    assert found.is_rank
    assert found.ranks is not None
    place = found.ranks
    assert (
        place.rank,
        place.world_size,
        place.local_rank,
        place.local_world_size,
        place.node,
        place.address,
    ) == expected
    assert (
        place.port == 29500
        if "MASTER_PORT" in variables and "SUBMITIT_EXECUTOR" not in variables
        else place.port < 30000
    )
    assert bool(found.notes) == (name == "ranks without their node")


AS_THEY_ARE = {
    "torchrun": torch_variables(TORCHELASTIC_RUN_ID="none"),
    "torchrun in a script of sbatch": batch_script(4) | torch_variables(TORCHELASTIC_RUN_ID="none"),
    "torchrun on each node by srun": srun(1, 2, nodes=2) | torch_variables(3, 4, TORCHELASTIC_RUN_ID="x"),
    "torchrun in one of many tasks": srun(1, 8) | torch_variables(TORCHELASTIC_RUN_ID="x"),
    "torchrun by mpirun": open_mpi(1, 2, 1) | torch_variables(3, 4, TORCHELASTIC_RUN_ID="x"),
    "torch's variables": torch_variables(),
    "torch's variables from those of srun": srun() | torch_variables(),
    "torch's variables, by agents that srun starts": srun(1, 2, nodes=2) | torch_variables(2, 4, 0),
    "torch's variables, by agents in tasks of a node": srun(1, 2) | torch_variables(2, 4, 0),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_ranks_of_torch_stay(name: str) -> None:
    found = find_ranks(AS_THEY_ARE[name])
    assert found.is_rank
    assert found.ranks is None
    assert found.notes == ()


ALONE = {
    "no launcher": ({}, ""),
    "an address that a shell keeps": (ADDRESS, ""),
    "variables left over": ({"WORLD_SIZE": "2"} | ADDRESS, "WORLD_SIZE=2 without RANK is ignored"),
    "variables of a node left over": (
        {"WORLD_SIZE": "x", "LOCAL_RANK": "1"},
        "WORLD_SIZE=x LOCAL_RANK=1 without RANK are ignored",
    ),
    "a rank left over": ({"RANK": "3", "MASTER_PORT": "1"}, "RANK=3 without WORLD_SIZE is ignored"),
    "a script of sbatch": (batch_script(1), ""),
    "a script of sbatch for two tasks": (batch_script(2), "SLURM job of 2 tasks. To make each task a rank: srun "),
    "salloc": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "a SLURM job of 4 tasks"),
    "the shell that salloc starts as a step": (
        srun(0, 1, job_tasks=4) | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        "",
    ),
    "a step of a script of four tasks": (
        batch_script(4) | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "4"},
        "a SLURM job of 4 tasks",
    ),
    "a step of a script": (batch_script(1) | {"SLURM_STEP_ID": "4294967291"}, ""),
    "srun -n 1": (srun(0, 1, job_tasks=4), ""),
    "mpirun -n 1": (open_mpi(0, 1), ""),
    "mpiexec -n 1": (mpich(0, 1), ""),
    "one task of submitit": (submitit(0, 1) | batch_script(4), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_one_process(name: str) -> None:
    variables, note = ALONE[name]
    found = find_ranks(variables)
    assert (found.ranks, found.is_rank) == (None, False)
    assert len(found.notes) == bool(note)
    assert note in "".join(found.notes)


REFUSED = {
    "a rank that there is not": (torch_variables(2, 2), "RANK=2 and WORLD_SIZE=2 contradict each other"),
    "torchrun's too": (torch_variables(2, 2, TORCHELASTIC_RUN_ID="x"), "ranks are numbered from 0 to 1"),
    "a rank that is no number": ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one is expected to be a whole number"),
    "no ranks": ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 is expected to be a whole number from 1 on"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "but not MASTER_ADDR, where the ranks meet"),
    "no port": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "but not MASTER_PORT"),
    "a port that is none": (torch_variables(MASTER_PORT="99999"), "MASTER_PORT=99999 is no port"),
    "a port in words": (torch_variables(MASTER_PORT="tcp://1"), "MASTER_PORT=tcp://1 is expected to be a whole number"),
    "no local rank": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **ADDRESS},
        "but not LOCAL_RANK: the rank among those on its node",
    ),
    "no local size": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **ADDRESS}, "but not LOCAL_WORLD_SIZE"),
    "a local rank that there is not": (torch_variables(1, 2, 2, 2), "number 2 on its node (LOCAL_RANK), which has 2"),
    "nodes of different size": (torch_variables(1, 3, 1, 2), "expected the same number on each node"),
    "tasks of different number": (
        srun(1, 4, 2) | {"SLURM_STEP_TASKS_PER_NODE": "3,1"},
        "4 ranks have been started, 3 of them on the node of rank 1",
    ),
    "a task that there is not": (srun(2, 2), "SLURM_PROCID=2 and SLURM_STEP_NUM_TASKS=2 contradict each other"),
    "a task in words": (open_mpi() | {"OMPI_COMM_WORLD_RANK": "-1"}, "OMPI_COMM_WORLD_RANK=-1 is expected to be"),
    "a list in words": (srun() | {"SLURM_STEP_TASKS_PER_NODE": "all"}, "expected to be numbers of tasks"),
    "another number of tasks": (srun() | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, but this is task 1 of 2 of srun"),
    "each task a whole job": (srun() | {"RANK": "0", "WORLD_SIZE": "1"}, "of its tasks would take itself for rank 0"),
    "each task the same rank": (open_mpi() | torch_variables(0, 2, 0, 2), "this is task 1 of 2 of mpirun"),
    "mpirun in tasks of srun": (
        srun(1, 4) | open_mpi(),
        "task 1 of 2 of mpirun of Open MPI and task 1 of 4 of srun: two launchers contain each other",
    ),
    "one process in tasks of srun": (srun() | open_mpi(0, 1), "two launchers contain each other"),
    "mpiexec in mpirun": (open_mpi(1, 4) | mpich(), "two launchers contain each other"),
    "mpirun on two nodes": (open_mpi(3, 4, 2), "on that node:\n  mpirun -x MASTER_ADDR=$(hostname) python -m"),
    "mpiexec on two nodes": (pals(), "mpiexec --env MASTER_ADDR=$(hostname)"),
    "jsrun on two nodes": (jsrun(2, 4), "-x MASTER_ADDR="),
    "no name of the start": (mpich(), "Set MASTER_PORT, to the same free port for all ranks"),
    "no place on the node": ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "nothing that says which one on its node"),
    "PMIx alone": ({"PMIX_RANK": "0"}, "PMIX_SIZE, the number of tasks, is not set"),
    "Open MPI without a size": ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE, the number of tasks, is not set"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str) -> None:
    variables, message = REFUSED[name]
    with pytest.raises(LaunchError) as refused:
        find_ranks(variables)
    assert message in str(refused.value)


def test_every_launcher_is_in_the_tables() -> None:
    shown = {name for variables, _ in (PLACES | REFUSED).values() for name in variables}
    for launcher in LAUNCHERS:
        assert set(launcher.rank) <= shown, launcher.name


def test_jobs_on_one_node_have_ports_of_their_own() -> None:
    """Made of the name of the job, or the process that has started the ranks where there is none."""

    def port(variables: dict[str, str], starter: str = "1-1") -> int:
        ranks = find_ranks(variables, lambda name: starter).ranks
        assert isinstance(ranks, Ranks)
        return ranks.port

    assert port(srun(0)) == port(srun(1)) != port(srun() | {"SLURM_STEP_ID": "1"})
    assert port(open_mpi(0)) == port(open_mpi(1)) != port(open_mpi() | {"PMIX_NAMESPACE": "7"})
    assert port(mpich(0)) == port(mpich(1)) != port(mpich(), "2-1")
    assert 10000 <= port(srun()) < 30000


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node7", "node7"), ("n[003-005,9]-ib,x", "n003-ib"), ("r[1-2]n[07,9]", "r1n07"), ("a,b[1]", "a"), ("n[5]", "n5")],
)  # fmt: skip
def test_first_host_of_a_list(hosts: str, first: str) -> None:
    ranks = find_ranks(srun(3, 4, 2) | {"SLURM_STEP_NODELIST": hosts}).ranks
    assert ranks is not None
    assert ranks.address == first


def clean(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in list(os.environ):
        if (
            name.startswith(("SLURM_", "OMPI_", "PMI", "TORCHELASTIC"))
            or name in torch_variables()
            or name == "GROUP_RANK"
        ):
            monkeypatch.delenv(name)
    for name in (*torch_variables(), "GROUP_RANK"):  # so that what is set below is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_variables_of_torch_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch, **srun(3, 4, 2))
    assert take_ranks() == ()
    assert (launched_rank(), launched_ranks(), launched_on_node()) == (3, 4, 2)
    expected = {"LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert {name: os.environ[name] for name in expected} == expected
    before = {name: os.environ[name] for name in torch_variables()}
    assert take_ranks() == ()  # again, as by a part that does not know of the first
    assert {name: os.environ[name] for name in torch_variables()} == before


def test_variables_left_over_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch, WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert (launched_rank(), launched_ranks(), launched_on_node()) == (0, 1, 1)
    (note,) = take_ranks()
    assert "WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 without RANK are ignored" in note
    assert not {"WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} & set(os.environ)


def test_ranks_of_a_node_find_what_has_started_them() -> None:
    """Also through a script between: the nearest process above that lacks the variable."""
    file = sys.modules["harness.distributed.launchers"].__file__  # by itself, without torch
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('launchers', {file!r})\n"
        "module = importlib.util.module_from_spec(spec)\nsys.modules['launchers'] = module\n"
        "spec.loader.exec_module(module)\nprint(module._starter('MY_RANK'))\n"
    )
    commands = [[sys.executable, "-c", program], ["bash", "-c", '"$@"; true', "bash", sys.executable, "-c", program]]
    started = [
        subprocess.run(
            command, env={**os.environ, "MY_RANK": str(rank)}, capture_output=True, text=True, check=True, timeout=20
        ).stdout
        for rank, command in enumerate(commands)
    ]
    assert started[0] == started[1]
    assert started[0].startswith(f"{os.getpid()}-")
