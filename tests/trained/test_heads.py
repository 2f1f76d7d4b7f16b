"""Models of several data sets, rebuilt from a checkpoint: energies of each set, by its references or by its head."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from support.bad_input import composed
from support.commands import NO_FIGURES
from support.mixtures import write_sets
from support.other_models import INSTALLED
from support.trained import SMALL

import harness
from harness.calculators import HarnessCalculator
from harness.evaluate import main as evaluate
from harness.export import main as export
from harness.export.command import _choose_level
from harness.export.mace import mace_predictions
from harness.job import execute, prepare
from harness.support.guest import guest
from harness.trained import TrainedCheckpoint

needs_mace = pytest.mark.skipif("mace" not in INSTALLED, reason="mace is not installed")


def trained(folder: Path, *overrides: str, model: str = "schnet") -> tuple[Path, Atoms, Path]:
    """Checkpoint of an epoch on metals and molecules, a molecule with its labels, and the file that it is from."""
    sets = write_sets(folder)
    checkpoint = of_sets(folder, sets, *overrides, model=model)
    file = Path(sets["molecules"]["train"])
    return checkpoint, ase.io.read(file, index=0), file


def of_sets(folder: Path, sets: dict[str, Any], *overrides: str, model: str = "schnet") -> Path:
    """Checkpoint of an epoch on sets."""
    options = [f"model={model}", *(f"model.{option}" for option in SMALL[model]), *overrides]
    common = ["cutoff=3.5", "max_epochs=1", "logger=none", "trainer.accelerator=cpu", "precision=float64", "test=false"]
    data = ["data=mixture", f"data.sets={json.dumps(sets)}".replace('"', ""), "data.batch_size=12"]
    config = composed([*data, *common, *options, *NO_FIGURES, f"output_dir={folder / 'run'}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        execute(prepare(config))
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def of_schnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Atoms, Path]:
    return trained(tmp_path_factory.mktemp("schnet"))


def energy(model: harness.TrainedModel, atoms: Atoms, **options: Any) -> float:
    return float(model(model.batch_of(atoms, **options))["total_energy"])


def test_energies_are_those_of_the_set_that_was_chosen(of_schnet: tuple[Path, Atoms, Path]) -> None:
    checkpoint, atoms, _ = of_schnet
    plain, chosen = harness.load_model(checkpoint), harness.load_model(checkpoint, head="molecules")
    sets = plain.record["statistics"]["set_references"]
    json.dumps(sets)  # plain data
    assert (plain.heads, plain.head, chosen.head) == ((), None, "molecules")
    symbols = atoms.get_chemical_symbols()
    difference = sum(sets["molecules"][each] - plain.energy_shifts[each] for each in symbols)
    assert abs(difference) > 1000
    assert energy(chosen, atoms) == pytest.approx(energy(plain, atoms) + difference, abs=1e-8)
    assert abs(energy(chosen, atoms) - atoms.get_potential_energy()) < 30
    atoms.calc = HarnessCalculator(checkpoint, head="molecules")
    assert atoms.get_potential_energy() == pytest.approx(energy(chosen, atoms), abs=1e-9)


def test_an_evaluation_is_of_the_set_that_was_chosen(
    of_schnet: tuple[Path, Atoms, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _, file = of_schnet
    errors = {}
    for head in ("null", "molecules"):
        capsys.readouterr()
        evaluate([str(checkpoint), str(file), f"head={head}", f"output_dir={tmp_path / head}", "parity=false"])
        # the level of the file is that of the set
        assert ("The model's errors of energies will be about" in capsys.readouterr().out) is (head == "null")
        with (tmp_path / head / "evaluation.csv").open() as table:
            rows = [row for row in csv.DictReader(table) if row["component"] == "per_atom_energy_mae"]
        errors[head] = float(rows[0]["value"])
    assert errors["molecules"] < 10
    assert errors["null"] > 100


def test_an_evaluation_tells_of_energies_that_the_chosen_set_says_nothing_of(
    of_schnet: tuple[Path, Atoms, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elements that only other sets have, with or without labels; and compositions that it leaves open."""
    checkpoint, _, file = of_schnet
    metal = ase.io.read(file.with_name("metal.xyz"), ":")
    unlabelled = metal[1].copy()
    ase.io.write(tmp_path / "mixed.xyz", [*ase.io.read(file, ":2"), metal[0], unlabelled], format="extxyz")

    def told(head: str, *files: str) -> str:
        capsys.readouterr()
        output = ("--write", str(tmp_path / f"{head}.xyz"), f"output_dir={tmp_path / head}", "parity=false")
        evaluate([str(checkpoint), *files, f"head={head}", *output, "--overwrite"])
        return capsys.readouterr().out

    mixed = str(tmp_path / "mixed.xyz")
    text = told("molecules", mixed)
    assert f"{mixed}: 2 of 4 frames have Cu, which no frame of the set molecules of the training has" in text
    assert "energies of these frames are not those of molecules. The first is" in text
    assert "2 of 4 frames have C, H, which no frame of the set metal" in told("metal", mixed)  # water and methane
    for text in (told("null", mixed), told("molecules", str(file))):
        assert "which no frame of the set" not in text
    # three compositions fix the references of H, C and O; those of copper cells with up to one O those of Cu and O
    assert "have an arbitrary reference" not in told("molecules", str(file))


