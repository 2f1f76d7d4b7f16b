"""Trainings with a bad sample on rank 1 under each strategy; run by torchrun from ``test_callbacks_nonfinite.py``.

    python tests/support/nonfinite_ranks.py folder strategy,action ...

Each rank writes what it has seen of each case to ``folder/{case}-{rank}.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import support.deferred_imports  # noqa: F401 - the first
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from support.failure_callbacks import Spoil
from support.strategy_ranks import OPTIMIZERS, STRATEGIES, whole

import harness
from harness.callbacks import NonFiniteError, NonFiniteGuard
from harness.data import EmbeddedAlloyDataModule
from harness.models import schnet_force_field
from harness.module import ForceFieldModule


class Moves(Callback):
    """Whether each step has moved any weight."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = whole(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        after = whole(pl_module)
        self.moved.append(any(not torch.equal(value, after[name]) for name, value in self.before.items()))


def run(folder: Path, strategy: str, action: str) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    data = EmbeddedAlloyDataModule(num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, seed=1)
    data.setup()
    model = schnet_force_field(
        data.statistics, cutoff=4.0, hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=8, seed=3
    )
    module = ForceFieldModule(
        model,
        loss=harness.EnergyForceLoss,
        val_metrics=harness.EnergyForceMetrics,
        type_names=data.type_names,
        optimizer=OPTIMIZERS["adam"],
    )
    moves = Moves()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](),
        max_epochs=1,
        logger=False,
        callbacks=[NonFiniteGuard(action, output_dir=folder), Spoil([2], rank=1), moves],
        use_distributed_sampler=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=1.0,
    )
    message = ""
    try:
        trainer.fit(module, datamodule=data)
    except NonFiniteError as error:
        message = str(error)
    return {"moved": moves.moved, "message": message}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for case in sys.argv[2:]:
        torch.save(run(place / case, *case.split(",")), place / f"{case}-{os.environ['RANK']}.pt")
