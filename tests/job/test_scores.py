"""Scores of a run and of the one that it continues compete where data and metrics are the same, and only there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.bad_input import BASE, composed, frames

from harness.callbacks import BestEpoch, ValidationTable
from harness.job import execute, prepare, train
from harness.job.best import why_scores_differ
from harness.job.made_with import MadeWith

SUM, FORCES, LOSS = "val0_epoch/weighted_sum", "val0_epoch/forces_rmse", "train_loss_epoch/weighted_sum"
SPLIT = {"train file 1": "a, sha256 1", "split, part val": "3 frames, sha256 1", "split, part train": "9, sha256 1"}
FILES = {"train file 1": "a, sha256 1", "val file 1": "v, sha256 1", "val file 2": "w, sha256 1"}


class Data(LightningDataModule):
    """Facts alone."""

    def __init__(self, facts: dict[str, str]) -> None:
        super().__init__()
        self.facts = facts

    def fingerprint(self) -> dict[str, str]:
        return self.facts


NAN = "per_type: true, ignore_nan: '${metrics.ignore_nan.forces}'"
MAE = "{_target_: harness.MeanAbsoluteError}"
FURTHER = (
    f"metrics.extra_metrics=[{{name: forces_rmse_per_type, field: forces, metric: {{_target_: "
    f"harness.RootMeanSquaredError}}, {NAN}}}, {{name: forces_mae_per_type, field: forces, metric: {MAE}, {NAN}}}, "
    f"{{name: further, field: forces, metric: {MAE}"
)
NONE: dict[str, str] = {}
# facts, changes of them, settings that are changed; values that compare, and those that do not
CASES: dict[str, tuple[dict[str, str], dict[str, str], list[str], tuple[str, ...], tuple[str, ...]]] = {
    "nothing": (SPLIT, NONE, [], (SUM, FORCES, LOSS, "own", "val"), ()),
    "training settings": (SPLIT, NONE, ["optimizer.lr=1", "max_epochs=9", "data.batch_size=2"], (SUM, LOSS), ()),
    "content of what is split": (SPLIT, {"train file 1": "a, sha256 2"}, [], (), (SUM, FORCES, LOSS, "own", "val")),
    "frames that are validated": (SPLIT, {"split, part val": "3 frames, sha256 2"}, [], (), (SUM, LOSS, "val")),
    "fewer training frames": (SPLIT, {"split, part train": "8, sha256 2"}, [], (SUM, FORCES, "val"), (LOSS, "own")),
    "training file": (FILES, {"train file 1": "b, sha256 3"}, [], (SUM, FORCES, "val"), (LOSS, "own")),
    "validation file": (FILES, {"val file 1": "u, sha256 3"}, [], ("val1_epoch/forces_rmse",), (SUM, LOSS, "val")),
    "the other validation file": (FILES, {"val file 2": "u, sha256 3"}, [], (SUM, FORCES), ("val1_epoch/x", "val")),
    "a test file": (FILES, {"test file 1": "t, sha256 1"}, [], (SUM, FORCES, "val"), ()),
    "file in the place of a split": (SPLIT, {"val file 1": "v, sha256 1"}, [], (), (SUM, "val")),
    "coefficients of metrics": (SPLIT, NONE, ["metrics.coeffs.forces_rmse=3"], (FORCES, "val0_epoch/x"), (SUM, "val")),
    "a further metric": (SPLIT, NONE, [FURTHER + "}]"], (SUM, FORCES, "val"), ()),
    "a further metric in the sum": (SPLIT, NONE, [FURTHER + ", coeff: 1}]"], (FORCES, "val"), (SUM,)),
    "frames that are left out": (SPLIT, NONE, ["metrics.ignore_nan.forces=true"], (), (SUM, FORCES, "val")),
    "other metrics": (SPLIT, NONE, ["metrics=energy_force_stress"], (), (SUM, "val")),
    "fewer batches": (SPLIT, NONE, ["+trainer.limit_val_batches=1"], (), (SUM, FORCES, "val")),
    "label keys": (SPLIT, NONE, ["data.keys.forces=f"], (), (SUM, FORCES, "val")),
    "the loss": (SPLIT, NONE, ["loss.coeffs.forces=7"], (SUM, FORCES, "val"), (LOSS, "own")),
    "averaged weights": (SPLIT, NONE, ["callbacks=[default,ema]"], (SUM, FORCES, "val"), ()),
    "precision": (SPLIT, NONE, ["trainer.precision=64-true", "data.dtype=float64"], (SUM, FORCES, "val"), ()),
}


@pytest.fixture(scope="module")
def plain() -> Any:
    return composed([*BASE, "data.train=a.xyz", "output_dir=x"])


@pytest.mark.parametrize("name", CASES)
def test_which_values_compare(name: str, plain: Any) -> None:
    facts, changes, overrides, compare, differ = CASES[name]
    record = MadeWith(plain, Data(facts)).record
    config = composed([*BASE, "data.train=a.xyz", "output_dir=y", *overrides]) if overrides else plain
    data = Data({**facts, **changes})
    for monitor in compare:
        assert why_scores_differ(record, config, data, monitor) is None, monitor
    for monitor in differ:
        assert why_scores_differ(record, config, data, monitor), monitor


def test_a_checkpoint_without_a_record_competes(plain: Any) -> None:
    assert why_scores_differ(None, plain, Data({}), SUM) is None


# --- in trainings ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint has scores that no other reaches."""
    path, made = tmp_path_factory.mktemp("scores"), frames(32)
    ase.io.write(path / "a.xyz", made[:16], format="extxyz")
    ase.io.write(path / "b.xyz", made[16:], format="extxyz")
    train(composed(overrides(path, "a", f"output_dir={path}/run", "test=false")))
    last = path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    for key, state in checkpoint["callbacks"].items():
        if key.startswith("ModelCheckpoint"):
            state["best_model_score"] = torch.tensor(1e-6)
        elif key.startswith("EarlyStopping"):
            state |= {"best_score": torch.tensor(1e-6), "wait_count": 2}
        elif key == "BestEpoch":
            state["best"] = {f"best/{SUM}": 1e-6}
        elif key == "ValidationTable":
            state["best"]["val0"]["weighted_sum"] = [1e-6, 0]
    checkpoint["lr_schedulers"][0] |= {"best": 1e-6, "num_bad_epochs": 5}
    torch.save(checkpoint, last)
    return path


