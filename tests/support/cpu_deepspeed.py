"""DeepSpeed's strategy on CPU ranks with gloo, for tests only: the checks of Lightning for CUDA are left out."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from harness.strategies import ZeroStrategy
from harness.strategies.extensions import remove_abandoned_locks

os.environ.setdefault("DS_ACCELERATOR", "cpu")


class CpuZero(ZeroStrategy):
    """ZeRO on CPUs."""

    needs_cuda = False

    def __init__(self, **options: Any) -> None:
        super().__init__(process_group_backend="gloo", **options)
        # the optimizer is torch's own, also where DeepSpeed would compile one for CPUs
        self.config["zero_force_ds_cpu_optimizer"] = False  # type: ignore[index]

    def setup_environment(self) -> None:
        """As every DDP strategy's, without the refusal of CPUs."""
        remove_abandoned_locks()
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As Lightning's, without a look at the CUDA devices."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """The CPU with an index, which DeepSpeed asks for."""
        return torch.device("cpu", 0)
