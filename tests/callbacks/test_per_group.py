"""Errors by group of frames: tables in the terminal, in W&B and in files, of metrics that are no others by them."""

from __future__ import annotations

import csv
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from rich.console import Console
from support.alloy import build, trainer
from support.commands import TINY
from support.configs import composed
from support.grouped import GroupedAlloyDataModule

import harness
from harness.callbacks import LossProgressBar, PerGroupReport, ValidationTable
from harness.callbacks.per_group import _Groups
from harness.callbacks.tables import is_better, values_table
from harness.job.build import build_module
from harness.metrics import Report

METRICS = functools.partial(
    harness.EnergyForceMetrics,
    extra_metrics=[
        {"name": "forces_mae_by_set", "field": "forces", "metric": harness.MeanAbsoluteError(), "per_set": True},
        {
            "name": "mean_of_sets",
            "field": "forces",
            "metric": harness.MeanAbsoluteError(),
            "per_set_coeffs": {"first": 1, "second": 2},
        },
    ],
)


@pytest.fixture(scope="module")
def data() -> GroupedAlloyDataModule:
    module = GroupedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float64", seed=1
    )
    module.setup()
    return module


def module_of(data: GroupedAlloyDataModule, **options: Any) -> harness.ForceFieldModule:
    names = {name: getattr(data, name) for name in ("group_names", "set_names")}
    return build(data, val_metrics=METRICS, labelled_sets=data.labelled_sets("train"), **names, **options)


