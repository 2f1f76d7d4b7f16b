"""Errors by atom type as tables, charts and pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from harness.callbacks.tables import atoms_behind, component_unit
from harness.loggers import WandbLogger, wandb_loggers
from harness.metrics import MeanAbsoluteError, MetricsManager, RootMeanSquaredError
from harness.module import ForceFieldModule, LogKeys, logged_step
from harness.module.reporting import types_with_data
from harness.support.checks import whole_number
from harness.support.figures import new_figure, save_figure
from harness.support.files import try_write
from harness.support.log_keys import stage_of_set

__all__ = ["PerTypeReport"]

_TYPES_IN_A_ROW = 30
_BARS_WITH_NUMBERS = 10
"""Largest number of bars with their values above them."""


class PerTypeReport(Callback):
    """Shows the components that are ``per_type``, type by type, with the number of atoms behind each value.

    After a validation, W&B gets the table ``val{i}_report/per_type`` with a row for each atom type, and the bar chart
    ``val{i}_report/per_type_{component}`` for each component that is an RMSE or MAE (the first component if none is).
    After a test, likewise with ``test{i}``, and ``test{i}_per_type.csv`` and ``per_type_test{i}.png`` are written.
    Without per-type components nothing happens. Types without data are in the CSV file alone.

    Args:
        every_n_epochs: epochs between reports of validations.
        output_dir: folder of the files of a test; none are written if it is None.
    """

    def __init__(self, every_n_epochs: int = 1, output_dir: str | Path | None = None) -> None:
        whole_number("every_n_epochs", every_n_epochs)
        self.every_n_epochs = every_n_epochs
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.files: list[Path] = []
        """Pictures written so far."""

    @property
    def written_files(self) -> dict[str, list[Path]]:
        """Pictures of the last test, for the end of the job."""
        return {"atom types": self.files}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send tables and charts of the validation sets."""
        if not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._report(trainer, pl_module, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the pictures of an earlier test."""
        self.files = []

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send tables and charts of the test sets, and write them."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: LightningModule, what: Literal["val", "test"]) -> None:
        if not trainer.is_global_zero or not isinstance(module, ForceFieldModule):
            return
        for index, manager in enumerate(module.val_metrics if what == "val" else module.test_metrics):
            stage = stage_of_set(what, index)
            if not isinstance(manager, MetricsManager) or stage not in module.reports:
                continue
            if not any(entry.per_type for entry in manager.entries.values()):
                continue
            report = module.reports[stage]
            table = _Table.of(manager, report.values, atoms_behind(manager, report))
            present = table.of_types(types_with_data(report, manager))
            for logger in wandb_loggers(trainer):
                self._send(logger, stage, present, step=logged_step(trainer), epoch=trainer.current_epoch)
            if what == "test" and self.output_dir is not None:
                try_write(self.output_dir / f"{stage}_per_type.csv", table.write)
                picture = self.output_dir / f"per_type_{stage}.png"
                if try_write(picture, partial(present.draw, title=f"Errors of test set {index} by atom type")):
                    self.files.append(picture)

    @staticmethod
    def _send(logger: WandbLogger, stage: str, table: _Table, **when: int) -> None:
        keys = LogKeys(stage, section="report")
        logger.log_table(keys.key("per_type"), columns=table.columns, data=table.rows, **when)
        for name in table.charted:
            unit = f" ({table.units[name]})" if table.units[name] else ""
            logger.log_bar_chart(
                keys.key(f"per_type_{name}"),
                table.type_names,
                table.values[name],
                label_name="type",
                value_name=name,
                title=f"{name}{unit} of {stage}",
                **when,
            )


class _Table:
    """Values of the per-type components of a manager.

    Args:
        type_names: names of the types.
        values: by component, one for each type.
        atoms: number of atoms behind them; None where it is not known.
        units: by component.
        charted: components to draw.
    """

    def __init__(
        self,
        type_names: Sequence[str],
        values: Mapping[str, list[float]],
        atoms: Mapping[str, list[float | None]],
        units: Mapping[str, str],
        charted: Sequence[str],
    ) -> None:
        self.type_names, self.values, self.units, self.charted = list(type_names), values, units, charted
        self.all_atoms = atoms
        self.atoms = next(iter(atoms.values()), [])
        others = {name: each for name, each in atoms.items() if each != self.atoms}
        self.columns = ["type", *values, "atoms", *(f"atoms of {name}" for name in others)]
        columns = [*values.values(), *(list(map(_whole, each)) for each in (self.atoms, *others.values()))]
        self.rows = [list(row) for row in zip(self.type_names, *columns, strict=True)]

    @classmethod
    def of(
        cls, manager: MetricsManager, values: Mapping[str, float], atoms: Mapping[str, list[float | None]]
    ) -> _Table:
        entries = [entry for entry in manager.entries.values() if entry.per_type]
        errors = [e.name for e in entries if isinstance(e.metric, RootMeanSquaredError | MeanAbsoluteError)]
        return cls(
            manager.type_names,
            {entry.name: [values[key] for key in entry.type_keys(manager.type_names)] for entry in entries},
            atoms,
            {entry.name: component_unit(entry) for entry in entries},
            errors or [entry.name for entry in entries[:1]],
        )

    def of_types(self, names: Sequence[str]) -> _Table:
        """The same table of some of the types; of all if none is named."""
        chosen = [at for at, name in enumerate(self.type_names) if name in names or not names]
        values = {name: [each[at] for at in chosen] for name, each in self.values.items()}
        atoms = {name: [each[at] for at in chosen] for name, each in self.all_atoms.items()}
        return _Table([self.type_names[at] for at in chosen], values, atoms, self.units, self.charted)

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *self.rows])

    def draw(self, path: Path, title: str) -> None:
        """Bars of the charted components, a panel for each unit; many types are broken into several rows."""
        units = list(dict.fromkeys(self.units[name] for name in self.charted))
        num_rows = math.ceil(len(self.type_names) / _TYPES_IN_A_ROW)
        parts = np.array_split(np.arange(len(self.type_names)), num_rows)
        longest = max(map(len, parts))
        size = min(max(2.0 + 0.8 * longest, 6.0), 15.0), 0.6 + 2.9 * num_rows * len(units)
        figure = new_figure(*size, layout="constrained")
        panels: Any = figure.subplots(num_rows * len(units), 1, squeeze=False)[:, 0]
        figure.suptitle(title)
        for number, unit in enumerate(units):
            names = [name for name in self.charted if self.units[name] == unit]
            highest = max((v for name in names for v in self.values[name] if math.isfinite(v)), default=1.0) or 1.0
            for axis, part in zip(panels[number * num_rows :], parts, strict=False):
                self._draw_row(axis, names, part)
                axis.set_xlim(-0.6, longest - 0.4)
                axis.set_ylim(0, 1.12 * highest)
                axis.set_ylabel(unit or "value")
            panels[number * num_rows].legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9
            )
        panels[-1].set_xlabel("atom type, and number of atoms")
        save_figure(figure, path, dpi=110)

    def _draw_row(self, axis: Any, names: Sequence[str], part: np.ndarray) -> None:
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            heights = np.array([self.values[name][at] for at in part])
            places = np.arange(len(part)) + (number - (len(names) - 1) / 2) * width
            bars = axis.bar(places, np.nan_to_num(heights), width * 0.94, label=name)
            if len(self.type_names) * len(names) <= _BARS_WITH_NUMBERS:
                known = [f"{height:.3g}" if math.isfinite(height) else "" for height in heights]
                axis.bar_label(bars, known, fontsize=8, padding=1)
        for place, at in enumerate(part):
            if not any(math.isfinite(self.values[name][at]) for name in names):
                axis.text(place, 0, " no data", rotation=90, ha="center", va="bottom", fontsize=8, color="0.5")
        labels = [f"{self.type_names[at]}\n{_short(self.atoms[at])}" for at in part]
        axis.set_xticks(np.arange(len(part)), labels, fontsize=9 if len(part) <= 20 else 8)
        axis.tick_params(axis="x", length=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.5, alpha=0.5)
        axis.set_axisbelow(True)


def _whole(number: float | None) -> float | None:
    """A number of atoms; not a whole one where some of an atom's components have no label."""
    return int(number) if number is not None and float(number).is_integer() else number


def _short(number: float | None) -> str:
    if number is None:
        return "?"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= max(unit, 1e4):
            return f"{number / unit:.3g}{letter}"
    return f"{number:.0f}"
