"""Shares of the components of the loss in its gradient, and the angles between their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from harness.module import ForceFieldModule, Step, log_to_all
from harness.module.gradients import GradientMeter

__all__ = ["EVERY_NTH_LOGGED_STEP", "GradientShare"]

EVERY_NTH_LOGGED_STEP = 20
"""Logged steps from one measurement to the next, where no interval is given."""


class GradientShare(Callback):
    r"""Logs norms, shares and angles of the components' gradients at steps.

    With the gradient :math:`g_k` of a component's value and its coefficient :math:`c_k`

    * ``gradient_norm/{component}`` is :math:`c_k \lVert g_k \rVert`,
    * ``gradient_share/{component}`` is that divided by the sum over all components,
    * ``gradient_cosine/{a}:{b}`` is the cosine of the angle between :math:`g_a` and :math:`g_b` for each pair: 1 where
      a step for one of them helps the other, 0 where they do not mind, below 0 where they are in conflict.

    Components are those in the weighted sum, in the user's order. One without data in a step, or with the coefficient
    0, has a norm and share of 0 and no cosine (NaN). The numbers are those of one process on the data of all ranks, and
    of the whole step under gradient accumulation.

    Measuring does not change the training, not by a bit. It costs, on every n-th step, one further backward pass for
    each component, memory for as many gradients, and one all-reduce of number of components × number of parameters
    numbers; the host waits for the result. The forward pass is that of the training. Gradients with respect to a few
    parameters, such as those of the last layers, are cheaper. Steps in between cost nothing, and have none of the
    numbers.

    Args:
        every_n_steps: optimizer steps from one measurement to the next; None for every 20th step that the trainer logs
            (:data:`EVERY_NTH_LOGGED_STEP`), so at steps that have the other values too.
        parameters: prefixes of names of the model's parameters that gradients are taken of; None for all.

    Raises:
        ValueError, TypeError: no whole number above 0, or no list of names.
    """

    logs_gradients = True
    """Measurements are logged here; another callback with the same meter need not log them."""

    def __init__(self, every_n_steps: int | None = None, parameters: Sequence[str] | None = None) -> None:
        self._follows_log = every_n_steps is None
        self._meter = GradientMeter(EVERY_NTH_LOGGED_STEP if every_n_steps is None else every_n_steps, parameters)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a training whose gradients cannot be measured."""
        self.check_job(trainer, pl_module, stage)

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a training whose gradients cannot be measured.

        Raises:
            TypeError, ValueError: with the reason and an alternative.
        """
        if stage == "fit":
            self._meter.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the interval, and warn of a training that ends before the first measurement."""
        if self._follows_log:
            self._meter.every_n_steps = EVERY_NTH_LOGGED_STEP * trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._meter.begin(trainer)

    def on_train_values(self, trainer: Trainer, pl_module: ForceFieldModule, step: Step) -> None:
        """Measure and log on an n-th step."""
        measured = self._meter.measure(trainer, pl_module, step)
        if measured is not None:
            log_to_all(trainer, measured.to_log())
