"""The report of a sweep: points in any state, the ranking, the front, and what goes to W&B."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from support.commands import BIN

from harness.sweep import main, rank, read_sweep
from harness.sweep.pareto import FrontPoint, draw_front, pareto_front

ENERGY, FORCES, SORT = "test0_epoch/per_atom_energy_rmse", "test0_epoch/forces_rmse", "val0_epoch/weighted_sum"
GROUP = "sweep of alloy"
PLAN: dict[str, Any] = {
    "command": ["-m", "loss.coeffs.forces=1,10,100", "loss.coeffs.total_energy=1,10", "max_epochs=2"],
    "fixed": {"max_epochs": "2"},
    "swept": ["loss.coeffs.forces", "loss.coeffs.total_energy"],
    "planned": 6,
    "points": [
        {"loss.coeffs.forces": forces, "loss.coeffs.total_energy": energy}
        for forces, energy in product(("1", "10", "100"), ("1", "10"))
    ],
    "monitor": SORT,
    "objectives": None,
    "project": "potentials",
    "group": GROUP,
}


def make_point(
    sweep: Path,
    number: int,
    overrides: Sequence[str] = (),
    result: Mapping[str, float | None] | None = None,
    seconds: float = 90.0,
    **record: Any,
) -> Path:
    """A point's folder as a training leaves it."""
    folder = sweep / str(number)
    folder.mkdir(parents=True)
    if record:
        of_config = {"monitor": SORT, "objectives": None, "project": "potentials", "group": GROUP}
        of_command = {"overrides": list(overrides), "point": number, "ranks": 2, "started": "2026-01-01T10:00:00"}
        (folder / "run.json").write_text(json.dumps({**of_config, **of_command, **record}))
    if result is not None:
        whole = {"monitor": SORT, "objective": result.get(SORT), "seconds": seconds, "ranks": 2, "values": dict(result)}
        (folder / "result.json").write_text(json.dumps(whole))
    return folder


def change(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def values(energy: float | None, forces: float | None, total: float | None) -> dict[str, float | None]:
    of_test = {ENERGY: energy, FORCES: forces, "test0_epoch/forces_rmse_per_type_Cu": 0.5}
    return {**of_test, SORT: total, "val0_epoch/forces_mae": 0.1}


def coefficients(forces: int, energy: int) -> list[str]:
    return [f"loss.coeffs.forces={forces}", f"loss.coeffs.total_energy={energy}", "max_epochs=2"]


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in the one offline run in a folder."""
    (file,) = folder.rglob("*.wandb")
    inspect = [str(BIN / "wandb"), "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in lines.splitlines()]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three points that have finished, of which one is dominated, and one in each other state."""
    folder = tmp_path / "multirun" / "alloy" / "2026-01-01_10-00-00"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(PLAN))
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    ended = {"state": "finished", "ended": "2026-01-01T10:01:00"}
    make_point(folder, 0, coefficients(1, 1), values(0.02, 0.2, 0.3), **ended)
    make_point(folder, 1, coefficients(1, 10), values(0.01, 0.4, 0.2), **ended)
    make_point(folder, 2, coefficients(10, 1), values(0.03, 0.3, 0.1), **ended)
    running = make_point(folder, 3, coefficients(10, 10), state="running", **here)
    (running / "csv").mkdir()
    rows = f"epoch,step,{FORCES},{SORT},train_loss_step/forces_mse\n0,5,,0.9,\n1,9,,0.7,\n1,9,,,3.0\n2,14,,0.00"
    (running / "csv" / "metrics.csv").write_text(rows)  # the last line is torn
    make_point(
        folder,
        4,
        coefficients(100, 1),
        state="failed",
        error="RuntimeError: out of\nmemory",
        ended="2026-01-01T10:02:00",
    )
    return folder


# --- the front ---

COORDINATES = st.one_of(st.integers(0, 4).map(float), st.floats(0, 4), st.sampled_from([math.nan, math.inf]))


@given(st.lists(st.tuples(COORDINATES, COORDINATES), max_size=25))
def test_front_is_what_no_other_point_dominates(points: list[tuple[float, float]]) -> None:
    def dominates(left: tuple[float, float], right: tuple[float, float]) -> bool:
        return left[0] <= right[0] and left[1] <= right[1] and (left[0] < right[0] or left[1] < right[1])

    finite = {index for index, point in enumerate(points) if np.isfinite(point).all()}
    expected = {one for one in finite if not any(dominates(points[other], points[one]) for other in finite)}
    front = pareto_front(points)
    assert len(front) == len(set(front))
    assert set(front) == expected
    assert [points[index] for index in front] == sorted(points[index] for index in front)


