"""A recipe trained here is the package's own training: the same errors of every epoch and losses of every step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from support.commands import ROOT
from support.other_models import INSTALLED

CASES = {
    "mace": ("mace", "--stage-two", "2"),  # averaged weights, clipping and weight decay are on
    "nequip": ("nequip",),
    "allegro": ("allegro",),
    "sevennet": ("sevennet",),
}
LARGEST = {"mace": 1e-9, "nequip": 1e-9, "allegro": 1e-9, "sevennet": 0.05}  # sevenn has float32 only, of energies too
STEPS = {"mace": 6, "nequip": 12, "allegro": 60, "sevennet": None}  # sevenn does not write the losses of steps


def frames(number: int) -> list[ase.Atoms]:
    """Ethanol with springs between all atoms."""
    random, found = np.random.default_rng(0), []
    rest = molecule("CH3CH2OH")
    for _ in range(number):
        atoms = rest.copy()
        atoms.positions += random.normal(scale=0.1, size=(len(atoms), 3))
        apart = atoms.positions[:, None] - atoms.positions[None]
        distances = np.linalg.norm(apart, axis=-1) + np.eye(len(atoms))
        stretch = distances - (rest.get_all_distances() + np.eye(len(atoms)))
        forces = -2 * (stretch / distances)[..., None] * apart
        atoms.calc = SinglePointCalculator(atoms, energy=-4200 + 0.5 * np.sum(stretch**2), forces=forces.sum(axis=1))
        found.append(atoms)
    return found


@pytest.mark.timeout(290)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mace"),
        pytest.param("nequip", marks=pytest.mark.slow),
        pytest.param("allegro", marks=pytest.mark.slow),
        pytest.param("sevennet"),
    ],
)
def test_both_trainings_are_the_same(name: str, tmp_path: Path) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed here")
    ase.io.write(tmp_path / "frames.xyz", frames(28), format="extxyz")
    command = [sys.executable, str(ROOT / "benchmarks" / "recipes.py"), *CASES[name], "--epochs", "3"]
    command += ["--data", str(tmp_path / "frames.xyz"), "--frames", "20", "8", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found = re.findall(r"Largest relative difference of .*?(\d+) (?:epochs|steps): (\S+)", done.stdout)
    assert [int(number) for number, _ in found] == [number for number in (3, STEPS[name]) if number]
    assert all(float(largest) < LARGEST[name] for _, largest in found)
    assert re.search(r"CPU seconds an epoch .*: \d+\.\d\d ours, \d+\.\d\d theirs", done.stdout)
    errors = re.findall(r"\| \d \| forces_rmse \| (\S+) \|", done.stdout)
    assert len(set(errors)) == 3  # it trains
