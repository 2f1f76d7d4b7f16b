"""Write clusters of one to three water molecules with energies, forces and dipoles: python water.py water.xyz

The model is flexible SPC water (Y. Wu, H. L. Tepper and G. A. Voth, J. Chem. Phys. 124, 024503 (2006)), whose hydrogen
charges here grow with their bond length, by an invented 0.2 e/Å. Every fifth frame has no dipole, as if some
calculations had not printed it; the number of molecules is the config_type of a frame.
"""

from __future__ import annotations

import sys

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.spatial.transform import Rotation
from torch import Tensor

KCAL, COULOMB = 0.0433641, 14.399645  # eV, eV Å/e²
LENGTH, ANGLE = 1.012, np.deg2rad(113.24)  # Å, rad


def charges_of(position: Tensor) -> Tensor:
    """Charges in e, ``[num_molecules, 3]``, of atoms O, H, H at ``[num_molecules, 3, 3]``."""
    hydrogen = 0.41 + 0.2 * ((position[:, 1:] - position[:, :1]).norm(dim=-1) - LENGTH)
    return torch.cat([-hydrogen.sum(dim=1, keepdim=True), hydrogen], dim=1)


def energy_of(position: Tensor) -> Tensor:
    """Energy in eV: harmonic bonds and angles, and Lennard-Jones and Coulomb terms between molecules."""
    bonds = position[:, 1:] - position[:, :1]
    lengths = bonds.norm(dim=-1)
    angles = torch.arccos((bonds[:, 0] * bonds[:, 1]).sum(-1) / lengths.prod(dim=1))
    energy = 0.5 * KCAL * (1059.162 * (lengths - LENGTH).square().sum() + 75.90 * (angles - ANGLE).square().sum())
    charges = charges_of(position)
    for one in range(len(position)):
        for other in range(one):
            distances = torch.cdist(position[one], position[other])
            energy = energy + COULOMB * (charges[one][:, None] * charges[other] / distances).sum()
            ratio = (3.165492 / distances[0, 0]) ** 6
            energy = energy + 4 * 0.1554253 * KCAL * (ratio.square() - ratio)
    return energy


def cluster(random: np.random.Generator, number: int) -> np.ndarray:
    """Positions in Å, ``[number, 3, 3]``, of molecules that are turned, bent and at least 1.6 Å apart."""
    half = ANGLE / 2
    molecule = LENGTH * np.array([[0, 0, 0], [np.sin(half), 0, np.cos(half)], [-np.sin(half), 0, np.cos(half)]])
    placed: list[np.ndarray] = []
    while len(placed) < number:
        turned = Rotation.random(random_state=random).apply(molecule + random.normal(scale=0.04, size=(3, 3)))
        center = random.normal(size=3)
        trial = turned + center / np.linalg.norm(center) * random.uniform(2.6, 3.6) * bool(placed)
        far = all(np.linalg.norm(trial[:, None] - other, axis=-1).min() > 1.6 for other in placed)
        if far and all(np.linalg.norm(trial[0] - other[0]) > 2.5 for other in placed):
            placed.append(trial)
    return np.array(placed)


def frame(random: np.random.Generator, index: int) -> Atoms:
    """A labelled cluster; the dipole is Σ q r in e·Å."""
    number = index % 3 + 1
    position = torch.tensor(cluster(random, number), requires_grad=True)
    energy = energy_of(position)
    (gradient,) = torch.autograd.grad(energy, position)
    found, atoms = position.detach(), Atoms("OHH" * number, position.detach().reshape(-1, 3).numpy())
    labels = {"energy": energy.item(), "forces": -gradient.reshape(-1, 3).numpy()}
    if index % 5 != 4:
        labels["dipole"] = (charges_of(found)[..., None] * found).sum(dim=(0, 1)).numpy()
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info["config_type"] = ("monomer", "dimer", "trimer")[index % 3]
    return atoms


if __name__ == "__main__":
    path, number = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300
    generator = np.random.default_rng(0)
    ase.io.write(path, [frame(generator, index) for index in range(number)], format="extxyz")
    print(f"{path}: {number} clusters of water")
