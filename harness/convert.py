"""Conversion of another package's model into a checkpoint that a training starts from, by ``init_from``.

    harness-convert 7net-0 --unpickle -o 7net-0.ckpt          # a checkpoint that SevenNet's wheel ships, by its name
    harness-convert MACE.model --unpickle --elements H C O    # a MACE model, for some of its elements
    harness-convert foundation.nequip.zip --unpickle

These files are pickles, and run whatever code they hold when they are read: ``--unpickle`` says that this one is
trusted. What is written has plain data alone: a checkpoint as a training here writes it, but for the state of an
optimizer.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from omegaconf import OmegaConf

from harness.checkpoints import AtomicCheckpointIO
from harness.data import Frame, collate, frame_to_sample
from harness.job.consistency import settings_of, versions
from harness.models.conversion import KINDS, Converted, kind_of, patterns
from harness.support.process import mistakes_reported
from harness.trained.record import ARCHITECTURE, MADE_WITH, packages_of, plain, units

__all__ = ["convert", "main"]

_TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
"""Largest difference of energies per atom in eV, forces in eV/Å and stresses in eV/Å³ by the dtype of the weights:
rounding."""
_COMPARED = {"total_energy": ("energies", "eV/atom"), "forces": ("forces", "eV/Å"), "stress": ("stresses", "eV/Å³")}
"""Predictions that are compared, with their names and units."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``harness-convert``; mistakes end it with one message and exit code 1.

    Args:
        arguments: those of the process if not given.
    """
    parser = argparse.ArgumentParser(
        prog="harness-convert", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "model", metavar="FILE", help=f"{', '.join(KINDS.values())}; or the name of one that is shipped, such as 7net-0"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.ckpt", help="default: the name of FILE with .ckpt")
    parser.add_argument(
        "--unpickle", action="store_true", help="read a pickle, which runs the code that it holds: trust its source"
    )
    parser.add_argument("--head", metavar="NAME", help="of a MACE model with several heads, or a SevenNet modality")
    parser.add_argument("--elements", nargs="+", metavar="X", help="of a MACE model: keep these alone")
    options = parser.parse_args(arguments)
    with mistakes_reported():
        _run(options)


def _run(options: argparse.Namespace) -> None:
    path = _found(options.model)
    output = options.output or Path(f"{path.name.removesuffix('.zip').partition('.')[0]}.ckpt")
    if output.exists():
        raise FileExistsError(f"{output} exists; give another name with -o, or remove it.")
    kind = kind_of(path)
    if kind is None:
        raise ValueError(
            f"{path} is none of the files that can be converted: {', '.join(KINDS.values())}. A checkpoint of this "
            f"package needs no conversion: init_from={path}."
        )
    if not options.unpickle:
        raise ValueError(
            f"{path} is a {KINDS[kind]}, a pickle: reading it runs the code that it holds. If you trust its source, "
            f"say so with --unpickle. What is written has plain data alone."
        )
    print(f"unpickled   {path}, a {KINDS[kind]}: the code that it holds has been run (--unpickle)")
    converted = _read(kind, path, options.head, options.elements)
    for line in _described(converted):
        print(line)
    print(_compared(converted))
    convert(converted, path, output)
    print(f"written     {output}")
    print(f"next        harness-train model=from_checkpoint init_from={output} data=file data.train=...")


def _found(model: str) -> Path:
    """Path of a file, or of one that an installed package ships under a name."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    from harness.models.sevennet_files import shipped_checkpoints

    shipped = shipped_checkpoints()
    if model in shipped:
        return shipped[model]
    known = f"; those that the installed sevenn ships are {', '.join(shipped)}" if shipped else ""
    raise FileNotFoundError(f"there is no file {model}{known}.")


def _read(kind: str, path: Path, head: str | None, elements: Sequence[str] | None) -> Converted:
    if elements is not None and kind != "mace":
        raise ValueError(f"--elements is for MACE models; a {KINDS[kind]} keeps all of its elements.")
    if head is not None and kind not in ("mace", "sevennet"):
        raise ValueError(f"--head is for MACE and SevenNet models; a {KINDS[kind]} has one.")
    if kind == "mace":
        from harness.models.mace_files import read_mace

        return read_mace(path, head, elements)
    if kind == "sevennet":
        from harness.models.sevennet_files import read_sevennet

        return read_sevennet(path, head)
    from harness.models.nequip_files import read_nequip

    return read_nequip(path, is_package=kind == "nequip package")


