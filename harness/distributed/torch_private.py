"""Undocumented parts of ``torch.distributed``, all of them; :data:`PRIVATE` lists their names."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed.distributed_c10d as c10d
from torch.distributed.elastic.timer.file_based_local_timer import FileTimerClient
from torch.distributed.rendezvous import rendezvous

__all__ = ["PRIVATE", "TIMER_FILE", "connect_in_few_requests", "launcher_store", "request_kill", "set_default_timeout"]

TIMER_FILE = "TORCHELASTIC_TIMER_FILE"
"""Variable of a rank's environment in which torchrun passes the pipe of its file timer."""

PRIVATE = {
    "torch.distributed.distributed_c10d": ("default_pg_timeout", "default_pg_nccl_timeout"),
    "torch.distributed.elastic.timer.file_based_local_timer": ("FileTimerClient",),
    "torch.distributed.elastic.agent.server.local_elastic_agent": ("TORCHELASTIC_TIMER_FILE",),
    "torch.distributed.rendezvous": ("rendezvous",),
}
"""Names by module; tests hold that torch has them, and what they do here."""


def set_default_timeout(timeout: timedelta) -> None:
    """Set the time limit of groups that are made later without one of their own: meshes of devices, DeepSpeed's."""
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def connect_in_few_requests() -> None:
    """Let gloo read the addresses of all ranks by one request of each rank, instead of several for each pair of ranks.

    To be called before the first process group; ``GLOO_ENABLE_STORE_V2_API`` of the environment wins.
    """
    os.environ.setdefault("GLOO_ENABLE_STORE_V2_API", "1")


def launcher_store(timeout: timedelta) -> Any:
    """Store at ``MASTER_ADDR:MASTER_PORT``, of torchrun's agent or, under other launchers, of rank 0.

    Raises:
        torch.distributed.DistError: the store was not reached within ``timeout``.
    """
    store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
    return store


def request_kill(file: str, seconds: float) -> None:
    """Ask torchrun's file timer to kill this process after ``seconds`` unless asked again; 0 takes that back.

    Args:
        file: the timer's pipe. If nobody reads it any more, since torchrun is leaving, nothing happens.
        seconds: time until the kill.
    """
    timer: Any = FileTimerClient(file)
    with contextlib.suppress(OSError, RuntimeError):
        if seconds > 0:
            timer.acquire("harness", time.time() + seconds)
        else:
            timer.release("harness")
