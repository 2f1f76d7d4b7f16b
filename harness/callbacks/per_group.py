"""Errors by group of frames as tables in the terminal, in W&B and in files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from harness.callbacks.tables import component_unit, number_text, output_console, print_above_bar
from harness.loggers import wandb_loggers
from harness.metrics import MetricsManager, Report
from harness.module import ForceFieldModule, LogKeys, logged_step
from harness.support.checks import whole_number
from harness.support.files import try_write
from harness.support.log_keys import stage_of_set

__all__ = ["PerGroupReport"]


class PerGroupReport(Callback):
    """Shows every component for each group of frames, where the data have groups (``group_names``).

    The groups are measured in the row of the whole, so that they cost no further sum over the ranks. Components that
    are metrics of other packages are shown where they are ``per_group`` themselves.

    After a validation, a table is printed below that of the whole, W&B gets it as ``val{i}_report/per_group``, and
    ``val{i}_per_group.csv`` has the last one; after a test likewise with ``test{i}``. Groups without frames in a set
    are left out. ``frames`` is the number of frames, whatever their weights and labels. Errors are those of frames by
    their weights; of a group whose frames all have weight 0, those of its frames counted once each.

    Args:
        every_n_epochs: epochs between reports of validations.
        max_groups: the most groups in the terminal.
        output_dir: folder of the files; none are written if it is None.

    Raises:
        ValueError: a number that is none.
    """

    def __init__(self, every_n_epochs: int = 1, max_groups: int = 12, output_dir: str | Path | None = None) -> None:
        whole_number("every_n_epochs", every_n_epochs)
        whole_number("max_groups", max_groups, least=0)
        self.every_n_epochs = every_n_epochs
        self.max_groups = max_groups
        self.output_dir = None if output_dir is None else Path(output_dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the metrics of validation and test keep their errors by group."""
        if isinstance(pl_module, ForceFieldModule):
            for manager in (*pl_module.val_metrics, *pl_module.test_metrics):
                if isinstance(manager, MetricsManager):
                    manager.keep_by_group()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the validation sets."""
        if not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the test sets."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: LightningModule, what: Literal["val", "test"]) -> None:
        if not trainer.is_global_zero or not isinstance(module, ForceFieldModule):
            return
        console, tables = output_console(), []
        for index, manager in enumerate(module.val_metrics if what == "val" else module.test_metrics):
            stage = stage_of_set(what, index)
            if not isinstance(manager, MetricsManager) or stage not in module.reports:
                continue
            found = _Groups.of(manager, module.reports[stage])
            if not found.names:
                continue
            title = f"{'validation' if what == 'val' else 'test'} set {index} by group"
            tables += found.tables(title, console.width, self.max_groups)
            for logger in wandb_loggers(trainer):
                key = LogKeys(stage, section="report").key("per_group")
                when = {"step": logged_step(trainer), "epoch": trainer.current_epoch}
                logger.log_table(key, columns=found.columns, data=found.rows, **when)
            if self.output_dir is not None:
                try_write(self.output_dir / f"{stage}_per_group.csv", found.write)
        if tables:
            print_above_bar(trainer, console, *tables)


@dataclass(frozen=True)
class _Groups:
    """Values of the components of a manager, for the groups with frames.

    Attributes:
        names: of the groups.
        frames: number of frames of each, empty where it is not known.
        values: by component, one for each group.
        units: by component.
    """

    names: list[str]
    frames: list[int]
    values: Mapping[str, list[float]]
    units: Mapping[str, str]

    @classmethod
    def of(cls, manager: MetricsManager, report: Report) -> _Groups:
        groups, frames = manager.names.groups, report.frames_by_group
        has_values = [any(math.isfinite(each[at]) for each in report.by_group.values()) for at in range(len(groups))]
        kept = [at for at, is_kept in enumerate(frames or has_values) if is_kept]
        return cls(
            [groups[at] for at in kept],
            [frames[at] for at in kept] if frames else [],
            # in the user's order
            {name: [report.by_group[name][at] for at in kept] for name in manager if name in report.by_group},
            {name: component_unit(entry) for name, entry in manager.entries.items()},
        )

    @property
    def columns(self) -> list[str]:
        return ["group", *(["frames"] if self.frames else []), *self.values]

    @property
    def rows(self) -> list[list[Any]]:
        """A row for each group."""
        columns = [*([self.frames] if self.frames else []), *self.values.values()]
        return [list(row) for row in zip(self.names, *columns, strict=True)]

    def write(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])

    def tables(self, title: str, width: int, max_groups: int) -> list[Table]:
        """Tables with a row for each component and a column for each group; several where these need more width."""
        lines = {name: [number_text(value) for value in values] for name, values in self.values.items()}
        if self.frames:
            lines = {"frames": [str(number) for number in self.frames], **lines}
        shown = list(range(min(len(self.names), max_groups)))
        lengths = [max(len(self.names[at]), *(len(texts[at]) for texts in lines.values())) for at in shown]
        taken = max(map(len, lines)) + max(map(len, self.units.values())) + 7
        tables = []
        for number, part in enumerate(_parts(lengths, width - taken)):
            table = Table(title=title if number == 0 else None, title_justify="left", caption_justify="left")
            table.add_column("component", no_wrap=True)
            for at in part:
                table.add_column(self.names[at], justify="right")
            table.add_column("unit")
            for name, texts in lines.items():
                table.add_row(name, *(texts[at] for at in part), self.units.get(name, ""))
            tables.append(table)
        if tables and len(self.names) > max_groups:
            tables[-1].caption = f"{len(self.names) - max_groups} further groups: in W&B and the output directory"
        return tables


def _parts(lengths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Columns of these lengths, in parts that fit into a width; each has one at least."""
    part: list[int] = []
    used = 0
    for column, length in enumerate(lengths):
        if part and used + length + 3 > width:
            yield part
            part, used = [], 0
        part.append(column)
        used += length + 3  # the line between columns, and a space on both sides
    if part:
        yield part
