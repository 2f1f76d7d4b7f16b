"""Files that give themselves away: duplicate atoms and other units; real files are not suspected."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from support.bad_input import BOHR, HARTREE, frames, relabelled
from support.commands import SHARED

from harness.data import AtomsDataModule, Frame, embedded_alloy_file, read_frames
from harness.data.checks import _Pairs, check_distances, check_lengths, check_units, check_work, stress_slope


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
    "3bpa": ("3bpa/train_300K.xyz", {}),
    "silicon": ("silicon/training.xyz", {}),
    "silicon_test": ("silicon/test.xyz", {}),
    "mptrj": ("mptrj_random/mptrj_random_1k.xyz", {}),
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


# ---- small samples of stresses


def cells(seed: int, number: int = 24, rattle: float = 0.05, strain: float = 0.01, a: float = 3.8) -> list[Frame]:
    """Frames of rattled atoms in cells about one per cent apart, of four atoms, with their EMT labels."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        atoms = bulk("Cu", "fcc", a=a, cubic=True)
        atoms.symbols = "Cu3Ag"
        deformation = generator.normal(scale=strain, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (deformation + deformation.T)), scale_atoms=True)
        atoms.positions += generator.normal(scale=rattle, size=(4, 3))
        atoms.calc = EMT()
        labels = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
        made.append(relabelled(atoms, *labels))
    return read(made)


def virials(given: list[Frame], sign: float) -> list[Frame]:
    return [dataclasses.replace(frame, stress=sign * frame.atoms.get_volume() * frame.stress) for frame in given]


WRONG = {
    "GPa": (lambda given: changed(given, stress=160.21766), "GPa"),
    "kbar": (lambda given: changed(given, stress=1602.1766), "kbar"),
    "sign": (lambda given: changed(given, stress=-1), "opposite"),
    "kbar and sign, as VASP": (lambda given: changed(given, stress=-1602.1766), "kbar.*(opposite|$)"),
    "GPa and sign": (lambda given: changed(given, stress=-160.21766), "GPa.*(opposite|$)"),
    "Hartree/Bohr³": (lambda given: changed(given, stress=BOHR**3 / HARTREE), "Hartree/Bohr³"),
    "virials": (lambda given: virials(given, -1), "virials"),
    "stress times volume": (lambda given: virials(given, 1), "virials"),
}


@pytest.fixture(scope="module")
def samples() -> list[list[Frame]]:
    return [cells(0), cells(1, rattle=0.02), cells(2, number=12), cells(3, a=3.65), cells(4, strain=0.03)]


@pytest.mark.parametrize("name", WRONG)
def test_small_samples_give_units_and_signs_away(name: str, samples: list[list[Frame]]) -> None:
    change, words = WRONG[name]
    for sample in samples:
        with pytest.raises(ValueError, match=words):
            check_work(change(sample))


@pytest.mark.parametrize("name", ["GPa", "kbar", "kbar and sign, as VASP", "virials"])
def test_far_too_large_stresses_of_strongly_rattled_atoms(name: str) -> None:
    """The error of the work of the forces hides the slope, which is not 1 all the same."""
    for seed in range(3):
        with pytest.raises(ValueError, match=r"work of the stresses.*expected 1"):
            check_work(WRONG[name][0](cells(seed, rattle=0.12)))


def test_small_samples_in_the_right_units_pass(samples: list[list[Frame]]) -> None:
    for sample in samples:
        slope, error, correlation, chosen = stress_slope(_Pairs.of(sample))
        assert 0.6 < slope < 1.5
        assert error < 0.15
        assert correlation > 0.8
        assert chosen.sum() == len(sample) * (len(sample) - 1) / 2
        check_units(sample)
    for seed in range(30):  # from hardly to so strongly rattled that slopes mean nothing
        parameters = {"rattle": (0.02, 0.08, 0.15)[seed % 3], "strain": (0.003, 0.01, 0.04)[seed // 3 % 3]}
        check_work(cells(seed, number=(7, 24)[seed % 2], **parameters, a=(3.5, 3.8, 4.1)[seed // 9 % 3]))


def test_too_few_frames_give_no_slope(samples: list[list[Frame]]) -> None:
    for few in (samples[0][:5], [dataclasses.replace(frame, stress=None) for frame in samples[0]], []):
        assert np.isnan(stress_slope(_Pairs.of(few))[0])
    same_cell = [dataclasses.replace(frame, atoms=frame.atoms.copy()) for frame in samples[0]]
    for frame in same_cell:
        frame.atoms.cell = samples[0][0].atoms.cell
    assert not stress_slope(_Pairs.of(same_cell))[3].any()


@pytest.mark.parametrize("name", ["carbon", "silicon", "silicon_test", "mptrj"])
def test_parts_of_real_files_pass_and_give_other_units_away(name: str, real: dict[str, list[Frame]]) -> None:
    generator = np.random.default_rng(0)
    for number in (8, 24, 24, 60):
        chosen = generator.choice(len(real[name]), min(number, len(real[name])), replace=False)
        part = [real[name][index] for index in chosen]
        check_work(part)
        if name == "mptrj" or number < 24:  # hardly two frames of one crystal
            continue
        for change, _ in (WRONG["GPa"], WRONG["kbar and sign, as VASP"]):
            with pytest.raises(ValueError, match="stresses"):
                check_work(change(part))
