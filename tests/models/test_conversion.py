"""Models of other packages' files: the same energies and forces after the conversion, and nothing run unasked.

For the packages that are installed, see ``test_other_models.py``.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from support.bad_input import composed
from support.foreign_files import NAMES, REFERENCES, SUFFIX, write
from support.other_models import INSTALLED

import harness
import harness.convert
from harness.convert import main
from harness.data import Frame, collate, frame_to_sample
from harness.export import main as export
from harness.export.command import FORMATS
from harness.job import prepare
from harness.models.conversion import kind_of, patterns
from harness.support.guest import guest

pytestmark = pytest.mark.skipif(not INSTALLED, reason="none of these packages is installed")
each = pytest.mark.parametrize("name", INSTALLED)
with_mace = pytest.mark.skipif("mace" not in INSTALLED, reason="mace-torch is not installed")
with_nequip = pytest.mark.skipif("nequip" not in INSTALLED, reason="nequip is not installed")
with_sevennet = pytest.mark.skipif("sevennet" not in INSTALLED, reason="sevenn is not installed")


def crystal(names: tuple[str, ...] = NAMES, seed: int = 5) -> Atoms:
    atoms = bulk("Cu", "fcc", a=4.0, cubic=True) * (2, 1, 1)
    atoms.rattle(0.2, seed=seed)
    atoms.symbols = np.random.default_rng(seed).choice(list(names), size=len(atoms)).tolist()
    return atoms


def converted(file: Path, *options: str) -> Path:
    """Checkpoint of the file by the command line."""
    output = file.with_name("converted.ckpt")
    main([str(file), "--unpickle", "-o", str(output), *options])
    return output


def predictions(path: Path, atoms: Atoms) -> dict[str, torch.Tensor]:
    model = harness.load_model(path)
    return model(model.batch_of(atoms))


@each
def test_energies_and_forces_are_those_of_the_package(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"theirs.{SUFFIX[name]}"
    own = write(name, file)
    found = predictions(converted(file), crystal())
    expected = _CALLS[name](own, crystal())
    assert found["total_energy"].dtype == torch.float64
    assert float(expected["forces"].abs().max()) > 1e-3
    torch.testing.assert_close(found["total_energy"].flatten(), expected["energy"], rtol=1e-14, atol=1e-10)
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=1e-10, atol=1e-10)
    model = harness.load_model(tmp_path / "converted.ckpt")
    assert (model.cutoff, model.type_names) == (4.0, list(NAMES))
    assert model.energy_shifts == pytest.approx(REFERENCES, rel=1e-7 if name == "sevennet" else 1e-15)
    out = capsys.readouterr().out
    assert "the code that it holds has been run (--unpickle)" in out
    assert "compared    energies and forces and stresses of 2 structures are those of" in out


@each
def test_what_was_converted_goes_home_again(name: str, tmp_path: Path) -> None:
    file, home = tmp_path / f"theirs.{SUFFIX[name]}", tmp_path / "home"
    expected = _CALLS[name](write(name, file), crystal())
    fmt = next(fmt for fmt in FORMATS.values() if name in fmt.models)
    export([str(converted(file)), "--to", fmt.name, "-o", str(home)])
    model = harness.load_model(file.with_name("converted.ckpt"))
    found = fmt.predictions(home, crystal(), model.batch_of(crystal()), model.model)
    # sevenn computes in float32, total energies too
    energy, forces = (0.02, 2e-5) if name == "sevennet" else (1e-9, 1e-10)
    torch.testing.assert_close(found["total_energy"].flatten(), expected["energy"], rtol=0, atol=energy)
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=0, atol=forces)


@pytest.mark.slow
@each
def test_weights_of_float32_stay_float32(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"theirs.{SUFFIX[name]}"
    write(name, file, "float32")
    model = harness.load_model(converted(file))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@each
def test_nothing_is_run_without_being_asked_for(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "unpickled"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(marker),)

    signs = {"mace": "mace.modules", "sevennet": ["model_state_dict", "num_convolution_layer"]}
    file = tmp_path / "bad.model"
    torch.save([signs.get(name, ["hyper_parameters", "nequip"]), Malicious()], file)
    with pytest.raises(SystemExit):
        main([str(file), "-o", str(tmp_path / "out.ckpt")])
    error = capsys.readouterr().err
    assert "a pickle: reading it runs the code that it holds" in error
    assert "--unpickle" in error
    typed = ["model=from_checkpoint", f"init_from={file}", "logger=none", "trainer.accelerator=cpu"]
    with pytest.raises(ValueError, match=r"harness-convert .*bad\.model --unpickle -o bad\.ckpt"):
        prepare(composed(typed))
    assert not marker.exists()
    assert not (tmp_path / "out.ckpt").exists()


@each
@pytest.mark.parametrize(("field", "off"), [("forces", 1e-6), ("total_energy", 1e-3), ("stress", 1e-6)])
def test_a_model_that_predicts_something_else_is_not_written(
    name: str,
    field: str,
    off: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = harness.convert._read

    def wrong(*arguments: Any) -> Any:
        converted = read(*arguments)

        def both(batch: Any) -> Any:
            theirs, ours = converted.both(batch)
            return theirs, {**ours, field: ours[field] + off * (1 if converted.dtype == "float64" else 1e4)}

        return dataclasses.replace(converted, both=both)

    monkeypatch.setattr(harness.convert, "_read", wrong)
    write(name, tmp_path / f"theirs.{SUFFIX[name]}")
    with pytest.raises(SystemExit):
        converted(tmp_path / f"theirs.{SUFFIX[name]}")
    assert "the converted model is another one" in capsys.readouterr().err
    assert not (tmp_path / "converted.ckpt").exists()


@each
def test_a_training_starts_from_what_was_converted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator

    from harness.job import execute

    file = tmp_path / f"theirs.{SUFFIX[name]}"
    write(name, file)
    path = converted(file)
    model, frames = harness.load_model(path), [crystal(("Cu", "O"), seed) for seed in range(9)]
    for atoms in frames:  # their labels are the model's own: there is no error before the first step
        labels = model(model.batch_of(atoms))
        atoms.calc = SinglePointCalculator(atoms, energy=float(labels["total_energy"]), forces=labels["forces"].numpy())
    ase.io.write(tmp_path / "frames.xyz", frames, format="extxyz")
    typed = [
        "model=from_checkpoint",
        f"init_from={path}",
        "data=file",
        f"data.train={tmp_path / 'frames.xyz'}",
        "data.split={val:3}",
        "data.dtype=float64",
        "trainer.precision=64-true",
        "trainer.accelerator=cpu",
        "logger=none",
        "callbacks=none",
        "max_epochs=1",
        "test=false",
        f"output_dir={tmp_path}",
    ]
    job = prepare(composed(typed))
    execute(job)
    out = capsys.readouterr().out
    assert job.config.cutoff == 4.0
    (line,) = [line for line in out.splitlines() if line.startswith("before the first step")]
    energy, forces = float(line.split("energies ")[1].split()[0]), float(line.split("forces ")[1].split()[0])
    assert energy < 1e-7  # positions are written with 8 digits
    assert forces < 1e-6


def _called_mace(own: Any, atoms: Atoms, head: int = 0) -> dict[str, torch.Tensor]:
    """MACE as its calculator calls it, but for the neighbour list."""
    sample = frame_to_sample(Frame(atoms), NAMES, 4.0, dtype=torch.float64)
    batch = collate([sample], torch.float64)
    outputs = own(
        {
            "positions": batch["pos"],
            "node_attrs": torch.nn.functional.one_hot(batch["atom_types"], len(NAMES)).double(),
            "edge_index": batch["edge_index"],
            "unit_shifts": batch["edge_cell_shift"],
            "shifts": batch["edge_cell_shift"] @ batch["cell"][0],
            "cell": batch["cell"].reshape(-1, 3),
            "batch": batch["batch"],
            "ptr": torch.tensor([0, len(atoms)]),
            "head": torch.tensor([head]),
        }
    )
    return {"energy": outputs["energy"].detach(), "forces": outputs["forces"].detach()}


def _called_nequip(own: Any, atoms: Atoms) -> dict[str, torch.Tensor]:
    batch = collate([frame_to_sample(Frame(atoms), NAMES, 4.0, dtype=torch.float64)], torch.float64)
    outputs = own(batch)
    return {"energy": outputs["total_energy"].detach().flatten(), "forces": outputs["forces"].detach()}


def _called_sevennet(own: Any, atoms: Atoms) -> dict[str, torch.Tensor]:
    """SevenNet's layers in float64, but for the one-hot vectors, which it makes in float32, and its graph, likewise."""
    batch = collate([frame_to_sample(Frame(atoms), NAMES, 4.0, dtype=torch.float64)], torch.float64)
    center, neighbor = batch["edge_index"]
    vectors = batch["pos"][neighbor] - batch["pos"][center] + batch["edge_cell_shift"] @ batch["cell"][0]
    data: dict[str, Any] = {**batch, "x": batch["atom_types"], "edge_vec": vectors.requires_grad_()}
    data["cell_volume"] = torch.linalg.det(batch["cell"])
    for layer in own.children():
        data = layer(data)
        if data["x"].dim() == 2 and data["x"].dtype == torch.float32:
            data["x"], data["node_attr"] = data["x"].double(), data["node_attr"].double()
    return {
        "energy": data["inferred_total_energy"].detach().reshape(-1),
        "forces": data["inferred_force"].detach(),
    }