def test_groups_are_shown_and_change_nothing(
    data: GroupedAlloyDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = PerGroupReport(every_n_epochs=2, output_dir=tmp_path / "out")
    reports = {}
    for name, callbacks in (("with", [report, ValidationTable()]), ("without", [])):
        module = module_of(data)
        bar = LossProgressBar(["weighted_sum"])  # which has ended when the test's tables are printed
        fit = trainer(tmp_path, callbacks=[bar, *callbacks], max_epochs=2, enable_progress_bar=True)
        fit.fit(module, datamodule=data)
        if name == "with":
            shown = capsys.readouterr().out
            fit.save_checkpoint(tmp_path / "end.ckpt")
            state = torch.load(tmp_path / "end.ckpt", weights_only=True)
            assert (state["group_names"], state["set_names"]) == (list(data.group_names), list(data.set_names))
        fit.test(module, datamodule=data, verbose=False)
        reports[name] = module.reports
    assert shown.count("validation set 0 by group") == 1  # of two epochs
    for name in ("forces_mae_by_set@first", "mean_of_sets@second"):
        assert len(re.findall(rf"{name}\W+[\d.]", shown)) == 2  # once an epoch
    assert "test set 0 by group" in capsys.readouterr().out
    for stage in ("val0", "test0"):
        assert str(reports["with"][stage].values) == str(reports["without"][stage].values)
        by_group = reports["with"][stage].by_group
        with (tmp_path / "out" / f"{stage}_per_group.csv").open() as file:
            header, *rows = csv.reader(file)
        names = [name for name in header if name not in ("group", "frames")]
        assert header[:2] == ["group", "frames"]
        assert names[0] == "total_energy_rmse"
        assert [row[0] for row in rows] == ["even", "odd"]  # the third is in no set
        for number, row in enumerate(rows):
            assert [float(cell) for cell in row[2:]] == [by_group[name][number] for name in names]
    with (tmp_path / "out" / "val0_per_group.csv").open() as file:
        assert [row["frames"] for row in csv.DictReader(file)] == ["3", "2"]  # of the validation frames 0 to 4
    values = reports["with"]["val0"].values
    by_set = [values[f"forces_mae_by_set@{name}"] for name in data.set_names]
    assert values["mean_of_sets"] == pytest.approx((by_set[0] + 2 * by_set[1]) / 3, rel=1e-12)
    # number 0 and 3 count twice
    whole = [
        values["per_atom_energy_rmse"] ** 2,
        *(x**2 for x in reports["with"]["val0"].by_group["per_atom_energy_rmse"]),
    ]
    assert whole[0] == pytest.approx((4 * whole[1] + 3 * whole[2]) / 7, rel=1e-12)


def lines_of(tables: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        for table in tables:
            console.print(table)
    return capture.get()


def test_wide_tables_are_cut_and_many_groups_left_out() -> None:
    names = [f"group number {index}" for index in range(9)]
    entry = {"name": "mae", "field": "forces", "metric": harness.MeanAbsoluteError()}
    manager = harness.MetricsManager([entry], group_names=names)
    report = Report({}, {}, {}, {}, {"mae": [0.5 + index for index in range(8)] + [float("nan")]})
    found = _Groups.of(manager, report)
    assert found.columns == ["group", "mae"]
    assert found.rows == [[name, 0.5 + index] for index, name in enumerate(names[:8])]
    text = lines_of(found.tables("title", 80, max_groups=6))
    shown = [re.findall(r"group number \d", line) for line in text.splitlines() if "group number" in line]
    assert shown == [names[:3], names[3:6]]
    assert max(map(len, text.splitlines())) <= 80
    assert "2 further groups" in text
    assert text.count("title") == 1
    assert found.tables("title", 80, max_groups=0) == []


def test_a_group_of_weight_zero_shows_the_errors_of_its_frames() -> None:
    entry = {"name": "mae", "field": "forces", "metric": harness.MeanAbsoluteError()}
    manager = harness.MetricsManager([entry], group_names=["hot", "vacancy", "absent"])
    manager.keep_by_group()
    target = {
        "forces": torch.zeros(4, 3),
        "num_atoms": torch.tensor([1, 1, 2]),
        "group_index": torch.tensor([0, 0, 1]),
        "weight": torch.tensor([3.0, 3.0, 0.0], dtype=torch.float64),
    }
    forces = torch.tensor([[1.0] * 3] * 2 + [[2.0] * 3] * 2)
    manager({"forces": forces}, target)
    found = _Groups.of(manager, harness.compute_together([manager])[0].to_report())
    assert found.columns == ["group", "frames", "mae"]
    assert str(found.rows) == str([["hot", 2, 1.0], ["vacancy", 1, 2.0]])
    rows = [re.findall(r"[\w-]+", line) for line in lines_of(found.tables("title", 80, max_groups=6)).splitlines()]
    assert ["frames", "2", "1"] in rows
    assert ["mae", "1", "2", "eV"] in [row[:4] for row in rows]


def test_values_of_sets_are_below_those_of_their_component() -> None:
    mae = {"field": "forces", "metric": harness.MeanAbsoluteError()}
    entries = [mae | {"name": "f", "per_set": True}, mae | {"name": "mean", "per_set_coeffs": {"mol": 1, "bulk": 3}}]
    manager = harness.MetricsManager(entries, set_names=["mol", "bulk"])
    target = {"forces": torch.zeros(2, 3), "num_atoms": torch.tensor([1, 1]), "set_index": torch.tensor([0, 1])}
    values = manager({"forces": torch.tensor([[1.0] * 3, [2.0] * 3])}, target)
    numbers = {name: value.item() for name, value in values.items()}
    lines = lines_of([values_table("", manager, numbers, {"f@mol": (0.5, 3)})]).splitlines()
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if "eV" in line]
    assert rows == [
        ["f", "1.5", "-", "-", "eV/Å"],
        ["f@mol", "1", "0.5", "3", "eV/Å"],
        ["f@bulk", "2", "-", "-", "eV/Å"],
        ["mean", "1.75", "-", "-", "eV/Å"],
        ["mean@mol", "1", "-", "-", "eV/Å"],
        ["mean@bulk", "2", "-", "-", "eV/Å"],
    ]
    r2 = {"name": "r2", "field": "forces", "metric": torchmetrics.R2Score(), "per_set": True}
    other = harness.MetricsManager([r2], set_names=["mol", "bulk"])
    assert is_better(other, "r2@mol", 0.9, 0.8)
    assert is_better(manager, "f@mol", 0.8, 0.9)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_epochs is a whole number, at least 1, found 0"):
        PerGroupReport(every_n_epochs=0)
    with pytest.raises(ValueError, match="max_groups is a whole number, at least 0, found -1"):
        PerGroupReport(max_groups=-1)


def test_names_go_from_the_data_of_a_job_to_all_that_ask_for_them(data: GroupedAlloyDataModule) -> None:
    """Ready-made sets, a manager of one's own, and one that takes type names alone."""
    own = {
        "_target_": "harness.MetricsManager",
        "metrics": [{"field": "forces", "metric": {"_target_": "harness.MeanAbsoluteError"}, "per_group": True}],
    }
    config = composed("experiment=alloy", *TINY)
    config.val_metrics, config.train_metrics = own, own
    module = build_module(config, data)
    expected = ["F_mae@even", "F_mae@odd", "F_mae@none", "F_mae"]
    assert module.val_metrics[0].value_names == module.train_metrics.value_names == expected
    assert list(module.loss.names.sets) == data.set_names
    stress = next(entry for entry in module.loss.entries.values() if str(entry.field) == "stress")
    assert stress.sets == (0,)  # those of the second have none

    def old(type_names: Any) -> harness.MetricsManager:
        return harness.EnergyForceMetrics(type_names=type_names)

    assert module_of(data, test_metrics=old).test_metrics[0].names.groups == ()
