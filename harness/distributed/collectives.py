"""Collectives of a step and an epoch: merge rows, sum, take maxima, gather small objects.

Every function works without a process group too, as on one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = [
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
]

ProcessGroup = dist.ProcessGroup


def is_distributed() -> bool:
    """True if a process group exists."""
    return dist.is_available() and dist.is_initialized()


def data_parallel_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks that share a batch: the size of ``group``, or of the world, or 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def rank_in_group(group: ProcessGroup | None = None) -> int:
    """Rank of this process in ``group``, or in the world, or 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def gradient_scale(group: ProcessGroup | None = None, num_micro_batches: int = 1) -> int:
    r"""Factor on the loss that cancels averages of gradients: over the data-parallel ranks, and over micro-batches.

    DDP, FSDP and DeepSpeed hand the optimizer :math:`\frac{1}{W}\sum_r \nabla L_r`. The merged loss :math:`L` is the
    same on all W ranks and its backward pass stops at every rank's own row, so that :math:`\sum_r \nabla L_r` is the
    gradient of one process on the whole batch. Backward of :math:`W \cdot L` is therefore exact.

    A step of several micro-batches is the *sum* of their gradients, see :class:`harness.metrics.Window`. A trainer that
    divides each loss by a number :math:`k`, as Lightning does by ``accumulate_grad_batches`` (also where the last step
    of an epoch has fewer micro-batches), needs the factor :math:`W k`.

    Args:
        group: the data-parallel group, if a strategy splits the world; the whole world otherwise.
        num_micro_batches: :math:`k`, the number that the trainer divides the loss by.
    """
    return data_parallel_size(group) * num_micro_batches


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
    A NaN maximum on any rank gives NaN on all ranks, with every backend.

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
    largest = max_over_ranks(local, group)
    # The number of ranks that hold a maximum travels with the sums: it shares out the gradient, and since NaN survives
    # a sum but not every backend's maximum, it carries the NaN.
    holds = torch.where(local.isnan(), local, (local == largest).to(local.dtype))
    packed = _merge_sums(torch.cat((additive, holds)), group)
    merged, holders = packed[: additive.numel()], packed[additive.numel() :].detach()
    largest = torch.where(holders.isnan(), holders, largest)
    if maxima.requires_grad:
        share = torch.where(holds > 0, holds / holders, 0.0)
        # adds exactly zero (where() keeps an infinite maximum from becoming NaN) and carries the gradient
        largest = largest + share * (maxima - local).where(local.isfinite(), torch.zeros_like(local))
    return merged.to(origin), largest.to(origin)


class Merging:
    """A merge over the ranks that is under way while the host goes on: :func:`merge_over_ranks`, without a gradient.

    The same collectives, begun at once: one SUM all-reduce, and one MAX all-reduce if there are maxima. All ranks begin
    it at the same place; each of them waits when it likes, or not at all. With NCCL it is the device that waits, and
    only for what is launched after :meth:`wait`.

    Args:
        additive: float64 ``[num_additive]``, on every rank of the same length.
        maxima: float64 ``[num_maxima]``; ``-inf`` is neutral. May be empty.
        group: the data-parallel group; the whole world if None.
    """

    def __init__(self, additive: Tensor, maxima: Tensor, group: ProcessGroup | None = None) -> None:
        additive, maxima = additive.detach(), maxima.detach()
        self._origin, self._num_additive = additive.device, additive.numel()
        self._works: list[Any] = []
        self._is_alone = data_parallel_size(group) == 1
        if not self._is_alone:
            device = _collective_device(self._origin, group)
            additive, maxima = additive.to(device, copy=True), maxima.to(device)
            if maxima.numel():
                # a NaN survives a sum, but not every backend's maximum: the number of ranks that have one is summed
                is_nan = maxima.isnan()
                maxima = maxima.masked_fill(is_nan, -torch.inf)
                additive = torch.cat((additive, is_nan.to(additive.dtype)))
                self._works.append(dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group, async_op=True))
            self._works.append(dist.all_reduce(additive, op=dist.ReduceOp.SUM, group=group, async_op=True))
        self._additive, self._maxima = additive, maxima

    def wait(self) -> tuple[Tensor, Tensor]:
        """Merged ``additive`` and ``maxima``, the same bits on every rank."""
        _await_merge(self._works)
        self._works = []
        if self._is_alone:
            return self._additive, self._maxima
        additive, with_nan = self._additive[: self._num_additive], self._additive[self._num_additive :]
        maxima = self._maxima
        if maxima.numel():
            maxima = maxima.masked_fill(with_nan > 0, torch.nan)
        return additive.to(self._origin), maxima.to(self._origin)


