"""Trainings from stores and on several data sets: as from files, also after a kill in mid-epoch, on other ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from support.commands import BIN, NO_FIGURES, ROOT, read_csv, run, same, train
from support.mixtures import metal_frames, write_sets

from harness.data_command import main as data_command

TOLERANCE = 1e-9
COMMON = (
    *("data.batch_size=null", "data.max_atoms=24", "cutoff=3.5", "precision=float64"),
    *(f"model.{size}=6" for size in ("hidden_channels", "num_filters", "num_gaussians")),
    *("model.num_interactions=1", "trainer=cpu", "max_epochs=3", "test=false", "logger=csv"),
    *("trainer.log_every_n_steps=1", *NO_FIGURES, "callbacks.last.every_n_steps=4", "resume=auto"),
)


def stored(file: str) -> str:
    """Path of a store of a file, built by the command."""
    store = str(Path(file).with_suffix(".store"))
    data_command(["build", store, file, "--workers=1"])
    return store


def mixture(sets: dict[str, dict[str, Any]], from_stores: bool) -> list[str]:
    """Data of both sets as a mixture, the molecules from a file or from a store."""
    metal, molecules = sets["metal"] | {"weight": 2}, sets["molecules"]
    if from_stores:
        molecules = molecules | {"train": stored(molecules["train"])}
    chosen = {"metal": metal, "molecules": molecules}
    return ["data=mixture", f"data.sets={json.dumps(chosen)}".replace('"', "")]


def joined(sets: dict[str, dict[str, Any]], from_stores: bool) -> list[str]:
    """Data of both sets joined to one, from files or from stores."""
    files = [each["train"] for each in sets.values()]
    train = [stored(file) for file in files] if from_stores else files
    return [
        f"data={'store' if from_stores else 'file'}",
        f"data.train=[{','.join(train)}]",
        "data.split={val:6,test:2}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("data", [mixture, joined])
def test_stores_give_the_values_of_files_also_killed_in_mid_epoch_and_on_another_number_of_ranks(
    data: Any, tmp_path: Path
) -> None:
    sets = write_sets(tmp_path)
    whole = train(*data(sets, from_stores=False), *COMMON, folder=tmp_path / "whole")
    assert whole.code == 0, whole.err[-3000:]
    (expected,) = whole.runs
    marker = tmp_path / "marker"
    fault = (
        f"+callbacks.fault={{_target_: support.failure_callbacks.SignalAt, step: 9, name: SIGKILL, marker: {marker}}}"
    )
    arguments = [*data(sets, from_stores=True), *COMMON, fault]
    killed = train(*arguments, folder=tmp_path / "parts", ranks=2)
    assert killed.code != 0
    assert list(tmp_path.glob("marker.*")), killed.err[-3000:]
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
    made_with = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)["made_with"]
    if data is mixture:
        references = made_with["statistics"]["set_references"]
        assert list(references) == ["metal", "molecules"]
        assert references["metal"].keys() == {"O", "Cu"}


@pytest.mark.slow
def test_the_commands_that_the_page_begins_with_work_as_they_stand(tmp_path: Path) -> None:
    """Three lines of a shell, the last one with settings of a short training."""
    block = (ROOT / "docs" / "data.md").read_text().partition("```console\n")[2].partition("```")[0]
    commands = [line.partition(" #")[0].strip() for line in block.splitlines()]
    assert [command.split()[:2] for command in commands[:2]] == [["harness-data", "build"], ["harness-data", "info"]]
    assert commands[2].startswith("harness-train data=store ")
    (tmp_path / "train").mkdir()
    for part in range(2):
        frames = metal_frames()
        for number, atoms in enumerate(frames):
            atoms.rattle(0.02, seed=100 * part + number)
            atoms.arrays["REF_forces"] = atoms.calc.results.pop("forces")
        ase.io.write(tmp_path / "train" / f"{part}.xyz", frames, format="extxyz")
    path = {"PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]), "WANDB_MODE": "offline"}
    printed = []
    for command in (*commands[:2], f"{commands[2]} max_epochs=1"):
        done = run(["bash", "-c", command], tmp_path, **path)
        assert done.code == 0, done.err[-3000:]
        printed.append(done.out)
    assert "24, of 4 to 4 atoms" in printed[1]
    assert "forces 24" in printed[1]
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert np.isfinite(read_csv(folder)[-1]["test0_epoch/forces_rmse"])
