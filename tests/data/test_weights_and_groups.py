"""Weights and groups of frames: from files and by the values of keys, in batches, and refused where they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from omegaconf import OmegaConf

from harness.data import AtomsDataModule, Frame, collate, empty_batch
from harness.data.groups import sorted_groups
from harness.data.store import BuildSettings, build_store

SILICON = Path(__file__).resolve().parents[3] / "shared" / "data" / "silicon"
GROUPS = ("bulk", "surface", "bulk", None, "defect", "surface", "bulk", "bulk")


def structures() -> list[Atoms]:
    """Cells of copper in three groups, one of none; two with weights of their own."""
    found = []
    for index, group in enumerate(GROUPS):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=index)
        atoms.calc = SinglePointCalculator(atoms, energy=float(index), forces=np.zeros((4, 3)))
        if group is not None:
            atoms.info["config_type"] = group
        found.append(atoms)
    found[1].info |= {"config_weight": 3, "config_forces_weight": 0.5}
    found[4].info |= {"config_weight": 0.0, "stage": 300}
    return found


def data_of(folder: Path, frames: list[Atoms] | None = None, **options: Any) -> AtomsDataModule:
    path = folder / "frames.xyz"
    ase.io.write(path, structures() if frames is None else frames, format="extxyz")
    settings: dict[str, Any] = {"cutoff": 3.0, "batch_size": 3, "split": {"val": 2}}
    data = AtomsDataModule(path, **{**settings, **options})
    data.setup()
    return data


def column(data: AtomsDataModule, name: str) -> dict[int, float]:
    """Values of a field by the number of the frame in its file, from the batches of all sets."""
    found = {}
    for dataset in (data.train_set, *data.val_sets):
        batch = collate([dataset[index] for index in range(len(dataset))])
        numbers = [frame.index for frame in dataset.frames]
        found |= dict(zip(numbers, batch[name].tolist(), strict=True))
    return dict(sorted(found.items()))


def test_weights_of_files_and_of_values_multiply(tmp_path: Path) -> None:
    weights = OmegaConf.create({"config_type": {"surface": 5, "bulk": 1}, "stage": {300: 2}})
    data = data_of(tmp_path, weights=weights)
    assert list(column(data, "weight").values()) == [1, 15, 1, 1, 0, 5, 1, 1]
    assert list(column(data, "forces_weight").values()) == [1, 0.5, 1, 1, 1, 1, 1, 1]
    names = {field.name for field in data.batch_fields}
    assert names == {"weight", "forces_weight", "group_index"}  # of all sets: there is no weight of energy or stress
    batch, empty = next(iter(data.train_dataloader())), empty_batch(torch.float32, data.batch_fields)
    assert batch["weight"].dtype == batch["forces_weight"].dtype == torch.float64
    for name in names:
        assert batch[name].shape == (3,)
        assert (empty[name].shape, empty[name].dtype) == ((0,), batch[name].dtype)
    assert "weight of the training frames: " in data.describe()


def test_missing_labels_are_those_of_frames_that_count(tmp_path: Path) -> None:
    """By the weights of the frame and of the label; the energies of all frames are there."""
    frames = structures()
    for index in (0, 4, 5, 6):  # the second has weight 0, the last two a weight of 0 of another or of this label
        del frames[index].calc.results["forces"]
    frames[5].info["config_energy_weight"] = 0.0
    frames[6].info["config_forces_weight"] = 0.0
    data = data_of(tmp_path, frames, split=None)
    assert data.missing_labels("train")["forces"] == (2, 6)
    assert data.missing_labels("train")["total_energy"] == (0, 6)
    assert data.missing_labels("train", weighted=False) == {
        "total_energy": (0, 8), "forces": (4, 8), "stress": (8, 8)
    }  # fmt: skip
    store = build_store(tmp_path / "frames.store", [tmp_path / "frames.xyz"], BuildSettings(extras=data.extras))
    assert store.incomplete_counts(weighted=True) == data.train_set.frames.incomplete_counts(weighted=True)


def test_keys_of_weights_can_be_named_and_left_out(tmp_path: Path) -> None:
    frames = structures()
    frames[2].info["importance"] = 7.0
    named = data_of(tmp_path, frames, keys={"energy_weight": "importance", "weight": None, "forces_weight": None})
    assert [field.name for field in named.batch_fields] == ["energy_weight", "group_index"]
    assert column(named, "energy_weight")[2] == 7
    assert named.keys.energy == "energy"


def test_data_without_weights_and_groups_have_no_such_fields(tmp_path: Path) -> None:
    frames = structures()
    for atoms in frames:
        atoms.info.clear()
    data = data_of(tmp_path, frames)
    assert data.batch_fields == ()
    assert data.group_names == data.set_names == []
    assert next(iter(data.train_dataloader())).keys() == empty_batch().keys()


BAD_WEIGHTS = [
    (-1.0, "frame 0: the weight 'config_weight' must be finite and at least 0, found -1; correct or remove it"),
    (np.nan, "frame 0: the weight 'config_weight' must be finite and at least 0, found nan"),
    (np.inf, "must be finite and at least 0, found inf"),
    ("heavy", "must be a number, found 'heavy'"),
    (np.ones(3), "must be one number, found 3"),
]


@pytest.mark.parametrize(("weight", "message"), BAD_WEIGHTS, ids=[str(each[0]) for each in BAD_WEIGHTS])
def test_bad_weights_are_refused_with_the_frame(tmp_path: Path, weight: Any, message: str) -> None:
    frames = structures()
    frames[0].info["config_weight"] = weight
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, frames)


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weights": {"config_type": {"bulkk": 2}}}, KeyError, "no frame has config_type=bulkk. Did you mean bulk?"),
    ({"weights": {"config_typ": {"bulk": 2}}}, KeyError, "no frame has 'config_typ'. Did you mean config_type?"),
    ({"weights": {"config_type": {"bulk": -2}}}, ValueError, "bulk must be finite and at least 0, found -2"),
    ({"weights": {"config_type": {"bulk": "2"}}}, TypeError, "bulk is a number, found '2'"),
    ({"weights": {"config_type": 2}}, TypeError, "is a mapping of the values of config_type to weights"),
    ({"weights": [1]}, TypeError, "is a mapping such as"),
    (
        {"keys": {"weight": "config_wait"}},
        KeyError,
        "data.keys.weight=config_wait: no frame has it. Did you mean config",
    ),
    ({"keys": {"weight": 1}}, TypeError, "data.keys.weight is the name of a weight"),
    ({"keys": {"wait": "x"}}, KeyError, "unknown labels"),
    ({"group_key": "config_tipe"}, KeyError, "data.group_key=config_tipe: no frame has it. Did you mean config_type?"),
    ({"group_key": 1}, TypeError, "data.group_key is a name in the files"),
    ({"weights": {"config_type": {"bulk": 0, "surface": 0}}, "num_train": 2}, ValueError, "all 2 training frames"),
]


@pytest.mark.parametrize(("options", "kind", "message"), MISTAKES, ids=[str(each[0]) for each in MISTAKES])
def test_mistakes_are_told(tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    frames = [atoms for atoms, group in zip(structures(), GROUPS, strict=True) if group in ("bulk", "surface")]
    with pytest.raises(kind, match=message):
        data_of(tmp_path, frames, **options)


def test_groups_are_those_of_all_sets_and_no_isolated_atoms(tmp_path: Path) -> None:
    atom = molecule("H")
    atom.info["config_type"] = "IsolatedAtom"
    atom.calc = SinglePointCalculator(atom, energy=-13.6, forces=np.zeros((1, 3)))
    for isolated, extra in (("references", []), ("frames", ["IsolatedAtom"])):
        data = data_of(tmp_path, [*structures(), atom], isolated_atoms=isolated, split_seed=3)
        assert data.group_names == [*extra, "bulk", "defect", "surface"]
        found = column(data, "group_index")
        names = [data.group_names[int(index)] if index >= 0 else None for index in found.values()]
        assert names == [*GROUPS, *extra]
    assert next(iter(data.train_dataloader()))["group_index"].dtype == torch.int64


def test_other_keys_make_other_groups(tmp_path: Path) -> None:
    data = data_of(tmp_path, group_key="stage")
    assert data.group_names == ["300"]
    assert sorted(column(data, "group_index").values()) == [-1] * 7 + [0]
    assert "group_index" not in {field.name for field in data_of(tmp_path, group_key=None).batch_fields}


def test_too_many_groups_are_none() -> None:
    names = [str(number) for number in range(201)]
    with pytest.warns(UserWarning, match="201 different values, expected at most 200: there are no groups"):
        assert sorted_groups(names, "config_type") == []
    with pytest.raises(ValueError, match=r"data.group_key=frame_id: 201 different values"):
        sorted_groups(names, "frame_id")
    assert sorted_groups([*names[:200], None], "frame_id") == sorted(names[:200])


def test_a_group_that_is_not_among_the_names_is_refused(tmp_path: Path) -> None:
    (field,) = (each for each in data_of(tmp_path).batch_fields if each.name == "group_index")
    with pytest.raises(ValueError, match="the group 'molten' is not among"):
        field.tensor(Frame(molecule("H2O"), group="molten"), torch.float32)


def test_silicon_has_four_groups_and_weights_by_them() -> None:
    if not SILICON.is_dir():
        pytest.skip("no shared data")
    data = AtomsDataModule(
        SILICON / "training.xyz",
        test=SILICON / "test.xyz",
        split={"val": 20},
        cutoff=3.0,
        batch_size=8,
        weights={"config_type": {"Vacancy": 5}},
    )
    data.setup()
    assert data.group_names == ["AIMD-NVT", "Elastic", "Surface", "Vacancy"]
    read = {atoms.info["config_type"] for atoms in ase.io.iread(SILICON / "training.xyz")}
    assert set(data.group_names) == read
    for dataset in (data.train_set, data.val_sets[0], data.test_sets[0]):
        chosen = range(0, len(dataset), 4)
        for index in chosen:
            frame, sample = dataset.frames[index], dataset[index]
            assert data.group_names[int(sample["group_index"])] == frame.atoms.info["config_type"] == frame.group
            assert float(sample["weight"]) == (5 if frame.group == "Vacancy" else 1)
