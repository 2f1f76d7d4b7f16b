"""Predict, relax and run dynamics with a trained model: `python examples/use_trained.py outputs/alloy/<date>`.

The checkpoint is enough: neither the config nor the data of the training are read.
"""

from __future__ import annotations

import sys

from ase import units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

import harness
from harness.calculators import HarnessCalculator


def main(run: str) -> None:
    """Energies of rattled copper crystals, the lattice constant, and the energy in some steps of dynamics."""
    model = harness.load_model(f"{run}/checkpoints/best.ckpt")
    print(f"knows {', '.join(model.type_names)}; cutoff {model.cutoff} Å; forces in {model.units['forces']}")

    # many structures in one batch
    crystals = [bulk("Cu", cubic=True) for _ in range(3)]
    for seed, atoms in enumerate(crystals):
        atoms.rattle(0.05, seed=seed)
    predictions = model(model.batch_of(crystals))
    for energy in predictions["total_energy"].flatten().tolist():
        print(f"energy {energy:.4f} eV")
    for symbol, force in zip(crystals[0].symbols, predictions["forces"].tolist(), strict=False):
        print(symbol, "force", " ".join(f"{component:8.4f}" for component in force), "eV/Å")

    # one structure after the other, by ASE
    atoms = crystals[0] * (2, 2, 2)
    atoms.calc = HarnessCalculator(model)
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.02, steps=50)
    print(f"lattice constant {atoms.cell.lengths().mean() / 2:.3f} Å, energy {atoms.get_potential_energy():.4f} eV")

    MaxwellBoltzmannDistribution(atoms, temperature_K=300)
    dynamics = VelocityVerlet(atoms, timestep=2 * units.fs)
    dynamics.attach(lambda: print(f"total energy {atoms.get_total_energy():.4f} eV"), interval=20)
    dynamics.run(60)
    print(f"neighbour lists {atoms.calc.neighbors.num_lists}")


if __name__ == "__main__":
    main(sys.argv[1])
