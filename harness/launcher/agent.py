"""Agents of a sweep point: one process on each node that starts the ranks of the point."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

from harness.launcher.settings import Settings
from harness.runs import (
    Command,
    PointFailedError,
    as_typed,
    note_failure,
    read,
)

__all__ = ["main"]

_LOOK = 0.1  # seconds between looks at the agents
_AGENT_TO_LEAVE = 75  # exit code of ranks that were told to leave, harness.callbacks.REQUEUE_EXIT_CODE
_FILES, _END, _ALIVE = ".launch", "end", "alive"
_BEAT, _SILENCE = 5.0, 180.0  # seconds between signs of life of a sweep; without one, other nodes take it for dead
_PARENT = "HARNESS_PARENT"
# what launchers tell their ranks; an agent that has been started by a rank must not hand it on
_STALE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_TIMER_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"),
)


def _agent(file: Path) -> list[str]:
    return [sys.executable, "-m", "harness.launcher", str(file)]


def _run_agent(file: Path, joined: bool = False, **changes: Any) -> int:
    """The agent of a point on this node: starts its ranks, and says why if they fail, or leaves that to node 0.

    Returns:
        An exit code.
    """
    _end_with_parent(signal.SIGTERM)
    # here, since the other processes of a sweep do without
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    point = OmegaConf.load(file)
    settings = replace(Settings.of(point.settings), **changes)
    folder, command = Path(point.folder), _command_of(point)
    least, most = settings.node_range
    is_static = (settings.rdzv_backend or ("static" if most > 1 and least == most else "c10d")) == "static"
    before = read(folder)
    config = LaunchConfig(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=int(settings.nproc_per_node),
        run_id=f"{settings.rdzv_id}-{point.number}",
        role="harness",
        rdzv_backend="static" if is_static else settings.rdzv_backend or "c10d",
        rdzv_endpoint=settings.rdzv_endpoint or "localhost:0",
        rdzv_configs={**({"rank": settings.node_rank} if is_static else {}), **settings.rdzv_conf},
        max_restarts=settings.max_restarts,
        local_addr=settings.local_addr,
        logs_specs=DefaultLogsSpecs(),
    )
    if joined:  # on node 0 it is that of the sweep
        given = _config_of(point, environment=point.environment).environment
        os.environ.update({str(key): str(value) for key, value in given.items()})
    os.environ[_PARENT] = str(os.getpid())
    try:
        launch_agent(config, sys.executable, ["-m", "harness.launcher", "--rank", str(file)])
        return 0
    except SignalException:
        return _AGENT_TO_LEAVE
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            what = f"rank {rank} was killed by {first.signal_name()}"
        else:
            what = f"rank {rank} ended with exit code {first.exitcode}"
        code = _AGENT_TO_LEAVE if first.exitcode == _AGENT_TO_LEAVE else 1
    except Exception as error:
        traceback.print_exc()
        what, code = f"its agent failed: {type(error).__name__}: {error}", 1
    found = read(folder)
    has_told = found != before and found.get("state") in ("failed", "preempted", "interrupted")
    if not joined and not has_told:  # rank 0 may have finished, and another one not
        note_failure(folder, command, what, has_begun=found != before)
    return code


def _command_of(point: Any) -> Command:
    return Command(as_typed(point.typed), as_typed(point.overrides), point.number)


def _config_of(point: Any, **beside: Any) -> DictConfig:
    """The configuration by itself: what is still to be resolved in it speaks of it as the whole."""
    parts = {"config": point.config, **beside}
    plain: dict[str, Any] = {name: OmegaConf.to_container(part) for name, part in parts.items()}
    return OmegaConf.create({**plain.pop("config"), **plain})


def _end_with_parent(number: signal.Signals) -> None:
    """Let the kernel send a signal to this process when the one that has started it ends, even by SIGKILL."""
    with suppress(OSError, AttributeError, TypeError):  # there is no such call but on Linux
        ctypes.CDLL(None, use_errno=True).prctl(1, number.value, 0, 0, 0)
    parent = os.environ.get(_PARENT)
    if parent and os.getppid() != int(parent):  # it was quicker
        sys.exit(1)


def _join(sweep_dir: Path, **changes: Any) -> int:
    """Run the agents of another node for the points of a sweep, as they come, until it ends."""
    seen: set[Path] = set()
    sign, since = "", time.monotonic()
    while True:
        has_ended = (sweep_dir / _FILES / _END).exists()
        with suppress(OSError):
            if (now := (sweep_dir / _FILES / _ALIVE).read_text()) != sign:
                sign, since = now, time.monotonic()
        if sign and time.monotonic() - since > _SILENCE:
            print(f"error: there was no sign of life of the sweep in {sweep_dir} for {_SILENCE:g} s", file=sys.stderr)
            return 1
        files = sorted((sweep_dir / _FILES).glob("*.yaml"), key=lambda path: int(path.stem))
        for file in [each for each in files if each not in seen and each.exists()]:
            seen.add(file)
            options = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
            environment = {key: value for key, value in os.environ.items() if key not in _STALE}
            environment.setdefault("TORCHELASTIC_ENABLE_FILE_TIMER", "1")
            environment[_PARENT] = str(os.getpid())
            subprocess.run([*_agent(file), "--joined", *options], env=environment, check=False)
        if has_ended:
            return 0
        time.sleep(_LOOK)


def _run_rank(file: Path) -> None:
    _end_with_parent(signal.SIGKILL)
    from harness import train

    train.quieten()
    point = OmegaConf.load(file)
    if point.chdir:
        os.chdir(point.folder)
    if os.environ["RANK"] == "0" and point.job_logging is not None:
        configure_log(point.job_logging)
    try:
        train.run_job(_config_of(point), _command_of(point))
    except PointFailedError:  # it has been told
        sys.exit(1)


def main() -> None:
    """What the processes of a sweep run, see the head of this module."""
    parser = argparse.ArgumentParser(prog="python -m harness.launcher", description="Agents and ranks of sweeps.")
    parser.add_argument("place", type=Path, help="directory of a sweep on several nodes, or the file of a point in it")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--joined", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--node-rank", type=int, help="of this node, from 1, with a fixed number of nodes")
    parser.add_argument("--local-addr", help="address of this node that the others can reach")
    arguments = parser.parse_args()
    if arguments.rank:
        _run_rank(arguments.place)
        return
    changes = {name: getattr(arguments, name) for name in ("node_rank", "local_addr")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if arguments.place.suffix == ".yaml":
        sys.exit(_run_agent(arguments.place, arguments.joined, **changes))
    sys.exit(_join(arguments.place, **changes))  # its directory may not be there yet
