"""A strategy of your own: DDP that sends gradients in float16, half the bytes of float32.

    PYTHONPATH=examples/extend torchrun --nproc-per-node 2 -m harness.train \
        strategy._target_=rounded_gradients.RoundedGradients
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook


class RoundedGradients(DDPStrategy):
    """DDP whose all-reduce of gradients runs in float16: gradients are good to 11 bits, values and weights as before.

    Args:
        options: of Lightning's ``DDPStrategy`` and torch's ``DistributedDataParallel``; ``harness-train`` gives
            ``timeout``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"gradient_as_bucket_view": True, **options})

    def configure_ddp(self) -> None:
        """Wrap the model, and have DDP call the hook for each bucket of gradients."""
        super().configure_ddp()
        self.model.register_comm_hook(None, fp16_compress_hook)
