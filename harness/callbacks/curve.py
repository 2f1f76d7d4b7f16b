"""A picture of how the coefficients of the loss moved, and of what each component contributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from harness.callbacks.writing import is_written
from harness.loggers import WandbLogger
from harness.module import ForceFieldModule

__all__ = ["CoefficientCurve"]


class CoefficientCurve(Callback):
    """Draws ``coefficients.png`` at the end of a training: coefficients, and shares of the weighted sum, by epoch.

    Above are the normalised coefficients that each epoch ended with, below what each component contributed to the
    weighted sum of the training epoch: coefficient × value / weighted_sum. Both sum to 1.

    Args:
        output_dir: folder of the picture; an image goes to W&B as ``train_report/coefficients``, too.
    """

    def __init__(self, output_dir: str | Path = ".") -> None:
        self.output_dir = Path(output_dir)
        self.file: Path | None = None
        """The picture, once it is drawn."""
        self._history: dict[int, dict[str, tuple[float, float]]] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the epoch before, which is complete now."""
        self._take_note(trainer.current_epoch - 1, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._take_note(trainer.current_epoch - 1, pl_module)
        if trainer.is_global_zero and self._history:
            path = self.output_dir / "coefficients.png"
            if not is_written(path, lambda file: _draw(file, self._history)):
                return
            self.file = path
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    when = {"step": trainer.global_step, "epoch": trainer.current_epoch - 1}
                    logger.log_image("train_report/coefficients", [str(self.file)], **when)

    def _take_note(self, epoch: int, pl_module: LightningModule) -> None:
        report = pl_module.reports.get("train_loss") if isinstance(pl_module, ForceFieldModule) else None
        if report is None or epoch < 0:
            return
        total = sum(report.contributions.values())
        self._history[epoch] = {
            name: (coeff, report.contributions[name] / total if total else 0.0) for name, coeff in report.coeffs.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far."""
        return {"history": {epoch: dict(row) for epoch, row in self._history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epochs so far."""
        self._history = {int(epoch): dict(row) for epoch, row in state_dict["history"].items()}


def _draw(path: Path, history: dict[int, dict[str, tuple[float, float]]]) -> None:
    # Figure without pyplot: no global state and no display
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = sorted(history)
    names = list(dict.fromkeys(name for epoch in epochs for name in history[epoch]))
    table = np.array([[history[epoch].get(name, (np.nan, 0.0)) for name in names] for epoch in epochs])
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    # steps: a coefficient holds for a whole epoch, from its number to the next
    edges = np.array([*epochs, epochs[-1] + 1])
    for column, name in enumerate(names):
        values = table[:, column, 0]
        above.step(edges, np.append(values, values[-1]), where="post", label=name)
    positive = table[..., 0][np.isfinite(table[..., 0]) & (table[..., 0] > 0)]
    if positive.size and positive.min() * 100 < positive.max():
        above.set_yscale("log")
    above.set_ylabel("coefficient")
    above.set_title("Coefficients of the loss, normalised")
    shares = np.nan_to_num(table[..., 1])
    below.stackplot(edges, np.vstack([shares, shares[-1:]]).T, step="post", labels=names)
    below.set_ylim(0, 1)
    below.set_ylabel("share of weighted_sum")
    below.set_title("What each component contributes: coefficient times value")
    below.set_xlabel("epoch")
    below.set_xlim(edges[0], edges[-1])
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 4))
    figure.savefig(path, dpi=100)
