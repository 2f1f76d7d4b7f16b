"""Data of your own: unusual label names, and frames without some of the labels.

    python examples/own_data.py

Writes 60 small copper-gold cells as extended XYZ. Energies and forces are called ``dft_energy`` and ``dft_forces``, and
every third frame has no stress. The loss leaves the missing labels out and uses all others.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from lightning.pytorch import Trainer

from harness import EnergyForceStressLoss, EnergyForceStressMetrics
from harness.data import AtomsDataModule
from harness.models import schnet_force_field
from harness.module import ForceFieldModule

KEYS = {"energy": "dft_energy", "forces": "dft_forces", "stress": "dft_stress"}


def write_frames(path: Path, num_frames: int) -> None:
    """Shaken Cu-Au cells of 4 or 8 atoms with EMT labels under the names of ``KEYS``."""
    generator = np.random.default_rng(0)
    frames = []
    for index in range(num_frames):
        atoms = bulk("Cu", "fcc", a=3.8, cubic=True) * (1, 1, 1 + index % 2)
        atoms.symbols[generator.random(len(atoms)) < 0.5] = "Au"
        atoms.set_cell(atoms.cell.array * generator.uniform(0.97, 1.05), scale_atoms=True)
        atoms.rattle(0.1, seed=index)
        atoms.calc = EMT()
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
        atoms.calc = None
        atoms.info["dft_energy"] = energy
        atoms.arrays["dft_forces"] = forces
        if index % 3:
            atoms.info["dft_stress"] = stress  # eV/Å³; from a virial, give its name as keys["virial"] instead
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


def main() -> None:
    """Write the file, read it, train for a few epochs, and test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cu_au.xyz"
        write_frames(path, num_frames=60)
        data = AtomsDataModule(path, keys=KEYS, split={"val": 10, "test": 10}, cutoff=4.0, batch_size=8)
        data.setup()
        missing, total = data.missing_labels("train")["stress"]
        print(f"{missing} of {total} training frames have no stress")

        masked = {"stress": True}  # without this, a missing label is a NaN loss: nothing is dropped behind your back
        module = ForceFieldModule(
            schnet_force_field(data.statistics, cutoff=data.cutoff, hidden_channels=16, num_filters=16, seed=0),
            loss=EnergyForceStressLoss({"total_energy": 10, "forces": 1, "stress": 100}, ignore_nan=masked),
            val_metrics=EnergyForceStressMetrics({"forces_rmse": 1, "stress_rmse": 1}, ignore_nan=masked),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
            type_names=data.type_names,
        )
        trainer = Trainer(
            max_epochs=8,
            accelerator="cpu",
            inference_mode=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        (results,) = trainer.test(module, datamodule=data, verbose=False)
    for name in ("per_atom_energy_rmse", "forces_rmse", "stress_rmse"):
        print(f"test {name} {results[f'test0_epoch/{name}']:.4f}")


if __name__ == "__main__":
    main()
