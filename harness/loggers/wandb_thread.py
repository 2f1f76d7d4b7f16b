"""A thread for calls into W&B, which may hang or fail there without the training noticing."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from harness.support.text import one_line
from harness.support.warn import OneWarning

__all__ = ["GRACE", "WandbThread"]

GRACE = 5.0
"""Seconds that W&B gets beyond its own time limit, to report that limit."""


class WandbThread:
    """Calls into W&B in their order, on a thread of their own; those who submit them never wait.

    Args:
        start: called first; after an error in it the run is lost, and no other call is made.
        check: called after every call.
        end: called last.
        warn: is given the first thing that goes wrong.
        max_waiting: calls that wait; later ones are dropped.
        place: of the run, for warnings.
    """

    def __init__(
        self,
        start: Callable[[], None],
        check: Callable[[], None],
        end: Callable[[], None],
        warn: OneWarning,
        max_waiting: int,
        place: str,
    ) -> None:
        self._start, self._check, self._end = start, check, end
        self._warn, self._max_waiting, self._place = warn, max_waiting, place
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(max_waiting)
        self._started, self._lost = threading.Event(), threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="harness-wandb", daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """True on this thread."""
        return threading.current_thread() is self._thread

    @property
    def is_lost(self) -> bool:
        """True if the run could not start, or not end."""
        return self._lost.is_set()

    @property
    def is_idle(self) -> bool:
        """True if no call waits."""
        return self._calls.empty()

    def wait(self, timeout: float) -> bool:
        """Wait until the run has started; False if it has not, or is lost."""
        return self._started.wait(timeout) and not self._lost.is_set()

    def submit(self, call: Callable[[], None]) -> None:
        """Put a call into the queue; on this thread itself, make it."""
        if self.is_current:
            call()
        elif not (self._lost.is_set() or self._closed):
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._warn(
                    f"W&B does not keep up: {self._max_waiting} calls wait for it, and values are dropped until it "
                    f"does. The training goes on. Is the network or the file system of {self._place} slow?"
                )

    def close(self, timeout: float) -> None:
        """Wait until all calls have been made, or the time is over; then the run is lost."""
        self._closed = True
        until = time.monotonic() + timeout + GRACE
        with suppress(queue.Full):
            self._calls.put(None, timeout=timeout)
        self._thread.join(max(until - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._warn(
                f"W&B did not finish within {timeout:g} s, and is left alone; the run in {self._place} may miss the "
                f"last values."
            )
            self._lost.set()

    def attempt(self, call: Callable[[], None]) -> None:
        """Make a call on this thread, unless the run is lost; an error becomes a warning."""
        if not self._lost.is_set():
            try:
                call()
                self._check()
            except BaseException as error:
                self._warn(f"W&B failed ({one_line(error)}); the training goes on, and the run may miss values.")

    def _work(self) -> None:
        try:
            self._start()
        except BaseException as error:  # SystemExit, too: whatever W&B makes of a network or a disk
            self._warn(f"W&B cannot start ({one_line(error)}); the training goes on without it.")
            self._lost.set()
        finally:
            self._started.set()
        while (call := self._calls.get()) is not None:
            self.attempt(call)
        if not self._lost.is_set():
            try:
                self._end()
            except BaseException as error:
                self._warn(f"W&B failed to finish ({one_line(error)}); the run in {self._place} may miss values.")
                self._lost.set()
