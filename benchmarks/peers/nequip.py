"""``nequip-train`` with the config of NequIP's or Allegro's tutorial, and the training here that is the same."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.common import CLOCK, COLUMNS, CUTOFF, InOrder, adopt, run

COMMAND, PREFIX = "nequip-train", "model."
SIZES = {
    "nequip": {"num_layers": 2, "l_max": 1, "num_features": 8, "radial_mlp_depth": 1, "radial_mlp_width": 16},
    "allegro": {"num_layers": 1, "l_max": 1, "num_scalar_features": 16, "num_tensor_features": 4},
}
TARGETS = {"nequip": "nequip.model.NequIPGNNModel", "allegro": "allegro.model.AllegroModel"}
MONITOR = "val0_epoch/weighted_sum"
PLATEAU = {
    "scheduler": {
        "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "factor": 0.6,
        "patience": 5,
        "threshold": 0.2,
        "min_lr": 1e-6,
    },
    "monitor": MONITOR,
    "interval": "epoch",
    "frequency": 1,
}
STOPPING = {
    "_target_": "lightning.pytorch.callbacks.EarlyStopping",
    "monitor": MONITOR,
    "min_delta": 1e-3,
    "patience": 20,
}
# of each tutorial: sizes of batches in training and validation, errors in the monitored sum, and what moves the rate
RECIPES: dict[str, dict[str, Any]] = {
    "nequip": {
        "batches": (5, 10),
        "monitored": ("total_energy_mae", "forces_mae"),
        "lr": 0.01,
        "lr_scheduler": PLATEAU,
        "callbacks": [STOPPING],
    },
    "allegro": {
        "batches": (1, 5),
        "monitored": ("per_atom_energy_mae", "forces_mae"),
        "lr": 0.001,
        "lr_scheduler": None,
        "callbacks": [],
    },
}


def overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of the training here."""
    sizes = [f"model.{name}={value}" for name, value in SIZES[options.package].items()]
    return [f"experiment={options.package}_recipe", "precision=float64", *sizes]


def model_config(package: str) -> dict[str, Any]:
    """``_target_`` and sizes of the model."""
    found: dict[str, Any] = {"_target_": TARGETS[package], **SIZES[package]}
    if package == "allegro":
        found["radial_chemical_embed"] = {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8}
        widths = ("scalar_embed_mlp", "allegro_mlp", "readout_mlp")
        found |= dict.fromkeys((f"{name}_hidden_layers_width" for name in widths), found["num_scalar_features"])
    return found


def config(options: argparse.Namespace, model: dict[str, Any]) -> dict[str, Any]:
    """Config of ``nequip-train``: the tutorial's, with these data, references, and this model."""
    types, recipe = list(options.energies), RECIPES[options.package]
    metrics = {
        "_target_": "nequip.train.EnergyForceMetrics",
        "coeffs": {**dict.fromkeys(recipe["monitored"], 1.0), "per_atom_energy_rmse": None, "forces_rmse": None},
    }
    loader = {"_target_": "torch.utils.data.DataLoader", "num_workers": 0}
    averages, (batch, eval_batch) = "average" not in options.without, recipe["batches"]
    return {
        "run": ["train"],
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule",
            "seed": options.seed,
            "train_file_path": str(options.output / "train.xyz"),
            "val_file_path": str(options.output / "val.xyz"),
            "transforms": [
                {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", "model_type_names": types},
                {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": CUTOFF},
            ],
            "train_dataloader": {**loader, "batch_size": batch, "shuffle": True},
            "val_dataloader": {**loader, "batch_size": eval_batch},
            "stats_manager": {
                "_target_": "nequip.data.CommonDataStatisticsManager",
                "dataloader_kwargs": {"batch_size": 10},
                "type_names": types,
            },
        },
        "trainer": {
            "_target_": "lightning.Trainer",
            "accelerator": "cpu",
            "max_epochs": options.epochs,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "logger": {
                "_target_": "lightning.pytorch.loggers.CSVLogger",
                "save_dir": ".",
                "name": "",
                "version": "csv",
            },
            "callbacks": [
                *recipe["callbacks"],
                {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": MONITOR, "dirpath": "."},
                {"_target_": "benchmarks.peers.common.EpochClock", "path": CLOCK},
            ],
        },
        "training_module": {
            "_target_": "nequip.train." + ("EMALightningModule" if averages else "NequIPLightningModule"),
            **({"ema_decay": 0.999} if averages else {}),
            "loss": {
                "_target_": "nequip.train.EnergyForceLoss",
                "per_atom_energy": True,
                "coeffs": {"total_energy": 1.0, "forces": 1.0},
            },
            "val_metrics": metrics,
            "train_metrics": metrics,
            "optimizer": {"_target_": "torch.optim.Adam", "lr": recipe["lr"]},
            "lr_scheduler": recipe["lr_scheduler"],
            "model": {
                **model,
                "compile_mode": "eager",
                "seed": options.seed,
                "model_dtype": "float64",
                "type_names": types,
                "r_max": CUTOFF,
                "parity": True,
                "avg_num_neighbors": "${training_data_stats:num_neighbors_mean}",
                "per_type_energy_scales": "${training_data_stats:forces_rms}",
                "per_type_energy_shifts": options.energies,
            },
        },
    }


def train(options: argparse.Namespace, command: list[str], folder: Path) -> dict[str, Any]:
    """Losses of steps and errors of epochs of ``nequip-train``."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(config(options, model_config(options.package))), folder / "config.yaml")
    arguments = [f"--config-path={folder}", "--config-name=config", f"hydra.run.dir={folder}"]
    print(COMMAND, " ".join(arguments), flush=True)
    seconds = run([*command, "--peer", json.dumps(arguments)], folder)
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [float(row["train_loss_step/weighted_sum"]) for row in rows if row["train_loss_step/weighted_sum"]]
    epochs = [
        {name: float(row[f"val0_epoch/{name}"]) for name in COLUMNS}
        for row in rows
        if row.get("val0_epoch/forces_rmse")
    ]
    return {"steps": steps, "epochs": epochs, "seconds": seconds}


def be(start: Path | None, arguments: list[str]) -> None:
    """Be ``nequip-train``, from other weights and with other batches if they are given."""
    import lightning
    import torch
    from nequip.scripts import train as nequip_train

    if start is not None:
        given = torch.load(start, weights_only=True)
        fit = lightning.Trainer.fit

        def fit_in_order(trainer: Any, model: Any, datamodule: Any, **options: Any) -> Any:
            adopt(model.model["sole_model"], given["weights"])
            if hasattr(model, "ema"):
                model.ema.num_updates = 0  # the average copies them again
                model.ema.update_parameters(model.model)
            loader = datamodule.train_dataloader

            def in_order() -> Any:
                made = loader()
                return torch.utils.data.DataLoader(
                    made.dataset,
                    batch_sampler=InOrder(given["order"], lambda: trainer.current_epoch),
                    collate_fn=made.collate_fn,
                )

            datamodule.train_dataloader = in_order
            return fit(trainer, model=model, datamodule=datamodule, **options)

        lightning.Trainer.fit = fit_in_order
    sys.argv = [COMMAND, *arguments]
    nequip_train.main()
