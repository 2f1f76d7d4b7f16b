"""Collectives of the package: merge rows, agree on small objects, leave notes, split and join parameters.

This is the only module that calls :mod:`torch.distributed`, but for :mod:`harness.launcher`, which starts ranks with
its agent. Every function works without a process group too, where it does what one rank would do.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from threading import Thread
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.elastic.timer.file_based_local_timer import FileTimerClient
from torch.distributed.rendezvous import rendezvous

ProcessGroup = dist.ProcessGroup

__all__ = [
    "START_LIMIT",
    "Board",
    "ProcessGroup",
    "RankAbsentError",
    "agree",
    "data_parallel_size",
    "decide",
    "gather_objects",
    "global_rank",
    "gradient_scale",
    "is_distributed",
    "is_launched_by_torchrun",
    "is_lost_connection",
    "join",
    "join_shards",
    "keep_alive",
    "known_backends",
    "launched_rank",
    "launched_ranks",
    "max_over_ranks",
    "merge_over_ranks",
    "named",
    "shard_parameters",
    "sharded_parts",
    "share",
    "split_like",
    "sum_over_ranks",
    "take_ranks_of_submitit",
]

START_LIMIT = timedelta(minutes=5)
"""How long ranks wait for each other before they know the configuration, and with it a limit of its own."""

_MARGIN = timedelta(seconds=10)
_ABSENT = "absent: "
_SHOWN = 8
# what gloo, NCCL and their store say when another rank has gone or does not answer
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "connectFullMesh failed",
    "No route to host",
    "Network is unreachable",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "ncclSystemError",
)


class RankAbsentError(TimeoutError):
    """Ranks of the job did not come to where this rank waited for them; the message names them."""


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def data_parallel_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks that share a batch: the size of ``group``, or of the world, or 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def global_rank(group: ProcessGroup | None = None) -> int:
    """Rank of this process in ``group``, or in the world, or 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def gradient_scale(group: ProcessGroup | None = None, num_micro_batches: int = 1) -> int:
    r"""Factor on the loss that cancels averages of gradients: over the data-parallel ranks, and over micro-batches.

    DDP, FSDP and DeepSpeed hand the optimizer :math:`\frac{1}{W}\sum_r \nabla L_r`. The merged loss :math:`L` is the
    same on all W ranks and its backward pass stops at each rank's own row, so that :math:`\sum_r \nabla L_r` is the
    gradient of one process on the whole batch. Backward of :math:`W \cdot L` is therefore exact.

    A step of several micro-batches is the *sum* of their gradients, see :class:`harness.window.Window`. A trainer that
    divides each loss by a number :math:`k`, as Lightning does by ``accumulate_grad_batches`` (also where the last step
    of an epoch has fewer micro-batches), needs the factor :math:`W k`.

    Args:
        group: the data-parallel group, if a strategy splits the world; the whole world otherwise.
        num_micro_batches: :math:`k`, what the trainer divides the loss by.
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
    largest = max_over_ranks(local, group)
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
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    # nothing is sent: every rank takes its shard of what it has
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)


def join_shards(value: Tensor) -> Tensor:
    """The whole of a tensor that is split over the ranks, on all of them; all must call it. Else the tensor itself."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def known_backends() -> list[str]:
    """Names of the backends of process groups that this torch has heard of, whether they can be used here or not."""
    return list(dist.Backend.backend_list)


def launched_ranks() -> int:
    """Number of ranks that a launcher has started, before there is a process group; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's number among :func:`launched_ranks`."""
    return int(os.environ.get("RANK", "0"))


