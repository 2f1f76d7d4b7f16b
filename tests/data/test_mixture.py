"""Several data sets in one training: batches, levels of energies, labels that a set lacks, and mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from support.mixtures import write_sets

from harness.data import MixtureDataModule, StoreDataModule, build_store, collate
from harness.data.store import BuildSettings
from harness.models import schnet_force_field

CONF = Path(__file__).resolve().parents[2] / "conf"
TYPES = ["H", "C", "O", "Cu"]
OPTIONS: dict[str, Any] = {"cutoff": 3.5, "batch_size": 6, "dtype": "float64"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return write_sets(tmp_path_factory.mktemp("sets"))


def mixture(
    sets: dict[str, dict[str, Any]], changes: dict[str, Any] | None = None, **options: Any
) -> MixtureDataModule:
    given = {name: {**each, **(changes or {}).get(name, {})} for name, each in sets.items()}
    data = MixtureDataModule(given, **{**OPTIONS, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup()
    return data


@pytest.fixture(scope="module")
def data(sets) -> MixtureDataModule:
    return mixture(sets)


def whole(dataset) -> dict[str, torch.Tensor]:
    return collate([dataset[index] for index in range(len(dataset))], torch.float64)


def test_batches_know_their_sets_and_have_the_types_of_all(data):
    assert data.set_names == ["metal", "molecules"]
    assert data.type_names == TYPES
    assert data.mixing.num_frames == data.mixing.per_epoch == (9, 12)
    batch = whole(data.train_set)
    assert batch["set_index"].tolist() == [0] * 9 + [1] * 12
    assert batch["frame_index"].tolist() == list(range(21))
    assert batch["atomic_numbers"].tolist() == [[1, 6, 8, 29][index] for index in batch["atom_types"]]
    stress_known = ~batch["stress"].isnan().flatten(1).any(dim=1)
    assert stress_known.tolist() == [True] * 9 + [False] * 12
    drawn = [index for batch in data.train_dataloader() for index in batch["frame_index"].tolist()]
    assert sorted(drawn) == list(range(21))
    assert all(len(set(batch["set_index"].tolist())) == 2 for batch in data.train_dataloader())


def test_energies_are_moved_to_the_references_of_the_mixture(data):
    """E' = E - Σ n (μ of the set - μ of the mixture), by NumPy from the files."""
    statistics = data.statistics
    references = statistics.set_references
    assert {name: list(each) for name, each in references.items()} == {
        "metal": ["O", "Cu"],
        "molecules": ["H", "C", "O"],
    }
    common = dict(zip(TYPES, statistics.energy_shifts.tolist(), strict=True))
    assert common == {
        "H": references["molecules"]["H"],
        "C": references["molecules"]["C"],
        "O": references["metal"]["O"],  # the first set that has oxygen
        "Cu": references["metal"]["Cu"],
    }
    assert abs(references["metal"]["O"] - references["molecules"]["O"]) > 1000
    batch = whole(data.train_set)
    for index, frame in enumerate(data.train_set.frames):
        name = data.set_names[int(batch["set_index"][index])]
        atoms = ase.io.read(frame.origin, index=frame.index)
        symbols = atoms.get_chemical_symbols()
        moved = atoms.get_potential_energy() - sum(references[name][each] - common[each] for each in symbols)
        assert frame.energy == pytest.approx(moved, abs=1e-9)
        assert float(batch["total_energy"][index]) == pytest.approx(moved, abs=1e-9)
        assert data.train_set.frames.arrays(index).energy == pytest.approx(moved, abs=1e-9)
        # what is left is what the references of the set leave: EMT's energies, and no level
        assert abs(moved - sum(common[each] for each in symbols)) < 20
    np.testing.assert_allclose(data.train_set.frames.column("energy"), batch["total_energy"][:, 0], atol=1e-9)


def test_references_of_a_set_are_given_or_fitted(sets, tmp_path):
    given = {"Cu": -1000.0, "O": -400.0}
    found = mixture(sets, {"metal": {"references": given}}).statistics
    assert found.set_references["metal"] == given
    to = {"H": -13.0, "C": -1000.0, "O": -2000.0, "Cu": -5.0}
    moved = mixture(sets, {"metal": {"references": given}}, references=to)
    assert moved.statistics.energy_shifts.tolist() == list(to.values())
    frame = moved.train_set.frames[0]
    atoms = ase.io.read(frame.origin, index=frame.index)
    assert frame.energy == pytest.approx(
        atoms.get_potential_energy() - sum(given[each] - to[each] for each in atoms.get_chemical_symbols())
    )
    with pytest.raises(KeyError, match=r"data\.sets\.metal\.references has no value for \['O'\]"):
        mixture(sets, {"metal": {"references": {"Cu": -1000.0}}})


