"""Points of a sweep by their command lines and records: which is which, what it is called, what it has come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from support.configs import CONF

from harness.runs import (
    TYPED,
    Command,
    asks_for_sweep,
    finished_result,
    is_interrupted,
    note_failure,
    objective,
    point_name,
    record,
    swept_settings,
    write_result,
)


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


@pytest.mark.parametrize(
    ("arguments", "sweeps"),
    [
        (["-m", "seed=1,2"], True),
        (["sweep=grid"], True),
        (["+hydra.mode=MULTIRUN"], True),
        (["sweep=null", "name=sweep"], False),
        (["seed=1"], False),
    ],
)
def test_what_starts_a_sweep(arguments: list[str], sweeps: bool) -> None:
    assert asks_for_sweep(arguments) == sweeps


def test_the_objective_of_a_run(tmp_path: Path) -> None:
    config = OmegaConf.create({"monitor": "val0_epoch/a", "objectives": None})
    values = {"val0_epoch/a": 0.5, "val0_epoch/b": float("nan"), "train_loss_epoch/a": 1.0, "test0_epoch/a": 2.0}
    assert objective(config, values) == 0.5
    config.objectives = ["val0_epoch/a", "val0_epoch/b", "val0_epoch/absent"]
    assert objective(config, values) == (0.5, None, None)
    write_result(tmp_path, config.monitor, values, 3.0, objectives=config.objectives)
    written = read(tmp_path, "result.json")
    assert written["objective"] == 0.5
    assert written["objectives"] == {"val0_epoch/a": 0.5, "val0_epoch/b": None, "val0_epoch/absent": None}
    assert written["values"] == {"val0_epoch/a": 0.5, "val0_epoch/b": None, "test0_epoch/a": 2.0}


def test_a_point_is_known_by_its_own_overrides(tmp_path: Path) -> None:
    first = Command(("-m", "a=1,2"), ("a=1",), 0)
    with record(tmp_path, first):
        write_result(tmp_path, "val0_epoch/a", {"val0_epoch/a": 1.0}, 1.0)
    assert finished_result(tmp_path, Command(("-m", "a=1,2,3", "resume=auto"), ("a=1", "resume=auto"), 0))["objective"]
    assert finished_result(tmp_path, Command(("-m", "a=1,2"), ("a=2",), 0)) == {}
    with pytest.raises(RuntimeError), record(tmp_path, first):
        raise RuntimeError("no more")
    assert read(tmp_path, "run.json")["error"] == "RuntimeError: no more"
    assert not (tmp_path / "result.json").exists()
    assert is_interrupted(tmp_path, first)
    note_failure(tmp_path, first, "refused")
    assert read(tmp_path, "run.json")["error"] == "RuntimeError: no more"  # as it has said itself
    other = Command(("-m", "a=1,2"), ("a=2",), 1)
    note_failure(tmp_path, other, "rank 1 was killed by SIGKILL")
    assert read(tmp_path, "run.json")["error"] == "rank 1 was killed by SIGKILL"
    assert read(tmp_path, "run.json")["overrides"] == ["a=2"]


def test_a_refused_command_leaves_the_results_of_one_before(tmp_path: Path) -> None:
    done, again = Command(("-m", "a=1,2"), ("a=1",), 0), Command(("-m", "a=1,2", "b=wrong"), ("a=1", "b=wrong"), 0)
    with record(tmp_path, done):
        write_result(tmp_path, "train_loss_epoch/a", {"train_loss_epoch/a": 1.0, "train_loss_epoch/b": 2.0}, 1.0)
    note_failure(tmp_path, again, "there is no b=wrong")
    assert read(tmp_path, "run.json")["state"] == "finished"
    assert read(tmp_path, "result.json")["values"] == {"train_loss_epoch/a": 1.0}  # the monitored value, of training
    note_failure(tmp_path, again, "rank 1 was killed after rank 0 had finished", has_begun=True)
    assert read(tmp_path, "run.json")["state"] == "failed"
    assert not (tmp_path / "result.json").exists()


def test_a_run_on_its_own_has_no_name_of_a_point() -> None:
    assert not HydraConfig.initialized()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        logger = compose("train", ["name=alone", "output_dir=somewhere"]).logger.wandb
    assert (logger.name, logger.group) == (None, "alone")


def test_the_name_of_a_point_is_that_of_its_swept_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ("-m", "loss.coeffs.forces=1,10", "loss.coeffs.total_energy=1,10", "optimizer.lr=0.1")
    own = ["loss.coeffs.forces=10", "loss.coeffs.total_energy=1", "optimizer.lr=0.1"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*own, "hydra.job.num=2", "hydra.job.id=2"], return_hydra_config=True)
    config.hydra.overrides.task = own
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(config)
    monkeypatch.setenv(TYPED, json.dumps(typed))
    assert point_name() == "forces=10,total_energy=1"
    assert swept_settings() == {"loss.coeffs.forces": "10", "loss.coeffs.total_energy": "1"}
