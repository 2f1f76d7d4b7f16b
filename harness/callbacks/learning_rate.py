"""Learning rates of the optimizer's groups, as the optimizer steps with them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from harness.module import ForceFieldModule, logged_step
from harness.module.schedule_following import epoch_of

__all__ = ["UsedLearningRates"]


class UsedLearningRates(LearningRateMonitor):
    """Logs the learning rate of each group of parameters, under a warm-up and the stage of a schedule.

    Its arguments and keys, such as ``lr-Adam``, are those of Lightning's callback, which logs what the scheduler
    says alone.
    """

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log on the steps that are logged; on others there is nothing to do."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not (every and ((logged_step(trainer) + 1) % every == 0 or trainer.should_stop)):
            return
        with _in_effect(trainer, args[0], args[2] if len(args) > 2 else kwargs["batch_idx"]):
            super().on_train_batch_start(trainer, *args, **kwargs)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log at the start of an epoch."""
        with _in_effect(trainer, args[0], 0):
            super().on_train_epoch_start(trainer, *args, **kwargs)


def _in_effect(trainer: Trainer, module: LightningModule, batch_idx: int) -> AbstractContextManager[None]:
    """Settings of the step that the batch belongs to."""
    if not isinstance(module, ForceFieldModule):
        return nullcontext()
    epoch = epoch_of(trainer, batch_idx, module.loss)
    return module.optimizer_settings.in_effect(trainer.optimizers[0], epoch, trainer.global_step)
