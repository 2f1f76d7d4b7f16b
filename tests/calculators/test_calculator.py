"""The calculator: predictions of the validation, derivatives of its energy, and a neighbour list that stays right."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from support.other_models import INSTALLED
from support.trained import DOUBLE, KeepValidation, trained

import harness
from harness.calculators import HarnessCalculator, SkinNeighbors
from harness.data.neighbors import neighbor_list

LONG = (*DOUBLE, "max_epochs=12", "optimizer.lr=0.02")
Run = tuple[Path, KeepValidation]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("run"), *LONG)


def crystal(size: int = 2, rattle: float = 0.05) -> Atoms:
    atoms = bulk("Cu", "fcc", a=3.8, cubic=True)
    atoms.symbols[3] = "Ag"
    atoms *= (size, size, size)
    atoms.rattle(rattle, seed=1)
    return atoms


def structures_of(kept: KeepValidation) -> list[tuple[Atoms, dict[str, torch.Tensor]]]:
    """Structures of the batches of a validation, and the predictions for each."""
    found = []
    for batch, predictions in kept.seen:
        for graph in range(len(batch["num_atoms"])):
            of = batch["batch"] == graph
            atoms = Atoms(
                batch["atomic_numbers"][of].numpy(),
                batch["pos"][of].numpy(),
                cell=batch["cell"][graph].numpy(),
                pbc=batch["pbc"][graph].numpy(),
            )
            rows = {name: value[of] if len(value) == len(of) else value[graph] for name, value in predictions.items()}
            found.append((atoms, rows))
    return found


def holds_validation(path: Path, kept: KeepValidation, skin: float) -> None:
    calculator = HarnessCalculator(path, "cpu", skin=skin)
    structures = structures_of(kept)
    assert len(structures) == 3
    for atoms, expected in structures:
        atoms.calc = calculator
        close = {"rtol": 1e-12, "atol": 1e-12}
        np.testing.assert_allclose(atoms.get_potential_energy(), expected["total_energy"].item(), **close)
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
        np.testing.assert_allclose(atoms.get_forces(), expected["forces"], **close)
        np.testing.assert_allclose(atoms.get_stress(voigt=False), expected["stress"], **close)
        np.testing.assert_allclose(atoms.get_potential_energies(), expected["atomic_energy"].flatten(), **close)
        np.testing.assert_allclose(atoms.get_potential_energies().sum(), atoms.get_potential_energy(), **close)


@pytest.mark.parametrize("skin", [0.0, 0.7])
def test_predictions_are_those_of_the_validation(run: Run, skin: float) -> None:
    holds_validation(*run, skin)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTALLED)
def test_predictions_of_other_models_are_those_of_the_validation(name: str, tmp_path: Path) -> None:
    holds_validation(*trained(tmp_path, *DOUBLE, model=name), 0.3)


def test_forces_and_stress_are_derivatives_of_the_energy(run: Run) -> None:
    atoms = crystal(1)
    strain = np.array([[1.01, 0.02, 0.0], [0.0, 0.99, 0.03], [0.01, 0.0, 1.02]])
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.calc = calculator = HarnessCalculator(run[0], skin=0.5)
    forces, stress, step = atoms.get_forces(), atoms.get_stress(), 1e-4
    assert np.abs(forces).max() > 0.1
    assert np.abs(stress).min() > 1e-5
    for atom, axis in ((0, 0), (3, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            moved.calc = calculator
            energies.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-6)
    for place, (row, column) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[row, column] += sign * step / 2
            strain[column, row] += sign * step / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            strained.calc = calculator
            energies.append(strained.get_potential_energy())
        slope = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
        assert stress[place] == pytest.approx(slope, abs=1e-7)
    assert calculator.neighbors.num_lists == 1  # none of the structures needed another one


class Scaled(HarnessCalculator):
    """Has forces that are too large."""

    def calculate(self, *args: object, **options: object) -> None:
        super().calculate(*args, **options)  # type: ignore[arg-type]
        self.results["forces"] = self.results["forces"] * 1.03


def spread_of_energy(calculator: HarnessCalculator) -> tuple[float, float]:
    """Largest change of the total energy in 100 fs at about 600 K, and that of the potential energy; eV."""
    atoms = crystal()
    velocities = np.random.default_rng(1).normal(size=(len(atoms), 3))
    atoms.set_momenta(velocities * np.sqrt(units.kB * 600 * atoms.get_masses())[:, None])
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
    total, potential = [], []
    for _ in range(100):
        dynamics.run(1)
        total.append(atoms.get_total_energy())
        potential.append(atoms.get_potential_energy())
    return float(np.ptp(total)), float(np.ptp(potential))


def test_dynamics_conserve_the_energy_and_seldom_make_a_list(run: Run) -> None:
    calculator = HarnessCalculator(run[0], skin=0.6)
    total, potential = spread_of_energy(calculator)
    assert potential > 0.5
    assert total < 1e-3 * potential
    assert 1 <= calculator.neighbors.num_lists < 6
    wrong, potential = spread_of_energy(Scaled(run[0], skin=0.6))
    assert wrong > 1e-2 * potential  # so the bound above finds forces that are off by 0.3 %


def test_a_relaxation_of_positions_and_cell_ends_without_forces_and_stress(run: Run) -> None:
    atoms = crystal(1)
    atoms.calc = HarnessCalculator(run[0])
    before = atoms.get_potential_energy()
    optimizer = BFGS(FrechetCellFilter(atoms), logfile=None)
    assert optimizer.run(fmax=1e-4, steps=300)
    assert atoms.calc.neighbors.num_lists < optimizer.nsteps / 2
    assert atoms.get_potential_energy() < before - 1e-3
    assert np.abs(atoms.get_forces()).max() < 1e-4
    assert np.abs(atoms.get_stress()).max() * atoms.get_volume() < 5e-4  # fmax x number of atoms
    fresh = atoms.copy()
    fresh.calc = HarnessCalculator(run[0], skin=0)
    assert fresh.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)


def test_a_structure_that_becomes_another_one_is_computed_anew(run: Run) -> None:
    calculator = HarnessCalculator(run[0], skin=1.0)
    atoms = crystal(1)
    atoms.calc = calculator

    def same_as_fresh() -> float:
        fresh = atoms.copy()
        fresh.calc = HarnessCalculator(calculator.model, skin=0)
        np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(), rtol=0, atol=1e-12)
        energy: float = atoms.get_potential_energy()
        assert energy == pytest.approx(fresh.get_potential_energy(), abs=1e-12)
        return energy

    seen = [same_as_fresh()]
    atoms.symbols[0] = "Ag"
    seen.append(same_as_fresh())
    atoms.pbc = (True, True, False)
    seen.append(same_as_fresh())
    atoms.cell[2, 2] += 1.0
    atoms.pbc = True
    seen.append(same_as_fresh())
    atoms.set_cell(atoms.cell.array * 0.93, scale_atoms=True)
    seen.append(same_as_fresh())
    atoms.positions[1] += (0.4, 0.1, 0.0)
    seen.append(same_as_fresh())
    del atoms[2]
    seen.append(same_as_fresh())
    assert len({round(energy, 6) for energy in seen}) == len(seen)
    atoms.positions[0] += atoms.cell.array[1]  # to another image
    assert same_as_fresh() == pytest.approx(seen[-1], abs=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_edges_of_a_walk_are_those_of_lists_made_for_each_step(seed: int) -> None:
    """Atoms and cell move together and alone, at random, with wraps, slabs and structures without a cell."""
    generator = np.random.default_rng(seed)
    pbc = [(True, True, True), (True, False, True), (False, False, False), (True, True, True)][seed]
    cell = np.diag(generator.uniform(4, 7, size=3)) + generator.uniform(-0.8, 0.8, size=(3, 3))
    atoms = Atoms("Cu12", scaled_positions=generator.uniform(size=(12, 3)), cell=cell, pbc=pbc)
    if seed == 2:
        atoms.cell = None
    neighbors, steps = SkinNeighbors(3.0, 0.8), 120
    for step in range(steps):
        atoms.positions += generator.normal(scale=0.02, size=(12, 3)) + 0.1  # with a drift
        if step % 3 == 0 and seed != 2:
            strain = np.eye(3) + generator.normal(scale=0.004, size=(3, 3))
            atoms.set_cell(atoms.cell.array @ strain, scale_atoms=bool(step % 2))
        if step % 40 == 39:
            atoms.wrap()
        index, shifts = neighbors.edges(atoms)
        expected = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 3.0)
        found = {(*pair, *shift) for pair, shift in zip(index.T.tolist(), shifts.tolist(), strict=True)}
        assert found == {
            (*pair, *shift) for pair, shift in zip(expected[0].T.tolist(), expected[1].tolist(), strict=True)
        }
        assert len(found) == index.shape[1]
    assert neighbors.num_lists < steps / 3


def test_a_pair_that_comes_within_the_cutoff_as_fast_as_it_can_is_found() -> None:
    """Two atoms beyond cutoff and skin move towards each other, or come closer by strain alone."""
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 3.31]])
    neighbors = SkinNeighbors(3.0, 0.3)
    for step, expected in ((0.0, 1), (0.05, 1), (0.14, 1), (0.16, 2)):
        atoms.positions[:, 2] = step, 3.31 - step
        assert neighbors.edges(atoms)[0].shape[1] == 2 * (3.31 - 2 * step < 3.0)
        assert neighbors.num_lists == expected
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 3.4]], cell=[10, 10, 20], pbc=True)
    neighbors = SkinNeighbors(3.0, 0.3)
    assert neighbors.edges(atoms)[0].shape[1] == 0
    atoms.set_cell([10, 10, 20 * 0.95], scale_atoms=True)
    assert neighbors.num_lists == 1
    assert neighbors.edges(atoms)[0].shape[1] == 0
    atoms.set_cell([10, 10, 20 * 0.85], scale_atoms=True)
    assert neighbors.edges(atoms)[0].shape[1] == 2
    assert neighbors.num_lists == 2


def test_slabs_and_molecules_have_no_stress(run: Run, tmp_path: Path) -> None:
    slab = fcc111("Cu", (2, 2, 3), a=3.8, vacuum=None)
    slab.rattle(0.05, seed=2)
    cluster = Atoms("Cu2Ag", positions=[[0, 0, 0], [2.4, 0, 0], [0, 2.5, 0.3]])
    for atoms, found in ((slab, "pbc=[True, True, False]"), (cluster, "pbc=[False, False, False]")):
        atoms.calc = HarnessCalculator(run[0])
        with pytest.raises(PropertyNotImplementedError, match="has no stress") as error:
            atoms.get_stress()
        assert found in str(error.value)
        assert np.isfinite(atoms.get_potential_energy())
        np.testing.assert_allclose(atoms.get_forces().sum(axis=0), 0, atol=1e-12)
        assert np.abs(atoms.get_forces()).max() > 1e-3
        ase.io.write(tmp_path / "written.traj", atoms)
        again = ase.io.read(tmp_path / "written.traj")
        assert again.get_potential_energy() == atoms.get_potential_energy()


def test_elements_that_the_model_does_not_know_are_named(run: Run) -> None:
    atoms = bulk("Au")
    atoms.calc = HarnessCalculator(run[0])
    with pytest.raises(ValueError, match="knows Cu, Ag, found Au in Au"):
        atoms.get_potential_energy()
    atoms.symbols[:] = "Ag"
    assert np.isfinite(atoms.get_potential_energy())


class OfStructures(torch.nn.Module):
    """Leaves the energies of the atoms out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.inner(batch).items() if name != "atomic_energy"}


def test_a_model_says_what_it_does_not_predict(tmp_path: Path) -> None:
    path, _ = trained(tmp_path, "model.stress=false")
    atoms = crystal(1)
    atoms.calc = HarnessCalculator(path)
    with pytest.raises(PropertyNotImplementedError, match=r"predicts no stress.*model\.stress=false"):
        atoms.get_stress()
    model = harness.load_model(path)
    model.model = OfStructures(model.model)
    atoms.calc = HarnessCalculator(model)
    assert np.isfinite(atoms.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError, match="predicts no energies of atoms, OfStructures gives those of"):
        atoms.get_potential_energies()
    model.cutoff = None
    with pytest.raises(ValueError, match="has no cutoff"):
        HarnessCalculator(model)
    with pytest.raises(ValueError, match="skin must be"):
        HarnessCalculator(path, skin=-1)
