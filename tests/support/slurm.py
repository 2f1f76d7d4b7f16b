"""Stands for SLURM, which is not on the machines that run the tests: commands that start tasks here as SLURM would.

What it knows of SLURM is what its manual says: the variables of jobs and tasks, that ``srun`` hands SIGUSR1 on to its
tasks and ends them at SIGTERM, that the exit code of a step is the highest of its tasks, and that a job which is put
back into the queue runs its script again with ``SLURM_RESTART_COUNT`` one higher. Queues, time limits and nodes are not
there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.commands import BIN, ROOT, Finished, children, descendants, kill_tree

_SRUN = """
import os, signal, subprocess, sys

arguments, tasks = sys.argv[1:], 0
while arguments[0].startswith("--"):
    option = arguments.pop(0)
    if option in ("--ntasks", "--ntasks-per-node", "--distribution"):
        value = arguments.pop(0)
        tasks = int(value) if option == "--ntasks" else tasks
    elif option not in ("--kill-on-bad-exit=0", "--wait=0"):
        sys.exit(f"srun: unrecognized option '{option}'")
per_node, started = tasks // int(os.environ["SLURM_JOB_NUM_NODES"]), []


def hand_on(number, frame):
    if number == signal.SIGTERM:
        print("srun: forcing job termination", file=sys.stderr, flush=True)
    for task in started:
        task.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)


for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, hand_on)
for rank in range(tasks):
    place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node}
    place |= {"SLURM_NTASKS": tasks, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_ID": 0}
    place["SLURM_STEP_NODELIST"] = "localhost"
    place["SLURM_STEP_TASKS_PER_NODE"] = f"{per_node}(x{tasks // per_node})"
    started.append(subprocess.Popen(arguments, env={**os.environ, **{key: str(value) for key, value in place.items()}}))
codes = [task.wait() for task in started]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
_SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) echo localhost ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
  *) exit 1 ;;
esac
"""


def install(folder: Path) -> Path:
    """The commands; returns the folder to be put on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", f"#!{sys.executable}{_SRUN}"), ("scontrol", _SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


class Job:
    """A job that runs ``launch/slurm.sbatch`` in a folder, with arguments."""

    number = 4711

    def __init__(
        self, folder: Path, *arguments: str, nodes: int = 1, tasks: int | None = None, **environment: str
    ) -> None:
        self.folder, self.arguments = folder, arguments
        folder.mkdir(parents=True, exist_ok=True)
        self._requeued = folder.parent / f"{folder.name}.requeued"
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC", "GLOO_"))
        }
        path = [str(install(folder.parent / "slurm")), str(BIN), os.environ["PATH"]]
        self.environment = {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join(path),
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "COLUMNS": "140",
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes if tasks is None else tasks),
            "SLURM_PROCID": "0",  # the script of a job has them too, and is no task
            "SLURM_LOCALID": "0",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "REQUEUED": str(self._requeued),
            **environment,
        }

    @property
    def requeues(self) -> int:
        """How often it has asked to be put back into the queue."""
        if not self._requeued.exists():
            return 0
        return self._requeued.read_text().splitlines().count(str(self.number))

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """The job's script, of which nothing is left behind."""
        # sbatch runs a copy of the script
        script = self.folder.parent / "spool" / "slurm_script"
        script.parent.mkdir(exist_ok=True)
        script.write_bytes((ROOT / "launch" / "slurm.sbatch").read_bytes())
        process = subprocess.Popen(
            ["bash", str(script), *self.arguments],
            cwd=self.folder,
            env={**self.environment, **({"SLURM_RESTART_COUNT": str(self.requeues)} if self.requeues else {})},
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
    def near_its_time_limit(process: subprocess.Popen[str]) -> None:
        """What ``--signal=B:USR1@120`` asks for: a signal to the script, and to nothing else."""
        process.send_signal(signal.SIGUSR1)

    @staticmethod
    def cancelled(process: subprocess.Popen[str]) -> None:
        """What ``scancel`` does: SIGTERM to the script, and to every process below the tasks of a step.

        Some SLURMs send it to the tasks alone. ``srun`` itself is on the side of the script and gets none.
        """
        process.send_signal(signal.SIGTERM)
        (srun,) = children(process.pid)
        for pid in [each for task in children(srun) for each in descendants(task)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