def take_ranks_of_submitit() -> bool:
    """Tell torch of the ranks that submitit has started, which has its own words for them.

    Returns:
        Whether this is a job of submitit's.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or is_launched_by_torchrun():
        return False
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    job = JobEnvironment()
    if job.num_tasks == 1:
        return True
    os.environ.pop("MASTER_PORT", None)  # of whatever has started it; submitit draws one for the job
    # all GPUs of the node stay visible to each rank, which takes that of its number
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["GROUP_RANK"] = str(job.node)
    if job.num_nodes == 1:  # the name of a host may not resolve on itself
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    return True


def agree(key: str, proposal: str) -> str:
    """The proposal of whichever rank came first, on every rank, before there is a process group.

    Ranks meet at the rendezvous store of their launcher (torchrun, or any that sets ``RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR`` and ``MASTER_PORT``), which outlives restarts of the ranks: a restarted job agrees on the same.
    Without a launcher it is the proposal itself.
    """
    if launched_ranks() == 1:
        return proposal
    return cast(bytes, _job_store().compare_set(f"harness/{key}", "", proposal)).decode()


def join(backend: str, timeout: timedelta, device: torch.device | None = None) -> None:
    """Make the process group of the job, unless there is one or no launcher has started several ranks.

    The address book of the group is kept apart for each start of the job. torch's own, which the launcher's store keeps
    over restarts, still has the addresses of the ranks of before, and restarted ranks may wait for those.

    Args:
        backend: ``gloo``, ``nccl`` …
        timeout: how long a collective waits.
        device: this rank's GPU.
    """
    if launched_ranks() == 1 or is_distributed():
        return
    # of groups that are made later without a limit of their own: meshes of devices, DeepSpeed's
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"{_attempt()}/group", _job_store())  # type: ignore[attr-defined]
    on_device: dict[str, Any] = {} if device is None or device.type == "cpu" else {"device_id": device}
    dist.init_process_group(
        backend, store=store, rank=launched_rank(), world_size=launched_ranks(), timeout=timeout, **on_device
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
        _job_store().set(shared, value)
        return value
    return _answer(shared, f"rank 0 to arrive at {key!r}", timeout)


def decide(key: str, value: str, decision: Callable[[list[str]], str], timeout: timedelta = START_LIMIT) -> str:
    """What ``decision`` makes of the values of all ranks, in rank order, on every rank, without a process group.

    Rank 0 collects and decides, the others send one value and read one, however many they are. The n-th calls with a
    key belong together.

    Raises:
        RankAbsentError: some ranks did not come; they are named, on every rank that is there.
    """
    if launched_ranks() == 1:
        return decision([value])
    store, prefix = _job_store(), _moment(key)
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
            absent = [rank for rank, each in enumerate(keys) if not store.check([each])]
            made = _ABSENT + _waited(f"{named(absent)} to arrive at {key!r}", timeout)
        else:
            made = decision([cast(bytes, each).decode() for each in store.multi_get(keys)])
        store.set(f"{prefix}/decision", made)
    if made.startswith(_ABSENT):
        raise RankAbsentError(made.removeprefix(_ABSENT))
    return made


def named(ranks: Sequence[int], hosts: Mapping[int, str | None] | None = None) -> str:
    """``rank 3 (host a) and rank 7 (host b)``; of many, the first few and their number."""
    known = hosts or {}
    shown = [f"rank {rank} (host {known[rank]})" if known.get(rank) else f"rank {rank}" for rank in ranks[:_SHOWN]]
    if len(ranks) > _SHOWN:
        shown.append(f"{len(ranks) - _SHOWN} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else "no rank"


class Board:
    """Where the ranks of a job leave notes for each other, beside the process group and when that has failed.

    Notes are kept at the launcher's store, apart for each start of the job. Every call comes back within ``limit``
    seconds; once one did not, the store counts as lost and all further calls come back at once, with None.
    """

    def __init__(self, limit: float = 3.0) -> None:
        self._store, self._prefix, self._limit = _job_store(), _attempt(), limit
        self.is_lost = False

    def put(self, key: str, value: str) -> None:
        """Leave a note."""
        self._within_limit(lambda store, name: store.set(name, value), key)

    def put_first(self, key: str, value: str) -> str | None:
        """Leave a note unless there is one, and read that which is there then."""
        found = self._within_limit(lambda store, name: store.compare_set(name, "", value), key)
        return None if found is None else cast(bytes, found).decode()

    def append(self, key: str, value: str) -> None:
        """Add to a note that many ranks write."""
        self._within_limit(lambda store, name: store.append(name, value), key)

    def read(self, key: str) -> str | None:
        """The note, or None if there is none."""
        found = self._within_limit(lambda store, name: store.get(name) if store.check([name]) else None, key)
        return None if found is None else cast(bytes, found).decode()

    def _within_limit(self, action: Callable[[Any, str], Any], key: str) -> Any:
        """The result of an action on the store; None if it fails or hangs, as it may once a link is down."""
        if self.is_lost:
            return None
        results: list[Any] = []

        def act() -> None:
            with contextlib.suppress(RuntimeError):  # all errors of a store are
                results.append(action(self._store, f"{self._prefix}/{key}"))

        # a thread that stays behind in the store holds nobody up
        thread = Thread(target=act, daemon=True)
        thread.start()
        thread.join(self._limit)
        if not results:
            self.is_lost = True
            return None
        return results[0]


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not answer or has gone: not the fault of this rank."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST)


def keep_alive(seconds: float) -> None:
    """Ask the launcher to kill this process unless it asks again within ``seconds``; 0 takes that back.

    A stopped process cannot leave by itself. torchrun can do it if it was started with
    ``TORCHELASTIC_ENABLE_FILE_TIMER=1``, as the scripts in ``launch/`` do; without that, nothing happens.
    """
    path = os.environ.get("TORCHELASTIC_TIMER_FILE")
    # no file: the launcher is leaving itself, and torch would tell so by a traceback
    if not path or not is_launched_by_torchrun() or not os.path.exists(path):
        return
    timer: Any = FileTimerClient(path)
    with contextlib.suppress(OSError, RuntimeError):  # likewise
        if seconds > 0:
            timer.acquire("harness", time.time() + seconds)
        else:
            timer.release("harness")


def is_launched_by_torchrun() -> bool:
    """Whether a torchrun agent watches over this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@cache