def test_common_references_are_one_fit_and_move_nothing(sets):
    common = mixture(sets, references="common")
    for index, frame in enumerate(common.train_set.frames):
        atoms = ase.io.read(frame.origin, index=frame.index)
        assert frame.energy == atoms.get_potential_energy()
        assert float(common.train_set[index]["total_energy"]) == frame.energy
    counts = common.train_set.frames.compositions().dense(TYPES)
    fitted = np.linalg.lstsq(counts, common.train_set.frames.column("energy"), rcond=None)[0]
    np.testing.assert_allclose(common.statistics.energy_shifts, fitted, rtol=1e-9)
    assert "common to all sets" in common.describe()
    with pytest.raises(ValueError, match=r"sets\.metal\.references gives a set one of its own"):
        mixture(sets, {"metal": {"references": {"Cu": 0, "O": 0}}}, references="common")


def test_statistics_are_those_of_the_frames_as_drawn(sets):
    data = mixture(sets, {"metal": {"weight": 3}}, epoch_frames=40)
    assert data.mixing.per_epoch == (30, 10)
    squares = [0.0, 0.0]
    for epoch in range(9):  # 270 of 9 frames, 90 of 12: not each as often within an epoch
        data_frames = [data.train_set.frames[index] for index in data.mixing.frames(epoch)]
        squares[0] += sum(float((frame.forces**2).sum()) for frame in data_frames)
        squares[1] += sum(frame.forces.size for frame in data_frames)
    assert data.statistics.force_rms == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=0.02)
    edges, atoms = data.train_set.num_edges(), data.train_set.num_atoms()
    drawn = np.repeat([30 / 9, 10 / 12], [9, 12])
    assert data.statistics.mean_neighbors == pytest.approx((drawn * edges).sum() / (drawn * atoms).sum())
    assert "75 %" in data.describe()


def test_labels_that_a_set_lacks_are_no_missing_labels_of_the_others(data):
    both = ["metal", "molecules"]
    assert data.labelled_sets() == {"total_energy": both, "forces": both, "stress": ["metal"]}
    assert data.missing_labels("train")["stress"] == (0, 9)
    assert data.missing_labels("train")["forces"] == (0, 21)
    by_set = data.missing_labels_by_set("train")
    assert (by_set["metal"]["stress"], by_set["molecules"]["stress"]) == ((0, 9), (12, 12))
    assert data.missing_hint("train", "stress").startswith("molecules: 12 frames without.")
    assert "data.sets.molecules.keys.stress" in data.missing_hint("train", "stress")
    assert data.labelled_types("train")["forces"] == set(TYPES)


def test_evaluation_is_of_all_sets_together_or_of_each(sets, data):
    assert (data.val_names, data.test_names) == (["metal+molecules"], ["molecules"])
    (loader,) = data.val_dataloader()
    assert torch.cat([batch["set_index"] for batch in loader]).tolist() == [0] * 3 + [1] * 4
    apart = mixture(sets, evaluation="separate")
    assert (apart.val_names, apart.test_names) == (["metal", "molecules"], ["molecules"])
    indices = [torch.cat([batch["set_index"] for batch in loader]).tolist() for loader in apart.val_dataloader()]
    assert indices == [[0] * 3, [1] * 4]
    assert apart.missing_labels("val1")["total_energy"] == (0, 4)


def test_groups_and_further_fields_are_there_in_every_set(sets):
    weights = {"config_type": {"CH4": 5}}
    data = mixture(sets, {"molecules": {"weights": weights}})
    assert data.group_names == ["CH3OH", "CH4", "H2O"]
    batch = whole(data.train_set)
    assert batch["group_index"][:9].tolist() == [-1] * 9  # the metal has none
    for index in range(9, 21):
        group = data.train_set.frames[index].group
        assert data.group_names[int(batch["group_index"][index])] == group
        assert float(batch["weight"][index]) == (5 if group == "CH4" else 1)
    assert batch["weight"][:9].tolist() == [1.0] * 9
    loader = mixture(sets, {"molecules": {"weights": weights}}, eval_batch_size=100).val_dataloader()[0]
    empty = loader.collate_fn([])
    assert empty.keys() == batch.keys()
    assert {name: empty[name].dtype for name in empty} == {name: batch[name].dtype for name in empty}