def _described(converted: Converted) -> list[str]:
    names = converted.type_names
    parameters = {name: each for name, each in converted.model.named_parameters() if each.numel()}
    number = sum(parameter.numel() for parameter in parameters.values())
    values = [name for name in converted.loaded if any(key.endswith(name) for key in parameters)]
    lines = [
        f"read by     {converted.package}",
        f"elements    {len(names)}: {', '.join(names)}",
        f"model       {converted.target.rpartition('.')[2]}, cutoff {converted.cutoff:g} Å, {number} parameters, "
        f"{converted.dtype}",
        f"loaded      {len(values)} parameters, {len(converted.loaded) - len(values)} constants: {patterns(values)}",
    ]
    lines += [f"left out    {name}: {reason}" for name, reason in converted.left_out.items()]
    if converted.made_anew:
        reasons = ", ".join(sorted(set(converted.made_anew.values())))
        lines.append(f"made anew   {patterns(list(converted.made_anew))}: {reasons}")
    return lines


def _compared(converted: Converted) -> str:
    """A line with the differences between the package and the converted model, of what both of them predict.

    Raises:
        ValueError: they are more than rounding.
    """
    differences: dict[str, float] = {}
    largest = dict.fromkeys(_COMPARED, 1.0)  # rounding of large energies excuses nothing in the forces
    for seed in range(2):
        atoms = _structure(converted.type_names, converted.cutoff, seed)
        sample = frame_to_sample(Frame(atoms), converted.type_names, converted.cutoff, dtype=torch.float64)
        theirs, ours = converted.both(collate([sample]))
        for name in _COMPARED:
            if name in theirs and name in ours:
                size = len(atoms) if name == "total_energy" else 1
                expected, found = (each[name].detach().double() / size for each in (theirs, ours))
                difference = float((expected - found.reshape(expected.shape)).abs().max())
                differences[name] = max(differences.get(name, 0.0), difference)
                largest[name] = max(largest[name], float(expected.abs().max()))
    rounding = _TOLERANCE[converted.dtype]
    if not all(difference <= rounding * largest[name] for name, difference in differences.items()):
        texts = [f"{_COMPARED[name][0]} by {each:.2g} {_COMPARED[name][1]}" for name, each in differences.items()]
        raise ValueError(
            f"the converted model is another one: it differs from {converted.package} in {', '.join(texts)}. Nothing "
            f"was written."
        )
    names = " and ".join(_COMPARED[name][0] for name in differences)
    texts = [f"{each:.1g} {_COMPARED[name][1]}" for name, each in differences.items()]
    return f"compared    {names} of 2 structures are those of {converted.package} within {' and '.join(texts)}"


def _structure(type_names: Sequence[str], cutoff: float, seed: int) -> Atoms:
    """A disordered crystal of 16 atoms of the types."""
    generator = np.random.default_rng(seed)
    atoms = bulk("Cu", "fcc", a=min(4.2, cutoff), cubic=True) * (2, 2, 1)
    atoms.rattle(0.15, seed=seed)
    atoms.symbols = [type_names[index] for index in generator.integers(0, len(type_names), len(atoms))]
    return atoms


def convert(converted: Converted, source: Path, output: Path) -> None:
    """Write a model of another package as a checkpoint of this one.

    Args:
        converted: the model.
        source: file that it was read from, for the record.
        output: path of the checkpoint.
    """
    architecture = plain({"_target_": converted.target, **converted.arguments})
    if any(isinstance(value, dict) and "_target_" in value for value in architecture.values()):
        architecture |= {
            "_recursive_": False,
            "_convert_": "object",
        }  # the package makes its parts itself, of plain data
    names = list(converted.type_names)
    config = OmegaConf.create({"cutoff": converted.cutoff, "data": {"cutoff": converted.cutoff}, "model": architecture})
    is_nequip = converted.target.startswith("harness.models.nequip")
    record: dict[str, Any] = {
        ARCHITECTURE: architecture,
        "settings": {name: value for name, value in settings_of(config).items() if name != "output_dir"},
        "data": {},
        "statistics": {"type_names": names},
        "type_names": names,
        "cutoff": converted.cutoff,
        "dtype": "float64" if is_nequip else converted.dtype,  # NequIP's positions have float64 whatever its weights
        "precision": None,
        "energy_shifts": architecture["energy_shifts"],
        "energy_level": None,
        "units": units(),
        "command": [],
        "versions": plain(versions()),
        "packages": packages_of(converted.model),
        "converted": {
            "file": source.name,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "package": converted.package,
            "loaded": list(converted.loaded),
            "left_out": dict(converted.left_out),
            "made_anew": dict(converted.made_anew),
        },
    }
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "loops": {},
        "state_dict": {f"model.{name}": value for name, value in converted.model.state_dict().items()},
        "type_names": names,
        MADE_WITH: record,
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, output)


if __name__ == "__main__":
    main()
