"""Methods that a part of a job may have, and that the job calls on every part that has them.

A part is a callback, a logger, the data module, the Lightning module or any module in it (the model, a weighting), the
strategy, or a plugin of the trainer. Only the name of the method counts: a class of yours need not import anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer

__all__ = ["ChecksJob", "FinishesRun", "KeepsCheckpoints", "Location", "WritesFiles"]

Location = str | PathLike[str]
"""Path of a file or folder, or an address."""


@runtime_checkable
class ChecksJob(Protocol):
    """A part that can refuse a job, before anything is written or sent."""

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a job that this part cannot work in; called once on every rank.

        The arguments are those of ``Callback.setup``, which may call it for users of a bare trainer. There is no
        process group yet, ranks must not communicate, and nothing may be written.

        Args:
            trainer: with its callbacks, loggers, strategy and precision; ``trainer.datamodule`` is the data, set up.
            pl_module: a :class:`~harness.module.ForceFieldModule`, not yet attached to the trainer.
            stage: ``fit`` for a training, ``test`` if there is only a test.

        Raises:
            ValueError, TypeError, KeyError: what was found, what was expected, and the likely fix. The message is
                shown once, whatever the number of ranks.
        """


@runtime_checkable
class WritesFiles(Protocol):
    """A callback or logger with results that a user wants to find."""

    @property
    def written_files(self) -> Mapping[str, Location | Sequence[Location]]:
        """Files of the job by a label of a word or two; printed on rank 0 when the job has ended."""


@runtime_checkable
class FinishesRun(Protocol):
    """A logger whose run outlasts training and test."""

    def finish(self, exit_code: int | None = None) -> object:
        """End the run; called when the job has ended, before ``written_files`` is read.

        Args:
            exit_code: not 0 for a run that has failed while its process goes on; None to find out by itself.
        """


@runtime_checkable
class KeepsCheckpoints(Protocol):
    """A callback with checkpoints that an interrupted run resumes from."""

    @property
    def dirpath(self) -> Path:
        """Folder of the checkpoints."""

    def newest(self) -> Path | None:
        """Newest whole checkpoint in the folder; None without any."""

    def put_aside(self) -> None:
        """Rename the checkpoints of another run in the folder, so that they are not taken for those of this one."""
