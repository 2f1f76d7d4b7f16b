"""A package's own trainer beside this one, with the same recipe: errors of each epoch, losses of each step, ratios.

    python benchmarks/recipes.py mace --data train_300K.xyz --stage-two 4
    python benchmarks/recipes.py nequip --data train_300K.xyz

Ours is ``harness-train experiment=mace_recipe`` or ``nequip_recipe``, theirs ``mace_run_train`` or ``nequip-train`` as
they are installed, each in a process of its own, in float64 on one CPU; its seconds are printed. Before theirs trains,
it is given the initial weights and the order of frames of ours, unless ``--own`` asks for what a user would get.
``--without average clip decay`` leaves these out on both sides, ``--stage-two EPOCH`` has a second stage (MACE).
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import csv
import itertools
import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CUTOFF = 4.5
RADIAL = "[16,16]"
MACE_SIZES = {"channels": 8, "max_L": 1, "max_ell": 2, "correlation": 2, "num_bessel": 6, "mlp_irreps": "8x0e"}
MACE_FLAGS = {
    "channels": "num_channels",
    "num_bessel": "num_radial_basis",
    "mlp_irreps": "MLP_irreps",
    "max_L": "max_L",
    "max_ell": "max_ell",
    "correlation": "correlation",
}
NEQUIP_SIZES = {"num_layers": 2, "l_max": 1, "num_features": 8, "radial_mlp_depth": 1, "radial_mlp_width": 16}
COLUMNS = {  # ours by the key of a log, theirs by that of mace_run_train
    "per_atom_energy_rmse": "rmse_e_per_atom",
    "forces_rmse": "rmse_f",
    "forces_mae": "mae_f",
}


def own_overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of the training by this package."""
    output, sizes = options.output, MACE_SIZES if options.package == "mace" else NEQUIP_SIZES
    energies = ",".join(f"{symbol}:{energy!r}" for symbol, energy in options.energies.items())
    overrides = [
        f"experiment={options.package}_recipe",
        "data=file",
        *(f"model.{name}={value}" for name, value in sizes.items()),
        f"model.energy_shifts={{{energies}}}",
        f"data.train={output / 'train.xyz'}",
        f"data.val={output / 'val.xyz'}",
        "data.split={val:0,test:0}",
        f"cutoff={CUTOFF}",
        f"max_epochs={options.epochs}",
        f"seed={options.seed}",
        "precision=float64",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "logger=csv",
        "test=false",
    ]
    if options.package == "mace":
        overrides += [f"model.radial_mlp={RADIAL}"]
        overrides += ["trainer.gradient_clip_val=null"] * ("clip" in options.without)
        overrides += ["optimizer.groups.0.weight_decay=0"] * ("decay" in options.without)
    if "average" in options.without:
        overrides += ["callbacks.ema=null"]
    if options.stage_two is not None:
        overrides += ["schedule=two_stage", f"schedule.boundaries=[{options.stage_two}]"]
    return overrides


def train_own(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of steps and errors of epochs of this package."""
    overrides = own_overrides(options)
    print("harness-train", " ".join(overrides), flush=True)
    folder = options.output / "own"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    seconds = _run(
        [sys.executable, "-m", "harness.train", *overrides, f"hydra.run.dir={folder}"], options.output, environment
    )
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [
        {"loss": float(row["train_loss_step/weighted_sum"])} for row in rows if row["train_loss_step/weighted_sum"]
    ]
    epochs = [
        {name: float(row[f"val0_epoch/{name}"]) for name in COLUMNS}
        for row in rows
        if row.get("val0_epoch/forces_rmse")
    ]
    return {"steps": steps, "epochs": epochs, "seconds": seconds}


def write_start(options: argparse.Namespace) -> None:
    """Initial weights of ours by the peer's names, and the frames of every batch of every epoch, for the peer."""
    import torch
    from hydra import compose, initialize_config_dir

    from harness.config.resolvers import register_resolvers
    from harness.job.build import build

    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*own_overrides(options), "logger=none", f"output_dir={options.output / 'start'}"])
    job = build(config)
    prefix = "energy_model.energy_model.mace." if options.package == "mace" else "model."
    weights = {
        name.removeprefix(prefix): parameter.detach().clone() for name, parameter in job.module.model.named_parameters()
    }
    sampler, order = job.datamodule.training_sampler(0, 1), []  # type: ignore[attr-defined]
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        order.append([batch.tolist() for batch in sampler.global_batches()])
    torch.save({"weights": weights, "order": order}, options.output / "start.pt")


class InOrder:
    """Batches of given frames, those of one epoch after those of the other.

    Args:
        order: frames of each batch of each epoch.
        epoch: number of the epoch that begins.
    """

    def __init__(self, order: list[list[list[int]]], epoch: Callable[[], int]) -> None:
        self.order, self.epoch = order, epoch

    def __len__(self) -> int:
        return len(self.order[0])

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.order[self.epoch()]


