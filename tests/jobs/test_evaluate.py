"""Evaluations of trained models on files: real trainings, real ranks, values against those of the training's test."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from support import oracle
from support.accumulation_cases import TYPES
from support.commands import BIN, NO_FIGURES, ROOT, SHARED, Finished, run, same, train
from support.configs import composed
from support.frames import chosen as chosen_frames

import harness
from harness.callbacks.tables import values_table
from harness.data import EmbeddedAlloyDataModule, Frame, build_store, read_frames
from harness.data.extras import Extras
from harness.data.groups import GROUP_KEY
from harness.data.store import BuildSettings
from harness.evaluate import main
from harness.evaluate.groups import ALL, GroupValues
from harness.evaluate.metrics import metrics_of_training
from harness.evaluate.predictions import PredictionFile, with_predictions
from harness.evaluate.settings import parse
from harness.job import train as train_job

SMALL = (
    "model.hidden_channels=8",
    "model.num_filters=8",
    "model.num_interactions=1",
    "model.num_gaussians=8",
    "max_epochs=2",
    "cutoff=4.0",
    "logger=none",
    "callbacks=none",
    "+callbacks.best={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: '${output_dir}', filename: best}",
)
DOUBLE = ("data.dtype=float64", "trainer.precision=64-true")


def alloy_frames() -> list[Atoms]:
    """Frames of the embedded alloy in three groups, with labels under the usual names."""
    data = EmbeddedAlloyDataModule(num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, seed=1)
    data.setup()
    sets = (data.train_set, *data.val_sets, *data.test_sets)
    frames = [frame.atoms for part in sets for frame in part.frames]
    for number, atoms in enumerate(frames):
        atoms.info |= {"config_type": ("bulk", "surface", "liquid")[number * number % 7 % 3], "number": number}
    return frames


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Folder with ``train.xyz``, ``test.xyz``, ``other.xyz`` and ``best.ckpt`` of a training, and its test's values."""
    folder = tmp_path_factory.mktemp("trained")
    frames = alloy_frames()
    for name, part in (("train", frames[:12]), ("test", frames[12:19]), ("other", frames[19:])):
        ase.io.write(folder / f"{name}.xyz", part, format="extxyz")
    files = (f"data.train={folder}/train.xyz", f"data.val={folder}/other.xyz", f"data.test={folder}/test.xyz")
    config = composed("data=file", *files, "data.batch_size=4", "data.eval_batch_size=3", *SMALL, *DOUBLE)
    config.output_dir = str(folder)
    return folder, train_job(config)


