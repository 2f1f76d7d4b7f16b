"""Stores of frames: the same numbers as from files, on any number of ranks, and what can happen to files on disk."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io.extxyz import write_extxyz
from filelock import FileLock
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from support.commands import wait_for
from support.configs import composed
from support.spawning import spawn

import harness.data.store.sources as sources
from harness.config.explain import explain
from harness.data import AtomsDataModule, Frame, StoreDataModule, StoredFrames, build_store
from harness.data.evaluation import read_evaluated
from harness.data.extras import Extras
from harness.data.frames import FrameList, JoinedFrames
from harness.data.reading import LabelKeys, information
from harness.data.store import BuildSettings, is_store
from harness.data.store.cache import _key as cache_key
from harness.data.store.cache import cached_store, tell_of_rank
from harness.data.store.changes import changed_text
from harness.data.store.information import body_of, encode_information, with_information, with_labels
from harness.data.weights import WEIGHTS
from harness.data_command import main
from harness.evaluate.predictions import with_predictions

LABELS = {"dipole": {"key": "dipole", "level": "graph", "shape": [3], "unit": "e·Å"}}
OPTIONS: dict[str, Any] = {
    "cutoff": 3.5,
    "batch_size": 4,
    "dtype": "float64",
    "seed": 3,
    "split": {"val": 3, "test": 2},
}
SETTINGS = BuildSettings(extras=Extras.from_config(LABELS), check_units=False)


def structures(number: int, seed: int = 0) -> list[Atoms]:
    """Molecules, crystals and a slab, with all labels, some or gaps in them; weights, groups and isolated atoms."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(number):
        atoms = [molecule("H2O"), molecule("CH3OH"), bulk("Cu", cubic=True), bulk("Ag", cubic=True) * (2, 1, 1)][
            index % 4
        ]
        atoms.rattle(0.05, rng=generator)
        labels: dict[str, Any] = {"energy": float(generator.normal()) - 10.0 * len(atoms)}
        if index % 5:
            labels["forces"] = generator.normal(size=(len(atoms), 3))
        if index % 7 == 2:
            labels["forces"][0] = np.nan
        if atoms.pbc.all() and index % 3:
            labels["stress"] = generator.normal(size=6) * 0.01
        if index % 8 == 3:
            atoms.pbc = [True, True, False]
        if index % 2:
            atoms.info["dipole"] = generator.normal(size=3)
        atoms.info["config_type"] = ["bulk", "liquid", "Vacancy"][index % 3]
        if index % 4 == 1:
            atoms.info["config_weight"] = 0.5 + index
        atoms.calc = SinglePointCalculator(atoms, **labels)
        found.append(atoms)
    for symbol, energy in (("H", -13.6), ("Cu", -3.0)):
        atom = Atoms(symbol, info={"config_type": "IsolatedAtom"})
        atom.calc = SinglePointCalculator(atom, energy=energy)
        found.append(atom)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of frames and stores of them."""
    made = tmp_path_factory.mktemp("store")
    ase.io.write(made / "train.xyz", structures(30))
    ase.io.write(made / "more.xyz", structures(9, seed=1))
    for name in ("train", "more"):
        build_store(made / f"{name}.store", [made / f"{name}.xyz"], SETTINGS)
    return made


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in many parts."""
    monkeypatch.setattr(sources, "_FEWEST_BYTES", 4000)


def from_files(folder: Path, **options: Any) -> AtomsDataModule:
    given = {"train": [folder / "train.xyz", folder / "more.xyz"], "labels": LABELS, "check_units": False}
    return AtomsDataModule(**{**given, **OPTIONS, **options})


def from_stores(folder: Path, **options: Any) -> StoreDataModule:
    return StoreDataModule(**{"train": [folder / "train.store", folder / "more.store"], **OPTIONS, **options})


def assert_equal_batches(one: Any, other: Any) -> None:
    batches, others = list(one), list(other)
    assert len(batches) == len(others) > 0
    for batch, expected in zip(batches, others, strict=True):
        assert batch.keys() == expected.keys()
        for name in batch:
            torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0, equal_nan=True)


LIMITS = [{}, {"batch_size": None, "max_atoms": 40}, {"balance": "edges"}, {"num_train": 11, "split_seed": 8}]


@pytest.mark.filterwarnings("ignore:.*frames")
@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_batches_statistics_and_words_are_those_of_files(folder: Path, options: dict[str, Any]) -> None:
    file, store = from_files(folder, **options), from_stores(folder, **options)
    assert_equal_batches(store.train_dataloader(), file.train_dataloader())
    for loader, expected in zip(
        [*store.val_dataloader(), *store.test_dataloader()],
        [*file.val_dataloader(), *file.test_dataloader()],
        strict=True,
    ):
        assert_equal_batches(loader, expected)
    assert store.statistics.isolated_atoms == file.statistics.isolated_atoms == {"H": -13.6, "Cu": -3.0}
    np.testing.assert_allclose(store.statistics.energy_shifts, file.statistics.energy_shifts, rtol=1e-12)
    for name in ("force_rms", "mean_neighbors", "num_atoms", "num_frames"):
        assert getattr(store.statistics, name) == pytest.approx(getattr(file.statistics, name), rel=1e-12)
    assert store.describe() == file.describe()
    assert (store.group_names, store.type_names) == (file.group_names, file.type_names)
    for name in ("train", "val0", "test0"):
        assert store.missing_labels(name) == file.missing_labels(name)
        assert store.labelled_types(name) == file.labelled_types(name)
        assert store.missing_hint(name, "stress") == file.missing_hint(name, "stress")
    assert store.sets.train.location(5) == file.sets.train.location(5)


