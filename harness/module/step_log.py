"""Values of logged training steps, on their way from the device to the loggers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch import Trainer

from harness.metrics import MetricsManager, Report, Values
from harness.module.reporting import leave_out, log_to_all, step_row
from harness.support.lightning_private import logged_step
from harness.support.log_keys import TRAIN_LOSS, LogKeys

__all__ = ["StepLog"]


class StepLog:
    """Log of training steps.

    A GPU would pause where the host reads values in the middle of a step: they are copied behind the work that the GPU
    has been given, and read once the optimizer's step has been handed to it.

    Args:
        loss: manager of the loss.

    Attributes:
        latest: values of the loss in the last step that was logged, for progress bars.
        reads_late: values are read behind the optimizer's step, and not where the step is sent; None for where they are
            on a GPU.
    """

    def __init__(self, loss: MetricsManager) -> None:
        self.latest: dict[str, float] = {}
        self.reads_late: bool | None = None
        self._loss = loss
        self._sent: tuple[int, list[Callable[[], Report]]] | None = None  # number of a step, and its values

    def send(self, trainer: Trainer, values: Sequence[Values]) -> None:
        """Start to copy the values of a step to the host, and log them if they need not be read late.

        Args:
            trainer: in the step.
            values: of the loss, and of the train metrics if there are any.
        """
        self.write(trainer)
        self._sent = logged_step(trainer), [each.report_later() for each in values]
        if not (values[0].reported.is_cuda if self.reads_late is None else self.reads_late):
            self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Log the step that was sent, if it has not been logged; the host waits for its values."""
        if self._sent is None:
            return
        (step, reports), self._sent = self._sent, None
        report, *watched = [read() for read in reports]
        self.latest = report.values
        leave_out(trainer, LogKeys(TRAIN_LOSS, "step"), report, self._loss)
        log_to_all(trainer, step_row(report, self._loss, *watched), step)
