"""Trainings of one force field under each strategy; run by torchrun, or alone, from ``test_strategies.py``.

    python tests/support/strategy_ranks.py frames.xyz folder strategy,optimizer[,precision[,option ...]] ...

Each rank writes what it has seen of each case, a dictionary, to ``folder/{name}-{rank}.pt``. Options: ``name=...``, by
default the case itself; ``from=checkpoint``; ``clip``, of gradients; ``accumulate``, of two micro-batches a step;
``groups``, of Adam's parameters, with some frozen, and a second stage; ``model=...``, of another package; ``ema``, of
the weights; ``eval=...``, frames of all ranks together in an evaluation step; ``labels``, dipoles and charges of water,
which some frames lack, by the model of ``examples/dipole``.
"""

from __future__ import annotations

import functools
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import support.deferred_imports  # noqa: F401 - the first
import torch
from deepspeed.runtime.zero import GatheredParameters
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.cpu_deepspeed import CpuZero
from support.other_models import build
from torch.distributed.tensor import DTensor

import harness
from harness import strategies
from harness.callbacks import parity
from harness.data import AtomsDataModule
from harness.distributed import gradient_scale
from harness.models import schnet_force_field
from harness.module import ForceFieldModule, freeze
from harness.schedules import Constant, Join, Stage

WAIT = {"timeout": timedelta(minutes=5)}
STRATEGIES = {
    "single": lambda: strategies.single_device(**WAIT),
    "ddp": lambda: strategies.data_parallel(**WAIT),
    "ddp_static_graph": lambda: strategies.data_parallel(static_graph=True, **WAIT),
    "fsdp": lambda: strategies.fully_sharded(**WAIT),
    "fsdp_two_by_two": lambda: strategies.fully_sharded(tensor_parallel_size=2, **WAIT),
    "zero1": lambda: CpuZero(stage=1, **WAIT),
    "zero2": lambda: CpuZero(stage=2, **WAIT),
    "zero3": lambda: CpuZero(stage=3, **WAIT),
}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=5e-2, momentum=0.9),
    # an epsilon above the rounding of gradients: without it, one that is zero but for rounding makes a whole step
    "adam": functools.partial(torch.optim.Adam, lr=2e-3, eps=1e-4),
    "adamw": functools.partial(torch.optim.AdamW, lr=2e-2, eps=1e-4, weight_decay=0.3),
}
GROUPED = {
    "_target_": "torch.optim.Adam",
    "lr": 2e-3,
    "eps": 1e-4,
    "groups": [
        {"match": ["*.bias"], "lr_factor": 0.5, "name": "biases"},
        {"match": ["*.mlp.*.weight"], "weight_decay": 0.3},
    ],
}
SECOND_STAGE = Join([Constant({}), Stage({}, {"lr": 4e-3, "weight_decay": 0.1})], boundaries=[1])  # of two epochs
FROZEN = ["*.embedding.*", "*.interactions.0.lin.*"]


