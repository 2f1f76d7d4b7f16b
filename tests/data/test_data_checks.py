"""Files that give themselves away: duplicate atoms and other units; real files are not suspected."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from support.bad_input import BOHR, HARTREE, frames
from support.commands import SHARED

from harness.data import AtomsDataModule, Frame, embedded_alloy_file, read_frames
from harness.data.checks import check_distances, check_lengths, check_units, check_work


def read(atoms: list[Atoms]) -> list[Frame]:
    return [
        Frame(each, each.get_potential_energy(), each.get_forces(), each.get_stress(voigt=False), "file", index)
        for index, each in enumerate(atoms)
    ]


def changed(
    given: list[Frame], energy: float = 1, forces: float = 1, stress: float = 1, positions: float = 1
) -> list[Frame]:
    made = []
    for frame in given:
        atoms = frame.atoms.copy()
        atoms.cell = atoms.cell.array * positions
        atoms.positions *= positions
        labels = {
            "energy": None if frame.energy is None else frame.energy * energy,
            "forces": None if frame.forces is None else frame.forces * forces,
            "stress": None if frame.stress is None else frame.stress * stress,
        }
        made.append(dataclasses.replace(frame, atoms=atoms, **labels))
    return made


REAL = {
    "acac": ("acac/train_300K.xyz", {}),
    "acac_test": ("acac/test_MD_300K.xyz", {}),
    "ethanol_methanol": ("ethanol_methanol/train_eth_meth.xyz", {}),
    "carbon": ("carbon/carbon_100.xyz", {"forces": "force"}),
}


@pytest.fixture(scope="module")
def real() -> dict[str, list[Frame]]:
    if not SHARED.is_dir():
        pytest.skip("the shared data sets are not there")
    return {name: read_frames(SHARED / path, keys) for name, (path, keys) in REAL.items()}


@pytest.mark.parametrize("name", REAL)
def test_real_files_pass(name: str, real: dict[str, list[Frame]]) -> None:
    check_units(real[name])
    check_distances(real[name], 0.1)
    check_units(real[name][:7])  # too few for a conclusion
    check_work(real[name][::5])


def test_the_embedded_alloy_passes() -> None:
    alloy = read_frames(embedded_alloy_file(60))
    check_units(alloy)
    check_distances(alloy, 0.1)


@pytest.mark.parametrize("name", ["acac", "carbon"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"energy": 23.06055}, "kcal/mol"),
        ({"energy": 96.48533}, "kJ/mol"),
        ({"energy": 1 / HARTREE}, "Hartree"),
        ({"energy": 1000.0}, "meV"),
        ({"forces": -1.0}, "gradients"),
        ({"forces": BOHR / HARTREE}, "Hartree/Bohr"),
        ({"positions": 0.1}, "nm"),
        ({"positions": 1 / BOHR}, "Bohr"),
        ({"stress": -1.0}, "opposite"),
        ({"stress": 160.21766}, "GPa"),
        ({"stress": 1602.1766}, "kbar"),
    ],
)
def test_real_files_in_other_units(
    name: str, change: dict[str, float], words: str, real: dict[str, list[Frame]]
) -> None:
    if "stress" in change and name != "carbon":
        pytest.skip("no stress")
    if name == "carbon" and "Hartree/Bohr" in words:
        pytest.skip("almost all work is that of the stress")
    with pytest.raises(ValueError, match=words):
        check_units(changed(real[name], **change))


def test_positions_in_pm(real: dict[str, list[Frame]]) -> None:
    with pytest.raises(ValueError, match="pm"):
        check_lengths(changed(real["ethanol_methanol"][:9], positions=100.0))


def test_all_in_atomic_units(real: dict[str, list[Frame]]) -> None:
    with pytest.raises(ValueError, match="per Bohr"):
        check_work(changed(real["acac"], energy=1 / HARTREE, forces=BOHR / HARTREE))


def test_labels_that_do_not_belong_together_are_no_unit(real: dict[str, list[Frame]]) -> None:
    """Forces of other frames have no common factor with the energies: nothing is concluded."""
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(real["acac"]))
        mixed = [
            dataclasses.replace(frame, forces=real["acac"][other].forces)
            for frame, other in zip(real["acac"], order, strict=True)
        ]
        check_work(mixed)


@pytest.mark.parametrize("factor", [0.8, 1.2, 3.0])
def test_a_factor_of_no_unit_is_not_refused(factor: float) -> None:
    check_work(changed(read(frames()), energy=factor))


def test_a_left_handed_cell_is_fine() -> None:
    mirrored = frames()
    for atoms in mirrored:
        calculator = atoms.calc
        atoms.set_cell(atoms.cell.array[[1, 0, 2]])
        atoms.calc = calculator
        calculator.atoms = atoms.copy()
    given = read(mirrored)
    assert given[0].atoms.cell.volume > 0 > np.linalg.det(given[0].atoms.cell.array)
    check_units(given)
    check_distances(given, 0.1)


def test_frames_that_distances_say_nothing_of() -> None:
    apart = [Frame(Atoms("Cu"), energy=1.0), Frame(Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]]), energy=1.0)]
    check_lengths([*apart, Frame(Atoms("H2", [[0, 0, 0], [0, 0, 1.6]]), energy=1.0)])
    dissociating = [Frame(Atoms("N2", [[0, 0, 0], [0, 0, length]]), energy=1.0) for length in np.linspace(1, 6, 20)]
    check_lengths(dissociating)


@pytest.mark.parametrize("num_atoms", [4, 80])
@pytest.mark.parametrize("pbc", [True, False, (True, False, True)])
def test_distances_agree_with_all_pairs(num_atoms: int, pbc: bool | tuple[bool, bool, bool]) -> None:
    """Against the distances of all images, for frames some of which have two atoms at about the limit."""
    generator = np.random.default_rng(num_atoms)
    found = 0
    for index in range(20):
        cell = np.eye(3) * 9 + generator.uniform(-2, 2, (3, 3))
        atoms = Atoms(f"Cu{num_atoms}", generator.uniform(-9, 9, (num_atoms, 3)), cell=cell, pbc=pbc)
        shift = generator.integers(-2, 3, 3) * atoms.pbc @ cell
        atoms.positions[1] = atoms.positions[0] + generator.normal(size=3) * 0.06 + shift
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(num_atoms, 1)]
        closer = bool(distances.min() < 0.1)
        found += closer
        frame = Frame(atoms, energy=0.0, origin="made", index=index)
        if closer:
            with pytest.raises(ValueError, match=rf"made, frame {index}: atoms .* Å apart"):
                check_distances([frame], 0.1)
        else:
            check_distances([frame], 0.1)
    assert 0 < found < 20


def test_an_atom_too_close_to_its_own_image() -> None:
    frame = Frame(Atoms("Cu", cell=[5, 5, 0.05], pbc=True), energy=0.0)
    with pytest.raises(ValueError, match=r"atoms 0 \(Cu\) and 0 \(Cu\) are 0.05 Å apart"):
        check_distances([frame], 0.1)


def test_switched_off(tmp_path: Path) -> None:
    atoms = frames()
    for each in atoms:
        each.calc.results["forces"] = -each.calc.results["forces"]
    ase.io.write(tmp_path / "flipped.xyz", atoms, format="extxyz")
    options = {"cutoff": 3.0, "batch_size": 2}
    with pytest.raises(ValueError, match=r"data\.check_units=false"):
        AtomsDataModule(tmp_path / "flipped.xyz", **options).setup()
    AtomsDataModule(tmp_path / "flipped.xyz", **options, check_units=False).setup()
    with pytest.raises(ValueError, match=r"data\.min_distance=null"):
        AtomsDataModule(tmp_path / "flipped.xyz", **options, check_units=False, min_distance=3.0).setup()
    AtomsDataModule(tmp_path / "flipped.xyz", **options, check_units=False, min_distance=None).setup()
