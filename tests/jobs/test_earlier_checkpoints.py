"""Checkpoints that version 0.1.0 has written go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import ROOT, train

FIXTURES = ROOT / "tests" / "fixtures"
# Interrupted by SIGTERM after step 7 of 16, within epoch 1, with a schedule, train metrics, Adam and a cosine.
CHECKPOINT = FIXTURES / "checkpoint-0.1.0.ckpt"
# Values of the same training by version 0.1.0, uninterrupted.
RESULT = FIXTURES / "result-0.1.0.json"
COMMAND = (
    "experiment=alloy",
    "max_epochs=4",
    "seed=3",
    "cutoff=4.0",
    "trainer.accelerator=cpu",
    "trainer.precision=64-true",
    "logger=csv",
    "data.num_frames=24",
    "data.split={val:5,test:4}",
    "data.batch_size=4",
    "data.dtype=float64",
    "model.hidden_channels=8",
    "model.num_filters=8",
    "model.num_interactions=1",
    "model.num_gaussians=8",
    "monitor=val0_epoch/forces_rmse",
    "optimizer.lr=0.02",
    *("loss.coeffs.total_energy=10", "loss.coeffs.forces=1"),  # the defaults of that version
)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_of_0_1_0_goes_on_and_ends_where_it_would_have_ended(tmp_path: Path, ranks: int) -> None:
    done = train(*COMMAND, f"ckpt_path={CHECKPOINT}", folder=tmp_path, ranks=ranks)
    assert done.code == 0, done.err
    assert "The checkpoint was made with" not in done.out + done.err  # other coefficients, or another schedule
    expected = json.loads(RESULT.read_text())["values"]
    found = json.loads((done.runs[0] / "result.json").read_text())["values"]
    assert len(expected) == 52
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
