"""A callback of your own: how large predicted forces are beside their labels, while a model learns.

PYTHONPATH=examples/extend harness-train +callbacks.force_scale._target_=force_scale.ForceScale
"""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer

from harness import ForceFieldModule
from harness.distributed import sum_over_ranks
from harness.module import Step


class ForceScale(Callback):
    r"""Logs ``force_scale/ratio``: the root mean square of the predicted forces divided by that of their labels.

    Well below 1 a model has learnt that small forces are a safe guess. The numbers are those of all ranks, of the last
    micro-batch of the step.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is a whole number, at least 1, found {every_n_steps!r}.")
        self.every_n_steps = every_n_steps

    def check_job(self, trainer: Trainer, pl_module: ForceFieldModule, stage: str) -> None:
        """Refuse a training that this cannot watch, before it begins.

        Raises:
            ValueError: no component of the loss is one of forces.
        """
        names = pl_module.loss.value_names
        if stage == "fit" and not any("forces" in name for name in names):
            raise ValueError(
                f"ForceScale compares predicted forces with labels, but the loss has none: its values are "
                f"{', '.join(names)}. Choose loss=energy_force, or leave the callback out."
            )

    def on_train_values(self, trainer: Trainer, pl_module: ForceFieldModule, step: Step) -> None:
        """Look at a step between its forward and its backward pass; called on all ranks."""
        if not step.is_whole or (trainer.global_step + 1) % self.every_n_steps:
            return  # the same on all ranks, so that all of them come to the sum, or none
        labels = step.batch["forces"]
        labelled = ~labels.isnan()
        sums = torch.stack(
            [torch.where(labelled, forces, 0.0).square().sum() for forces in (step.predictions["forces"], labels)]
        )
        predicted, expected = sum_over_ranks(sums.detach(), pl_module.process_group).tolist()  # the host waits here
        if trainer.is_global_zero and expected > 0:
            row = {"force_scale/ratio": (predicted / expected) ** 0.5, "epoch": trainer.current_epoch}
            for logger in trainer.loggers:
                logger.log_metrics(row, step=trainer.global_step)
