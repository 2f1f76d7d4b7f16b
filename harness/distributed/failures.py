"""Notes between the ranks of a job when its process group has failed, and signs of life to the launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from threading import Thread
from typing import Any, cast

import torch.distributed as dist

from harness.distributed.launched import is_launched_by_torchrun
from harness.distributed.rendezvous import job_store, start_prefix
from harness.distributed.torch_private import TIMER_FILE, request_kill

__all__ = ["Board", "is_lost_connection", "keep_alive"]

# messages of gloo, NCCL and their store when another rank has gone or does not answer
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "connectFullMesh failed",
    "No route to host",
    "Network is unreachable",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "ncclSystemError",
)


class Board:
    """Notes between the ranks of a job, in the launcher's store: they need no process group, which may have failed.

    Every start of the job has its own notes. A call returns within ``limit`` seconds; after one that did not, the store
    counts as lost and all further calls return None at once.
    """

    def __init__(self, limit: float = 3.0) -> None:
        self._store, self._prefix, self._limit = job_store(), start_prefix(), limit
        self.is_lost = False

    def put(self, key: str, value: str) -> None:
        """Write a note."""
        self._within_limit(lambda store, name: store.set(name, value), key)

    def put_first(self, key: str, value: str) -> str | None:
        """Write a note unless there is one already, and return the one that is there."""
        found = self._within_limit(lambda store, name: store.compare_set(name, "", value), key)
        return None if found is None else cast(bytes, found).decode()

    def append(self, key: str, value: str) -> None:
        """Append to a note that many ranks write."""
        self._within_limit(lambda store, name: store.append(name, value), key)

    def read(self, key: str) -> str | None:
        """The note, or None if there is none."""
        found = self._within_limit(lambda store, name: store.get(name) if store.check([name]) else None, key)
        return None if found is None else cast(bytes, found).decode()

    def _within_limit(self, action: Callable[[Any, str], Any], key: str) -> Any:
        """The result of an action on the store; None if it fails or hangs, as it may once a link is down."""
        if self.is_lost:
            return None
        results: list[Any] = []

        def act() -> None:
            with contextlib.suppress(RuntimeError):  # all errors of a store are
                results.append(action(self._store, f"{self._prefix}/{key}"))

        # a daemon thread, so that one that hangs in the store does not keep the process alive
        thread = Thread(target=act, daemon=True)
        thread.start()
        thread.join(self._limit)
        if not results:
            self.is_lost = True
            return None
        return results[0]


def is_lost_connection(error: BaseException) -> bool:
    """True if a collective failed because another rank did not answer or has gone, and not through this rank."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST)


def keep_alive(seconds: float) -> None:
    """Ask the launcher to kill this process unless it asks again within ``seconds``; 0 takes that back.

    A stopped process cannot end itself. torchrun can do it if it was started with
    ``TORCHELASTIC_ENABLE_FILE_TIMER=1``, as the scripts in ``launch/`` do; without that, nothing happens.
    """
    file = os.environ.get(TIMER_FILE)
    # without the file torchrun is leaving, and torch would print a traceback
    if file and is_launched_by_torchrun() and os.path.exists(file):
        request_kill(file, seconds)
