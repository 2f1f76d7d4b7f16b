"""Loggers that go on across restarts, and that no full disk, dead network or hanging service can stop.

:class:`CSVLogger` and :class:`WandbLogger` are Lightning's, with the same numbers in the same places, and three things
more. A job that is interrupted and started again in the same output directory continues its file and its W&B run, each
step in it once. What fails is warned about once, and the training goes on. No secret of the configuration is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.support.lazy import names_of

if TYPE_CHECKING:
    from harness.loggers.csv_file import CSVLogger
    from harness.loggers.of_trainer import log_image, wandb_loggers
    from harness.loggers.secrets import without_secrets
    from harness.loggers.wandb_logger import WandbLogger

__all__ = ["CSVLogger", "WandbLogger", "log_image", "wandb_loggers", "without_secrets"]

__getattr__, __dir__ = names_of(
    __name__,
    {
        "harness.loggers.csv_file": ("CSVLogger",),
        "harness.loggers.of_trainer": ("log_image", "wandb_loggers"),
        "harness.loggers.secrets": ("without_secrets",),
        "harness.loggers.wandb_logger": ("WandbLogger",),
    },
)
