"""Errors before the first step, and advice on references, for models of any kind."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from support.configs import composed

from harness.data.references import undetermined_text
from harness.job import prepare
from harness.job.build import _reference_setting
from harness.job.first_errors import settle_references

LIMIT = timedelta(seconds=60)


def test_a_model_without_energies_starts(tmp_path: Path) -> None:
    config = composed(
        "~model",
        "+model={_target_: support.own_builders.forces_only}",
        *("data.num_frames=12", "data.split={val: 2, test: 2}", "data.batch_size=2", "logger=none", "callbacks=none"),
        *("loss.coeffs.total_energy=null", "metrics.coeffs.per_atom_energy_rmse=null"),
        *("trainer.accelerator=cpu", "dry_step=false", "monitor=val0_epoch/forces_rmse", "lr_scheduler=none"),
    )
    config.output_dir = str(tmp_path)
    job = prepare(config)
    assert job.datamodule.reference_setting is None
    lines, facts = settle_references(job, "keep", LIMIT)
    assert len(lines) == 1
    assert "no energies, forces " in lines[0]
    assert facts["forces_rmse"] > 0
    for choice in ("fit", {"Cu": -1.0}):
        with pytest.raises(ValueError, match="the model predicts no energies"):
            settle_references(job, choice, LIMIT)


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ({"energy_shifts": "fit"}, "model.energy_shifts"),
        ({"per_type_energy_shifts": {"H": 1.0}}, "model.per_type_energy_shifts"),
        ({"needs": {"offsets": "statistics.energy_shifts"}}, "model.offsets"),
        ({"needs": ["statistics"], "width": 3}, None),
    ],
)
def test_advice_on_references_names_the_setting_of_the_model(section: dict[str, object], setting: str | None) -> None:
    assert _reference_setting(OmegaConf.create(section)) == setting
    text = undetermined_text(np.array([[1.0], [0.0]]), [-1.0, -2.0], ["H", "O"], setting)
    assert "config_type=IsolatedAtom" in text
    assert (f"{setting}={{H: eV, ...}}" in text) == (setting is not None)
    assert ("model.energy_shifts=FILE" in text) == (setting == "model.energy_shifts")