def test_references_that_a_set_leaves_open_are_recorded_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = write_sets(tmp_path)
    water = [atoms for atoms in ase.io.read(sets["molecules"]["train"], ":") if len(atoms) == 3]
    ase.io.write(sets["molecules"]["train"], water, format="extxyz")
    sets["molecules"]["split"] = {"val": 1}
    checkpoint = of_sets(tmp_path, sets)
    recorded = TrainedCheckpoint.read(checkpoint).record["statistics"]["set_undetermined"]
    assert recorded["metal"] == {}
    of_molecules = {name: np.array(row) for name, row in recorded["molecules"].items()}
    assert of_molecules["H"] == pytest.approx(-of_molecules["O"] / 2)  # water fixes a sum
    radical = Atoms("OH", [[0, 0, 0], [0, 0, 1.0]])
    radical.calc = SinglePointCalculator(radical, energy=-2010.0, forces=np.zeros((2, 3)))
    ase.io.write(tmp_path / "test.xyz", [*water[:2], radical], format="extxyz")
    capsys.readouterr()
    evaluate([str(checkpoint), str(tmp_path / "test.xyz"), "head=molecules", f"output_dir={tmp_path / 'out'}"])
    text = capsys.readouterr().out
    assert "test.xyz, of the set molecules: the energies of 1 of 3 frames have an arbitrary reference" in text
    assert "H, O in other proportions than in the training frames" in text


def test_a_set_that_there_is_not(of_schnet: tuple[Path, Atoms, Path]) -> None:
    checkpoint, _, _ = of_schnet
    with pytest.raises(ValueError, match=r"head=bulk is no data set of the training.*expected one of metal, molecules"):
        harness.load_model(checkpoint, head="bulk")
    with pytest.raises(
        ValueError, match=r"has no heads, found head=metal; leave it out.*load_model\(path, head='metal'\)"
    ):
        HarnessCalculator(harness.load_model(checkpoint), head="metal")


