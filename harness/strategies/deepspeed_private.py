"""DeepSpeed's undocumented attributes, all of them: where its optimizers keep the shards of weights and states.

DeepSpeed has no public way to the whole state of a sharded optimizer on any number of ranks. A version that has lost
one of the names in :data:`PRIVATE` is refused when training starts, and not at the first checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

__all__ = ["PRIVATE", "TESTED", "Shard", "check_private", "is_split", "optimizer_state_of", "refresh_weights", "relink"]

TESTED = "0.19.8"
"""Version of DeepSpeed whose names these are."""

PRIVATE: dict[str, tuple[str, ...]] = {
    "optimizer": ("optimizer", "param_groups", "refresh_fp32_params"),
    "optimizer of stages 1 and 2": ("single_partition_of_fp32_groups", "_hp_optimizer_states_linked"),
    "optimizer of stage 3": (
        "fp32_partitioned_groups_flat",
        "grad_position",
        "get_param_id",
        "_get_param_partition_rank",
    ),
    "parameter of stages 1 and 2": ("_hp_mapping",),
    "mapping of a parameter": ("hp_fragment_address", "lp_fragment_address"),
    "parameter of stage 3": ("ds_id", "ds_numel", "ds_shape"),
}
"""Attributes by the object that has them."""


def check_private(optimizer: Any, parameters: Sequence[Any], stage: int) -> None:
    """Refuse a version of DeepSpeed that has lost any of the attributes that checkpoints need.

    Args:
        optimizer: of the engine.
        parameters: of the optimizer.
        stage: of ZeRO.

    Raises:
        RuntimeError: with the missing attributes and the version that has them.
    """
    stages = "stage 3" if stage == 3 else "stages 1 and 2"
    objects = {"optimizer": optimizer, f"optimizer of {stages}": optimizer}
    if parameters:
        objects[f"parameter of {stages}"] = parameters[0]
    mappings = [mapping for parameter in parameters if (mapping := getattr(parameter, "_hp_mapping", None)) is not None]
    if mappings:
        objects["mapping of a parameter"] = mappings[0]
    missing = [
        f"{name} ({what})" for what, found in objects.items() for name in PRIVATE[what] if not hasattr(found, name)
    ]
    if missing:
        raise RuntimeError(
            f"DeepSpeed {version('deepspeed')} has lost {', '.join(missing)}, which checkpoints in one file need. "
            f"Expected a version such as {TESTED}: pip install deepspeed=={TESTED}, or choose strategy=fsdp."
        )


def is_split(parameter: Any) -> bool:
    """True if ZeRO stage 3 has split the parameter over the ranks."""
    return hasattr(parameter, "ds_id")


@dataclass(frozen=True)
class Shard:
    """Elements of a parameter that are with this rank, and their place in a flat tensor of several parameters.

    Attributes:
        flat: tensor of the shards of several parameters, the key of their state in the optimizer.
        start: first of the elements in ``flat``.
        first: first of the elements in the flattened parameter.
        length: number of elements.
        shape: of the whole parameter.
    """

    flat: Tensor
    start: int
    first: int
    length: int
    shape: torch.Size

    @classmethod
    def of(cls, optimizer: Any, parameter: Any, group: int) -> Shard:
        """Shard of a parameter in DeepSpeed's optimizer, in the group of that number."""
        if is_split(parameter):
            part, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = length * optimizer._get_param_partition_rank(parameter)
            rest = max(parameter.ds_numel - first, 0)  # the last shard is padded
            return cls(
                optimizer.fp32_partitioned_groups_flat[part], start, first, min(length, rest), parameter.ds_shape
            )
        flat, mapping = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:  # all of it is with other ranks
            return cls(flat, 0, 0, 0, parameter.shape)
        place, source = mapping.hp_fragment_address, mapping.lp_fragment_address
        return cls(flat, place.start, source.start, place.numel, parameter.shape)


def optimizer_state_of(optimizer: Any, shard: Shard) -> dict[str, Any]:
    """State of torch's optimizer, within DeepSpeed's, for the flat tensor of a shard; empty before the first step."""
    state: dict[str, Any] = optimizer.optimizer.state[shard.flat]
    return state


def refresh_weights(optimizer: Any) -> None:
    """Take the shards of the weights over from the parameters, after these have been loaded."""
    optimizer.refresh_fp32_params()


def relink(optimizer: Any) -> None:
    """Have DeepSpeed make its own views of the optimizer's states anew after the next step; stages 1 and 2."""
    optimizer._hp_optimizer_states_linked = False
