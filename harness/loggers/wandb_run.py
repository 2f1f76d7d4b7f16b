"""The run of a job from its start to its end, each row in it once over all starts of the job."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.loggers.journal import Journal
from harness.loggers.media import Media
from harness.loggers.stand_ins import NoRun
from harness.loggers.summaries import Summaries
from harness.loggers.wandb_rows import STEP, EarlierRows
from harness.loggers.wandb_service import (
    end_service,
    ignore_imports,
    logs_of,
    mend,
    number_on_server,
    read_log,
    settings_with_limits,
    silence_debug_log,
    wrote_end,
)
from harness.loggers.wandb_thread import GRACE, WandbThread
from harness.loggers.wandb_variables import variable
from harness.support.files import write_text_whole
from harness.support.text import one_line
from harness.support.warn import OneWarning

__all__ = ["WandbRun", "plain"]

_SMALLEST_SPACE = 2**16
"""Bytes on a disk below which W&B, which writes blocks of 32 KiB, cannot go on."""


class WandbRun:
    """A run of W&B's, which a job that is started again continues.

    Args:
        folder: output directory of the job.
        init: calls ``wandb.init`` and returns the run; it is called on the run's thread.
        options: of ``wandb.init``; settings, id, mode and resume are put into them before ``init`` is called. The
            folder of W&B's files, which may be another one than that of the job, is in them as ``dir``.
        given_id: id of the run, None for that of ``WANDB_RUN_ID``, to continue that of the directory, or to draw one.
        resumed_step: of the checkpoint that the job goes on from, None for none.
        start_timeout: seconds that W&B may take to start.
        finish_timeout: seconds that values may take to be written or uploaded in the end.
        max_waiting: calls that wait for W&B.
    """

    def __init__(
        self,
        folder: Path,
        init: Callable[[], Any],
        options: dict[str, Any],
        given_id: str | None,
        resumed_step: int | None,
        start_timeout: float,
        finish_timeout: float,
        max_waiting: int,
    ) -> None:
        self.folder, self.given_id, self.resumed_step = folder, given_id, resumed_step
        self.start_timeout, self.finish_timeout = start_timeout, finish_timeout
        self.place: str | None = None
        """The run's folder or address, once it has started."""
        self.has_failed = False
        """True for a training that has failed, whose next start may need the journal."""
        self._init, self._options = init, options
        self._run: Any = None
        self._files = Path()
        self._first_row: int | None = None
        self._exit_code: int | None = None
        self._is_finished = False
        self._warn = OneWarning()
        self._earlier, self._summaries = EarlierRows(), Summaries()
        self._journal = Journal(folder / "wandb" / "rows.jsonl", resumed_step)
        self.thread = WandbThread(self._start, self._check, self._end, self._warn, max_waiting, str(folder))

    # --- what is called by the training ---

    def begin(self) -> None:
        """Start the run, on its thread."""
        self.thread.submit(self._log_missing)
        self.thread.begin()
        atexit.register(self.finish)  # of a process that ends before W&B has started

    def wait(self) -> Any:
        """The ``wandb.Run`` when it has started; a dummy if it has not within ``start_timeout``."""
        return self._run if self.thread.wait(self.start_timeout + GRACE) else NoRun()

    def log(self, row: dict[str, Any], step: int | None) -> None:
        """Write a row to the journal, and hand it to the thread."""
        is_written = self._journal.write(row, step)
        self.thread.submit(lambda: self._log(row, step, is_written))

    def define(self, axes: Mapping[str, dict[str, str]]) -> None:
        """Define axes of values, by name."""
        self.thread.submit(lambda: self._summaries.define(self._run, axes))

    def finish(self, exit_code: int | None = None) -> str | None:
        """End the run, and W&B's process; returns its folder or address, None if not all of it is there."""
        if not self._is_finished:
            self._is_finished, self._exit_code = True, exit_code
            self.thread.close(self.finish_timeout)
            self._journal.close()
            end_service()
        return None if self.thread.is_lost else self.place

    # --- start, on the thread ---

    def _start(self) -> None:
        import wandb

        self._options["settings"] = settings_with_limits(
            self._options.get("settings"), self.start_timeout, self.finish_timeout
        )
        self._options["id"] = self._take_id()
        self._read_earlier(self._options["id"])
        wandb.setup()
        atexit.register(self.finish)  # again, after W&B's own: it is called before that
        silence_debug_log()
        self._run = self._call_init()
        ignore_imports(self._run)
        self._files = Path(self._run.dir).parent
        number = self._earlier.number
        if self._run.offline:
            self.place = str(self._files)
        else:
            self.place = self._run.url
            number = number_on_server(self._run)  # the first rows of those in the folders
            self._earlier.keep(number)
        self._first_row = number or None

    @property
    def _wandb_folder(self) -> Path:
        """Folder that W&B makes those of its runs in."""
        root = Path(self._options["dir"])
        return root / (".wandb" if (root / ".wandb").exists() else "wandb")

    def _take_id(self) -> str:
        """Id of the directory's run if this start continues it, else a new one, which is written there."""
        self._wandb_folder.mkdir(parents=True, exist_ok=True)  # W&B would go elsewhere where it cannot write
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "wandb_run_id"
        # the journal of a job that has not come to its end; another job in its directory is another run
        goes_on = self.resumed_step is not None or self._journal.goes_on
        kept = file.read_text().strip() if goes_on and file.is_file() else ""
        run_id = self.given_id or variable("RUN_ID", None) or kept or uuid.uuid4().hex[:8]
        if run_id != kept:
            write_text_whole(file, f"{run_id}\n")
        elif self._options.get("resume") == "never":  # of the first start, and not of those that go on
            self._options["resume"] = "allow"
        return run_id

    def _read_earlier(self, run_id: str) -> None:
        """Read the rows that earlier starts have left on this disk, and mend their files for ``wandb sync``."""
        for log in logs_of(self._wandb_folder, run_id):
            stored = read_log(log, self.start_timeout)
            if not stored.has_started:  # killed before anything was written: `wandb sync` would stop at it
                log.rename(log.with_suffix(".empty"))
            elif not stored.has_ended:  # killed
                mend(log)
            for row in stored.rows:
                self._earlier.add(row)
                self._summaries.add(row)

    def _call_init(self) -> Any:
        """The ``wandb.Run`` that the user asks for, or one on disk where the server cannot be reached."""
        try:
            return self._init()
        except Exception as error:
            if self._options.get("mode") == "offline" or self.thread.is_lost:  # or given up meanwhile
                raise
            end_service()  # which has the id in use
            self._options["mode"] = "offline"
            run = self._init()
            self._warn(
                f"W&B cannot be reached ({one_line(error)}). The run is kept on disk: upload it with `wandb sync "
                f"{Path(run.dir).parents[1]}`."
            )
            return run

    # --- rows, on the thread ---

    def _log_missing(self) -> None:
        """Log rows that the journal has of earlier starts, and W&B had not written when the training was killed."""
        lines, self._journal.kept = self._journal.kept, []
        for row, step in self._earlier.missing(lines):
            self.thread.attempt(partial(self._send, row, step))

    def _log(self, row: dict[str, Any], step: int | None, is_written: bool) -> None:
        row = {key: plain(value) for key, value in row.items()}
        if not is_written:  # there were values on a device, for which the training does not wait
            self._journal.write(row, step)
        if not self._earlier.use_up(row, step):
            self._send(row, step)

    def _send(self, row: dict[str, Any], step: int | None) -> None:
        row = {key: value.make() if isinstance(value, Media) else value for key, value in row.items()}
        self._summaries.add(row)
        at = {} if step is None or self._options.get("sync_tensorboard") else {STEP: step}
        # The rows of one run are numbered over all its folders; without a number the first would be row 0 again.
        number, self._first_row = self._first_row, None
        self._run.log({**row, **at}, step=number, commit=True)

    # --- files and end, on the thread ---

    def _check(self) -> None:
        """Warn where W&B cannot write: it does not report a full disk, and goes on as if all were well."""
        disk = os.statvfs(self._files)
        if disk.f_bavail * disk.f_frsize < _SMALLEST_SPACE:
            self._warn(f"No space is left on the disk of {self._files}: W&B loses values. The training goes on.")
        if error := self._journal.error:
            self._warn(
                f"{self._journal.path} cannot be written ({one_line(error)}): if the job is killed, the run misses the "
                f"values that W&B has not written. The training goes on."
            )

    def _end(self) -> None:
        self._summaries.write(self._run)
        self._run.finish(exit_code=self._exit_code)
        self._check()
        if self._warn.text is None:
            self._wait_for_end()
        if not self.has_failed and self._warn.text is None:  # all is done and written
            self._journal.remove()

    def _wait_for_end(self) -> None:
        """Wait until the end of the run is in its file, which W&B writes after it has finished."""
        log = next(self._files.glob("*.wandb"), None)
        if log is None:
            return
        with suppress(Exception):  # of a reader that is a private part of W&B
            until = time.monotonic() + GRACE
            while not wrote_end(log, self.finish_timeout):
                if time.monotonic() > until:
                    self._warn(f"W&B has not written all of {log}. Was the disk full, or the quota used up?")
                    break
                time.sleep(0.2)


def plain(value: Any) -> Any:
    """A tensor of one element as a number, for which the host waits; other values as they are."""
    return value.item() if isinstance(value, Tensor) else value
