"""Ranks of a command: those of its launcher, or the report that they do not come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harness.distributed import LaunchError, RankAbsentError, launched_rank, take_ranks
from harness.runs.exits import JobFailed

__all__ = ["absent_ranks_reported", "settle_ranks"]


@contextmanager
def absent_ranks_reported() -> Iterator[None]:
    """Raise :class:`~harness.runs.JobFailed` where ranks did not come; the rank that has waited reports it."""
    try:
        yield
    except RankAbsentError as error:
        if str(error).startswith(f"Rank {launched_rank()} "):  # not if another rank has reported it
            print(f"\nerror: {error}", file=sys.stderr)
        raise JobFailed(str(error)) from error


def settle_ranks() -> None:
    """Take the ranks of the launcher, whichever it is, into torch's variables.

    Raises:
        JobFailed: the launcher's variables make no sense; rank 0 has reported it.
    """
    try:
        notes = take_ranks()
    except LaunchError as error:
        if not error.rank:  # otherwise rank 0 finds the same
            print(f"\nerror: {error}", file=sys.stderr)
        raise JobFailed(str(error)) from None
    for note in notes:
        print(f"launch: {note}", flush=True)