def test_a_frame_comes_back_as_it_was(folder: Path) -> None:
    read = from_files(folder)
    read.setup()
    stored = StoredFrames(folder / "train.store")
    assert len(stored) == 32
    for index, frame in enumerate(SETTINGS.extras.read(_frames(folder / "train.xyz"))):
        again, arrays = stored[index], stored.arrays(index)
        for name in ("energy", "origin", "index", "stress_left_out", "weights", "group", "location"):
            assert getattr(again, name) == getattr(frame, name), name
        for name in ("forces", "stress"):
            _assert_same(getattr(again, name), getattr(frame, name))
            _assert_same(getattr(arrays, name), getattr(frame, name))
        assert again.extras.keys() == frame.extras.keys()
        for name in frame.extras:
            _assert_same(again.extras[name], frame.extras[name])
        assert again.atoms.numbers.tolist() == frame.atoms.numbers.tolist()
        _assert_same(again.atoms.positions, frame.atoms.positions)
        _assert_same(again.atoms.cell.array, frame.atoms.cell.array)
        assert again.atoms.pbc.tolist() == frame.atoms.pbc.tolist()
        assert stored.location(index) == frame.location
    with pytest.raises(IndexError, match="of a set of 32"):
        stored[32]
    assert stored[-1].energy == -3.0


def _frames(path: Path) -> list[Any]:
    from harness.data import read_frames

    return read_frames(path)


def _assert_same(found: Any, expected: Any) -> None:
    if expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, expected)


def test_facts_are_those_of_frames_in_memory(folder: Path) -> None:
    memory = FrameList(SETTINGS.extras.read(_frames(folder / "train.xyz")))
    stored = StoredFrames(folder / "train.store")
    chosen = np.array([30, 3, 4, 17, 3])
    pairs = [(stored, memory), (stored.subset(chosen), memory.subset(chosen))]
    pairs.append((JoinedFrames([stored, stored.subset(chosen)]), JoinedFrames([memory, memory.subset(chosen)])))
    for one, other in pairs:
        assert len(one) == len(other)
        for name in ("num_atoms", "energy", "force_squares", "structure", "species", "isolated", "weight", "index"):
            np.testing.assert_array_equal(one.column(name), other.column(name))
        assert one.label_counts() == other.label_counts()
        assert one.incomplete_counts() == other.incomplete_counts()
        groups = [[each.group_names()[code] for code in each.column("group")] for each in (one, other)]
        assert groups[0] == groups[1] == [frame.group for frame in other]
        names = sorted(one.symbols())
        np.testing.assert_array_equal(one.energy_rows(names)[0], other.energy_rows(names)[0])
        assert one.available() == other.available()
    assert stored.num_edges(3.5) is None


def test_numbers_of_edges_are_kept_for_a_cutoff(folder: Path, tmp_path: Path) -> None:
    stored = build_store(tmp_path / "a.store", [folder / "more.xyz"], BuildSettings(cutoffs=(3.0,), check_units=False))
    data = AtomsDataModule(folder / "more.xyz", cutoff=3.0, batch_size=2, check_units=False, isolated_atoms="frames")
    data.setup()
    edges = stored.num_edges(3.0)
    assert edges is not None
    assert edges.tolist() == data.train_set.num_edges().tolist()
    assert stored.num_edges(3.1) is None


def _rank(rank: int, world_size: int, folder: Path, cache: Path) -> list[list[int]]:
    file, store = from_files(folder), from_stores(folder)
    made = from_files(folder, store_above=0, cache_dir=cache)  # by one rank, for which the other one waits
    for data in (store, made):
        loaders = [(data.train_dataloader(), file.train_dataloader())]
        loaders += zip(data.val_dataloader(), file.val_dataloader(), strict=True)
        for one, other in loaders:
            assert_equal_batches(one, other)
    return [batch["frame_index"].tolist() for batch in store.train_dataloader()]


def test_two_ranks_share_the_batches_of_one(folder: Path, tmp_path: Path) -> None:
    ranks = spawn(2, _rank, folder, tmp_path)
    alone = [batch["frame_index"].tolist() for batch in from_stores(folder).train_dataloader()]
    assert [sorted(one + other) for one, other in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]
    assert len(list((tmp_path / "stores").glob("*.store"))) == 2
    assert not list((tmp_path / "stores").glob("*.building"))


@pytest.mark.filterwarnings("ignore")
def test_workers_read_the_same(folder: Path) -> None:
    alone = from_stores(folder)
    assert_equal_batches(from_stores(folder, num_workers=2).train_dataloader(), alone.train_dataloader())


def test_stores_go_to_processes_without_their_content(folder: Path) -> None:
    stored = StoredFrames(folder / "train.store")
    stored.column("energy"), stored[3]
    text = pickle.dumps(stored.subset([3, 4]))
    assert len(text) < 20_000
    assert pickle.loads(text)[0].energy == stored[3].energy


# --- builds ---


