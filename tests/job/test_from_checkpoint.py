"""Trainings whose model is that of a checkpoint: architecture, elements, references, errors before the first step."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from omegaconf import OmegaConf
from support.bad_input import BASE, composed, frames, isolated
from support.commands import NO_FIGURES
from support.trained import trained

import harness
from harness.data.reading import chemical_symbols
from harness.job import execute, from_checkpoint, prepare
from harness.job.preflight import check_files
from harness.models import reference_energies

_OTHERS = [setting for setting in BASE if not setting.startswith(("model", "cutoff"))]
TUNING = (*_OTHERS, "model=from_checkpoint", *NO_FIGURES, "test=false", "max_epochs=1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small SchNet for Cu and Ag."""
    path, _ = trained(tmp_path_factory.mktemp("before"), "trainer.precision=64-true", "data.dtype=float64")
    return path


def shifted(folder: Path, change: dict[str, float], symbols: tuple[str, ...] = ("Cu3Ag", "Cu2Ag2")) -> Path:
    """File of frames as those that the checkpoint was trained on, whose energies have other references."""
    folder.mkdir(exist_ok=True)
    found: list[Atoms] = []
    for atoms in [each for formula in symbols for each in frames(symbols=formula)]:
        energy = atoms.calc.results["energy"] + sum(change.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols())
        atoms.calc.results["energy"] = energy
        found.append(atoms)
    ase.io.write(folder / "new.xyz", found, format="extxyz")
    return folder / "new.xyz"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames with the references of the checkpoint."""
    return shifted(tmp_path_factory.mktemp("data"), {})


def started(folder: Path, checkpoint: Path, file: Path, *overrides: str) -> Any:
    typed = (*TUNING, f"init_from={checkpoint}", f"data.train={file}", f"output_dir={folder / 'run'}")
    typed += ("trainer.precision=64-true", "data.dtype=float64", *overrides)
    return prepare(composed(typed))


def printed(job: Any, capsys: pytest.CaptureFixture[str]) -> str:
    execute(job)
    return capsys.readouterr().out


def test_architecture_cutoff_and_weights_are_those_of_the_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shifted(tmp_path, {})
    job = started(tmp_path, checkpoint, file, "optimizer.lr=0.0")
    before = harness.load_model(checkpoint)
    assert job.config.model["_target_"] == "harness.models.schnet_force_field"
    assert (job.config.cutoff, job.datamodule.cutoff) == (before.cutoff, before.cutoff) == (3.5, 3.5)
    out = printed(job, capsys)
    after = harness.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt")  # which stands on its own
    assert after.record["settings"]["model.hidden_channels"] == 8
    structures = frames()[:3]
    for field in ("total_energy", "forces"):
        assert torch.equal(before(before.batch_of(structures))[field], after(after.batch_of(structures))[field])
    assert "loaded: energy_model.energy_model.schnet." in out
    assert "left out: none; made anew: none" in out
    started_from = after.record["started_from"]
    assert set(started_from["loaded"]) == set(before.model.state_dict())
    # the errors are those of the model on the frames
    loaded = job.datamodule.val_sets[0]
    predicted = before(before.batch_of([frame.atoms for frame in loaded.frames]))
    labels = np.array([frame.energy for frame in loaded.frames])
    sizes = np.array([len(frame.atoms) for frame in loaded.frames])
    energy = np.mean(np.abs(predicted["total_energy"].flatten().numpy() - labels) / sizes)
    forces = predicted["forces"].numpy() - np.concatenate([frame.forces for frame in loaded.frames])
    found = re.search(
        r"(\d+) of (\d+) frames of the validation set 0: energies (\S+) eV/atom \(MAE\), forces (\S+)", out
    )
    assert found is not None
    assert [int(found[1]), int(found[2])] == [len(labels)] * 2
    np.testing.assert_allclose([float(found[3]), float(found[4])], [energy, np.sqrt(np.mean(forces**2))], rtol=1e-3)


def test_references_are_refitted_to_what_the_model_leaves(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {"Cu": 12.5, "Ag": -7.25}
    file = shifted(tmp_path, change)
    job = started(tmp_path / "fit", checkpoint, file, "model.energy_shifts=fit", "optimizer.lr=0.0")
    out = printed(job, capsys)
    before, after = harness.load_model(checkpoint), harness.load_model(tmp_path / "fit/run/checkpoints/last.ckpt")
    # the model is trained: its own residual is small beside the change
    for name, value in change.items():
        assert abs(after.energy_shifts[name] - before.energy_shifts[name] - value) < 1, name
    assert reference_energies(after.model, after.type_names) == after.energy_shifts
    errors = [float(value) for value in re.findall(r"energies (\S+) eV/atom \(MAE\)", out)]
    assert len(errors) == 2
    assert errors[0] > 1 > 10 * errors[1]
    assert after.record["started_from"]["first_errors"]["per_atom_energy_mae"] == pytest.approx(errors[1], rel=1e-3)
    # forces have nothing to do with it
    structures = frames()[:2]
    assert torch.equal(before(before.batch_of(structures))["forces"], after(after.batch_of(structures))["forces"])
    # and least squares of label less prediction, by another way
    train = job.datamodule.train_set.frames
    predicted = before(before.batch_of([frame.atoms for frame in train]))["total_energy"].flatten().numpy()
    counts = np.array(
        [[frame.atoms.get_chemical_symbols().count(name) for name in before.type_names] for frame in train]
    )
    residual = np.array([frame.energy for frame in train]) - predicted
    expected = np.linalg.lstsq(counts.astype(float), residual, rcond=None)[0]
    found = [after.energy_shifts[name] - before.energy_shifts[name] for name in before.type_names]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_a_fit_that_compositions_do_not_determine_says_its_rank_and_changes_least(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shifted(tmp_path, {"Cu": 5.0, "Ag": 5.0}, ("Cu3Ag",))
    job = started(tmp_path, checkpoint, file, "model.energy_shifts=fit", "optimizer.lr=0.0")
    out = printed(job, capsys)
    assert "the fit of 2 references has rank 1" in out
    assert "nearest to the model's own" in out
    before = harness.load_model(checkpoint).energy_shifts
    after = harness.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").energy_shifts
    # 3 Cu and 1 Ag a frame fix one sum; references below 1 eV are changed alike, in proportion to the composition
    changes = np.array([after[name] - before[name] for name in ("Cu", "Ag")])
    assert changes @ [3, 1] == pytest.approx(20.0, abs=3.0)
    assert changes[0] / changes[1] == pytest.approx(3.0)


def test_a_training_that_goes_on_keeps_what_it_started_from(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    execute(started(tmp_path / "first", checkpoint, file))
    last = tmp_path / "first" / "run" / "checkpoints" / "last.ckpt"
    again = ("init_from=null", f"ckpt_path={last}", "max_epochs=2")
    execute(started(tmp_path / "second", checkpoint, file, *again))
    records = [
        harness.load_model(tmp_path / name / "run" / "checkpoints" / "last.ckpt").record for name in ("first", "second")
    ]
    assert records[1]["started_from"] == records[0]["started_from"]


def test_of_what_compositions_leave_open_isolated_atoms_decide(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shifted(tmp_path, {"Cu": 5.0, "Ag": 5.0}, ("Cu3Ag",))
    structures = ase.io.read(file, index=":")
    ase.io.write(file, [*structures, isolated("Cu", 2.0), isolated("Ag", 8.0)], format="extxyz")
    job = started(tmp_path, checkpoint, file, "model.energy_shifts=fit", "optimizer.lr=0.0")
    assert "nearest to the isolated atoms" in printed(job, capsys)
    found = harness.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").energy_shifts
    # least Σ (μ' / μ - 1)² with 3 Cu and 1 Ag a frame
    changes = np.array([found["Cu"] - 2.0, found["Ag"] - 8.0])
    assert changes[0] / changes[1] == pytest.approx(3 * 2.0**2 / 8.0**2)


def test_references_are_given_for_some_elements(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = started(tmp_path, checkpoint, shifted(tmp_path, {"Ag": 3.0}), "model.energy_shifts={Ag: 5.0}")
    out = printed(job, capsys)
    before = harness.load_model(checkpoint).energy_shifts
    model = harness.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert model.energy_shifts == {"Cu": before["Cu"], "Ag": 5.0}
    assert model.record["architecture"]["energy_shifts"] == model.energy_shifts
    assert "references as given: Ag" in out


def test_weights_are_made_anew_by_pattern(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shifted(tmp_path, {"Cu": 5.0, "Ag": 5.0})
    out = printed(started(tmp_path, checkpoint, file, "init_anew=['*schnet.lin2.*']", "optimizer.lr=0.0"), capsys)
    assert re.search(r"left out: \S*schnet\.lin2\. … weight, bias; made anew: \S*schnet\.lin2\. … weight, bias", out)
    told = "most of the error of the energies is one of references: model=from_checkpoint model.energy_shifts=fit would"
    assert told in out
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    differ = {name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])}
    assert differ == {f"model.energy_model.energy_model.schnet.lin2.{part}" for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["cutoff=3.0"], ["cutoff=3.0, but the model of init_from={checkpoint} has one of 3.5 Å", "Leave cutoff out"]),
        (["data.type_names=[Ag,Cu]"], ["was trained with the atom types Cu, Ag", "Leave data.type_names out"]),
        (["model.energy_shifts=nowhere.xyz"], ["is none of keep, fit, {{symbol: eV, ...}}"]),
        (
            ["model.energy_shifts={{Au: 5.0}}"],
            ["model.energy_shifts has Au, which the model does not have; it has Cu, Ag"],
        ),
        (["init_anew=['nothing.*']"], ["init_anew=['nothing.*']: no weight of the model has such a name"]),
        (["init_from=null"], ["model=from_checkpoint takes the model of a checkpoint", "init_from=FILE"]),
        (
            ["init_from=null", "train=false", "test=true", "ckpt_path={checkpoint}", "model.energy_shifts=fit"],
            ["references are changed where a new training starts", "Leave model.energy_shifts out"],
        ),
    ],
)
def test_what_does_not_go_with_the_file_is_refused(
    overrides: list[str], messages: list[str], checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    typed = [override.format(checkpoint=checkpoint) for override in overrides]
    with pytest.raises((ValueError, TypeError)) as caught:
        started(tmp_path, checkpoint, file, *typed)
    for message in messages:
        assert message.format(checkpoint=checkpoint) in str(caught.value)


def test_an_element_that_the_model_does_not_have_is_refused_with_the_list(checkpoint: Path, tmp_path: Path) -> None:
    found = frames()
    found[0].symbols[0] = "Au"
    ase.io.write(tmp_path / "gold.xyz", found, format="extxyz")
    with pytest.raises(ValueError, match=r"Au.*These are the types of init_from=.*, whose model has no others"):
        started(tmp_path, checkpoint, tmp_path / "gold.xyz")


def test_a_builder_of_somebody_else_is_not_called(checkpoint: Path, tmp_path: Path) -> None:
    found = torch.load(checkpoint, weights_only=True)
    marker = tmp_path / "called"
    found["made_with"]["architecture"] = {"_target_": "os.mkdir", "path": str(marker)}
    torch.save(found, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"names os\.mkdir as the builder of its model"):
        started(tmp_path, tmp_path / "bad.ckpt", shifted(tmp_path, {}))
    with pytest.raises(ValueError, match=r"names os\.mkdir as the builder of its model"):
        from_checkpoint(str(tmp_path / "bad.ckpt"))
    assert not marker.exists()


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_state_dict": 1, "num_convolution_layer": 2}, "is a SevenNet checkpoint: convert it once"),
        ({"hyper_parameters": {"model": "nequip.model.NequIPGNNModel"}}, "is a NequIP checkpoint: convert it once"),
        ({"class": "mace.modules.models"}, "is a MACE model: convert it once"),
        (
            {"state_dict": 1},
            "init_from=.*is no checkpoint of this package: it (holds .*mkdir|is no archive)",
        ),
    ],
)
def test_a_pickle_is_never_loaded(content: dict[str, object], message: str, tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    torch.save({**content, "bad": Malicious(marker)}, tmp_path / "bad.model")
    given = OmegaConf.create({"train": True, "ckpt_path": None, "init_from": str(tmp_path / "bad.model")})
    with pytest.raises(ValueError, match=message):
        check_files(given)
    with (tmp_path / "bad.model").open("wb") as opened:  # the form before torch 1.6
        pickle.dump({**content, "bad": Malicious(marker)}, opened)
    with pytest.raises(ValueError, match=message):
        check_files(given)
    assert not marker.exists()


def test_a_test_takes_the_model_of_its_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shifted(tmp_path, {})
    typed = [each for each in TUNING if not each.startswith("test=")]
    typed += [f"ckpt_path={checkpoint}", "train=false", f"data.train={file}", f"data.test={file}", "max_epochs=1"]
    job = prepare(composed([*typed, f"output_dir={tmp_path / 'run'}"]))
    results = execute(job)
    assert chemical_symbols(job.datamodule.test_sets[0].frames) == {"Cu", "Ag"}
    assert np.isfinite(results["test0_epoch/forces_rmse"])
