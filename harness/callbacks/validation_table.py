"""A table in the terminal after each validation: every component, its best value so far, and the atom types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.measure import Measurement

from harness.callbacks.tables import COLUMNS, is_better, output_console, print_above_bar, values_table
from harness.metrics import WEIGHTED_SUM, MetricsManager
from harness.module import ForceFieldModule, logged_step
from harness.module.reporting import types_with_data
from harness.support.checks import whole_number
from harness.support.log_keys import TRAIN_LOSS, stage_of_set

__all__ = ["ValidationTable"]

_WIDEST = 1000


class ValidationTable(Callback):
    """Prints a table of each validation set on rank 0, above the progress bar.

    A line above it has the epoch, the step, and the weighted sum of the training in this epoch as the sum that it is,
    of coefficients times components.

    Args:
        every_n_epochs: epochs between tables.
        columns: which there are, beside the names of the components: ``value``, ``best`` so far, its ``epoch``,
            ``types`` and ``unit``.
        max_types: the most atom types that have columns of their own; of more, only their number is shown. Types that
            the data do not have are no columns.

    Raises:
        ValueError: an unknown column, or a number that is none.
    """

    best_of = "val"
    """Values that its state has the best of: those of the validation, which start anew where they are others."""

    def __init__(self, every_n_epochs: int = 1, columns: Sequence[str] = COLUMNS, max_types: int = 8) -> None:
        whole_number("every_n_epochs", every_n_epochs)
        whole_number("max_types", max_types, least=0)
        if unknown := [name for name in columns if name not in COLUMNS]:
            raise ValueError(f"Unknown columns {unknown}. Valid ones: {', '.join(COLUMNS)}.")
        self.every_n_epochs = every_n_epochs
        self.columns = tuple(columns)
        self.max_types = max_types
        self._best: dict[str, dict[str, tuple[float, int]]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the best values, and print the table."""
        if trainer.sanity_checking or not isinstance(pl_module, ForceFieldModule):
            return
        prints = (trainer.current_epoch + 1) % self.every_n_epochs == 0 and trainer.is_global_zero
        console, tables = output_console(), []
        for index, manager in enumerate(pl_module.val_metrics):
            stage = stage_of_set("val", index)
            if not isinstance(manager, MetricsManager) or stage not in pl_module.reports:
                continue
            report, best = pl_module.reports[stage], self._best.setdefault(stage, {})
            values, present = report.values, types_with_data(report, manager)
            of_sets = [key for entry in manager.entries.values() for key in entry.set_keys()]
            for name in (*manager, *of_sets, WEIGHTED_SUM):
                if is_better(manager, name, values.get(name, math.nan), best.get(name, (math.nan, 0))[0]):
                    best[name] = values[name], trainer.current_epoch
            if prints:
                title = f"validation set {index}" if len(pl_module.val_metrics) > 1 else ""
                table = values_table(title, manager, values, best, self.columns, self.max_types, present)
                needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
                if needed > console.width:  # a narrow terminal
                    table = values_table(title, manager, values, best, self.columns, 0, present)
                tables.append(table)
        if tables:
            print_above_bar(trainer, console, _heading(trainer, pl_module), *tables)

    def state_dict(self) -> dict[str, Any]:
        """The best values so far."""
        return {
            "best": {stage: {name: list(each) for name, each in best.items()} for stage, best in self._best.items()}
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the best values of a checkpoint."""
        self._best = {
            stage: {name: (float(value), int(epoch)) for name, (value, epoch) in best.items()}
            for stage, best in state_dict["best"].items()
        }


def _heading(trainer: Trainer, module: ForceFieldModule) -> str:
    text = f"epoch {trainer.current_epoch}, step {logged_step(trainer)}"
    if trainer.state.fn != "fit":
        return text
    report = module.training_so_far()[TRAIN_LOSS]
    weighted = {name: coeff for name, coeff in report.coeffs.items() if coeff}
    terms = " + ".join(f"{coeff:.3g} * {report.values[name]:.3g} ({name})" for name, coeff in weighted.items())
    return f"{text}: training {WEIGHTED_SUM} {report.values.get(WEIGHTED_SUM, math.nan):.5g} = {terms}"
