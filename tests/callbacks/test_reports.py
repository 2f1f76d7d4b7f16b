"""What a training shows of its validations and tests: tables, charts, pictures and the summary, read back."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from support.alloy import LOSS, build, data, trainer  # noqa: F401 - a fixture
from support.commands import BIN, ROOT, SIZES, Finished, read_csv, read_wandb, run

import harness
from harness.callbacks import BestEpoch, LossProgressBar, PerTypeReport, ValidationTable
from harness.callbacks.per_type import _Table
from harness.callbacks.tables import atoms_behind, values_table
from harness.data import EmbeddedAlloyDataModule
from harness.metrics import Report
from harness.module.reporting import types_with_data

PER_TYPE = ("forces_rmse_per_type", "forces_mae_per_type")


# --- one training on two ranks, and all that it has left ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The alloy on two ranks; a NaN label on rank 1 in step 1, which is skipped."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "harness.train"]
    overrides = [
        "experiment=alloy",
        *SIZES,
        "logger=[wandb,csv]",
        "dry_step=false",
        "callbacks.nonfinite.action=skip",
        "+callbacks.spoil={_target_: support.failure_callbacks.Spoil, steps: [1], rank: 1}",
    ]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = run([*command, *overrides], tmp_path_factory.mktemp("reports"), WANDB_MODE="offline", PYTHONPATH=paths)
    assert done.code == 0, done.err[-3000:]
    return done


@pytest.fixture(scope="module")
def sets() -> EmbeddedAlloyDataModule:
    """The data of that training."""
    module = EmbeddedAlloyDataModule(num_frames=24, split={"val": 4, "test": 4}, cutoff=4.5, batch_size=4)
    module.setup()
    return module


def epochs(finished: Finished, stage: str) -> list[dict[str, float]]:
    """Values of a stage in the CSV file, by epoch."""
    rows = [row for row in read_csv(finished.runs[0]) if f"{stage}/weighted_sum" in row]
    return sorted(rows, key=lambda row: row["epoch"])


def tables(finished: Finished, name: str) -> list[dict[str, Any]]:
    """Tables of that name in the W&B run, in their order."""
    (media,) = finished.runs[0].glob("wandb/offline-run-*/files/media/table")
    folder, _, stem = name.rpartition("/")
    found = (media / folder).glob(f"{stem}_[0-9]*_*.table.json")
    numbered = {int(path.name.removeprefix(f"{stem}_").split("_")[0]): path for path in found}
    return [json.loads(numbered[number].read_text()) for number in sorted(numbered)]


def numbers_of_atoms(sets: EmbeddedAlloyDataModule, name: str) -> list[int]:
    frames = (sets.val_sets if name == "val0" else sets.test_sets)[0].frames
    symbols = [symbol for frame in frames for symbol in frame.atoms.get_chemical_symbols()]
    return [symbols.count(name) for name in sets.type_names]


@pytest.mark.parametrize("stage", ["val0", "test0"])
def test_tables_by_type_hold_the_logged_values(finished: Finished, sets: EmbeddedAlloyDataModule, stage: str) -> None:
    rows, found = epochs(finished, f"{stage}_epoch"), tables(finished, f"{stage}_report/per_type")
    assert len(found) == len(rows) == (2 if stage == "val0" else 1)
    for table, row in zip(found, rows, strict=True):
        assert table["columns"] == ["type", *PER_TYPE, "atoms"]
        assert [line[0] for line in table["data"]] == sets.type_names
        assert [line[3] for line in table["data"]] == numbers_of_atoms(sets, stage)
        for line in table["data"]:
            for name, value in zip(PER_TYPE, line[1:3], strict=True):
                assert value == pytest.approx(row[f"{stage}_epoch/{name}_{line[0]}"], rel=1e-6)
    for name in PER_TYPE:
        charts = tables(finished, f"{stage}_report/per_type_{name}_table")
        assert [chart["columns"] for chart in charts] == [["type", name]] * len(rows)
        at = 1 + PER_TYPE.index(name)
        assert [chart["data"] for chart in charts] == [
            [[line[0], line[at]] for line in table["data"]] for table in found
        ]
    _, history = read_wandb(finished.runs[0])
    logged = [entry["item"] for entry in history if f"{stage}_report/per_type._type" in entry["item"]]
    assert [item["epoch"] for item in logged] == [row["epoch"] for row in rows]
    assert [item["trainer/global_step"] for item in logged] == [row["step"] for row in rows]


def test_a_test_leaves_a_file_and_a_picture(finished: Finished, sets: EmbeddedAlloyDataModule) -> None:
    folder = finished.runs[0]
    with (folder / "test0_per_type.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == ["type", *PER_TYPE, "atoms"]
    (row,) = epochs(finished, "test0_epoch")
    for line, name, number in zip(lines, sets.type_names, numbers_of_atoms(sets, "test0"), strict=True):
        assert line[0] == name
        expected = [row[f"test0_epoch/{component}_{name}"] for component in PER_TYPE]
        assert [float(cell) for cell in line[1:3]] == pytest.approx(expected, rel=1e-12)
        assert line[3] == str(number)
    assert is_picture(folder / "per_type_test0.png")
    assert f"atom types  {folder / 'per_type_test0.png'}" in finished.out.replace("\n", "")


def is_picture(path: Path) -> bool:
    from matplotlib.image import imread

    picture = imread(path)
    return (
        picture.shape[0] > 300 and picture.shape[1] > 500 and len(set(map(tuple, picture[::5, ::5].reshape(-1, 4)))) > 3
    )


def test_the_summary_has_the_best_epoch(finished: Finished) -> None:
    summary, _ = read_wandb(finished.runs[0])
    rows = epochs(finished, "val0_epoch")
    best = min(rows, key=lambda row: row["val0_epoch/weighted_sum"])
    assert summary["summary"]["best/epoch"] == best["epoch"]
    assert summary["summary"]["best/step"] == best["step"]
    values = {key: value for key, value in best.items() if key.startswith("val0_epoch/")}
    assert len(values) == 23
    for key, value in values.items():
        assert summary["summary"][f"best/{key}"] == pytest.approx(value, rel=1e-6)


def test_the_terminal_has_a_table_of_each_validation(finished: Finished) -> None:
    rows, training = epochs(finished, "val0_epoch"), epochs(finished, "train_loss_epoch")
    lines = finished.out.splitlines()
    headings = [at for at, line in enumerate(lines) if line.startswith("epoch ")]
    assert len(headings) == 2  # rank 0 alone
    best: dict[str, tuple[float, int]] = {}
    for epoch, (at, row, loss) in enumerate(zip(headings, rows, training, strict=True)):
        parts = [
            f"{loss[f'loss_coeff/{name}']:.3g} * {loss[f'train_loss_epoch/{name}']:.3g} ({name})"
            for name in ("per_atom_energy_mse", "forces_mse", "stress_mse")
        ]
        assert lines[at] == (
            f"epoch {epoch}, step {row['step']:.0f}: training weighted_sum {loss['train_loss_epoch/weighted_sum']:.5g} "
            f"= {' + '.join(parts)}"
        )
        table = {cells[0]: cells[1:] for cells in map(cells_of, lines[at + 4 : at + 20]) if len(cells) > 1}
        assert len(table) == 15
        for name, cells in table.items():
            value = row[f"val0_epoch/{name}"]
            best[name] = min(best.get(name, (math.inf, 0)), (value, epoch))
            assert cells[:3] == [f"{value:.5g}", f"{best[name][0]:.5g}", str(best[name][1])]
            keys = [f"val0_epoch/{name}_{kind}" for kind in ("Cu", "Pd", "Ag", "Au")]
            assert cells[3:7] == ([f"{row[key]:.5g}" for key in keys] if name in PER_TYPE else [""] * 4)
        assert table["forces_rmse"][7] == "eV/Å"
        assert cells_of(lines[at + 2]) == [
            *("component", "value", "best so far", "in epoch"),
            *("Cu", "Pd", "Ag", "Au", "unit"),
        ]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(finished: Finished) -> None:
    folder = finished.runs[0]
    skipped = [row for row in read_csv(folder) if "nonfinite/skipped" in row]
    assert [(row["step"], row["nonfinite/skipped"]) for row in skipped] == [(1.0, 1.0)]
    assert finished.err.count("The loss is nan in step 1 of epoch 0") == 1
    assert "rank 1: labels of forces: 3 of " in finished.err
    assert {path.name for path in (folder / "nonfinite").iterdir()} == {"epoch0_step1.txt", "epoch0_step1_rank1.pt"}
    for row in epochs(finished, "train_loss_epoch"):
        assert math.isfinite(row["train_loss_epoch/weighted_sum"])
    summary, history = read_wandb(folder)
    assert summary["summary"]["nonfinite/skipped"] == 1
    assert [entry["item"]["trainer/global_step"] for entry in history if "nonfinite/skipped" in entry["item"]] == [1]


# --- what one training does not show ---

NAMES = [f"T{index}" for index in range(12)]


def managed(types: int, *more: dict[str, Any]) -> harness.MetricsManager:
    rmse = {"name": "rmse", "field": "forces", "metric": harness.RootMeanSquaredError(), "per_type": True}
    largest = {"name": "largest", "field": "forces", "metric": harness.MaximumAbsoluteError(), "per_type": True}
    return harness.MetricsManager([rmse, largest, *more], type_names=NAMES[:types])


def measured(manager: harness.MetricsManager, types: list[int], labels: torch.Tensor) -> Report:
    with torch.no_grad():
        manager({"forces": torch.zeros(len(types), 3)}, {"forces": labels, "atom_types": torch.tensor(types)})
    (values,) = harness.compute_together([manager])
    return values.to_report()


def test_atoms_are_those_behind_each_value() -> None:
    labelled = {"name": "labelled", "field": "forces", "metric": harness.MeanAbsoluteError(), "per_type": True}
    mapped = harness.MappedFieldModifier("forces", "forces")
    unread = {"name": "other", "field": mapped, "metric": harness.MaximumAbsoluteError(), "per_type": True}
    manager = managed(3, {**labelled, "ignore_nan": True}, unread)
    labels = torch.ones(5, 3)
    labels[1] = torch.nan
    labels[4, 0] = torch.nan
    report = measured(manager, [0, 0, 0, 2, 2], labels)
    assert atoms_behind(manager, report) == {
        "rmse": [3.0, 0.0, 2.0],
        "largest": [3.0, 0.0, 2.0],  # those of the RMSE, which has counted
        "labelled": [2.0, 0.0, 5 / 3],
        "other": [None, None, None],
    }
    table = _Table.of(manager, report.values, atoms_behind(manager, report))
    assert table.columns == [
        "type",
        "rmse",
        "largest",
        "labelled",
        "other",
        "atoms",
        "atoms of labelled",
        "atoms of other",
    ]
    assert table.rows[2][5:] == [2, 5 / 3, None]
    assert [str(cell) for cell in table.rows[1]] == ["T1", *["nan"] * 4, "0", "0", "None"]
    assert table.charted == ["rmse", "labelled"]


@pytest.mark.parametrize("number", [4, 89])
def test_pictures_of_few_and_of_many_types(tmp_path: Path, number: int) -> None:
    names = [f"X{index}" for index in range(number)]
    values = {"rmse": [0.1 + index / 100 for index in range(number)], "mse": [math.nan] + [0.01] * (number - 1)}
    table = _Table(names, values, {"rmse": [10.0**6] * number}, {"rmse": "eV/Å", "mse": "(eV/Å)²"}, list(values))
    table.draw(tmp_path / "a.png", "title")
    assert is_picture(tmp_path / "a.png")


def test_without_types_there_is_no_report(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    fit = trainer(tmp_path, callbacks=[PerTypeReport(output_dir=tmp_path / "out")], max_epochs=1)
    module = build(data, val_metrics=harness.EnergyForceMetrics)
    fit.fit(module, datamodule=data)
    fit.test(module, datamodule=data, verbose=False)
    assert not (tmp_path / "out").exists()


def lines_of(table: Any) -> list[str]:
    console = Console(width=140, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text().splitlines()


def test_many_types_are_told_and_not_shown() -> None:
    report = measured(managed(12), list(range(12)), torch.ones(12, 3))
    text = lines_of(values_table("", managed(12), report.values, {"rmse": (0.5, 3)}))
    assert cells_of(text[1]) == ["component", "value", "best so far", "in epoch", "unit"]
    assert cells_of(text[3]) == ["rmse", "1", "0.5", "3", "eV/Å"]
    assert cells_of(text[4]) == ["largest", "1", "-", "-", "eV/Å"]
    assert " ".join(map(str.strip, text[-2:])) == "12 types: values of each are logged as rmse, largest with _<type>"
    text = lines_of(values_table("", managed(12), report.values, columns=["value", "types"], max_types=12))
    assert cells_of(text[1]) == ["component", "value", *NAMES]


class Row(CSVLogger):
    """Keeps what it is to leave out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.left_out: list[str] = []

    def leave_out(self, names: Iterable[str]) -> None:
        self.left_out += names


