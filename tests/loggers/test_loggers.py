"""The loggers with the real W&B, offline: restarts, full disks, and a W&B that hangs, dies or cannot be reached."""

from __future__ import annotations

import csv
import errno
import importlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch.loggers as lightning_loggers
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from support.commands import BIN, SIZES, Finished, train
from support.disturbances import fill, service_of
from support.disturbances import log_steps as log_steps_of_all
from wandb.sdk.lib import telemetry

from harness.loggers import CSVLogger, WandbLogger, wandb_loggers, without_secrets
from harness.loggers.journal import Journal, rows_in
from harness.loggers.media import Media
from harness.loggers.wandb_service import mend

SECRET = "0123456789abcdef0123456789abcdef01234567"
SMALL = (*SIZES, "max_epochs=3", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false")
TESTS = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(autouse=True)
def _no_wandb_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def inspected(log: Path, *options: str) -> str:
    """What wandb's own reader finds in a file."""
    command = [str(BIN / "wandb"), "leet", "inspect", "--json", *options, str(log)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of all W&B folders of a run, in the order of their starts, as `wandb sync` uploads them."""
    return [history["item"] for history in records_of(folder, "history")]


def values_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a training has logged in a row: numbers, and kinds of media."""
    media = {key.removesuffix("._type"): value for key, value in row.items() if key.endswith("._type")}
    names = [key for key in row if not key.startswith("_") and key.rpartition(".")[0] not in media]
    return {key: float(row[key]) for key in names} | media


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]


def offline(folder: Path, **options: Any) -> WandbLogger:
    return WandbLogger(folder, offline=True, project="test", settings={"quiet": True}, **options)


# --- CSV ---


def csv_logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="csv")


