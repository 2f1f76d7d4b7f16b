"""Ranks that a launcher has started, by its variables alone: nothing of torch is imported here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta

__all__ = [
    "START_LIMIT",
    "RankAbsentError",
    "is_launched_by_torchrun",
    "launched_on_node",
    "launched_rank",
    "launched_ranks",
    "named",
]

START_LIMIT = timedelta(minutes=5)
"""Time limit of ranks that wait for each other before they know the one that the config sets."""

_SHOWN = 8


class RankAbsentError(TimeoutError):
    """Ranks of the job did not arrive where this rank waited for them; the message names them."""


def launched_ranks() -> int:
    """Number of ranks that a launcher has started, before there is a process group; 1 without a launcher.

    They are those of torch's variables, which :func:`~harness.distributed.take_ranks` makes of any launcher's.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def launched_rank() -> int:
    """This process's number among :func:`launched_ranks`."""
    return int(os.environ.get("RANK", "0"))


def launched_on_node() -> int:
    """Number of those of :func:`launched_ranks` that are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def named(ranks: Sequence[int], hosts: Mapping[int, str | None] | None = None) -> str:
    """``rank 3 (host a) and rank 7 (host b)``; of many, the first few and their number."""
    known = hosts or {}
    shown = [f"rank {rank} (host {known[rank]})" if known.get(rank) else f"rank {rank}" for rank in ranks[:_SHOWN]]
    if len(ranks) > _SHOWN:
        shown.append(f"{len(ranks) - _SHOWN} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else "no rank"


def is_launched_by_torchrun() -> bool:
    """True under a torchrun agent."""
    return "TORCHELASTIC_RUN_ID" in os.environ