def adopt(module: Any, weights: dict[str, Any]) -> None:
    """Give a module parameters by their names."""
    import torch

    own = dict(module.named_parameters())
    assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name].reshape(parameter.shape))


# --- mace_run_train ---


def mace_flags(options: argparse.Namespace) -> list[str]:
    """Flags of ``mace_run_train``; all others have their defaults, which are those of the recipe."""
    from ase.data import atomic_numbers

    energies = {atomic_numbers[symbol]: energy for symbol, energy in options.energies.items()}
    flags = ["--name=peer", f"--seed={options.seed}", "--device=cpu", f"--E0s={energies}", f"--r_max={CUTOFF}"]
    flags += [f"--train_file={options.output / 'train.xyz'}", f"--valid_file={options.output / 'val.xyz'}"]
    flags += [f"--{MACE_FLAGS[name]}={value}" for name, value in MACE_SIZES.items()] + [f"--radial_MLP={RADIAL}"]
    flags += ["--energy_key=energy", "--forces_key=forces", f"--max_num_epochs={options.epochs}", "--plot=False"]
    flags += ["--ema"] * ("average" not in options.without)
    flags += ["--clip_grad=None"] * ("clip" in options.without)
    flags += ["--weight_decay=0"] * ("decay" in options.without)
    if options.stage_two is not None:
        flags += ["--stage_two", f"--start_stage_two={options.stage_two}"]
    return flags


def train_mace(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of steps and errors of epochs of ``mace_run_train``."""
    flags, folder = mace_flags(options), options.output / "peer"
    print("mace_run_train", " ".join(flags), flush=True)
    folder.mkdir(exist_ok=True)
    start = [] if options.own else ["--start", str(options.output / "start.pt")]
    seconds = _run([sys.executable, __file__, "mace", "--peer", json.dumps(flags), *start], folder)
    (path,) = (folder / "results").glob("*_train.txt")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [{"loss": float(row["loss"])} for row in rows if row["mode"] == "opt"]
    epochs = [
        {name: float(row[theirs]) for name, theirs in COLUMNS.items()}
        for row in rows
        if row["mode"] == "eval" and row["epoch"] is not None
    ]
    return {"steps": steps, "epochs": epochs, "seconds": seconds}


def run_mace(start: Path | None, flags: list[str]) -> None:
    """Be ``mace_run_train``, from other weights and with other batches if they are given."""
    import mace  # noqa: F401  # before e3nn
    import torch
    from mace import tools
    from mace.cli import run_train
    from mace.tools import torch_geometric

    if start is not None:
        given = torch.load(start, weights_only=True)
        groups, train = run_train.get_params_options, tools.train

        def params_options(args: Any, model: Any) -> Any:
            adopt(model, given["weights"])  # before the average copies them
            return groups(args, model)

        def train_in_order(*, train_loader: Any, **options: Any) -> Any:
            ordered = torch_geometric.dataloader.DataLoader(
                train_loader.dataset, batch_sampler=InOrder(given["order"], itertools.count().__next__)
            )
            return train(train_loader=ordered, **options)

        run_train.get_params_options, tools.train = params_options, train_in_order
    sys.argv = ["mace_run_train", *flags]
    run_train.main()


# --- nequip-train ---


def nequip_config(options: argparse.Namespace) -> dict[str, Any]:
    """Config of ``nequip-train``: the tutorial's, with these data, sizes and references."""
    types = list(options.energies)
    metrics = {
        "_target_": "nequip.train.EnergyForceMetrics",
        "coeffs": {"total_energy_mae": 1.0, "forces_mae": 1.0, "per_atom_energy_rmse": None, "forces_rmse": None},
    }
    loader = {"_target_": "torch.utils.data.DataLoader", "num_workers": 0}
    monitor, averages = "val0_epoch/weighted_sum", "average" not in options.without
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
            "train_dataloader": {**loader, "batch_size": 5, "shuffle": True},
            "val_dataloader": {**loader, "batch_size": 10},
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
                {
                    "_target_": "lightning.pytorch.callbacks.EarlyStopping",
                    "monitor": monitor,
                    "min_delta": 1e-3,
                    "patience": 20,
                },
                {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": monitor, "dirpath": "."},
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
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
            "lr_scheduler": {
                "scheduler": {
                    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
                    "factor": 0.6,
                    "patience": 5,
                    "threshold": 0.2,
                    "min_lr": 1e-6,
                },
                "monitor": monitor,
                "interval": "epoch",
                "frequency": 1,
            },
            "model": {
                "_target_": "nequip.model.NequIPGNNModel",
                "compile_mode": "eager",
                "seed": options.seed,
                "model_dtype": "float64",
                "type_names": types,
                "r_max": CUTOFF,
                **NEQUIP_SIZES,
                "parity": True,
                "avg_num_neighbors": "${training_data_stats:num_neighbors_mean}",
                "per_type_energy_scales": "${training_data_stats:forces_rms}",
                "per_type_energy_shifts": options.energies,
            },
        },
    }


