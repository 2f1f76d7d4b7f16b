"""A CSV file that goes on across restarts, each step in it once."""

from __future__ import annotations

import csv
import io
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import lightning.pytorch.loggers as lightning_loggers
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from harness.loggers.secrets import without_secrets
from harness.support.files import replacing
from harness.support.warn import OneWarning, is_rank_zero

__all__ = ["CSVLogger"]


class CSVLogger(lightning_loggers.CSVLogger):
    """Lightning's CSV logger, ``metrics.csv`` and ``hparams.yaml``, for jobs that are interrupted and for full disks.

    Rows are appended as they come; only a new column writes the file again. A process that is killed leaves at most
    one torn line at the end, which is dropped when the file is continued. If a write fails, a warning says so once, the
    rows wait in memory, and are written when there is room again.

    A file of before is continued after :meth:`resume_from`. Without it the job starts at its beginning: the file of
    before is kept beside the new one as ``metrics.1.csv``.

    Args:
        save_dir: directory of the output, on a file system of this machine.
        name: folder in it; an empty name for none.
        version: folder in that; numbered ones if not given.
        prefix: put before the keys, with a ``-``.
        flush_logs_every_n_steps: rows are written at steps that are multiples of it, and whenever the trainer asks.
    """

    @property
    def experiment(self) -> _CSVFile:  # type: ignore[override]
        """The file; off rank 0 a dummy that writes nothing."""
        if not is_rank_zero():
            return cast(_CSVFile, DummyExperiment())
        if self._experiment is None:
            self._experiment = cast(Any, _CSVFile(Path(self.log_dir)))
        return cast(_CSVFile, self._experiment)

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Continue the file of before, from a checkpoint of ``step`` optimizer steps.

        Its rows of later steps are dropped, since that work is done again. Call it after the checkpoint has been
        loaded, and before anything is logged.
        """
        self.experiment.resume_from(step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write rows that are still in memory."""
        if self._experiment is not None:
            self.experiment.save(now=True)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Write settings to ``hparams.yaml``, without the secrets among them."""
        settings = vars(params) if isinstance(params, Namespace) else dict(params or {})
        self.experiment.log_hparams(without_secrets(settings))


class _CSVFile:
    """The file of a :class:`CSVLogger`, which Lightning calls the experiment of a logger."""

    longest_wait = 100_000
    """Rows that wait in memory when they cannot be written; older ones are forgotten."""
    seconds_between_attempts = 10.0
    """After a write has failed: each attempt costs the training a moment."""

    def __init__(self, folder: Path) -> None:
        self.log_dir = str(folder)
        self.path = folder / "metrics.csv"
        self.metrics: list[dict[str, Any]] = []  # rows that have not been written
        self.metrics_file_path = str(self.path)
        self.hparams: dict[str, Any] = {}
        self._columns: list[str] = []  # of the file
        self._size: int | None = None  # bytes up to the end of the last whole row; None before the file is opened
        self._next_attempt = 0.0
        self._warn = OneWarning()

    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams.update(params)
        path = Path(self.log_dir, "hparams.yaml")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_hparams_to_yaml(str(path), self.hparams)
        except OSError as error:
            self._warn(f"{path} cannot be written ({error}); the training goes on without it.")

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics_dict.items()}
        self.metrics.append({**values, "step": len(self.metrics) if step is None else step})
        if len(self.metrics) > self.longest_wait:
            del self.metrics[: -self.longest_wait]

    def save(self, now: bool = False) -> None:
        if not self.metrics:
            return
        if not now and time.monotonic() < self._next_attempt:
            return
        try:
            self._write()
        except (OSError, csv.Error) as error:
            self._next_attempt = time.monotonic() + self.seconds_between_attempts
            self._warn(
                f"{self.path} cannot be written ({error}). The training goes on; rows wait in memory until they can "
                f"be. Is the disk full, or the quota used up?"
            )

    def resume_from(self, step: int) -> None:
        try:
            self._keep(step)
        except (OSError, ValueError, csv.Error) as error:
            self._warn(f"{self.path} cannot be continued ({error}); the training goes on.")

    def _write(self) -> None:
        if self._size is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._put_aside()
            self._size = 0
        elif self._size:
            os.truncate(self.path, self._size)  # to the end of what has been written whole
        new = set().union(*self.metrics) - set(self._columns)
        if new:
            self._rewrite(sorted([*self._columns, *new]))
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(self.metrics)
        block = text.getvalue().encode()
        try:
            with self.path.open("r+b") as file:
                file.seek(self._size)
                file.write(block)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, self._size)
            raise
        self._size += len(block)
        self.metrics = []

    def _rewrite(self, columns: list[str], keep: Callable[[dict[str, str]], bool] = lambda row: True) -> None:
        """Write the file again with these columns and the rows to keep; it is the old or the new one at any time."""
        with replacing(self.path) as part:
            with part.open("w", newline="") as new:
                writer = csv.DictWriter(new, columns)
                writer.writeheader()
                if self._size:
                    with self.path.open(newline="") as old:
                        for row in csv.DictReader(_whole_lines(old)):
                            if None not in row and None not in row.values() and keep(row):
                                writer.writerow(row)
            size = part.stat().st_size
        self._columns, self._size = columns, size

    def _keep(self, step: int) -> None:
        if not self.path.is_file():
            self._size = None
            return
        with self.path.open(newline="") as file:
            header = next(csv.reader(_whole_lines(file)), [])
        if "step" not in header:
            return  # not a file of ours, or none with a row in it: put aside when something is written
        self._size = self.path.stat().st_size
        self._rewrite(header, lambda row: int(row["step"]) < step)

    def _put_aside(self) -> None:
        if self.path.is_file():
            number = 1
            while self.path.with_suffix(f".{number}.csv").exists():
                number += 1
            os.replace(self.path, self.path.with_suffix(f".{number}.csv"))


def _whole_lines(file: io.TextIOBase | Any) -> Any:
    """Lines that have an end: the last one may have been torn."""
    return (line for line in file if line.endswith("\n"))
