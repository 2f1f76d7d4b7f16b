"""Real gloo ranks for tests: ``spawn(world_size, fn, *args)`` runs a function on every rank and returns all results.

The processes of a world size are forked from a server that has imported torch once, and are kept for later calls. A
rank that fails or hangs takes its whole pool with it, so that only the test that caused it fails.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["PRELOAD", "RankFailedError", "close_all", "spawn"]

COLLECTIVE_TIMEOUT = timedelta(seconds=20)
STARTUP_TIMEOUT = 120.0
GRACE = 2.0  # for the other ranks to answer once one has failed

PRELOAD = ["torch.distributed", "harness.metrics", "harness.presets"]
"""Modules that are imported once for all ranks; add those that your ranks use, before the first :func:`spawn`."""

_POOLS: dict[int, _Pool] = {}


class RankFailedError(RuntimeError):
    """A rank raised; the message holds its traceback."""


def spawn(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """``fn(rank, world_size, *args)`` on every rank of a gloo group; the return values in rank order.

    Each rank is a process on the CPU, with one thread. ``fn``, arguments and results are pickled: functions and classes
    go by their names, and ranks import them from the same ``sys.path``.

    Args:
        world_size: number of ranks.
        fn: a function at the top of a module.
        args: further arguments of ``fn``.
        timeout: seconds for all ranks to answer.

    Raises:
        RankFailedError: a rank raised, or could not import what it was sent.
        TimeoutError: a rank did not answer in time.
    """
    pool = _POOLS.get(world_size)
    if pool is None:
        pool = _POOLS[world_size] = _Pool(world_size)
    try:
        return pool.run(fn, args, timeout)
    except BaseException:
        _POOLS.pop(world_size).kill()
        raise


def close_all() -> None:
    """End all ranks; the next call of :func:`spawn` starts new ones."""
    while _POOLS:
        _POOLS.popitem()[1].kill()


atexit.register(close_all)


class _Pool:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        threads, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"  # the server inherits it
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, world_size, self.folder / "rendezvous", theirs), daemon=True
                )
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads
        try:
            self._collect(STARTUP_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        # paths travel apart: a rank needs them before it can import what the task is made of
        task = pickle.dumps((list(sys.path), pickle.dumps((fn, args))))
        for connection in self.connections:
            connection.send_bytes(task)
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        rank_of = {connection: rank for rank, connection in enumerate(self.connections)}
        while rank_of:
            ready = wait(list(rank_of), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = rank_of.pop(connection)  # type: ignore[call-overload]
                try:
                    done, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    done, value = False, "the process died"
                (results if done else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            silent = f"\nRanks {sorted(rank_of.values())} did not answer." if rank_of else ""
            raise RankFailedError(
                "\n".join(f"Rank {rank} failed:\n{text}" for rank, text in sorted(failures.items())) + silent
            )
        if rank_of:
            raise TimeoutError(f"Ranks {sorted(rank_of.values())} did not answer within {timeout} s.")
        return [results[rank] for rank in sorted(results)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(rank: int, world_size: int, rendezvous: Path, connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        reply: tuple[bool, Any] = (True, None)
    except Exception:
        reply = (False, traceback.format_exc())
    while True:
        connection.send_bytes(pickle.dumps(reply))
        try:
            paths, task = pickle.loads(connection.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            sys.path[:] = paths
            fn, args = _load(task)
            result = fn(rank, world_size, *args)
            pickle.dumps(result)
            reply = (True, result)
        except Exception:
            reply = (False, traceback.format_exc())


def _load(task: bytes) -> Any:
    """Function and arguments of a task.

    Raises:
        ImportError: something in it is not in a module that this process can import.
    """
    try:
        return pickle.loads(task)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"A rank cannot import what it was sent: {error}. Expected functions and classes at the top of a module "
            f"that is importable by its name from the sys.path of the process that starts the ranks. Those of a "
            f"notebook, of a prompt, or of a test that pytest imports with --import-mode=importlib are not: move them "
            f"to a module of their own."
        ) from error
