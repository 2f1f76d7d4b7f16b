"""``sevenn train`` with the optimizer of SevenNet's example, and the training here that is the same.

sevenn trains in float32 only, with reference energies in float32 too.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.common import CLOCK, COLUMNS, CUTOFF, Clock, InOrder, adopt, run

COMMAND, PREFIX = "sevenn train", "energy_model.energy_model.layers."
SIZES = {"channels": 8, "lmax": 1, "num_convolution_layer": 2, "weight_nn_hidden_neurons": [16, 16]}
KEYS = dict(zip(COLUMNS, ("Energy_RMSE", "Force_ComponentRMSE", "Force_MAE"), strict=True))
RATE, FACTOR, BATCH = 0.005, 0.99, 4  # those of presets/base.yaml, as the coefficients


def overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of the training here."""
    return [
        "model=sevennet",
        "loss=energy_force",
        "metrics=energy_force",
        "optimizer=adam",
        "lr_scheduler=exponential",
        "precision=float32",
        *(f"model.{name}={value}" for name, value in SIZES.items()),
        "model.stress=false",
        f"data.type_names=[{','.join(sorted(options.energies))}]",  # the order of sevenn
        f"data.batch_size={BATCH}",
        "data.eval_batch_size=4",
        "loss.coeffs={total_energy:1,forces:0.1}",
        "loss.coefficients=as_given",
        f"optimizer.lr={RATE}",
        f"lr_scheduler.scheduler.gamma={FACTOR}",
    ]


def config(options: argparse.Namespace) -> dict[str, Any]:
    """Input file of ``sevenn train``."""
    facts = options.facts
    return {
        "model": {
            "chemical_species": sorted(options.energies),
            "cutoff": CUTOFF,
            "channel": SIZES["channels"],
            "lmax": SIZES["lmax"],
            "num_convolution_layer": SIZES["num_convolution_layer"],
            "weight_nn_hidden_neurons": SIZES["weight_nn_hidden_neurons"],
            "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 8},
            "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 6},
            "is_parity": True,
            "self_connection_type": "nequip",
            "conv_denominator": facts["mean_neighbors"] if facts else "avg_num_neigh",
        },
        "train": {
            "random_seed": options.seed,
            "device": "cpu",
            "is_train_stress": False,
            "epoch": options.epochs,
            "optimizer": "adam",
            "optim_param": {"lr": RATE},
            "scheduler": "exponentiallr",
            "scheduler_param": {"gamma": FACTOR},
            "force_loss_weight": 0.1,
            "error_record": [["Energy", "RMSE"], ["Force", "ComponentRMSE"], ["Force", "MAE"], ["TotalLoss", "None"]],
        },
        "data": {
            "batch_size": BATCH,
            "shift": [options.energies[symbol] for symbol in sorted(options.energies)],
            "scale": facts["force_rms"] if facts else "force_rms",
            "data_format_args": {"index": ":"},
            "load_trainset_path": [str(options.output / "train.xyz")],
            "load_validset_path": [str(options.output / "val.xyz")],
        },
    }


def train(options: argparse.Namespace, command: list[str], folder: Path) -> dict[str, Any]:
    """Errors of epochs of ``sevenn train``, which does not write the losses of steps."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(config(options)), folder / "input.yaml")
    print(COMMAND, folder / "input.yaml", flush=True)
    seconds = run([*command, "--peer", json.dumps(["train", "input.yaml"])], folder)
    with (folder / "lc.csv").open() as file:
        epochs = [
            {name: float(row[f"validset_{theirs}"]) for name, theirs in KEYS.items()} for row in csv.DictReader(file)
        ]
    return {"steps": [], "epochs": epochs, "seconds": seconds}


def be(start: Path | None, arguments: list[str]) -> None:
    """Be ``sevenn train``, from other weights and with other batches if they are given."""
    import torch
    from sevenn.main import sevenn
    from sevenn.scripts import train as scripts
    from sevenn.train.trainer import Trainer
    from torch_geometric.loader import DataLoader

    clock, one_epoch = Clock(CLOCK), Trainer.run_one_epoch

    def marked_epoch(trainer: Any, loader: Any, is_train: bool = False, *rest: Any, **options: Any) -> Any:
        if is_train:
            clock.mark()
        return one_epoch(trainer, loader, is_train, *rest, **options)

    Trainer.run_one_epoch = marked_epoch
    if start is not None:
        given = torch.load(start, weights_only=True)
        make_loader, make_trainer = scripts.loader_from_config, Trainer.from_config

        def loader_in_order(config: Any, dataset: Any, is_train: bool = False) -> Any:
            if not is_train:
                return make_loader(config, dataset)
            return DataLoader(dataset, batch_sampler=InOrder(given["order"], itertools.count().__next__))

        def trainer_of_weights(model: Any, config: Any) -> Any:
            adopt(model, given["weights"])
            return make_trainer(model, config)

        scripts.loader_from_config, Trainer.from_config = loader_in_order, staticmethod(trainer_of_weights)
    sys.argv = ["sevenn", *arguments]
    sevenn.main()
    clock.mark()
