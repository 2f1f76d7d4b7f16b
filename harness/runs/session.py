"""Session of a command: the sweeps that it has started, and the sweep points that have failed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness.runs.exits import JobFailed
from harness.runs.records import RECORD, claim
from harness.runs.sweep_plan import SWEEP, write_plan

__all__ = ["Session", "SweepCallback", "current_session", "new_session"]


@dataclass
class Session:
    """State of one command, from its start to its end."""

    sweeps: dict[Path, FileLock] = field(default_factory=dict)
    """Directories of the sweeps that this command has started, locked until it ends."""
    failed: list[str] = field(default_factory=list)
    """Labels of the sweep points that have failed."""
    has_composed: bool = False
    """True once Hydra has composed the configuration and calls the job, or starts the points of a sweep."""

    def close(self) -> None:
        """Report where the sweeps are and how to read them, remove those that were refused, and release their locks."""
        for folder, lock in self.sweeps.items():
            if next(folder.rglob(".hydra"), None) or next(folder.rglob(RECORD), None):
                shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
                print(f"\nsweep       {folder}\nreport      harness-sweep {shown}", flush=True)
            elif {path.name for path in folder.glob("*")} <= {"multirun.yaml", SWEEP, ".lock"}:
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()


# Hydra calls the job, its callbacks and its launchers with arguments of its own, and finds the job in other processes
# by its name, so a session cannot be handed to them: they ask for that of the command. It is no context variable, which
# threads would not see.
_current: Session | None = None


@contextmanager
def new_session() -> Iterator[Session]:
    """Session of a command, closed at its end; :func:`current_session` gives it meanwhile."""
    global _current
    before, session = _current, Session()
    _current = session
    try:
        yield session
    finally:
        _current = before
        session.close()


def current_session() -> Session:
    """Session of the command that runs in this process; an empty one where a launcher of Hydra has started it."""
    global _current
    if _current is None:
        _current = Session()
    return _current


class SweepCallback(Callback):
    """Locks the directory of a sweep and writes ``sweep.json`` there, for Hydra's ``hydra.callbacks``."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook before the first point.

        Raises:
            JobFailed: another sweep is going on in the directory, or it cannot be made.
        """
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        try:
            current_session().sweeps[folder] = claim(folder)
        except ValueError:
            current_session().has_composed = True
            text = (
                f"{folder} belongs to a sweep that is still going on. Wait for it or end it, or give this one another "
                f"hydra.sweep.dir."
            )
            print(f"\nerror: {text}", file=sys.stderr)
            raise JobFailed(text) from None
        except OSError as error:
            text = (
                f"the directory of the sweep cannot be made: {folder} ({error.strerror}). Start where you may write, "
                f"or give it a place: hydra.sweep.dir=/scratch/sweep."
            )
            current_session().has_composed = True
            print(f"\nerror: {text}", file=sys.stderr)
            raise JobFailed(text) from None
        write_plan(folder, config)
