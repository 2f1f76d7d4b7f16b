"""Reference energies of elements: what compositions determine, what is chosen where they do not, and what is told."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from support.bad_input import BASE, composed, frames, isolated, relabelled

from harness.data import AtomsDataModule
from harness.data.references import EnergySums, References, fit_references, neutral_atom_energies, outside_of
from harness.job import execute, prepare
from harness.models import isolated_atom_energies

CHNO = ["H", "C", "N", "O"]
TRUE = np.array([-13.6, -1027.0, -1484.0, -2037.0])
LEVEL = {"Cu": -1234.5, "Ag": -4321.25, "Au": -7000.0}


def fit(counts: list[list[int]], energies: np.ndarray, names: list[str] = CHNO, **options) -> References:
    rows = np.array(counts, dtype=np.float64), np.asarray(energies, dtype=np.float64)
    return fit_references(EnergySums.of(*rows), names, rows=rows, **options)


# compositions of H, C, N, O; number of directions that they leave open
COMPOSITIONS: dict[str, tuple[list[list[int]], int]] = {
    "all of them": ([[4, 1, 0, 0], [3, 0, 1, 0], [2, 0, 0, 1], [6, 2, 0, 1]], 0),
    "one more than needed": ([[4, 1, 0, 0], [3, 0, 1, 0], [2, 0, 0, 1], [1, 1, 1, 0], [0, 1, 0, 2]], 0),
    "one composition": ([[8, 5, 1, 2]] * 5, 3),
    "a multiple of it": ([[8, 5, 1, 2], [16, 10, 2, 4]], 3),
    "two compositions": ([[6, 2, 1, 1], [4, 1, 1, 1]], 2),
    "an element missing": ([[4, 1, 0, 0], [2, 0, 0, 1], [6, 2, 0, 1]], 1),
    "an element and a direction missing": ([[6, 2, 0, 1]], 3),
    "a common difference": ([[4, 1, 0, 0], [6, 2, 0, 0], [8, 3, 0, 0]], 2),
    "one element": ([[2, 0, 0, 0], [4, 0, 0, 0]], 3),
    "elements that keep apart": ([[1, 1, 0, 0], [0, 0, 1, 1]], 2),
    "weakly determined": ([[500, 500, 0, 0]] * 50 + [[499, 501, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 0),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_null_space_is_that_of_the_compositions(name: str) -> None:
    counts, num_open = COMPOSITIONS[name]
    energies = np.array(counts) @ TRUE
    found = fit(counts, energies)
    assert len(CHNO) - np.linalg.matrix_rank(np.array(counts)) == num_open == found.undetermined.shape[1]
    np.testing.assert_allclose(found.undetermined.T @ found.undetermined, np.eye(num_open), atol=1e-12)
    np.testing.assert_allclose(np.array(counts) @ found.undetermined, 0, atol=1e-9)
    np.testing.assert_allclose(np.array(counts) @ found.energies, energies, rtol=1e-12, atol=1e-8)
    assert not outside_of(np.array(counts, dtype=float), found.undetermined).any()
    if not num_open:
        np.testing.assert_allclose(found.energies, TRUE, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name != "one element"])  # hydrogen says little
def test_what_is_chosen_is_near_to_free_atoms(name: str) -> None:
    """Within 5 % of the true energies for heavy atoms and a few eV for hydrogen: least norm gives it -808 eV."""
    counts, _ = COMPOSITIONS[name]
    binding = -5.0 * np.array(counts).sum(axis=1)
    found = fit(counts, np.array(counts) @ TRUE + binding).energies
    assert (np.abs(found - TRUE) < 6 + 0.05 * np.abs(TRUE)).all(), found


def test_small_energies_are_shared_out_evenly() -> None:
    found = fit([[2, 1, 0, 0]] * 3, np.full(3, -12.0))
    np.testing.assert_allclose(found.energies, -4.0)
    np.testing.assert_allclose(fit([[0, 1, 0, 0]] * 3, np.full(3, 2.0)).energies, 2.0)  # eV above whatever is zero


def test_acetylacetone_as_the_documentation_has_it() -> None:
    found = fit([[8, 5, 2]] * 4, np.full(4, -9391.3), ["H", "C", "O"])
    np.testing.assert_allclose(found.energies, [-14.77, -1031.78, -2057.12], atol=0.01)
    assert abs(np.linalg.lstsq([[8.0, 5, 2]], [-9391.3], rcond=None)[0][0] + 808) < 0.2


def test_atoms_of_the_statistical_theory() -> None:
    """Against energies of Hartree-Fock: C. F. Bunge et al., At. Data Nucl. Data Tables 53, 113 (1993)."""
    exact = {"C": -37.6886, "O": -74.8094, "Ar": -526.8175, "Kr": -2752.0550, "Xe": -7232.1384}
    found = neutral_atom_energies(list(exact)) / 27.211386
    np.testing.assert_allclose(found, list(exact.values()), rtol=0.01)
    np.testing.assert_allclose(neutral_atom_energies(["H", "He"]), [-13.606, -77.87], rtol=0.08)


def test_known_energies_are_held_and_others_follow() -> None:
    counts = [[6, 2, 0, 1], [4, 1, 0, 1]]
    found = fit(counts, np.array(counts) @ TRUE, fixed={"H": -13.6})
    np.testing.assert_allclose(found.energies[[0, 1, 3]], TRUE[[0, 1, 3]], rtol=1e-10)
    assert found.undetermined.shape == (4, 1)  # nitrogen
    np.testing.assert_allclose(found.undetermined[:, 0], [0, 0, 1, 0])
    every = fit(counts, np.array(counts) @ TRUE + 100, fixed=dict(zip(CHNO, TRUE, strict=True)))
    assert every.energies.tolist() == TRUE.tolist()
    assert every.undetermined.shape == (4, 0)


def test_sums_merge_and_agree_with_the_dense_fit() -> None:
    generator = np.random.default_rng(0)
    names = [*CHNO, "Cu", "Ag"]
    true = generator.uniform(-5000, -10, len(names))
    counts = generator.integers(0, 30, (900, len(names))).astype(float)
    energies = counts @ true + generator.normal(size=900)
    whole = EnergySums.of(counts, energies)
    merged = EnergySums.empty(len(names))
    for start in range(0, 900, 250):
        merged = merged + EnergySums.of(counts[start : start + 250], energies[start : start + 250])
    assert (merged.products == whole.products).all()
    assert merged.num_frames == 900
    dense = np.linalg.lstsq(counts, energies, rcond=None)[0]
    assert fit_references(whole, names, rows=(counts, energies)).energies.tolist() == dense.tolist()  # to the last bit
    np.testing.assert_allclose(fit_references(merged, names).energies, dense, rtol=1e-11)


def test_a_single_other_frame_among_many_determines() -> None:
    counts = np.tile([50.0, 50.0], (100_000, 1))
    counts[0] = 49, 51
    found = fit_references(EnergySums.of(counts, counts @ [-1234.5, -4321.25]), ["Cu", "Ag"])
    assert found.undetermined.shape == (2, 0)
    np.testing.assert_allclose(found.energies, [-1234.5, -4321.25], atol=1e-3)


# ---- what a training says


def at_level(made: list[Atoms]) -> list[Atoms]:
    """The frames with total energies of the size of all electrons."""
    return [
        relabelled(
            each, **{**each.calc.results, "energy": each.calc.results["energy"] + sum(LEVEL[s] for s in each.symbols)}
        )
        for each in made
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("references")
    files = {
        "fixed": at_level(frames(16, "Cu3Ag")),
        "mixed": at_level([*frames(8, "Cu3Ag"), *frames(8, "CuAg3")]),
        "other": at_level(frames(6, "Cu2Ag2")),
        "newel": at_level(frames(6, "Cu2AgAu")),
        "unlabelled": [relabelled(each, forces=each.calc.results["forces"]) for each in frames(4, "Cu2Ag2")],
        "isolated": [isolated("Cu", LEVEL["Cu"]), isolated("Ag", LEVEL["Ag"])],
        "with_isolated": [*at_level(frames(16, "Cu3Ag")), isolated("Cu", LEVEL["Cu"]), isolated("Ag", LEVEL["Ag"])],
    }
    for name, content in files.items():
        ase.io.write(made / f"{name}.xyz", content, format="extxyz")
    return made


def told(folder: Path, *overrides: str) -> list[str]:
    """Warnings of a job that is made and checked."""
    config = composed([*BASE, "callbacks=none", *[each.replace("IN/", f"{folder}/") for each in overrides]])
    config.output_dir = str(folder / "nothing")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(config)
    return [str(each.message) for each in caught if "energy_shifts=fit" in str(each.message)]


ALL = "{Cu: -1234.5, Ag: -4321.25, Au: -7000.0}"
OTHER = r"test set 0: the energies of 6 of 6 frames .*Cu, Ag in other proportions.*other.xyz, frame 0, Ag2Cu2"
# files, settings; what is told, in order
TOLD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "compositions that determine": (("data.train=IN/mixed.xyz", "data.test=IN/other.xyz"), ()),
    "one composition alone": (
        ("data.train=IN/fixed.xyz",),
        (r"of Cu, Ag .*fix 1 of 2 combinations of Cu, Ag.*config_type=IsolatedAtom.*energy_shifts=FILE",),
    ),
    "a test of other compositions": (("data.train=IN/fixed.xyz", "data.test=IN/other.xyz"), ("fix 1 of 2", OTHER)),
    "a validation of other compositions": (
        ("data.train=IN/fixed.xyz", "data.val=IN/other.xyz"),
        ("fix 1 of 2", r"validation set 0: the energies of 6 of 6 frames"),
    ),
    "a test of a new element": (
        ("data.train=IN/mixed.xyz", "data.test=IN/newel.xyz"),
        (r"no training frame with an energy has Au\. Chosen are Au", r"6 of 6 frames .*Au in no training frame"),
    ),
    "a second test set": (
        ("data.train=IN/mixed.xyz", "data.test=[IN/other.xyz,IN/newel.xyz]"),
        ("no training frame with an energy has Au", "test set 1: the energies of 6 of 6"),
    ),
    "a test without energies": (("data.train=IN/fixed.xyz", "data.test=IN/unlabelled.xyz"), ("fix 1 of 2",)),
    "energies that were given": (
        ("data.train=IN/fixed.xyz", "data.test=IN/newel.xyz", f"model.energy_shifts={ALL}"),
        (),
    ),
    "a file of isolated atoms": (
        ("data.train=IN/fixed.xyz", "data.test=IN/other.xyz", "model.energy_shifts=IN/isolated.xyz"),
        (),
    ),
    "isolated atoms in training": (("data.train=IN/with_isolated.xyz", "data.test=IN/other.xyz"), ()),
    "isolated atoms joined": (("data.train=[IN/fixed.xyz,IN/isolated.xyz]", "data.test=IN/other.xyz"), ()),
    "isolated atoms of some elements": (
        ("data.train=IN/with_isolated.xyz", "data.test=IN/newel.xyz"),
        (r"no training frame with an energy has Au", r"6 of 6 frames .*: Au in no training frame"),
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_training_tells_what_its_energies_leave_open(name: str, folder: Path) -> None:
    overrides, expected = TOLD[name]
    found = told(folder, *overrides)
    assert len(found) == len(expected), found
    for text, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, text), text


def test_an_evaluation_tells_it_before_its_numbers(folder: Path) -> None:
    config = composed([*BASE, f"data.train={folder}/fixed.xyz", "callbacks=none"])
    config.output_dir = str(folder / "run")
    job = prepare(config)
    execute(job)
    job.trainer.save_checkpoint(folder / "made.ckpt")
    evaluation = ("train=false", f"ckpt_path={folder}/made.ckpt", "data.train=IN/fixed.xyz")
    found = told(folder, *evaluation, "data.test=IN/other.xyz", "data.val=IN/other.xyz")
    assert len(found) == 1, found
    assert re.search(OTHER, found[0])
    assert told(folder, *evaluation) == []


# ---- isolated atoms


def module(folder: Path, *names: str, **options) -> AtomsDataModule:
    made = AtomsDataModule([folder / f"{name}.xyz" for name in names], cutoff=3.5, batch_size=4, **options)
    made.setup()
    return made


def test_isolated_atoms_are_references_and_no_frames(folder: Path) -> None:
    made = module(folder, "with_isolated")
    assert len(made.train_set) == 16
    assert made.statistics.energy_shifts.tolist() == [LEVEL["Cu"], LEVEL["Ag"]]
    assert made.statistics.isolated_atoms == {"Cu": LEVEL["Cu"], "Ag": LEVEL["Ag"]}
    assert made.statistics.undetermined.shape == (2, 0)
    assert "isolated atoms: 2 train; left out of the sets" in made.describe()
    assert "of isolated atoms, for energy_shifts=fit: Cu -1234.5000" in made.describe()
    kept = module(folder, "with_isolated", isolated_atoms="frames")
    assert len(kept.train_set) == 18
    assert not kept.statistics.isolated_atoms
    assert "isolated atoms" not in kept.describe()


def test_isolated_atoms_of_the_other_sets_are_left_out_too(folder: Path) -> None:
    made = module(folder, "fixed", val=folder / "with_isolated.xyz", test=folder / "with_isolated.xyz")
    assert [len(each) for each in (*made.val_sets, *made.test_sets)] == [16, 16]
    assert not made.statistics.isolated_atoms  # nothing of a test reaches the training
    assert "isolated atoms: 2 val, 2 test" in made.describe()


@pytest.mark.parametrize("config_type", ["IsolatedAtom", "isolated_atom", "Isolated Atom"])
def test_spellings_of_the_config_type(config_type: str, tmp_path: Path) -> None:
    atom = isolated("Cu", -3.0)
    atom.info["config_type"] = config_type
    ase.io.write(tmp_path / "made.xyz", [*frames(4), atom], format="extxyz")
    assert module(tmp_path, "made").statistics.isolated_atoms == {"Cu": -3.0}


@pytest.mark.parametrize("config_type", [None, "bulk", "atom"])
def test_other_single_atoms_are_frames(config_type: str | None, tmp_path: Path) -> None:
    atom = isolated("Cu", -3.0)
    atom.info = {} if config_type is None else {"config_type": config_type}
    ase.io.write(tmp_path / "made.xyz", [*frames(4), atom], format="extxyz")
    made = module(tmp_path, "made")
    assert len(made.train_set) == 5
    assert not made.statistics.isolated_atoms


def test_a_file_of_isolated_atoms_has_the_keys_of_the_data(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "atoms.xyz", [Atoms("Cu", info={"REF_energy": -3.0})], format="extxyz")
    assert isolated_atom_energies(tmp_path / "atoms.xyz", "REF_energy") == {"Cu": -3.0}
    with pytest.raises(ValueError, match=r"no energy under 'energy' \(data.keys.energy\), found \['REF_energy'\]"):
        isolated_atom_energies(tmp_path / "atoms.xyz")


# ---- frames that are there more than once


@pytest.mark.parametrize(
    ("train", "sets", "expected"),
    [
        (("fixed",), {}, []),
        (("fixed",), {"test": "fixed"}, [r"test set 0: 16 of 16 frames are training frames too, such as .*frame 0"]),
        (("fixed", "with_isolated"), {}, [r"16 of 32 training frames have the structure of another one"]),
        (("mixed",), {"val": "fixed", "test": "other"}, [r"validation set 0: 8 of 16 frames"]),
    ],
)
def test_repeated_frames_are_told(train: tuple[str, ...], sets: dict, expected: list[str], folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module(folder, *train, **{name: folder / f"{file}.xyz" for name, file in sets.items()})
    found = [str(each.message) for each in caught if "frames" in str(each.message)]
    assert len(found) == len(expected), found
    for text, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, text), text


def test_a_file_under_two_names_is_the_same_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link.xyz").symlink_to(folder / "fixed.xyz")
    with pytest.raises(ValueError, match=r"data\.train has .*fixed\.xyz 2 times"):
        AtomsDataModule([folder / "fixed.xyz", tmp_path / "link.xyz"], cutoff=3.5, batch_size=4)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_fit_near_to_references_of_before_changes_no_more_than_the_energies_ask_for(name: str) -> None:
    counts = np.array(COMPOSITIONS[name][0], dtype=float)
    before = TRUE + np.array([0.5, -3.0, 2.0, 1.0])
    prior = dict(zip(CHNO, before, strict=True))
    same = fit(counts.tolist(), counts @ before, prior=prior)
    np.testing.assert_allclose(same.energies, before, rtol=1e-9)
    found = fit(counts.tolist(), counts @ TRUE, prior=prior)
    np.testing.assert_allclose(counts @ found.energies, counts @ TRUE, rtol=1e-9)
    relative = (found.energies - before) / np.abs(before)
    largest = np.abs((TRUE - before) / np.abs(before))
    assert np.linalg.norm(relative) <= np.linalg.norm(largest) * (1 + 1e-6)  # TRUE fits as well, and is no nearer


def test_energies_of_another_kind_are_not_near_to_references_of_before() -> None:
    counts = [[8, 5, 0, 2]] * 3
    prior = {"H": -1.1, "C": -1.3, "N": -3.1, "O": -1.5}
    found = fit(counts, np.array(counts) @ TRUE, prior=prior)
    assert -30 < found.energies[0] < -5  # and not the -600 eV of a change in proportion to numbers of atoms
