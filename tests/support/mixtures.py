"""Small sets of unlike calculations: metals with stresses and molecules without, each on a level of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

LEVELS = {"metal": {"Cu": -1000.0, "O": -400.0}, "molecules": {"O": -2000.0, "C": -1000.0, "H": -13.0}}
"""Energies of atoms in eV by which the calculations of the sets differ."""


def labelled(atoms: Atoms, level: dict[str, float], seed: int, stress: bool) -> Atoms:
    """A rattled structure with labels by effective medium theory, on a level of energies."""
    atoms = atoms.copy()
    atoms.rattle(0.05, seed=seed)
    atoms.calc = EMT()
    energy = atoms.get_potential_energy() + sum(level[symbol] for symbol in atoms.get_chemical_symbols())
    labels: dict[str, Any] = {"energy": energy, "forces": atoms.get_forces()}
    if stress:
        labels["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def metal_frames() -> list[Atoms]:
    """12 frames of copper, of 4 atoms, some with one oxygen in place of a copper; with stresses."""
    frames = []
    for seed in range(12):
        atoms = bulk("Cu", cubic=True)
        if seed % 3 == 0:
            atoms.symbols[0] = "O"
        frames.append(labelled(atoms, LEVELS["metal"], seed, stress=True))
    return frames


def molecule_frames() -> list[Atoms]:
    """18 frames of water, methane and methanol; without stresses, and a group of their own."""
    names = ("H2O", "CH4", "CH3OH")
    frames = [labelled(molecule(names[seed % 3]), LEVELS["molecules"], seed, stress=False) for seed in range(18)]
    for number, atoms in enumerate(frames):
        atoms.info["config_type"] = names[number % 3]
    return frames


def write_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """Write both sets; the argument ``sets`` of a mixture of them."""
    files = {"metal": folder / "metal.xyz", "molecules": folder / "molecules.xyz"}
    ase.io.write(files["metal"], metal_frames(), format="extxyz")
    ase.io.write(files["molecules"], molecule_frames(), format="extxyz")
    return {
        "metal": {"train": str(files["metal"]), "split": {"val": 3}},
        "molecules": {"train": str(files["molecules"]), "split": {"val": 4, "test": 2}},
    }
