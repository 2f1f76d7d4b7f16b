"""The table of bad inputs, and the command line run in this process, alone or as one of the ranks of a launcher.

As a script, under torchrun: runs every case of the table on every rank, in the same processes one after the other, and
writes what each rank has said and its exit code.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from support.commands import ROOT

from harness.train import main, run_job

HARTREE, BOHR = 27.211386, 0.52917721

BASE = (
    "data=file",
    "data.split={val: 3, test: 3}",
    "data.batch_size=4",
    "cutoff=3.5",
    "model.hidden_channels=4",
    "model.num_filters=4",
    "model.num_interactions=1",
    "model.num_gaussians=4",
    "max_epochs=1",
    "logger=none",
    "trainer.accelerator=cpu",
    "hydra.output_subdir=null",
)


@dataclass(frozen=True)
class Case:
    """A mistake, and what the message about it has to hold: what was found, what was expected, the likely fix."""

    overrides: tuple[str, ...]
    words: tuple[str, ...]
    write: Callable[[Path], None] | None = None
    ranks: int = 1
    """The mistake is one on so many ranks only."""
    composing: bool = False
    """Hydra finds it, before there is a job."""


def case(*overrides: str, words: Sequence[str], **options: Any) -> Case:
    return Case(overrides, tuple(words), **options)


# --- files ---


def frames(number: int = 16, symbols: str = "Cu3Ag") -> list[Atoms]:
    """Frames of a small alloy with its EMT labels, close to each other."""
    return copy.deepcopy(_frames(number, symbols))


@functools.cache
def _frames(number: int, symbols: str) -> list[Atoms]:
    made = []
    for index in range(number):
        atoms = bulk("Cu", "fcc", a=3.8, cubic=True)
        atoms.symbols = symbols
        atoms.rattle(0.06, seed=index)
        if index % 2:
            atoms.set_cell(atoms.cell.array * (1 + 0.002 * (index % 5)), scale_atoms=True)
        atoms.calc = EMT()
        made.append(relabelled(atoms, atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)))
    return made


def relabelled(atoms: Atoms, energy: Any = None, forces: Any = None, stress: Any = None, **changes: Any) -> Atoms:
    copied = atoms.copy()
    labels = {"energy": energy, "forces": forces, "stress": stress}
    copied.calc = SinglePointCalculator(copied, **{name: value for name, value in labels.items() if value is not None})
    return copied


def written(change: Callable[[list[Atoms]], list[Atoms] | None]) -> Callable[[Path], None]:
    """Writes the frames after a change of the list, in place or as a new one."""

    def write(path: Path) -> None:
        made = frames()
        changed = change(made)
        ase.io.write(path, made if changed is None else changed, format="extxyz")

    return write


def edited(change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    """Writes the text of the frames after a change."""

    def write(path: Path) -> None:
        ase.io.write(path, frames(), format="extxyz")
        text = change(path.read_text())
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    return write


def scaled(
    energy: float = 1.0, forces: float = 1.0, stress: float = 1.0, positions: float = 1.0
) -> Callable[[Path], None]:
    """Writes the frames in other units."""

    def change(made: list[Atoms]) -> list[Atoms]:
        changed = []
        for atoms in made:
            results = atoms.calc.results
            other = atoms.copy()
            other.set_cell(atoms.cell.array * positions, scale_atoms=True)
            labels = results["energy"] * energy, results["forces"] * forces, results["stress"] * stress
            changed.append(relabelled(other, *labels))
        return changed

    return written(change)


def with_labels(index: int = 2, **labels: Any) -> Callable[[Path], None]:
    """Writes the frames, one of them with other labels; None leaves one out."""

    def change(made: list[Atoms]) -> None:
        made[index] = relabelled(made[index], **{**made[index].calc.results, **labels})

    return written(change)


def isolated(symbol: str, energy: float | None) -> Atoms:
    """An isolated atom as MACE's users mark it."""
    atoms = Atoms(symbol, cell=[20.0] * 3, info={"config_type": "IsolatedAtom"})
    return relabelled(atoms, energy, forces=np.zeros((1, 3)))


def moved(made: list[Atoms], atom: int, position: Any) -> None:
    results = made[2].calc.results
    made[2].positions[atom] = position
    made[2].calc = SinglePointCalculator(made[2], **results)


def in_cell(cell: Any) -> Callable[[Path], None]:
    def change(made: list[Atoms]) -> None:
        results = made[2].calc.results
        made[2].set_cell(cell)
        made[2].calc = SinglePointCalculator(made[2], energy=results["energy"], forces=results["forces"])

    return written(change)


