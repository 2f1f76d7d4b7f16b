"""A data set that needs no download: a four-element alloy labelled with ASE's effective medium theory."""

from __future__ import annotations

import os
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from filelock import FileLock

from harness.support.files import replacing

__all__ = ["ALLOY_LATTICE_CONSTANTS", "alloy_frame", "default_cache_dir", "embedded_alloy_file"]

ALLOY_LATTICE_CONSTANTS = {"Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Au": 4.08}
"""Elements of the alloy and the lattice constants in Å of their fcc crystals."""

# Part of the file name: to be raised whenever alloy_frame() changes, so that no stale file is ever read.
_VERSION = 1


def default_cache_dir() -> Path:
    """Directory of cached data sets: ``$HARNESS_CACHE`` if set, else ``~/.cache/harness``."""
    return Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "harness")


def alloy_frame(index: int, seed: int = 0) -> Atoms:
    r"""Frame ``index`` of the alloy with its EMT energy in eV, forces in eV/Å and stress in eV/Å³.

    A face-centred cubic supercell of 16 or 32 sites, a fifth of which carry one or two vacancies, with a random
    composition on randomly occupied sites. The lattice constant follows Vegard's rule,
    :math:`a = \sum_s x_s a_s`, times a random strain of up to 4 % in each element of its symmetric tensor
    (:math:`F = 1 + \varepsilon`); every atom is displaced by a normal deviate of 0.04 to 0.14 Å. Frames differ in
    their number of atoms on purpose: ranks then carry unequal shares of a batch.

    Args:
        index: number of the frame; a frame does not depend on how many others there are.
        seed: seed of the whole data set.
    """
    from ase.build import bulk  # here, with parts of SciPy: the frames are made once for all trainings
    from ase.calculators.emt import EMT

    generator = np.random.default_rng([seed, index])
    symbols = list(ALLOY_LATTICE_CONSTANTS)
    repeats = ((2, 2, 1), (2, 2, 2))[int(generator.integers(2))]
    atoms = bulk("Cu", "fcc", a=1.0, cubic=True) * repeats

    composition = generator.dirichlet(np.ones(len(symbols)))
    species = generator.choice(len(symbols), size=len(atoms), p=composition)
    atoms.set_chemical_symbols([symbols[species_index] for species_index in species])

    lattice_constant = float(np.mean([ALLOY_LATTICE_CONSTANTS[symbols[species_index]] for species_index in species]))
    strain = generator.uniform(-0.04, 0.04, size=(3, 3))
    deformation = lattice_constant * (np.eye(3) + 0.5 * (strain + strain.T))
    atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    atoms.positions += generator.normal(scale=generator.uniform(0.04, 0.14), size=(len(atoms), 3))

    if generator.random() < 0.2:
        del atoms[generator.choice(len(atoms), size=int(generator.integers(1, 3)), replace=False).tolist()]

    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def embedded_alloy_file(num_frames: int = 400, seed: int = 0, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Path of an extended XYZ file with the first ``num_frames`` frames of the alloy, made if it is not there yet.

    Any number of processes may ask at once: one makes the file, beside its final place, and moves it there whole.

    Args:
        num_frames: number of frames.
        seed: seed of the data set.
        cache_dir: where the file is kept; see :func:`default_cache_dir`.

    Raises:
        ValueError: if ``num_frames`` is not positive.
        OSError: the file cannot be written.
    """
    if num_frames < 1:
        raise ValueError(f"the embedded alloy needs num_frames >= 1, found {num_frames}")
    directory = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = directory / f"alloy-v{_VERSION}-seed{seed}-{num_frames}frames.xyz"
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():  # another process may have made it while this one waited for the lock
                frames = [alloy_frame(index, seed) for index in range(num_frames)]
                with replacing(path) as part:
                    ase.io.write(part, frames, format="extxyz")
    except OSError as error:
        raise OSError(
            f"the embedded data set is kept in {directory}, which cannot be written ({error}). Name another folder by "
            f"the variable HARNESS_CACHE, or data.cache_dir=..."
        ) from error
    return path
