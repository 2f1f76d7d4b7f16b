"""One message for the user when a rank fails in the middle of a training.

A rank with an error of its own posts it on a board that all ranks can read, before it ends. Ranks that lose a
connection read the board before they print, so that the user sees the cause and not its consequences. The first that
waits in vain prints what it waits for, and which ranks did not answer.

In a ring only the neighbours of a rank that has gone notice it, and their neighbours once these have left: one after
the other, with hundreds of ranks. So a thread in each rank looks at the board, signs there, and ends the rank.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Lock, Thread
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from harness.checkpoints import is_writing
from harness.distributed import (
    Board,
    is_launched_by_torchrun,
    is_lost_connection,
    keep_alive,
    launched_rank,
    launched_ranks,
    named,
)
from harness.module import current_step
from harness.runs import JobFailed

__all__ = ["FailureReporter", "TrainingPosition", "reported"]

_POLL = 0.5  # seconds between readings of the board
_AWAIT = 0.1  # of a note that is expected
_READINGS = 2000.0  # a second, of all ranks together: one process answers them
_COLLECT = 3.0  # for the notes of all ranks to come in, whose time limits end by themselves
_SIGN = 0.5  # for the notes of all ranks, once they have looked at the board
_PRINT = 3.0  # for another rank to print its report
_EXIT = 5.0  # for a rank to end by itself
_LEAVE = 2.0  # likewise, where a connection was lost and that is reported
_WRITE = 60.0  # for a checkpoint to be written, which the end of a training waits for
_STOPPED = 15.0  # beyond the time limit of collectives, until a launcher kills a rank that is stopped
_LONGEST = 4000  # characters of an error


class TrainingPosition(Callback):
    """Epoch, step and collective that a training is at; read from the trainer only once something has failed."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.reporter: FailureReporter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the trainer."""
        self.trainer = trainer

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Post an error before the trainer tidies up, which may take long where other ranks have gone."""
        self.trainer = trainer
        if self.reporter is not None and isinstance(exception, Exception) and not _is_on_all_ranks(exception):
            self.reporter.post(exception)

    def waited_for(self, error: BaseException) -> str:
        """Purpose of a collective that has failed, from the functions on the stack of its error."""
        called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        purpose = next((purpose for name, purpose in _PURPOSES.items() if name in called), None)
        if self.trainer is None:
            return purpose or "the start of the training"
        epoch, step = self.trainer.current_epoch, current_step(self.trainer)
        if purpose is None:
            in_a_step = called & {"fit_loop", "advance", "training_step"}
            purpose = "the other ranks" if in_a_step else "the start of a loop"
        if self.trainer.testing:
            return f"{purpose} of the test" if purpose.startswith("the merge") else purpose
        return f"{purpose}, in training step {step} of the run, epoch {epoch}"


# The first of these functions that is on the stack names the purpose: special ones come before general ones.
_PURPOSES = {
    "on_validation_epoch_end": "the end of a validation epoch",
    "on_test_epoch_end": "the end of the test",
    "on_train_epoch_end": "the end of a training epoch",
    "save_checkpoint": "a checkpoint",
    "_await_merge": "the merge of loss and metrics over the ranks",
    "backward": "the average of the gradients over the ranks",
    "merge_over_ranks": "the merge of loss and metrics over the ranks",
    "reduce_boolean_decision": "a common decision",
    "_call_setup_hook": "all ranks to set up",
    "setup_environment": "all ranks to connect",
    "barrier": "all ranks at a barrier",
    "broadcast": "what rank 0 sends",
}


@contextmanager
def reported(position: TrainingPosition, timeout: timedelta) -> Iterator[None]:
    """Print one report of why a job of several ranks fails, then end every rank with exit code 1.

    Rank 0 prints the error of another rank, with its number and host; only the rank that failed prints a traceback. If
    ranks wait in vain, the first of them prints what it waits for and which ranks did not answer.

    The exception itself goes on with ``HYDRA_FULL_ERROR=1``, on a single rank, and if it has an attribute
    ``on_all_ranks`` that is true: all ranks raise the same.

    Args:
        position: among the callbacks of the trainer.
        timeout: of a collective.

    Raises:
        JobFailed: in the place of any other exception.
    """
    if launched_ranks() == 1:
        yield
        return
    reporter = position.reporter = FailureReporter(position, timeout)
    try:
        yield
    except Exception as error:
        if _is_on_all_ranks(error):
            raise
        cause = reporter.end_with(error)
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise JobFailed(cause) from error
    finally:
        reporter.stop()


class FailureReporter:
    """Posts this rank's failure on the board of the job, and reads there, on a thread, of those of other ranks.

    Keys of the board: ``trouble``, once there is any of the others; ``host/{rank}``, the host of a rank; ``failure``,
    rank, host and text of the first error that is not a lost connection; ``lost``, the first rank that has lost a
    connection, and whether it was closed; ``ended``, the ranks that fail or are there, each with a comma; ``reported``,
    once rank 0 has printed the failure; ``done``, once the rank that failed, or reports absent ranks, has printed all.

    Args:
        position: of this rank's training.
        timeout: of a collective.
    """

    def __init__(self, position: TrainingPosition, timeout: timedelta) -> None:
        self._position, self._timeout = position, timeout.total_seconds()
        self._rank, self._ranks, self._host = launched_rank(), launched_ranks(), socket.gethostname()
        self._board = Board()
        self._between = self._ranks / _READINGS  # seconds between readings, at least
        self._board.put(f"host/{self._rank}", self._host)
        self._posted: Exception | None = None
        self._first: dict[str, Any] | None = None  # failure of the job
        self._reporting: int | None = None  # rank that reports a lost connection
        self._is_told = False  # that another rank reports one
        self._printing, self._has_reported = Lock(), False
        self._ending, self._stopped = Event(), Event()
        keep_alive(self._timeout + _STOPPED)  # here, so that the launcher knows it before the first step
        self._watcher = Thread(target=self._watch, name="failures of other ranks", daemon=True)
        self._watcher.start()

    def post(self, error: Exception) -> None:
        """Write on the board that this rank fails, with an error of its own or because others did not answer."""
        if self._posted is not None:
            return
        self._posted = error
        if not is_lost_connection(error):
            text = f"{type(error).__name__}: {error}".strip()[:_LONGEST]
            failure = {"rank": self._rank, "host": self._host, "text": text + _advice(error)}
            first = self._board.put_first("failure", json.dumps(failure))
            self._first = json.loads(first) if first else failure
        else:
            first = self._board.put_first("lost", json.dumps([self._rank, not _is_timeout(error)]))
            self._reporting = json.loads(first)[0] if first else self._rank
        self._board.append("ended", f"{self._rank},")
        self._board.put("trouble", "")

    def end_with(self, error: Exception) -> str:
        """Print the report if it is this rank's to print, and make sure that the process ends.

        Returns:
            The cause, as far as this rank knows it.
        """
        self.post(error)
        self._ending.set()
        Thread(target=_end_process_after, args=(4 * _EXIT,), daemon=True).start()
        if self._first is None and (self._is_told or self._reporting != self._rank):
            has_failed = self._is_failure_after_report()
            if not has_failed and (self._is_told or not self._board.is_lost):
                self._leave_last()
                return _first_line(error)
        if self._first is None:
            absent = self._absent_ranks(_is_timeout(error))
            if self._first is None:
                report = self.report_absent(error, absent)
                self._leave_last()
                return report
        if self._first["rank"] != self._rank:
            self.wait_for_report()
            return self._cause()
        if self._rank == 0 or not self._is_posted("reported", _PRINT):
            self.report()
        traceback.print_exception(error)
        sys.stderr.flush()
        self._board.put("done", "")
        self._leave_last()
        return self._cause()

    def _leave_last(self) -> None:
        """Let the others read the board, if this rank keeps it: under torchrun its agent does."""
        if self._rank == 0 and not is_launched_by_torchrun():
            time.sleep(2 * max(_POLL, self._between))

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._watcher.join(_EXIT)
        keep_alive(0)

    def _watch(self) -> None:
        """Read the board; end this process if another rank has failed and this one does not notice by itself."""
        polls = 0
        while not self._stopped.wait(max(_POLL, self._between)):
            if polls % 4 == 0:
                keep_alive(self._timeout + _STOPPED)
            polls += 1
            if self._board.read("trouble") is None:
                continue
            if self._read_failure():
                if self._failed_rank() == self._rank:
                    continue
                self.wait_for_report()
                patience = _EXIT  # NCCL does not notice that another rank has gone
            elif self._reporting != self._rank and self._is_closed():
                self._is_told = True
                self._board.append("ended", f"{self._rank},")
                if self._is_failure_after_report():
                    continue
                patience = _LEAVE  # gloo notices it of neighbours
            else:  # this rank's own time limit ends as that of the others
                continue
            if not self._ending.wait(patience) and not self._stopped.is_set():
                _await_checkpoints(self._position.trainer)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)

    def _read_failure(self) -> bool:
        """True if the board has one."""
        posted = self._board.read("failure")
        if posted is not None:
            self._first = json.loads(posted)
        return posted is not None

    def _failed_rank(self) -> int | None:
        return None if self._first is None else int(self._first["rank"])

    def _is_failure_after_report(self) -> bool:
        """Wait until another rank has reported a lost connection; True, and at once, if there is a failure instead."""
        deadline = time.monotonic() + _COLLECT + _PRINT
        while not self._read_failure():
            if self._is_posted("done", 0) or self._board.is_lost or time.monotonic() > deadline:
                return False
            time.sleep(max(_AWAIT, self._between))
        return True

    def _is_closed(self) -> bool:
        """True if a rank has lost a connection that was closed, and did not wait until its time limit."""
        posted = self._board.read("lost")
        return posted is not None and bool(json.loads(posted)[1])

    def wait_for_report(self) -> None:
        """Report the failure of another rank, if this is rank 0, and wait until that rank has printed all."""
        if self._rank == 0:
            self.report()
        self._is_posted("done", _PRINT + 1.0)

    def report(self) -> None:
        """Print the failure, once."""
        with self._printing:
            if self._has_reported or self._first is None:
                return
            self._has_reported = True
            _print_error(self._cause())
        self._board.put("reported", "")

    def _cause(self) -> str:
        first = self._first or {}
        return f"rank {first.get('rank')} (host {first.get('host')}) failed: {first.get('text')}"

    def _is_posted(self, key: str, seconds: float) -> bool:
        """Wait for a note; False if it does not come in time or the board is lost."""
        deadline = time.monotonic() + seconds
        while self._board.read(key) is None:
            if self._board.is_lost or time.monotonic() > deadline:
                return False
            time.sleep(max(_AWAIT, self._between))
        return True

    def _absent_ranks(self, timed_out: bool) -> list[int] | None:
        """Ranks that post nothing; None if the board cannot be reached. Returns early once a failure is posted.

        Args:
            timed_out: True where every rank has to come to its own time limit, and is not told by its thread.
        """
        looked = 2 * max(_POLL, self._between) + _SIGN
        deadline = time.monotonic() + (max(_COLLECT, looked) if timed_out else looked)
        absent = None
        while not self._read_failure() and not self._board.is_lost:
            posted = self._board.read("ended")
            if posted is not None:
                absent = sorted(set(range(self._ranks)) - {int(rank) for rank in posted.split(",") if rank})
            if absent == [] or time.monotonic() > deadline:
                break
            time.sleep(max(_AWAIT, self._between))
        return None if self._board.is_lost else absent

    def report_absent(self, error: Exception, absent: list[int] | None) -> str:
        """Print what this rank waited for, and which ranks did not answer.

        Args:
            error: of this rank.
            absent: ranks that have posted nothing; None if that is not known.

        Returns:
            The report.
        """
        timed_out = _is_timeout(error)
        waited = f"waited {self._timeout:.0f} s" if timed_out else "lost a connection while it waited"
        text = f"rank {self._rank} (host {self._host}) {waited} for {self._position.waited_for(error)}. "
        if absent is None:
            store = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            text += (
                f"The store of the job at {store} does not answer either, so it is not known which ranks are gone: the "
                f"network between this host and that one is down, or the job has ended there."
            )
        elif absent:
            hosts = {rank: self._board.read(f"host/{rank}") for rank in absent[:8]}
            text += (
                f"No answer came from {named(absent, hosts)}: stopped, killed, or on a host that is down or cut off."
            )
        else:
            text += "All ranks have noticed it and leave: a connection between their hosts was interrupted."
        if timed_out:
            text += f" trainer.timeout={self._timeout:g} is how long ranks wait for each other."
        _print_error(f"{text}\n({_first_line(error)})")
        self._board.put("done", "")
        return text


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_timeout(error: BaseException) -> bool:
    """True if a collective came to its time limit, and False if its connection was closed."""
    return "imed out" in str(error)


def _is_on_all_ranks(error: Exception) -> bool:
    return getattr(error, "on_all_ranks", False) is True


def _advice(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "\nMake data.batch_size smaller, or train on more ranks: it is the batch of all ranks together."
    return ""


def _print_error(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)


def _await_checkpoints(trainer: Trainer | None) -> None:
    """Wait until the checkpoints that this rank has saved are written, as the end of a training does."""
    deadline = time.monotonic() + _WRITE
    while trainer is not None and is_writing(trainer) and time.monotonic() < deadline:
        time.sleep(_AWAIT)


def _end_process_after(seconds: float) -> None:
    """End a process that tidies up in vain, waiting for ranks that are gone."""
    time.sleep(seconds)
    os._exit(1)
