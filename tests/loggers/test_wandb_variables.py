"""W&B's own variables: a value that is given wins over the variable, and the variable over the default."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from support.commands import BIN
from support.configs import composed

from harness.job.consistency import difference, facts
from harness.loggers import WandbLogger
from harness.runs import POINT, SweepPoint, report_entries

SECRET = "0123456789abcdef0123456789abcdef01234567"
OF_RUN = {  # name in the record of a run, by variable
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "run_group",
    "WANDB_NAME": "display_name",
    "WANDB_NOTES": "notes",
    "WANDB_TAGS": "tags",
    "WANDB_JOB_TYPE": "job_type",
    "WANDB_RUN_ID": "run_id",
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def section(*overrides: str) -> DictConfig:
    config: DictConfig = composed("logger=wandb", *overrides)
    OmegaConf.resolve(config.logger)
    return config.logger.wandb


# variable, its value, setting, its value without the variable, with it, an override, and its value with both
TABLE: list[tuple[str, str, str, Any, Any, str, Any]] = [
    ("WANDB_PROJECT", "of-shell", "project", "harness", "of-shell", "typed", "typed"),
    ("WANDB_PROJECT", "", "project", "harness", "harness", "typed", "typed"),
    ("WANDB_ENTITY", "of-shell", "entity", None, "of-shell", "typed", "typed"),
    ("WANDB_NAME", "of-shell", "name", None, "of-shell", "typed", "typed"),
    ("WANDB_RUN_GROUP", "of-shell", "group", "train", "of-shell", "typed", "typed"),
    ("WANDB_RUN_ID", "of-shell", "id", None, "of-shell", "typed", "typed"),
    ("WANDB_DIR", "of-shell", "dir", "somewhere", "of-shell", "typed", "typed"),
    ("WANDB_INIT_TIMEOUT", "5", "start_timeout", 60, 5, "7", 7),
    ("WANDB_FINISH_TIMEOUT", "5", "finish_timeout", 60, 5, "7", 7),
]


@pytest.mark.parametrize(("variable", "value", "setting", "default", "expected", "typed", "with_both"), TABLE)
def test_which_value_wins(
    variable: str,
    value: str,
    setting: str,
    default: Any,
    expected: Any,
    typed: str,
    with_both: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert section()[setting] == default
    monkeypatch.setenv(variable, value)
    assert section()[setting] == expected
    assert section(f"logger.wandb.{setting}={typed}")[setting] == with_both


def test_a_folder_that_is_given_is_that_of_the_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "of-shell")
    assert section("logger.wandb.save_dir=typed").dir == "typed"


MODES = [  # WANDB_MODE, settings that are typed, a key, the mode
    (None, (), False, "offline"),
    (None, (), True, "online"),
    ("online", (), False, "online"),
    ("run", (), False, "online"),
    ("offline", (), True, "offline"),
    ("dryrun", (), True, "offline"),
    ("disabled", (), True, "disabled"),
    ("shared", (), True, "shared"),
    ("offline", ("logger.wandb.offline=false",), True, "online"),
    ("disabled", ("logger.wandb.offline=false",), False, "online"),
    ("online", ("logger.wandb.offline=true",), True, "offline"),
    ("disabled", ("logger.wandb.offline=true",), True, "offline"),
    ("online", ("+logger.wandb.mode=disabled",), True, "disabled"),
]


@pytest.mark.parametrize(("variable", "typed", "has_key", "expected"), MODES)
def test_mode(
    variable: str | None, typed: tuple[str, ...], has_key: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    if has_key:
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
    logger = instantiate(section(*typed))
    assert logger._wandb_init["mode"] == expected
    assert os.environ.get("WANDB_MODE") == variable


@pytest.mark.parametrize("key", ["WANDB_IDENTITY_TOKEN_FILE", "NETRC"])
def test_other_keys(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv(key, str(tmp_path / "file"))
    assert WandbLogger(tmp_path)._wandb_init["mode"] == "online"


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"WANDB_MODE": "of"}, {}, "WANDB_MODE is one of online.*dryrun.*found 'of'"),
        ({"WANDB_RESUME": "yes"}, {}, "WANDB_RESUME is one of allow.*found 'yes'"),
        ({}, {"mode": "of"}, "mode is one of online.*found 'of'"),
        ({}, {"mode": "online", "offline": True}, "mode=online contradicts offline=true"),
    ],
)
def test_refused(
    variables: dict[str, str], options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        WandbLogger(tmp_path, **options)


def test_a_time_limit_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="WANDB_INIT_TIMEOUT is a number of seconds, found 'soon'"):
        section()


def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WandbLogger(tmp_path)._wandb_init["resume"] == "allow"
    monkeypatch.setenv("WANDB_RESUME", "must")
    assert WandbLogger(tmp_path)._wandb_init["resume"] == "must"
    assert WandbLogger(tmp_path, resume="never")._wandb_init["resume"] == "never"


def test_each_point_of_a_sweep_has_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.setenv(POINT, SweepPoint(3, "seed=3", "sweep", ()).to_json())
    assert section().id == "abc-3"
    assert section().name == "seed=3"


def test_what_a_report_of_a_sweep_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project, group and entity that the runs really have."""

    def found(*overrides: str) -> tuple[Any, ...]:
        entries = report_entries(composed("logger=[csv,wandb]", *overrides))
        return entries["project"], entries["group"], entries["entity"]

    assert found() == ("harness", "train", None)
    for name, value in {"PROJECT": "p", "RUN_GROUP": "g", "ENTITY": "e"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert found() == ("p", "g", "e")
    assert found("logger.wandb.project=typed") == ("typed", "g", "e")
    assert found("~logger.wandb.project") == ("p", "g", "e")
    assert report_entries(composed("logger=csv"))["project"] is None


def test_variables_may_be_set_on_one_node_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    without = facts(composed(), None)
    for name in ("PROJECT", "ENTITY", "NAME", "RUN_GROUP", "RUN_ID", "DIR", "MODE", "QUIET"):
        monkeypatch.setenv(f"WANDB_{name}", "offline")
    assert difference(without, facts(composed(), None)) is None
    assert difference(without, facts(composed("logger.csv.version=else"), None)) is not None


# --- with W&B ---


def run_record(folder: Path) -> dict[str, Any]:
    """The run in W&B's own file, by its own reader."""
    (log,) = folder.rglob("*.wandb")
    command = [str(BIN / "wandb"), "leet", "inspect", "--json", str(log)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    records = [json.loads(line) for line in text.splitlines()]
    return next(record["run"] for record in records if record["type"] == "run")


def test_wandb_stores_what_the_variables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # a session of a test before has read the variables already
    for name in OF_RUN:
        monkeypatch.setenv(name, f"of-{name.lower().replace('_', '-')}")
    monkeypatch.setenv("WANDB_TAGS", "first,second")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "files"))
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    config = composed(
        "logger=wandb", f"logger.wandb.save_dir={tmp_path / 'job'}", "logger.wandb.dir=${oc.env:WANDB_DIR}"
    )
    logger = instantiate(config.logger.wandb)
    logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    logger.log_metrics({"loss": 1.0}, 0)
    place = logger.finish()
    assert Path(place).parent == tmp_path / "files" / "wandb"
    assert logger.written_files["upload with"] == f"wandb sync {tmp_path / 'files' / 'wandb'}"
    assert (tmp_path / "job" / "wandb_run_id").read_text() == "of-wandb-run-id\n"
    assert not list((tmp_path / "job").rglob("*.wandb"))
    run = run_record(tmp_path / "files")
    expected = {of_run: os.environ[name] for name, of_run in OF_RUN.items()} | {"tags": ["first", "second"]}
    assert {name: run[name] for name in expected} == expected
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_disabled_writes_nothing_and_advises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger = WandbLogger(tmp_path / "job")
        logger.resume_from(3)
        logger.define_axes(epoch=["loss"])
        logger.log_hyperparams({"lr": 0.1})
        logger.log_metrics({"loss": 1.0}, 0)
        logger.log_table("table", ["a"], [[1]])
        logger.log_summary({"best": 1.0})
        logger.alert("title", "text")
        logger.experiment.config.update({"a": 1})
        logger.experiment.log({"b": 2})
        logger.finalize("success")
        assert logger.finish() is None
    assert logger.written_files == {}
    assert not (tmp_path / "job").exists()