def test_points_that_coincide_are_on_the_front_together() -> None:
    assert pareto_front([(1, 1), (2, 1), (1, 1), (1, 2)]) == [0, 2]
    assert pareto_front([(math.nan, 0), (1, 1), (0, math.inf)]) == [1]
    assert pareto_front([]) == []


def test_picture(tmp_path: Path) -> None:
    """The front in blue, what is dominated in grey; many points, few that coincide, one, none that is finite."""
    random = np.random.default_rng(0)
    crowd = [
        FrontPoint(*10 ** random.uniform(-4, 1, 2), f"{number}, {number}", number % 7 > 0) for number in range(150)
    ]
    front = draw_front(tmp_path / "crowd.png", crowd, "energy", "forces", "title", "labels: a, b")
    complete = [index for index, point in enumerate(crowd) if point.complete]
    assert front == [complete[index] for index in pareto_front([(crowd[each].x, crowd[each].y) for each in complete])]
    pixels = imread(tmp_path / "crowd.png")[..., :3]
    blue, grey = (np.abs(pixels - colour).max(axis=-1) < 0.02 for colour in ((0.122, 0.467, 0.706), (0.62, 0.62, 0.62)))
    assert blue.sum() > 300
    assert grey.sum() > 300
    few = [FrontPoint(0.5, 2.0, f"{number}") for number in range(12)]
    assert draw_front(tmp_path / "few.png", few, "x", "y") == list(range(12))
    assert draw_front(tmp_path / "one.png", [FrontPoint(0.0, -1.0, "alone")], "x", "y") == [0]
    assert draw_front(tmp_path / "none.png", [FrontPoint(math.nan, 1.0)], "x", "y") == []
    assert (tmp_path / "none.png").stat().st_size > 1000


# --- reading ---


