"""Data parallelism without hooks in the backward pass: one all-reduce of all gradients behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.distributed import broadcast_from_first, data_parallel_size, sum_over_ranks
from harness.support.device import to_device
from harness.support.lightning_private import ddp_options
from harness.support.torch_private import is_compiled

__all__ = ["FlatStrategy", "average_gradients", "compiled_parts"]


class FlatStrategy(DDPStrategy):
    r"""Every rank holds the whole model; gradients are averaged by one all-reduce after the backward pass.

    Nothing is wrapped around the model and no hooks are in its backward pass. NequIP's ``compile_mode=compile``, which
    derives forces within a compiled graph, is not for DDP (see its ``SimpleDDPStrategy``), but for this. Communication
    does not overlap with the backward pass, as it does under DDP.

    Parameters and buffers of rank 0 are sent once, when a training starts. The optimizer is handed
    :math:`\frac{1}{W}\sum_r g_r`, as under DDP. In a step of several micro-batches gradients are added up on each rank,
    and sent after the last of them. A parameter without a gradient on all ranks keeps none.

    Args:
        options: of Lightning's ``DDPStrategy``, such as ``timeout``; those of ``DistributedDataParallel`` mean nothing
            here.

    Raises:
        ValueError: an option of ``DistributedDataParallel``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        unused = sorted(ddp_options(self))
        if unused:
            raise ValueError(
                f"strategy=flat does not use DistributedDataParallel, so it has no {', '.join(unused)}. Leave it out, "
                f"or choose strategy=ddp."
            )
        self._sends = True

    def configure_ddp(self) -> None:
        """Send the parameters and buffers of rank 0 to all ranks; the model stays as it is."""
        model = cast(nn.Module, self.model)
        broadcast_from_first([*model.parameters(), *model.buffers()])

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Backward pass, and average of the gradients before callbacks see them."""
        module: Any = self.lightning_module
        self.pre_backward(closure_loss)
        loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(loss, module, optimizer, *args, **kwargs)
        if self._sends:
            average_gradients(module)
        done = cast(Tensor, self.precision_plugin.post_backward(loss, module))
        self.post_backward(done)
        return done

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context of a micro-batch that others of the same step follow: gradients stay on their rank."""
        self._sends = False
        try:
            yield
        finally:
            self._sends = True


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replace the gradients of a module by their average over all ranks: one all-reduce for each dtype.

    All ranks call it. A rank without a gradient of a parameter takes part with zeros; without one on any rank it stays
    without. The host waits only on ranks that lack some.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
        parameters = [parameter for parameter in trained if parameter.dtype == dtype]
        lacks = [parameter.grad is None for parameter in parameters]
        pieces = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
            for parameter in parameters
        ]
        # behind the gradients, the number of ranks that have one
        has = to_device([float(not lack) for lack in lacks], pieces[0].device).to(dtype)
        total = sum_over_ranks(torch.cat([*pieces, has]))
        sizes = [parameter.numel() for parameter in parameters]
        *averages, holders = torch.split(total, [*sizes, len(parameters)])
        held = [True] * len(parameters) if not any(lacks) else (holders > 0).tolist()
        for parameter, average, is_held in zip(parameters, averages, held, strict=True):
            if not is_held:
                continue
            average = (average / data_parallel_size()).view_as(parameter)
            if parameter.grad is None:
                parameter.grad = average.clone()
            else:
                parameter.grad.copy_(average)


def compiled_parts(model: nn.Module) -> list[str]:
    """Names of the parts of a model that are compiled, by ``torch.compile`` or by NequIP's ``compile_mode``."""
    return [
        name or "the model" for name, part in model.named_modules() if is_compiled(part) or is_compiled_nequip(part)
    ]


def is_compiled_nequip(part: nn.Module) -> bool:
    """True for a model of NequIP's kind with ``compile_mode=compile``."""
    return bool(getattr(part, "is_compile_graph_model", False))
