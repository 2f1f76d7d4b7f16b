"""Parameters that FSDP2 splits over the ranks: shard, split, join."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

__all__ = ["join_shards", "shard_parameters", "sharded_parts", "split_like"]


def shard_parameters(model: nn.Module, mesh: Any) -> None:
    """Split the parameters of a model over a mesh of ranks, as one unit (FSDP2); once only.

    Args:
        model: the model.
        mesh: a one-dimensional :class:`torch.distributed.device_mesh.DeviceMesh`.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(model, FSDPModule):
        fully_shard(model, mesh=mesh)


def sharded_parts(model: nn.Module) -> list[str]:
    """Names of the parts of a model, without itself, that FSDP2 shards as units of their own."""
    from torch.distributed.fsdp import FSDPModule

    return [name for name, part in model.named_modules() if name and isinstance(part, FSDPModule)]


def split_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all ranks have, split over them as a parameter is; itself where the parameter is whole."""
    if not _is_split(parameter) or whole.shape != parameter.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    # nothing is sent: every rank takes its shard of what it has
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)


def join_shards(value: Tensor) -> Tensor:
    """The whole of a tensor that is split over the ranks, on all of them; all must call it. Else the tensor itself."""
    return value.full_tensor() if _is_split(value) else value  # type: ignore[attr-defined]


def _is_split(value: Tensor) -> bool:
    """True of a ``DTensor``; whoever has one has imported its package, which takes the better part of a second."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)
