"""Jobs that go on from a checkpoint with other settings, or start from its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig
from support.commands import TINY
from support.configs import composed

from harness.callbacks import ResumeCheckpoint
from harness.job.going_on import changed_settings
from harness.job.job import execute, prepare

TRAINING = (*TINY, "logger=none", "trainer=cpu", "test=false", "dry_step=false", "callbacks=[default,ema]")
TRAINING += ("callbacks.progress=null", "callbacks.table=null")


class Start(Callback):
    """State of a training before its first step."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.step, self.epoch = trainer.global_step, trainer.current_epoch
        self.weights = {name: value.clone() for name, value in pl_module.model.state_dict().items()}
        self.moments = dict(trainer.optimizers[0].state)


def config(folder: Path, *overrides: str) -> DictConfig:
    made = composed(*TRAINING, *overrides)
    made.output_dir = str(folder)
    return made


def started(made: DictConfig, resume_from: Path | None = None) -> Start:
    job, seen = prepare(made), Start()
    job.resume_from = None if resume_from is None else str(resume_from)
    job.trainer.callbacks.append(seen)  # type: ignore[attr-defined]
    execute(job)
    return seen


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    started(config(folder, "max_epochs=2"))
    return folder / "checkpoints" / "last.ckpt"


def test_weights_start_a_new_training(last: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(last, weights_only=True)
    seen = started(config(tmp_path / "new", f"init_from={last}", "seed=5", "max_epochs=2"))
    assert (seen.step, seen.epoch, seen.moments) == (0, 0, {})
    differ = 0
    for name, value in seen.weights.items():
        assert torch.equal(value, checkpoint["state_dict"][f"model.{name}"]), name  # the averaged ones
        differ += not torch.equal(value, checkpoint["current_model_state"][f"model.{name}"])
    assert differ > 5
    assert f"starts from the averaged weights of {last}" in capsys.readouterr().out
    # interrupted, the same command resumes
    own = tmp_path / "new" / "checkpoints" / "previous.ckpt"
    again = started(config(tmp_path / "new", f"init_from={last}", "seed=5", "max_epochs=2"), own)
    assert (again.step, again.epoch) == (4, 1)
    assert "starts from the" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["ckpt_path={last}"], ["Both ckpt_path=", "Leave one of them out"]),
        (["train=false"], ["train=false only tests", "ckpt_path={last}"]),
        (["init_from=nowhere.ckpt"], ["init_from=nowhere.ckpt: there is no such file"]),
        (["model.hidden_channels=16"], ["init_from={last} was made with other settings that shape the model"]),
        (["model.hidden_channels=16", "accept_changes=['*']"], ["init_from={last} has the weights of another model"]),
        (["model.num_interactions=2", "accept_changes=['*']"], ["init_from={last} has the weights of another model"]),
        (["data.type_names=[Pd,Cu,Ag,Au]"], ["was trained with the atom types", "'data.type_names=[Cu, Pd, Ag, Au]'"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    overrides: list[str], messages: list[str], last: Path, tmp_path: Path
) -> None:
    typed = [f"init_from={last}", *(override.format(last=last) for override in overrides)]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare(config(tmp_path, *typed))
    for message in messages:
        assert message.format(last=last) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["max_epochs=1"], ["max_epochs=1, but the checkpoint has 2 epochs behind it", "init_from"]),
        (["max_epochs=-1"], ["`horizon`", "+trainer.max_steps", "lr_scheduler=none"]),
    ],
)
def test_a_continuation_without_a_meaning_is_refused_before_it_starts(
    overrides: list[str], messages: list[str], last: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        prepare(config(tmp_path, f"ckpt_path={last}", *overrides))
    for message in messages:
        assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_each_difference_is_a_line(last: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert changed_settings(str(last), config(tmp_path, "max_epochs=2")) == []
    changes = ("max_epochs=3", "loss.coeffs.forces=7", "trainer.gradient_clip_val=1.5", "optimizer.lr=1e-4")
    now = config(tmp_path, f"ckpt_path={last}", *changes)
    lines = changed_settings(str(last), now)
    assert lines == ["max_epochs: 2 → 3", "loss.coeffs.forces: 10 → 7", "trainer.gradient_clip_val: None → 1.5"]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        seen = started(now)
    assert (seen.step, seen.epoch) == (8, 2)
    told = [record.getMessage() for record in caplog.records if "differs from the checkpoint" in record.getMessage()]
    assert told == [
        "differs from the checkpoint: optimizer.lr: 0.005 → 0.0001",
        "differs from the checkpoint: lr_scheduler.scheduler.T_max: 2 → 3",
        "differs from the checkpoint: the learning rate goes on with 2.5e-05, CosineAnnealingLR at epoch 2",
    ]


@pytest.mark.parametrize("setting", ["init_from", "ckpt_path"])
def test_the_folder_of_a_run_is_answered_with_its_checkpoint(setting: str, last: Path, tmp_path: Path) -> None:
    best = last.with_name("best.ckpt")
    for folder in (last.parent, last.parents[1]):
        with pytest.raises(ValueError, match=rf"is a folder, expected a checkpoint in it: {setting}={best}"):
            prepare(config(tmp_path, f"{setting}={folder}"))


def test_a_finished_training_says_that_nothing_is_left(
    last: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started(config(tmp_path / "finished", f"ckpt_path={last}", "max_epochs=2"))
    assert "nothing is left to train: 2 epochs are done, and max_epochs=2" in capsys.readouterr().out


def test_checkpoints_of_a_run_before_are_put_aside(tmp_path: Path) -> None:
    for name in ("best", "last", "previous"):
        (tmp_path / f"{name}.ckpt").write_text(name)
    ResumeCheckpoint(tmp_path).put_aside()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "best.before": "best",
        "last.before": "last",
        "previous.before": "previous",
    }


def test_a_callback_that_is_gone_is_one_line(last: Path) -> None:
    lines = changed_settings(str(last), config(last.parents[1], "callbacks=default", "max_epochs=3"))
    of_average = [line for line in lines if "ema" in line]
    assert of_average == ["callbacks.ema: ExponentialMovingAverage → not set"]


def test_a_test_after_a_training_goes_on_with_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The best checkpoint was written before the plateau scheduler saw its epoch; the test has no scheduler."""
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        started(config(tmp_path, "max_epochs=2", "lr_scheduler=plateau", "test=true"))
    assert "differs from the checkpoint" not in caplog.text
