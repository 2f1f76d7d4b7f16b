"""A model comes back from its checkpoint alone, with the predictions of its validation, and runs nothing else."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk, molecule
from support.bad_input import frames
from support.commands import ROOT
from support.other_models import INSTALLED
from support.trained import DOUBLE, KeepValidation, same_bits, trained

import harness
from harness.trained import TrainedCheckpoint, TrainedModel

ALL = ["schnet", *(pytest.param(name, marks=pytest.mark.slow) if name == "allegro" else name for name in INSTALLED)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KeepValidation]:
    """Checkpoint and last validation of a SchNet in float32, whose training data are gone."""
    path, kept = trained(tmp_path_factory.mktemp("run"))
    (path.parents[1] / "frames.xyz").unlink()
    return path, kept


@pytest.fixture(scope="module")
def checkpoint(run: tuple[Path, KeepValidation]) -> Path:
    return run[0]


@pytest.mark.parametrize("name", ALL)
def test_predictions_are_those_of_the_validation(name: str, tmp_path: Path) -> None:
    path, kept = trained(tmp_path, *DOUBLE, model=name)
    shutil.copy(path, tmp_path / "moved.ckpt")
    (tmp_path / "frames.xyz").unlink()
    model = harness.load_model(tmp_path / "moved.ckpt")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    same_bits(model, kept)
    if name == "nequip":

        def compiled(content: dict[str, Any]) -> None:
            content["made_with"]["architecture"]["compile_mode"] = "compile"

        same_bits(harness.load_model(changed(path, tmp_path / "compiled.ckpt", compiled)), kept)


def test_averaged_weights_and_references_from_a_file_are_in_it(tmp_path: Path) -> None:
    isolated = tmp_path / "isolated.xyz"
    atom = "1\nProperties=species:S:1:pos:R:3 energy={}\n{} 0 0 0\n"
    isolated.write_text(atom.format(-1.5, "Cu") + atom.format(-2.5, "Ag"))
    options = ("callbacks=[default,ema]", "callbacks.parity=null", f"model.energy_shifts={isolated}")
    path, kept = trained(tmp_path, *DOUBLE, *options)
    isolated.unlink()
    content = torch.load(path, weights_only=True)
    last = {name: value for name, value in content["current_model_state"].items() if name.startswith("model.")}
    assert any(not torch.equal(value, content["state_dict"][name]) for name, value in last.items())
    model = harness.load_model(path)
    same_bits(model, kept)
    assert model.energy_shifts == {"Cu": -1.5, "Ag": -2.5}
    assert TrainedCheckpoint.read(path).are_averaged


@pytest.mark.parametrize(
    ("settings", "weights", "positions"),
    [
        (("trainer.precision=bf16-mixed",), torch.float32, torch.float32),
        (("trainer.precision=32-true", "data.dtype=float64"), torch.float32, torch.float64),
    ],
)
def test_dtypes_are_those_of_the_training(
    settings: tuple[str, ...], weights: torch.dtype, positions: torch.dtype, tmp_path: Path
) -> None:
    path, kept = trained(tmp_path, *settings)
    model = harness.load_model(path)
    assert {parameter.dtype for parameter in model.parameters()} == {weights}
    assert model.dtype == positions == model.batch_of(frames()[0])["pos"].dtype
    if "trainer.precision=bf16-mixed" in settings:
        with torch.autocast("cpu", torch.bfloat16):
            same_bits(model, kept)
    else:
        same_bits(model, kept)


def test_it_has_what_its_users_need_to_know(run: tuple[Path, KeepValidation]) -> None:
    model = harness.load_model(run[0])
    same_bits(model, run[1])
    assert (model.type_names, model.cutoff, model.dtype) == (["Cu", "Ag"], 3.5, torch.float32)
    assert (model.units["forces"], model.units["stress"], model.units["cutoff"]) == ("eV/Å", "eV/Å³", "Å")
    assert model.energy_shifts is not None
    assert model.record["architecture"]["energy_shifts"] == model.energy_shifts  # numbers, whatever the config had
    assert model.record["architecture"]["_target_"] == "harness.models.schnet_force_field"
    assert model.record["packages"].keys() == {"torch_geometric"}
    predictions = model(model.batch_of(frames()[:3]))
    assert predictions["total_energy"].shape == (3, 1)
    alone = [model(model.batch_of(atoms))["total_energy"].item() for atoms in frames()[:3]]
    torch.testing.assert_close(predictions["total_energy"].flatten().tolist(), alone, rtol=0, atol=1e-6)
    assert not any(value.requires_grad for value in predictions.values())
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(model.batch_of(frames()[0]))["forces"], model(model.batch_of(frames()[0]))["forces"])


def test_arguments_of_the_builder_can_be_changed(run: tuple[Path, KeepValidation]) -> None:
    path, kept = run
    model = harness.load_model(path, changes={"stress": False})
    batch, expected = kept.seen[0]
    predictions = model(batch)
    assert "stress" in expected
    assert "stress" not in predictions
    assert torch.equal(predictions["forces"], expected["forces"])


def test_unknown_elements_are_named_with_the_known_ones(checkpoint: Path) -> None:
    model = harness.load_model(checkpoint)
    with pytest.raises(ValueError, match=r"knows Cu, Ag, found H, O in H2O"):
        model.batch_of(molecule("H2O"))
    with pytest.raises(ValueError, match=r"structure 1: .*found Au"):
        model.batch_of([bulk("Cu"), bulk("Au")])


# --- files that are no such checkpoint ---


def changed(path: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


def test_a_checkpoint_of_0_1_0_says_what_it_lacks() -> None:
    with pytest.raises(
        ValueError, match=r"lacks .*architecture, statistics, cutoff, dtype, units.*0\.1\.0.*ckpt_path="
    ):
        harness.load_model(ROOT / "tests" / "fixtures" / "checkpoint-0.1.0.ckpt")


def test_files_that_are_no_checkpoint_are_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    flipped = bytearray(whole)
    middle = whole.index(b"data/0") + 200
    flipped[middle : middle + 4] = bytes(255 - byte for byte in flipped[middle : middle + 4])
    files = {
        "text.ckpt": (b"epoch,loss\n1,2\n", "is no checkpoint of this package"),
        "cut.ckpt": (whole[: len(whole) // 2], f"cut off after {len(whole) // 2} bytes"),
        "flipped.ckpt": (bytes(flipped), "is damaged: the checksum"),
        "empty.ckpt": (b"", "is damaged: it is empty"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            harness.load_model(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="it has no state_dict; it has epoch"):
        harness.load_model(tmp_path / "other.ckpt")
    torch.save({"state_dict": {"net.weight": torch.zeros(1)}}, tmp_path / "lightning.ckpt")
    with pytest.raises(ValueError, match="no weight in its state_dict"):
        harness.load_model(tmp_path / "lightning.ckpt")
    with pytest.raises(ValueError, match=r"is a folder, expected a checkpoint in it: .*best\.ckpt"):
        harness.load_model(checkpoint.parents[1])
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt: there is no such file"):
        harness.load_model(tmp_path / "nothing.ckpt")


def test_weights_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    def wider(content: dict[str, Any]) -> None:
        content["made_with"]["architecture"]["hidden_channels"] = 6
        content["made_with"]["packages"]["torch_geometric"] = "1.0"

    with pytest.raises(
        ValueError, match=r"do not fit.*shapes .*\[100, 8\] for \[100, 6\].*torch_geometric 1\.0 \(here"
    ):
        harness.load_model(changed(checkpoint, tmp_path / "wider.ckpt", wider))

    def renamed(content: dict[str, Any]) -> None:
        content["state_dict"]["model.other"] = content["state_dict"].pop("model.energy_model.scales")

    with pytest.raises(ValueError, match=r"the file lacks energy_model\.scales; the model has no other"):
        harness.load_model(changed(checkpoint, tmp_path / "renamed.ckpt", renamed))


def test_arguments_that_the_builder_refuses_are_told(checkpoint: Path, tmp_path: Path) -> None:
    def strange(content: dict[str, Any]) -> None:
        content["made_with"]["architecture"]["hidden_layers"] = 6

    with pytest.raises(ValueError, match=r"cannot be made by harness\.models\.schnet_force_field.*hidden_layers"):
        harness.load_model(changed(checkpoint, tmp_path / "strange.ckpt", strange))


def test_a_missing_package_is_named_with_its_extra(checkpoint: Path, tmp_path: Path) -> None:
    missing = next(name for name in ("mace", "sevennet", "nequip") if name not in INSTALLED)
    target = {"nequip": "harness.models.nequip.nequip_force_field"}.get(
        missing, f"harness.models.{missing}.{missing}_force_field"
    )

    def other(content: dict[str, Any]) -> None:
        content["made_with"]["architecture"] = {"_target_": target, "cutoff": 3.5}

    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'potential-harness\[{missing}\]'"):
        harness.load_model(changed(checkpoint, tmp_path / "other.ckpt", other))


# --- targets ---


def with_architecture(checkpoint: Path, target: Path, architecture: dict[str, Any]) -> Path:
    def change(content: dict[str, Any]) -> None:
        content["made_with"]["architecture"] = architecture

    return changed(checkpoint, target, change)


MALICIOUS = {
    "a function of the system": {"_target_": "os.mkdir", "path": "MARKER"},
    "the same behind a module of this package": {"_target_": "harness.models.packages.guest.__globals__", "x": 1},
    "a module that a module has imported": {"_target_": "harness.models.scale_shift.os.mkdir", "path": "MARKER"},
    "a function of this package that makes no model": {
        "_target_": "harness.models.isolated_atom_energies",
        "path": "MARKER",
    },
    "a function of this package that unpickles": {"_target_": "harness.models.mace_files.read_mace", "path": "MARKER"},
    "deep inside": {
        "_target_": "harness.models.schnet_force_field",
        "cutoff": 3.5,
        "energy_scales": {"Cu": [{"_target_": "os.mkdir", "_args_": ["MARKER"]}]},
    },
    "inside of torch": {
        "_target_": "harness.models.schnet_force_field",
        "cutoff": {"_target_": "torch.nn.modules.module.torch.hub.os.mkdir", "_args_": ["MARKER"]},
    },
    "not a string": {"_target_": "harness.models.schnet_force_field", "cutoff": {"_target_": ["os.mkdir"]}},
    "an interpolation": {"_target_": "harness.models.schnet_force_field", "cutoff": "${oc.env:HOME}"},
    "a file": {"_target_": "harness.models.schnet_force_field", "cutoff": 3.5, "energy_shifts": "MARKER"},
    "no target": {"cutoff": 3.5},
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_a_malicious_target_is_never_called(case: str, checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "made"

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return str(marker) if value == "MARKER" else value

    path = with_architecture(checkpoint, tmp_path / "bad.ckpt", filled(copy.deepcopy(MALICIOUS[case])))
    for trust in ((), ["my_models"]):
        with pytest.raises(ValueError, match=r"bad\.ckpt"):
            harness.load_model(path, trust=trust)
        assert not marker.exists()


def test_a_malicious_target_would_have_been_called(tmp_path: Path) -> None:
    """The cases above are such that a loader without checks makes the folder."""
    from hydra.utils import instantiate

    instantiate({"inner": [{"_target_": "os.mkdir", "_args_": [str(tmp_path / "made")]}]})
    assert (tmp_path / "made").is_dir()


def test_a_model_of_ones_own_is_imported_when_it_is_trusted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "import os\n"
        "from harness.models import schnet_force_field\n"
        "open(os.path.join(os.path.dirname(__file__), 'imported'), 'w').close()\n"
        "def build(statistics, **options):\n"
        "    return schnet_force_field(statistics, **options)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = torch.load(checkpoint, weights_only=True)["made_with"]["architecture"]
    path = with_architecture(checkpoint, tmp_path / "own.ckpt", {**options, "_target_": "my_models.build"})
    words = r"nothing was imported or called.*would import my_models and call my_models\.build.*trust=\['my_models'\]"
    for trust in ((), "my_model", ["my_models.other"], "harness"):
        with pytest.raises(ValueError, match=words):
            harness.load_model(path, trust=trust)
    assert not (tmp_path / "imported").exists()
    for trust in ("my_models", ["elsewhere", "my_models.build"]):
        assert isinstance(harness.load_model(path, trust=trust), TrainedModel)
    assert (tmp_path / "imported").exists()
    path = with_architecture(
        checkpoint, tmp_path / "own.ckpt", {"_target_": "my_models.os.mkdir", "path": str(tmp_path / "x")}
    )
    with pytest.raises(ValueError, match=r"is \w+\.mkdir, which is defined elsewhere"):
        harness.load_model(path, trust="my_models")
    assert not (tmp_path / "x").exists()
    path = with_architecture(checkpoint, tmp_path / "own.ckpt", {**options, "_target_": "nowhere_to_be_found.build"})
    with pytest.raises(ModuleNotFoundError, match=r"nowhere_to_be_found cannot be imported.*PYTHONPATH"):
        harness.load_model(path, trust="nowhere_to_be_found")
    with pytest.raises(TypeError, match="trust is a name"):
        harness.load_model(path, trust=True)  # type: ignore[arg-type]
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") is None