_CALLS = {
    "mace": _called_mace,
    "nequip": _called_nequip,
    "allegro": _called_nequip,
    "sevennet": _called_sevennet,
}


@with_mace
def test_fewer_elements_of_mace_have_the_same_energies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write("mace", tmp_path / "theirs.model")
    path = converted(tmp_path / "theirs.model", "--elements", "O", "Cu")
    found, expected = predictions(path, crystal(("Cu", "O"))), _called_mace(own, crystal(("Cu", "O")))
    torch.testing.assert_close(found["total_energy"].flatten(), expected["energy"], rtol=1e-14, atol=1e-9)
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=1e-9, atol=1e-9)
    assert harness.load_model(path).type_names == ["O", "Cu"]
    assert "left out    rows of H, C: of elements that were not asked for" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "theirs.model"), "--unpickle", "-o", str(tmp_path / "x.ckpt"), "--elements", "O", "Au"])
    assert "the model has no Au; it has H, C, O, Cu" in capsys.readouterr().err


@with_mace
def test_a_head_of_mace_is_chosen_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write("mace", tmp_path / "theirs.model", heads=["pt_head", "mine"], atomic_inter_shift=[0.1, 0.4])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "theirs.model"), "--unpickle", "-o", str(tmp_path / "x.ckpt")])
    assert "the model has the heads pt_head, mine: choose one by --head" in capsys.readouterr().err
    found = predictions(converted(tmp_path / "theirs.model", "--head", "mine"), crystal())
    expected, other = _called_mace(own, crystal(), 1), _called_mace(own, crystal(), 0)
    torch.testing.assert_close(found["total_energy"].flatten(), expected["energy"], rtol=1e-14, atol=1e-9)
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=1e-9, atol=1e-9)
    assert float((expected["forces"] - other["forces"]).abs().max()) > 1e-4