def _job_store() -> Any:
    """Where the ranks of a launcher meet; kept for the life of the process, which may serve it to the others."""
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=START_LIMIT)))
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if launched_rank() == 0 and not is_launched_by_torchrun():  # it keeps the store itself
            awaited = f"the other ranks to reach it at {where} ({str(error).splitlines()[0].rstrip('.')})"
            raise RankAbsentError(_waited(awaited, START_LIMIT)) from None
        raise RankAbsentError(
            f"Rank {launched_rank()} could not reach the store of the job at {where}: {str(error).splitlines()[0]}. "
            f"Has rank 0 been started, and can this host reach that address?"
        ) from None
    return store


@cache
def _attempt() -> str:
    """Prefix of the keys of this start of the job, on which all its ranks have agreed.

    The store outlives restarts, and nothing that a launcher tells its ranks is both new at each start and the same on
    all of them: with elastic nodes each agent counts its own restarts. So every rank comes with a number of its own,
    and rank 0 answers each number with the prefix that it has drawn; whoever waits for an answer to a new number is not
    misled by what an earlier start has left.
    """
    store, arrivals, rank = _job_store(), "harness/arrivals", launched_rank()
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
        for number in set(_listed(store, arrivals)) - replied:
            store.set(f"harness/reply/{number}", prefix)
            replied.add(number)
        joined = {int(each) for each in _listed(store, f"{prefix}/joined")}
        if len(joined) == launched_ranks():
            return prefix
        if time.monotonic() > deadline:
            absent = sorted(set(range(launched_ranks())) - joined)
            raise RankAbsentError(_waited(f"{named(absent)} to start", START_LIMIT))
        time.sleep(0.02)


def _moment(key: str) -> str:
    """Prefix of the keys of one call: every rank makes the same calls in the same order."""
    number = _CALLS[key] = _CALLS.get(key, -1) + 1
    return f"{_attempt()}/{key}/{number}"


_CALLS: dict[str, int] = {}


def _listed(store: Any, key: str) -> list[str]:
    return [each for each in cast(bytes, store.get(key)).decode().split(",") if each]


def _answer(key: str, awaited: str, timeout: timedelta) -> str:
    try:
        _job_store().wait([key], timeout)
        return cast(bytes, _job_store().get(key)).decode()
    except dist.DistError:
        raise RankAbsentError(_waited(awaited, timeout)) from None


def _waited(awaited: str, timeout: timedelta) -> str:
    return (
        f"Rank {launched_rank()} waited {timeout.total_seconds():.0f} s for {awaited}. Have all ranks been started, "
        f"with the same command, and do they still run?"
    )
