"""A training that goes on with other weights of frames, other shares of its sets, or other sets: told, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bad_input import composed
from support.mixtures import write_sets
from torch import nn

from harness.checkpoints import read
from harness.job import execute, prepare
from harness.job.best import why_scores_differ
from harness.job.made_with import MADE_WITH
from harness.job.match import ACCEPTED, Start, _compare_sets

pytestmark = pytest.mark.filterwarnings("ignore")

COMMON = (
    *("cutoff=3.5", "logger=none", "trainer.accelerator=cpu", "precision=float64", "test=false", "data.batch_size=6"),
    *(f"model.{size}=4" for size in ("hidden_channels", "num_filters", "num_gaussians")),
    *("model.num_interactions=1", "callbacks.parity=null", "callbacks.table=null", "dry_step=false"),
    "trainer.enable_progress_bar=false",
)


class Run:
    """A training of an epoch on metals and molecules, and commands that go on from its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sets = folder, write_sets(folder)
        execute(prepare(self.config(self.sets, "max_epochs=1", name="run")))
        self.last = folder / "run" / "checkpoints" / "last.ckpt"

    def config(self, sets: Mapping[str, Any], *overrides: str, name: str = "again") -> Any:
        data = ["data=mixture", f"data.sets={json.dumps(sets)}".replace('"', "")]
        return composed([*data, *COMMON, f"output_dir={self.folder / name}", *overrides])

    def notes(self, sets: Mapping[str, Any], *overrides: str) -> list[str]:
        """Lines on what differs; the job itself is not executed."""
        job = prepare(self.config(sets, "max_epochs=2", f"ckpt_path={self.last}", *overrides))
        return [line for line in job.notes if not line.startswith("reference energies")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("sets"))


def with_changes(run: Run, **changes: Any) -> dict[str, Any]:
    return {name: {**own, **changes.get(name, {})} for name, own in run.sets.items()}


def test_weights_of_frames_are_facts_of_the_data(run: Run) -> None:
    assert run.notes(run.sets) == []
    weighted = with_changes(run, molecules={"weights": {"config_type": {"H2O": 2, "CH4": 0}}})
    (line,) = run.notes(weighted)
    expected = "set molecules, weights (none → config_type CH4: 0, H2O: 2)"
    assert line == f"data differ from those of the checkpoint: {expected}"
    (line,) = run.notes(run.sets, "+data.keys={weight: null}")
    assert "set metal, weights (none → weight from nothing), set molecules, weights" in line
    # values of the validation are others by them
    job = prepare(run.config(weighted, "max_epochs=2"))
    reason = why_scores_differ(read(run.last)[MADE_WITH], job.config, job.datamodule, "val0_epoch/forces_mae")
    assert reason == expected


def test_validation_frames_of_a_set_decide_the_scores(run: Run) -> None:
    job = prepare(run.config(with_changes(run, metal={"split": {"val": 4}}), "max_epochs=2"))
    record = read(run.last)[MADE_WITH]
    reason = why_scores_differ(record, job.config, job.datamodule, "val0_epoch/forces_mae")
    assert reason is not None
    assert reason.startswith("set metal, split, part val (3 frames → 4 frames")
    job = prepare(run.config(with_changes(run, metal={"weight": 2}), "max_epochs=2"))  # of the training alone
    assert why_scores_differ(record, job.config, job.datamodule, "val0_epoch/forces_mae") is None


def test_other_shares_begin_with_the_next_epoch(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shares = with_changes(run, metal={"weight": 3}, molecules={"weight": 1})
    (line,) = run.notes(shares)
    assert line.startswith("data differ from those of the checkpoint: frames of the sets in an epoch (9, 12 → 16, 5)")
    assert "may have been trained on" not in line  # the split is the same
    job = prepare(run.config(shares, "max_epochs=2", f"ckpt_path={run.last}", name="shares"))
    execute(job)
    out = capsys.readouterr().out
    assert "differs from the checkpoint: data.sets.metal.weight: not set → 3" in out
    assert job.datamodule.mixing.per_epoch == (16, 5)  # type: ignore[attr-defined]
    steps = torch.load(run.folder / "shares" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps == 8  # four of the epoch before


def test_other_shares_within_an_epoch_are_refused(run: Run) -> None:
    before, now = (
        prepare(run.config(sets, "max_epochs=1")) for sets in (run.sets, with_changes(run, metal={"weight": 3}))
    )
    loaders = [job.datamodule.train_dataloader() for job in (before, now)]  # type: ignore[union-attr]
    iterator = iter(loaders[0])
    next(iterator)
    with pytest.raises(ValueError, match=r"in an epoch"):
        loaders[1].load_state_dict(loaders[0].state_dict())


def test_other_sets_are_told(run: Run) -> None:
    swapped = dict(reversed(run.sets.items()))
    notes = run.notes(swapped, "accept_changes=['model.*']", f"data.references={run_references(run)}")
    assert "differs from the checkpoint: sets of the mixture: metal, molecules → molecules, metal" in notes
    renamed = {"crystals": run.sets["metal"], "molecules": run.sets["molecules"]}
    notes = run.notes(renamed)
    assert "differs from the checkpoint: sets of the mixture: metal, molecules → crystals, molecules" in notes


def run_references(run: Run) -> str:
    """Those of the checkpoint, which the order of the sets decides otherwise."""
    return json.dumps(read(run.last)[MADE_WITH]["energy_shifts"]).replace('"', "")


class WithHeads(nn.Module):
    """A model with a head for each set."""

    set_heads = ("metal", "molecules")


@pytest.mark.parametrize("now", [["molecules", "metal"], ["crystals", "molecules"]])
def test_heads_do_not_go_on_with_another_set(now: list[str]) -> None:
    start = Start("ckpt_path", "last.ckpt", trains=True)
    data = type("Data", (), {"set_names": now})()
    before = {"set_names": ["metal", "molecules"]}
    with pytest.raises(
        ValueError, match=f"metal, molecules → {', '.join(now)}. A head would go on with another set"
    ) as told:
        _compare_sets(start, before, data, WithHeads(), ())
    assert f"'{ACCEPTED}=[data.sets]'" in str(told.value)
    (line,) = _compare_sets(start, before, data, WithHeads(), ["data.sets"])
    assert line.startswith("differs from the checkpoint: sets of the mixture: metal, molecules")
    data.set_names = ["metal", "molecules"]
    assert _compare_sets(start, before, data, WithHeads(), ()) == []
