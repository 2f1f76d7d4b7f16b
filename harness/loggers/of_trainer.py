"""The W&B loggers among those of a trainer, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import loggers as lightning_loggers

from harness.loggers.wandb_logger import WandbLogger
from harness.support.lightning_private import logged_step

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["log_image", "wandb_loggers"]


def wandb_loggers(trainer: Trainer) -> Iterator[WandbLogger]:
    """The W&B loggers of a trainer, for tables, charts, alerts and the summary; none on ranks other than 0."""
    if trainer.is_global_zero:
        yield from (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def log_image(trainer: Trainer, key: str, path: Path, epoch: int | None = None) -> None:
    """Send a picture in a file to W&B, by Lightning's logger as well as this package's; only rank 0 does.

    Args:
        trainer: whose loggers get it.
        key: log key.
        path: of the file.
        epoch: of the row, the current one if not given; Lightning's logger takes none.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, lightning_loggers.WandbLogger):
            beside: dict[str, Any] = {}
            if isinstance(logger, WandbLogger):
                beside["epoch"] = trainer.current_epoch if epoch is None else epoch
            logger.log_image(key, [str(path)], step=logged_step(trainer), **beside)
