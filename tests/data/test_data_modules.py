"""Samples, batches, splits, statistics, the embedded alloy, and the data modules on one and several ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.data import (
    AtomsDataModule,
    AtomsDataset,
    EmbeddedAlloyDataModule,
    Frame,
    collate,
    embedded_alloy_file,
    empty_batch,
    frame_to_sample,
    set_loaders,
    training_statistics,
)
from harness.data.embedded import alloy_frame
from harness.data.splitting import split_indices
from harness.models import ForceField

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CONF = Path(__file__).resolve().parents[2] / "conf"
FLOATING_FIELDS = ("pos", "cell", "edge_cell_shift", "forces", "stress")


def labelled_molecule(name: str, seed: int) -> Atoms:
    atoms = molecule(name)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = EMT()
    atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    return atoms


@pytest.fixture(scope="module")
def water_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "water.xyz"
    ase.io.write(path, [labelled_molecule("H2O", seed) for seed in range(20)], format="extxyz")
    return path


@pytest.fixture(scope="module")
def ethanol_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "ethanol.xyz"
    ase.io.write(path, [labelled_molecule("CH3CH2OH", seed) for seed in range(5)], format="extxyz")
    return path


@pytest.fixture(scope="module")
def alloy_cache(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    embedded_alloy_file(30, cache_dir=directory)
    return directory


def as_frame(atoms: Atoms, **labels) -> Frame:
    return Frame(atoms=atoms, origin="some.xyz", index=7, **labels)


# ---- samples and batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fields_of_a_sample(dtype):
    atoms = alloy_frame(0)
    energy = -9391.254099941396
    frame = as_frame(atoms, energy=energy, forces=atoms.get_forces(), stress=atoms.get_stress(voigt=False))
    sample = frame_to_sample(frame, ["Cu", "Pd", "Ag", "Au"], 4.0, frame_index=3, dtype=dtype)
    assert sample["total_energy"].dtype == torch.float64
    assert sample["total_energy"].item() == energy
    assert all(sample[name].dtype == dtype for name in FLOATING_FIELDS)
    assert sample["atomic_numbers"].tolist() == atoms.numbers.tolist()
    numbers = np.array([29, 46, 47, 79])
    assert numbers[sample["atom_types"].numpy()].tolist() == atoms.numbers.tolist()
    assert sample["frame_index"].tolist() == [3]
    assert sample.keys() == empty_batch().keys()
    torch.testing.assert_close(sample["stress"][0].double().numpy(), atoms.get_stress(voigt=False), rtol=1e-6, atol=0)


def test_missing_labels_are_nan_and_batches_have_all_fields():
    water, cell = molecule("H2O"), alloy_frame(1)
    samples = [
        frame_to_sample(as_frame(water, energy=-1.0), ["H", "O"], 4.0),
        frame_to_sample(as_frame(cell, forces=cell.get_forces()), ["Cu", "Pd", "Ag", "Au"], 4.0),
    ]
    batch = collate(samples)
    num_atoms = [3, len(cell)]
    assert batch["num_atoms"].tolist() == num_atoms
    assert batch["batch"].tolist() == [0] * 3 + [1] * num_atoms[1]
    assert batch["total_energy"].isnan().flatten().tolist() == [False, True]
    assert batch["stress"].isnan().all()
    assert batch["forces"][:3].isnan().all()
    assert not batch["forces"][3:].isnan().any()
    assert batch["pbc"].tolist() == [[False] * 3, [True] * 3]
    # every edge stays within its graph, and describes the same pair as before
    graph = batch["batch"][batch["edge_index"]]
    assert (graph[0] == graph[1]).all()
    num_edges = samples[0]["edge_index"].shape[1]
    assert torch.equal(batch["edge_index"][:, num_edges:], samples[1]["edge_index"] + 3)
    assert samples[1]["edge_index"].min() == 0


def test_batches_of_batches_and_the_empty_batch():
    samples = [frame_to_sample(as_frame(alloy_frame(index)), ["Cu", "Pd", "Ag", "Au"], 3.5) for index in range(3)]
    whole = collate(samples)
    for other in (
        collate([collate(samples[:2]), samples[2]]),
        collate([empty_batch(), *samples[:1], empty_batch(), *samples[1:]]),
    ):
        assert whole.keys() == other.keys()
        for name, value in whole.items():
            torch.testing.assert_close(value, other[name], equal_nan=True)
    nothing = collate([], dtype=torch.float64)
    assert nothing["pos"].dtype == torch.float64
    assert nothing["num_atoms"].shape == (0,)
    with pytest.raises(ValueError, match="same fields; sample 1"):
        collate([samples[0], {"pos": samples[0]["pos"]}])


def test_an_unknown_symbol_is_named_with_file_and_frame():
    with pytest.raises(ValueError, match=r"some.xyz, frame 7: O is not among the type names \['H', 'C'\]"):
        frame_to_sample(as_frame(molecule("H2O")), ["H", "C"], 4.0)


def test_samples_are_kept_only_if_asked():
    frames = [as_frame(molecule("H2O"), energy=0.0)]
    kept, made_anew = (AtomsDataset(frames, ["H", "O"], 4.0, cache_neighbors=cache) for cache in (True, False))
    assert kept[0] is kept[0]
    assert made_anew[0] is not made_anew[0]
    torch.testing.assert_close(dict(kept[0]), dict(made_anew[0]), equal_nan=True)


# ---- splits


def test_splits_are_disjoint_seeded_and_nested():
    whole = split_indices(100, {"val": 0.1, "test": 20}, seed=1)
    assert {name: len(indices) for name, indices in whole.items()} == {"val": 10, "test": 20, "train": 70}
    assert sorted(np.concatenate(list(whole.values()))) == list(range(100))
    again, other = (split_indices(100, {"val": 0.1, "test": 20}, seed=seed) for seed in (1, 2))
    assert all((whole[name] == again[name]).all() for name in whole)
    assert set(whole["val"]) != set(other["val"])
    small, smaller = (split_indices(100, {"val": 0.1, "test": 20}, 1, num_train) for num_train in (30, 10))
    assert set(smaller["train"]) < set(small["train"]) < set(whole["train"])
    assert set(small["val"]) == set(whole["val"])


@pytest.mark.parametrize(
    ("parts", "num_train", "error", "message"),
    [
        ({"val": 6, "test": 0.4}, None, ValueError, r"of 10 frames takes \{'val': 6, 'test': 4\} and leaves 0"),
        ({"val": 2}, 9, ValueError, "num_train=9 asked for, but 8 of 10 frames are left"),
        ({"val": -1}, None, ValueError, "must not be negative, found -1"),
        ({"val": 1.0}, None, ValueError, r"must be in \[0, 1\), found 1.0 for 'val'"),
        ({"val": 0.01}, None, ValueError, "0.01 of 10 frames, has no frame"),
        ({"val": "0.1"}, None, TypeError, "a number of frames or a fraction, found '0.1'"),
    ],
)
def test_splits_that_cannot_be(parts, num_train, error, message):
    with pytest.raises(error, match=message):
        split_indices(10, parts, 0, num_train)


# ---- statistics


def test_statistics_of_a_training_set():
    true_shifts = np.array([-13.6, -1027.0, -2037.5])
    generator = np.random.default_rng(0)
    frames, forces = [], []
    for name in ("H2O", "CH4", "CO2", "CH3CH2OH", "H2CO"):
        atoms = molecule(name)
        counts = np.array([(atoms.numbers == number).sum() for number in (1, 6, 8)])
        forces.append(generator.normal(size=(len(atoms), 3)))
        forces[-1][0, 0] = np.nan
        frames.append(as_frame(atoms, energy=float(counts @ true_shifts), forces=forces[-1]))
    frames.append(as_frame(molecule("H2O"), forces=np.full((3, 3), 2.0)))
    forces.append(np.full((3, 3), 2.0))
    statistics = training_statistics(AtomsDataset(frames, ["H", "C", "O"], 20.0))
    np.testing.assert_allclose(statistics.energy_shifts.numpy(), true_shifts, rtol=1e-10)
    assert statistics.energy_shifts.dtype == torch.float64
    assert statistics.force_rms == pytest.approx(np.sqrt(np.nanmean(np.concatenate(forces) ** 2)))
    sizes = np.array([len(frame.atoms) for frame in frames])
    assert statistics.mean_neighbors == pytest.approx((sizes * (sizes - 1)).sum() / sizes.sum())
    assert (statistics.num_frames, statistics.num_atoms) == (6, sizes.sum())


def test_statistics_where_data_leave_them_open():
    same = [as_frame(molecule("H2O"), energy=-30.0) for _ in range(3)]
    statistics = training_statistics(AtomsDataset(same, ["H", "O", "Au"], 4.0))
    np.testing.assert_allclose(statistics.energy_shifts.numpy(), [-10.0, -10.0, -10.0], atol=1e-12)  # the mean
    assert statistics.undetermined.shape == (3, 2)
    assert np.isnan(statistics.force_rms)
    without = training_statistics(AtomsDataset([as_frame(molecule("H2O"), forces=np.ones((3, 3)))], ["H", "O"], 4.0))
    assert without.energy_shifts.tolist() == [0.0, 0.0]
    assert without.force_rms == 1.0


# ---- the embedded alloy


def test_the_alloy_is_reproducible_and_reasonable(alloy_cache, tmp_path):
    path = embedded_alloy_file(30, cache_dir=alloy_cache)
    before = path.stat().st_mtime_ns
    assert embedded_alloy_file(30, cache_dir=alloy_cache) == path
    assert path.stat().st_mtime_ns == before
    again = embedded_alloy_file(30, cache_dir=tmp_path)
    assert again.read_bytes() == path.read_bytes()
    other = embedded_alloy_file(3, seed=1, cache_dir=tmp_path)
    assert not path.read_bytes().startswith(other.read_bytes())

    frames = ase.io.read(path, ":")
    assert len({len(atoms) for atoms in frames}) > 2
    assert set().union(*(atoms.get_chemical_symbols() for atoms in frames)) == {"Cu", "Pd", "Ag", "Au"}
    forces = np.concatenate([atoms.get_forces() for atoms in frames])
    assert 0.5 < np.sqrt((forces**2).mean()) < 2.0
    assert all(atoms.pbc.all() and np.isfinite(atoms.get_stress()).all() for atoms in frames)
    with pytest.raises(ValueError, match="num_frames >= 1"):
        embedded_alloy_file(0, cache_dir=tmp_path)


def _make_alloy(directory: str, barrier, answers) -> None:
    barrier.wait()
    path = embedded_alloy_file(20, cache_dir=directory)
    answers.put((path.read_bytes(), path.stat().st_mtime_ns))


def test_the_alloy_is_made_once_by_processes_that_start_together(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_make_alloy, args=(str(tmp_path), barrier, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len(found) == 1
    assert [path.suffix for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [".xyz"]


def test_the_cache_directory_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    assert embedded_alloy_file(2).parent == tmp_path / "cache"


# ---- data modules


def test_embedded_module(alloy_cache):
    module = EmbeddedAlloyDataModule(num_frames=30, cache_dir=alloy_cache, cutoff=4.0, batch_size=8, dtype="float64")
    module.setup()
    train_set, statistics = module.train_set, module.statistics
    module.setup("fit")
    assert module.train_set is train_set
    assert module.type_names == ["Cu", "Pd", "Ag", "Au"]
    assert (len(module.train_set), *map(len, module.val_sets), *map(len, module.test_sets)) == (24, 3, 3)
    assert statistics.num_frames == 24
    batches = list(module.train_dataloader())
    assert len(batches) == 3
    assert sorted(torch.cat([batch["frame_index"] for batch in batches]).tolist()) == list(range(24))
    assert batches[0]["pos"].dtype == torch.float64
    summary = module.describe()
    for part in ("24 train, 3 val, 3 test", "Cu, Pd, Ag, Au", "stress 24", "eV/Å"):
        assert part in summary
    with pytest.raises(TypeError, match=r"own files and keys, found \['train'\]"):
        EmbeddedAlloyDataModule(cutoff=4.0, batch_size=8, cache_dir=alloy_cache, train="x.xyz")


def test_files_splits_and_types(water_file, ethanol_file):
    module = AtomsDataModule(
        [water_file, ethanol_file], val=[water_file, ethanol_file], split={"test": 5}, cutoff=4.0, batch_size=4
    )
    module.setup()
    assert module.type_names == ["H", "C", "O"]
    assert len(module.train_set) == 20
    assert [len(dataset) for dataset in module.val_sets] == [20, 5]
    assert [len(dataset) for dataset in module.test_sets] == [5]
    assert [len(loader) for loader in module.val_dataloader()] == [5, 2]

    trained_on = {frame.location for frame in module.train_set.frames}
    tested_on = {frame.location for frame in module.test_sets[0].frames}
    assert not trained_on & tested_on
    assert len(trained_on | tested_on) == 25

    ordered = AtomsDataModule(
        str(water_file), type_names=["O", "H"], split={"val": 0.5}, num_train=3, cutoff=4.0, batch_size=4
    )
    ordered.setup()
    assert ordered.type_names == ["O", "H"]
    assert ordered.statistics.type_names == ("O", "H")
    assert ordered.train_set[0]["atom_types"].tolist() == [0, 1, 1]
    assert (len(ordered.train_set), len(ordered.val_sets[0]), ordered.test_sets) == (3, 10, [])
    assert ordered.test_dataloader() == []


def test_the_split_can_be_kept_while_the_order_changes(water_file):
    def tested_on(**seeds) -> list[str]:
        module = AtomsDataModule(water_file, split={"test": 8}, cutoff=4.0, batch_size=4, **seeds)
        module.setup()
        return [frame.location for frame in module.test_sets[0].frames]

    assert tested_on(seed=0) != tested_on(seed=1)
    assert tested_on(seed=0) == tested_on(seed=1, split_seed=0)


def test_a_file_for_a_set_overrides_its_split(water_file, ethanol_file):
    module = AtomsDataModule(water_file, val=ethanol_file, split={"val": 0.5, "test": 0.1}, cutoff=4.0, batch_size=4)
    module.setup()
    assert [len(part) for part in (module.train_set, *module.val_sets, *module.test_sets)] == [18, 5, 2]


def test_more_ranks_than_frames_in_a_batch(water_file, monkeypatch):
    monkeypatch.setattr(set_loaders, "data_parallel_ranks", lambda trainer: (0, 8))
    module = AtomsDataModule(water_file, cutoff=4.0, batch_size=6)
    with pytest.raises(ValueError, match="batches of 5 samples for 8 ranks"):
        module.train_dataloader()


def test_workers_give_the_same_batches(water_file):
    here, in_workers = (
        list(AtomsDataModule(water_file, cutoff=4.0, batch_size=6, num_workers=workers).train_dataloader())
        for workers in (0, 2)
    )
    for one, other in zip(here, in_workers, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_errors_of_the_module(water_file, ethanol_file, tmp_path):
    def module(**options) -> AtomsDataModule:
        return AtomsDataModule(**{"train": water_file, "cutoff": 4.0, "batch_size": 4, **options})

    with pytest.raises(ValueError, match=r"ethanol.xyz, frame 0: C is not among the type names \['H', 'O'\]"):
        module(val=ethanol_file, type_names=["H", "O"]).setup()
    with pytest.raises(FileNotFoundError, match=r"missing.xyz"):
        module(test=tmp_path / "missing.xyz").setup()
    with pytest.raises(ValueError, match="leaves 0 for training"):
        module(split={"val": 20}).setup()
    with pytest.raises(KeyError, match=r"unknown sets \['valid'\]"):
        module(split={"valid": 0.1})
    with pytest.raises(KeyError, match=r"unknown labels \['force'\]"):
        module(keys={"force": "forces"})
    with pytest.raises(ValueError, match="dtype must be one of"):
        module(dtype="float16")
    with pytest.raises(ValueError, match=r"chemical symbols such as .* found \['H', 'Water'\]"):
        module(type_names=["H", "Water"])
    with pytest.raises(ValueError, match=r"\['H'\] is repeated"):
        module(type_names=["H", "O", "H"])
    with pytest.raises(ValueError, match="batch_size is a whole number, at least 1, found 0"):
        module(batch_size=0)
    with pytest.raises(ValueError, match="cutoff must be a positive"):
        module(cutoff=0)
    with pytest.raises(TypeError, match="path of a file or a list of paths"):
        module(val=3)
    with pytest.raises(ValueError, match="at least one file"):
        module(train=[])


def test_configs_build_data_and_model(alloy_cache, water_file):
    def config(name: str, **changes):
        loaded = OmegaConf.load(CONF / name)
        return OmegaConf.merge({"cutoff": 4.5, "seed": 3, "part": loaded}, {"part": changes}).part

    embedded = instantiate(config("data/embedded.yaml", num_frames=30, cache_dir=str(alloy_cache)))
    assert (embedded.cutoff, embedded.seed) == (4.5, 3)
    embedded.setup()
    model = instantiate(config("model/schnet.yaml"), statistics=embedded.statistics)
    assert isinstance(model, ForceField)
    outputs = model(next(iter(embedded.train_dataloader())))
    assert all(torch.isfinite(value).all() for value in outputs.values())

    from_file = instantiate(config("data/file.yaml", train=[str(water_file)], val=str(water_file)))
    from_file.setup()
    assert [len(part) for part in (from_file.train_set, *from_file.val_sets, *from_file.test_sets)] == [18, 20, 2]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not beside the checkout")
def test_data_sets_at_hand():
    acac = AtomsDataModule(
        SHARED / "acac" / "train_300K.xyz",
        test=SHARED / "acac" / "test_MD_300K.xyz",
        split={"val": 50},
        cutoff=4.0,
        batch_size=10,
    )
    acac.setup()
    assert [len(part) for part in (acac.train_set, *acac.val_sets, *acac.test_sets)] == [450, 50, 650]
    batch = next(iter(acac.train_dataloader()))
    assert (batch["total_energy"] < -9000).all()
    assert batch["stress"].isnan().all()

    carbon = AtomsDataModule(
        SHARED / "carbon" / "carbon_100.xyz", keys={"forces": "force"}, cutoff=4.0, batch_size=10, split={"val": 10}
    )
    carbon.setup()
    assert not next(iter(carbon.train_dataloader()))["stress"].isnan().any()
