"""Monitored values that are NaN or not there: refused before the start, or an error in the training."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import ase.io
import pytest
from omegaconf import DictConfig
from support.bad_input import BASE, captured, composed, frames
from support.mixtures import write_sets

import harness
from harness.job import prepare, train
from harness.job.monitors import MonitorError, missing_labels
from harness.train import run_job

PLATEAU = ("lr_scheduler=plateau",)
STOPPING = ("callbacks=[default,early_stopping]",)
PER_TYPE = "val0_epoch/forces_mae_per_type_Ag"
OF_TRAINING = "monitor=train_loss_epoch/weighted_sum"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames with Ag, and without; the first have no stress either."""
    made = tmp_path_factory.mktemp("monitors")
    ase.io.write(made / "frames.xyz", frames(), format="extxyz")
    ase.io.write(made / "copper.xyz", frames(symbols="Cu4")[:4], format="extxyz")
    without = frames(4)
    for atoms in without:
        del atoms.calc.results["stress"]
    ase.io.write(made / "no_stress.xyz", without, format="extxyz")
    for atoms in without:
        atoms.info["config_type"] = "Outlier"
    ase.io.write(made / "outlier.xyz", without, format="extxyz")
    ase.io.write(made / "outliers.xyz", [*frames(), *without], format="extxyz")
    return made


def config_of(folder: Path, *overrides: str, output: Path | None = None) -> DictConfig:
    config = composed([*BASE, f"data.train={folder}/frames.xyz", "max_epochs=4", *overrides])
    config.output_dir = str(output or folder / "output")
    return config


# an epoch has 3 batches, of 10 frames
REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # no data: the value would be NaN
    "type that validation lacks": (
        ("data.val=FOLDER/copper.xyz", "data.split.val=null", f"monitor={PER_TYPE}"),
        ("monitor is", PER_TYPE, "no frame of val0 has forces of Ag", "forces of Cu", "val0_epoch/weighted_sum"),
    ),
    "type that validation lacks, as an objective": (
        ("data.val=FOLDER/copper.xyz", "data.split.val=null", f"objectives=[val0_epoch/forces_mae,{PER_TYPE}]"),
        ("objectives[1]", "no frame of val0 has forces of Ag"),
    ),
    "type that validation lacks, of a callback": (
        (
            "data.val=FOLDER/copper.xyz",
            "data.split.val=null",
            *STOPPING,
            f"callbacks.early_stopping.monitor={PER_TYPE}",
        ),
        ("the monitor of EarlyStopping", "no frame of val0 has forces of Ag"),
    ),
    "type that the training lacks": (
        (
            *("data.train=FOLDER/copper.xyz", "data.type_names=[Cu,Ag]", "data.split={val: 1, test: 1}"),
            "monitor=train_loss_epoch/forces_mse_per_type_Ag",
        ),
        ("train_loss_epoch/forces_mse_per_type_Ag", "no frame of train has forces of Ag"),
    ),
    "label that validation lacks": (
        (
            *("data.val=FOLDER/no_stress.xyz", "data.split.val=null", "metrics=energy_force_stress"),
            *("metrics.coeffs.stress_rmse=null", "monitor=val0_epoch/stress_rmse"),
        ),
        ("val0_epoch/stress_rmse", "none of the 4 frames of val0 has stress"),
    ),
    "validation of weight 0": (
        (
            *("data.val=FOLDER/outlier.xyz", "data.split.val=null", "data.weights={config_type: {Outlier: 0}}"),
            "monitor=val0_epoch/forces_mae",
        ),
        ("val0_epoch/forces_mae", "all frames of val0 have the weight 0 for forces", "weights: false"),
    ),
    # not there when it is asked for
    "plateau, every second epoch": (
        (*PLATEAU, "trainer.check_val_every_n_epoch=2"),
        ("learning-rate scheduler", "after 3 batches", "check_val_every_n_epoch=2", "+lr_scheduler.frequency=2"),
    ),
    "plateau, no validation": (
        (*PLATEAU, "+trainer.limit_val_batches=0"),
        ("no validation with trainer.limit_val_batches=0", "monitor=train_loss_epoch/weighted_sum"),
    ),
    "plateau by step": ((*PLATEAU, "lr_scheduler.interval=step"), ("after 1 batches", "+lr_scheduler.frequency=3")),
    "plateau by step, of the training": (
        (*PLATEAU, "lr_scheduler.interval=step", OF_TRAINING),
        ("after 1 batches", "the end of the first epoch", "lr_scheduler.interval=epoch"),
    ),
    "no validation": (("+trainer.limit_val_batches=0",), ("monitor is val0_epoch/weighted_sum", "no validation")),
    "validation after the end": (
        ("trainer.check_val_every_n_epoch=5",),
        ("no validation with trainer.check_val_every_n_epoch=5 and max_epochs=4",),
    ),
    "early stopping at the end of an epoch without validation": (
        (*STOPPING, "+callbacks.early_stopping.check_on_train_epoch_end=true", "trainer.check_val_every_n_epoch=2"),
        ("EarlyStopping", "after 3 batches", "check_on_train_epoch_end"),
    ),
    "early stopping of the training within an epoch": (
        (*STOPPING, OF_TRAINING, "+trainer.val_check_interval=2", "callbacks.best.monitor=val0_epoch/weighted_sum"),
        ("EarlyStopping", "train_loss_epoch/weighted_sum", "after 2 batches"),
    ),
    "checkpoint of the training within an epoch": (
        (OF_TRAINING, "+trainer.val_check_interval=2"),
        ("ModelCheckpoint", "train_loss_epoch/weighted_sum", "after 2 batches"),
    ),
}

