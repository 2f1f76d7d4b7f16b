"""Session of a command: sweeps that it has started, and points of them that have failed."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from harness.runs.exits import JobFailed
from harness.runs.records import claim
from harness.runs.sweep_plan import write_plan

__all__ = ["COMPOSED", "FAILED", "SWEEPS", "SweepCallback"]

SWEEPS: dict[Path, FileLock] = {}
"""Directories of sweeps that this process has started, which are its own until it releases them."""
COMPOSED = Event()
"""Set once Hydra has composed the configuration and calls the job, or starts its points."""
FAILED: list[str] = []
"""Points of the sweep of this process that have failed."""


class SweepCallback(Callback):
    """Locks the directory of a sweep and writes ``sweep.json`` there, for Hydra's ``hydra.callbacks``."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook before the first point.

        Raises:
            JobFailed: another sweep is going on in the directory.
        """
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        try:
            SWEEPS[folder] = claim(folder)
        except ValueError:
            COMPOSED.set()
            text = (
                f"{folder} belongs to a sweep that is still going on. Wait for it or end it, or give this one another "
                f"hydra.sweep.dir."
            )
            print(f"\nerror: {text}", file=sys.stderr)
            raise JobFailed(text) from None
        write_plan(folder, config)