def test_a_file_of_some_megabytes_is_built_in_parts(folder: Path, tmp_path: Path) -> None:
    text = (folder / "more.xyz").read_text()
    times = 5 * 2**20 // len(text) + 1
    (tmp_path / "large.xyz").write_text(text * times)
    (unit,), *others = (units := sources.units_of([sources.Source.of(tmp_path / "large.xyz")]))
    assert len(units) == 3
    assert (unit.start, unit.first) == (0, 0)
    pieces = [piece for each in units for piece in each]
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert pieces[-1].stop == len(text.encode()) * times
    assert pieces[-1].first < 11 * times
    assert len(sources.units_of([sources.Source.of(folder / "more.xyz")])) == 1
    assert others


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", ["xyz", "traj"])
@pytest.mark.parametrize("workers", [1, 2])
def test_parts_of_files_make_the_same_store(folder: Path, tmp_path: Path, suffix: str, workers: int) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README").write_text("nothing that ASE reads\n")
    for name in ("train", "more"):
        ase.io.write(tmp_path / "in" / f"{name}.{suffix}", ase.io.read(folder / f"{name}.xyz", ":"))
    calls: list[tuple[int, int, int]] = []
    stored = build_store(
        tmp_path / "all.store",
        [tmp_path / "in"],
        SETTINGS,
        num_workers=workers,
        progress=lambda *now: calls.append(now),
    )
    assert calls[-1] == (calls[-1][1], calls[-1][1], 43)
    assert len(stored.manifest["parts"]) > 3
    assert not list(tmp_path.glob("*.building*"))
    expected = JoinedFrames([StoredFrames(folder / "more.store"), StoredFrames(folder / "train.store")])
    for name in ("energy", "structure", "index", "force_squares", "state_forces", "state_dipole", "weight"):
        np.testing.assert_array_equal(stored.column(name), expected.column(name))
    assert [frame.group for frame in stored] == [frame.group for frame in expected]
    assert stored.origin_names() == [str(tmp_path / "in" / f"{name}.{suffix}") for name in ("more", "train")]