def test_groups_of_the_same_name_are_the_same_in_all_sets(sets, tmp_path):
    """Each set counts its own groups, the mixture those of all."""
    frames = ase.io.read(sets["metal"]["train"], index=":")
    for number, atoms in enumerate(frames):
        atoms.info["config_type"] = ("bulk", "H2O", "alloy", "CH4")[number % 4]
    ase.io.write(tmp_path / "metal.xyz", frames, format="extxyz")
    data = mixture(sets, {"metal": {"train": str(tmp_path / "metal.xyz")}})
    assert data.group_names == ["CH3OH", "CH4", "H2O", "alloy", "bulk"]
    batch = whole(data.train_set)
    found = [data.group_names[index] for index in batch["group_index"].tolist()]
    assert found == [frame.group for frame in data.train_set.frames]
    assert len(set(found[:9])) == 4


def test_labels_and_inputs_of_all_sets_are_those_of_the_mixture(sets, tmp_path):
    """A checkpoint records them: a prediction needs the inputs of every set."""
    changes: dict[str, Any] = {}
    for name, key in (("metal", "charge"), ("molecules", "mu")):
        frames = ase.io.read(sets[name]["train"], ":")
        for number, atoms in enumerate(frames):
            atoms.info[key] = number
        changes[name] = {"train": str(tmp_path / f"{name}.xyz")}
        ase.io.write(changes[name]["train"], frames, format="extxyz")
    factors = {"config_type": {"CH4": 5}}
    given = {name: dict(each) for name, each in changes.items()}
    given["metal"]["inputs"] = ["total_charge"]
    given["molecules"] |= {"labels": {"other": {"key": "mu", "level": "graph"}}, "weights": factors}
    data = mixture(sets, given)
    assert [entry.field for entry in data.extras.entries] == ["total_charge", "other"]
    assert data.extras.plain()["weights"]["factors"] == factors
    batch = whole(data.train_set)
    assert batch["total_charge"][9:].flatten().tolist() == [0] * 12  # the default
    assert batch["other"][:9].isnan().all()
    given["metal"]["inputs"] = {"total_charge": {"default": None}}
    with pytest.raises(ValueError, match="the set molecules has no input total_charge") as told:
        mixture(sets, given)
    assert "data.sets.metal.inputs.total_charge.default" in str(told.value)


def test_a_set_may_be_a_store(sets, data, tmp_path):
    store = tmp_path / "molecules.store"
    build_store(store, [sets["molecules"]["train"]], BuildSettings(extras=data.modules["molecules"].extras))
    mixed = mixture(sets, {"molecules": {"train": str(store)}}, check_units=True, min_distance=0.1)
    assert isinstance(mixed.modules["molecules"], StoreDataModule)
    assert [part.cache_neighbors for part in mixed.train_set.parts] == [
        True,
        False,
    ]  # memory does not grow with a store
    assert mixed.statistics.references_text() == data.statistics.references_text()
    expected, found = whole(data.train_set), whole(mixed.train_set)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, equal_nan=True)
    with pytest.raises(TypeError, match=r"data\.sets\.molecules: check_units is decided when a store is built"):
        mixture(sets, {"molecules": {"train": str(store), "check_units": False}})


