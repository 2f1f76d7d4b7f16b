"""The example of a dipole: trained, tested, drawn, evaluated, loaded and used, all from YAML and the file of labels."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from support.commands import ROOT

import harness
from harness.calculators import HarnessCalculator
from harness.evaluate import main
from harness.job import execute, prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLE = ROOT / "examples" / "dipole"
SETTINGS = ("experiment=dipole", "max_epochs=3", "logger=none", "trainer=cpu", "callbacks=[default,ema]")
SMALL = ("data.split={val:6,test:9}", "precision=float64", "model.hidden_channels=8", "model.num_filters=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], list[Any]]:
    """Folder of a short training on 45 clusters, values of its test, and its test set's frames."""
    folder = tmp_path_factory.mktemp("dipole")
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["water.py", str(folder / "water.xyz"), "45"])
    patch.syspath_prepend(str(EXAMPLE))
    runpy.run_path(str(EXAMPLE / "water.py"), run_name="__main__")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        own = [f"hydra.searchpath=[file://{EXAMPLE / 'conf'}]", f"data.train={folder / 'water.xyz'}"]
        config = compose("train", [*own, *SETTINGS, *SMALL, f"output_dir={folder}"])
    job = prepare(config)
    values = execute(job)
    frames = [frame.atoms for frame in job.datamodule.test_sets[0].frames]
    yield folder, values, frames
    patch.undo()


def test_the_loss_and_the_test_have_the_dipole(trained: tuple[Path, dict[str, float], list[Any]]) -> None:
    folder, values, _ = trained
    for prefix in ("train_loss_epoch/dipole_mse", "val0_epoch/dipole_rmse", "test0_epoch/dipole_mae"):
        assert np.isfinite(values[prefix]), prefix
    assert (folder / "parity_test0.png").is_file()


def test_an_evaluation_knows_the_labels_of_the_training(
    trained: tuple[Path, dict[str, float], list[Any]], tmp_path: Path
) -> None:
    folder, values, frames = trained
    ase.io.write(tmp_path / "test.xyz", frames, format="extxyz")
    checkpoint = str(folder / "checkpoints" / "best.ckpt")
    arguments = [checkpoint, str(tmp_path / "test.xyz"), "trust=[dipole_model]", "data.eval_batch_size=10"]
    main([*arguments, f"output_dir={tmp_path / 'one'}", "--write", str(tmp_path / "predicted.xyz")])
    found = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert found["labels"] == {"dipole": "dipole"}
    assert (
        found["files"][0]["labels"]["dipole"] == sum("dipole" in atoms.calc.results for atoms in frames) < len(frames)
    )
    assert found["units"]["dipole_rmse"] == "e·Å"
    assert set(found["all"]["groups"]) == {"monomer", "dimer", "trimer"}
    read = ase.io.read(tmp_path / "predicted.xyz", ":")
    errors = np.array(
        [atoms.info["predicted_dipole"] - atoms.get_dipole_moment() for atoms in read if "dipole" in atoms.calc.results]
    )
    assert found["all"]["values"]["dipole_rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-9)
    assert found["all"]["values"]["dipole_rmse"] == pytest.approx(values["test0_epoch/dipole_rmse"], rel=1e-9)

    for atoms in read:
        atoms.info["mu"] = atoms.calc.results.pop("dipole", None)
    ase.io.write(tmp_path / "renamed.xyz", [atoms for atoms in read if atoms.info["mu"] is not None], format="extxyz")
    other = [checkpoint, str(tmp_path / "renamed.xyz"), "trust=[dipole_model]", "prefix=new_"]
    main([*other, f"output_dir={tmp_path / 'two'}", "data.labels={dipole: {key: mu}}"])
    again = json.loads((tmp_path / "two" / "evaluation.json").read_text())["all"]["values"]["dipole_rmse"]
    assert again == pytest.approx(found["all"]["values"]["dipole_rmse"], rel=1e-6)  # of eight decimals


def test_a_loaded_model_and_its_calculator_predict_the_dipole(
    trained: tuple[Path, dict[str, float], list[Any]],
) -> None:
    folder, _, frames = trained
    model = harness.load_model(folder / "checkpoints" / "best.ckpt", trust=["dipole_model"])
    assert model.units["dipole"] == "e·Å"
    assert [entry.field for entry in model.extras.labels] == ["dipole"]
    predicted = model(model.batch_of(frames[:2]))["dipole"].detach()
    atoms = frames[1].copy()
    atoms.calc = HarnessCalculator(model)
    np.testing.assert_allclose(atoms.get_dipole_moment(), predicted[1].numpy(), rtol=1e-9, atol=1e-12)
    assert atoms.get_charges().sum() == pytest.approx(0.0, abs=1e-9)
    assert not np.allclose(predicted[0], predicted[1])
