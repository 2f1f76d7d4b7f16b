"""Trainings of other packages' models by the command, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import NO_FIGURES, read_csv, train
from support.other_models import INSTALLED

SMALL = {
    "mace": ["channels=4", "max_ell=2", "correlation=2", "num_bessel=4", "radial_mlp=[8]", "mlp_irreps=4x0e"],
    "nequip": ["num_layers=2", "num_features=4", "radial_mlp_width=8"],
    "allegro": ["num_layers=1", "num_scalar_features=8", "num_tensor_features=4"],
    "sevennet": ["channels=4", "num_convolution_layer=2", "weight_nn_hidden_neurons=[8]"],
}
DATA = ["data.num_frames=24", "data.split={val:4,test:4}", "data.batch_size=4", "max_epochs=2", "logger=csv"]
DATA += NO_FIGURES


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="none of these packages is installed")
@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "32-true") for name in INSTALLED), *((name, "64-true") for name in INSTALLED[:1])]
)
def test_a_model_is_chosen_by_its_name(name: str, precision: str, tmp_path: Path) -> None:
    options = [f"model.{option}" for option in SMALL[name]]
    arguments = ["experiment=alloy", f"model={name}", *options, *DATA, f"trainer.precision={precision}"]
    if precision == "64-true":
        arguments.append("data.dtype=float64")
    done = train(*arguments, folder=tmp_path)
    assert done.code == 0, done.err[-3000:]
    (folder,) = done.runs
    rows = read_csv(folder)
    errors = [float(row["val0_epoch/forces_rmse"]) for row in rows if row.get("val0_epoch/forces_rmse")]
    assert len(errors) == 2
    assert errors[1] < errors[0]
    assert "TorchScript" not in done.err


def test_a_model_without_its_package_names_the_command_that_installs_it(tmp_path: Path) -> None:
    missing = next(name for name in SMALL if name not in INSTALLED)
    done = train(f"model={missing}", *DATA, folder=tmp_path)
    assert done.code != 0
    assert f"pip install 'potential-harness[{missing}]'" in done.err
    assert "Traceback" not in done.err
