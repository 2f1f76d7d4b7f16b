"""Calls that a thread makes, one after the other, while the program goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["BackgroundCalls"]


class BackgroundCalls:
    """Queue of calls, which one thread makes in their order; a program that ends by itself waits for all of them.

    An error in a call is raised by the next :meth:`wait` or :meth:`check`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: ThreadPoolExecutor | None = None
        self._calls: deque[Future[None]] = deque()
        self._last: Future[None] | None = None

    @property
    def is_idle(self) -> bool:
        """True if all calls have been made; any thread may ask."""
        return self._last is None or self._last.done()

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Let the thread make a call after those before it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, self._name)
        made = self._last = self._thread.submit(call)
        self._calls.append(made)
        return made

    def check(self) -> None:
        """Raise what the first call has raised that has failed by now; nothing is waited for."""
        while self._calls and self._calls[0].done():
            self._calls.popleft().result()

    def wait(self, call: Future[None] | None = None) -> None:
        """Wait until a call and those before it have been made; all of them without one.

        Raises:
            Exception: what the first of them raised that failed.
        """
        if call is not None and call not in self._calls:
            return
        while self._calls:
            first = self._calls.popleft()
            first.result()
            if first is call:
                return

    def end(self) -> None:
        """Wait for all calls, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None
            self._calls.clear()
