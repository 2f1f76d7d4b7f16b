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

__all__ = ["COMPOSED", "FAILED", "SWEEPS", "SweepCallback"]

SWEEPS: dict[Path, FileLock] = {}
"""Directories of sweeps that this process has started, which are its own until it releases them."""
COMPOSED = Event()
"""Set once Hydra has composed the configuration and calls the job, or starts its points."""
FAILED: list[str] = []
"""Points of the sweep of this process that have failed."""


class SweepCallback(Callback):
    """Takes the directory of a sweep, for Hydra's ``hydra.callbacks``."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before anything is written.

        Raises:
            JobFailed: a sweep is going on there.
        """
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        try:
            SWEEPS[folder] = claim(folder)
        except ValueError:
            COMPOSED.set()
            told = (
                f"{folder} belongs to a sweep that is still going on. Wait for it or end it, or give this one another "
                f"hydra.sweep.dir."
            )
            print(f"\nerror: {told}", file=sys.stderr)
            raise JobFailed(told) from None