BUILD = """
import os, signal, sys
import harness.data.store.sources as sources
from harness.data.store import BuildSettings, build_store
sources._FEWEST_BYTES = 4000
def progress(done, total, frames):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
build_store(sys.argv[1], sys.argv[2:], BuildSettings(check_units=False), num_workers=2, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_a_build_that_is_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    target, files = tmp_path / "a.store", [str(folder / "train.xyz"), str(folder / "more.xyz")]
    killed = subprocess.run([sys.executable, "-c", BUILD, str(target), *files], timeout=200)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(FileNotFoundError, match=r"is not finished.*it goes on"):
        StoredFrames(target)
    finished = [each for each in (tmp_path / "a.store.building" / "parts").iterdir() if each.name.isdigit()]
    assert len(finished) >= 3
    with pytest.raises(ValueError, match=r"unfinished build of other settings.*--restart"):
        build_store(target, files, BuildSettings(check_units=False, min_distance=0.2))
    done: list[int] = []
    settings = BuildSettings(check_units=False, min_distance=0.05)  # the parts have passed a stricter check
    store = build_store(target, files, settings, progress=lambda now, *_: done.append(now))
    assert done[0] == len(finished)
    whole = build_store(tmp_path / "b.store", files, BuildSettings(check_units=False))
    assert (store.digest, len(store)) == (whole.digest, len(whole))
    assert list(store.damages()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_is_one_message_and_loses_nothing(folder: Path, small_disk: Path) -> None:
    other = small_disk / "other"
    other.write_bytes(bytes(1_600_000))
    with pytest.raises(OSError, match=r"no space is left for .*a\.store\.building.*Nothing is lost.*goes on"):
        build_store(small_disk / "a.store", [folder / "train.xyz"], SETTINGS)
    assert not (small_disk / "a.store").exists()
    other.unlink()
    done: list[int] = []
    store = build_store(
        small_disk / "a.store", [folder / "train.xyz"], SETTINGS, progress=lambda now, *_: done.append(now)
    )
    assert done[0] > 0
    assert len(store) == 32
    assert list(store.damages()) == []


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("wrong", "words", "early"),
    [
        (BuildSettings(LabelKeys(energy="dft_energy"), check_units=False), "no label under the keys", False),
        (BuildSettings(LabelKeys(stress="dft_stress"), check_units=False), "no frame of .* the stress key", True),
        (BuildSettings(extras=Extras.from_config({"dipole": "mu"}), check_units=False), "no frame of .*'mu'", True),
        (BuildSettings(min_distance=1.5, check_units=False), "closer than", False),
        (BuildSettings(extras=Extras.from_config(weights={"config_type": {"none": 2}})), "no frame has", False),
    ],
    ids=["no label", "no key", "no further label", "no part", "no value"],
)
def test_the_corrected_command_follows_one_that_was_refused(
    wrong: BuildSettings, words: str, early: bool, folder: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    with pytest.raises((ValueError, KeyError), match=words):
        build_store(tmp_path / "a.store", [folder / "more.xyz"], replace(wrong, check_units=False), tell=told.append)
    assert list(tmp_path.iterdir()) == []
    found = [re.match(rf"warning, after 1 of \d+ parts: .*{words}.* refused if this remains so", text) for text in told]
    assert len(found) == early
    assert all(found)
    assert len(build_store(tmp_path / "a.store", [folder / "more.xyz"], SETTINGS, tell=told.append)) == 11
    assert len(told) == early


@pytest.mark.usefixtures("small_parts")
def test_parts_outlast_a_refusal_that_looser_checks_lift(folder: Path, tmp_path: Path) -> None:
    frames = structures(12)
    frames.append(Atoms("HH", positions=[[0, 0, 0], [0, 0, 0.05]]))
    frames[-1].calc = SinglePointCalculator(frames[-1], energy=1.0)
    ase.io.write(tmp_path / "in.xyz", frames)
    with pytest.raises(ValueError, match=r"closer than data\.min_distance"):
        build_store(tmp_path / "a.store", [tmp_path / "in.xyz"], SETTINGS)
    assert (tmp_path / "a.store.building.lock").exists()
    done: list[int] = []
    looser = replace(SETTINGS, min_distance=0.01)
    build_store(tmp_path / "a.store", [tmp_path / "in.xyz"], looser, progress=lambda now, *_: done.append(now))
    assert done[0] > 0
    assert not list(tmp_path.glob("*.building*"))


@pytest.mark.usefixtures("small_parts")
def test_a_file_that_changes_under_its_build_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.xyz"
    file.write_bytes((folder / "train.xyz").read_bytes())

    def change(done: int, total: int, frames: int) -> None:
        if done == 2:
            with file.open("a") as opened:
                opened.write("1\n")

    with pytest.raises(ValueError, match=r"train\.xyz has changed while the store was being built"):
        build_store(tmp_path / "a.store", [file], SETTINGS, progress=change)
    assert not (tmp_path / "a.store").exists()
    with pytest.raises(ValueError, match="unfinished build of other sources"):
        build_store(tmp_path / "a.store", [folder / "train.xyz"], SETTINGS)
    assert len(build_store(tmp_path / "a.store", [folder / "train.xyz"], SETTINGS, restart=True)) == 32


# --- what can happen to a finished store ---


def flip(path: Path, place: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def cut(path: Path, _: int) -> None:
    """Leave the end out."""
    path.write_bytes(path.read_bytes()[:-1])


def other_version(path: Path, _: int) -> None:
    """Pretend to be of another version."""
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 77}))


def remove(path: Path, _: int) -> None:
    """Remove the file."""
    path.unlink()


def read_like(path: Path, when: str) -> None:
    """Open a store, and read what is damaged."""
    store = StoredFrames(path)
    if when == "energy":
        store.column("energy")
    elif when == "symbols":
        store.symbols()
    elif when == "read":
        list(store)
    elif when == "text":
        for index in range(len(store)):
            store.information(index)


DAMAGES: dict[str, tuple[str, Callable[[Path, int], None], int, str, str]] = {
    "a record": ("records/00000.npy", flip, -100, "read", r"records/00000\.npy: frame 31 of the store is damaged"),
    "the offsets": ("columns/offset.npy", flip, 140, "read", r"frame 0 of the store is damaged"),
    "a column": ("columns/energy.npy", flip, -9, "energy", r"columns/energy\.npy is damaged"),
    "elements": ("columns/composition_counts.npy", flip, -2, "symbols", r"composition_counts\.npy is damaged"),
    "a cut file of records": ("records/00000.npy", cut, 0, "open", r"00000\.npy has \d+ bytes, expected \d+"),
    "a cut column": ("columns/species.npy", cut, 0, "open", r"species\.npy has \d+ bytes, expected"),
    "a missing file": ("columns/group.npy", remove, 0, "open", r"group\.npy is missing.*not copied completely"),
    "a manifest": ("manifest.json", flip, 300, "open", r"manifest\.json is damaged"),
    "a missing manifest": ("manifest.json", remove, 0, "open", r"is no store: expected a folder that `harness-data"),
    "another version": ("manifest.json", other_version, 0, "open", r"version 77, this package reads version 2"),
    "text of a frame": ("information/00000.npy", flip, -9, "text", r"information/00000\.npy: .* is damaged"),
    "a cut file of text": ("information/00000.npy", cut, 0, "open", r"00000\.npy has \d+ bytes, expected \d+"),
    "places of text": ("columns/information.npy", flip, -9, "text", r"columns/information\.npy is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_message(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, change, place, when, words = DAMAGES[name]
    subprocess.run(["cp", "-r", folder / "train.store", tmp_path / "a.store"], check=True)
    change(tmp_path / "a.store" / file, place)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_like(tmp_path / "a.store", when)
    with pytest.raises(SystemExit, match="1"):
        main(["info", str(tmp_path / "a.store"), "--verify"])
    found = capsys.readouterr().err
    assert len(re.findall("error: ", found)) == 1
    assert "harness-data build" in found


def test_a_changed_source_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.xyz"
    file.write_bytes((folder / "more.xyz").read_bytes())
    store = build_store(tmp_path / "a.store", [file], SETTINGS)
    assert changed_text(store) == ""
    os.utime(file, ns=(1, 1))  # copied, say: the content is the same
    assert changed_text(store) == ""
    flip(file, -5)
    assert "a.xyz has another content" in changed_text(store)
    with file.open("a") as opened:
        opened.write("\n")
    data = StoreDataModule(tmp_path / "a.store", cutoff=3.0, batch_size=2)
    with pytest.warns(UserWarning, match=r"was built of other data.*bytes instead of.*build it anew"):
        data.setup()
    assert len(data.train_set) == 9
    main(["info", str(tmp_path / "a.store")])
    assert "changed " in capsys.readouterr().out
    file.unlink()
    assert changed_text(store) == ""


# --- files that become stores by themselves ---


@pytest.mark.filterwarnings("ignore:.*frames")
def test_large_files_become_stores_by_themselves(folder: Path, tmp_path: Path) -> None:
    options = {"cache_dir": tmp_path / "cache", "balance": "edges"}
    stored = from_files(folder, store_above="1 KiB", **options)
    assert_equal_batches(stored.train_dataloader(), from_files(folder, **options).train_dataloader())
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "stores").glob("*.store")}
    assert len(made) == 2
    assert all(map(is_store, made))
    parts = [part for joined in [stored.sets.train.frames] for part in joined.parts]  # type: ignore[attr-defined]
    assert all(isinstance(getattr(part, "frames", part), StoredFrames) for part in parts)
    assert stored.fingerprint() == from_files(folder, **options).fingerprint()
    again = from_files(folder, store_above="1 KiB", **options)
    again.setup()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "stores").glob("*.store")} == made
    other = from_files(folder, store_above="1 KiB", min_distance=0.2, **options)
    other.setup()
    assert len(list((tmp_path / "cache" / "stores").glob("*.store"))) == 4


@pytest.mark.filterwarnings("ignore:.*frames")
def test_other_labels_weights_or_groups_make_another_store(folder: Path, tmp_path: Path) -> None:
    """A store has what its settings have read, and is no use to a training that asks for more."""
    every = [
        {},
        {"labels": LABELS},
        {"labels": {"moment": {**LABELS["dipole"], "key": "dipole"}}},
        {"weights": {"config_type": {"bulk": 3}}},
        {"weights": {"config_type": {"bulk": 4}}},
        {"group_key": None},
        {"weight_keys": {"weight": None}},
        {"inputs": ["total_charge"]},
    ]
    asked = [BuildSettings(extras=Extras.from_config(**options), check_units=False) for options in every]
    asked.append(BuildSettings(LabelKeys(stress="virial_stress"), asked[0].extras, check_units=False))
    paths = set()
    for settings in asked[:-1]:
        store = cached_store(folder / "more.xyz", settings, tmp_path, lambda _: None)
        assert store.manifest["settings"] == json.loads(json.dumps(settings.plain()))
        paths.add(store.path)
    assert len(paths) == len(every)
    with pytest.raises(KeyError, match="virial_stress"):  # and so do other names of labels
        cached_store(folder / "more.xyz", asked[-1], tmp_path, lambda _: None)


def test_the_name_of_a_store_in_the_cache_depends_on_each_part_of_its_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content and settings of equal size and time too: a store of others would be taken silently."""
    file = tmp_path / "a.xyz"
    file.write_bytes((folder / "more.xyz").read_bytes())
    os.utime(file, ns=(10**18, 10**18))
    first = cache_key(file, SETTINGS)
    assert cache_key(file, replace(SETTINGS)) == first
    keys = {first}

    def expect_another(key: str) -> None:
        assert key not in keys
        keys.add(key)

    for changes in (
        {"cutoffs": (4.0,)},
        {"check_units": True},
        {"min_distance": 0.2},
        {"keys": LabelKeys(forces="f")},
        {"extras": Extras()},
    ):
        expect_another(cache_key(file, replace(SETTINGS, **changes)))
    other = tmp_path / "b.xyz"
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(10**18, 10**18))
    expect_another(cache_key(other, SETTINGS))  # its name
    os.utime(file, ns=(10**18, 10**18 + 1))
    expect_another(cache_key(file, SETTINGS))
    flip(file, 100)
    os.utime(file, ns=(10**18, 10**18))
    expect_another(cache_key(file, SETTINGS))
    monkeypatch.setattr("harness.data.store.cache.VERSION", 0)
    expect_another(cache_key(file, SETTINGS))


