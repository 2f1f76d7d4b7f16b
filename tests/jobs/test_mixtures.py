"""Trainings on several data sets: the same on another number of ranks, also after a kill in mid-epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.commands import read_csv, same, train
from support.mixtures import write_sets

TOLERANCE = 1e-9


def command(folder: Path, *more: str) -> list[str]:
    sets = write_sets(folder)
    sets["metal"]["weight"] = 2
    return [
        "data=mixture",
        f"data.sets={json.dumps(sets)}".replace('"', ""),
        "data.batch_size=4",
        "data.max_atoms=null",
        "cutoff=3.5",
        "precision=float64",
        *(f"model.{size}=6" for size in ("hidden_channels", "num_filters", "num_gaussians")),
        "model.num_interactions=1",
        "trainer=cpu",
        "max_epochs=3",
        "logger=csv",
        "trainer.log_every_n_steps=1",
        "callbacks.parity=null",
        "callbacks.last.every_n_steps=4",
        "resume=auto",
        *more,
    ]


@pytest.mark.slow
def test_a_killed_training_goes_on_in_mid_epoch_on_another_number_of_ranks(tmp_path: Path) -> None:
    limit = ("data.batch_size=null", "data.max_atoms=24", "test=false")
    whole = train(*command(tmp_path, *limit), folder=tmp_path / "whole")
    assert whole.code == 0, whole.err[-3000:]
    (expected,) = whole.runs
    marker = tmp_path / "marker"
    fault = (
        f"+callbacks.fault={{_target_: support.failure_callbacks.SignalAt, step: 9, name: SIGKILL, marker: {marker}}}"
    )
    arguments = command(tmp_path, *limit, fault)
    killed = train(*arguments, folder=tmp_path / "parts", ranks=2)
    assert killed.code != 0
    again = train(*arguments, folder=tmp_path / "parts")
    assert again.code == 0, again.err[-3000:]
    (found,) = again.runs
    assert f"goes on from {found}/checkpoints/last.ckpt" in again.out
    rows, wanted = read_csv(found), read_csv(expected)
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    assert len(rows) > 15
    for row, other in zip(rows, wanted, strict=True):
        for key in row:
            assert same(row[key], other[key], TOLERANCE), (key, row["step"], row[key], other[key])
    record = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)["made_with"]
    assert list(record["statistics"]["set_references"]) == ["metal", "molecules"]
    assert record["statistics"]["set_references"]["metal"].keys() == {"O", "Cu"}