class Record(Callback):
    """Keeps every value of every step, on every rank."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        loss, metrics = pl_module.loss._last_step, pl_module.train_metrics._last_step
        self.steps.append(loss.to_host("loss/") | metrics.to_host("metric/"))


def run(
    frames: Path, folder: Path, strategy: str, optimizer: str, precision: str, options: dict[str, str]
) -> dict[str, Any]:
    """Train for two epochs, and test."""
    dtype = "float64" if precision == "64-true" else "float32"
    with_labels = "labels" in options
    seed_everything(0, verbose=False)
    data = AtomsDataModule(
        frames,
        split={"val": 3, "test": 3},
        cutoff=4.0,
        batch_size=5,
        eval_batch_size=int(options["eval"]) if "eval" in options else None,
        seed=1,
        labels={"dipole": {}, "charges": {"key": "REF_charges"}} if with_labels else None,
        type_names=["O", "H"] if with_labels else ["Cu", "Pd", "Ag", "Au"],
        dtype=dtype,
    )
    data.setup()
    if with_labels:
        from dipole_model import dipole_force_field

        sizes = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 8}
        model = dipole_force_field(data.statistics, cutoff=4.0, seed=3, **sizes)
    elif "model" in options:
        model = build(options["model"], data.statistics, dtype)
    else:
        model = schnet_force_field(
            data.statistics,
            cutoff=4.0,
            hidden_channels=8,
            num_filters=8,
            num_interactions=1,
            num_gaussians=8,
            seed=3,
            trainable_scales=True,
        )
    masked = {"ignore_nan": {"stress": True}} if "masked" in options else {}  # frames without a stress
    by_type = [{"name": "by_type", "field": "forces", "metric": harness.RootMeanSquaredError(), "per_type": True}]
    loss, metrics, coeffs = harness.EnergyForceStressLoss, harness.EnergyForceStressMetrics, {"stress": 10}
    if with_labels:
        loss, metrics, coeffs = harness.EnergyForceLoss, harness.EnergyForceMetrics, {}
        by_type += [
            {"name": "dipole_mse", "field": "dipole", "metric": harness.MeanSquaredError(), "coeff": 10},
            {"name": "charges_mae", "field": "charges", "metric": harness.MeanAbsoluteError(), "coeff": 1,
             "per_type": True},
        ]  # fmt: skip
    module = ForceFieldModule(
        model.double() if dtype == "float64" else model,
        loss=functools.partial(
            loss, coeffs={"total_energy": 1, "forces": 1, **coeffs}, extra_metrics=by_type, **masked
        ),
        train_metrics=functools.partial(metrics, **masked),
        val_metrics=functools.partial(harness.EnergyForceMetrics, extra_metrics=by_type),
        type_names=data.type_names,
        optimizer=GROUPED if "groups" in options else OPTIMIZERS[optimizer],
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )
    if "groups" in options:
        freeze(module.model, FROZEN)
        module.loss.follow(SECOND_STAGE)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    record = Record()
    drawn: dict[str, int] = {}
    parity._draw = lambda path, panels, type_names: drawn.update(
        {f"{panel.name} {panel.kind}": int(panel.sums[0]) for panel in panels}
    )
    saved = ModelCheckpoint(
        folder,
        filename=f"{options['name'].replace(',', '-')}-{{epoch}}",
        auto_insert_metric_name=False,
        save_top_k=-1,
        enable_version_counter=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy](),
        precision=precision,  # type: ignore[arg-type]
        max_epochs=2,
        log_every_n_steps=1,
        logger=False,
        callbacks=[
            saved,
            record,
            parity.ParityPlot(folder),
            *([EMAWeightAveraging(decay=0.9, use_buffers=False)] if "ema" in options else []),
        ],
        use_distributed_sampler=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=0.05 if "clip" in options else None,
        accumulate_grad_batches=2 if "accumulate" in options else 1,
    )
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer.fit(module, datamodule=data, ckpt_path=options.get("from"), weights_only=True)
    epoch = {key: float(value) for key, value in trainer.callback_metrics.items()}
    trained = whole(module)
    trainer.test(module, datamodule=data, verbose=False)
    return {
        "steps": record.steps,
        "epoch": epoch,
        "test": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "parameters": trained,
        "moved": {name: value - start[name] for name, value in trained.items()},
        "atoms": [int(batch["num_atoms"].sum()) for batch in data.train_dataloader()],
        "scale": gradient_scale(module.process_group),
        "drawn": drawn,
    }


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, gathered where they are sharded."""
    with GatheredParameters(list(module.parameters())):  # of ZeRO stage 3; nothing otherwise
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in module.named_parameters()
        }


def main() -> None:
    frames, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    for case in cases:
        strategy, optimizer, *rest = case.split(",")
        precision, *flags = rest or ["32-true"]
        options = {"name": case} | dict(flag.partition("=")[::2] for flag in flags)
        seen = run(frames, folder, strategy, optimizer, precision, options)
        torch.save(seen, folder / f"{options['name']}-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
