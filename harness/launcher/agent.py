"""Agents of a sweep point: one process on each node, which starts the ranks of the point.

python -m harness.launcher FILE                        # the agent of a sweep point
python -m harness.launcher SWEEP_DIR --node-rank 1     # the agents of another node, for each point as it comes
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.launcher.settings import Settings
from harness.runs import REQUEUE_EXIT_CODE, TYPED, Command, note_failure, read
from harness.support.process import PARENT, end_with_parent

__all__ = ["PointFile", "agent_command", "agent_environment", "main"]

POLL = 0.1  # seconds between looks at the agents
FILES, END, ALIVE = ".launch", "end", "alive"  # the folder of the sweep for its agents, and files in it
BEAT, SILENCE = 5.0, 180.0  # seconds between signs of life of a sweep; without one, other nodes take it for dead
# variables that launchers give to their ranks; an agent that has been started by a rank must not hand them on
_STALE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_TIMER_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"),
    TYPED,
)


@dataclass(frozen=True)
class PointFile:
    """A sweep point, as the agents of all nodes read it from ``.launch/NUMBER.json`` in the directory of the sweep.

    Args:
        number: of the sweep point.
        folder: its directory.
        typed: arguments of the command line of the sweep.
        overrides: of the sweep point.
        arguments: of ``python -m harness.train`` on every rank.
        environment: variables of the ranks, the same on all nodes.
        settings: of :class:`~harness.launcher.settings.Settings`.
    """

    number: int
    folder: str
    typed: Sequence[str]
    overrides: Sequence[str]
    arguments: Sequence[str]
    environment: Mapping[str, str]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> PointFile:
        """Read it from a file."""
        return cls(**json.loads(path.read_text()))

    def to_json(self) -> str:
        """Content of the file."""
        return json.dumps(asdict(self), indent=1)

    @property
    def command(self) -> Command:
        """Command of the sweep point."""
        return Command(tuple(self.typed), tuple(self.overrides), self.number)


def agent_command(file: Path) -> list[str]:
    """Command line of the agent of a sweep point."""
    return [sys.executable, "-m", "harness.launcher", str(file)]


def agent_environment(**further: str) -> dict[str, str]:
    """Environment of an agent that is to end with this process."""
    environment = {key: value for key, value in os.environ.items() if key not in _STALE}
    # kills ranks that are stopped; see launch/env/gloo.sh
    environment.setdefault("TORCHELASTIC_ENABLE_FILE_TIMER", "1")
    return {**environment, **further, PARENT: str(os.getpid())}


def _run_agent(file: Path, joined: bool = False, **changes: Any) -> int:
    """Start this node's ranks of a sweep point; node 0 records a failure in ``run.json``.

    Returns:
        An exit code.
    """
    end_with_parent(signal.SIGTERM)
    # here, since the other processes of a sweep do without
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    point = PointFile.read(file)
    settings = replace(Settings.of(point.settings), **changes)
    folder = Path(point.folder)
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
    os.environ |= {**point.environment, PARENT: str(os.getpid())}
    try:
        launch_agent(config, sys.executable, ["-m", "harness.train", *point.arguments])
        return 0
    except SignalException:
        return REQUEUE_EXIT_CODE
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            what = f"rank {rank} was killed by {first.signal_name()}"
        else:
            what = f"rank {rank} ended with exit code {first.exitcode}"
        code = REQUEUE_EXIT_CODE if first.exitcode == REQUEUE_EXIT_CODE else 1
    except Exception as error:
        traceback.print_exc()
        what, code = f"its agent failed: {type(error).__name__}: {error}", 1
    found = read(folder)
    is_recorded = found != before and found.get("state") in ("failed", "preempted", "interrupted")
    if not joined and not is_recorded:  # rank 0 may have finished, and another one not
        note_failure(folder, point.command, what, has_begun=found != before)
    return code


def _join(sweep_dir: Path, **changes: Any) -> int:
    """Run the agents of another node for the points of a sweep, as they come, until it ends."""
    seen: set[Path] = set()
    sign, since = "", time.monotonic()
    while True:
        has_ended = (sweep_dir / FILES / END).exists()
        with suppress(OSError):
            if (now := (sweep_dir / FILES / ALIVE).read_text()) != sign:
                sign, since = now, time.monotonic()
        if sign and time.monotonic() - since > SILENCE:
            print(f"error: there was no sign of life of the sweep in {sweep_dir} for {SILENCE:g} s", file=sys.stderr)
            return 1
        files = sorted((sweep_dir / FILES).glob("*.json"), key=lambda path: int(path.stem))
        for file in [path for path in files if path not in seen and path.exists()]:
            seen.add(file)
            options = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
            subprocess.run([*agent_command(file), "--joined", *options], env=agent_environment(), check=False)
        if has_ended:
            return 0
        time.sleep(POLL)


def main() -> None:
    """Command line of ``python -m harness.launcher``."""
    parser = argparse.ArgumentParser(prog="python -m harness.launcher", description="Agents of the points of a sweep.")
    parser.add_argument("place", type=Path, help="directory of a sweep on several nodes, or the file of a point in it")
    parser.add_argument("--joined", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--node-rank", type=int, help="of this node, from 1, with a fixed number of nodes")
    parser.add_argument("--local-addr", help="address of this node that the others can reach")
    arguments = parser.parse_args()
    changes = {name: getattr(arguments, name) for name in ("node_rank", "local_addr")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if arguments.place.suffix == ".json":
        sys.exit(_run_agent(arguments.place, arguments.joined, **changes))
    sys.exit(_join(arguments.place, **changes))  # its directory may not be there yet