def line(number: int, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Writes the frames with one line of the text changed; a frame has 6 lines."""

    def edit(text: str) -> str:
        lines = text.splitlines()
        lines[number] = change(lines[number])
        return "\n".join(lines) + "\n"

    return edited(edit)


def without(label: str, only: int | None = None) -> Callable[[Path], None]:
    def change(made: list[Atoms]) -> None:
        for index, atoms in enumerate(made):
            if only is None or index == only:
                del atoms.calc.results[label]

    return written(change)


def own_experiment(path: Path) -> None:
    """Writes a config directory with an experiment in it, beside a file."""
    folder = path.parent / "own" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mol.yaml").write_text("# @package _global_\nname: mol\n")


def own_file(*overrides: str, words: Sequence[str], write: Callable[[Path], None]) -> Case:
    """A case of a training file; NAME stands for its path."""
    return case("data.train=NAME", *overrides, words=words, write=write)


def model(name: str, *overrides: str, words: Sequence[str], ranks: int = 1) -> Case:
    return case("~model", f"+model={{_target_: support.bad_parts.{name}}}", *overrides, words=words, ranks=ranks)


def batches(name: str, *words: str) -> Case:
    made = f"+data={{_target_: support.bad_parts.Changed, change: {name}}}"
    return case("~data", made, "~model", "+model={_target_: support.bad_parts.fine}", words=words)


EXTRA = "loss.extra_metrics="
MSE = "{_target_: harness.MeanSquaredError}"

CASES: dict[str, Case] = {
    # --- what Hydra finds while it composes ---
    "unknown loss": case("loss=energies", words=["energies", "energy_force_stress"], composing=True),
    "unknown data": case("data=nothing", words=["nothing", "embedded", "file"], composing=True),
    "unknown optimizer": case("optimizer=adamm", words=["adamm", "adamw"], composing=True),
    "unknown strategy": case("strategy=mpi", words=["mpi", "ddp"], composing=True),
    "unknown group": case("modell=schnet", words=["modell"], composing=True),
    "unknown key of the loss": case("loss.coeffs.force=1", words=["force", "loss.coeffs.force"], composing=True),
    "unknown component in a chosen schedule": case(
        "schedule=linear",
        "schedule.end={per_atom_energy_mse: 1, force_mse: 1}",
        words=["schedule.end has no force_mse", "it has per_atom_energy_mse, forces_mse", "Did you mean forces_mse?"],
        composing=True,
    ),
    "misspelt setting of a chosen schedule": case(
        "schedule=linear", "schedule.intervall=step", words=["Did you mean schedule.interval?"], composing=True
    ),
    "milestones with a config directory": case(
        "--config-dir=FOLDER/own",
        "experiment=mol",
        "schedule=piecewise",
        "schedule.milestones={0: {forces_mse: 10}, -3: {stress_mse: 1000}}",
        words=[
            "schedule.milestones has no -3; it has 0, 50, 75",
            "'~schedule.milestones' '+schedule.milestones={0: {forces_mse: 10}, -3: {stress_mse: 1000}}'",
        ],
        write=own_experiment,
        composing=True,
    ),
    "unknown key of the data": case("data.batchsize=4", words=["batchsize"], composing=True),
    "override without a value": case("max_epochs", words=["max_epochs"], composing=True),
    "broken override": case("loss.coeffs={total_energy: 1", words=["total_energy"], composing=True),
    # --- loss and metrics ---
    "unknown component": case("+loss.coeffs.force=1", words=["'force'", "Valid keys: total_energy, forces"]),
    "negative coefficient": case("loss.coeffs.forces=-1", words=["forces_mse", "not negative", "-1"]),
    "NaN coefficient": case("loss.coeffs.forces=nan", words=["forces_mse", "finite", "nan"]),
    "coefficient of text": case("loss.coeffs.forces=high", words=["forces_mse", "number or null", "'high'"]),
    "no coefficient": case("loss.coeffs={total_energy: null, forces: null}", words=["nothing to minimise", "coeff"]),
    "coefficients of zero": case("loss.coeffs={total_energy: 0, forces: 0}", words=["sum to 0", "above 0"]),
    "weights miss a type": case("loss.per_type_forces_coeffs={Cu: 1}", words=["'Cu', 'Ag'", "missing: ['Ag']"]),
    "weights of another type": case(
        "loss.per_type_forces_coeffs={Cu: 1, Ag: 1, Au: 1}", words=["'Cu', 'Ag'", "unknown: ['Au']"]
    ),
    "weight of zero": case("loss.per_type_forces_coeffs={Cu: 1, Ag: 0}", words=["type Ag", "above 0"]),
    "unknown field": case(
        f"{EXTRA}[{{field: force, metric: {MSE}}}]", words=["'force'", "Known fields", "forces", "register_field"]
    ),
    "unknown metric": case(
        f"{EXTRA}[{{field: forces, metric: {{_target_: harness.MeanSquareError}}}}]",
        words=["Did you mean harness.MeanSquaredError?"],
    ),
    "unknown key of a component": case(
        f"{EXTRA}[{{field: forces, metric: {MSE}, weight: 1}}]", words=["'weight'", "Valid keys", "coeff"]
    ),
    "per_type of the energy": case(
        f"{EXTRA}[{{field: total_energy, metric: {MSE}, per_type: true}}]", words=["`per_type`", "level node", "graph"]
    ),
    "two components of one name": case(
        f"{EXTRA}[{{field: forces, metric: {MSE}, name: a}}, {{field: pos, metric: {MSE}, name: a}}]",
        words=["'a'", "unique"],
    ),
    "unit in the place of a factor": case(
        f"{EXTRA}[{{field: {{_target_: harness.PerAtomModifier, field: total_energy, factor: meV}}, metric: {MSE}}}]",
        words=["factor is a number", "'meV'"],
    ),
    "factor of zero": case(
        f"{EXTRA}[{{field: {{_target_: harness.PerAtomModifier, field: total_energy, factor: 0}}, metric: {MSE}}}]",
        words=["factor", "not 0"],
    ),
    "per atom of forces": case(
        f"{EXTRA}[{{field: {{_target_: harness.PerAtomModifier, field: forces}}, metric: {MSE}}}]",
        words=["graph fields only", "'forces' is a node field"],
    ),
    "metric that cannot take forces": case(
        "metrics.extra_metrics=[{name: mine, field: forces, metric: {_target_: torchmetrics.PearsonCorrCoef}}]",
        words=["'mine'", "PearsonCorrCoef", "[8, 3]", "flatten"],
    ),
    "field that the model lacks": case(
        f"{EXTRA}[{{field: charge, metric: {MSE}}}]",
        words=["'charge'", "missing from the predictions", "'charge_mse' reads it", "leave that out"],
    ),
    "ignore_nan of an unknown label": case("+loss.ignore_nan.force=true", words=["'force'", "total_energy, forces"]),
    "loss that is no loss": case("loss._target_=torch.nn.MSELoss", words=["MSELoss"]),
    # --- numbers and names of the configuration ---
    "setting that nothing reads": case(
        "+max_epoch=3", words=["max_epoch", "nothing reads", "Did you mean max_epochs?", "--cfg job"]
    ),
    "monitor of nothing": case(
        "monitor=val0_epoch/force_rmse", words=["val0_epoch/force_rmse", "Did you mean", "val0_epoch/forces_rmse"]
    ),
    "monitor of an absent validation set": case("data.split.val=0", words=["val0_epoch/weighted_sum", "Did you mean"]),
    "monitor that comes later than it is asked for": case(
        "lr_scheduler=plateau",
        "max_epochs=4",
        "trainer.check_val_every_n_epoch=2",
        words=["val0_epoch/weighted_sum", "first validation", "lr_scheduler.frequency=2"],
    ),
    "monitor of early stopping": case(
        "callbacks=[default,early_stopping]",
        "callbacks.early_stopping.monitor=val0_epoch/f_rms",
        words=["EarlyStopping", "val0_epoch/f_rms", "val0_epoch/forces_rmse"],
    ),
    "component of the progress bar": case("callbacks.progress.components=[forces]", words=["'forces'", "forces_mse"]),
    "misspelt component of the progress bar": case(
        "callbacks.progress.components=force_mse", words=["'force_mse'", "Did you mean forces_mse?"]
    ),
    "unknown option of a callback": case(
        "+callbacks.progress.rate=3", words=["LossProgressBar takes no argument 'rate'", "Did you mean refresh_rate?"]
    ),
    "callback of another module": case(
        "+callbacks.own._target_=harness.callbacks.SoftAdapt",
        words=["harness.callbacks has no SoftAdapt. Did you mean harness.adaptive.SoftAdapt?"],
    ),
    "misspelt name of a callback": case(
        "+callbacks.own._target_=harness.callbacks.LossCoefficientSchedular",
        words=["Did you mean harness.callbacks.LossCoefficientScheduler?"],
    ),
    "schedule of another module of the user": case(
        "schedule._target_=support.bad_parts.Chnged",
        words=["bad_parts has no Chnged. Did you mean support.bad_parts.Changed?"],
    ),
    "schedule of an unknown component": case(
        "schedule=linear", "loss=energy", "metrics=energy", words=["'forces_mse'", "Valid names: per_atom_energy_mse"]
    ),
    "schedule of a part of no epochs": case("schedule=two_stage", "max_epochs=-1", words=["0.75 of -1", "max_epochs="]),
    "two things that move the coefficients": case(
        "schedule=linear", "adaptive=softadapt", words=["SoftAdapt", "schedule Linear", "only one of them"]
    ),
    "share of an unknown component": case(
        "adaptive=gradient_balance", "adaptive.target={force_mse: 1}", words=["force_mse", "forces_mse"]
    ),
    "static graph with micro-batches": case(
        "strategy=ddp_static_graph", "trainer.accumulate_grad_batches=2", words=["ddp_static_graph", "strategy=ddp"]
    ),
    "guard of an unknown action": case("callbacks.nonfinite.action=ignore", words=["stop or skip", "'ignore'"]),
    "no micro-batches": case("trainer.accumulate_grad_batches=0", words=["trainer.accumulate_grad_batches", "found 0"]),
    "micro-batches of a root": case(
        "trainer.accumulate_grad_batches=2",
        "+loss.extra_metrics=[{field: forces, coeff: 1, metric: {_target_: harness.RootMeanSquaredError}}]",
        words=["'F_rmse'", "MeanSquaredError", "null", "accumulate_grad_batches=1"],
    ),
    "resume of an unknown kind": case("resume=sometimes", words=["resume", "restart", "auto", "'sometimes'"]),
    "signal of an unknown name": case("callbacks.last.signals=[SIGFOO]", words=["SIGFOO", "SIGTERM"]),
    "checkpoints every half step": case("callbacks.last.every_n_steps=0.5", words=["every_n_steps", "0.5"]),
    "learning rate of text": case("optimizer.lr=abc", words=["optimizer.lr", "at least 0", "abc"]),
    "negative learning rate": case("optimizer.lr=-1", words=["optimizer.lr", "at least 0", "-1"]),
    "unknown option of the optimizer": case("+optimizer.momentum=0.9", words=["optimizer", "Adam", "momentum"]),
    "unknown option of the scheduler": case("+lr_scheduler.scheduler.gamma=1", words=["lr_scheduler", "gamma"]),
    "interval beside the schedule": case(
        "+schedule_interval=step", words=["schedule_interval=step", "schedule.interval=step"]
    ),
    "interval of a loss without schedule": case(
        "+loss.schedule_interval=step", words=["loss.schedule_interval=step", "schedule.interval=step"]
    ),
    "epochs of text": case("max_epochs=many", words=["max_epochs", "'many'", "whole number"]),
    "no epochs": case("max_epochs=0", words=["max_epochs", "0", "at least 1"]),
    "seed of text": case("seed=one", words=["seed", "'one'", "whole number"]),
    "negative seed": case("seed=-1", words=["seed", "-1"]),
    "cutoff with a unit": case("cutoff=5A", words=["cutoff", "'5A'", "Å"]),
    "cutoff of zero": case("cutoff=0", words=["cutoff", "positive", "0"]),
    "cutoff of NaN": case("cutoff=nan", words=["cutoff", "positive", "nan"]),
    "other cutoff of the data": case("data.cutoff=2.0", words=["data.cutoff=2.0", "model.cutoff=3.5"]),
    "fractional batch size": case("data.batch_size=8.5", words=["batch_size", "8.5", "whole number"]),
    "batch size of zero": case("data.batch_size=0", words=["batch_size", "at least 1", "0"]),
    "workers of text": case("data.num_workers=many", words=["num_workers", "'many'"]),
    "negative workers": case("data.num_workers=-1", words=["num_workers", "-1"]),
    "half precision of the data": case("data.dtype=float16", words=["dtype", "float32", "'float16'"]),
    "unknown matmul precision": case("matmul_precision=fast", words=["matmul_precision", "fast", "highest"]),
    "unknown element in type_names": case("data.type_names=[Cu,Xy]", words=["type_names", "Xy", "chemical symbols"]),
    "element that is not in type_names": case(
        "data.type_names=[Cu]", words=["Ag is not among the type names ['Cu']", "frames.xyz, frame "]
    ),
    "repeated type_names": case("data.type_names=[Cu,Ag,Cu]", words=["type_names", "'Cu'", "repeated"]),
    "unknown label": case("+data.keys.force=forces", words=["'force'", "'energy', 'forces', 'stress', 'virial'"]),
    "label key of no frame": case("data.keys.forces=dft", words=["frames.xyz", "'dft'", "'energy', 'forces'"]),
    "check_units of text": case("data.check_units=maybe", words=["check_units", "true or false", "'maybe'"]),
    "negative min_distance": case("data.min_distance=-1", words=["min_distance", "positive", "-1"]),
    # --- splits ---
    "split of too many": case("data.split={val: 30, test: 4}", words=["30", "16", "for training"]),
    "split of everything": case("data.split={val: 8, test: 8}", words=["16 frames", "leaves 0 for training"]),
    "fractions above 1": case("data.split={val: 0.6, test: 0.5}", words=["0.6", "0.5", "leaves 0 for training"]),
    "fraction above 1": case("data.split={val: 1.5}", words=["'val'", "1.5", "[0, 1)"]),
    "negative split": case("data.split={val: -2}", words=["'val'", "not be negative", "-2"]),
    "fraction without a frame": case("data.split={val: 0.01, test: 3}", words=["'val'", "0.01 of 16", "no frame"]),
    "split of text": case("data.split={val: some}", words=["'val'", "fraction", "'some'"]),
    "split of an unknown set": case("+data.split.validation=3", words=["'validation'", "['val', 'test']"]),
    "split that is no mapping": case("data.split=0.1", words=["split", "0.1", "{val: 0.1"]),
    "num_train of too many": case("data.num_train=100", words=["num_train=100", "10 of 16"]),
    "num_train of zero": case("data.num_train=0", words=["num_train", "at least 1", "0"]),
    "more ranks than frames in a batch": case(
        "data.batch_size=1", words=["batch_size", "2 ranks", "1 samples"], ranks=2
    ),
    "more ranks than frames": case("data.num_train=1", words=["1 samples", "2 ranks", "add data"], ranks=2),
    # --- model ---
    "unknown model": case("model._target_=my_model.make", words=["my_model", "PYTHONPATH"]),
    "unknown option of the model": case("+model.depth=3", words=["depth", "schnet_force_field"]),
    "size of text": case("model.hidden_channels=big", words=["hidden_channels", "'big'"]),
    "size of zero": case("model.num_interactions=0", words=["num_interactions", "at least 1", "0"]),
    "scales of nothing": case("model.energy_scales=nothing", words=["nothing", "force_rms", "schnet_force_field"]),
    "scale of zero": case("model.energy_scales=0", words=["energy_scales", "above 0", "0"]),
    "shifts of no file": case("model.energy_shifts=atoms.xyz", words=["atoms.xyz", "'fit'"]),
    "shifts miss an element": case("model.energy_shifts={Cu: 1.0}", words=["Ag", "Cu"]),
    "shifts of a file without energies": case(
        "model.energy_shifts=NAME",
        words=["frame 0", "'energy'"],
        write=lambda path: ase.io.write(path, [Atoms("Cu"), Atoms("Ag")], format="extxyz"),
    ),
    # --- trainer and devices ---
    "unknown accelerator": case("trainer.accelerator=quantum", words=["trainer", "quantum", "cpu"]),
    "unknown precision": case("trainer.precision=12", words=["trainer", "12", "32-true"]),
    "unknown option of the trainer": case("+trainer.speed=1", words=["trainer", "speed"]),
    "impossible limit": case("+trainer.limit_val_batches=1.5", words=["trainer", "limit_val_batches", "1.5"]),
    "more devices than ranks": case("trainer.devices=3", words=["trainer.devices=3", "torchrun --nproc-per-node 3"]),
    "more nodes than launched": case("trainer.num_nodes=4", words=["trainer.num_nodes=4", "--nnodes"]),
    "timeout of text": case("trainer.timeout=long", words=["trainer.timeout", "'long'", "seconds"]),
    "NCCL on the CPU": case(
        "strategy=ddp", "+strategy.process_group_backend=nccl", words=["nccl", "cpu", "process_group_backend=gloo"]
    ),
    "unknown backend": case(
        "strategy=ddp", "+strategy.process_group_backend=quic", words=["process_group_backend", "quic", "gloo"]
    ),
    "unknown option of the strategy": case("+strategy.speed=1", "strategy=ddp", words=["strategy", "speed"]),
    "no checkpoint": case("ckpt_path=nope.ckpt", words=["nope.ckpt", "no such file"]),
    "checkpoint that is none": case(
        "ckpt_path=NAME",
        words=["ckpt_path", "checkpoint that is none", "is no checkpoint of this package", "no archive"],
        write=lambda path: path.write_text("x" * 50),
    ),
    "test of nothing": case("train=false", words=["ckpt_path"]),
    "folder in the place of a logger": case("+logger.mine={_target_: no.such.Logger}", words=["no.such.Logger"]),
    # --- targets that Hydra does not call ---
    "model os.system": case(
        "~model", "+model={_target_: os.system, command: touch FOLDER/was_run}", words=["os.system", "blocklisted"]
    ),
    "model eval": case("~model", "+model={_target_: builtins.eval}", words=["builtins.eval", "blocklisted"]),
    "data subprocess.run": case(
        "~data",
        "+data={_target_: subprocess.run, args: [touch, FOLDER/was_run]}",
        words=["subprocess.run", "blocklisted"],
    ),
    "callback os.system": case(
        "+callbacks.mine={_target_: os.system, command: touch FOLDER/was_run}", words=["os.system", "blocklisted"]
    ),
    "metric os.system": case(
        f"{EXTRA}[{{field: forces, metric: {{_target_: os.system, command: touch FOLDER/was_run}}}}]",
        words=["os.system", "blocklisted"],
    ),
    "optimizer eval": case(
        "~optimizer", "+optimizer={_target_: builtins.eval}", words=["builtins.eval", "blocklisted"]
    ),
    "logger os.system": case(
        "+logger.mine={_target_: os.system, command: touch FOLDER/was_run}", words=["os.system", "blocklisted"]
    ),
    # --- files ---
    "file that is not named": case("data.train=???", words=["data.train", "on the command line"]),
    "missing file": case("data.train=nowhere.xyz", words=["nowhere.xyz", "no file"]),
    "missing validation file": case("data.val=nowhere.xyz", words=["nowhere.xyz", "no file"]),
    "folder": case("data.train=FOLDER", words=["FOLDER", "a file that ASE reads", "harness-data build"]),
    "empty file": own_file(words=["NAME", "empty"], write=lambda path: path.touch()),
    "binary file": own_file(
        words=["NAME", "ASE cannot read"], write=lambda path: path.write_bytes(bytes(range(256)) * 9)
    ),
    "text file": own_file(words=["NAME", "ASE cannot read"], write=lambda path: path.write_text("no structure\n")),
    "truncated in a frame": own_file(
        words=["NAME", "ASE cannot read", "complete"], write=edited(lambda text: text[: len(text) * 2 // 3])
    ),
    "truncated in a row": own_file(
        words=["NAME", "ASE cannot read", "complete"], write=edited(lambda text: text[: len(text) - 120])
    ),
    "count of atoms too large": own_file(words=["NAME", "ASE cannot read"], write=line(12, lambda text: "7")),
    "negative count of atoms": own_file(words=["NAME"], write=line(12, lambda text: "-4")),
    "frame without atoms": own_file(
        words=["NAME", "frame 2", "at least one atom"],
        write=edited(lambda text: "".join(text.splitlines(True)[:12]) + "0\nenergy=1.0\n"),
    ),
    "no labels": own_file(
        words=["NAME, frame 0", "no label", "energy"], write=written(lambda made: [atoms.copy() for atoms in made])
    ),
    "no forces": own_file(
        "model.energy_scales=1.0", words=["forces", "none of the 10 frames", "data.keys"], write=without("forces")
    ),
    "no energies": own_file(words=["total_energy", "none of the 10 frames", "data.keys"], write=without("energy")),
    "some without energies": own_file(
        "data.num_train=null",
        words=["have no total_energy", "ignore_nan.total_energy=true"],
        write=lambda path: written(lambda made: [made[i].calc.results.pop("energy") for i in range(0, 16, 2)] and None)(
            path
        ),
    ),
    "stress of slabs": own_file(
        "loss=energy_force_stress",
        words=[
            "none of the 10 frames of train has stress",
            "10 of 10 frames",
            "left out",
            'pbc="T T F"',
            "Correct pbc",
        ],
        write=edited(lambda text: text.replace('pbc="T T T"', 'pbc="T T F"')),
    ),
    "stress of some slabs": own_file(
        "loss=energy_force_stress",
        words=["have no stress", "left out", 'pbc="T T F"', "ignore_nan.stress=true"],
        write=edited(lambda text: text.replace('pbc="T T T"', 'pbc="T T F"', 12)),
    ),
    "column force": own_file(
        words=["under 'forces'", "'force'", "Did you mean data.keys.forces=force?"],
        write=edited(lambda text: text.replace("forces:R:3", "force:R:3")),
    ),
    "column force with a scale": own_file(
        "model.energy_scales=1.0",
        words=["forces_mse", "under 'forces'", "Did you mean data.keys.forces=force?"],
        write=edited(lambda text: text.replace("forces:R:3", "force:R:3")),
    ),
    "free energies": own_file(
        words=["total_energy", "'free_energy'", "Did you mean data.keys.energy=free_energy?"],
        write=edited(lambda text: text.replace(" energy=", " free_energy=")),
    ),
    "free energies alone": own_file(
        words=["NAME, frame 0", "no label", "Did you mean data.keys.energy=free_energy?"],
        write=edited(
            lambda text: (
                text.replace(" energy=", " free_energy=").replace(" stress=", " s=").replace("forces:R", "column:R")
            )
        ),
    ),
    "stress and virial named": own_file(
        "data.keys.stress=dft_stress",
        "data.keys.virial=dft_virial",
        words=["NAME, frame 0", "both", "'dft_stress'", "'dft_virial'", "Leave out"],
        write=edited(lambda text: text.replace(" stress=", ' dft_virial="1 0 0 0 1 0 0 0 1" dft_stress=')),
    ),
    "file twice": case("data.train=[FOLDER/frames.xyz,FOLDER/frames.xyz]", words=["data.train", "2 times", "once"]),
    "test file twice": case("data.test=[FOLDER/frames.xyz,FOLDER/frames.xyz]", words=["data.test", "2 times", "once"]),
    "isolated atom of two energies": own_file(
        words=["NAME, frame 17", "isolated atom Cu has -4.0 eV", "-3.0", "NAME, frame 16"],
        write=written(lambda made: [*made, isolated("Cu", -3.0), isolated("Cu", -4.0)]),
    ),
    "isolated atom without an energy": own_file(
        words=["NAME, frame 16", "isolated atom (Cu)", "without an energy"],
        write=written(lambda made: [*made, isolated("Cu", None)]),
    ),
    "isolated atom of four": own_file(
        words=["NAME, frame 2", "config_type=IsolatedAtom", "found AgCu3", "isolated_atoms=frames"],
        write=written(lambda made: made[2].info.update(config_type="IsolatedAtom")),
    ),
    "isolated atoms alone": own_file(
        words=["NAME", "isolated atoms alone", "no structures"],
        write=written(lambda made: [isolated("Cu", -3.0), isolated("Ag", -4.0)]),
    ),
    "isolated atoms of two energies in the sets": case(
        "data.train=NAME",
        "data.test=NAME.test.xyz",
        words=["NAME.test.xyz, frame 16", "isolated atom Cu has -4.0 eV", "NAME, frame 16"],
        write=lambda path: [
            written(lambda made, energy=energy: [*made, isolated("Cu", energy)])(Path(f"{path}{suffix}"))
            for suffix, energy in (("", -3.0), (".test.xyz", -4.0))
        ],
    ),
    "unknown way of isolated atoms": case("data.isolated_atoms=skip", words=["'references' or 'frames'", "'skip'"]),
    "file of isolated atoms with another key": own_file(
        "data.train=FOLDER/frames.xyz",
        "model.energy_shifts=NAME",
        words=["NAME, frame 0", "no energy under 'energy'", "data.keys.energy", "REF_energy", "{Cu: eV, ...}"],
        write=lambda path: ase.io.write(path, [Atoms("Cu", info={"REF_energy": -3.0})], format="extxyz"),
    ),
    "no stress for a loss of it": own_file(
        "loss=energy_force_stress", words=["stress", "none of the 10 frames"], write=without("stress")
    ),
    "infinite energy": own_file(words=["NAME, frame 2", "energy", "infinite"], write=with_labels(energy=np.inf)),
    "infinite force": own_file(
        words=["NAME, frame 2", "forces", "infinite"], write=with_labels(forces=np.full((4, 3), -np.inf))
    ),
    "NaN forces": own_file(
        words=["have no forces", "ignore_nan.forces=true"],
        write=written(
            lambda made: [made[i].calc.results.update(forces=np.full((4, 3), np.nan)) for i in range(14)] and None
        ),
    ),
    "NaN position": own_file(
        words=["NAME, frame 2", "positions must be finite", "1 NaN"],
        write=written(lambda made: moved(made, 1, [np.nan, 0.0, 1.0])),
    ),
    "infinite position": own_file(
        words=["NAME, frame 2", "positions must be finite"],
        write=written(lambda made: moved(made, 1, [np.inf, 0.0, 1.0])),
    ),
    "text in the place of a position": own_file(
        words=["NAME", "ASE cannot read"], write=line(15, lambda text: text.replace(text.split()[1], "here"))
    ),
    "row with a column too few": own_file(
        words=["NAME", "ASE cannot read"], write=line(15, lambda text: " ".join(text.split()[:-1]))
    ),
    "unknown symbol": own_file(words=["NAME", "Xy"], write=line(15, lambda text: text.replace("Cu", "Xy"))),
    "placeholder atom": own_file(
        words=["NAME, frame 2", "X", "element"], write=line(15, lambda text: text.replace("Cu", "X "))
    ),
    "duplicate atom": own_file(
        words=["NAME, frame 2", "atoms 0 (", "1 (", "0 Å apart", "data.min_distance"],
        write=written(lambda made: moved(made, 1, made[2].positions[0])),
    ),
    "duplicate of an image": own_file(
        words=["NAME, frame 2", "0.05 Å apart", "Remove the duplicate"],
        write=written(lambda made: moved(made, 1, made[2].positions[0] + made[2].cell.array[1] + [0.05, 0, 0])),
    ),
    "cell without volume": own_file(
        words=["NAME, frame 2", "pbc", "independent"], write=in_cell([[3.8, 0, 0], [0, 3.8, 0], [3.8, 3.8, 0]])
    ),
    "cell of zeros": own_file(words=["NAME, frame 2", "pbc", "independent"], write=in_cell(np.zeros((3, 3)))),
    "pbc without a cell": own_file(
        words=["NAME, frame 2", "pbc", "set pbc to F"],
        write=line(13, lambda text: text[: text.index("Lattice")] + text[text.index('"', 9) + 1 :]),
    ),
    "forces of one component": own_file(
        words=["NAME, frame 0", "forces", "(4, 3)", "(4,)"],
        write=edited(lambda text: text.replace("forces:R:3", "forces:R:1:rest:R:2")),
    ),
    "energy of text": own_file(
        words=["NAME", "energy", "'low'"], write=edited(lambda text: text.replace("energy=", "energy=low was=", 1))
    ),
    "energy of two numbers": own_file(
        words=["NAME, frame 0", "energy", "one number", "(2,)"],
        write=edited(lambda text: text.replace("energy=", 'energy="1.0 2.0" was=', 1)),
    ),
    "stress of five numbers": own_file(
        "data.keys.stress=dft",
        words=["NAME, frame 0", "stress", "Voigt", "(5,)"],
        write=edited(lambda text: text.replace("stress=", 'dft="1 2 3 4 5" stress=', 1)),
    ),
    "energies in kcal/mol": own_file(
        words=["NAME", "energies are in kcal/mol", "expected 1"], write=scaled(energy=23.0605)
    ),
    "energies in Hartree": own_file(words=["NAME", "energies are in Hartree"], write=scaled(energy=1 / HARTREE)),
    "energies per atom": own_file(words=["NAME", "energies are per atom"], write=scaled(energy=0.25)),
    "forces in Hartree/Bohr": own_file(
        words=["NAME", "forces are in Hartree/Bohr"], write=scaled(forces=BOHR / HARTREE)
    ),
    "gradients for forces": own_file(words=["NAME", "opposite", "gradients"], write=scaled(forces=-1)),
    "all in atomic units": own_file(
        words=["NAME", "Bohr"], write=scaled(energy=1 / HARTREE, forces=BOHR / HARTREE, positions=1 / BOHR)
    ),
    "stress in kbar": own_file(words=["NAME", "stress", "kbar", "1602"], write=scaled(stress=1602.18)),
    "positions in nm": own_file(words=["NAME", "nm", "covalent radii"], write=scaled(positions=0.1)),
    "positions in Bohr": own_file(words=["NAME", "Bohr", "covalent radii"], write=scaled(positions=1 / BOHR)),
    "huge forces": own_file(
        words=["NAME, frame 2", "force component of 2e+04"], write=with_labels(forces=np.full((4, 3), 2e4))
    ),
    "validation file of another element": case(
        "data.val=NAME",
        "data.type_names=[Cu,Ag]",
        words=["NAME, frame 0", "Au is not among the type names"],
        write=lambda path: ase.io.write(path, frames(2, "Cu3Au"), format="extxyz"),
    ),
    # --- what a model does with a batch ---
    "model without a dictionary": model("no_dictionary", words=["returned Tensor", "dictionary"]),
    "model without forces": model(
        "without_forces", words=["'forces' is missing from the predictions", "total_energy", "'forces_mse'"]
    ),
    "model of flat energies": model("flat_energy", words=["E", "[2]", "[2, 1]"]),
    "model of forces of one column": model("forces_of_one_column", words=["F", "[8, 1]", "[8, 3]"]),
    "model of whole numbers": model("whole_numbers", words=["'forces'", "int64", "floating-point"]),
    "model without a gradient": model("detached", words=["No gradient reaches", "detach"]),
    "model of NaN": model("not_a_number", words=["'forces'", "NaN or infinite", "24"]),
    "model with an infinite slope": model(
        "infinite_slope", words=["gradient of model.weights", "NaN or infinite", "where()"]
    ),
    "model that raises": model("raising", words=["RuntimeError", "my own mistake"]),
    "compiled model under DDP": model(
        "compiled_as_by_nequip",
        "strategy._target_=harness.strategies.data_parallel",
        words=["hooks of DDP", "DDPStrategy", "strategy=flat", "eager"],
    ),
    "unknown name of a precision": case(
        "precision=64", words=["float64", "Did you mean float64?", "trainer.precision"]
    ),
    "model that needs what there is not": model(
        "fine", "+model.needs=[statistic]", words=["model.needs", "statistic", "Did you mean statistics?"]
    ),
    "model of another dtype": model("with_other_dtype", words=["RuntimeError", "dtype"]),
    "model without parameters": model("frozen", words=["no parameters", "gradient"]),
    "model that cannot be made": model(
        "raising_constructor", words=["cannot be made", "support.bad_parts.raising_constructor"]
    ),
    "model with an unused parameter": model(
        "with_unused_parameter", words=["model.never_used", "find_unused_parameters=true"], ranks=2
    ),
    # --- batches ---
    "batch that is a list": batches("list", "dictionary", "list"),
    "batch without forces": batches("no_forces", "'forces' is missing from the target"),
    "batch without num_atoms": batches("no_num_atoms", "num_atoms"),
    "batch of forces with a row too few": batches("short_forces", "'forces'", "[7, 3]", "8 rows"),
    "batch of flat forces": batches("flat_forces", "'forces'", "[8]", "[num_nodes, 3]"),
    "batch of whole positions": batches("integer_positions", "'pos'", "int64", "floating-point"),
    "batch of a type out of range": batches("type_7", "'atom_types'", "7 to 7", "['Cu']", "type_names"),
    "batch of float types": batches("float_types", "'atom_types'", "float32", "integers"),
    "batch of NaN positions": batches("nan_positions", "'pos'", "24 NaN or infinite", "Å"),
    "batch of NaN labels": batches("nan_labels", "forces_mse", "ignore_nan: true"),
    "batch of an edge out of range": batches("edge_out_of_range", "'edge_index'", "0 to 7"),
    "batch of a graph out of range": batches("graph_out_of_range", "'batch'", "1 to 2", "0 to 1"),
    "batch that counts wrong": batches("wrong_count", "'num_atoms'", "10", "8"),
    "batch without atoms": batches("no_atoms", "no atoms", "at least one"),
}


if not torch.cuda.is_available():
    CASES["GPUs where there are none"] = case(
        "trainer.accelerator=gpu", words=["trainer", "accelerator=gpu", "trainer.accelerator=cpu"]
    )


# --- the command line, in this process ---


@dataclass(frozen=True)
class Said:
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


def arguments(name: str, folder: Path) -> list[str]:
    """Overrides of a case whose file, if it has one, is in ``folder``."""
    chosen = CASES[name]
    base = [each for each in BASE if each.partition(".")[0] != "data"] if chosen.composing else list(BASE)
    replaced = {"NAME": str(case_file(name, folder)), "FOLDER": str(folder)}
    own = [
        functools.reduce(lambda text, word: text.replace(word, replaced[word]), replaced, each)
        for each in chosen.overrides
    ]
    return [*base, f"data.train={folder}/frames.xyz", *own] if not chosen.composing else [*base, *own]


def case_file(name: str, folder: Path) -> Path:
    return folder / f"{name.replace('/', ' per ')}.xyz"


def output_of(name: str, folder: Path) -> Path:
    return folder / name.replace("/", " per ")


def expected(name: str, folder: Path) -> list[str]:
    """Words that the message has to hold."""
    return [
        word.replace("NAME", str(case_file(name, folder))).replace("FOLDER", str(folder)) for word in CASES[name].words
    ]


def write_files(folder: Path) -> None:
    """All files of the table."""
    ase.io.write(folder / "frames.xyz", frames(), format="extxyz")
    for name, each in CASES.items():
        if each.write is not None:
            each.write(case_file(name, folder))


@functools.cache
def _base() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", list(BASE))


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config of :data:`BASE` and further overrides; composed once where no other files are chosen."""
    further = list(overrides)[len(BASE) :] if tuple(overrides[: len(BASE)]) == BASE else None
    groups = {path.name for path in (ROOT / "conf").iterdir()}
    if further is None or any(each.partition("=")[0] in groups for each in further):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("train", list(overrides))
    config = copy.deepcopy(_base())
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(further), config)
    return config


