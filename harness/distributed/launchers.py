"""Launchers that start the ranks of a job, as one table, and their variables as those of torch.

torchrun gives its ranks ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and
``MASTER_PORT``. Tasks of ``srun``, ``mpirun``, ``mpiexec`` and ``jsrun`` have variables of their own;
:func:`take_ranks` sets torch's from them at the start of a command, so that all that follows knows one convention.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["LAUNCHERS", "LaunchError", "Launcher", "Ranks", "find_ranks", "take_ranks"]

Variables = Mapping[str, str]

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_COMMAND = "python -m harness.train ..."
# numbers of steps that SLURM keeps for itself: scripts of sbatch, shells of salloc
_STEPS_OF_SLURM = 0xFFFFFFF0


class LaunchError(ValueError):
    """The variables of a launcher are incomplete, or contradict each other.

    Args:
        message: found, expected, and the fix.
        rank: of this process, where every rank finds the same; None where it may be alone with it.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Launcher:
    """Variables by which the tasks of a launcher are known; of several names, the first that is set counts.

    Args:
        name: of the command, in messages.
        rank: number of the task among all.
        size: number of tasks.
        local_rank: number of the task on its node.
        local_size: number of tasks on the node.
        job: variables that together name one start of tasks, the same on all of them.
        several_nodes: command that gives the tasks of several nodes an address.
        is_task: tells from the variables whether this launcher has started the process; ``rank`` is set if not given.
        node: number of the node; made of rank and local size if not given.
        nodes: variables with the names of the hosts in SLURM's short form, of which the first has rank 0.
    """

    name: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]
    several_nodes: str
    is_task: Callable[[Variables], bool] | None = None
    node: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    def task_in(self, variables: Variables) -> _Task | None:
        """The task that this process is, if this launcher has started it and says how many there are.

        Raises:
            LaunchError: its variables contradict each other.
        """
        rank, size = _first(variables, self.rank), _first(variables, self.size)
        if rank is None or size is None or not (self.is_task is None or self.is_task(variables)):
            return None
        number, tasks = _whole(*rank), _whole(*size, least=1)
        if number >= tasks:
            raise LaunchError(
                f"{rank[0]}={number} and {size[0]}={tasks} contradict each other: ranks are numbered from 0 to "
                f"{tasks - 1}. {_unset(rank[0], size[0])}"
            )
        local_rank, node = _first(variables, self.local_rank), _first(variables, self.node)
        return _Task(
            self,
            number,
            tasks,
            None if local_rank is None else _whole(*local_rank),
            self._tasks_on_node(variables, node),
            None if node is None else _whole(*node),
        )

    def _tasks_on_node(self, variables: Variables, node: tuple[str, str] | None) -> int | None:
        found = _first(variables, self.local_size)
        if found is None:
            return None
        if not found[0].endswith("TASKS_PER_NODE"):
            return _whole(*found, least=1)
        counts = _counts(*found)  # of all nodes
        number = _whole(*node) if node else 0
        if number >= len(counts):
            raise LaunchError(
                f"{found[0]}={found[1]} has {len(counts)} node(s), but this one is number {number}. {_unset(found[0])}"
            )
        return counts[number]


def _is_step_of_slurm(variables: Variables) -> bool:
    """True for a task of ``srun``: the script of a job and the shell of ``salloc`` have a ``SLURM_PROCID`` too."""
    step = variables.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) >= _STEPS_OF_SLURM:
        return False
    return bool(step) or "SLURM_STEP_NUM_TASKS" in variables