def test_states_and_reasons(sweep: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    make_point(sweep, 6, state="running", host=socket.gethostname(), pid=gone.pid)
    make_point(sweep, 7, state="running", host="elsewhere", pid=1)
    make_point(sweep, 8, state="preempted")
    make_point(sweep, 9)
    make_point(sweep, 10, state="failed", error="ValueError: no frames left")
    (sweep / "11").mkdir()  # killed before it wrote anything
    finished = make_point(sweep, 12, state="running", host="elsewhere", result=values(1, 1, 1))
    (finished / "run.json").write_text('{"state": "fini')  # torn
    torn = make_point(sweep, 13, state="finished")
    (torn / "result.json").write_text('{"values": {"val0_')
    (torn / "csv").mkdir()
    (torn / "csv" / "metrics.csv").write_text(f"{SORT},step\n0.4,1\n")
    make_point(sweep, 14, state="finished")
    found = {point.name: point for point in read_sweep(sweep).points}
    states = {name: point.state for name, point in found.items() if name != "-"}
    assert list(states) == [str(number) for number in (*range(5), *range(6, 15))]
    assert [states[str(number)] for number in range(5)] == [*["finished"] * 3, "running", "failed"]
    assert [states[str(number)] for number in range(6, 11)] == ["killed", "running", "preempted", "starting", "failed"]
    assert [states[str(number)] for number in range(11, 15)] == ["starting", "finished", "finished", "finished"]
    assert found["3"].values == {SORT: 0.7}
    assert found["3"].seconds > 0
    assert found["4"].reason == "RuntimeError: out of memory"
    assert found["4"].seconds == 120
    assert found["0"].seconds == 90
    assert str(gone.pid) in found["6"].reason
    assert "elsewhere" in found["7"].reason
    assert found["10"].reason == "ValueError: no frames left"
    assert found["13"].values == {SORT: 0.4}
    assert "result.json" in found["14"].reason
    assert all(point.reason for point in found.values() if point.state != "finished")


def test_points_of_the_grid_that_have_not_been_started(sweep: Path) -> None:
    found = read_sweep(sweep)
    assert found.planned == 6
    assert found.swept == ["loss.coeffs.forces", "loss.coeffs.total_energy"]
    assert [found.short(setting) for setting in found.swept] == ["forces", "total_energy"]
    (absent,) = [point for point in found.points if point.state == "not started"]
    assert absent.overrides == {"loss.coeffs.forces": "100", "loss.coeffs.total_energy": "10", "max_epochs": "2"}
    assert (found.project, found.group, found.monitor) == ("potentials", GROUP, SORT)


def test_a_point_without_a_record_is_the_one_of_its_number_in_the_grid(sweep: Path) -> None:
    """Killed before it has written ``run.json``: it is listed once, with what it was asked for."""
    (sweep / "5").mkdir()
    (sweep / "4" / "run.json").write_text('{"state": "fail')  # torn
    points = {point.name: point for point in read_sweep(sweep).points}
    assert list(points) == ["0", "1", "2", "3", "4", "5"]
    assert [points[name].state for name in ("4", "5")] == ["starting", "starting"]
    assert points["4"].overrides == {**PLAN["points"][4], "max_epochs": "2"}
    assert points["5"].overrides == {**PLAN["points"][5], "max_epochs": "2"}


def test_points_of_a_sweep_that_goes_on_are_known_by_what_is_swept(sweep: Path) -> None:
    """``resume=auto`` and other settings that are not swept may differ; so may the numbers."""
    change(sweep / "sweep.json", fixed={"resume": "auto"}, points=PLAN["points"][::-1])
    assert [point.state for point in read_sweep(sweep).points if point.name == "-"] == ["not started"]


def test_points_in_folders_with_names_of_their_own(sweep: Path) -> None:
    """``hydra.sweep.subdir``."""
    (sweep / "0").rename(sweep / "forces=1")
    (sweep / "deeper").mkdir()
    (sweep / "1").rename(sweep / "deeper" / "1")
    (sweep / "report").mkdir()  # is none
    found = read_sweep(sweep)
    assert [point.name for point in found.points] == ["2", "3", "4", "deeper/1", "forces=1", "-"]
    assert [point.state for point in found.points].count("finished") == 3


def test_a_sampler_says_how_many_trials_there_are(sweep: Path) -> None:
    """Its values are found in the points; a range is not a grid."""
    change(sweep / "sweep.json", swept=["loss.coeffs.forces"], planned=20, points=None)
    found = read_sweep(sweep)
    assert found.planned == 20
    assert found.swept == ["loss.coeffs.forces", "loss.coeffs.total_energy"]
    assert len(found.points) == 5


@pytest.mark.parametrize("content", [None, '{"swept": ["loss.co'], ids=["missing", "torn"])
def test_without_sweep_json(sweep: Path, content: str | None) -> None:
    """Points are read all the same; those that have not been started are not known."""
    (sweep / "sweep.json").unlink()
    if content:
        (sweep / "sweep.json").write_text(content)
    found = read_sweep(sweep)
    assert found.planned is None
    assert len(found.points) == 5
    assert found.swept == ["loss.coeffs.forces", "loss.coeffs.total_energy"]
    assert (found.project, found.group, found.monitor) == ("potentials", GROUP, SORT)


def test_project_group_and_monitor_are_those_of_most_points(sweep: Path) -> None:
    """Otherwise those of the sweep; without W&B the group that points of a sweep have if no other one is given."""

    def shared() -> tuple[str, str, str]:
        found = read_sweep(sweep)
        return found.project, found.group, found.monitor

    other = "val1_epoch/weighted_sum"
    change(sweep / "3" / "run.json", group="another", project="else", monitor=other)
    assert shared() == ("potentials", GROUP, SORT)
    for number in (0, 1, 2):
        change(sweep / str(number) / "run.json", group="another", monitor=other)
    assert shared() == ("potentials", "another", other)
    for number in range(5):
        change(sweep / str(number) / "run.json", group=None, project=None, monitor=None)
    assert shared() == ("potentials", GROUP, SORT)
    change(sweep / "sweep.json", group=None, project=None)
    assert shared() == ("harness", "alloy/2026-01-01_10-00-00", SORT)


# --- the report ---


def test_report_of_an_unfinished_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(sweep), "--no-wandb"])
    out = capsys.readouterr().out
    rows = read(sweep / "sweep.csv")
    assert [row["point"] for row in rows] == ["2", "1", "0", "3", "4", "-"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "", "", ""]
    assert [row["front"] for row in rows] == ["False", "True", "True", "False", "False", "False"]
    assert rows[0]["loss.coeffs.forces"] == "10"
    assert float(rows[0][FORCES]) == 0.3
    assert float(rows[0]["test0_epoch/forces_rmse_per_type_Cu"]) == 0.5
    assert rows[3][FORCES] == ""
    assert float(rows[3][SORT]) == 0.7
    assert rows[4]["reason"] == "RuntimeError: out of memory"
    lines = out.splitlines()
    assert next(line.split("│")[1:3] for line in lines if line.startswith("│")) == ["    1 ", "     2 "]
    assert sum("per_type" in line for line in lines) == 0
    assert "point 4 (forces=100, total_energy=1) failed: RuntimeError: out of memory" in lines
    assert any(line.startswith("point - (forces=100, total_energy=10) not started") for line in lines)
    assert f"front       1, 0 (*), of {ENERGY} and {FORCES}" in lines
    assert (sweep / "pareto.png").stat().st_size > 10_000
    assert not list(sweep.rglob("*.wandb"))


