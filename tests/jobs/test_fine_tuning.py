"""Trainings by the command that begin with a trained model: two ranks do what one does, first errors included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.commands import NO_FIGURES, read_csv, same, train

import harness

DATA = ("experiment=alloy", "data.num_frames=24", "data.split={val:4,test:4}", "data.batch_size=4", "precision=float64")
QUIET = ("logger=csv", "train_metrics=null", *NO_FIGURES, "max_epochs=2")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_references_are_refitted_by_two_ranks_as_by_one(tmp_path: Path) -> None:
    done = train(*DATA, *QUIET, "model.hidden_channels=8", "model.num_filters=8", folder=tmp_path / "first")
    assert done.code == 0, done.err[-3000:]
    best = done.runs[0] / "checkpoints" / "best.ckpt"
    options = ("model=from_checkpoint", f"init_from={best}", "model.energy_shifts=fit", "freeze=['*mlp.0*']")
    rows, shifts, first = [], [], []
    for ranks in (1, 2):
        tuned = train(*DATA, *QUIET, *options, "data.seed=7", folder=tmp_path / str(ranks), ranks=ranks, timeout=300)
        assert tuned.code == 0, tuned.err[-3000:]
        rows.append(read_csv(tuned.runs[0]))
        shifts.append(harness.load_model(tuned.runs[0] / "checkpoints" / "last.ckpt").energy_shifts)
        first.append(re.findall(r"(?:energy|forces).*(?:MAE|RMSE).*", tuned.out))
    assert first[0] == first[1] != []
    assert shifts[0] == pytest.approx(shifts[1], rel=1e-12)
    assert shifts[0] != harness.load_model(best).energy_shifts
    assert len(rows[0]) == len(rows[1])
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        assert [name for name in one if not same(one[name], two[name], 1e-8)] == []