def test_types_that_the_data_do_not_have_are_not_shown(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    """As after the fine-tuning of a universal model, which knows 89; the CSV files have their columns."""
    report = measured(managed(12), [3, 7, 7], torch.ones(3, 3))
    present = types_with_data(report, managed(12))
    assert present == ["T3", "T7"]
    text = lines_of(values_table("", managed(12), report.values, type_names=present))
    assert cells_of(text[1]) == ["component", "value", "T3", "T7", "unit"]
    assert "10 other types of the model without data" in " ".join(" ".join(text[-2:]).split())
    table = _Table.of(managed(12), report.values, atoms_behind(managed(12), report))
    assert len(table.rows) == 12
    assert [row[0] for row in table.of_types(present).rows] == present
    assert table.of_types(present).rows[1] == table.rows[7]
    diverged = measured(managed(2), [0], torch.full((1, 3), torch.nan))
    assert types_with_data(diverged, managed(2)) == ["T0"]  # a value that is NaN, but counted

    types = [*data.type_names, "He", "Xe"]
    row = Row(tmp_path)
    fit = trainer(tmp_path, callbacks=[ValidationTable()], max_epochs=1, logger=row, log_every_n_steps=1)
    fit.fit(build(data, type_names=types, val_metrics=LOSS), datamodule=data)
    assert {"val0_epoch/by_type_He", "train_loss_step/by_type_Xe"} <= set(row.left_out)
    assert not any(name.endswith("_Cu") for name in row.left_out if name.startswith("val"))


class AtEpochs(Callback):
    """Makes validations of an epoch look as good as they are told to be."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        manager = pl_module.val_metrics[0]
        manager.reset()
        error = torch.full((1, 3), self.values[trainer.current_epoch], dtype=torch.float64)
        with torch.no_grad():
            manager({"forces": error}, {"forces": torch.zeros_like(error)})


def test_the_best_is_kept_over_a_restart(
    data: EmbeddedAlloyDataModule,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors = functools.partial(
        harness.MetricsManager, [{"name": "mae", "field": "forces", "metric": harness.MeanAbsoluteError(), "coeff": 1}]
    )
    values = AtEpochs(3.0, 1.0, math.nan, 2.0, 0.5)

    def fit(epochs: int, table: ValidationTable, best: BestEpoch, **options: Any) -> list[list[str]]:
        fit = trainer(tmp_path, callbacks=[values, table, best], max_epochs=epochs)
        fit.fit(build(data, val_metrics=errors), datamodule=data, weights_only=True, **options)
        fit.save_checkpoint(tmp_path / "end.ckpt")
        return [cells_of(line)[1:4] for line in capsys.readouterr().out.splitlines() if "│ mae" in line]

    best = BestEpoch("val0_epoch/mae")
    assert fit(3, ValidationTable(), best) == [["3", "3", "0"], ["1", "1", "1"], ["-", "1", "1"]]
    assert best.best == {
        "best/epoch": 1,
        "best/step": 7,
        "best/val0_epoch/mae": 1.0,
        "best/val0_epoch/weighted_sum": 1.0,
    }
    again = BestEpoch("val0_epoch/mae")
    # the second of the two tables that are due is printed
    assert fit(5, ValidationTable(every_n_epochs=5), again, ckpt_path=tmp_path / "end.ckpt") == [["0.5", "0.5", "4"]]
    assert (again.best["best/epoch"], again.best["best/step"]) == (4, 19)
    other = BestEpoch("train_loss_epoch/weighted_sum")
    other.load_state_dict(again.state_dict())
    assert other.best == {}  # something else is monitored


def test_a_value_of_the_training_may_be_monitored(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:  # noqa: F811
    best, module = BestEpoch("train_loss_epoch/forces_mse"), build(data)
    fit = trainer(tmp_path, callbacks=[best], max_epochs=1)
    fit.fit(module, datamodule=data)
    assert best.best["best/train_loss_epoch/forces_mse"] == module.reports["train_loss"].values["forces_mse"]
    assert best.best["best/val0_epoch/forces_rmse"] == module.reports["val0"].values["forces_rmse"]


def test_the_progress_bar_shows_what_is_named(
    data: EmbeddedAlloyDataModule,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What stands behind the bar after each step: values of the last step that was logged, in the order of names."""
    monkeypatch.setenv("COLUMNS", "300")  # the bar is as wide as the terminal
    names, monitor = ["by_type_Pd", "weighted_sum", "forces_mse"], "val0_epoch/weighted_sum"
    bar = LossProgressBar(names, monitor=monitor)
    logger = CSVLogger(tmp_path, name="", version="csv")
    fit = trainer(tmp_path, callbacks=[bar], enable_progress_bar=True, logger=logger, log_every_n_steps=3)
    module = build(data)
    fit.fit(module, datamodule=data)
    rows = read_csv(tmp_path)
    logged = {int(row["step"]): row for row in rows if "train_loss_step/weighted_sum" in row}
    monitored = {int(row["epoch"]): f"{row[monitor]:.4g}" for row in rows if monitor in row}
    assert list(logged) == [2, 5]
    assert list(monitored) == [0, 1]
    shown = {}  # after a step, in an epoch: what was drawn last before the next one
    pattern = re.compile(r"Epoch (\d+):.*?(\d+)/4 \[[^,\]]*, [^,\]]*(?:, )?(.*?)\]")
    for drawn in re.split(r"[\r\n]", capsys.readouterr().out):
        match = pattern.search(drawn)
        if match and match[2] != "0":  # a bar that starts has what is behind the one before
            shown[int(match[1]), int(match[2])] = dict(each.split("=") for each in match[3].split(", ") if each)
    assert list(shown) == [(epoch, done) for epoch in (0, 1) for done in (1, 2, 3, 4)]
    for (epoch, done), values in shown.items():
        before = [step for step in logged if step < 4 * epoch + done]
        row = logged[before[-1]] if before else None
        expected = {} if row is None else {name: f"{row[f'train_loss_step/{name}']:.4g}" for name in names}
        validated = epoch if done == 4 else epoch - 1  # the bar of an epoch stays until its validation has ended
        expected |= {monitor: monitored[validated]} if validated in monitored else {}
        assert list(values.items()) == list(expected.items()), (epoch, done)
    last = logged[5]
    assert bar.get_metrics(fit, module) == {
        **{name: f"{last[f'train_loss_step/{name}']:.4g}" for name in names},
        monitor: monitored[1],
    }


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown columns \['mean'\]. Valid ones: value, best, epoch, types, unit"):
        ValidationTable(columns=["value", "mean"])
    for callback in (ValidationTable, PerTypeReport):
        with pytest.raises(ValueError, match="every_n_epochs is a whole number, at least 1, found 0"):
            callback(every_n_epochs=0)
    with pytest.raises(ValueError, match="max_types is a whole number, at least 0, found -1"):
        ValidationTable(max_types=-1)