def test_an_element_that_the_chosen_set_has_not_is_told_once(of_schnet: tuple[Path, Atoms, Path]) -> None:
    checkpoint, atoms, _ = of_schnet
    model = harness.load_model(checkpoint, head="molecules")
    copper = Atoms("CuO", positions=[[0, 0, 0], [0, 0, 1.9]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy(model, atoms)
        energy(harness.load_model(checkpoint), copper)  # of no set
    with pytest.warns(UserWarning, match=r"the set molecules of the training of .* has no frame with Cu: its") as told:
        energy(model, copper)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy(model, copper)
    copper.calc = HarnessCalculator(harness.load_model(checkpoint, head="molecules"))
    with pytest.warns(UserWarning, match="no frame with Cu"):
        copper.get_potential_energy()


def test_exported_energies_are_those_of_the_mixture_or_of_a_set(
    of_schnet: tuple[Path, Atoms, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, atoms, _ = of_schnet
    checkpoint = TrainedCheckpoint.read(path)
    batch = harness.load_model(path).batch_of(atoms)
    model = checkpoint.build().eval()
    (sentence,) = _choose_level(model, checkpoint, None)
    assert sentence == "those of the mixture, which are moved; of one of its sets (metal, molecules) by --head SET"
    plain = float(model(batch)["total_energy"])
    assert plain == pytest.approx(energy(harness.load_model(path), atoms), abs=1e-9)
    (sentence,) = _choose_level(model, checkpoint, "molecules")
    assert sentence == "those of the set molecules; Cu, which it does not have, with references of other sets"
    moved = float(model(batch)["total_energy"])
    assert moved == pytest.approx(energy(harness.load_model(path, head="molecules"), atoms), abs=1e-9)
    assert abs(moved - plain) > 1000
    with pytest.raises(ValueError, match="head=bulk is no data set of the training"):
        _choose_level(checkpoint.build(), checkpoint, "bulk")
    with pytest.raises(ValueError, match=r"--head=metal: the model has the heads metal, .*the file has all of them"):
        _choose_level(WithHeads(), checkpoint, "metal")
    assert _choose_level(WithHeads(), checkpoint, None) == []
    with pytest.raises(SystemExit):
        export([str(path), "--to", "state-dict", "-o", str(tmp_path / "a.pt"), "--head", "metal"])
    assert "--head is of files of other packages" in capsys.readouterr().err


class WithHeads(torch.nn.Module):
    """A model with a head for each set."""

    set_heads = ("metal", "molecules")


@needs_mace
def test_heads_of_mace_have_the_references_of_their_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, atoms, _ = trained(tmp_path, "model.heads=sets", model="mace")
    assert "each head of the model has the references of its set" in capsys.readouterr().out
    model = harness.load_model(checkpoint)
    assert model.heads == ("metal", "molecules")
    references = model.record["statistics"]["set_references"]["molecules"]
    level = sum(references[each] for each in atoms.get_chemical_symbols())
    assert abs(energy(model, atoms, head="molecules") - level) < 30  # energies were not moved
    assert abs(energy(model, atoms, head="metal") - energy(model, atoms, head="molecules")) > 1000
    with pytest.raises(ValueError, match="has the heads metal, molecules, none was chosen"):
        energy(model, atoms)
    assert energy(harness.load_model(checkpoint, head="molecules"), atoms) == energy(model, atoms, head="molecules")
    found = {}
    for head in model.heads:
        atoms.calc = HarnessCalculator(model, head=head)
        found[head] = atoms.get_potential_energy()
        assert found[head] == pytest.approx(energy(model, atoms, head=head), abs=1e-9)
    # forces of a graph are those of its head, also beside graphs of the other
    both = model.batch_of([atoms, atoms], head="metal")
    both["set_index"] = torch.tensor([0, 1])
    forces = model(both)["forces"].reshape(2, -1, 3).numpy()
    assert np.abs(forces[0] - forces[1]).max() > 1e-6
    np.testing.assert_allclose(forces[1], atoms.get_forces(), atol=1e-10)

    export([str(checkpoint), "--to", "mace", "-o", str(tmp_path / "two.model")])  # tried with both heads
    assert 'head="metal"' in capsys.readouterr().out
    for index, head in enumerate(model.heads):
        predicted = mace_predictions(tmp_path / "two.model", atoms, index)
        assert float(predicted["total_energy"]) == pytest.approx(found[head], abs=1e-8)


@needs_mace
def test_a_file_of_mace_predicts_the_energies_of_the_set_that_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, atoms, _ = trained(tmp_path, model="mace")
    found: dict[str | None, float] = {}
    for head in (None, "molecules", "metal"):
        file = tmp_path / f"{head}.model"
        capsys.readouterr()
        export([str(checkpoint), "--to", "mace", "-o", str(file), *([] if head is None else ["--head", head])])
        told = capsys.readouterr().out
        assert ("those of the mixture, which are moved" if head is None else f"those of the set {head}") in told
        with guest():
            from mace.calculators import MACECalculator

            of_file = torch.load(file, weights_only=False)
            atoms.calc = MACECalculator(models=of_file, device="cpu", default_dtype="float64")
        model = harness.load_model(checkpoint, head=head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the metals have no H
            expected = model(model.batch_of(atoms))
        assert atoms.get_potential_energy() == pytest.approx(float(expected["total_energy"]), abs=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), expected["forces"].detach().numpy(), atol=1e-9)
        found[head] = atoms.get_potential_energy()
    assert min(abs(found[None] - found["molecules"]), abs(found["metal"] - found["molecules"])) > 1000


@needs_mace
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=[metal]"], r"model\.heads is null, sets, or a list of the names.*\[metal, molecules\]"),
        (["model.heads=sets", "model.energy_shifts={H: 1, C: 1, O: 1, Cu: 1}"], r"data\.sets\.NAME\.references"),
        (["model.heads=sets", "data.references=common"], r"data\.references=common is for a model with the same"),
    ],
)
def test_heads_that_do_not_go_with_the_data_in_mace(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=words):
        trained(tmp_path, *overrides, model="mace")