def test_stores_in_the_cache_keep_to_a_limit(folder: Path, tmp_path: Path) -> None:
    """Those that are in use stay, also in another process; of the others, the ones used longest ago go first."""
    told: list[str] = []

    def made(name: str, limit: int | None = None) -> StoredFrames:
        file = tmp_path / name
        if not file.exists():
            file.write_bytes((folder / "more.xyz").read_bytes())
        return cached_store(file, SETTINGS, tmp_path, told.append, limit)

    names = ["a.xyz", "b.xyz", "c.xyz"]
    paths = {name: made(name).path for name in names}  # none of them is in use any more
    for place, name in enumerate(names):
        os.utime(f"{paths[name]}.used", (1e9 + place, 1e9 + place))
    size = sum(file.stat().st_size for file in paths["a.xyz"].rglob("*") if file.is_file())
    (tmp_path / "stores" / "old.store.building").mkdir()  # what a killed build has left
    os.utime(tmp_path / "stores" / "old.store.building", (1e8, 1e8))
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # a process that has the first in use, until it is told to end
        status = 1
        with suppress(BaseException):
            kept = made("a.xyz")
            os.write(writing, b"x")
            os.close(writing)
            signal.pause()
            status = int(len(kept) == 0)
        os._exit(status)
    try:
        assert os.read(reading, 1) == b"x"
        os.utime(f"{paths['a.xyz']}.used", (1e9, 1e9))
        told.clear()
        one = made("d.xyz", 3 * size + size // 2)
        assert not (tmp_path / "stores" / "old.store.building").exists()
        assert [is_store(path) for path in paths.values()] == [True, False, True]
        assert "b.xyz" in told[-1]
        assert "which was used longest ago: stores have" in told[-1]
        two = made("e.xyz", 1)
        assert [is_store(path) for path in paths.values()] == [True, False, False]
        assert is_store(one.path)
        assert is_store(two.path)
        assert list(one)  # and is read
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    made("f.xyz", 1)
    assert not is_store(paths["a.xyz"])
    assert [is_store(each.path) for each in (one, two)] == [True, True]
    assert list((tmp_path / "stores").glob("*.store")) != []
    again = made("b.xyz")  # is built anew
    assert len(again) == len(one)


def test_the_rank_that_builds_tells_its_progress_and_others_that_they_wait(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    level = logger.level
    logger.setLevel(logging.INFO)  # a test before may have silenced Lightning
    logger.addHandler(handler)
    try:
        store = cached_store(folder / "train.xyz", SETTINGS, tmp_path, tell_of_rank)
        name = f"rank 3: {folder / 'train.xyz'} has 0 MiB: building a store of it once, in {store.path}"
        assert told[0].startswith(name)
        assert re.fullmatch(r"rank 3: store: \d+ of \d+ parts, 32 frames", told[-1])
        assert len(told) > 3
        store.path.rename(tmp_path / "finished")
        told.clear()
        with ThreadPoolExecutor(1) as other, FileLock(f"{store.path}.lock"):
            waiting = other.submit(cached_store, folder / "train.xyz", SETTINGS, tmp_path, tell_of_rank)
            wait_for(lambda: told, 20, "word of the waiting")
            (tmp_path / "finished").rename(store.path)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert told == [
        f"rank 3: waiting for another process that builds the store of {folder / 'train.xyz'} in {store.path}"
    ]
    assert waiting.result().digest == store.digest


def test_a_mistake_in_a_large_file_is_that_of_the_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"no frame of .*train\.xyz has the forces key 'gradients'"):
        from_files(folder, store_above=0, cache_dir=tmp_path, keys={"forces": "gradients"}).setup()
    with pytest.raises(FileNotFoundError, match="no file of structures at missing"):
        AtomsDataModule("missing.xyz", store_above=0, cutoff=3.0, batch_size=1).setup()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written.*HARNESS_CACHE"):
        from_files(folder, store_above=0, cache_dir=tmp_path / "file").setup()


# --- evaluations ---


def test_an_evaluation_has_the_frames_of_the_file(folder: Path) -> None:
    given: dict[str, Any] = {"keys": SETTINGS.keys, "units": False}
    extras = SETTINGS.extras
    (stored,) = read_evaluated([folder / "train.store"], extras=extras, **given)
    (file,) = read_evaluated([folder / "train.xyz"], extras=extras, **given)
    assert stored.labels() == file.labels()
    assert stored.labels()["dipole"] > 0
    assert stored.counted == file.counted == list(range(30))
    assert stored.frames.weight_names() == file.frames.weight_names() == ["weight"]
    for one, other in zip(stored.frames, file.frames, strict=True):
        assert one.weights == other.weights
        assert one.location == other.location
        assert one.atoms == other.atoms
        results, expected = ({} if atoms.calc is None else atoms.calc.results for atoms in (one.atoms, other.atoms))
        for name in ("energy", "forces"):
            np.testing.assert_array_equal(results.get(name, np.nan), expected.get(name, np.nan))
        dipoles = [information(frame.atoms, "dipole") for frame in (one, other)]
        assert [each is None for each in dipoles] in ([True, True], [False, False])
        assert dipoles[0] is None or (dipoles[0] == dipoles[1]).all()
        assert written(one.atoms) == written(other.atoms)
    unweighted = Extras.from_config(LABELS, None, None, None, dict.fromkeys(WEIGHTS))
    (plain,) = read_evaluated([folder / "train.store"], extras=unweighted, **given)
    assert plain.frames.weight_names() == []
    assert all(not frame.weights and frame.group is None for frame in plain.frames)
    assert not plain.frames.arrays(1).weights
    for options, text in (
        ({"weights": {"config_type": {"bulk": 2}}}, r"train\.store was built with the weights .*data\.unweighted=true"),
        ({"inputs": {"total_charge": {"key": "charge"}}}, r"built without total_charge, an input of the model"),
    ):
        with pytest.raises(ValueError, match=text):
            read_evaluated([folder / "train.store"], extras=Extras.from_config(LABELS, **options), **given)


def written(atoms: Atoms) -> str:
    """Text that ``harness-eval --write`` writes of a frame."""
    text = io.StringIO()
    write_extxyz(text, [with_predictions(atoms, {"energy": np.array(-1.5)}, "predicted_")])
    return text.getvalue()


def annotated(index: int) -> Atoms:
    """A structure with text, numbers, lists, columns, constraints and results of its own, in an order of its own."""
    atoms = molecule("CH3OH")
    atoms.info["note"] = f'step {index}, "quoted" = ü'
    results = {"dipole": np.arange(3.0), "energy": -7.0 / 3, "forces": np.full((6, 3), 1 / 3), "magmoms": np.ones(6)}
    if index % 2:
        atoms.pbc, atoms.cell = True, np.eye(3) * 9 + 0.1
        atoms.info["REF_virial"] = np.diag([1.0, 2.0, 3.0])
        atoms.info["number"], atoms.info["flag"], atoms.info["half"] = index, True, np.float64(0.1)
        atoms.info["config_type"] = index  # a group that is no text
        atoms.arrays["tags_of_atoms"] = np.array(["a", "bc", "d", "e", "f", "g"])
        atoms.arrays["velocity"] = np.arange(18.0).reshape(6, 3) / 7
        atoms.set_constraint(FixAtoms([0, 2]))
        del results["forces"]
    else:
        atoms.info["nested"] = {"steps": [1, 2.5, None, "x"], "array": np.arange(4)}
        atoms.info["stress"] = np.ones(6)  # of what is not periodic
    if index == 2:
        atoms.info["object"] = object()  # no plain data
    atoms.calc = SinglePointCalculator(atoms)
    atoms.calc.results = results
    return atoms


@pytest.mark.filterwarnings("ignore:Skipping")
@pytest.mark.parametrize("suffix", ["xyz", "traj", "db"])
def test_a_store_has_everything_that_its_file_has(tmp_path: Path, suffix: str) -> None:
    keys = LabelKeys() if suffix == "db" else LabelKeys(virial="REF_virial")
    extras = Extras.from_config({"magnetic_moments": {"key": "magmoms"}}, {"total_charge": {"key": "number"}})
    file = tmp_path / f"all.{suffix}"
    frames = [annotated(index) for index in range(5)]
    if suffix == "db":
        with ase.db.connect(file) as database:
            for atoms in frames[:2]:
                database.write(atoms, note="by hand", factor=0.1, data={"history": [1, 2], "matrix": np.eye(2)})
    else:
        ase.io.write(file, frames)
    build_store(tmp_path / "all.store", [file], BuildSettings(keys, extras, check_units=False))
    (stored,) = read_evaluated([tmp_path / "all.store"], keys, extras=extras, units=False)
    (read,) = read_evaluated([file], keys, extras=extras, units=False)
    for one, other in zip(stored.frames, read.frames, strict=True):
        assert written(one.atoms) == written(other.atoms)
        assert information(one.atoms, "note") == information(other.atoms, "note") is not None
        assert one.group == other.group
    store = StoredFrames(tmp_path / "all.store")
    assert store.information(0)
    assert not list(store.damages())
    texts = [store.information(index) for index in range(len(store))]
    assert not any(b"-2.333" in text or np.full((6, 3), 1 / 3).tobytes() in text for text in texts)  # not twice


def test_types_and_order_of_what_a_file_has_come_back() -> None:
    """Integers where labels are floats, NumPy's numbers, names in another order; what is no plain data is left out."""
    extras = Extras.from_config({"magnetic_moments": {"key": "magmoms"}}, {"total_charge": {"key": "number"}})
    keys = {"energy": "energy", "forces": "forces", "stress": "stress"}

    def returned(**information: Any) -> tuple[bytes, Atoms]:
        atoms = molecule("H2O")
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
        for name, value in information.items():
            place = atoms.arrays if np.shape(value) == (3,) else atoms.info
            (atoms.calc.results if name == "magmoms" else place)[name] = value
        (frame,) = extras.read([Frame(atoms, energy=-1.0)])
        record = encode_information(frame, keys, extras)
        plain = with_labels(frame, keys, extras)
        return record, with_information(plain, body_of(record)) if record else plain

    assert returned(number=2, config_type="a")[0] == b""
    record, found = returned(config_type="a", number=2)
    assert record
    assert list(found.info) == ["config_type", "number"]
    _, found = returned(tags=np.zeros(3, np.int32), half=np.float32(0.5), flag=np.bool_(True))
    assert found.arrays["tags"].dtype == np.int32
    assert (type(found.info["half"]), type(found.info["flag"])) == (np.float32, np.bool_)
    _, found = returned(magmoms=np.zeros(3, np.int64))
    assert found.calc.results["magmoms"].dtype == np.int64
    _, found = returned(table=np.zeros(2, [("a", "f8"), ("b", "i4")]), note="x")
    assert list(found.info) == ["note"]


def test_frames_without_more_than_labels_take_no_bytes_for_it(tmp_path: Path) -> None:
    frames = [atoms for atoms in structures(8) if not atoms.info.keys() - {"config_type"} and atoms.pbc.all()]
    ase.io.write(tmp_path / "plain.xyz", frames)
    store = build_store(tmp_path / "plain.store", [tmp_path / "plain.xyz"], BuildSettings(extras=Extras.from_config()))
    assert not (store.path / "information").exists()
    assert "information" not in store.manifest["columns"]
    (stored,) = read_evaluated([store.path], LabelKeys(), units=False)
    assert stored.frames[0].atoms.info == frames[0].info


# --- mistakes ---

MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no store": (lambda path: StoreDataModule(path / "none.store", **OPTIONS), "is not there: expected a folder"),
    "a file": (lambda path: StoreDataModule(path / "more.xyz", **OPTIONS), "is a file and no store"),
    "a store as a file": (lambda path: AtomsDataModule(path / "more.store", **OPTIONS), "data=store data.train="),
    "a folder as a file": (lambda path: AtomsDataModule(path, **OPTIONS), "harness-data build OUT FOLDER"),
    "settings of the build": (
        lambda path: StoreDataModule(path / "more.store", min_distance=1.0, **OPTIONS),
        "min_dist",
    ),
    "a limit": (lambda path: AtomsDataModule(path / "a.xyz", store_limit="1 GB", **OPTIONS), "store_limit is a size"),
    "a size": (lambda path: AtomsDataModule(path / "a.xyz", store_above="many", **OPTIONS), "such as '512 MiB'"),
    "a store twice": (lambda path: StoreDataModule([path / "more.store"] * 2, **OPTIONS), "2 times"),
    "one that is there": (lambda path: build_store(path / "more.store", [path / "more.xyz"]), "exists .a store."),
    "no files": (lambda path: build_store(path / "x.store", [path / "none"]), "no file or folder at"),
    "nothing to read": (
        lambda path: build_store(path / "x.store", [path / "more.store" / "columns"]),
        "no file that ASE",
    ),
    "the same file": (lambda path: build_store(path / "x.store", [path / "more.xyz", path]), "is there twice"),
    "an unknown key": (
        lambda path: build_store(path / "y.store", [path / "more.xyz"], BuildSettings(_keys("grad"))),
        "no frame of .*more.xyz has the forces key 'grad'",
    ),
    "atoms too close": (
        lambda path: build_store(path / "z.store", [path / "more.xyz"], BuildSettings(min_distance=2.0)),
        "closer than data.min_distance=2",
    ),
}


