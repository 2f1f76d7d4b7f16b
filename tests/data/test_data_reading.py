"""Labels from extended XYZ files, databases and trajectories, under any key, and what is said of bad ones."""

from __future__ import annotations

import re
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from harness.data import Frame, LabelKeys, read_frames
from harness.data.frames import FrameList
from harness.data.hints import label_hint, mixed_family_hint

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def labelled(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True)
    atoms.rattle(0.1, seed=seed)
    strain = np.array([[0.02, 0.01, 0.0], [0.01, 0.0, -0.02], [0.0, -0.02, 0.0]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def bare(atoms: Atoms, **info) -> Atoms:
    """The structure alone, with ``info``."""
    copied = atoms.copy()
    copied.calc = None
    copied.info.update(info)
    return copied


@pytest.mark.parametrize("suffix", ["xyz", "extxyz", "traj", "db", "json"])
def test_labels_of_a_calculator_in_any_format(tmp_path, suffix):
    structures = [labelled(0), labelled(1)]
    path = tmp_path / f"frames.{suffix}"
    ase.io.write(path, structures)
    frames = read_frames(path)
    assert [frame.index for frame in frames] == [0, 1]
    for frame, atoms in zip(frames, structures, strict=True):
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(frame.forces, atoms.get_forces(), atol=1e-8)
        np.testing.assert_allclose(frame.stress, atoms.get_stress(voigt=False), atol=1e-12)
        np.testing.assert_allclose(frame.atoms.positions, atoms.positions, atol=1e-8)


def test_labels_under_other_keys(tmp_path):
    atoms = labelled()
    renamed = bare(atoms, dft_energy=atoms.get_potential_energy(), dft_stress=atoms.get_stress(voigt=False))
    renamed.arrays["dft_forces"] = atoms.get_forces()
    path = tmp_path / "renamed.xyz"
    ase.io.write(path, [renamed], format="extxyz")
    (frame,) = read_frames(path, {"energy": "dft_energy", "forces": "dft_forces", "stress": "dft_stress"})
    assert frame.energy == pytest.approx(atoms.get_potential_energy())
    np.testing.assert_allclose(frame.forces, atoms.get_forces(), atol=1e-8)
    np.testing.assert_allclose(frame.stress, atoms.get_stress(voigt=False), atol=1e-8)


def test_labels_in_the_columns_and_data_of_a_database(tmp_path):
    atoms = labelled()
    path = tmp_path / "frames.db"
    with ase.db.connect(path) as database:
        database.write(bare(atoms), key_value_pairs={"dft_energy": -3.5}, data={"dft_forces": atoms.get_forces()})
    (frame,) = read_frames(path, {"energy": "dft_energy", "forces": "dft_forces"})
    assert frame.energy == -3.5
    np.testing.assert_allclose(frame.forces, atoms.get_forces())
    assert frame.stress is None


def test_the_calculator_comes_first(tmp_path):
    path = tmp_path / "frames.traj"
    atoms = labelled()
    atoms.info["energy"] = 100.0
    ase.io.write(path, atoms)
    (frame,) = read_frames(path)
    assert frame.energy == pytest.approx(atoms.get_potential_energy())


@pytest.mark.parametrize("form", ["matrix", "nine", "voigt"])
def test_virial_and_stress_agree(tmp_path, form):
    atoms = labelled()
    virial = -atoms.get_volume() * atoms.get_stress(voigt=False)
    key = "virial" if form != "voigt" else "dft_virial"  # ASE insists that "virial" has nine numbers in a file
    virial = {"matrix": virial, "nine": virial.ravel(), "voigt": -atoms.get_volume() * atoms.get_stress()}[form]
    path = tmp_path / "virial.xyz"
    ase.io.write(path, bare(atoms, **{key: virial}), format="extxyz")
    (frame,) = read_frames(path, {"virial": key})
    np.testing.assert_allclose(frame.stress, atoms.get_stress(voigt=False), rtol=1e-6, atol=1e-9)
    assert frame.energy is None


# keys that are named, what the frames have, and the label that is read: "named" or "default", by what it is of
NAMED = {
    "energy": ({"energy": "mine"}, {"energy": 1.0, "mine": 2.0}, 2.0),
    "energy beside a free energy": ({"energy": "free_energy"}, {"energy": 1.0, "free_energy": 2.0}, 2.0),
    "forces": ({"forces": "mine"}, {"forces": np.ones((4, 3)), "mine": 2 * np.ones((4, 3))}, 2.0),
    "stress": ({"stress": "mine"}, {"stress": np.eye(3), "mine": 2 * np.eye(3)}, 2.0),
    "stress beside a virial": ({"stress": "mine"}, {"virial": np.eye(3), "mine": 2 * np.eye(3)}, 2.0),
    "virial": ({"virial": "mine"}, {"virial": np.eye(3), "mine": 2 * np.eye(3)}, "virial"),
    "virial beside a stress": ({"virial": "mine"}, {"stress": np.eye(3), "mine": 2 * np.eye(3)}, "virial"),
    "virial where there is none": ({"virial": "mine"}, {"stress": 2 * np.eye(3)}, 2.0),
    "stress where there is none": ({"stress": "mine"}, {"virial": 2 * np.eye(3)}, "virial"),
    "both, of which one is there": ({"stress": "s", "virial": "v"}, {"v": 2 * np.eye(3)}, "virial"),
    "none": ({}, {"stress": 2 * np.eye(3), "virial": np.eye(3)}, 2.0),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_key_that_was_named_wins(tmp_path, name):
    keys, labels, expected = NAMED[name]
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True)
    for key, value in labels.items():
        (atoms.arrays if np.shape(value) == (4, 3) else atoms.info)[key] = value
    other = bulk("Cu", "fcc", a=3.7, cubic=True)  # so that each key is in some frame
    other.info = {key: np.eye(3) for key in keys.values() if key not in labels} or {"energy": 1.0}
    ase.io.write(tmp_path / "frames.xyz", [atoms] if "energy" in keys or "forces" in keys else [atoms, other])
    frame = read_frames(tmp_path / "frames.xyz", keys)[0]
    found = frame.energy if frame.energy is not None else frame.forces if frame.forces is not None else frame.stress
    value = -2.0 / atoms.get_volume() if expected == "virial" else expected
    np.testing.assert_allclose(np.diag(found) if np.shape(found) == (3, 3) else found, value)


def test_two_names_for_the_stress_of_a_frame_are_refused(tmp_path):
    atoms = bare(labelled(), energy=1.0, s=np.eye(3), v=np.eye(3))
    ase.io.write(tmp_path / "frames.traj", atoms)
    with pytest.raises(ValueError, match="both the stress 's' and the virial 'v' are named"):
        read_frames(tmp_path / "frames.traj", {"stress": "s", "virial": "v"})


@pytest.mark.parametrize(
    ("label", "info", "arrays", "words"),
    [
        ("energy", {"free_energy": 1.0}, {}, "Did you mean data.keys.energy=free_energy?"),
        ("energy", {"REF_energy": 1.0, "energy_unit": "eV"}, {}, r"energy=REF_energy\?"),
        ("energy", {"cut_off": 3.0}, {}, r"under 'energy' \(data.keys.energy\); the frames have \['cut_off'.*\]\.$"),
        ("forces", {}, {"force": np.zeros((4, 3))}, "Did you mean data.keys.forces=force?"),
        ("forces", {"forces_unit": "eV/A"}, {"dft_forces": np.zeros((4, 3))}, r"forces=dft_forces\?$"),
        ("forces", {"force_constant": 3.0}, {}, r"\]\.$"),
        ("stress", {"REF_stress": np.eye(3)}, {}, r"stress=REF_stress\?$"),
        (
            "stress",
            {"virials": np.eye(3)},
            {},
            r"'stress' \(data.keys.stress\) and 'virial' \(.*data.keys.virial=virials\?$",
        ),
    ],
)
def test_hints_on_labels_that_no_frame_has(label, info, arrays, words):
    atoms = bare(bulk("Cu", "fcc", a=3.7, cubic=True), **info)
    atoms.arrays.update(arrays)
    assert re.search(words, label_hint(FrameList([Frame(atoms)]), label, LabelKeys()))


def test_a_stress_takes_precedence_over_a_virial(tmp_path):
    atoms = labelled()
    atoms.info["virial"] = np.eye(3)
    path = tmp_path / "both.traj"
    ase.io.write(path, atoms)
    np.testing.assert_allclose(read_frames(path)[0].stress, atoms.get_stress(voigt=False))


def test_a_stress_without_a_volume_is_no_label(tmp_path):
    path = tmp_path / "molecule.xyz"
    ase.io.write(path, bare(molecule("H2O"), energy=1.0, stress=np.zeros((3, 3))), format="extxyz")
    (frame,) = read_frames(path)
    assert frame.stress is None
    assert frame.stress_left_out
    assert frame.energy == 1.0


def test_unknown_values_are_missing_labels(tmp_path):
    path = tmp_path / "partly.traj"
    atoms = labelled()
    forces = np.full((4, 3), np.nan)
    forces[0] = 1.0
    atoms.calc = SinglePointCalculator(atoms, energy=np.nan, forces=forces, stress=np.full(6, np.nan))
    ase.io.write(path, atoms)
    (frame,) = read_frames(path)
    assert frame.energy is None
    assert frame.stress is None
    assert np.isnan(frame.forces).sum() == 9


def test_keys_from_a_mapping():
    assert LabelKeys.from_mapping({"forces": "force"}) == LabelKeys(forces="force")
    assert LabelKeys.from_mapping(None) == LabelKeys()
    with pytest.raises(KeyError, match=r"\['force'\].*valid are \['energy', 'forces', 'stress', 'virial'\]"):
        LabelKeys.from_mapping({"force": "forces"})
    with pytest.raises(TypeError, match="must be a string, found 3"):
        LabelKeys.from_mapping({"energy": 3})
    with pytest.raises(TypeError, match="must be a mapping"):
        LabelKeys.from_mapping("energy")


def test_a_key_that_no_frame_has(tmp_path):
    path = tmp_path / "frames.xyz"
    atoms = labelled()
    atoms.info["charge"] = 0
    ase.io.write(path, atoms, format="extxyz")
    with pytest.raises(KeyError, match=r"forces key 'dft_forces'; the frames have \['charge', 'energy', 'forces'"):
        read_frames(path, {"forces": "dft_forces"})


def test_a_frame_without_any_label(tmp_path):
    path = tmp_path / "frames.xyz"
    ase.io.write(path, [labelled(), bare(labelled())], format="extxyz")
    with pytest.raises(ValueError, match=r"frames.xyz, frame 1: no label under the keys energy=\w+, forces="):
        read_frames(path)
    assert not read_frames(path, require_labels=False)[1].is_labelled


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of structures at .*missing.xyz"):
        read_frames(tmp_path / "missing.xyz")
    (tmp_path / "empty.xyz").touch()
    with pytest.raises(ValueError, match=r"empty.xyz is empty"):
        read_frames(tmp_path / "empty.xyz")
    (tmp_path / "text.xyz").write_text("this is no structure\n")
    with pytest.raises(ValueError, match=r"ASE cannot read .*text.xyz"):
        read_frames(tmp_path / "text.xyz")
    ase.io.write(tmp_path / "cut.xyz", labelled(), format="extxyz")
    lines = (tmp_path / "cut.xyz").read_text().splitlines()
    (tmp_path / "cut.xyz").write_text("\n".join(lines[:-2]))
    with pytest.raises(ValueError, match=r"ASE cannot read .*cut.xyz.*complete"):
        read_frames(tmp_path / "cut.xyz")
    with ase.db.connect(tmp_path / "none.db") as database:
        del database[database.write(labelled())]
    with pytest.raises(ValueError, match=r"none.db"):
        read_frames(tmp_path / "none.db")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": [1.0, 2.0]}, r"frame 1: the energy 'energy' must be one number, found shape \(2,\)"),
        ({"energy": np.inf}, "frame 1: the energy 'energy' has infinite values"),
        ({"energy": "low"}, "frame 1: the energy 'energy' must be numbers, found 'low'"),
        ({"forces": np.zeros(3)}, r"frame 1: the forces 'forces' must have shape \(4, 3\), found \(3,\)"),
        ({"stress": np.zeros(5)}, r"frame 1: the stress 'stress' must be 3 x 3 .* found shape \(5,\)"),
        ({"virial": np.zeros(4)}, r"frame 1: the virial 'virial' must be 3 x 3 .* found shape \(4,\)"),
        ({"virial": np.eye(3), "pbc": False}, "frame 1: the virial 'virial' needs a volume"),
        ({"position": np.nan}, "frame 1: positions must be finite, found 1 NaN"),
        ({"cell": np.zeros((3, 3))}, "frame 1: the periodic directions of pbc"),
        ({"cell": np.diag([3.0, 3.0, 0.0])}, "frame 1: the periodic directions of pbc"),
        ({"cell": np.ones((3, 3))}, "frame 1: the periodic directions of pbc"),
    ],
)
def test_unusable_frames(tmp_path, change, message):
    info = {name: change[name] for name in ("energy", "forces", "stress", "virial") if name in change}
    atoms = bare(labelled(), **{"energy": 1.0, **info})
    if "position" in change:
        atoms.positions[0, 1] = change["position"]
    if "cell" in change:
        atoms.cell = change["cell"]
    atoms.pbc = change.get("pbc", True)
    path = tmp_path / "frames.traj"
    ase.io.write(path, [labelled(), atoms])
    with pytest.raises(ValueError, match=message):
        read_frames(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not beside the checkout")
def test_data_sets_at_hand():
    carbon = read_frames(SHARED / "carbon" / "carbon_100.xyz", {"forces": "force"})
    assert len(carbon) == 100
    assert all(frame.forces is not None and frame.stress is not None for frame in carbon)
    first = carbon[0]
    np.testing.assert_allclose(-first.stress * first.atoms.get_volume(), first.atoms.info["virial"], atol=1e-6)

    acac = read_frames(SHARED / "acac" / "train_300K.xyz")
    assert len(acac) == 500
    assert acac[0].energy == -9391.45554428476
    assert acac[0].stress is None
    sizes = {len(frame.atoms) for frame in read_frames(SHARED / "ethanol_methanol" / "train_eth_meth.xyz")}
    assert sizes == {6, 9}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"virial": "REF_virials"}, "data.keys.energy=REF_energy data.keys.forces=REF_forces"),
        ({"virial": "REF_virials", "energy": "REF_energy"}, "data.keys.forces=REF_forces"),
        ({"virial": "REF_virials", "energy": "REF_energy", "forces": "REF_forces"}, ""),
        ({}, ""),
    ],
)
def test_labels_of_two_methods_are_told(keys: dict[str, str], told: str) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.info |= {"REF_energy": 1.0, "REF_virials": np.eye(3).ravel(), "energy": 2.0}
    atoms.arrays["REF_forces"] = atoms.arrays["forces"] = np.zeros((4, 3))
    found = mixed_family_hint(FrameList([Frame(atoms)]), LabelKeys.from_mapping(keys))
    assert bool(found) == bool(told)
    assert told in found