def test_the_config_makes_the_module(sets):
    config = OmegaConf.load(CONF / "data" / "mixture.yaml")
    config.sets = {name: {"weight": 1, **each} for name, each in sets.items()}
    config = OmegaConf.merge(config, {"cutoff": 3.5, "seed": 3, "split_seed": 3, "dtype": "float64"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = instantiate(config)
        data.setup()
    assert data.mixing.seed == 3
    assert data.mixing.per_epoch == (11, 10)
    assert data.describe().splitlines()[0].split() == [
        *["set", "frames", "share"], "in", "an", "epoch", "times", "each", "val", "test", "labels"
    ]  # fmt: skip


def test_facts_that_ranks_compare_are_of_every_set(sets, data):
    facts = data.fingerprint()
    assert {
        "set metal, train file 1",
        "set molecules, split, part val",
        "frames of the sets in an epoch",
    } <= facts.keys()
    other = mixture(sets, {"metal": {"weight": 2}}).fingerprint()
    assert facts.keys() == other.keys()
    assert {name for name in facts if facts[name] != other[name]} == {"frames of the sets in an epoch"}


def test_a_model_with_other_references_than_the_targets_is_told(sets, data):
    sizes = {"hidden_channels": 4, "num_filters": 4, "num_interactions": 1, "num_gaussians": 4}
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*barebones.*|.*do not determine.*|.*arbitrary reference.*")
        data.check_job(trainer, schnet_force_field(data.statistics, cutoff=3.5, **sizes), "fit")
    other = dict(zip(TYPES, data.statistics.energy_shifts.tolist(), strict=True)) | {"O": -2000.0}
    model = schnet_force_field(data.statistics, cutoff=3.5, energy_shifts=other, **sizes)
    with pytest.warns(UserWarning, match=r"O has -2000\.0000 eV in the model and -399\.\d+ eV in the data"):
        data.check_job(trainer, model, "fit")
    undetermined = mixture({"alone": {"train": sets["molecules"]["train"]}, "metal": sets["metal"]}, num_train=2)
    with pytest.warns(
        UserWarning, match=r"alone, the training energies do not determine.*data\.sets\.alone\.references=FILE"
    ):
        undetermined.check_job(trainer, schnet_force_field(undetermined.statistics, cutoff=3.5, **sizes), "fit")


def test_a_file_in_two_sets_is_told(sets):
    twice = {"one": sets["metal"], "two": {**sets["metal"], "weight": 2}}
    with pytest.warns(
        UserWarning, match=r"metal\.xyz is in several sets \(data\.sets\.one\.train, data\.sets\.two\.train\)"
    ):
        MixtureDataModule(twice, **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        ({"metal": {"wieght": 2}}, {}, KeyError, ["data.sets.metal", "'wieght'", "Did you mean weight?"]),
        ({"metal": {"batch_size": 2}}, {}, KeyError, ["'batch_size'", "It is of the whole: data.batch_size"]),
        ({"metal": {"weight": 0}}, {}, ValueError, ["data.sets.metal.weight must be a positive number, found 0"]),
        ({"metal": {"weight": "2"}}, {}, ValueError, ["data.sets.metal.weight", "found '2'"]),
        ({"metal": {"train": []}}, {}, ValueError, ["data.sets.metal has no training frames"]),
        ({"metal": {"train": "nowhere.xyz"}}, {}, FileNotFoundError, ["data.sets.metal: no file of structures"]),
        ({"metal": {"split": {"vla": 1}}}, {}, KeyError, ["data.sets.metal: unknown sets ['vla'] in the split"]),
        ({"metal": {"keys": {"energy": "E"}}}, {}, KeyError, ["data.sets.metal: no frame of", "the energy key 'E'"]),
        ({"metal": {"weight": 1}}, {"temperature": 2}, ValueError, ["data.temperature=2 and weights of sets"]),
        ({"metal": {"weight": 1e-6}}, {}, ValueError, ["data.sets.metal: a share of 1e-06 of an epoch of 21 frames"]),
        ({}, {"temperature": 0}, ValueError, ["data.temperature must be a positive number, found 0"]),
        ({}, {"epoch_frames": 0}, ValueError, ["data.epoch_frames is a whole number, at least 1, found 0"]),
        ({}, {"evaluation": "all"}, ValueError, ["data.evaluation is 'joined' or 'separate', found 'all'"]),
        ({}, {"references": 3}, TypeError, ["data.references is own, common", "found 3"]),
        ({}, {"type_names": ["H", "C", "O"]}, ValueError, ["data.sets.metal", "Cu is not among the type names"]),
        ({}, {"train": "a.xyz"}, KeyError, ["data.train is of one set", "data.sets"]),
        ({}, {"chekc_units": False}, KeyError, ["data.chekc_units is no argument", "Did you mean check_units?"]),
        ({}, {"batch_size": None}, ValueError, ["exactly one of batch_size, max_atoms, max_edges"]),
    ],
)
def test_mistakes(sets, changes, options, error, words):
    with pytest.raises(error) as found:
        mixture(sets, changes, **options)
    for text in words:
        assert text in str(found.value)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({}, ValueError, "data.sets is empty"),
        (["a.xyz"], TypeError, "data.sets is a mapping"),
        ({"a": "a.xyz"}, TypeError, "data.sets.a is a mapping"),
        ({"a b": {"train": "a.xyz"}}, ValueError, "'a b' is no name of a set"),
    ],
)
def test_what_is_no_mapping_of_sets(wrong, error, words):
    with pytest.raises(error) as found:
        MixtureDataModule(wrong, **OPTIONS)
    assert words in str(found.value)