TAKEN: dict[str, tuple[str, ...]] = {
    "plateau": PLATEAU,
    "plateau, as often as validations": (*PLATEAU, "trainer.check_val_every_n_epoch=2", "+lr_scheduler.frequency=2"),
    "plateau, less often than validations": (
        *(*PLATEAU, "trainer.check_val_every_n_epoch=2", "+lr_scheduler.frequency=3"),
    ),
    "plateau that is not strict": (*PLATEAU, "trainer.check_val_every_n_epoch=2", "+lr_scheduler.strict=false"),
    "plateau of the training": (*PLATEAU, OF_TRAINING, "+trainer.limit_val_batches=0"),
    "plateau by step, validated first": (
        *(*PLATEAU, "lr_scheduler.interval=step", "+lr_scheduler.frequency=2", "+trainer.val_check_interval=2"),
    ),
    "early stopping, every second epoch": (*STOPPING, "trainer.check_val_every_n_epoch=2"),
    "early stopping of the training": (*STOPPING, OF_TRAINING),
    "early stopping within epochs": (*STOPPING, "+trainer.val_check_interval=2"),
    "overfitting": (*PLATEAU, "+trainer.overfit_batches=1"),
    "validation by step over epochs": ("trainer.check_val_every_n_epoch=null", "+trainer.val_check_interval=4"),
    "a type that is there": (f"monitor={PER_TYPE}",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_start(name: str, folder: Path) -> None:
    overrides, words = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        prepare(config_of(folder, *(each.replace("FOLDER", str(folder)) for each in overrides)))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_trains(name: str, folder: Path, tmp_path: Path) -> None:
    """Lightning finds the value whenever it asks for it: the table above refuses nothing in vain."""
    quick = ("callbacks.parity=null", "callbacks.coefficients=null", "test=false", "dry_step=false")
    values = train(config_of(folder, *TAKEN[name], *quick, output=tmp_path))
    assert math.isfinite(values["train_loss_epoch/weighted_sum"])
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


NAN = "val0_epoch/own"


def with_nan(folder: Path, output: Path, at: list[int], *overrides: str) -> DictConfig:
    metric = f"{{field: forces, name: own, metric: {{_target_: support.bad_parts.NaNAt, at: {at}}}}}"
    extra = f"metrics.extra_metrics=[{metric}]"
    quick = ("callbacks.parity=null", "test=false", "dry_step=false", f"monitor={NAN}")
    return config_of(folder, extra, *quick, *overrides, output=output)


@pytest.mark.parametrize(
    ("at", "overrides"),
    [([0], ()), ([0, 1, 2, 3], PLATEAU), ([0], STOPPING), ([2], STOPPING)],
    ids=["checkpoint", "plateau", "early stopping", "early stopping after numbers"],
)
def test_a_value_that_is_nan_is_an_error(
    at: list[int], overrides: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    said = captured(lambda: run_job(with_nan(folder, tmp_path, at, *overrides)))
    assert said.code == 1
    assert said.err.count("error: ") == 1
    for word in (NAN, f"nan in the validation of epoch {at[0]}", "val0_epoch/weighted_sum", "lower learning rate"):
        assert word in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file() == (at[0] > 0)


@pytest.mark.parametrize("overrides", [(), PLATEAU])
def test_nan_in_an_epoch_after_numbers_is_a_warning(overrides: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    with pytest.warns(
        RuntimeWarning, match=rf"{NAN}, which is nan in the validation of epoch 1; it was a number"
    ) as all_:
        values = train(with_nan(folder, tmp_path, [1, 2], *overrides))
    assert len([each for each in all_ if "does not count" in str(each.message)]) == 1
    assert math.isfinite(values[NAN])


def test_a_diverged_training_is_told_once(folder: Path, tmp_path: Path) -> None:
    """By the guard of the step, before any value of an epoch is NaN."""
    config = config_of(folder, "optimizer.lr=1e30", "callbacks.parity=null", *STOPPING, output=tmp_path)
    said = captured(lambda: run_job(config))
    assert said.code == 1
    assert said.err.count("error: ") == 1
    assert "no epoch can be told" not in said.err
    assert issubclass(MonitorError, ValueError)


def test_what_has_been_a_number_is_known_after_a_restart() -> None:
    from harness.job.monitors import MonitorGuard

    guard: Any = MonitorGuard({"monitor": NAN})
    guard._numbers = {NAN}
    other: Any = MonitorGuard({"monitor": NAN})
    other.load_state_dict(guard.state_dict())
    assert other._numbers == {NAN}


STRESS = ("loss=energy_force_stress", "metrics=energy_force_stress", "data.train=FOLDER/outliers.xyz")
WATCHED = "{name: every_stress, field: stress, metric: {_target_: harness.MeanAbsoluteError}, weights: false, coeff: 1}"


def test_labels_of_frames_of_weight_0_may_be_missing(folder: Path, tmp_path: Path) -> None:
    """The loss does not count them; a component that takes no weights does."""
    stress = [each.replace("FOLDER", str(folder)) for each in STRESS]
    weightless = "data.weights={config_type: {Outlier: 0}}"
    values = train(config_of(folder, *stress, weightless, "max_epochs=1", output=tmp_path))
    assert math.isfinite(values["train_loss_epoch/stress_mse"])
    job = prepare(config_of(folder, *stress, weightless, output=tmp_path))
    missing, total = job.datamodule.missing_labels("train", weighted=False)["stress"]
    assert missing > 0
    assert job.datamodule.missing_labels("train")["stress"] == (0, total - missing)
    for options in ((), (weightless, f"loss.extra_metrics=[{WATCHED}]")):
        with pytest.raises(ValueError, match=rf"{missing} of the {total} frames of train have no stress"):
            prepare(config_of(folder, *stress, *options, output=tmp_path))


def test_a_job_leaves_a_set_without_a_label_out_of_its_components(tmp_path: Path) -> None:
    """Metals with stresses and molecules without: nothing is to be said of ignore_nan."""
    sets = json.dumps(write_sets(tmp_path)).replace('"', "")
    data = ["data=mixture", f"data.sets={sets}", *(option for option in BASE if not option.startswith(("data", "cut")))]
    given = ["loss=energy_force_stress", "metrics=energy_force_stress", "cutoff=3.5", f"output_dir={tmp_path}"]
    job = prepare(composed([*data, *given]))
    for manager in (job.module.loss, *job.module.val_metrics):
        found = {name: entry.sets for name, entry in manager.entries.items() if name in ("stress_mse", "stress_rmse")}
        assert list(found.values()) == [(0,)]
        assert manager.entries[f"forces_{next(iter(found)).rpartition('_')[2]}"].sets is None


class _Mixture:
    """What a data module of two sets says of its labels: molecules have no forces, and one crystal has a gap."""

    @staticmethod
    def missing_labels(name: str) -> dict[str, tuple[int, int]]:
        return {"forces": (6, 15), "total_energy": (0, 15)}

    @staticmethod
    def missing_labels_by_set(name: str) -> dict[str, dict[str, tuple[int, int]]]:
        return {
            "crystals": {"forces": (1, 10), "total_energy": (0, 10)},
            "molecules": {"forces": (5, 5), "total_energy": (0, 5)},
        }


def test_labels_that_a_set_lacks_are_missing_in_no_component_of_the_others() -> None:
    entry = {"field": "forces", "metric": harness.MeanSquaredError()}
    entries = [entry | {"name": "whole"}, entry | {"name": "molecules", "sets": ["molecules"]}]
    names = {"set_names": ["crystals", "molecules"]}
    manager = harness.MetricsManager(entries, **names)
    found = {name: missing_labels(_Mixture, "train", manager, each) for name, each in manager.entries.items()}
    assert found["whole"]["forces"] == (6, 15)
    assert found["molecules"]["forces"] == (5, 5)
    labelled = harness.MetricsManager(entries[:1], **names, labelled_sets={"forces": ["crystals"]})
    assert missing_labels(_Mixture, "train", labelled, labelled.entries["whole"])["forces"] == (1, 10)