def run_case(name: str, folder: Path, output: Path) -> Said:
    """The job of a case in this process; the whole command line where Hydra is to find the mistake."""
    overrides = arguments(name, folder)
    if CASES[name].composing:
        return captured(lambda: command_line([*overrides, f"hydra.run.dir='{output}'"]))

    def job() -> None:
        config = composed(overrides)
        config.output_dir = str(output)
        run_job(config)

    return captured(job)


def command_line(overrides: Sequence[str]) -> None:
    """``python -m harness.train``."""
    options = sorted(overrides, key=lambda each: not each.startswith("--"))  # Hydra wants them on one side
    before, sys.argv = sys.argv, ["harness-train", *options]
    try:
        main()
    finally:
        sys.argv = before


def captured(function: Callable[[], object]) -> Said:
    """What a function says, and the exit code that a process would have had."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception:
            err.write(traceback.format_exc())
            code = 1
    return Said(code, out.getvalue(), err.getvalue())


def run_as_rank(folder: Path) -> None:
    """Every case of the table on this rank of a launcher."""
    rank = os.environ["RANK"]
    said = {}
    for name in CASES:
        ended = run_case(name, folder, output_of(name, folder / "output of ranks"))
        said[name] = {"code": ended.code, "out": ended.out, "err": ended.err}
    (folder / f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[1]))
