"""Collectives of the package: merge rows over a process group, agree on small objects.

This is the only module that calls :mod:`torch.distributed`. Every function works without a process group too, where
it does what one rank would do.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed.rendezvous import rendezvous

ProcessGroup = dist.ProcessGroup

__all__ = [
    "ProcessGroup",
    "agree",
    "data_parallel_size",
    "exchange",
    "gather_objects",
    "global_rank",
    "gradient_scale",
    "is_distributed",
    "known_backends",
    "launched_rank",
    "launched_ranks",
    "merge_over_ranks",
]


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def data_parallel_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks that share a batch: the size of ``group``, or of the world, or 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def global_rank(group: ProcessGroup | None = None) -> int:
    """Rank of this process in ``group``, or in the world, or 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def gradient_scale(group: ProcessGroup | None = None) -> int:
    r"""Factor on the loss that cancels the averaging of gradients over the data-parallel ranks.

    DDP, FSDP and DeepSpeed hand the optimizer :math:`\frac{1}{W}\sum_r \nabla L_r`. The merged loss :math:`L` is the
    same on all W ranks and its backward pass stops at each rank's own row, so that :math:`\sum_r \nabla L_r` is the
    gradient of one process on the whole batch. Backward of :math:`W \cdot L` is therefore exact.

    Args:
        group: the data-parallel group, if a strategy splits the world; the whole world otherwise.
    """
    return data_parallel_size(group)


class _MergeSums(torch.autograd.Function):
    """All-reduce SUM whose backward passes the gradient to the local addend unchanged."""

    @staticmethod
    def forward(ctx: FunctionCtx, local: Tensor, group: ProcessGroup | None) -> Tensor:
        merged = local.clone()
        dist.all_reduce(merged, op=dist.ReduceOp.SUM, group=group)
        return merged

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Any) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _merge_sums(local: Tensor, group: ProcessGroup | None) -> Tensor:
    return cast(Tensor, _MergeSums.apply(local, group))  # type: ignore[no-untyped-call]


def merge_over_ranks(additive: Tensor, maxima: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Row of the whole group: sums of ``additive``, element-wise maxima of ``maxima``; the same bits on every rank.

    One SUM all-reduce, and one MAX all-reduce before it if there are maxima. Gradients pass to this rank's own row
    unchanged; that of a maximum goes to the rank that holds it, in equal shares where several do (a subgradient).
    A NaN maximum on any rank gives NaN on all ranks, whatever the backend makes of NaN.

    Args:
        additive: float64 ``[num_additive]``, on every rank of the same length.
        maxima: float64 ``[num_maxima]``; ``-inf`` is neutral. May be empty.
        group: the data-parallel group; the whole world if None.
    """
    if data_parallel_size(group) == 1:
        return additive, maxima
    origin = additive.device
    device = _collective_device(origin, group)
    additive, maxima = additive.to(device), maxima.to(device)
    if maxima.numel() == 0:
        merged = _merge_sums(additive, group)
        return merged.to(origin), maxima.to(origin)

    local = maxima.detach()
    largest = local.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    # How many ranks hold each maximum travels with the sums: it shares out the gradient, and since NaN survives a sum
    # but not every backend's maximum, it carries the NaN.
    holds = torch.where(local.isnan(), local, (local == largest).to(local.dtype))
    packed = _merge_sums(torch.cat((additive, holds)), group)
    merged, holders = packed[: additive.numel()], packed[additive.numel() :].detach()
    largest = torch.where(holders.isnan(), holders, largest)
    if maxima.requires_grad:
        share = torch.where(holds > 0, holds / holders, 0.0)
        # adds exactly zero (where() keeps an infinite maximum from becoming NaN) and carries the gradient
        largest = largest + share * (maxima - local).where(local.isfinite(), torch.zeros_like(local))
    return merged.to(origin), largest.to(origin)


def _collective_device(device: torch.device, group: ProcessGroup | None) -> torch.device:
    """Where the group's backend can reduce: NCCL has no CPU tensors."""
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank. For small objects, outside of steps."""
    if data_parallel_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * data_parallel_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def known_backends() -> list[str]:
    """Names of the backends of process groups that this torch has heard of, whether they can be used here or not."""
    return list(dist.Backend.backend_list)


def launched_ranks() -> int:
    """Number of ranks that a launcher has started, before there is a process group; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number among :func:`launched_ranks`."""
    return int(os.environ.get("RANK", "0"))


def agree(key: str, proposal: str) -> str:
    """The proposal of whichever rank came first, on every rank, before there is a process group.

    Ranks meet at the rendezvous store of their launcher (torchrun, or any that sets ``RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR`` and ``MASTER_PORT``), which outlives restarts of the ranks: a restarted job agrees on the same.
    Without a launcher it is the proposal itself.
    """
    if launched_ranks() == 1:
        return proposal
    return cast(bytes, _job_store().compare_set(f"harness/{key}", "", proposal)).decode()


def exchange(key: str, value: str, timeout: timedelta = timedelta(minutes=5)) -> list[str]:
    """``value`` of every rank, in rank order, on every rank, before there is a process group.

    Each key is used once in the life of a process. A restarted rank does not see what was exchanged before.

    Raises:
        TimeoutError: some ranks did not come; they are named.
    """
    if launched_ranks() == 1:
        return [value]
    store, attempt = _job_store(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"harness/{key}/{attempt}/{rank}" for rank in range(launched_ranks())]
    store.set(keys[launched_rank()], value)
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        absent = [rank for rank, each in enumerate(keys) if not store.check([each])]
        raise TimeoutError(
            f"Rank {launched_rank()} waited {timeout.total_seconds():.0f} s for rank(s) {', '.join(map(str, absent))} "
            f"to arrive at {key!r}. Have they been started, and do they run the same command?"
        ) from None
    return [cast(bytes, store.get(each)).decode() for each in keys]


@cache
def _job_store() -> Any:
    """Where the ranks of a launcher meet; kept for the life of the process, which may serve it to the others."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store