def overrides(path: Path, data: str, *more: str) -> list[str]:
    quiet = ["callbacks=[default,early_stopping]", "callbacks.parity=null", "trainer.enable_progress_bar=false"]
    patience = ["callbacks.early_stopping.patience=7", "lr_scheduler=plateau", "dry_step=false"]
    return [*BASE, *quiet, *patience, f"data.train={path}/{data}.xyz", *more]


@pytest.mark.parametrize(
    ("data", "more", "competes"),
    [
        ("a", ["callbacks.early_stopping.patience=9"], True),
        ("b", [], False),
        ("a", ["metrics.coeffs.forces_rmse=2"], False),
    ],
)
def test_bests_go_on_or_start_anew(
    data: str, more: list[str], competes: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = folder / "run" / "checkpoints" / "last.ckpt"
    job = prepare(
        composed(overrides(folder, data, "max_epochs=2", f"ckpt_path={last}", f"output_dir={tmp_path}", *more))
    )
    execute(job)
    out = capsys.readouterr().out
    tested = folder / "run" if competes else tmp_path
    assert f"checkpoint  {tested}/checkpoints/best.ckpt" in out
    assert ("do not compete: the best starts anew (" in out) == (not competes)
    parts: list[Any] = job.trainer.callbacks  # type: ignore[attr-defined]
    found: dict[type, Any] = {type(each): each for each in parts}
    stopping, plateau = found[EarlyStopping], job.trainer.lr_scheduler_configs[0].scheduler
    bests = {
        "early stopping": float(stopping.best_score),
        "best epoch": found[BestEpoch].best[f"best/{SUM}"],
        "table": found[ValidationTable].state_dict()["best"]["val0"]["weighted_sum"][0],
        "plateau": float(plateau.best),
    }
    now = float(found[ModelCheckpoint].best_model_score)
    assert now > 0.01
    assert bests == pytest.approx(dict.fromkeys(bests, 1e-6 if competes else now))
    assert (stopping.wait_count, plateau.num_bad_epochs) == ((3, 6) if competes else (0, 0))
    assert stopping.patience == (9 if competes else 7)  # of now


def test_a_record_survives_a_copy_of_the_config(plain: Any) -> None:
    assert MadeWith(copy.deepcopy(plain), Data(SPLIT)).record == MadeWith(plain, Data(SPLIT)).record


def test_data_that_were_changed_before_a_resume_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command goes on in its directory, and the file that it names is another one."""
    job = prepare(composed(overrides(folder, "b", "max_epochs=2", f"output_dir={tmp_path}", "test=false")))
    job.resume_from = str(folder / "run" / "checkpoints" / "last.ckpt")
    execute(job)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines if line.startswith(("data differ", "scores of"))] == [
        "data differ from those of the checkpoint: train file 1",
        "scores of before are of another kind, and do not compete: the best starts anew",
    ]
