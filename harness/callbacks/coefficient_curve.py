"""Picture of the coefficients of the loss, and of each component's contribution, by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from harness.loggers import log_image
from harness.module import ForceFieldModule, LogKeys, is_nth_step_done
from harness.support.figures import new_figure, save_figure
from harness.support.files import try_write
from harness.support.log_keys import TRAIN, TRAIN_LOSS

__all__ = ["CoefficientCurve"]

_MOST_POINTS = 2000
"""Largest number of points within epochs; of more, every second one is kept."""


class CoefficientCurve(Callback):
    """Draws ``coefficients.png`` as a training ends: coefficients, and shares of the weighted sum, by epoch.

    Above are the coefficients that each epoch ended with, normalised or as given; those of a schedule by step at each
    logged step. Below is what each component contributed to the weighted sum of the training epoch: coefficient ×
    value / weighted_sum, which sum to 1. Weights of atom types, where they move, have a panel between the two. A
    training that fails after its first epoch is drawn, too.

    Args:
        output_dir: folder of the picture; an image goes to W&B as ``train_report/coefficients``, too.
    """

    def __init__(self, output_dir: str | Path = ".") -> None:
        self.output_dir = Path(output_dir)
        self.file: Path | None = None
        """Path of the picture, once it is drawn."""
        self._history: dict[int, dict[str, tuple[float, float]]] = {}  # coefficient and share by epoch
        self._types: dict[int, dict[str, float]] = {}  # weights of atom types by epoch
        self._points: list[tuple[float, dict[str, float]]] = []  # coefficients within epochs
        self._step = 0
        self._normalisation = "normalised"

    @property
    def written_files(self) -> dict[str, list[Path]]:
        """The picture, for the end of the job."""
        return {} if self.file is None else {"coefficients": [self.file]}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the training's epoch."""
        self._step = trainer.global_step
        if isinstance(pl_module, ForceFieldModule):
            self._normalisation = pl_module.loss.normalisation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record coefficients that move by step, on steps that are logged."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_step, self._step = trainer.global_step != self._step, trainer.global_step
        if not is_step or not trainer.is_global_zero or not is_nth_step_done(trainer, every):
            return
        if not isinstance(pl_module, ForceFieldModule):
            return
        if pl_module.loss.schedule is None or pl_module.loss.schedule_interval != "step":
            return
        position = trainer.current_epoch + batch_idx / trainer.num_training_batches
        self._points.append((position, pl_module.loss.effective_coeffs()))
        if len(self._points) > _MOST_POINTS:
            del self._points[1::2]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch before, which is complete now."""
        self._take_note(trainer.current_epoch - 1, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        self._take_note(trainer.current_epoch - 1, pl_module)
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the epochs so far."""
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self._history:
            return
        path = self.output_dir / "coefficients.png"
        if not try_write(path, self._draw):
            return
        self.file = path
        log_image(trainer, LogKeys(TRAIN, section="report").key("coefficients"), path, epoch=max(self._history))

    def _take_note(self, epoch: int, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, ForceFieldModule):
            return
        report = pl_module.reports.get(TRAIN_LOSS)
        if report is None or epoch < 0 or epoch in self._history:
            return
        total = sum(report.contributions.values())
        self._history[epoch] = {
            name: (coeff, report.contributions[name] / total if total else 0.0) for name, coeff in report.coeffs.items()
        }
        self._types[epoch] = dict(pl_module.loss.type_weights)

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far."""
        return {
            "history": {epoch: dict(row) for epoch, row in self._history.items()},
            "types": {epoch: dict(row) for epoch, row in self._types.items()},
            "points": [[position, dict(coeffs)] for position, coeffs in self._points],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the epochs of a checkpoint."""
        self._history = {int(epoch): dict(row) for epoch, row in state_dict["history"].items()}
        self._types = {int(epoch): dict(row) for epoch, row in state_dict.get("types", {}).items()}
        self._points = [(position, dict(coeffs)) for position, coeffs in state_dict.get("points", [])]

    def _draw(self, path: Path) -> None:
        from matplotlib.ticker import MaxNLocator

        epochs = sorted(self._history)
        edges = np.array([*epochs, epochs[-1] + 1])  # what is of an epoch is drawn from its number to the next
        names = list(dict.fromkeys(name for epoch in epochs for name in self._history[epoch]))
        table = np.array([[self._history[epoch].get(name, (np.nan, 0.0)) for name in names] for epoch in epochs])
        types = self._moving_types(epochs)
        figure = new_figure(7, 5.4 if not types else 7.8, layout="constrained")
        above, *between, below = figure.subplots(3 if types else 2, 1, sharex=True)
        if self._points:
            positions = [position for position, _ in self._points]
            moved = np.array([[coeffs.get(name, np.nan) for name in names] for _, coeffs in self._points])
            above.plot(positions, moved, label=names)
        else:
            moved = table[..., 0]
            _draw_steps(above, edges, moved, names)
        positive = moved[np.isfinite(moved) & (moved > 0)]
        if positive.size and positive.min() * 100 < positive.max():
            above.set_yscale("log")
        above.set_ylabel("coefficient")
        above.set_title(f"Coefficients of the loss, {self._normalisation.replace('_', ' ')}")
        if between:
            weights = np.array([[self._types[epoch].get(name, np.nan) for name in types] for epoch in epochs])
            _draw_steps(between[0], edges, weights, types)
            between[0].set_ylim(bottom=0)
            between[0].set_ylabel("weight")
            between[0].set_title("Weights of atom types within their component")
            between[0].legend(fontsize=7, ncols=4, frameon=False)
        shares = np.nan_to_num(table[..., 1])
        below.stackplot(edges, np.vstack([shares, shares[-1:]]).T, step="post", labels=names)
        below.set_ylim(0, 1)
        below.set_ylabel("share of weighted_sum")
        below.set_title("What each component contributes: coefficient times value")
        below.set_xlabel("epoch")
        below.set_xlim(edges[0], edges[-1])
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 4))
        save_figure(figure, path, dpi=100)

    def _moving_types(self, epochs: Sequence[int]) -> list[str]:
        """Weights of atom types that change in the training."""
        names = dict.fromkeys(name for epoch in epochs for name in self._types.get(epoch, {}))
        return [name for name in names if len({self._types.get(epoch, {}).get(name) for epoch in epochs}) > 1]


def _draw_steps(axis: Any, edges: np.ndarray, table: np.ndarray, names: Sequence[str]) -> None:
    for column, name in enumerate(names):
        values = table[:, column]
        axis.step(edges, np.append(values, values[-1]), where="post", label=name)