def log_steps(logger: lightning_loggers.CSVLogger, steps: range) -> None:
    for step in steps:
        logger.log_metrics({"loss": 0.1 * step, "epoch": step // 4}, step)
        if step % 4 == 3:
            logger.log_metrics({"val": torch.tensor(step / 3, dtype=torch.float64), "epoch": step // 4}, step)  # type: ignore[dict-item]
        logger.save()


def test_csv_is_that_of_lightning(tmp_path: Path) -> None:
    for logger in (csv_logger(tmp_path / "ours"), lightning_loggers.CSVLogger(tmp_path / "theirs", "", "csv")):
        log_steps(logger, range(10))
        logger.log_hyperparams({"lr": 0.1, "layers": [1, 2]})
        logger.finalize("success")
    for name in ("metrics.csv", "hparams.yaml"):
        assert (tmp_path / "ours/csv" / name).read_bytes() == (tmp_path / "theirs/csv" / name).read_bytes()


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("step", [0, 3, 4, 8])
def test_csv_after_an_interruption_is_that_of_an_undisturbed_run(step: int, torn: bool, tmp_path: Path) -> None:
    log_steps(csv_logger(tmp_path / "whole"), range(12))
    log_steps(csv_logger(tmp_path / "cut"), range(9))
    path = tmp_path / "cut/csv/metrics.csv"
    if torn:
        path.write_bytes(path.read_bytes()[:-3])
    again = csv_logger(tmp_path / "cut")
    again.resume_from(step)
    log_steps(again, range(step, 12))
    assert path.read_bytes() == (tmp_path / "whole/csv/metrics.csv").read_bytes()
    assert sorted(each.name for each in path.parent.iterdir()) == ["metrics.csv"]


def test_csv_of_a_job_that_begins_anew_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "csv/metrics.csv"
    for number in range(3):
        log_steps(csv_logger(tmp_path), range(number + 1))
    assert [len(file.read_text().splitlines()) for file in sorted(path.parent.glob("*.csv"))] == [2, 3, 4]


def test_csv_appends_and_does_not_write_the_file_again(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    log_steps(logger, range(4))
    path = tmp_path / "csv/metrics.csv"
    number = path.stat().st_ino
    log_steps(logger, range(4, 12))
    assert path.stat().st_ino == number


def test_csv_on_a_full_disk_warns_once_and_is_whole_when_there_is_room(
    small_disk: Path, recwarn: pytest.WarningsRecorder
) -> None:
    logger = csv_logger(small_disk)
    log_steps(logger, range(4))
    before = (small_disk / "csv/metrics.csv").read_bytes()
    fill(small_disk)
    log_steps(logger, range(4, 1000))
    after = (small_disk / "csv/metrics.csv").read_bytes()
    assert after.startswith(before)
    assert after.endswith(b"\n")
    (warning,) = said(recwarn.list)
    assert "metrics.csv" in warning
    assert "No space left on device" in warning
    (small_disk / "ballast").unlink()
    logger.finalize("success")
    with (small_disk / "csv/metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]] == [0.1 * i for i in range(1000)]
    assert len(said(recwarn.list)) == 1


# --- W&B ---


def test_wandb_values_are_read_back(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    logged = [{"loss": 0.1 * step, "nan": math.nan, "tensor": torch.tensor(step / 8)} for step in range(20)]
    logger.log_hyperparams({"lr": 0.1})
    for step, row in enumerate(logged):
        logger.log_metrics(row, step)
    picture = torch.zeros(3, 4, 4)
    logger.log_image("picture", [picture])
    logger.log_metrics({"last": 1.0}, 20)
    place = logger.finish()
    assert place is not None
    assert Path(place).parent == tmp_path / "wandb"
    rows = rows_of(tmp_path)
    assert [row["_step"] for row in rows] == list(range(22))
    for step, (row, expected) in enumerate(zip(rows, logged, strict=False)):
        assert values_of(row) == pytest.approx({**values_of(expected), "trainer/global_step": step}, nan_ok=True)
    assert rows[20]["picture.count"] == 1
    assert values_of(rows[21]) == {"last": 1.0, "trainer/global_step": 20}
    assert logger.version == (tmp_path / "wandb_run_id").read_text().strip()
    assert isinstance(logger, lightning_loggers.WandbLogger)


def test_wandb_of_a_second_start_has_each_step_once(tmp_path: Path) -> None:
    first = offline(tmp_path)
    for step in range(10):
        first.log_metrics({"loss": float(step)}, step)
    first.finish()
    second = offline(tmp_path)
    second.resume_from(6)
    for step in range(6, 15):
        second.log_metrics({"loss": float(step)}, step)
        if step == 8:
            second.log_metrics({"other": 1.0}, step)  # not a row of before
    second.finish()
    assert first.version == second.version
    rows = rows_of(tmp_path)
    assert [row["_step"] for row in rows] == list(range(16))  # one run, and not row 0 twice
    assert sorted(row["loss"] for row in rows if "loss" in row) == list(range(15))
    assert [row["trainer/global_step"] for row in rows if "other" in row] == [8]


def kill(folder: Path, steps: range, is_busy: bool) -> None:
    """Log steps in a process that is killed before W&B has any of them."""
    program = f"""if True:
        import pathlib, support.disturbances
        support.disturbances.log_until_killed(pathlib.Path({str(folder)!r}), {steps!r}, {is_busy})"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | TESTS).returncode == -signal.SIGKILL


def test_wandb_has_everything_once_after_kills(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Rows that waited for W&B come from the journal, those that W&B has do not."""
    kill(tmp_path, range(6), is_busy=False)
    journal = tmp_path / "wandb/rows.jsonl"
    journal.write_bytes(journal.read_bytes()[:-3])  # the end of step 5, which is done again
    kill(tmp_path, range(4, 10), is_busy=True)
    assert not any("loss" in row for row in rows_of(tmp_path))
    for steps in (range(8, 12), range(10, 14)):
        logger = offline(tmp_path)
        logger.resume_from(steps.start)
        log_steps_of_all(logger, tmp_path, steps)
        if steps.start == 8:
            logger.log_metrics({"parameter": torch.nn.Parameter(torch.ones(()))}, 9)  # type: ignore[dict-item]
            logger.finalize("failed")  # W&B has it all, and the journal stays
        assert logger.finish()
        assert journal.exists() == (steps.start == 8)
        if steps.start == 8:
            assert '[{"parameter": 1.0}, 9]' in journal.read_text().splitlines()
    assert said(recwarn.list) == []

    rows = rows_of(tmp_path)
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    steps_of = [row["trainer/global_step"] for row in rows if "parameter" not in row]
    assert steps_of == sorted(steps_of)
    numbers = [values_of(row) for row in rows if "loss" in row]
    expected = [{"loss": 0.1 * i, "nan": math.nan, "tensor": i / 8, "trainer/global_step": i} for i in range(14)]
    assert len(numbers) == len(expected)
    for row, each in zip(numbers, expected, strict=True):
        assert row == pytest.approx(each, nan_ok=True)
    found = {
        key: [row for row in rows if f"val0_report/{key}._type" in row] for key in ("table", "chart_table", "pict")
    }
    for key, each in found.items():
        assert [(row["trainer/global_step"], row["epoch"]) for row in each] == [(i, i // 4) for i in range(0, 14, 2)]
        for row in each if key != "pict" else ():
            step = row["trainer/global_step"]
            data = [["H", 0.5 * step], ["C", None]] if key == "table" else [["H", 1.0], ["C", 0.5 * step]]
            assert media_of(tmp_path, row, f"val0_report/{key}")["data"] == data
    for row in found["pict"]:
        step = row["trainer/global_step"]
        assert row["val0_report/pict.captions"] == [f"of {step}"]
        (path,) = tmp_path.rglob(Path(row["val0_report/pict.filenames"][0]).name)
        assert path.read_bytes() == (tmp_path / f"picture{step}.png").read_bytes()
    # pictures of a file that has been written again are lost, and none is taken for another
    assert [row["trainer/global_step"] for row in rows if "val0_report/same._type" in row] == [8, 10, 12]


def test_journal_goes_on_after_lines_that_were_torn(small_disk: Path) -> None:
    path = small_disk / "wandb/rows.jsonl"
    journal = Journal(path, None)
    assert not journal.goes_on
    text = "x" * 3000
    assert journal.write({"text": text}, 0)
    fill(small_disk)
    assert journal.write({"text": text}, 1)  # as much of it as there is room for
    assert journal.write({"text": text}, 2)
    assert journal.error is not None
    assert journal.error.errno == errno.ENOSPC
    assert 3000 < path.stat().st_size < 6000
    (small_disk / "ballast").unlink()
    assert journal.write({"text": "after"}, 3)
    assert journal.write({"late": math.inf}, 7)
    assert not journal.write({"tensor": torch.zeros(())}, 3)
    assert not journal.write({"table": Media("table", {"data": [[torch.zeros(())]]})}, 3)
    journal.close()
    with path.open("ab") as file:
        file.write(b'[{"a": 1}, null]\n\xff\xfe, 2]\n[{"a": 1}, 2')
    again = Journal(path, 7)
    assert again.goes_on
    assert list(rows_in(again.kept)) == [({"text": text}, 0), ({"text": "after"}, 3)]
    second = Journal(path, 7)  # in use
    assert not second.goes_on
    assert second.write({"a": 1}, 4)
    again.write({"a": 2}, 4)
    second.remove()
    assert [step for _, step in rows_in(path.read_bytes().splitlines())] == [0, 3, 4]
    again.remove()
    assert not path.exists()


def test_wandb_without_a_journal_warns_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "wandb/rows.jsonl").mkdir(parents=True)
    logger = offline(tmp_path)
    for step in range(4):
        logger.log_metrics({"loss": 1.0}, step)
    assert logger.finish()
    (warning,) = said(recwarn.list)
    assert "rows.jsonl cannot be written (IsADirectoryError" in warning
    assert len(rows_of(tmp_path)) == 4


class HalfReceived(WandbLogger):
    """Stands for a run online, of which the server has the first six rows; it is kept on disk all the same."""

    def _init(self) -> Any:
        run = super()._init()
        return SimpleNamespace(
            offline=False,
            dir=run.dir,
            url="online",
            starting_step=6,
            log=run.log,
            finish=run.finish,
            summary=run.summary,
        )


def test_wandb_online_logs_what_the_server_lacks_and_nothing_twice(tmp_path: Path) -> None:
    first = offline(tmp_path)
    for step in range(10):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("failed")  # so that the journal stays, as after a kill
    first.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    second = HalfReceived(tmp_path, offline=True, project="test", settings={"quiet": True})
    second.resume_from(8)
    for step in range(8, 12):
        second.log_metrics({"loss": float(step)}, step)
    second.finish()
    shutil.rmtree(folder)
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert [(row["_step"], row["loss"]) for row in rows] == [(step, float(step)) for step in range(6, 12)]


def test_wandb_of_another_job_in_the_directory_is_another_run(tmp_path: Path) -> None:
    for job in range(2):
        logger = offline(tmp_path)
        logger.log_metrics({"loss": float(job)}, 0)
        logger.finalize("success")
        logger.finish()
    logs = sorted((tmp_path / "wandb").rglob("*.wandb"))
    assert len({log.stem for log in logs}) == 2
    assert sorted(row["loss"] for row in rows_of(tmp_path)) == [0, 1]  # folders of one second are in no order


@pytest.mark.parametrize("cut", [1, 1000, 40_000])
def test_wandb_file_that_was_torn_is_mended(cut: int, tmp_path: Path) -> None:
    """What W&B's own reader finds in it stays, and the reader does not complain any more."""
    first = offline(tmp_path)
    for step in range(60):
        first.log_metrics({f"value{number}": step + number / 7 for number in range(50)}, step)
    first.finish()
    (log,) = (tmp_path / "wandb").rglob("*.wandb")
    content = log.read_bytes()
    assert len(content) > 70_000  # several blocks
    log.write_bytes(content[:-cut])
    inspect = [str(BIN / "wandb"), "leet", "inspect", "--json", str(log)]
    torn = subprocess.run(inspect, capture_output=True, text=True, timeout=60)
    assert "incomplete" in torn.stderr
    mend(log)
    mended = subprocess.run(inspect, capture_output=True, text=True, timeout=60)
    assert mended.stdout == torn.stdout
    assert log.stat().st_size > len(content) - cut - 40_000
    assert "incomplete" not in mended.stderr


def test_wandb_that_stops_answering_costs_one_warning_and_no_time(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = offline(tmp_path, finish_timeout=2, max_waiting=100)
    logger.log_metrics({"loss": 1.0}, 0)
    assert logger.experiment.id == logger.version
    process = service_of(os.getpid())
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    start = time.monotonic()
    row = {f"value{number}": 0.1 for number in range(100)}
    for step in range(2000):
        logger.log_metrics(row, step)
        logger.save()
    assert time.monotonic() - start < 10
    assert logger.finish() is None
    logger.finalize("success")
    assert time.monotonic() - start < 30
    steps = [json.loads(line)[1] for line in (tmp_path / "wandb/rows.jsonl").read_text().splitlines()]
    assert steps == [0, *range(2000)]  # what was dropped, too
    assert len(said(recwarn.list)) == 1
    assert service_of(os.getpid()) is None
    # W&B looks at what is imported, and would raise there now that its process has gone
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fastai.py").touch()
    assert "fastai" in telemetry.list_telemetry_imports()
    importlib.import_module("fastai")


@pytest.mark.parametrize("place", ["below a file", "read-only"])
def test_wandb_that_cannot_write_is_left_out(
    place: str, small_disk: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = small_disk
    if place == "below a file":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "output"
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    logger = offline(folder)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 1.0}, 0)
    logger.experiment.summary["a"] = 1  # a dummy
    assert logger.finish() is None
    (warning,) = said(recwarn.list)
    assert str(folder) in warning
    assert "Not a directory" in warning or "Read-only" in warning


def test_wandb_whose_server_never_answers_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and is silent
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        logger = WandbLogger(tmp_path, project="test", start_timeout=3, finish_timeout=60, settings={"quiet": True})
        start = time.monotonic()
        _ = logger.experiment  # as the trainer touches it before it starts
        for step in range(100):
            logger.log_metrics({"loss": float(step)}, step)
        assert time.monotonic() - start < 2
        place = logger.finish()
        assert time.monotonic() - start < 75
    assert place is not None
    assert [row["loss"] for row in rows_of(Path(place))] == list(range(100))
    (warning,) = said(recwarn.list)
    assert "cannot be reached" in warning
    assert "wandb sync" in warning
    assert SECRET not in warning


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Records of a kind in all W&B folders, in the order of their starts."""
    found = []
    for log in sorted(folder.rglob("*.wandb")):
        records = [json.loads(line) for line in inspected(log).splitlines()]
        found += [record[kind] for record in records if record["type"] == kind]
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    """Summary of a run after all of its starts: those of later ones are laid over those before."""
    summaries = [json.loads(inspected(log, "--summary"))["summary"] for log in sorted(folder.rglob("*.wandb"))]
    return {key: value for summary in summaries for key, value in summary.items()}


def media_of(folder: Path, row: dict[str, Any], key: str) -> dict[str, Any]:
    """The table that a row has under a key."""
    (path,) = folder.rglob(row[f"{key}.path"])
    return json.loads(path.read_text())  # type: ignore[no-any-return]


class Watched(LightningModule):
    """A line through two points, with a value of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = (self.slope * batch[0] - batch[1]) ** 2
        self.log("loss_step", loss, on_step=True, on_epoch=False)
        self.log("loss_epoch", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val.error", [3.0, 1.0, 2.0][self.current_epoch])  # type: ignore[arg-type]

    def on_validation_epoch_end(self) -> None:
        self.log("val/best", [3.0, math.nan, 2.0][self.current_epoch])  # type: ignore[arg-type]
        self.log("val/absent", math.nan)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_wandb_axes_and_summaries_of_a_training(tmp_path: Path) -> None:
    """Epoch values have the epoch beside them, and their exact names are tied to it."""
    logger = offline(tmp_path)
    epoch, step = ["loss_epoch", "val.error", "val/best"], ["loss_step"]
    for _ in range(2):  # the second time changes nothing
        logger.define_axes(epoch, step, minimised=epoch[1:])
    logger.leave_out(["val/absent", "val.error"])
    data = torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=None)
    trainer = Trainer(
        max_epochs=3, logger=logger, log_every_n_steps=1, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Watched(), data, data)
    logger.log_summary({"best/epoch": 1, "best/error": torch.tensor(1.5), "best/checkpoint": "best.ckpt"})
    logger.finish()

    options = {"defined": True, "step_sync": True}
    both = {"min": True, "last": True}
    assert [metric for metric in records_of(tmp_path, "metric") if metric.get("name") != "trainer/global_step"] == [
        {"glob_name": "*", "options": options, "step_metric": "trainer/global_step"},  # Lightning's
        {"name": "loss_step", "options": options, "step_metric": "trainer/global_step"},
        {"name": "loss_epoch", "options": options, "step_metric": "epoch"},
        {"name": "val\\.error", "options": options, "step_metric": "epoch", "summary": both},
        {"name": "val/best", "options": options, "step_metric": "epoch", "summary": both},
    ]
    rows = rows_of(tmp_path)
    for name in epoch:
        assert [row["epoch"] for row in rows if name in row] == [0, 1, 2]
        assert [row["trainer/global_step"] for row in rows if name in row] == [3, 7, 11]
    assert [row["trainer/global_step"] for row in rows if "loss_step" in row] == list(range(12))
    summary = summary_of(tmp_path)
    assert summary["val.error"] == {"min": 1, "last": 2}
    assert summary["val/best"] == {"min": 2, "last": 2}  # W&B alone would say NaN
    assert "val/absent" not in {*summary, *(name for row in rows for name in row)}  # NaN all along
    assert summary["loss_epoch"] == [row["loss_epoch"] for row in rows if "loss_epoch" in row][-1]
    assert [summary[f"best/{name}"] for name in ("epoch", "error", "checkpoint")] == [1, 1.5, "best.ckpt"]


def test_wandb_axes_are_exact_names(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    with pytest.raises(ValueError, match=r"exact names, found \['val0_epoch/\*'\]"):
        logger.define_axes(["val0_epoch/*"])
    with pytest.raises(ValueError, match=r"\['other'\] are not"):
        logger.define_axes(["error"], minimised=["other"])
    with pytest.raises(ValueError, match="found 2 and 1"):
        logger.log_bar_chart("chart", ["a", "b"], [1.0])
    with pytest.raises(ValueError, match="each of the 1 images 'picture', found 2"):
        logger.log_image("picture", [torch.zeros(3, 4, 4)], caption=["a", "b"])
    assert not (tmp_path / "wandb").exists()  # nothing has started


@pytest.mark.parametrize("prefix", ["", "own"])
def test_wandb_of_a_second_start_has_summaries_and_media_once(prefix: str, tmp_path: Path) -> None:
    key = f"{prefix}-" if prefix else ""
    errors = {"H": 0.25, "C": math.nan}
    for start in range(2):
        logger = offline(tmp_path, prefix=prefix)
        if start:
            logger.resume_from(4)
        logger.define_axes(["error", "other"], minimised=["error", "other"])
        for epoch, error in list(enumerate([3.0, 1.0, 2.0, 5.0]))[start : 3 + start]:
            step = 4 * epoch + 3
            logger.log_metrics({"error": error, "epoch": epoch}, step)
            rows = [[name, value, epoch] for name, value in errors.items()]
            logger.log_table("types", ["type", "error", "epoch"], rows, step=step, epoch=epoch)
            rows.clear()  # the table has been handed over
            logger.log_bar_chart(
                "chart/types", list(errors), list(errors.values()), "type", "error", "Errors", step=step, epoch=epoch
            )
            logger.log_image("picture", [torch.ones(3, 4, 4)], epoch=epoch, caption=[f"epoch {epoch}"])  # of that step
        if not start:
            logger.log_metrics({"other": 1.0, "epoch": 2}, 11)
        logger.finalize("failed" if not start else "success")
        assert logger.finish()

    rows = rows_of(tmp_path)
    assert [row["_step"] for row in rows] == list(range(len(rows))) == list(range(17))
    for name in ("error", "types._type", "chart/types_table._type", "picture._type"):
        found = [(row[f"{key}epoch"], row["trainer/global_step"]) for row in rows if f"{key}{name}" in row]
        assert found == [(0, 3), (1, 7), (2, 11), (3, 15)], name
    for row in rows:
        if f"{key}types._type" in row:
            epoch = row[f"{key}epoch"]
            table = media_of(tmp_path, row, f"{key}types")
            assert table == {"columns": ["type", "error", "epoch"], "data": [["H", 0.25, epoch], ["C", None, epoch]]}
        if f"{key}chart/types_table._type" in row:
            table = media_of(tmp_path, row, f"{key}chart/types_table")
            assert table == {"columns": ["type", "error"], "data": [["H", 0.25], ["C", None]]}
    charts = [record["update"] for record in records_of(tmp_path, "config")]
    assert charts
    for chart in charts:
        panel = chart[f"_wandb.visualize.{key}chart/types"]["panel_config"]
        assert panel["panelDefId"] == "wandb/bar/v0"
        assert panel["fieldSettings"] == {"label": "type", "value": "error"}
        assert panel["stringSettings"] == {"title": "Errors"}
    summary = summary_of(tmp_path)
    assert summary[f"{key}error"] == {"min": 1, "last": 5}  # the second start alone has 5
    assert summary[f"{key}other"] == {"min": 1, "last": 1}


def test_wandb_loggers_are_found_and_can_be_sent_to_another_process(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("failed")
    logger.finish()
    other = pickle.loads(pickle.dumps(logger))
    assert other.finish() is None  # a run of its own, which has not started
    other.resume_from(1)
    other.log_metrics({"loss": 2.0}, 1)
    assert other.finish()
    assert other.version == logger.version
    assert [(row["_step"], row["loss"]) for row in rows_of(tmp_path)] == [(0, 1), (1, 2)]
    theirs = lightning_loggers.WandbLogger(save_dir=tmp_path)
    trainer = Trainer(accelerator="cpu", logger=[csv_logger(tmp_path), logger, theirs, other])
    assert list(wandb_loggers(trainer)) == [logger, other]


def test_wandb_keeps_alerts(tmp_path: Path) -> None:
    logger = offline(tmp_path)
    logger.alert("The loss is not finite", "Step 7 of epoch 2, on rank 1.")
    logger.alert("long " * 20, "")
    assert logger.finish()
    first, second = records_of(tmp_path, "alert")
    assert first["title"] == "The loss is not finite"
    assert first["text"] == "Step 7 of epoch 2, on rank 1."
    assert first["level"] == "WARN"
    assert len(second["title"]) < 64


def test_wandb_that_fails_warns_once_of_all_that_is_asked(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    logger = offline(tmp_path)
    for number in range(2):
        logger.log_table("table", ["a", "b"], [[number]], step=number)  # a column is missing
        logger.log_summary({"tensor": torch.zeros(2)})
        logger.log_image("picture", ["nowhere.png"], step=number)
        logger.log_metrics({"loss": 1.0}, number)
    assert logger.finish()
    (warning,) = said(recwarn.list)
    assert "the training goes on" in warning
    assert [row["loss"] for row in rows_of(tmp_path)] == [1, 1]


def test_other_ranks_have_nothing_to_do_with_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = offline(tmp_path)
    logger.define_axes(["error"], minimised=["error"])
    logger.log_metrics({"error": 1.0}, 0)
    logger.log_summary({"best": 1.0})
    logger.log_table("table", ["a"], [[1]])
    logger.log_bar_chart("chart", ["a"], [1.0])
    logger.log_image("picture", [torch.zeros(3, 4, 4)])
    logger.alert("title", "text")
    assert logger.finish() is None
    assert not any(tmp_path.iterdir())


# --- secrets ---


def test_settings_without_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_SECRET_TOKEN", "correct horse battery")
    monkeypatch.setenv("SHORT_KEY", "adam")
    monkeypatch.setenv("KEY_FOLDER", str(tmp_path))  # a path is none
    settings = {
        "optimizer": "adam",
        "output": f"{tmp_path}/output",
        "data": {"keys": {"energy": "energy"}, "tokens": 3, "url": "https://me:correct horse battery@host/"},
        "list": ["correct horse battery", 1.5, None],
        "model": {"api_key": "x", "hubToken": "y", "password": None},
    }
    kept = json.dumps(settings)
    assert without_secrets(settings) == {
        "optimizer": "adam",
        "output": f"{tmp_path}/output",
        "data": {"keys": {"energy": "energy"}, "tokens": 3, "url": "***"},
        "list": ["***", 1.5, None],
        "model": {"api_key": "***", "hubToken": "***", "password": None},
    }
    assert json.dumps(settings) == kept


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield str(path), path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((f"{path}:{name}", archive.read(name)) for name in archive.namelist())


def test_no_secret_reaches_a_file(tmp_path: Path) -> None:
    token = "a-token-of-the-environment"
    done = train(
        *SIZES,
        "max_epochs=1",
        "logger=[wandb,csv]",
        "+note=${oc.env:MY_SECRET_TOKEN}",
        folder=tmp_path,
        WANDB_API_KEY=SECRET,
        WANDB_MODE="offline",
        MY_SECRET_TOKEN=token,
    )
    assert done.code == 0, done.err[-4000:]
    seen = 0
    for name, content in [*contents(tmp_path), ("stdout", done.out.encode()), ("stderr", done.err.encode())]:
        seen += 1
        for secret in (SECRET, token):
            assert secret.encode() not in content, name
    assert seen > 20
    assert "note: '***'" in (done.runs[0] / "csv" / "hparams.yaml").read_text()
    assert len(rows_of(tmp_path)) > 4


# --- trainings ---


def assert_trained(done: Finished, num_warnings: int) -> list[str]:
    assert done.code == 0, done.err[-4000:]
    found = re.findall(r"^warning: (.*)", done.err, re.MULTILINE)
    assert len(found) == num_warnings, done.err[-4000:]
    assert "forces_rmse" in done.out
    assert "Traceback" not in done.err
    return found


@pytest.mark.slow
def test_a_killed_training_goes_on_in_the_same_csv_and_run(tmp_path: Path) -> None:
    arguments = [*SMALL, "logger=[wandb,csv]", "callbacks.parity=null", "hydra.run.dir=run", "resume=auto"]
    arguments += ["callbacks.throughput=null"]  # which is never the same twice
    whole = train(*arguments, folder=tmp_path / "whole")
    assert_trained(whole, 0)
    for step in (3, 6):  # before the first checkpoint, and after it
        interrupt = f"+callbacks.interrupt={{_target_: support.disturbances.Interrupt, step: {step}}}"
        assert train(*arguments, interrupt, folder=tmp_path / "cut", **TESTS).code == -signal.SIGKILL
    assert_trained(train(*arguments, folder=tmp_path / "cut"), 0)
    tables = [(tmp_path / name / "run/csv/metrics.csv").read_bytes() for name in ("whole", "cut")]
    assert tables[0] == tables[1]

    expected, found = rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut")
    assert [row["_step"] for row in found] == list(range(len(expected)))
    assert len({log.stem for log in (tmp_path / "cut").rglob("*.wandb")}) == 1
    rows = [Counter(json.dumps(values_of(row), sort_keys=True) for row in each) for each in (expected, found)]
    assert rows[0] == rows[1]


def test_a_full_disk_under_the_loggers_does_not_stop_a_training(small_disk: Path, tmp_path: Path) -> None:
    done = train(
        *SMALL,
        "logger=[wandb,csv]",
        f"logger.wandb.save_dir={small_disk}",
        f"logger.csv.save_dir={small_disk}",
        f"+callbacks.fill={{_target_: support.disturbances.FillDisk, folder: {small_disk}, step: 5}}",
        folder=tmp_path,
        **TESTS,
    )
    wandb, table = sorted(assert_trained(done, 2), key=lambda text: "metrics.csv" in text)
    assert "No space is left on the disk" in wandb
    assert str(small_disk) in wandb
    assert f"{small_disk}/csv/metrics.csv" in table
    assert "No space left on device" in table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_wandb_that_hangs_or_dies_does_not_stop_a_training(name: str, tmp_path: Path) -> None:
    start = time.monotonic()
    done = train(
        *SMALL,
        "logger=[wandb,csv]",
        "logger.wandb.finish_timeout=3",
        f"+callbacks.disturb={{_target_: support.disturbances.DisturbService, signal_name: {name}, step: 2}}",
        folder=tmp_path,
        **TESTS,
    )
    (warning,) = assert_trained(done, 1)
    assert "disturbed" in done.out
    assert warning.startswith("W&B ")
    assert time.monotonic() - start < 150
    assert len((done.runs[0] / "csv/metrics.csv").read_text().splitlines()) > 12