LAUNCHERS = (
    # from the innermost: a launcher of the first kinds may have been started by one of the last
    Launcher(
        "submitit",
        ("SUBMITIT_LOCAL_GLOBALID",),
        ("SUBMITIT_LOCAL_NTASKS",),
        ("SUBMITIT_LOCAL_LOCALID",),
        ("SUBMITIT_LOCAL_NTASKS",),  # it is of one node
        ("SUBMITIT_LOCAL_JOB_ID",),
        "",
    ),
    Launcher(
        "mpirun of Open MPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
        f"mpirun -x MASTER_ADDR=$(hostname) {_COMMAND}",
    ),
    Launcher(
        "mpiexec of MVAPICH",
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
        (),
        f"mpiexec -genv MASTER_ADDR $(hostname) -genv MASTER_PORT 29400 {_COMMAND}",
    ),
    Launcher(
        "jsrun",
        ("JSM_NAMESPACE_RANK",),
        ("JSM_NAMESPACE_SIZE",),
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
        ("LSB_JOBID", "LSF_JOBID"),
        f"jsrun -E MASTER_ADDR=ADDRESS_OF_THE_FIRST_HOST {_COMMAND}",
    ),
    Launcher(
        "mpiexec of PALS",
        ("PALS_RANKID",),
        ("PALS_SIZE", "PMI_SIZE"),
        ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        ("PALS_APID",),
        f"mpiexec --env MASTER_ADDR=$(hostname) {_COMMAND}",
        node=("PALS_NODEID",),
    ),
    Launcher(
        "mpiexec of MPICH or Intel MPI",
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "FLUX_TASK_LOCAL_ID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        ("PMI_JOBID", "FLUX_JOB_ID"),
        f"mpiexec -genv MASTER_ADDR $(hostname) -genv MASTER_PORT 29400 {_COMMAND}",
    ),
    Launcher(
        "srun",
        ("SLURM_PROCID",),
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        ("SLURM_LOCALID",),
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        f"MASTER_ADDR=ADDRESS_OF_THE_FIRST_HOST srun {_COMMAND}",
        is_task=_is_step_of_slurm,
        node=("SLURM_NODEID",),
        nodes=("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    ),
    # after those that have a PMIx server inside: by itself it does not say how many ranks there are
    Launcher("a launcher with PMIx", ("PMIX_RANK",), ("PMIX_SIZE",), (), (), (), ""),
)
"""Launchers other than torchrun."""


@dataclass(frozen=True)
class _Task:
    launcher: Launcher
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    node: int | None

    @property
    def shown(self) -> str:
        return f"task {self.rank} of {self.size} of {self.launcher.name}"


@dataclass(frozen=True)
class Ranks:
    """Place of this process among the ranks of a job, and address and port where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    address: str
    port: int

    @property
    def variables(self) -> dict[str, str]:
        """Torch's variables."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Found:
    """Meaning of the variables of a process."""

    ranks: Ranks | None = None
    """None for one process that trains alone, and where torch's variables are there already."""
    is_rank: bool = False
    """True if a launcher has given this process torch's variables, or those that ``ranks`` are made of."""
    notes: tuple[str, ...] = field(default=())
    """For the user, such as variables that are ignored."""


def take_ranks() -> tuple[str, ...]:
    """Set torch's variables of the ranks from those of the launcher; variables that are left over are removed.

    Returns:
        notes for the user; on ranks other than 0 none.

    Raises:
        LaunchError: the variables are incomplete, or contradict each other.
    """
    found = find_ranks(os.environ, _starter)
    if not found.is_rank:
        for name in _RANK_VARIABLES:
            os.environ.pop(name, None)
    if found.ranks is not None:
        os.environ.update(found.ranks.variables)
    return found.notes if int(os.environ.get("RANK", "0")) == 0 else ()


def find_ranks(variables: Variables, starter: Callable[[str], str | None] = lambda name: None) -> Found:
    """Find out from environment variables which rank of a job this process is.

    torchrun comes first, since it may have been started by any of the others; then a rank as any launcher may give it
    by torch's variables; then :data:`LAUNCHERS`, of which the innermost counts. Launchers that contain each other are
    as they should be where the outer one has started one task on each node.

    Args:
        variables: of the environment.
        starter: names the process that has started the ranks of this node, by a variable that it has not itself; for
            launchers that give a start of theirs no name.

    Raises:
        LaunchError: the variables are incomplete, or contradict each other.
    """
    has_rank = "RANK" in variables and "WORLD_SIZE" in variables
    if has_rank and _TORCHRUN in variables:
        return _of_torch(variables)
    tasks = [task for launcher in LAUNCHERS if (task := launcher.task_in(variables)) is not None]
    if not tasks and not has_rank:
        _refuse_rank_of_unknown_size(variables)
    if tasks and tasks[0].launcher.name == "submitit":  # its processes inherit the variables of what has submitted them
        return _of_task(tasks[0], variables, starter)
    if has_rank:
        found = _of_torch(variables)
        rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        for task in tasks:
            if task.size > size or (task.size == size and task.rank != rank):
                raise LaunchError(
                    f"RANK={rank} and WORLD_SIZE={size} are set, but this is {task.shown}: each of its tasks would "
                    f"take itself for rank {rank}. {_unset('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')}"
                )
        return found
    for outer in tasks[1:]:
        inner = tasks[0]
        agree = (inner.rank, inner.size) == (outer.rank, outer.size)
        starts_one_per_node = outer.local_size == 1 and outer.size <= inner.size
        if outer.size > 1 and not agree and not starts_one_per_node:
            raise LaunchError(
                f"this process is {inner.shown} and {outer.shown}: two launchers contain each other, and would start "
                f"several trainings that write the same files. Use one of them, or let the outer one start one task "
                f"on each node; variables that are left over are removed by "
                f"`unset {' '.join((*inner.launcher.rank, *inner.launcher.size))}`."
            )
    if tasks and tasks[0].size > 1:
        # the same ranks by other names, as srun has PMI's too: of those that also tell the place on the node
        same = [task for task in tasks if (task.rank, task.size) == (tasks[0].rank, tasks[0].size)]
        placed = [task for task in same if task.local_rank is not None and task.local_size is not None]
        return _of_task((placed or same)[0], variables, starter)
    return Found(notes=tuple(_notes_of_one_process(variables, bool(tasks))))


def _refuse_rank_of_unknown_size(variables: Variables) -> None:
    for launcher in LAUNCHERS:
        rank = _first(variables, launcher.rank)
        if rank is not None and launcher.is_task is None:
            raise LaunchError(
                f"{rank[0]}={rank[1]} is a variable of {launcher.name}, but {' or '.join(launcher.size)}, the number "
                f"of tasks, is not set: no rank would know of the others. {_unset(rank[0])}"
            )


def _notes_of_one_process(variables: Variables, is_task: bool) -> Iterator[str]:
    usual = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    left = [f"{name}={variables[name]}" for name in usual if variables.get(name, usual[name]) != usual[name]]
    if left:
        missing = "WORLD_SIZE" if "RANK" in variables else "RANK"
        yield (
            f"{' '.join(left)} without {missing} {'is' if len(left) == 1 else 'are'} ignored, left over in this "
            f"shell: one process trains alone. Several are started by torchrun, srun or mpirun."
        )
    tasks = variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS", "1")
    if not is_task and tasks.isdigit() and int(tasks) > 1:
        yield (f"one process trains alone, in a SLURM job of {tasks} tasks. To make each task a rank: srun {_COMMAND}")


def _of_torch(variables: Variables) -> Found:
    """Check torch's variables, which are there; those of the node may be missing where each has one rank."""
    rank, size = _whole("RANK", variables["RANK"]), _whole("WORLD_SIZE", variables["WORLD_SIZE"], least=1)
    if rank >= size:
        raise LaunchError(
            f"RANK={rank} and WORLD_SIZE={size} contradict each other: ranks are numbered from 0 to {size - 1}. "
            f"{_unset('RANK', 'WORLD_SIZE')}"
        )
    on_node = {name: variables[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in variables}
    if size == 1 and len(on_node) < 2:
        on_node = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not variables.get(name):
            raise LaunchError(
                f"RANK={rank} and WORLD_SIZE={size} are set, but not {name}, where the ranks meet. "
                f"{_unset('RANK', 'WORLD_SIZE')}",
                rank,
            )
    if size > 1:
        _port(variables["MASTER_PORT"])
    notes: tuple[str, ...] = ()
    if not on_node:  # as PyTorchJob of Kubeflow starts its pods
        notes = (
            f"LOCAL_RANK and LOCAL_WORLD_SIZE are not set: each of the {size} ranks is taken for the only one on its "
            f"node.",
        )
        on_node = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if len(on_node) == 1:
        (given,), (missing,) = on_node, {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} - set(on_node)
        raise LaunchError(
            f"RANK={rank}, WORLD_SIZE={size} and {given}={on_node[given]} are set, but not {missing}: the rank "
            f"{'among those' if missing == 'LOCAL_RANK' else 'is one of how many'} on its node. Set it too, for each "
            f"rank, or start the ranks by torchrun.",
        )
    local_rank = _whole("LOCAL_RANK", on_node["LOCAL_RANK"])
    local_size = _whole("LOCAL_WORLD_SIZE", on_node["LOCAL_WORLD_SIZE"], least=1)
    _check_node(rank, size, local_rank, local_size)
    if {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= set(variables):
        return Found(is_rank=True, notes=notes)
    address, port = variables.get("MASTER_ADDR") or "127.0.0.1", int(variables.get("MASTER_PORT") or 29400)
    return Found(Ranks(rank, size, local_rank, local_size, rank // local_size, address, port), True, notes)


def _check_node(rank: int, size: int, local_rank: int, local_size: int) -> None:
    if local_rank >= local_size:
        raise LaunchError(
            f"rank {rank} is number {local_rank} on its node (LOCAL_RANK), which has {local_size} rank(s) "
            f"(LOCAL_WORLD_SIZE): numbers begin at 0. {_unset('LOCAL_RANK', 'LOCAL_WORLD_SIZE')}"
        )
    if size % local_size:
        raise LaunchError(
            f"{size} ranks have been started, {local_size} of them on the node of rank {rank}: expected the same "
            f"number on each node, such as by srun --ntasks-per-node or mpirun --map-by ppr:4:node."
        )


def _of_task(task: _Task, variables: Variables, starter: Callable[[str], str | None]) -> Found:
    """Ranks from the task of a launcher other than torchrun."""
    launcher = task.launcher
    if task.size == 1:
        return Found()
    inherits = launcher.name == "submitit" or "SUBMITIT_EXECUTOR" in variables  # the shell of the one who submitted
    given = {} if inherits else variables
    before = given.get("WORLD_SIZE")
    if before is not None and before != str(task.size):
        raise LaunchError(
            f"WORLD_SIZE={before} is set, but this is {task.shown}. Unset WORLD_SIZE, which may be left over in this "
            f"shell, or start {before} tasks.",
            task.rank,
        )
    local_rank, local_size = task.local_rank, task.local_size
    if local_rank is None and "LOCAL_RANK" in given:
        local_rank = _whole("LOCAL_RANK", given["LOCAL_RANK"])
    if local_size is None and "LOCAL_WORLD_SIZE" in given:
        local_size = _whole("LOCAL_WORLD_SIZE", given["LOCAL_WORLD_SIZE"], least=1)
    if local_rank is None or local_size is None:
        wanted = [" or ".join(names) for names in (launcher.local_rank, launcher.local_size) if names]
        raise LaunchError(
            f"this is {task.shown}, but there is nothing that says which one on its node"
            f"{' (expected ' + ' and '.join(wanted) + ')' if wanted else ''}. Let it start one torchrun on each node: "
            f"{_ON_EACH_NODE}",
            task.rank,
        )
    _check_node(task.rank, task.size, local_rank, local_size)
    address = _address(task, local_size, given)
    port = _port_of(task, local_size, variables, given, starter)
    node = task.rank // local_size if task.node is None else task.node
    return Found(Ranks(task.rank, task.size, local_rank, local_size, node, address, port), True)


_ON_EACH_NODE = "HEAD=... NODES=... NODE_RANK=... launch/torchrun_multinode.sh ..."


def _address(task: _Task, local_size: int, given: Variables) -> str:
    if local_size == task.size:  # one node, whose own name may not resolve
        return "127.0.0.1"
    if given.get("MASTER_ADDR"):
        return given["MASTER_ADDR"]
    hosts = _first(given, task.launcher.nodes)
    if hosts is not None:
        return _first_host(hosts[1])
    raise LaunchError(
        f"this is {task.shown}, on {task.size // local_size} nodes, and none of them knows an address of the one with "
        f"rank 0. Give it, on that node:\n  {task.launcher.several_nodes}",
        task.rank,
    )


def _port_of(
    task: _Task, local_size: int, variables: Variables, given: Variables, starter: Callable[[str], str | None]
) -> int:
    """The port that was given, or one made of the name of the job, so that jobs on one node do not meet."""
    if given.get("MASTER_PORT"):
        return _port(given["MASTER_PORT"])
    named = [variables[name] for name in task.launcher.job if variables.get(name)]
    if not named and local_size == task.size and (found := starter(task.launcher.rank[0])) is not None:
        named = [found]
    if not named:
        raise LaunchError(
            f"this is {task.shown}, which gives no name to what it has started, so that a port cannot be chosen. Set "
            f"MASTER_PORT, to the same free port for all ranks, such as MASTER_PORT=29400.",
            task.rank,
        )
    return 10000 + zlib.crc32(".".join([task.launcher.name, *named]).encode()) % 20000


def _port(value: str) -> int:
    port = _whole("MASTER_PORT", value)
    if not 0 < port < 65536:
        raise LaunchError(f"MASTER_PORT={value} is no port: expected 1 to 65535, such as MASTER_PORT=29400.")
    return port


def _whole(name: str, value: str, least: int = 0) -> int:
    if not re.fullmatch(r"\d+", value.strip(), re.ASCII) or int(value) < least:
        raise LaunchError(
            f"{name}={value} is expected to be a whole number from {least} on. {_unset(name)}",
        )
    return int(value)


def _unset(*names: str) -> str:
    return (
        f"Start the ranks by torchrun, srun or mpirun; what is left over in a shell goes by `unset {' '.join(names)}`."
    )


def _first(variables: Variables, names: tuple[str, ...]) -> tuple[str, str] | None:
    """Name and value of the first that is set."""
    return next(((name, variables[name]) for name in names if variables.get(name)), None)


def _counts(name: str, text: str) -> list[int]:
    """Numbers of SLURM's short form: ``2(x3),1`` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip(), re.ASCII)
        if found is None:
            raise LaunchError(f"{name}={text} is expected to be numbers of tasks, such as 4(x2). {_unset(name)}")
        counts += [int(found.group(1))] * int(found.group(2) or 1)
    return counts


def _first_host(text: str) -> str:
    """First of SLURM's short form: ``rack[1-2]node[007-009,12],head`` is ``rack1node007``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", text.strip())
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first.group(0) if first else text)


def _starter(name: str) -> str | None:
    """Process that has started the ranks of this node: the nearest one above that has not the variable ``name``.

    None where the system does not show it; on Linux it does.
    """
    pid, before = os.getppid(), b""
    while pid > 1:
        try:
            folder = Path("/proc") / str(pid)
            before = (folder / "environ").read_bytes()
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        if not any(each.startswith(f"{name}=".encode()) for each in before.split(b"\0")):
            return f"{pid}-{after_name[19]}"  # with its time of start, since numbers of processes come again
        pid = int(after_name[1])
    return None
