"""The best epoch of a training in the summary of its W&B run."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from harness.loggers import wandb_loggers
from harness.module import ForceFieldModule, LogKeys, logged_step
from harness.support.log_keys import TRAINING_STAGES

__all__ = ["BestEpoch"]


class BestEpoch(Callback):
    """Keeps the validation with the smallest monitored value, and puts it into the summary of the W&B run.

    The summary has ``best/epoch``, ``best/step`` (as values are logged), the monitored value as ``best/{monitor}``, and
    every value of that validation, such as ``best/val0_epoch/forces_rmse``: what a table of runs is sorted by, where
    the minimum of each value by itself would mix epochs. A training that is continued goes on from the best of before.

    Args:
        monitor: key of a value of an epoch, such as ``val0_epoch/weighted_sum``; smaller is better.
    """

    def __init__(self, monitor: str = "val0_epoch/weighted_sum") -> None:
        self.monitor = monitor
        self.best: dict[str, float] = {}
        """Entries of the summary by key."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best values so far into the summary of a run that is resumed."""
        self._send(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the monitored value with the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not isinstance(pl_module, ForceFieldModule):
            return
        value = self._monitored(trainer, pl_module)
        if not value < self.best.get(f"best/{self.monitor}", math.inf):  # NaN is never the best
            return
        self.best = {"best/epoch": trainer.current_epoch, "best/step": logged_step(trainer)}
        self.best[f"best/{self.monitor}"] = value
        for stage, report in pl_module.reports.items():
            if stage.startswith("val"):
                self.best |= {f"best/{key}": value for key, value in LogKeys(stage).row(report.values).items()}
        self._send(trainer)

    def _monitored(self, trainer: Trainer, module: ForceFieldModule) -> float:
        found = LogKeys.of_error(self.monitor)
        if found is not None:
            keys, name = found
            reports = module.reports | module.training_so_far() if keys.stage in TRAINING_STAGES else module.reports
            if keys.stage in reports:
                return reports[keys.stage].values.get(name, math.nan)
        return float(trainer.callback_metrics.get(self.monitor, math.nan))

    def _send(self, trainer: Trainer) -> None:
        if self.best:
            for logger in wandb_loggers(trainer):
                logger.log_summary(self.best)

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"monitor": self.monitor, "best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the best values of a checkpoint, unless another value is monitored now."""
        if state_dict["monitor"] == self.monitor:
            self.best = dict(state_dict["best"])
