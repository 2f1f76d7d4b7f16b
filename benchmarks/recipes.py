"""A package's own trainer beside this one, with the same recipe: errors of each epoch, losses of each step, seconds.

    python benchmarks/recipes.py mace --data train_300K.xyz --stage-two 4
    python benchmarks/recipes.py nequip --data train_300K.xyz

Ours is ``harness-train`` with ``experiment=mace_recipe``, ``nequip_recipe``, ``allegro_recipe`` or, for
``sevennet``, what SevenNet's example input says; theirs ``mace_run_train``, ``nequip-train`` or ``sevenn train`` as
they are installed. Each is a process of its own on one CPU, in float64 (SevenNet: float32), whose CPU seconds are
printed: of all of it, and the median of its epochs but the first. Before theirs trains, it is given the initial
weights and the order of frames of ours, unless ``--own`` asks for what a user would get. ``--without average clip
decay`` leaves these out on both sides (SevenNet has none of them), ``--stage-two EPOCH`` has a second stage (MACE).
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own; the peers are found from the folder above
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if path != HERE] + [os.path.dirname(HERE)]

import argparse
import csv
import json
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(HERE).parent
PEERS = {"mace": "mace", "nequip": "nequip", "allegro": "nequip", "sevennet": "sevennet"}


def peer_of(package: str) -> Any:
    """Module of ``benchmarks/peers`` of a package's trainer."""
    return import_module(f"benchmarks.peers.{PEERS[package]}")


def own_overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of the training by this package."""
    from benchmarks.peers.common import CUTOFF

    energies = ",".join(f"{symbol}:{energy!r}" for symbol, energy in options.energies.items())
    overrides = [
        *peer_of(options.package).overrides(options),
        "data=file",
        f"model.energy_shifts={{{energies}}}",
        f"data.train={options.output / 'train.xyz'}",
        f"data.val={options.output / 'val.xyz'}",
        "data.split={val:0,test:0}",
        f"cutoff={CUTOFF}",
        f"max_epochs={options.epochs}",
        f"seed={options.seed}",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "logger=csv",
        "test=false",
    ]
    if "average" in options.without:
        overrides += ["callbacks.ema=null"]
    return overrides


def train_own(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of steps and errors of epochs of this package."""
    from benchmarks.peers.common import CLOCK, COLUMNS, epoch_seconds, run

    overrides, folder = own_overrides(options), options.output / "own"
    print("harness-train", " ".join(overrides), flush=True)
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    clock = f"+callbacks.clock={{_target_:benchmarks.peers.common.EpochClock,path:{folder / CLOCK}}}"
    command = [sys.executable, "-m", "harness.train", *overrides, clock, f"hydra.run.dir={folder}"]
    seconds = run(command, options.output, environment)
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [float(row["train_loss_step/weighted_sum"]) for row in rows if row["train_loss_step/weighted_sum"]]
    epochs = [
        {name: float(row[f"val0_epoch/{name}"]) for name in COLUMNS}
        for row in rows
        if row.get("val0_epoch/forces_rmse")
    ]
    return {"steps": steps, "epochs": epochs, "seconds": seconds, "epoch_seconds": epoch_seconds(folder)}


def train_peer(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of steps and errors of epochs of the package's own trainer."""
    from benchmarks.peers.common import epoch_seconds

    folder = options.output / "peer"
    folder.mkdir(exist_ok=True)
    start = [] if options.own else ["--start", str(options.output / "start.pt")]
    command = [sys.executable, os.path.abspath(__file__), options.package, *start]
    found: dict[str, Any] = peer_of(options.package).train(options, command, folder)
    return {**found, "epoch_seconds": epoch_seconds(folder)}


def write_start(options: argparse.Namespace) -> None:
    """Initial weights of ours by the peer's names, and the frames of every batch of every epoch, for the peer."""
    import torch
    from hydra import compose, initialize_config_dir

    from harness.config.resolvers import register_resolvers
    from harness.job.build import build

    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*own_overrides(options), "logger=none", f"output_dir={options.output / 'start'}"])
    job, prefix = build(config), peer_of(options.package).PREFIX
    weights = {
        name.removeprefix(prefix): parameter.detach().clone()
        for name, parameter in job.module.model.named_parameters()
        if parameter.requires_grad
    }
    sampler, order = job.datamodule.training_sampler(0, 1), []  # type: ignore[attr-defined]
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        order.append([batch.tolist() for batch in sampler.global_batches()])
    torch.save({"weights": weights, "order": order}, options.output / "start.pt")
    statistics = job.datamodule.statistics  # type: ignore[attr-defined]
    options.facts = {name: float(getattr(statistics, name)) for name in ("mean_neighbors", "force_rms")}


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
    command = peer_of(options.package).COMMAND
    print(f"\n| epoch | error | ours | {command} | ratio - 1 |\n| ---: | --- | ---: | ---: | ---: |")
    largest = 0.0
    for epoch, (ours, theirs) in enumerate(zip(own["epochs"], peer["epochs"], strict=True)):
        for name in ours:
            ratio = ours[name] / theirs[name] - 1
            largest = max(largest, abs(ratio))
            print(f"| {epoch} | {name} | {1000 * ours[name]:.6f} | {1000 * theirs[name]:.6f} | {ratio:.1e} |")
    print(f"\nmeV/atom and meV/Å. Largest relative difference of {len(own['epochs'])} epochs: {largest:.1e}")
    if not options.own and peer["steps"]:
        losses = [ours / theirs - 1 for ours, theirs in zip(own["steps"], peer["steps"], strict=True)]
        print(f"Largest relative difference of the losses of {len(losses)} steps: {max(map(abs, losses)):.1e}")
    ratio = own["seconds"] / peer["seconds"]
    print(f"CPU seconds, start included: {own['seconds']:.1f} ours, {peer['seconds']:.1f} theirs, ratio {ratio:.2f}")
    ratio = own["epoch_seconds"] / peer["epoch_seconds"]
    print(
        f"CPU seconds an epoch (median without the first): {own['epoch_seconds']:.2f} ours, "
        f"{peer['epoch_seconds']:.2f} theirs, ratio {ratio:.2f}"
    )
    return largest


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
        peer_of(options.package).be(options.start, options.peer)
        return
    if options.data is None:
        parser.error("--data is needed")
    options.output, options.facts = options.output.absolute(), None
    prepare(options)
    if not options.own:
        write_start(options)
    report(options, train_own(options), train_peer(options))


if __name__ == "__main__":
    main()
