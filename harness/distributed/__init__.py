"""Ranks: launchers, collectives of a step, sharded parameters, the rendezvous, and notes after a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.support.lazy import names_of

if TYPE_CHECKING:
    from harness.distributed.collectives import (
        Merging,
        ProcessGroup,
        any_over_ranks,
        broadcast_from_first,
        broadcast_object,
        data_parallel_size,
        gather_objects,
        gather_to_first,
        gradient_scale,
        is_distributed,
        known_backends,
        max_over_ranks,
        merge_over_ranks,
        rank_in_group,
        sum_over_ranks,
    )
    from harness.distributed.failures import Board, is_lost_connection, keep_alive
    from harness.distributed.launched import (
        START_LIMIT,
        RankAbsentError,
        is_launched_by_torchrun,
        launched_on_node,
        launched_rank,
        launched_ranks,
        named,
    )
    from harness.distributed.launchers import LaunchError, take_ranks
    from harness.distributed.rendezvous import agree, decide, join, other_than_first, share
    from harness.distributed.sharding import join_shards, shard_parameters, sharded_parts, split_like

__all__ = [
    "START_LIMIT",
    "Board",
    "LaunchError",
    "Merging",
    "ProcessGroup",
    "RankAbsentError",
    "agree",
    "any_over_ranks",
    "broadcast_from_first",
    "broadcast_object",
    "data_parallel_size",
    "decide",
    "gather_objects",
    "gather_to_first",
    "gradient_scale",
    "is_distributed",
    "is_launched_by_torchrun",
    "is_lost_connection",
    "join",
    "join_shards",
    "keep_alive",
    "known_backends",
    "launched_on_node",
    "launched_rank",
    "launched_ranks",
    "max_over_ranks",
    "merge_over_ranks",
    "named",
    "other_than_first",
    "rank_in_group",
    "shard_parameters",
    "sharded_parts",
    "share",
    "split_like",
    "sum_over_ranks",
    "take_ranks",
]

__getattr__, __dir__ = names_of(
    __name__,
    {
        "harness.distributed.collectives": (
            "Merging",
            "ProcessGroup",
            "any_over_ranks",
            "broadcast_from_first",
            "broadcast_object",
            "data_parallel_size",
            "gather_objects",
            "gather_to_first",
            "gradient_scale",
            "is_distributed",
            "known_backends",
            "max_over_ranks",
            "merge_over_ranks",
            "rank_in_group",
            "sum_over_ranks",
        ),
        "harness.distributed.failures": ("Board", "is_lost_connection", "keep_alive"),
        "harness.distributed.launchers": ("LaunchError", "take_ranks"),
        "harness.distributed.launched": (
            "START_LIMIT",
            "RankAbsentError",
            "is_launched_by_torchrun",
            "launched_on_node",
            "launched_rank",
            "launched_ranks",
            "named",
        ),
        "harness.distributed.rendezvous": ("agree", "decide", "join", "other_than_first", "share"),
        "harness.distributed.sharding": ("join_shards", "shard_parameters", "sharded_parts", "split_like"),
    },
)
