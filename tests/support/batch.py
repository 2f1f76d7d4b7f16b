"""Stands for PBS and LSF, which are not on the machines that run the tests: commands that start tasks as they would.

What it knows of them is what their manuals say: variables and files of a job, the variables of the tasks of mpiexec (in
the dialects of MPICH, PALS and Open MPI), jsrun and blaunch, that Open MPI hands no variables on but those that are
named, and that a job that is put back into the queue runs its script again. Queues, limits and nodes are not there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from support.commands import BIN, ROOT, Finished, descendants, kill_tree

_START = """
import os, signal, subprocess, sys

DIALECT, hosts = os.environ["DIALECT"], os.environ["STAND_IN_HOSTS"].split()
# what a user's environment needs to find Python and this stand-in; Open MPI hands on no more
KEPT = ("STAND_IN_HOSTS", "DIALECT", "HOME")


def place(rank, size, local_size):
    local, node = rank % local_size, rank // local_size
    if DIALECT == "pals":
        names = ("PALS_RANKID", "PMI_RANK"), ("PMI_SIZE",), ("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"), ("PMI_LOCAL_SIZE",)
        more = {"PALS_NODEID": node, "PALS_APID": os.getpid()}
    elif DIALECT == "mpich":
        names, more = (("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)), {}
    else:
        of = "OMPI_COMM_WORLD" if DIALECT == "openmpi" else "JSM_NAMESPACE"
        names = (f"{of}_RANK",), (f"{of}_SIZE",), (f"{of}_LOCAL_RANK",), (f"{of}_LOCAL_SIZE",)
        more = {"PMIX_RANK": rank, "PMIX_NAMESPACE": os.getpid()} if DIALECT == "openmpi" else {}
    for each, value in zip(names, (rank, size, local, local_size)):
        more |= {name: value for name in each}
    return {name: str(value) for name, value in more.items()}


def run(command, places, environment):
    tasks = [subprocess.Popen(command, env={**environment, **each}) for each in places]

    def end(number, frame):
        for task in tasks:
            task.kill()

    signal.signal(signal.SIGTERM, end)
    codes = [task.wait() for task in tasks]
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


arguments = sys.argv[1:]
"""
_MPIEXEC = """
if arguments == ["--version"]:
    print({"openmpi": "mpiexec (OpenRTE) 4.1.4", "mpich": "HYDRA build details:", "pals": "mpiexec 1.2"}[DIALECT])
    sys.exit()
size, local_size, environment = 0, 0, dict(os.environ)
if DIALECT == "openmpi":
    environment = {name: os.environ[name] for name in KEPT}
while arguments[0].startswith("-"):
    option = arguments.pop(0)
    if option == "-n":
        size = int(arguments.pop(0))
    elif option == "-ppn" and DIALECT != "openmpi":
        local_size = int(arguments.pop(0))
    elif option == "--map-by" and DIALECT == "openmpi":
        local_size = int(arguments.pop(0).split(":")[1])
    elif option == "--bind-to" and DIALECT == "openmpi":
        arguments.pop(0)
    elif option == "-x" and DIALECT == "openmpi":
        name = arguments.pop(0)
        environment[name] = os.environ[name]
    elif option == "--cpu-bind" and DIALECT == "pals":
        arguments.pop(0)
    else:
        sys.exit(f"mpiexec: unrecognized option '{option}'")
if size != local_size * len(hosts):
    sys.exit(f"mpiexec: {size} tasks, {local_size} on each of {len(hosts)} hosts")
run(arguments, [place(rank, size, local_size) for rank in range(size)], environment)
"""
_JSRUN = """
options = {}
while arguments[0].startswith("--"):
    option = arguments.pop(0)
    options[option] = arguments.pop(0)
local_size = int(options.pop("--tasks_per_rs"))
expected = {"--nrs": str(len(hosts)), "--rs_per_host": "1", "--cpu_per_rs": "ALL_CPUS", "--gpu_per_rs": "ALL_GPUS"}
if options != {**expected, "--bind": "none"}:
    sys.exit(f"jsrun: {options}")
size = local_size * len(hosts)
run(arguments, [place(rank, size, local_size) for rank in range(size)], dict(os.environ))
"""
_BLAUNCH = """
if arguments.pop(0) != "-z" or arguments.pop(0).split() != hosts:
    sys.exit("blaunch: hosts")
# a command that says where it is
folder = os.path.dirname(os.path.abspath(__file__))
run(arguments, [{"STAND_IN_HOSTNAME": host} for host in hosts], dict(os.environ))
"""
_SHELL = {
    "qstat": 'echo "    Resource_List.walltime = ${LIMIT:-24:00:00}"',
    "qrerun": 'if [[ -n "${MAY_NOT_RERUN:-}" ]]; then exit 159; fi\necho "$1" >> "$QUEUED"',
    "hostname": 'echo "${STAND_IN_HOSTNAME:-elsewhere}"',
}  # fmt: skip


class BatchJob:
    """A job of a scheduler that runs a script of ``launch/`` in a folder.

    Args:
        folder: of the job.
        arguments: Hydra overrides, in the variable ARGS.
        hosts: number of hosts.
        environment: further variables.
    """

    script: ClassVar[str]

    def __init__(self, folder: Path, arguments: str = "", *, hosts: int = 1, **environment: str) -> None:
        self.folder, self.hosts = folder, [f"host{number}" for number in range(hosts)]
        folder.mkdir(parents=True, exist_ok=True)
        self.queued = folder.parent / f"{folder.name}.queued"
        self.host_file = folder.parent / f"{folder.name}.hosts"
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC", "GLOO_"))
        }
        path = [str(self.install(folder.parent / f"{folder.name}.bin")), str(BIN), os.environ["PATH"]]
        self.environment = {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join(path),
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "COLUMNS": "140",
            "ARGS": arguments,
            "LAUNCH_DIR": str(ROOT / "launch"),
            "STAND_IN_HOSTS": " ".join(self.hosts),
            "QUEUED": str(self.queued),
            **self.of_scheduler(),
            **environment,
        }

    def of_scheduler(self) -> dict[str, str]:
        """Variables of the job."""
        raise NotImplementedError

    def install(self, folder: Path) -> Path:
        """The commands; returns the folder to be put on PATH."""
        folder.mkdir(exist_ok=True)
        texts = {"mpiexec": _MPIEXEC, "jsrun": _JSRUN, "blaunch": _BLAUNCH}
        for name in self.commands():
            text = f"#!{sys.executable}\n{_START}{texts[name]}" if name in texts else f"#!/bin/bash\n{_SHELL[name]}\n"
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder

    def commands(self) -> tuple[str, ...]:
        """Names of the commands that the scheduler has."""
        raise NotImplementedError

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """The job's script, of which nothing is left behind."""
        spool = self.folder.parent / f"{self.folder.name}.script"  # schedulers run a copy
        spool.write_bytes((ROOT / "launch" / self.script).read_bytes())
        process = subprocess.Popen(
            ["bash", str(spool)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()

    def finish(self, process: subprocess.Popen[str], timeout: float = 120) -> Finished:
        """Wait for its end."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            out, err = process.communicate()
            raise TimeoutError(f"the job did not end within {timeout} s:\n{out[-2000:]}\n{err[-4000:]}") from None
        return Finished(process.returncode, out, err, self.folder)

    def run(self) -> Finished:
        """From the beginning to the end."""
        with self.started() as process:
            return self.finish(process)

    @staticmethod
    def signal_all(process: subprocess.Popen[str], number: signal.Signals) -> None:
        """Signal to every process of the job, as LSF sends its warnings, and both what ends a job."""
        for pid in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class PbsJob(BatchJob):
    """A job of PBS."""

    script = "pbs.sh"

    def of_scheduler(self) -> dict[str, str]:
        """Variables of the job, and its file of hosts."""
        self.host_file.write_text("".join(f"{host}\n" * 2 for host in self.hosts))  # one line for each task
        return {
            "PBS_JOBID": "4711.server",
            "PBS_O_WORKDIR": str(self.folder),
            "PBS_NODEFILE": str(self.host_file),
            "DIALECT": "mpich",
        }

    def commands(self) -> tuple[str, ...]:
        """Names of the commands that the scheduler has."""
        return ("mpiexec", "qstat", "qrerun")


class LsfJob(BatchJob):
    """A job of LSF, with jsrun or with blaunch alone."""

    script = "lsf.sh"

    def __init__(self, *arguments: str | Path, has_jsrun: bool = True, **options: object) -> None:
        self.has_jsrun = has_jsrun
        super().__init__(*arguments, **options)  # type: ignore[arg-type]

    def of_scheduler(self) -> dict[str, str]:
        """Variables of the job, and its file of hosts."""
        first = ["batch1\n"] if self.has_jsrun else []
        self.host_file.write_text("".join([*first, *(f"{host}\n" * 2 for host in self.hosts)]))
        return {
            "LSB_JOBID": "815",
            "LS_SUBCWD": str(self.folder),
            "LSB_DJOB_HOSTFILE": str(self.host_file),
            "DIALECT": "jsm",
        }

    def commands(self) -> tuple[str, ...]:
        """Names of the commands that the scheduler has."""
        return ("blaunch", "hostname", *(["jsrun"] if self.has_jsrun else []))