def _keys(forces: str) -> Any:
    from harness.data import LabelKeys

    return LabelKeys(forces=forces)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str, folder: Path) -> None:
    make, words = MISTAKES[name]
    with pytest.raises((ValueError, TypeError, KeyError, OSError), match=words):
        make(folder).setup()


def test_stores_of_other_labels_do_not_go_together(folder: Path, tmp_path: Path) -> None:
    build_store(tmp_path / "plain.store", [folder / "more.xyz"], BuildSettings(check_units=False))
    with pytest.raises(ValueError, match=r"plain\.store was built with data\.labels=.*expected the same"):
        StoreDataModule(folder / "train.store", tmp_path / "plain.store", **OPTIONS).setup()


# --- the command ---


def test_the_command_builds_and_tells(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "a.store")
    given = [store, str(folder / "train.xyz"), "data.check_units=false", "data.labels={dipole: {key: dipole}}"]
    given += ["data.inputs={total_charge: {key: net_charge}}"]
    main(["build", *given, "--cutoff", "3.0", "--workers", "1"])
    printed = capsys.readouterr()
    assert "1 of 1 parts, 32 frames" in printed.err
    assert re.match(r"1 file, \S+ MiB; 1 process\n", printed.err)
    main(["info", store, "--verify"])
    told = capsys.readouterr().out
    for text in (
        "32, of 1 to 8 atoms",
        "Ag, C, Cu, H, O",
        "energy 32, forces 24, stress",
        ", dipole 15\n",
        "inputs      total_charge 0\n",
        "virial=virial, dipole=dipole, total_charge=net_charge\n",
        "IsolatedAtom 2 (config_type)",
        "2 isolated atoms",
        "3 Å",
        "units no, distances of at least 0.1 Å",
        "every byte of the store is what was written",
        "fingerprint sha256",
    ):
        assert text in told, text
    assert printed.out.splitlines()[:5] == told.splitlines()[:5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "a.store"], "the name of the store and the files"),
        (["build", "a.store", "none.xyz"], "no file or folder at none.xyz"),
        (["build", "a.store", "IN", "data.keys.force=f"], "no setting data.keys.force. Did you mean data.keys.forces"),
        (["build", "a.store", "IN", "--cutoff", "-1"], "cutoff must be a positive number"),
        (["build", "a.store", "IN", "workers=0"], "the number of workers is a whole number"),
        (
            ["build", "a.store", "IN", "data.keys.energy=e"],
            "no label under the keys|no frame of .* has the energy key 'e'",
        ),
        (["build", "a.store", "STORE"], "more.store is a store already; expected files"),
        (["info", "IN"], r"more.xyz is a file and no store. Build a store of it: harness-data build more.store .*xyz"),
        (["info", "a.store"], "a.store is not there"),
        (["info"], "one store is needed"),
    ],
    ids=str,
)
def test_mistakes_of_the_command(
    arguments: list[str],
    words: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"IN": str(folder / "more.xyz"), "STORE": str(folder / "more.store")}
    with pytest.raises(SystemExit, match="1"):
        main([places.get(each, each) for each in arguments])
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "a.store").exists()


@pytest.mark.parametrize("name", ["keys.energy", "group_key"])
def test_settings_of_the_build_are_told_from_misspelt_ones(name: str) -> None:
    given = ["data=store", "data.train=a.store", f"data.{name}=foo"]
    with pytest.raises(ConfigCompositionException) as refused:
        composed(*given)
    text = explain("\n".join((str(refused.value), str(refused.value.__cause__))), given)
    section = f"data.{name.partition('.')[0]}"
    assert f"there is no setting {section}: {section} is decided when a store is built" in text
    assert "harness-data info" in text
    assert "Did you mean" not in text


def test_the_config_makes_the_data_module(folder: Path) -> None:
    config = composed("data=store", f"data.train={folder / 'train.store'}", "cutoff=3.0", "data.split={val: 2}")
    data = instantiate(config.data)
    assert isinstance(data, StoreDataModule)
    data.setup()
    assert [len(each) for each in (data.train_set, *data.val_sets, *data.test_sets)] == [25, 2, 3]  # of 30 structures
    assert data.train_set.cache_neighbors is False
