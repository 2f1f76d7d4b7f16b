"""The plan of a sweep, ``sweep.json``: Hydra's own sweeper would run the same points in the same order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig
from support.commands import ROOT

from harness.runs import SweepCallback, current_session


@pytest.fixture(autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def compose_sweep(*overrides: str) -> DictConfig:
    """What Hydra hands to ``on_multirun_start``."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return hydra.compose_config("train", list(overrides), run_mode=RunMode.MULTIRUN, with_log_configuration=False)


def plan_of(folder: Path, *overrides: str) -> dict[str, Any]:
    SweepCallback().on_multirun_start(compose_sweep(*overrides, f"hydra.sweep.dir={folder / 'sweep'}"))
    current_session().sweeps.pop(folder / "sweep").release()
    found: dict[str, Any] = json.loads((folder / "sweep" / "sweep.json").read_text())
    return found


@pytest.mark.parametrize(
    ("overrides", "swept", "number"),
    [
        (["loss.coeffs.forces=1,10,100", "max_epochs=2", "seed=0,1"], ["loss.coeffs.forces", "seed"], 6),
        (["sweep=grid"], ["loss.coeffs.forces"], 3),
        (["sweep=grid", "optimizer.lr=0.1,0.2", "loss.coeffs.forces=5"], ["optimizer.lr"], 2),
        (["sweep=grid", "loss.coeffs.forces=5,6"], ["loss.coeffs.forces"], 2),
        (["seed=range(0,10,3)", "name=a b"], ["seed"], 4),
        (["schedule=glob(c*)"], ["schedule"], None),
        (["+note='a,b',c", "+other='x=1'"], ["note"], 2),
        (["+note={a: 1},[1,2],null", "monitor=choice(a,b)"], ["note", "monitor"], 6),
        (["seed=sort(3,1,2)", "data.split={val:4,test:4}"], ["seed"], 3),
        (["seed=3"], [], 1),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else None,
)
def test_points_of_a_grid_are_those_of_hydra(
    overrides: list[str], swept: list[str], number: int | None, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, *overrides)
    config = compose_sweep(*overrides)
    asked = [f"{name}={value}" for name, value in (config.hydra.sweeper.params or {}).items()]
    asked += list(config.hydra.overrides.task)
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    ((*points,),) = BasicSweeper.split_arguments(parser.parse_overrides(asked), None)
    planned = [{f"{name}={value}" for name, value in {**plan["fixed"], **point}.items()} for point in plan["points"]]
    assert planned == [{override.lstrip("+") for override in point} for point in points]
    assert plan["swept"] == swept
    assert all(list(point) == swept for point in plan["points"])
    assert plan["planned"] == len(points)
    if number is None:
        assert {point["schedule"] for point in plan["points"]} >= {"constant"}
    else:
        assert len(points) == number


def test_how_points_are_judged_and_where_they_are(tmp_path: Path) -> None:
    """As a point has it, although no point has been composed yet; Hydra's own state is as before."""
    before = HydraConfig.instance().cfg
    plan = plan_of(tmp_path, "name=alloy", "seed=0,1", "logger.wandb.project=potentials", "objectives=[a,b]")
    assert HydraConfig.instance().cfg is before
    assert (plan["monitor"], plan["objectives"]) == ("val0_epoch/weighted_sum", ["a", "b"])
    assert (plan["project"], plan["group"]) == ("potentials", "alloy/sweep")
    assert plan["started"] > "2026-01-01"
    assert "name" not in plan
    plan = plan_of(tmp_path, "seed=0,1", "logger=none")
    assert (plan["project"], plan["group"], plan["objectives"]) == (None, None, None)
    plan = plan_of(tmp_path, "seed=0,1", "logger.wandb.group=mine")
    assert plan["group"] == "mine"


@pytest.mark.parametrize("swept", ["tag(log,interval(1,10))", "shuffle(1,2,3)"])
def test_points_that_are_not_known_beforehand(swept: str, tmp_path: Path) -> None:
    """A range needs a sampler; shuffled values get their order from Hydra later."""
    plan = plan_of(tmp_path, f"loss.coeffs.forces={swept}")
    assert (plan["swept"], plan["planned"], plan["points"]) == (["loss.coeffs.forces"], None, None)


def test_trials_of_a_sampler(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    plan = plan_of(tmp_path, "sweep=pareto", "hydra.sweeper.n_trials=7", "optimizer.lr=choice(0.1,0.2)")
    assert (plan["planned"], plan["points"]) == (7, None)
    assert plan["swept"] == ["loss.coeffs.forces", "optimizer.lr"]
    assert len(plan["objectives"]) == 2


def test_a_plan_that_cannot_be_written_does_not_stop_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "sweep.json").mkdir(parents=True)  # nothing takes the place of a folder
    with pytest.warns(RuntimeWarning, match=r"sweep\.json cannot be written"):
        SweepCallback().on_multirun_start(compose_sweep("seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"))
    current_session().sweeps.pop(tmp_path / "sweep").release()
