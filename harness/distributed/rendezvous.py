"""Ranks of a launcher before there is a process group: meet, agree on small texts, make the group."""

from __future__ import annotations

import atexit
import hashlib
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist

from harness.distributed.collectives import is_distributed
from harness.distributed.launched import (
    START_LIMIT,
    RankAbsentError,
    is_launched_by_torchrun,
    launched_rank,
    launched_ranks,
    named,
)
from harness.distributed.torch_private import connect_in_few_requests, launcher_store, set_default_timeout

__all__ = ["agree", "decide", "job_store", "join", "other_than_first", "share", "start_prefix"]

_MARGIN = timedelta(seconds=10)
_ABSENT = "absent: "


def agree(key: str, proposal: str) -> str:
    """The proposal of the rank that came first, on every rank, before there is a process group.

    Ranks meet at the rendezvous store of their launcher (torchrun, or any that sets ``RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR`` and ``MASTER_PORT``), which outlives restarts of the ranks: a restarted job agrees on the same.
    Without a launcher it is the proposal itself.
    """
    if launched_ranks() == 1:
        return proposal
    return cast(bytes, job_store().compare_set(f"harness/{key}", "", proposal)).decode()


def join(backend: str, timeout: timedelta, device: torch.device | None = None) -> None:
    """Make the process group of the job, unless there is one or no launcher has started several ranks.

    Every start of the job has its own address book of the group. torch's, which the launcher's store keeps over
    restarts, still has the addresses of the ranks of before, and restarted ranks may wait for those.

    Args:
        backend: ``gloo``, ``nccl`` …
        timeout: how long a collective waits.
        device: this rank's GPU.
    """
    if launched_ranks() == 1 or is_distributed():
        return
    set_default_timeout(timeout)
    connect_in_few_requests()
    store = dist.PrefixStore(f"{start_prefix()}/group", job_store())  # type: ignore[attr-defined]
    to_device: dict[str, Any] = {} if device is None or device.type == "cpu" else {"device_id": device}
    dist.init_process_group(
        backend, store=store, rank=launched_rank(), world_size=launched_ranks(), timeout=timeout, **to_device
    )
    if backend == "nccl":  # it warns of groups that nobody has destroyed
        atexit.register(lambda: dist.destroy_process_group() if is_distributed() else None)


def share(key: str, value: str, timeout: timedelta = START_LIMIT) -> str:
    """Rank 0's ``value``, on every rank, before there is a process group. The n-th calls with a key belong together.

    Raises:
        RankAbsentError: rank 0 did not come.
    """
    if launched_ranks() == 1:
        return value
    shared = _moment(key)
    if launched_rank() == 0:
        job_store().set(shared, value)
        return value
    return _answer(shared, f"rank 0 to arrive at {key!r}", timeout)


def other_than_first(key: str, value: str, timeout: timedelta = START_LIMIT) -> str | None:
    """Rank 0's ``value`` where that of this rank is another one; None on rank 0, and where they are the same.

    A rank reads a digest of rank 0's, and the whole only if it has another: values may be long. The n-th calls with a
    key belong together.

    Raises:
        RankAbsentError: rank 0 did not come.
    """
    if launched_ranks() == 1:
        return None
    shared, digest = _moment(key), hashlib.sha256(value.encode()).hexdigest()
    if launched_rank() == 0:
        job_store().set(shared, value)
        job_store().set(f"{shared}/digest", digest)
        return None
    awaited = f"rank 0 to arrive at {key!r}"
    if _answer(f"{shared}/digest", awaited, timeout) == digest:
        return None
    return _answer(shared, awaited, timeout)


def decide(key: str, value: str, decision: Callable[[list[str]], str], timeout: timedelta = START_LIMIT) -> str:
    """Result of ``decision(values of all ranks, in rank order)`` on every rank, without a process group.

    Rank 0 collects and decides, the others send one value and read one, however many they are. The n-th calls with a
    key belong together.

    Raises:
        RankAbsentError: some ranks did not come; they are named, on every rank that is there.
    """
    if launched_ranks() == 1:
        return decision([value])
    store, prefix = job_store(), _moment(key)
    keys = [f"{prefix}/{rank}" for rank in range(launched_ranks())]
    if launched_rank() != 0:
        store.set(keys[launched_rank()], value)
        _answer(keys[0], f"rank 0 to arrive at {key!r}", timeout)
        made = _answer(f"{prefix}/decision", f"what rank 0 makes of {key!r}", timeout + _MARGIN)
    else:
        store.set(keys[0], value)
        try:
            store.wait(keys, timeout)
        except dist.DistStoreError:
            absent = [rank for rank, key_of_rank in enumerate(keys) if not store.check([key_of_rank])]
            made = _ABSENT + _waited(f"{named(absent)} to arrive at {key!r}", timeout)
        else:
            made = decision([cast(bytes, value).decode() for value in store.multi_get(keys)])
        store.set(f"{prefix}/decision", made)
    if made.startswith(_ABSENT):
        raise RankAbsentError(made.removeprefix(_ABSENT))
    return made


