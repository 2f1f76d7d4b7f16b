"""A W&B run that goes on across restarts, and that nothing which happens to W&B can stop or slow down."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import queue
import subprocess
import threading
import time
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch.loggers as lightning_loggers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from harness.loggers.journal import Journal, Media, rows_in
from harness.loggers.secrets import arguments_have_secrets, without_secrets
from harness.loggers.wandb_files import STEP, inspected, mend, row_key, rows_of
from harness.support.text import one_line
from harness.support.warn import OneWarning, is_rank_zero

__all__ = ["WandbLogger"]

_SMALLEST_SPACE = 2**16
"""Bytes on a disk below which W&B, which writes blocks of 32 KiB, cannot go on."""
_GRACE = 5.0
"""Seconds that W&B gets beyond a time limit of its own to say so."""
_LONGEST_TITLE = 63
"""Characters of an alert's title that W&B takes."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Numbers as W&B writes them to its files."""


class WandbLogger(lightning_loggers.WandbLogger):
    """Lightning's W&B logger, with every call into W&B on a thread of its own, and one run for a job that is restarted.

    The training hands values to a queue and never waits for W&B. Where W&B cannot start, fails or does not answer, one
    warning says so, and the training goes on without it: up to ``max_waiting`` calls wait, later ones are dropped. A
    run whose server cannot be reached is kept on disk. :meth:`finish` waits for the queue, up to a time limit. Until
    then all rows are in ``<save_dir>/wandb/rows.jsonl`` as well, written before they are handed over.

    The id of the run is kept in ``<save_dir>/wandb_run_id``: a job that was interrupted and is started again in the
    same directory continues that run, and values that the run already has are not logged again. Offline, each start
    makes a folder of its own with the same id; ``wandb sync <save_dir>/wandb`` uploads them as one run, in their order.

    :meth:`define_axes` says what values are drawn against; :meth:`log_summary`, :meth:`log_table`,
    :meth:`log_bar_chart` and :meth:`alert` are W&B's, through the same queue.

    Args:
        save_dir: output directory of the job; ``wandb/`` and the id of the run are in it.
        offline: keep the run on disk.
        start_timeout: seconds that W&B may take to start.
        finish_timeout: seconds that :meth:`finish` waits for values to be written or uploaded.
        max_waiting: calls that wait for a W&B that is slower than the training.
        **options: the others of Lightning's logger and of ``wandb.init``, by name.
    """

    def __init__(
        self,
        save_dir: str | Path,
        *,
        offline: bool = False,
        start_timeout: float = 60.0,
        finish_timeout: float = 60.0,
        max_waiting: int = 5000,
        **options: Any,
    ) -> None:
        super().__init__(save_dir=save_dir, offline=offline, **options)
        self._offline = False  # Lightning would set WANDB_MODE for this process and all that it starts
        if offline:
            self._wandb_init["mode"] = "offline"
        self.start_timeout = start_timeout
        self.finish_timeout = finish_timeout
        self.max_waiting = max_waiting
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # W&B warns of it even if it is None
        self._given_id = self._id
        self._prepare()

    def _prepare(self) -> None:
        """What belongs to this process and cannot be sent to another one."""
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(self.max_waiting)
        self._worker: threading.Thread | None = None
        self._started, self._lost, self._finished = threading.Event(), threading.Event(), False
        self._exit_code: int | None = None
        self._logged: Counter[tuple[int, frozenset[str]]] = Counter()
        self._extremes: dict[str, _Extremes] = {}
        self._axes: dict[str, dict[str, str]] = {}  # as they have been defined, by name
        self._first_row: int | None = None
        self._last_step: int | None = None
        self._place: str | None = None
        self._files = Path()
        self._resumed_step: int | None = None
        self._failed = False
        self._journal: Journal | None = None
        self._warn = OneWarning()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_tasks", "_worker", "_started", "_lost", "_logged", "_extremes", "_warn", "_journal", "_experiment"}
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._experiment = None
        self._prepare()

    # --- what a training calls ---

    @property
    def experiment(self) -> Any:
        """The ``wandb.Run``. Reading an attribute of it waits until W&B has started, up to ``start_timeout``.

        Its methods run on the caller's thread, and can fail or hang as W&B does: use those of the logger where there is
        one. Off rank 0, and when W&B did not start, it is a dummy that takes every call.
        """
        if not is_rank_zero():
            return _Nothing()
        if threading.current_thread() is self._worker:
            return super().experiment
        self._begin()
        return _Run(self)

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Continue the run of before, from a checkpoint of ``step`` optimizer steps.

        What the run has of later steps stays in it, and is not logged again when that work is done again. What it lacks
        of earlier ones, because the job was killed before W&B had written them, is logged now. Not among it are values
        on a device that were still to be converted, and media other than tables of numbers and texts, bar charts, and
        images in files that are still the same. Call it before anything is logged.
        """
        if self._worker is None:
            self._resumed_step = step
        self._begin()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand values of a step to the queue."""
        self._log({key: _taken(value) for key, value in metrics.items()}, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Put settings into the run's config, without the secrets among them."""
        settings = without_secrets(vars(params) if isinstance(params, Namespace) else params)
        self._submit(lambda: super(WandbLogger, self).log_hyperparams(settings))

    @rank_zero_only
    def define_axes(self, epoch: Sequence[str], step: Sequence[str] = (), minimised: Sequence[str] = ()) -> None:
        """Say which values are drawn against the epoch, and which against the optimizer step.

        The summary of a value is the last one; that of a value to be minimised is ``{"min": ..., "last": ...}`` over
        all starts of the run, where W&B's own minimum begins anew with each start and is NaN once a value is. Call it
        before the values are logged, in every start of a run; calling it again changes nothing.

        Args:
            epoch: names of values that are logged beside ``epoch``, as Lightning does with those of an epoch.
            step: names of values that are logged at a step.
            minimised: those among them whose minimum belongs in the summary.

        Raises:
            ValueError: a pattern instead of a name, or a name in ``minimised`` alone.
        """
        # W&B takes any of several patterns that fit a name, and Lightning's `*` fits all
        if patterns := [name for name in (*epoch, *step) if "*" in name]:
            raise ValueError(f"Axes are defined by exact names, found {patterns}: give each name by itself.")
        if unknown := [name for name in minimised if name not in {*epoch, *step}]:
            raise ValueError(f"Values to be minimised are among those of `epoch` or `step`; {unknown} are not.")
        axes = {name: {"step_metric": STEP} for name in step}
        axes |= {name: {"step_metric": self._prefixed("epoch")} for name in epoch}
        for name in minimised:
            axes[name]["summary"] = "min,last"
        prefixed = {self._prefixed(name): axis for name, axis in axes.items()}
        self._submit(lambda: self._define(prefixed))

    @rank_zero_only
    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Put values that belong to the run as a whole into its summary."""
        copies = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in values.items()}
        self._submit(lambda: self.experiment.summary.update({key: _plain(value) for key, value in copies.items()}))

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[Any] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Log a table: the names of its columns and its rows, or a data frame; and the epoch beside it.

        Numbers in the rows that are not finite are left empty.
        """
        rows = None if data is None else [[_cell(value) for value in row] for row in data]
        table = Media("table", {"columns": columns, "data": rows, "dataframe": dataframe})
        self._log_media(key, table, step, epoch)

    @rank_zero_only
    def log_bar_chart(
        self,
        key: str,
        labels: Sequence[str],
        values: Sequence[float],
        label_name: str = "name",
        value_name: str = "value",
        title: str = "",
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Log a bar chart; the table behind it is stored as ``<key>_table``.

        Args:
            key: name of the chart.
            labels: a label for each bar.
            values: their lengths; there is no bar for one that is not finite.
            label_name: what the labels are, a column of the table.
            value_name: what the values are, the other one.
            title: above the chart.
            step: optimizer step.
            epoch: logged beside it.

        Raises:
            ValueError: not as many labels as values.
        """
        if len(labels) != len(values):
            raise ValueError(f"A bar chart has a label for each value, found {len(labels)} and {len(values)}.")
        rows = [[str(label), _cell(float(value))] for label, value in zip(labels, values, strict=True)]
        chart = Media("bar_chart", {"data": rows, "label": label_name, "value": value_name, "title": title})
        self._log_media(key, chart, step, epoch)

    @rank_zero_only
    def log_image(
        self, key: str, images: list[Any], step: int | None = None, epoch: int | None = None, **options: Any
    ) -> None:
        """Log images: paths, arrays, tensors or PIL images. A file is read soon after, by another thread.

        Args:
            key: name of the images.
            images: a list of them.
            step: optimizer step.
            epoch: logged beside them.
            **options: of ``wandb.Image``, such as ``caption``: a list each, with one for each image.

        Raises:
            TypeError: not a list.
            ValueError: an option that does not have one for each image.
        """
        copies = _copies(key, images, "log_image")
        for name, each in options.items():
            if len(each) != len(images):
                raise ValueError(f"`{name}` has one for each of the {len(images)} images {key!r}, found {len(each)}.")
        self._log_media(key, Media.images(copies, options), step, epoch)

    @rank_zero_only
    def alert(self, title: str, text: str) -> None:
        """Have W&B send a message, by mail or Slack as the user has set up there; a run on disk keeps it."""
        self._submit(lambda: self.experiment.alert(title[:_LONGEST_TITLE], text, level="WARN"))

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **options: Any) -> None:
        """Log sounds: paths or arrays."""
        self._log_files("log_audio", key, audios, step, options)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **options: Any) -> None:
        """Log videos: paths or arrays."""
        self._log_files("log_video", key, videos, step, options)

    def _log_files(self, method: str, key: str, items: list[Any], step: int | None, options: dict[str, Any]) -> None:
        copies = _copies(key, items, method)
        log = getattr(super(), method)
        at = self._step_of(step)
        self._submit(lambda: log(key, copies, at, **options))

    def _log_media(self, key: str, media: Media, step: int | None, epoch: int | None) -> None:
        self._log({key: media} if epoch is None else {key: media, "epoch": epoch}, step)

    def _log(self, row: dict[str, Any], step: int | None) -> None:
        """Write a row to the journal, and hand it to the queue."""
        row = {self._prefixed(key): value for key, value in row.items()}
        at = self._step_of(step)
        self._begin()
        written = self._write(row, at)
        self._submit(lambda: self._log_row(row, at, written))

    def _write(self, row: dict[str, Any], step: int | None) -> bool:
        return self._journal is None or self._journal.write(row, step)

    def _step_of(self, step: int | None) -> int | None:
        """The step, or that of the row before, as W&B does by itself in one start."""
        if step is not None:
            self._last_step = int(step)
        return self._last_step

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log checkpoints as artifacts, if ``log_model`` asks for it."""
        if self._log_model:
            self._submit(lambda: super(WandbLogger, self).after_save_checkpoint(checkpoint_callback))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the checkpoints that are left; the run goes on until :meth:`finish`."""
        self._failed = status != "success"
        if self._log_model and self._worker is not None:
            self._submit(lambda: super(WandbLogger, self).finalize(status))

    @rank_zero_only
    def finish(self, exit_code: int | None = None) -> str | None:
        """End the run, waiting up to ``finish_timeout`` seconds for what has not been written or uploaded yet.

        Args:
            exit_code: not 0 for a run that has failed while its process goes on; W&B asks the process otherwise.

        Returns:
            Where the run is, its folder or its address; None if there is no run, or not all of it.
        """
        if self._worker is None:
            return None
        if not self._finished:
            self._finished, self._exit_code = True, exit_code
            until = time.monotonic() + self.finish_timeout + _GRACE
            with suppress(queue.Full):
                self._tasks.put(None, timeout=self.finish_timeout)
            self._worker.join(max(until - time.monotonic(), 0.0))
            if self._worker.is_alive():
                self._warn(
                    f"W&B did not finish within {self.finish_timeout:g} s, and is left alone; the run in "
                    f"{self.save_dir} may miss the last values."
                )
                self._lost.set()
            if self._journal is not None:
                self._journal.close()
            _leave_service()
        return None if self._lost.is_set() else self._place

    @property
    def written_files(self) -> dict[str, str]:
        """Folder or address of a run that is complete, and the command that uploads a folder."""
        place = None if self._lost.is_set() else self._place
        if not place:
            return {}
        files = {"W&B run": place}
        if Path(place).is_dir():
            files["upload with"] = f"wandb sync {Path(place).parent}"
        return files

    # --- the thread ---

    def _begin(self) -> None:
        if self._worker is None:
            self._journal = Journal(Path(str(self.save_dir)) / "wandb" / "rows.jsonl", self._resumed_step)
            self._worker = threading.Thread(target=self._work, name="harness-wandb", daemon=True)
            self._worker.start()
            atexit.register(self.finish)  # of a process that ends before W&B has started

    def _submit(self, task: Callable[[], None]) -> None:
        if threading.current_thread() is self._worker:
            task()
            return
        self._begin()
        if self._lost.is_set() or self._finished:
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._warn(
                f"W&B does not keep up: {self.max_waiting} calls wait for it, and values are dropped until it does. "
                f"The training goes on. Is the network or the file system of {self.save_dir} slow?"
            )

    def _work(self) -> None:
        try:
            self._start()
        except BaseException as error:  # SystemExit, too: whatever W&B makes of a network or a disk
            self._warn(f"W&B cannot start ({one_line(error)}); the training goes on without it.")
            self._lost.set()
        finally:
            self._started.set()
        self._do(self._log_missing)
        while (task := self._tasks.get()) is not None:
            self._do(task)
        if not self._lost.is_set():
            try:
                self._sum_up()
                self._experiment.finish(exit_code=self._exit_code)  # type: ignore[union-attr]
                self._check_files(ended=True)
                if self._journal and not self._failed and self._warn.said is None:  # all is done and written
                    self._journal.remove()
            except BaseException as error:
                self._warn(f"W&B failed to finish ({one_line(error)}); the run in {self.save_dir} may miss values.")
                self._lost.set()

    def _do(self, task: Callable[[], None]) -> None:
        if not self._lost.is_set():
            try:
                task()
                self._check_files()
            except BaseException as error:
                self._warn(f"W&B failed ({one_line(error)}); the training goes on, and the run may miss values.")

    def _start(self) -> None:
        import wandb

        folder = Path(str(self.save_dir))
        self._wandb_init["settings"] = self._settings()
        self._take_id(folder)
        stored = self._read_rows(folder)
        number = max((at + 1 for at, _ in stored), default=0)
        wandb.setup()
        atexit.register(self.finish)  # again, after W&B's own: it is called before that
        _silence_debug_log()
        run = self._start_run()
        _ignore_imports(run)
        offline = bool(run.offline)
        self._files = Path(run.dir).parent
        self._place = str(Path(run.dir).parent) if offline else run.url
        if not offline:  # the server knows best how many rows it has: the first of those in the folders
            number = run.starting_step
        self._logged = Counter(key for at, key in stored if at < number)
        self._first_row = number or None

    def _start_run(self) -> Any:
        """The run as it is asked for, or on disk if that cannot be had."""
        try:
            return cast(Any, super()).experiment
        except Exception as error:
            if self._wandb_init.get("mode") == "offline" or self._lost.is_set():  # or given up meanwhile
                raise
            _leave_service()  # which has the id in use
            self._wandb_init["mode"] = "offline"
            run = cast(Any, super()).experiment
            self._warn(
                f"W&B cannot be reached ({one_line(error)}). The run is kept on disk: upload it with `wandb sync "
                f"{Path(run.dir).parents[1]}`."
            )
            return run

    def _settings(self) -> Any:
        import wandb

        given = self._wandb_init.get("settings")
        settings = wandb.Settings(**given) if isinstance(given, Mapping) else (given or wandb.Settings()).model_copy()
        limits = {
            "init_timeout": self.start_timeout,
            "x_service_wait": self.start_timeout,
            "finish_timeout": self.finish_timeout,
        }
        if arguments_have_secrets():
            limits["x_disable_meta"] = True  # W&B would store the command line
        for name, value in limits.items():
            if name in type(settings).model_fields and name not in settings.model_fields_set:
                setattr(settings, name, value)
        return settings

    def _check_files(self, ended: bool = False) -> None:
        """Find out whether W&B can write: it says nothing of a full disk, and goes on as if all were well."""
        disk = os.statvfs(self._files)
        if disk.f_bavail * disk.f_frsize < _SMALLEST_SPACE:
            self._warn(f"No space is left on the disk of {self._files}: W&B loses values. The training goes on.")
        if self._journal and (error := self._journal.error):
            self._warn(
                f"{self._journal.path} cannot be written ({one_line(error)}): if the job is killed, the run misses the "
                f"values that W&B has not written. The training goes on."
            )
        if ended and self._warn.said is None and (log := next(self._files.glob("*.wandb"), None)):
            with suppress(OSError, ValueError, KeyError, subprocess.TimeoutExpired):  # not with W&B's older versions
                until = time.monotonic() + _GRACE  # its end is written after W&B says that it has finished
                while json.loads(inspected(log, self.finish_timeout, "--summary"))["exit_code"] is None:
                    if time.monotonic() > until:
                        self._warn(f"W&B has not written all of {log}. Was the disk full, or the quota used up?")
                        break
                    time.sleep(0.2)

    def _take_id(self, folder: Path) -> None:
        """Take the id of the directory's run, or give it one."""
        (folder / "wandb").mkdir(parents=True, exist_ok=True)  # W&B would go elsewhere where it cannot write
        file = folder / "wandb_run_id"
        # the journal of a job that has not come to its end; another job in its directory is another run
        goes_on = self._resumed_step is not None or (self._journal is not None and self._journal.goes_on)
        kept = file.read_text().strip() if goes_on and file.is_file() else ""
        drawn = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None  # of an agent of W&B's
        self._id = self._given_id or drawn or kept or uuid.uuid4().hex[:8]
        self._wandb_init["id"] = self._id
        if self._id != kept:
            part = file.with_suffix(".part")
            part.write_text(f"{self._id}\n")
            os.replace(part, file)

    def _read_rows(self, folder: Path) -> list[tuple[int, tuple[int, frozenset[str]]]]:
        """Number and key of every row of the run that earlier starts have left on this disk, in any order."""
        stored = []
        for log in sorted((folder / "wandb").glob(f"*run-*-{self._id}/run-{self._id}.wandb")):
            text = inspected(log, self.start_timeout)
            if '"type":"run"' not in text:  # killed before anything was written: `wandb sync` would stop at it
                log.rename(log.with_suffix(".empty"))
            elif '"type":"exit"' not in text:  # killed
                mend(log)
            for row in rows_of(text):
                number = int(row.pop("_step", 0))
                self._note(row)
                stored.append((number, row_key(row, row.get(STEP))))
        return stored

    def _log_missing(self) -> None:
        """Log what W&B had been given before, and not written when the training was killed."""
        if self._journal is None or self._lost.is_set():
            return
        lines, self._journal.kept = self._journal.kept, []
        known = self._logged.copy()
        for row, step in rows_in(lines):
            key = row_key(row, step)
            known[key] -= 1
            media = (value for value in row.values() if isinstance(value, Media))
            if known[key] < 0 and all(each.is_there() for each in media):
                self._do(partial(self._send, row, step))

    def _log_row(self, row: dict[str, Any], step: int | None, written: bool) -> None:
        row = {key: _plain(value) for key, value in row.items()}
        if not written:  # there were values on a device, for which the training does not wait
            self._write(row, step)
        key = row_key(row, step)
        if self._logged[key] > 0:
            self._logged[key] -= 1
            return
        self._send(row, step)

    def _send(self, metrics: dict[str, Any], step: int | None) -> None:
        metrics = {key: value.make() if isinstance(value, Media) else value for key, value in metrics.items()}
        self._note(metrics)
        at = {} if step is None or self._wandb_init.get("sync_tensorboard") else {STEP: step}
        # The rows of one run are numbered over all its folders; without a number the first would be row 0 again.
        number, self._first_row = self._first_row, None
        self.experiment.log({**metrics, **at}, step=number, commit=True)

    # --- what becomes of values ---

    def _prefixed(self, key: str) -> str:
        return f"{self._prefix}{self.LOGGER_JOIN_CHAR}{key}" if self._prefix else key

    def _define(self, axes: Mapping[str, dict[str, str]]) -> None:
        for name, axis in axes.items():
            if self._axes.get(name) != axis:
                self.experiment.define_metric(name.replace(".", "\\."), **axis)  # else a value within another one
                self._axes[name] = axis

    def _note(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            number = _NOT_FINITE.get(value) if isinstance(value, str) else value
            if isinstance(number, int | float):
                self._extremes.setdefault(name, _Extremes()).add(number)

    def _sum_up(self) -> None:
        """Put the least and the last of values to be minimised into the summary, over all starts of the run."""
        names = [name for name, axis in self._axes.items() if "summary" in axis and name in self._extremes]
        if names:
            found = {name: self._extremes[name] for name in names}
            self.experiment.summary.update(
                {name: {"min": each.least, "last": each.last} for name, each in found.items()}
            )


class _Extremes:
    """The least and the last of a value's numbers; NaN is the last, and never the least if there is another."""

    def __init__(self) -> None:
        self.least = self.last = math.nan

    def add(self, number: float) -> None:
        self.least = number if math.isnan(self.least) else min(self.least, number)
        self.last = number


class _Run:
    """A ``wandb.Run`` that may not have started yet."""

    def __init__(self, logger: WandbLogger) -> None:
        object.__setattr__(self, "_logger", logger)

    def _get(self) -> Any:
        logger = object.__getattribute__(self, "_logger")
        logger._started.wait(logger.start_timeout + _GRACE)
        return _Nothing() if logger._lost.is_set() or logger._experiment is None else logger._experiment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._get(), name, value)


class _Nothing:
    """Stands for a run that could not start: takes every call and every value."""

    def __getattr__(self, name: str) -> _Nothing:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> _Nothing:
        return self

    def __getitem__(self, key: Any) -> _Nothing:
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _copies(key: str, items: Any, method: str) -> list[Any]:
    """Arrays and tensors as they are now; the training may change them in place."""
    if not isinstance(items, list):
        raise TypeError(f"{method} takes a list, found {type(items).__name__}: put {key!r} in [ ].")
    return [_copied(item) for item in items]


def _copied(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.detach().clone()
    return item.copy() if hasattr(item, "__array__") and hasattr(item, "copy") else item


def _cell(value: Any) -> Any:
    """What W&B's tables can hold, which are JSON: NaN and infinity are not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _taken(value: Any) -> Any:
    """A number as it is now; one on a device stays there, so that nobody waits for it."""
    if type(value) is Tensor and value.device.type == "cpu" and value.numel() == 1:
        return value.item()
    return value.detach().clone() if isinstance(value, Tensor) else value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _silence_debug_log() -> None:
    """Let W&B's debug.log go unwritten on a full disk; Python would show a traceback for each line of it."""
    log = logging.getLogger("wandb")

    def add(handler: logging.Handler) -> None:
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        logging.Logger.addHandler(log, handler)

    log.addHandler = add  # type: ignore[method-assign, assignment]


def _ignore_imports(run: Any) -> None:
    """Take away what W&B hangs on the import of well-known packages: it would raise there once its process is dead."""
    with suppress(Exception):  # a private name of W&B
        run._unregister_telemetry_import_hooks(run.id)


def _leave_service(patience: float = 2.0) -> None:
    """End W&B's own process, within seconds.

    W&B would do so when Python exits, and wait without a limit for a process that is stuck, or that cannot reach its
    server to say goodbye. All values are written or uploaded by then, or never will be.
    """
    with suppress(Exception):  # private names of W&B: without them W&B ends as it likes
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.module import unset_globals
        from wandb.sdk.lib.service import service_token

        setup = cast(Any, wandb_setup.singleton())
        if setup._connection is None or not setup._connection.owns_service:
            return
        connection, setup._connection = setup._connection, None  # the next run in this process gets a new one
        setup._active_runs.clear()
        unset_globals()
        connection._cleanup()  # of what is called when Python exits
        service_token.clear_service_in_env()

        def end() -> None:
            with suppress(Exception):
                connection.teardown(0)

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(patience)
        if ending.is_alive():
            connection._proc._process.kill()
            ending.join(patience)