def _await_merge(works: list[Any]) -> None:
    """Wait for the collectives of a merge; a function of its own, by whose name a report of absent ranks knows it."""
    for work in works:
        work.wait()


def sum_over_ranks(value: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum of a tensor over the whole group, the same bits on every rank; one all-reduce, and no gradient.

    Args:
        value: of the same shape on every rank; it is overwritten where it can be, to save its memory.
        group: the data-parallel group; the whole world if None.
    """
    if data_parallel_size(group) == 1:
        return value.detach()
    total = value.detach().to(_collective_device(value.device, group))
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total.to(value.device)


def max_over_ranks(value: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Element-wise maximum over the whole group, the same bits on every rank; one all-reduce, and no gradient.

    Args:
        value: of the same shape on every rank; no NaN, of which backends make different things.
        group: the data-parallel group; the whole world if None.
    """
    if data_parallel_size(group) == 1:
        return value.detach()
    largest = value.detach().to(_collective_device(value.device, group), copy=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest.to(value.device)


def broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Give all ranks the values of rank 0, in place; one broadcast for each tensor, and no gradient.

    Args:
        tensors: the same number of them on every rank, of the same shapes and dtypes.
    """
    if data_parallel_size() == 1:
        return
    for tensor in tensors:
        values = tensor.detach().to(_collective_device(tensor.device, None)).contiguous()
        dist.broadcast(values, src=0)
        tensor.detach().copy_(values)


def _collective_device(device: torch.device, group: ProcessGroup | None) -> torch.device:
    """Device on which the group's backend can reduce: NCCL has no CPU tensors."""
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def any_over_ranks(flag: bool, group: ProcessGroup | None = None) -> bool:
    """True on all ranks if ``flag`` is on any; one all-reduce, and the host waits for it."""
    return bool(max_over_ranks(torch.tensor(float(flag)), group).item())


def gather_to_first(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank, in rank order, on the first rank of the group; an empty list on the others.

    For what one rank writes or draws. A rank sends its own, and gets nothing: :func:`gather_objects` would give each
    rank those of all others.
    """
    if data_parallel_size(group) == 1:
        return [value]
    gathered = [None] * data_parallel_size(group) if rank_in_group(group) == 0 else None
    dist.gather_object(value, gathered, dst=_first_of(group), group=group)
    return gathered or []


def broadcast_object(value: Any, group: ProcessGroup | None = None) -> Any:
    """The first rank's ``value``, on every rank of the group. For small objects, outside of steps."""
    if data_parallel_size(group) == 1:
        return value
    sent = [value]
    dist.broadcast_object_list(sent, src=_first_of(group), group=group)
    return sent[0]


def _first_of(group: ProcessGroup | None) -> int:
    """Number in the world of the first rank of a group."""
    return 0 if group is None else dist.get_global_rank(group, 0)


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank, in rank order, on every rank. For a few numbers of a rank, outside of steps.

    Every rank gets and unpacks the objects of all, each as long as the longest: where one rank is enough, take
    :func:`gather_to_first`.
    """
    if data_parallel_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * data_parallel_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def known_backends() -> list[str]:
    """Names of the backends of process groups that torch knows; not all of them can be used everywhere."""
    return list(dist.Backend.backend_list)