@cache
def job_store() -> Any:
    """Store where the ranks of a launcher meet; kept for the life of the process, which may serve it to the others."""
    try:
        return launcher_store(START_LIMIT)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise RankAbsentError(
                f"Rank {launched_rank()} cannot serve the store of the job at {where}: the port is in use, by another "
                f"job or one that has not ended yet. Give all ranks another one, such as MASTER_PORT=29401."
            ) from None
        if launched_rank() == 0 and not is_launched_by_torchrun():  # it keeps the store itself
            awaited = f"the other ranks to reach it at {where} ({str(error).splitlines()[0].rstrip('.')})"
            raise RankAbsentError(_waited(awaited, START_LIMIT)) from None
        raise RankAbsentError(
            f"Rank {launched_rank()} could not reach the store of the job at {where}: {str(error).splitlines()[0]}. "
            f"Has rank 0 been started, and can this host reach that address?"
        ) from None


@cache
def start_prefix() -> str:
    """Prefix of the keys of this start of the job, on which all its ranks have agreed.

    The store outlives restarts, and no variable of a launcher is both new at every start and the same on all ranks:
    with elastic nodes every agent counts its own restarts. So every rank comes with a number of its own, and rank 0
    answers the number with the prefix that it has drawn; a rank that waits for an answer to a new number does not take
    one of an earlier start.
    """
    store, arrivals, rank = job_store(), "harness/arrivals", launched_rank()
    if rank != 0:
        number = f"{rank}-{uuid.uuid4().hex}"
        store.append(arrivals, f"{number},")
        prefix = _answer(f"harness/reply/{number}", "rank 0 to start", START_LIMIT)
        store.append(f"{prefix}/joined", f"{rank},")
        return prefix
    prefix = f"harness/{uuid.uuid4().hex}"
    store.append(arrivals, ",")
    store.append(f"{prefix}/joined", "0,")
    replied: set[str] = set()
    deadline = time.monotonic() + START_LIMIT.total_seconds()
    while True:
        arrived = cast(bytes, store.get(arrivals)).decode()
        new = sorted(set(_entries(arrived)) - replied)
        if new:
            store.multi_set([f"harness/reply/{number}" for number in new], [prefix] * len(new))
            replied.update(new)
        joined = {int(number) for number in _entries(cast(bytes, store.get(f"{prefix}/joined")).decode())}
        if len(joined) == launched_ranks():
            # all of them have their answer: the list would grow with each restart. Numbers that came since stay
            store.compare_set(arrivals, arrived, ",")
            return prefix
        if time.monotonic() > deadline:
            absent = sorted(set(range(launched_ranks())) - joined)
            raise RankAbsentError(_waited(f"{named(absent)} to start", START_LIMIT))
        time.sleep(0.02)


def _moment(key: str) -> str:
    """Prefix of the keys of one call: every rank makes the same calls in the same order."""
    number = _CALLS[key] = _CALLS.get(key, -1) + 1
    return f"{start_prefix()}/{key}/{number}"


_CALLS: dict[str, int] = {}


def _entries(text: str) -> list[str]:
    return [entry for entry in text.split(",") if entry]


def _answer(key: str, awaited: str, timeout: timedelta) -> str:
    try:
        job_store().wait([key], timeout)
        return cast(bytes, job_store().get(key)).decode()
    except dist.DistError:
        raise RankAbsentError(_waited(awaited, timeout)) from None


def _waited(awaited: str, timeout: timedelta) -> str:
    return (
        f"Rank {launched_rank()} waited {timeout.total_seconds():.0f} s for {awaited}. Have all ranks been started, "
        f"with the same command, and do they still run?"
    )
