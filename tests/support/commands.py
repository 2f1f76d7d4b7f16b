"""The command line as a user runs it: a process, or ranks under torchrun, with a time limit."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
BIN = Path(sys.executable).parent

# of data, model and training, for one of seconds
SIZES = (
    "data.num_frames=24",
    "data.split={val:4,test:4}",
    "data.batch_size=4",
    "model.hidden_channels=8",
    "model.num_filters=8",
    "model.num_interactions=1",
    "model.num_gaussians=8",
    "max_epochs=2",
    "trainer.log_every_n_steps=2",
)
# the default callbacks that draw as a training ends, which takes longer than all of its steps
NO_FIGURES = ("callbacks.parity=null", "callbacks.per_type=null", "callbacks.coefficients=null")
TINY = (*SIZES, *NO_FIGURES)


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def runs(self) -> list[Path]:
        """Output directories, of all jobs in the folder."""
        return sorted(self.folder.glob("outputs/*/*"))


def run(command: list[str], folder: Path, timeout: float = 180, **environment: str) -> Finished:
    """Run a command in ``folder``; it and all that it started are killed at the time limit."""
    folder.mkdir(parents=True, exist_ok=True)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC"))}
    env = {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
        "COLUMNS": "140",
        **environment,
    }
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        raise TimeoutError(f"{command} did not end within {timeout} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    return Finished(process.returncode, out, err, folder)


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            child, parent = stat.parent.name, stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if int(parent) == pid:
            found.append(int(child))
    return found


def descendants(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [pid]
    for each in found:
        found += children(each)
    return found


def kill_tree(pid: int) -> None:
    """End a process and all below it: torchrun gives each of its ranks a session of its own."""
    for each in descendants(pid):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def train(*overrides: str, folder: Path, ranks: int = 1, timeout: float = 180, **environment: str) -> Finished:
    """``python -m harness.train`` on one rank, or under torchrun on several."""
    launcher = (
        [sys.executable]
        if ranks == 1
        else [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
    )
    return run([*launcher, "-m", "harness.train", *overrides], folder, timeout, **environment)


def read_csv(run_folder: Path, *, times: bool = False) -> list[dict[str, float]]:
    """Rows of Lightning's CSV logger; cells without a value are left out, NaN stays.

    So are rows of the throughput unless asked for: no two trainings take the same time.
    """
    with (run_folder / "csv" / "metrics.csv").open() as file:
        rows = [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    return [row for row in rows if times or "throughput/step_seconds" not in row]


def read_wandb(run_folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and history of the one offline W&B run in a folder, read by wandb's own reader."""
    files = sorted(run_folder.rglob("*.wandb"))
    if len(files) != 1:
        raise AssertionError(f"expected one W&B run, found {files}")
    inspect = [str(BIN / "wandb"), "leet", "inspect", "--json"]
    lines = subprocess.run([*inspect, str(files[0])], capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in lines.splitlines()]
    summary = subprocess.run(
        [*inspect, "--summary", str(files[0])], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return json.loads(summary), [record["history"] for record in records if record["type"] == "history"]


def same(left: float, right: float, tolerance: float) -> bool:
    """Equal to a relative or absolute tolerance, NaN to NaN."""
    return (math.isnan(left) and math.isnan(right)) or math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance)


@contextmanager
def started(*overrides: str, folder: Path, ranks: int, **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The ranks of a training as processes of their own, without a launcher above them; none is left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TORCHELASTIC"))}
    processes = []
    for rank in range(ranks):
        env = {
            **inherited,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
            "COLUMNS": "140",
            **environment,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "harness.train", *overrides],
                cwd=folder,
                env=env,
                stdout=(folder / f"stdout.{rank}").open("w"),
                stderr=(folder / f"stderr.{rank}").open("w"),
                text=True,
                start_new_session=True,
            )
        )
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()


def wait_for(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """What ``condition`` returns, once it is true."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not happen within {timeout} s")
