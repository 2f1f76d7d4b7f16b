"""The preview of a schedule shows the coefficients that the training will have."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from support.bad_input import BASE, composed, write_files
from support.commands import read_csv, run

from harness.job import execute, prepare
from harness.preview import main

TYPES = "data.type_names=[H,O]"  # no data are read then


@dataclass(frozen=True)
class Shown:
    """What a preview has printed and drawn."""

    text: str
    columns: list[str]
    rows: dict[float, dict[str, tuple[float, float]]]
    """By epoch and column: given and normalised, or one number twice; columns without a value are left out."""
    picture: np.ndarray | None


Show = Callable[..., Shown]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Show:
    def show(*arguments: str, picture: bool = True) -> Shown:
        path = tmp_path / "folder" / "curve.png"
        main([*arguments, "--output", str(path)])
        said = capsys.readouterr()
        assert said.err == ""
        assert f"picture  {path}" in said.out
        return Shown(said.out, *read_table(said.out), matplotlib.image.imread(path) if picture else None)

    return show


def read_table(text: str) -> tuple[list[str], dict[float, dict[str, tuple[float, float]]]]:
    (header,) = [line for line in text.splitlines() if line.startswith("┃")]
    columns = [cell.strip() for cell in header.strip("┃").split("┃")]
    rows = {}
    for line in text.splitlines():
        if line.startswith("│"):
            epoch, *cells = [cell.strip() for cell in line.strip("│").split("│")]
            pairs = zip(columns[1:], cells, strict=True)
            numbers = {name: [float(n) for n in cell.split(" → ")] for name, cell in pairs if cell != "-"}
            rows[float(epoch)] = {name: (each[0], each[-1]) for name, each in numbers.items()}
    return columns, rows


def check(shown: Shown, expected: Callable[[float], dict[str, float]]) -> None:
    """The table has what the formula gives, and that normalised."""
    assert len(shown.rows) > 3
    for epoch, row in shown.rows.items():
        given = expected(epoch)
        assert {name: row[name][0] for name in given} == pytest.approx(given, rel=1e-3)
        normalised = {name: value / sum(given.values()) for name, value in given.items()}
        assert {name: row[name][1] for name in given} == pytest.approx(normalised, rel=1e-3)


def test_a_nested_schedule(show: Show) -> None:
    shown = show("schedule=nested", "max_epochs=40", "loss=energy_force_stress", TYPES)

    def expected(epoch: float) -> dict[str, float]:
        late = float(np.clip((epoch - 20) / 16, 0, 1))
        forces = 10 * np.interp(epoch, [0, 4], [0.1, 1]) if epoch < 20 else 5 + 5 * math.cos(math.pi * late / 2) ** 2
        return {"per_atom_energy_mse": 5**late, "forces_mse": float(forces), "stress_mse": 100}

    check(shown, expected)
    assert shown.columns == ["epoch", "per_atom_energy_mse", "forces_mse", "stress_mse"]
    assert {0, 4, 20, 36, 39} <= set(shown.rows)  # the boundaries, the first and the last
    assert 12 <= len(shown.rows) <= 16
    assert shown.text.startswith("Join: given → normalised")
    assert shown.picture is not None
    assert shown.picture.shape[0] > 300
    assert len(np.unique(shown.picture.reshape(-1, 4), axis=0)) > 50  # lines of several colours


def test_rows_are_as_many_as_asked_for(show: Show) -> None:
    shown = show("schedule=two_stage", "max_epochs=50", "--every", "10", TYPES)
    assert list(shown.rows) == [0, 10, 20, 30, 38, 40, 49]  # the second stage begins at 37.5, between two epochs
    for epoch, row in shown.rows.items():
        assert (row["per_atom_energy_mse"][0], row["forces_mse"][0]) == ((1, 10) if epoch < 38 else (1000, 100))
    assert "From epoch 37.5 on: lr=0.001." in shown.text


def test_weights_of_atom_types_by_step(show: Show) -> None:
    shown = show(
        "schedule=linear",
        "schedule.interval=step",
        "schedule.start_epoch=2.5",
        "+schedule.start.forces_mse_per_type={O: 0}",
        "+schedule.end.forces_mse_per_type={O: 3}",
        "max_epochs=10",
        TYPES,
    )
    assert "at every step" in shown.text
    assert {0, 2.5, 10} <= set(shown.rows)
    for epoch, row in shown.rows.items():
        oxygen = float(np.interp(epoch, [2.5, 10], [0, 3]))
        assert row["forces_mse_per_type_O"] == pytest.approx((oxygen, oxygen / (1 + oxygen)), rel=1e-3)
        assert row["forces_mse_per_type_H"] == pytest.approx((1, 1 / (1 + oxygen)), rel=1e-3)
        assert row["forces_mse"][0] == pytest.approx(np.interp(epoch, [2.5, 10], [10, 1]), rel=1e-3)
    one = show("schedule=linear", TYPES)
    assert shown.picture is not None
    assert one.picture is not None
    assert shown.picture.shape[0] > 1.5 * one.picture.shape[0]  # a second panel


def test_the_learning_rate_is_that_of_the_scheduler(show: Show) -> None:
    shown = show("schedule=deepmd", "max_epochs=30", TYPES)
    for epoch, row in shown.rows.items():
        assert row["relative learning rate"][0] == pytest.approx((1 + math.cos(math.pi * epoch / 30)) / 2, rel=1e-3)

    def expected(epoch: float) -> dict[str, float]:
        rate = (1 + math.cos(math.pi * epoch / 30)) / 2
        return {"per_atom_energy_mse": 1 - 0.98 * rate, "forces_mse": 1 + 999 * rate}

    check(shown, expected)


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["schedule=deepmd", "lr_scheduler=plateau"], "ReduceLROnPlateau follows what the training brings"),
        (["schedule=deepmd", "lr_scheduler=none"], ""),
        (
            ["schedule=piecewise", "max_epochs=60"],
            "What the schedule has at epoch 75 never comes",
        ),
        (["schedule=piecewise", "max_epochs=-1"], "max_epochs=-1 has no end: shown are the first 94 epochs"),
        ([], "There is no schedule"),
        (
            [
                "+callbacks.own._target_=harness.callbacks.LossCoefficientScheduler",
                "+callbacks.own.schedule={3: {forces_mse: 1}}",
            ],
            "callbacks.own moves the coefficients during the training",
        ),
        (["adaptive=softadapt"], "adaptive moves the coefficients during the training"),
    ],
)
def test_what_cannot_be_foreseen_is_said(overrides: list[str], note: str, show: Show) -> None:
    shown = show(*overrides, TYPES)
    assert note in shown.text.replace("\n", " ")
    if note.startswith(("Reduce", "There")) or not note:
        assert len({tuple(row.items()) for row in shown.rows.values()}) == 1  # nothing moves


@pytest.mark.parametrize(
    "interval", ["+loss.schedule.interval=step", "+loss.schedule_interval=step"], ids=["in the schedule", "beside it"]
)
def test_a_schedule_of_the_loss_has_an_interval(interval: str, show: Show) -> None:
    linear = "{_target_: harness.schedules.Linear, start: {forces_mse: 0}, end: {forces_mse: 4}, start_epoch: 0, "
    by_step = show(f"+loss.schedule={linear} end_epoch: '${{max_epochs}}'}}", interval, "max_epochs=4", TYPES)
    assert "at every step" in by_step.text
    assert by_step.rows[4]["forces_mse"][0] == 4


def test_a_loss_may_have_a_schedule_of_its_own(show: Show) -> None:
    shown = show("+loss.schedule={_target_: harness.schedules.Constant, coeffs: {forces_mse: 3}}", TYPES)
    assert shown.rows[0] == {"per_atom_energy_mse": (1, 0.25), "forces_mse": (3, 0.75)}


MISTAKES = [
    (
        ["schedule=linear", "+schedule.start.force_mse=1", "+schedule.end.force_mse=1"],
        ["'force_mse'", "Did you mean forces_mse? Valid names: per_atom"],
    ),
    (
        ["schedule=linear", "+schedule.start.forces_mse_H=1", "+schedule.end.forces_mse_H=1"],
        ["'forces_mse_H'", "Weights of atom types need a component with `per_type: true`"],
    ),
    (["schedule=linear", "schedule.start_epoch=-4"], ["`start_epoch`", "at least 0", "-4"]),
    (["+schedule.start=3"], ["Constant takes no argument 'start'", "It takes coeffs."]),
    (["+schedule.intervall=step"], ["Constant takes no argument 'intervall'. It takes coeffs."]),
    (["schedule=linear", "~schedule.end"], ["Linear is not given end. It takes start, end, start_epoch"]),
    (["schedule=linear", "schedule.intervall=step"], ["Did you mean schedule.interval?"]),
    (["schedule=linear", "schedule.interval=batch"], ["schedule.interval is epoch or step, found 'batch'"]),
    (
        ["schedule=nested", "+schedule.schedules.0.by.interval=step"],
        ["Linear has no `interval`", "`interval: step` in the outermost schedule of a config"],
    ),
    (
        ["schedule=linear", "schedule_interval=step"],
        ["no setting schedule_interval", "Did you mean schedule.interval?"],
    ),
    (
        ["schedule=linear", "schedule.start={forces_mse: 1, stress_mse: 5}"],
        [
            "schedule.start has no stress_mse; it has per_atom_energy_mse, forces_mse. A dictionary",
            "\n  '+schedule.start={forces_mse: 1, stress_mse: 5}'  adds",
            "\n  '~schedule.start' '+schedule.start={forces_mse: 1, stress_mse: 5}'  puts",
        ],
    ),
    (["schedule.coeffs={forces_mse: 3}"], ["it is empty", "\n  '+schedule.coeffs={forces_mse: 3}'  adds"]),
    (
        ["schedule=linear", "schedule.end.force_mse=1"],
        ["Did you mean forces_mse?", "\n  +schedule.end.force_mse=1  adds", "'+schedule.end={...}'"],
    ),
    (["loss.per_type_forces_coeffs.H=1"], ["is null", "\n  'loss.per_type_forces_coeffs={H: 1}'\n"]),
    (
        ["schedule=piecewise", "schedule.milestones.0.stress_mse=4"],
        ["0 is a number", "\n  '+schedule.milestones={0: {stress_mse: 4}}'\n"],
    ),
    (
        ["schedule={_target_: harness.schedules.Join, schedules: []}"],
        [
            "schedule is a harness.schedules.Constant",
            "\n  '~schedule' '+schedule={_target_: harness.schedules.Join",
        ],
    ),
    (
        ["schedule=nested", "schedule.schedules.1._target_=harness.schedules.Linera"],
        ["harness.schedules has no Linera. Did you mean harness.schedules.Linear?"],
    ),
    (["schedule._target_=harness.schedule.Linear"], ["harness has no schedule. Did you mean harness.schedules.Linear"]),
    (["schedule._target_=harnes.schedules.Linear"], ["no module harnes. Did you mean harness.schedules.Linear?"]),
    (["schedule._target_=nowhere.Thing"], ["no module nowhere.", "PYTHONPATH"]),
    (["schedule._target_=harness.schedules.Linear.foo"], ["harness.schedules.Linear has no foo."]),
    (["schedule=linear", "adaptive=softadapt"], ["SoftAdapt and by the schedule Linear", "only one of them"]),
    (["schedule=cosine", "adaptive=uncertainty"], ["the schedule Cosine and by Uncertainty", "only one of them"]),
    (
        [
            "schedule=linear",
            "+callbacks.own._target_=harness.callbacks.LossCoefficientScheduler",
            "+callbacks.own.schedule={3: {forces_mse: 1}}",
        ],
        ["LossCoefficientScheduler and by the schedule Linear", "only one of them"],
    ),
    (["schedule=linea"], ["schedule/linea", "linear"]),
    (["schedule.coef={}"], ["no setting schedule.coef", "Did you mean schedule.coeffs"]),
    (["foo=("], ["foo=("]),
    (["+loss.schedule=${schedule}", "schedule=cosine"], ["Both `schedule`", "`loss.schedule`"]),
    (["data._target_=torch.nn.Identity", "data.type_names=null"], ["data is a config", "LightningDataModule"]),
    (["max_epochs=0"], ["max_epochs is a whole number", "0"]),
    (["--every", "0"], ["--every", "at least 1"]),
    (["--evry", "3"], ["unrecognized arguments: --evry"]),
    (["--output", "somewhere.doc"], ["doc", "png"]),
    (
        ["lr_scheduler.scheduler.T_max=x", "schedule=deepmd"],
        ["lr_scheduler.scheduler.T_max is a number, at least 1", "'x'"],
    ),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(each) for each, _ in MISTAKES])
def test_mistakes_are_told_in_one_message(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path / "curve.png"), TYPES, *arguments])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert not (tmp_path / "curve.png").exists()


def test_the_command(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "harness.preview", "schedule=cosine", "max_epochs=8", TYPES], tmp_path)
    assert done.code == 0, done.err
    assert done.err == ""
    assert list(read_table(done.out)[1]) == list(range(8))
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.png"]  # and no directory of a run


def test_a_training_has_what_was_shown(show: Show, tmp_path: Path) -> None:
    """Type names and number of steps come from the data; the learning rate changes with each step."""
    write_files(tmp_path)
    settings = [
        *BASE,
        f"data.train={tmp_path}/frames.xyz",
        "schedule=deepmd",
        "+schedule.start.forces_mse_per_type={Cu: 0}",
        "+schedule.limit.forces_mse_per_type={Cu: 3}",
        "lr_scheduler.interval=step",
        "lr_scheduler.scheduler.T_max=7",
        "trainer.accumulate_grad_batches=2",
        "max_epochs=3",
    ]
    shown = show(*settings)
    config = composed([*settings, "logger=csv", "callbacks.parity=null", "dry_step=false", "test=false"])
    config.output_dir = str(tmp_path / "run")
    execute(prepare(config))
    rows = [row for row in read_csv(tmp_path / "run") if "loss_coeff/forces_mse" in row]
    assert list(shown.rows) == [0, 1, 2]
    assert len(rows) == 3
    names = [name for name in shown.columns if re.match("per_atom|forces", name)]
    assert {"forces_mse_per_type_Cu", "forces_mse_per_type_Ag"} < set(names)
    for row, epoch in zip(rows, shown.rows, strict=True):
        for name in names:
            assert row[f"loss_coeff/{name}"] == pytest.approx(shown.rows[epoch][name][1], rel=1e-3), name
    assert len({row["loss_coeff/forces_mse"] for row in rows}) == 3


def test_a_config_directory_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own" / "schedule").mkdir(parents=True)
    (tmp_path / "own" / "schedule" / "mine.yaml").write_text(
        "_target_: harness.schedules.Linear\nstart: {forces_mse: 0}\nend: {forces_mse: 3}\n"
        "start_epoch: 0\nend_epoch: 3\n"
    )
    options = ["--config-dir", str(tmp_path / "own"), "--output", str(tmp_path / "x.png"), "data.type_names=[Cu]"]
    main(["schedule=mine", "max_epochs=4", *options])
    assert "2 → 0.6667" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["schedule=mine", "schedule.start_epohc=4", *options])
    assert "Did you mean schedule.start_epoch?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["schedule=mine", "--config-dir", str(tmp_path / "nowhere")])
    assert "no such directory" in capsys.readouterr().err


def test_a_stage_that_never_comes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["max_epochs=2", "data.type_names=[Cu]", "--output", str(tmp_path / "x.png")]
    for choice, told in (("two_stage", True), ("linear", False)):
        main([f"schedule={choice}", *options])
        assert ("never comes" in capsys.readouterr().out) == told