@with_mace
def test_other_kinds_of_mace_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mace.modules as modules

    torch.save(torch.nn.ModuleDict({"zbl": modules.ZBLBasis(p=5)}), tmp_path / "zbl.model")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "zbl.model"), "--unpickle", "-o", str(tmp_path / "x.ckpt")])
    assert "holds a ModuleDict; a model of MACE's kind ScaleShiftMACE is expected" in capsys.readouterr().err


@pytest.mark.slow
@with_nequip
def test_a_package_of_nequip_has_the_energies_of_its_checkpoint(tmp_path: Path) -> None:
    import ase.io
    from nequip.scripts.package import main as nequip_package

    own = write("nequip", tmp_path / "theirs.ckpt", per_type_energy_scales=None)
    ase.io.write(tmp_path / "frames.xyz", [crystal(), crystal()], format="extxyz")
    checkpoint = torch.load(tmp_path / "theirs.ckpt", weights_only=False)
    checkpoint["hyper_parameters"]["info_dict"]["data"] = {  # of the example that a package holds
        "_target_": "nequip.data.datamodule.ASEDataModule",
        "seed": 1,
        **{f"{part}_file_path": str(tmp_path / "frames.xyz") for part in ("train", "val")},
        "transforms": [
            {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", "model_type_names": list(NAMES)},
            {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": 4.0},
        ],
    }
    torch.save(checkpoint, tmp_path / "theirs.ckpt")
    package = tmp_path / "theirs.nequip.zip"
    with guest():
        nequip_package(["build", str(tmp_path / "theirs.ckpt"), str(package)])
    assert kind_of(package) == "nequip package"
    found, expected = predictions(converted(package), crystal()), _called_nequip(own, crystal())
    torch.testing.assert_close(found["total_energy"].flatten(), expected["energy"], rtol=1e-14, atol=1e-10)
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=1e-10, atol=1e-10)


@with_nequip
def test_a_model_of_nequip_that_another_file_describes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("nequip", tmp_path / "theirs.ckpt")
    found = torch.load(tmp_path / "theirs.ckpt", weights_only=False)
    found["hyper_parameters"]["model"]["_target_"] = "nequip.model.ModelFromPackage"
    torch.save(found, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other.ckpt"), "--unpickle", "-o", str(tmp_path / "x.ckpt")])
    assert "its model is made by nequip.model.ModelFromPackage" in capsys.readouterr().err


@with_sevennet
@pytest.mark.parametrize(("shipped", "options"), [("7net-0", []), ("7net-mf-0", ["--head", "PBE"])])
def test_checkpoints_that_sevennet_ships_have_the_energies_of_its_calculator(
    shipped: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sevenn.calculator import SevenNetCalculator

    output = tmp_path / "converted.ckpt"
    main([shipped, "--unpickle", "-o", str(output), *options])
    atoms = bulk("NaCl", "rocksalt", a=5.5) * (2, 1, 1)
    atoms.rattle(0.1, seed=1)
    found = predictions(output, atoms)
    modal = {"modal": options[1]} if options else {}
    atoms.calc = SevenNetCalculator(shipped, device="cpu", **modal)
    assert float(found["total_energy"]) == pytest.approx(atoms.get_potential_energy(), abs=1e-4)  # float32
    np.testing.assert_allclose(found["forces"].numpy(), atoms.get_forces(), atol=2e-5)
    home = tmp_path / "home.pth"
    export([str(output), "--to", "sevennet", "-o", str(home)])
    again = atoms.copy()
    again.calc = SevenNetCalculator(str(home), device="cpu", **modal)
    assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
    np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=2e-5)
    told = capsys.readouterr().out
    assert all(
        line in told for line in ('modal="PBE")', "home.pth --modal PBE", "those of the modality PBE") if options
    )
    assert ("modal" in told.partition("used by")[2]) == bool(options)
    if options:
        with pytest.raises(SystemExit):
            main([shipped, "--unpickle", "-o", str(tmp_path / "x.ckpt")])
        assert "the model has the modalities R2SCAN, PBE, and none is chosen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.model", "--unpickle"], "there is no file nowhere.model"),
        (["{text}", "--unpickle"], "is none of the files that can be converted: MACE model"),
        (["{text}", "-o", "{text}", "--unpickle"], "exists; give another name with -o"),
    ],
)
def test_other_files_are_answered(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    with pytest.raises(SystemExit):
        main([argument.format(text=text) for argument in arguments])
    assert message in capsys.readouterr().err


def test_names_are_counted_by_pattern() -> None:
    assert patterns(["a.0.weight", "a.1.weight", "b"]) == "a.*.weight (2), b"
    assert patterns(["x.y.a.0.weight", "x.y.a.1.weight", "x.y.b"]) == "x.y. … a.*.weight (2), b"
    assert patterns([]) == "none"