def test_keys_can_be_chosen(sweep: Path, tmp_path: Path) -> None:
    found = rank(read_sweep(sweep), sort="forces_rmse")
    assert found.sort == FORCES
    assert [point.name for point in found.ranked] == ["0", "2", "1"]
    found = rank(read_sweep(sweep), energy="weighted_sum", forces="val0_epoch/forces_mae")
    assert found.axes == (SORT, "val0_epoch/forces_mae")
    assert [point.name for point in found.front] == ["2"]
    with pytest.raises(ValueError, match=r"'forces_rmsd'.*Did you mean.*forces_rmse"):
        rank(read_sweep(sweep), sort="forces_rmsd")
    main([str(sweep), "--no-wandb", "--sort", ENERGY, "--output", str(tmp_path / "elsewhere")])
    assert [row["point"] for row in read(tmp_path / "elsewhere" / "sweep.csv")][:3] == ["1", "0", "2"]
    assert not (sweep / "sweep.csv").exists()


def test_values_that_are_nan_are_not_ranked(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In JSON of Python and of others; on equal values the number decides."""
    make_point(sweep, 5, coefficients(100, 10), values(0.001, math.nan, math.nan), state="finished")
    make_point(sweep, 6, coefficients(1, 100), values(0.001, 0.1, None), state="finished")
    make_point(sweep, 7, coefficients(1, 1000), values(0.001, 0.1, 0.1), state="finished")
    main([str(sweep), "--no-wandb"])
    rows = {row["point"]: row for row in read(sweep / "sweep.csv")}
    assert list(rows) == ["2", "7", "1", "0", "5", "6", "3", "4"]
    assert rows["5"]["rank"] == rows["6"]["rank"] == ""
    assert rows["5"][SORT] == rows["6"][SORT] == "nan"
    # points 6 and 7 coincide
    assert [name for name, row in rows.items() if row["front"] == "True"] == ["7", "6"]
    assert f"point 5 (forces=100, total_energy=10) finished: {SORT} is nan" in capsys.readouterr().out


def test_without_forces_there_is_no_front(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (sweep / str(number) / "result.json").write_text(
            json.dumps({"monitor": SORT, "objective": number, "values": {ENERGY: 0.1, SORT: number}})
        )
    (sweep / "pareto.png").write_bytes(b"of a report before")
    main([str(sweep), "--no-wandb"])
    assert "no front" in capsys.readouterr().out
    assert not (sweep / "pareto.png").exists()


def test_log_to_wandb(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One offline run, in the project and group of the points, with table and picture."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    main([str(sweep)])
    assert "W&B run" in capsys.readouterr().out
    records = wandb_records(sweep)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert run["project"] == "potentials"
    assert run["run_group"] == GROUP
    assert run["job_type"] == "sweep"
    assert run["display_name"] == "report of alloy/2026-01-01_10-00-00"
    logged: dict[str, Any] = {}
    for record in records:
        if record["type"] == "history":
            logged |= record["history"]["item"]
    assert logged["sweep/pareto._type"] == "images/separated"
    assert logged["sweep/points._type"] == "table-file"
    assert logged["sweep/best"] == 0.1
    assert (logged["sweep/finished"], logged["sweep/failed"], logged["sweep/not_started"]) == (3, 1, 1)
    (table,) = sweep.rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(read(sweep / "sweep.csv")[0])
    assert [row[1] for row in content["data"]] == ["2", "1", "0", "3", "4", "-"]
    assert list(sweep.rglob("media/images/**/*.png"))


# --- what is refused ---


def test_not_a_sweep(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "sweep.json").write_text(json.dumps({**PLAN, "planned": 20, "points": None}))
    earlier = tmp_path / "earlier"  # by a version that wrote no sweep.json
    make_point(earlier, 0, state="finished", point=None)
    (earlier / "multirun.yaml").write_text("hydra: {}\n")
    for folder, words in [
        (tmp_path / "missing", "There is no directory"),
        (tmp_path / "empty", "not a sweep's directory: neither"),
        (earlier, "not a sweep's directory: neither"),
        (sweep.parents[2], "has sweeps in it. Give one of them, such as"),
        (sweep.parent, f"such as {sweep}"),
        (sweep / "0", f"output of a single training.*its parent {sweep}"),
        (begun, "No point of .* has been started"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([str(folder), "--no-wandb"])
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert re.search(words, said.err), said.err
        assert not said.out


def test_nothing_has_finished(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (sweep / str(number) / "result.json").unlink()
        (sweep / str(number) / "run.json").write_text(json.dumps({"state": "failed", "error": "ValueError: no"}))
    with pytest.raises(SystemExit) as ended:
        main([str(sweep), "--no-wandb"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "nothing has finished yet" in said.err
    assert "4 failed, 1 running, 1 not started" in said.err
    assert said.out.count("ValueError: no") == 3
    assert len(read(sweep / "sweep.csv")) == 6
    assert not (sweep / "pareto.png").exists()
