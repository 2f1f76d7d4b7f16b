"""What ranks say to each other and to the user when one of them fails in the middle of a training.

A rank with an error of its own posts it where all ranks can read it, before it leaves. Ranks that lose a connection
look there before they speak, so that the cause is shown and not its consequences. Ranks that wait in vain say what for,
and who did not answer.
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

from harness.distributed import Board, is_lost_connection, keep_alive, launched_rank, launched_ranks, named
from harness.runs import JobFailed

__all__ = ["TrainingPosition", "reported"]

_LOOK = 0.5  # seconds between looks at the board
_COLLECT = 3.0  # for the notes of all ranks to come in
_SPEAK = 3.0  # for another rank to tell what has happened
_LEAVE = 5.0  # for a rank to leave by itself
_STOPPED = 15.0  # beyond the time limit of collectives, until a launcher kills a rank that is stopped
_LONGEST = 4000  # characters of an error


class TrainingPosition(Callback):
    """Knows where a training is. It does nothing in a step: it asks the trainer once something has failed."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.faults: _Faults | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember whom to ask."""
        self.trainer = trainer

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Post an error before the trainer tidies up, which may take long where other ranks have gone."""
        self.trainer = trainer
        if self.faults is not None and isinstance(exception, Exception) and not _is_of_all(exception):
            self.faults.post(exception)

    def waited_for(self, error: BaseException) -> str:
        """What a collective that has failed was for, from the functions that it was called in."""
        called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        what = next((what for name, what in _PURPOSES.items() if name in called), None)
        if self.trainer is None:
            return what or "the start of the training"
        epoch, step = self.trainer.current_epoch, self.trainer.global_step + 1
        if what is None:
            what = "the other ranks" if called & {"fit_loop", "advance", "training_step"} else "the start of a loop"
        if self.trainer.testing:
            return f"{what} of the test" if what.startswith("the merge") else what
        return f"{what}, in training step {step} of the run, epoch {epoch}"


# The first of these functions that is on the stack names the purpose, so special ones come before general ones.
_PURPOSES = {
    "on_validation_epoch_end": "the end of a validation epoch",
    "on_test_epoch_end": "the end of the test",
    "on_train_epoch_end": "the end of a training epoch",
    "save_checkpoint": "a checkpoint",
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
    """Say once, and first, why a job of several ranks fails; then leave with exit code 1, on every rank.

    An error of one rank is told by rank 0 with that rank's name and words; only the rank at fault shows a traceback. If
    ranks wait in vain, the first that is there tells what they waited for and which ranks did not answer. The exception
    goes on instead of an exit with ``HYDRA_FULL_ERROR=1``, and always on a single rank or if it is one that all ranks
    raise alike, with an attribute ``on_all_ranks`` that is true: none of them is at fault.

    Args:
        position: among the callbacks of the trainer.
        timeout: how long a collective waits.
    """
    if launched_ranks() == 1:
        yield
        return
    faults = position.faults = _Faults(position, timeout)
    try:
        yield
    except Exception as error:
        if _is_of_all(error):
            raise
        told = faults.leave(error)
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise JobFailed(told) from error
    finally:
        faults.end()


class _Faults:
    """What this rank knows, posts and says of the faults of a job; a thread looks for those of other ranks."""

    def __init__(self, position: TrainingPosition, timeout: timedelta) -> None:
        self._position, self._timeout = position, timeout.total_seconds()
        self._rank, self._ranks, self._host = launched_rank(), launched_ranks(), socket.gethostname()
        self._board = Board()
        self._board.put(f"host/{self._rank}", self._host)
        self._posted: Exception | None = None
        self._first: dict[str, Any] | None = None
        self._telling, self._has_told = Lock(), False
        self._leaving, self._ended = Event(), Event()
        keep_alive(self._timeout + _STOPPED)  # here, so that it is known before the first step
        self._watcher = Thread(target=self._watch, name="faults of other ranks", daemon=True)
        self._watcher.start()

    def post(self, error: Exception) -> None:
        """Note on the board that this rank fails, with its own error or since others did not answer."""
        if self._posted is not None:
            return
        self._posted = error
        if not is_lost_connection(error):
            text = f"{type(error).__name__}: {error}".strip()[:_LONGEST]
            fault = {"rank": self._rank, "host": self._host, "text": text + _advice(error)}
            first = self._board.put_first("fault", json.dumps(fault))
            self._first = json.loads(first) if first else fault
        self._board.append("left", f"{self._rank},")

    def leave(self, error: Exception) -> str:
        """Say what has happened, if it is this rank that says it, and see to it that the process ends.

        Returns:
            What has happened, as far as this rank knows.
        """
        self.post(error)
        self._leaving.set()
        Thread(target=_end_process_after, args=(4 * _LEAVE,), daemon=True).start()
        if self._first is None:
            silent = self._wait_for_notes()
            if self._first is None:
                return self._tell_who_is_silent(error, silent)
        if self._first["rank"] != self._rank:
            self._hear()
            return self._cause()
        if self._rank == 0 or not self._is_noted("told", _SPEAK):
            self._tell()
        traceback.print_exception(error)
        sys.stderr.flush()
        self._board.put("done", "")
        if self._rank == 0:  # it may be the one that keeps the board
            time.sleep(2 * _LOOK)
        return self._cause()

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._watcher.join(_LEAVE)
        keep_alive(0)

    def _watch(self) -> None:
        looks = 0
        while not self._ended.wait(_LOOK):
            if looks % 4 == 0:
                keep_alive(self._timeout + _STOPPED)
            looks += 1
            if self._first is None and self._look() and self._first_rank() != self._rank:
                self._hear()
                # in NCCL nobody notices that another rank has gone
                if not self._leaving.wait(_LEAVE) and not self._ended.is_set():
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(1)

    def _look(self) -> bool:
        noted = self._board.read("fault")
        if noted is not None:
            self._first = json.loads(noted)
        return noted is not None

    def _first_rank(self) -> int | None:
        return None if self._first is None else int(self._first["rank"])

    def _hear(self) -> None:
        """Another rank has failed: tell it if this is rank 0, and wait until that rank has shown all it wants to."""
        if self._rank == 0:
            self._tell()
        self._is_noted("done", _SPEAK + 1.0)

    def _tell(self) -> None:
        with self._telling:
            if self._has_told or self._first is None:
                return
            self._has_told = True
            _say(self._cause())
        self._board.put("told", "")

    def _cause(self) -> str:
        first = self._first or {}
        return f"rank {first.get('rank')} (host {first.get('host')}) failed: {first.get('text')}"

    def _is_noted(self, key: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._board.read(key) is None:
            if self._board.is_lost or time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _wait_for_notes(self) -> list[int] | None:
        """Ranks that leave no note; None if nobody knows since the board cannot be reached. Stops at a fault."""
        deadline = time.monotonic() + _COLLECT
        silent = None
        while not self._look() and not self._board.is_lost:
            noted = self._board.read("left")
            if noted is not None:
                silent = sorted(set(range(self._ranks)) - {int(each) for each in noted.split(",") if each})
            if silent == [] or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return None if self._board.is_lost else silent

    def _tell_who_is_silent(self, error: Exception, silent: list[int] | None) -> str:
        first_there = next((rank for rank in range(self._ranks) if rank not in (silent or [])), self._rank)
        if silent is not None and self._rank != first_there:
            self._is_noted("done", _SPEAK)
            return _one_line(error)
        timed_out = "imed out" in str(error)
        waited = f"waited {self._timeout:.0f} s" if timed_out else "lost a connection while it waited"
        text = f"rank {self._rank} (host {self._host}) {waited} for {self._position.waited_for(error)}. "
        if silent is None:
            store = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            text += (
                f"The store of the job at {store} does not answer either, so it is not known which ranks are gone: the "
                f"network between this host and that one is down, or the job has ended there."
            )
        elif silent:
            hosts = {rank: self._board.read(f"host/{rank}") for rank in silent[:8]}
            text += (
                f"No answer came from {named(silent, hosts)}: stopped, killed, or on a host that is down or cut off."
            )
        else:
            text += "All ranks have noticed it and leave: a connection between their hosts was interrupted."
        if timed_out:
            text += f" trainer.timeout={self._timeout:g} is how long ranks wait for each other."
        _say(f"{text}\n({_one_line(error)})")
        self._board.put("done", "")
        return text


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_of_all(error: Exception) -> bool:
    return getattr(error, "on_all_ranks", False) is True


def _advice(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "\nMake data.batch_size smaller, or train on more ranks: it is the batch of all ranks together."
    return ""


def _say(text: str) -> None:
    print(f"\nerror: {text}", file=sys.stderr, flush=True)


def _end_process_after(seconds: float) -> None:
    """A way out where tidying up waits for ranks that are gone."""
    time.sleep(seconds)
    os._exit(1)
