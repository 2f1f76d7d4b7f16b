"""Where Hydra looks for plugins: ``hydra/launcher=torchrun``, which :mod:`harness.launcher` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["TorchrunLauncher"]


class TorchrunLauncher(Launcher):
    """Runs each point of a sweep as a job of several ranks.

    Args:
        settings: those of :class:`harness.launcher.Settings`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the job and the configuration of the whole sweep, for :meth:`launch`."""
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run points of the sweep, and return their results."""
        # here, since Hydra imports all plugins at every start
        from harness.launcher.launch import launch
        from harness.launcher.settings import Settings

        settings = Settings.of(self.settings)
        return launch(self.context, self.task_function, self.config, settings, job_overrides, initial_job_idx)