def train_nequip(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of steps and errors of epochs of ``nequip-train``."""
    from omegaconf import OmegaConf

    folder = options.output / "peer"
    folder.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(nequip_config(options)), folder / "config.yaml")
    flags = [f"--config-path={folder}", "--config-name=config", f"hydra.run.dir={folder}"]
    print("nequip-train", " ".join(flags), flush=True)
    start = [] if options.own else ["--start", str(options.output / "start.pt")]
    seconds = _run([sys.executable, __file__, "nequip", "--peer", json.dumps(flags), *start], folder)
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [
        {"loss": float(row["train_loss_step/weighted_sum"])} for row in rows if row["train_loss_step/weighted_sum"]
    ]
    epochs = [
        {name: float(row[f"val0_epoch/{name}"]) for name in COLUMNS}
        for row in rows
        if row.get("val0_epoch/forces_rmse")
    ]
    return {"steps": steps, "epochs": epochs, "seconds": seconds}


def run_nequip(start: Path | None, flags: list[str]) -> None:
    """Be ``nequip-train``, from other weights and with other batches if they are given."""
    import lightning
    import torch
    from nequip.scripts import train

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
    sys.argv = ["nequip-train", *flags]
    train.main()


# --- both ---


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> float:
    """CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(options: argparse.Namespace) -> None:
    """Write the frames of both, and take the energies of isolated atoms."""
    import ase.io
    import numpy as np
    from ase.data import chemical_symbols

    options.output.mkdir(parents=True, exist_ok=True)
    num_train, num_val = options.frames
    frames = ase.io.read(options.data, f":{num_train + num_val}")
    ase.io.write(options.output / "train.xyz", frames[:num_train])
    ase.io.write(options.output / "val.xyz", frames[num_train:])
    if options.isolated is not None:
        atoms = sorted(ase.io.read(options.isolated, ":"), key=lambda frame: frame.numbers[0])
        options.energies = {frame.get_chemical_symbols()[0]: float(frame.get_potential_energy()) for frame in atoms}
        return
    numbers = sorted({int(number) for frame in frames for number in frame.numbers})
    counts = np.array([[np.sum(frame.numbers == number) for number in numbers] for frame in frames[:num_train]])
    totals = np.array([frame.get_potential_energy() for frame in frames[:num_train]])
    fitted = np.linalg.lstsq(counts.astype(float), totals, rcond=None)[0]
    options.energies = {chemical_symbols[number]: float(energy) for number, energy in zip(numbers, fitted, strict=True)}


def report(options: argparse.Namespace, own: dict[str, Any], peer: dict[str, Any]) -> float:
    """Print the table of both sides; returns the largest relative difference."""
    print(f"\n| epoch | error | ours | {PEERS[options.package][0]} | ratio - 1 |\n| ---: | --- | ---: | ---: | ---: |")
    largest = 0.0
    for epoch, (ours, theirs) in enumerate(zip(own["epochs"], peer["epochs"], strict=True)):
        for name in COLUMNS:
            ratio = ours[name] / theirs[name] - 1
            largest = max(largest, abs(ratio))
            print(f"| {epoch} | {name} | {1000 * ours[name]:.6f} | {1000 * theirs[name]:.6f} | {ratio:.1e} |")
    print(f"\nmeV/atom and meV/Å. Largest relative difference of {len(own['epochs'])} epochs: {largest:.1e}")
    if not options.own:
        losses = [ours["loss"] / theirs["loss"] - 1 for ours, theirs in zip(own["steps"], peer["steps"], strict=True)]
        print(f"Largest relative difference of the losses of {len(losses)} steps: {max(map(abs, losses)):.1e}")
    ratio = own["seconds"] / peer["seconds"]
    print(f"CPU seconds, start included: {own['seconds']:.1f} ours, {peer['seconds']:.1f} theirs, ratio {ratio:.2f}")
    return largest


PEERS = {"mace": ("mace_run_train", train_mace, run_mace), "nequip": ("nequip-train", train_nequip, run_nequip)}


def main() -> None:
    """Train both sides and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=PEERS)
    parser.add_argument("--data", type=Path, help="extended XYZ of training frames")
    parser.add_argument("--isolated", type=Path, help="extended XYZ of isolated atoms of all elements")
    parser.add_argument("--frames", type=int, nargs=2, default=[120, 40], metavar=("TRAIN", "VAL"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--stage-two", type=int, metavar="EPOCH", help="first epoch of MACE's second stage")
    parser.add_argument("--without", nargs="*", default=[], choices=["average", "clip", "decay"])
    parser.add_argument("--own", action="store_true", help="weights and order of frames of its own for each side")
    parser.add_argument("--output", type=Path, default=Path("outputs/recipes"))
    parser.add_argument("--peer", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        PEERS[options.package][2](options.start, options.peer)
        return
    if options.data is None:
        parser.error("--data is needed")
    options.output = options.output.absolute()
    prepare(options)
    if not options.own:
        write_start(options)
    report(options, train_own(options), PEERS[options.package][1](options))


if __name__ == "__main__":
    main()
