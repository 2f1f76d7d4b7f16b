"""Strategies: Lightning's, with the changes that keep results on many ranks exact."""

from harness.strategies.checks import check_strategy
from harness.strategies.choices import (
    auto_strategy,
    cluster_plugins,
    data_parallel,
    deep_speed,
    flat_data_parallel,
    fully_sharded,
    single_device,
)
from harness.strategies.deepspeed import AccumulatesInWindows, ZeroStrategy, keep_whole
from harness.strategies.flat import FlatStrategy, average_gradients, compiled_parts, is_compiled_nequip
from harness.strategies.fsdp import FullyShardedStrategy, shard_root
from harness.strategies.groups import (
    connect,
    data_parallel_group,
    data_parallel_ranks,
    is_on_gpu,
    launched_data_parallel_ranks,
    splits_parameters,
)
from harness.strategies.weights import load_weights, refuse_folder

__all__ = [
    "AccumulatesInWindows",
    "FlatStrategy",
    "FullyShardedStrategy",
    "ZeroStrategy",
    "auto_strategy",
    "average_gradients",
    "check_strategy",
    "cluster_plugins",
    "compiled_parts",
    "connect",
    "data_parallel",
    "data_parallel_group",
    "data_parallel_ranks",
    "deep_speed",
    "flat_data_parallel",
    "fully_sharded",
    "is_compiled_nequip",
    "is_on_gpu",
    "keep_whole",
    "launched_data_parallel_ranks",
    "load_weights",
    "refuse_folder",
    "shard_root",
    "single_device",
    "splits_parameters",
]