@pytest.fixture(scope="module")
def one_rank(trained: tuple[Path, dict[str, float]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an evaluation of two files on one rank, with predictions."""
    folder, _ = trained
    output = tmp_path_factory.mktemp("one")
    files = [str(folder / name) for name in ("best.ckpt", "test.xyz", "other.xyz")]
    main([*files, f"output_dir={output}", "--write", str(output / "predictions.xyz")])
    return output


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return found


def evaluate(*arguments: str, folder: Path, ranks: int) -> Finished:
    """``python -m harness.evaluate`` under torchrun."""
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
    return run([*launcher, "-m", "harness.evaluate", *arguments], folder)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Message of an evaluation that ends with exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert shown.err.count("error:") == 1
    assert "Traceback" not in shown.err
    return shown.err


# --- values ---


def test_values_are_those_of_the_training(trained: tuple[Path, dict[str, float]], one_rank: Path) -> None:
    _, of_training = trained
    found = results(one_rank)["files"][0]["values"]
    expected = {key.partition("/")[2]: value for key, value in of_training.items() if key.startswith("test0_epoch/")}
    assert len(expected) > 15
    assert {name: found[name] for name in expected} == expected  # to the last digit
    assert set(found) - set(expected) == {"stress_rmse", "stress_mae", "stress_maxabserr"}  # labelled, and not trained


def test_values_of_groups_and_of_all_files_are_those_of_the_predictions(one_rank: Path) -> None:
    """An oracle that reads the file of predictions with ASE alone."""
    content, frames = results(one_rank), ase.io.read(one_rank / "predictions.xyz", ":")
    parts = {(None, None): frames, (0, None): frames[:7], (1, None): frames[7:]}
    for file, chosen in ((None, frames), (0, frames[:7]), (1, frames[7:])):
        for group in {atoms.info["config_type"] for atoms in chosen}:
            parts[file, group] = [atoms for atoms in chosen if atoms.info["config_type"] == group]
    assert len(parts) >= 3 + 3 + 2 * 2
    for (file, group), members in parts.items():
        found = content["all"] if file is None else content["files"][file]
        assert set(found["groups"]) == {name for each, name in parts if each == file and name is not None}
        found = found if group is None else found["groups"][group]
        assert found["frames"] == len(members)
        assert found["atoms"] == sum(map(len, members))
        energy = np.array(
            [(atoms.info["predicted_energy"] - atoms.get_potential_energy()) / len(atoms) for atoms in members]
        )
        forces = np.concatenate([atoms.arrays["predicted_forces"] - atoms.get_forces() for atoms in members])
        stress = np.array(
            [atoms.info["predicted_stress"].reshape(3, 3) - atoms.get_stress(voigt=False) for atoms in members]
        )
        gold = np.concatenate([atoms.symbols == "Au" for atoms in members])
        values = found["values"]
        assert same(values["per_atom_energy_rmse"], math.sqrt((energy**2).mean()), 1e-12)
        assert same(values["per_atom_energy_maxabserr"], abs(energy).max(), 1e-12)
        assert same(values["forces_mae"], abs(forces).mean(), 3e-8)  # ASE writes 8 decimals
        assert same(values["forces_rmse_per_type_Au"] or math.nan, math.sqrt((forces[gold] ** 2).mean()), 3e-8)
        assert same(values["stress_rmse"], math.sqrt((stress**2).mean()), 1e-12)
        assert found["elements"]["forces_rmse"] == 3 * found["atoms"]


def check_same_results(left: Path, right: Path) -> None:
    """Values and predictions of two outputs are the same to 1e-12."""

    def compare(first: Any, second: Any, name: str = "") -> int:
        if isinstance(first, dict):
            assert first.keys() == second.keys(), name
            return sum(compare(first[key], second[key], f"{name}/{key}") for key in first)
        if isinstance(first, list):
            return sum(compare(*pair, f"{name}/{at}") for at, pair in enumerate(zip(first, second, strict=True)))
        if isinstance(first, float):
            assert math.isclose(first, second, rel_tol=1e-12, abs_tol=1e-12), (name, first, second)
            return 1
        assert first == second, name
        return 0

    contents = [results(output) for output in (left, right)]
    for content in contents:
        for name in ("ranks", "seconds"):
            del content[name]
    assert compare(*contents) > 100
    both = [ase.io.read(output / "predictions.xyz", ":") for output in (left, right)]
    for alone, together in zip(*both, strict=True):
        assert alone.info["number"] == together.info["number"]
        assert math.isclose(alone.info["predicted_energy"], together.info["predicted_energy"], rel_tol=1e-12)
        assert abs(alone.arrays["predicted_forces"] - together.arrays["predicted_forces"]).max() < 1.01e-8


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_find_what_one_does(
    trained: tuple[Path, dict[str, float]], one_rank: Path, tmp_path: Path, ranks: int
) -> None:
    files = [str(trained[0] / name) for name in ("best.ckpt", "test.xyz", "other.xyz")]
    settings = ("output_dir=out", "parity=false", "--write", "out/predictions.xyz")
    done = evaluate(*files, *settings, folder=tmp_path, ranks=ranks)
    assert done.code == 0, done.err[-4000:]
    assert done.out.count("all files: 12 frames") == 1
    check_same_results(one_rank, tmp_path / "out")
    assert results(tmp_path / "out")["ranks"] == ranks
    pictures = {"parity_other.png", "parity_test.png"}
    assert {path.name for path in one_rank.iterdir()} - {path.name for path in (tmp_path / "out").iterdir()} == pictures


def test_a_store_has_the_values_of_its_file(
    trained: tuple[Path, dict[str, float]], one_rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    store = build_store(
        tmp_path / "test.store", [folder / "test.xyz"], BuildSettings(extras=Extras(group_key=GROUP_KEY))
    )
    files = [str(folder / "best.ckpt"), str(store.path), str(folder / "other.xyz")]
    output = tmp_path / "out"
    main([*files, f"output_dir={output}", "parity=false", "--write", str(output / "predictions.xyz")])
    found, expected = results(output), results(one_rank)
    assert found["files"][0]["labels"] == {"energy": 7, "forces": 7, "stress": 7}
    assert found["all"] == expected["all"]  # to the last digit, with its groups
    for one, other in zip(found["files"], expected["files"], strict=True):
        assert one["values"] == other["values"]
        assert one["groups"] == other["groups"]
    both = [(each / "predictions.xyz").read_text() for each in (output, one_rank)]
    assert both[0] == both[1]
    assert "config_type" in both[0]
    assert "predicted_energy" in both[0]
    text = refused([*files, "data.keys.forces=other", "output_dir=elsewhere"], capsys)
    assert "test.store was built with forces; build it anew with that name" in text
    assert "group=digit: no frame has it" in refused([*files[:2], "--group", "digit", "output_dir=elsewhere"], capsys)


@pytest.mark.slow
def test_more_ranks_than_frames_and_budgets_of_atoms_and_edges(
    trained: tuple[Path, dict[str, float]], one_rank: Path, tmp_path: Path
) -> None:
    files = [str(trained[0] / name) for name in ("best.ckpt", "test.xyz", "other.xyz")]
    for name, limit in (("max_atoms", 60), ("max_edges", 3000)):
        output = tmp_path / name
        settings = (f"output_dir={output}", f"data.{name}={limit}", "parity=false")
        main([*files, *settings, "--write", str(output / "predictions.xyz")])
        check_same_results(one_rank, output)
    ase.io.write(tmp_path / "two.xyz", ase.io.read(trained[0] / "test.xyz", ":2"))
    done = evaluate(files[0], "two.xyz", "output_dir=out", "--write", "p.xyz", folder=tmp_path, ranks=3)
    assert done.code == 0, done.err[-4000:]
    assert [atoms.info["number"] for atoms in ase.io.read(tmp_path / "p.xyz", ":")] == [12, 13]


def test_csv_has_every_value(one_rank: Path) -> None:
    content = results(one_rank)
    with (one_rank / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    whole = {
        row["component"] + f"_{row['type']}" * bool(row["type"]): row for row in rows if not row["file"] + row["group"]
    }
    values = {name: value for name, value in content["all"]["values"].items() if name != "weighted_sum" and value}
    assert {name: float(row["value"]) for name, row in whole.items()} == values
    assert whole["forces_rmse"]["unit"] == "eV/Å"
    assert {row["group"] for row in rows} == {"", *content["all"]["groups"]}


# --- frames ---


@pytest.fixture(scope="module")
def mixed(trained: tuple[Path, dict[str, float]]) -> tuple[Path, list[Atoms]]:
    """File with a cluster, frames without labels or forces, with all labels, and isolated atoms before and after."""
    first, second, third = (atoms.copy() for atoms in ase.io.read(trained[0] / "test.xyz", ":3"))
    labels = [atoms.calc.results for atoms in ase.io.read(trained[0] / "test.xyz", ":3")]
    isolated = Atoms("Cu", info={"config_type": "IsolatedAtom", "dft_energy": -0.5})
    cluster = Atoms(first.symbols[:5], first.positions[:5], info={"config_type": "cluster", "dft_energy": 1.25})
    cluster.arrays["dft_forces"] = np.linspace(-1, 1, 15).reshape(5, 3)
    second.info["dft_energy"] = labels[1]["energy"]
    third.info |= {"dft_energy": labels[2]["energy"], "dft_stress": labels[2]["stress"]}
    third.arrays["dft_forces"] = labels[2]["forces"]
    frames = [isolated, cluster, first, second, third, Atoms("Ag", info={"config_type": "IsolatedAtom"})]
    path = trained[0] / "mixed.xyz"
    ase.io.write(path, frames, format="extxyz")
    return path, ase.io.read(path, ":")


KEYS = ["data.keys.energy=dft_energy", "data.keys.forces=dft_forces", "data.keys.stress=dft_stress"]


def test_frames_of_all_kinds_are_predicted_and_labelled_ones_counted(
    trained: tuple[Path, dict[str, float]],
    mixed: tuple[Path, list[Atoms]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, frames = mixed
    written = tmp_path / "new" / "p.xyz"
    main(
        [
            str(trained[0] / "best.ckpt"),
            str(path),
            *KEYS,
            f"output_dir={tmp_path}",
            "--write",
            str(written),
        ]
    )
    shown = capsys.readouterr().out
    assert "6 frames; labelled with energy 3, forces 2, stress 1; 2 isolated atoms are no part of the errors" in shown
    found = ase.io.read(written, ":")
    assert len(found) == 6
    for before, after in zip(frames, found, strict=True):  # what was there is where it was
        assert before == after
        for name, value in before.info.items():
            assert np.array_equal(after.info[name], value), name
        assert all(np.array_equal(after.arrays[name], value) for name, value in before.arrays.items())
        assert np.isfinite(after.info["predicted_energy"])
        assert after.arrays["predicted_forces"].shape == (len(after), 3)
        assert ("predicted_stress" in after.info) == after.pbc.all()
    assert found[2].info["predicted_stress"].shape == (9,)
    assert [path.name for path in tmp_path.glob("*.png")] == ["parity_mixed.png"]
    values = results(tmp_path)["all"]
    assert values["frames"] == 4
    assert values["elements"]["per_atom_energy_rmse"] == 3
    assert values["elements"]["forces_rmse"] == 3 * (len(found[1]) + len(found[4]))
    assert values["values"]["forces_mae_per_type"] is not None
    errors = [(found[at].info["predicted_energy"] - found[at].info["dft_energy"]) / len(found[at]) for at in (1, 3, 4)]
    assert same(values["values"]["per_atom_energy_mae"], float(np.abs(errors).mean()), 1e-12)
    assert set(values["groups"]) == {"cluster", *(found[at].info["config_type"] for at in (2, 3, 4))}
    again = read_frames(
        written, {"energy": "predicted_energy", "forces": "predicted_forces", "stress": "predicted_stress"}
    )
    assert again[2].stress is not None


def test_isolated_atoms_are_frames_like_others_if_asked_for(
    trained: tuple[Path, dict[str, float]], mixed: tuple[Path, list[Atoms]], tmp_path: Path
) -> None:
    main(
        [
            str(trained[0] / "best.ckpt"),
            str(mixed[0]),
            *KEYS,
            f"output_dir={tmp_path}",
            "data.isolated_atoms=frames",
            "parity=false",
        ]
    )
    assert results(tmp_path)["all"]["elements"]["per_atom_energy_rmse"] == 4
    assert "IsolatedAtom" in results(tmp_path)["all"]["groups"]


def test_files_without_labels_get_predictions_only(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained[0] / "best.ckpt")
    frames = [atoms.copy() for atoms in ase.io.read(trained[0] / "test.xyz", ":2")]
    for atoms in frames:
        atoms.info["REF_energy"] = 1.0
    ase.io.write(tmp_path / "plain.xyz", frames, format="extxyz")
    text = refused([checkpoint, str(tmp_path / "plain.xyz"), f"output_dir={tmp_path / 'out'}"], capsys)
    assert "Did you mean data.keys.energy=REF_energy?" in text
    assert "--write" in text
    written = tmp_path / "p.xyz"
    main([checkpoint, str(tmp_path / "plain.xyz"), f"output_dir={tmp_path / 'out'}", "--write", str(written)])
    shown = capsys.readouterr().out
    assert "no labels, predictions only" in shown
    assert "component" not in shown
    assert not (tmp_path / "out").exists()
    assert all("predicted_energy" in atoms.info for atoms in ase.io.read(written, ":"))


def test_training_files_are_recognised(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied.xyz"
    copied.write_bytes((trained[0] / "train.xyz").read_bytes())
    main([str(trained[0] / "best.ckpt"), str(copied), f"output_dir={tmp_path / 'out'}", "group=null", "parity=false"])
    assert "has the content of train file 1 of the model's training" in capsys.readouterr().out
    assert "groups" not in results(tmp_path / "out")["all"]


def test_given_metrics_replace_those_of_the_training(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    files = [str(trained[0] / "best.ckpt"), str(trained[0] / "test.xyz")]
    main(
        [*files, f"output_dir={tmp_path}", "parity=false", "metrics=energy", "metrics.coeffs={per_atom_energy_rmse: 2}"]
    )
    assert not any("forces" in name for name in results(tmp_path)["all"]["values"])


# --- mistakes ---


@pytest.fixture
def files(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> Iterator[list[str]]:
    """Checkpoint, test file and output directory, from a folder of its own."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield [str(trained[0] / "best.ckpt"), str(trained[0] / "test.xyz"), "output_dir=out", "parity=false"]
    os.chdir(before)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.keys.energy=enrgy"], ["data.keys.energy=enrgy: no frame of", "Did you mean energy?"]),
        (["data.keys.enrgy=REF_energy"], ["no setting data.keys.enrgy", "Did you mean data.keys.energy?"]),
        (["data.batch_size=3"], ["no setting data.batch_size", "Did you mean data.eval_batch_size?"]),
        (["data.eval_batch_size=3", "data.max_atoms=60"], ["data.eval_batch_size=3, data.max_atoms=60"]),
        (["data.eval_batch_size=0"], ["batch_size is a whole number, at least 1, found 0"]),
        (["--group", "config_typ"], ["group=config_typ: no frame has it", "Did you mean config_type?"]),
        (["--group", "number", "group=number"], ["both --group and group=..."]),
        (["--write", "p.cif"], ["extended XYZ", "p.xyz"]),
        (["prefix=''", "--write", "p.xyz"], ["frame 0 has energy already", "prefix="]),
        (["metrics.coeffs.forces_rmse=1"], ["metrics=energy_force"]),
        (["output_dir=a=b"], ["output_dir=a=b", "Quote its value"]),
        (["empty.xyz"], ["empty.xyz is empty"]),
        (["missing.xyz"], ["no file of structures at missing.xyz"]),
        (["zinc.xyz"], ["zinc.xyz, frame 1: Zn is no element of the model of", "Cu, Pd, Ag, Au", "1 of 9 frames"]),
        (["--unknown"], ["--unknown"]),
        (["device=cud"], ["device=cud"]),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    files: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    Path("empty.xyz").touch()
    frames = [atoms.copy() for atoms in ase.io.read(files[1], ":2")]
    frames[1].symbols[3] = "Zn"
    ase.io.write("zinc.xyz", frames, format="extxyz")
    before = sorted(Path.cwd().iterdir())
    text = refused([*files, *arguments], capsys)
    for part in expected:
        assert part in text
    assert sorted(Path.cwd().iterdir()) == before


def test_a_file_that_is_no_checkpoint_and_missing_arguments_are_told(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "checkpoint" in refused([files[1], files[1]], capsys)
    assert "a checkpoint and the files to evaluate are needed" in refused([files[0]], capsys)
    assert "2 times; expected each file once" in refused([files[0], files[1], files[1]], capsys)


def test_files_are_not_replaced_unasked(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*files, "--write", "p.xyz"])
    assert "evaluation.json is there already" in refused(files, capsys)
    assert "p.xyz is there already" in refused(
        [*files[:2], "output_dir=new", "parity=false", "--write", "p.xyz"], capsys
    )
    assert not Path("new").exists()
    Path("p.xyz").write_text("of before")
    main([*files, "--write", "p.xyz", "--overwrite"])
    assert len(ase.io.read("p.xyz", ":")) == 7
    own = Path("own.xyz")
    own.write_bytes(Path(files[1]).read_bytes())
    text = refused([files[0], "own.xyz", "output_dir=new", "--write", "./own.xyz", "--overwrite"], capsys)
    assert "one of the files that are read" in text
    assert own.read_bytes() == Path(files[1]).read_bytes()


def test_a_file_that_cannot_be_written_is_one_message_and_no_torn_file(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("[Errno 28] No space left on device")

    monkeypatch.setattr(PredictionFile, "_write", full)
    text = refused([*files, "--write", "p.xyz"], capsys)
    assert "p.xyz cannot be written: [Errno 28] No space left on device" in text
    assert not list(Path.cwd().glob("*p.xyz*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("closed").mkdir(mode=0o500)
    assert "no permission" in refused([*files[:2], "output_dir=closed"], capsys)


def test_a_prediction_beside_another_one_has_another_name(
    trained: tuple[Path, dict[str, float]], one_rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictions of two models go into one file, one after the other."""
    arguments = [str(trained[0] / "best.ckpt"), str(one_rank / "predictions.xyz"), f"output_dir={tmp_path / 'out'}"]
    arguments += ["parity=false", "--write", str(tmp_path / "both.xyz")]
    assert "frame 0 has predicted_energy already" in refused(arguments, capsys)
    main([*arguments, "prefix=second_"])
    for atoms in ase.io.read(tmp_path / "both.xyz", ":"):
        assert math.isclose(atoms.info["predicted_energy"], atoms.info["second_energy"], rel_tol=1e-6)


@pytest.mark.slow
def test_a_mistake_on_ranks_is_told_once_and_ctrl_c_exits_with_130(
    trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    files = [str(trained[0] / "best.ckpt"), str(trained[0] / "test.xyz")]
    done = evaluate(*files, "--group", "config_typ", folder=tmp_path, ranks=2)
    assert done.code == 1
    assert done.err.count("error: group=config_typ: no frame has it") == 1
    many = ase.io.read(trained[0] / "test.xyz", ":") * 200
    ase.io.write(tmp_path / "many.xyz", many, format="extxyz")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "harness.evaluate", files[0], "many.xyz", "output_dir=out"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "1 rank on cpu" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-2000:]
    assert "stopped: interrupted" in err


# --- real data ---


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "silicon").is_dir(), reason="the data are not in the repository")
def test_silicon_by_config_type_on_two_ranks_is_what_its_training_found(tmp_path: Path) -> None:
    data = SHARED / "silicon"
    of_stress = ("loss=energy_force_stress", "metrics=energy_force_stress")
    files = (
        f"data.train={data}/training.xyz",
        f"data.test={data}/test.xyz",
        "data.num_train=40",
        "data.split={val: 8}",
    )
    settings = (*of_stress, *SMALL[:4], *DOUBLE, *NO_FIGURES, "max_epochs=1", "logger=none", "output_dir=run")
    done = train("data=file", *files, *settings, folder=tmp_path)
    assert done.code == 0, done.err[-4000:]
    done = evaluate("run/checkpoints/best.ckpt", f"{data}/test.xyz", "output_dir=out", folder=tmp_path, ranks=2)
    assert done.code == 0, done.err[-4000:]
    expected = json.loads((tmp_path / "run" / "result.json").read_text())["values"]
    found = results(tmp_path / "out")["all"]
    for name, value in found["values"].items():
        assert same(value, expected[f"test0_epoch/{name}"], 1e-12), name
    groups = {name: group["frames"] for name, group in found["groups"].items()}
    assert groups == {"Vacancy": 7, "Surface": 2, "AIMD-NVT": 10, "Elastic": 6}
    assert "by config_type" in done.out


# --- parts ---


def test_tables_show_the_types_that_the_files_have() -> None:
    entry = {"name": "mae", "field": "forces", "metric": harness.MeanAbsoluteError(), "per_type": True}
    manager = harness.MetricsManager([entry], type_names=[f"T{number}" for number in range(89)])
    values = {"mae": 1.0, "mae_T3": 2.0, "mae_T7": 0.5}
    table = values_table("", manager, values, type_names=["T3", "T7"])
    assert [str(column.header) for column in table.columns] == ["component", "value", "T3", "T7", "unit"]
    assert table.caption == "87 other types of the model without data"


def test_commands_and_settings_of_the_page_are_those_of_the_command() -> None:
    page = (ROOT / "docs" / "evaluate.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("harness-eval ")]
    assert len(commands) > 1
    for command in commands:
        parse(shlex.split(command)[1:])
    settings = re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE)
    given = [each for line in settings for each in re.findall(r"`([\w.]+=[^`]+)`", line) if "DIR" not in each]
    assert len(given) > 10
    for each in given:
        assert parse(["best.ckpt", "test.xyz", each]).given == {each.partition("=")[0]}


def test_metrics_that_a_checkpoint_names_are_called_only_if_they_are_known() -> None:
    own = {"test_metrics._target_": "harness.EnergyOnlyMetrics", "test_metrics.coeffs.per_atom_energy_rmse": 1}
    assert metrics_of_training(own) == (
        {"_target_": "harness.EnergyOnlyMetrics", "coeffs": {"per_atom_energy_rmse": 1}},
        "",
    )
    known = own | {"test_metrics.extra_metrics.0.metric._target_": "torchmetrics.R2Score"}
    assert metrics_of_training(known)[1] == ""
    for target in (
        "os.system",
        "harness.evaluate.main",
        "harness.load_model",  # with trust=[...] of the checkpoint's choice
        "harness.data.register_field",
        "my_package.Metrics",
        "torchmetrics.functional.os.system",
        "torchmetrics.__logging.FileHandler",  # which empties the file that it is given
        "torchmetrics.metric.torch.serialization.tarfile.TarFile",
        "torchmetrics.text.BERTScore",  # which fetches a model
    ):
        found, note = metrics_of_training(own | {"test_metrics.extra_metrics.0.metric._target_": target})
        assert found is None
        assert target in note


def test_metrics_of_the_training_are_taken_without_its_sets_and_groups() -> None:
    mae = {"name": "mae", "field": "forces", "metric": {"_target_": "harness.MeanAbsoluteError"}}
    own = {"_target_": "harness.MetricsManager", "metrics": [mae | {"per_set": True, "per_group": True}]}
    of_one = [mae | {"name": "of_one", "sets": ["molecules"]}]
    assert metrics_of_training({"val_metrics": own}) == ({**own, "metrics": [mae]}, "")
    assert metrics_of_training({"val_metrics": {**own, "metrics": [*own["metrics"], *of_one]}})[0] == {
        **own,
        "metrics": [mae],
    }
    note = "metrics of other sets of the training are left out: of_one (sets molecules); "
    assert metrics_of_training({"val_metrics": {**own, "metrics": of_one}}) == (
        None,
        f"{note}head=NAME says which set the files are of",
    )
    # with the head of one set, files are of this set
    both = {"val_metrics": {**own, "metrics": [*own["metrics"], *of_one]}}
    of_head = {**own, "metrics": [mae, mae | {"name": "of_one"}]}
    assert metrics_of_training(both, "molecules") == (of_head, "")
    assert metrics_of_training(both, "bulk") == ({**own, "metrics": [mae]}, f"{note}the files are of the set bulk")


def test_a_group_of_weight_0_has_the_errors_of_its_frames_once_each() -> None:
    features, target = oracle.draw(0, [2, 1, 3, 1])
    numbers = target["num_atoms"]
    target |= {"batch": torch.arange(4).repeat_interleave(numbers), "frame_index": torch.arange(4)}
    target["weight"] = torch.tensor([2.0, 0.0, 0.0, 0.0]).double()
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    component = oracle.Component("forces", "mae")
    values = GroupValues(oracle.manager([component]), [0, 1], [["a", "b", "b", "a"], []])
    module: Any = SimpleNamespace(device="cpu")
    for _ in range(2):  # a second test begins anew
        values.on_test_start(None, module)  # type: ignore[arg-type]
        values.on_test_batch_end(None, module, preds, target, 0)  # type: ignore[arg-type]
        values.on_test_epoch_end(None, module)  # type: ignore[arg-type]
        assert set(values.reports) == {(0, "a"), (0, "b"), (ALL, None), (ALL, "a"), (ALL, "b")}
        for frames, cells in (([0], [(0, "a"), (ALL, "a"), (ALL, None)]), ([1, 2], [(0, "b"), (ALL, "b")])):
            part, labels = chosen_frames(features, target, frames)
            expected = oracle.values([component], oracle.predict(part, oracle.parameters()), labels)
            for cell in cells:
                assert values.reports[cell].values["forces_mae"] == pytest.approx(expected["forces_mae"], rel=1e-12)


def test_a_group_whose_energies_have_weight_0_has_their_errors_once_each() -> None:
    """As in the tables of a training: for the components without other frames alone, by the weight of their label."""
    features, target = oracle.draw(0, [2, 1, 3, 1])
    target |= {"frame_index": torch.arange(4), "group_index": torch.tensor([0, 1, 1, 0])}
    target["weight"] = torch.tensor([2.0, 1.0, 1.0, 3.0]).double()
    target["energy_weight"] = torch.tensor([0.0, 0.0, 0.0, 0.5]).double()
    energy = [oracle.Component("total_energy", "mae", 1.0), oracle.Component("total_energy", "max")]
    components = [*energy, oracle.Component("forces", "mae", 1.0, True)]
    entries, names = [each.entry(TYPES) for each in components], ["a", "b"]
    values = GroupValues(harness.MetricsManager(entries, TYPES), [0], [["a", "b", "b", "a"]])
    table = harness.MetricsManager(entries, TYPES, group_names=names)
    table.keep_by_group()
    module: Any = SimpleNamespace(device="cpu")
    values.on_test_start(None, module)  # type: ignore[arg-type]
    for part, labels in oracle.split(features, target, [2]):
        numbers = labels["num_atoms"]
        labels |= {"batch": torch.arange(len(numbers)).repeat_interleave(numbers)}
        preds = {name: value.detach() for name, value in oracle.predict(part, oracle.parameters()).items()}
        values.on_test_batch_end(None, module, preds, labels, 0)  # type: ignore[arg-type]
        table(preds, labels)
    values.on_test_epoch_end(None, module)  # type: ignore[arg-type]
    by_group = harness.compute_together([table])[0].to_report().by_group
    for number, (name, frames) in enumerate({"a": [3], "b": [1, 2]}.items()):
        report = values.reports[0, name]
        part, labels = chosen_frames(features, target, frames)  # of which energies count
        expected = oracle.values(energy, oracle.predict(part, oracle.parameters()), labels)
        for component in components:
            assert report.values[component.name] == pytest.approx(by_group[component.name][number], rel=1e-12)
        for component in energy:
            assert report.values[component.name] == pytest.approx(expected[component.name], rel=1e-12)
        assert report.counts["total_energy_mae"] == {"a": 1.5, "b": 2}[name]
    assert values.reports[0, "b"].counts["forces_mae_by_type"] == 3 * 4


def test_predictions_without_energies_are_written(tmp_path: Path) -> None:
    atoms = [molecule("H2O"), molecule("OH")]
    file = PredictionFile(tmp_path / "out.xyz", [Frame(each) for each in atoms], [[1, 0]])
    batch = {"frame_index": torch.tensor([0, 1]), "num_atoms": torch.tensor([2, 3])}
    module, fit = cast(Any, SimpleNamespace(process_group=None)), cast(Any, SimpleNamespace(is_global_zero=True))
    file.on_test_start(fit, module)
    file.on_test_batch_end(fit, module, {"forces": torch.arange(15.0).reshape(5, 3)}, batch, 0)
    file.on_test_end(fit, module)
    water, radical = ase.io.read(tmp_path / "out.xyz", index=":")
    assert water.arrays["predicted_forces"].tolist() == [[6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert radical.arrays["predicted_forces"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "predicted_energy" not in water.info


def test_calculator_results_and_information_of_one_name_are_written_once(tmp_path: Path) -> None:
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], info={"energy": -1.0})
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    written = with_predictions(atoms, {"energy": np.array(-2.0), "stress": np.eye(3)}, "predicted_")
    ase.io.write(tmp_path / "h2.xyz", written, format="extxyz")
    found = ase.io.read(tmp_path / "h2.xyz")
    assert found.get_potential_energy() == -1.0
    assert found.info == {"predicted_energy": -2.0}
    assert atoms.info == {"energy": -1.0}
