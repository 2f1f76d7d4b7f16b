"""Private parts of W&B: a test for each, which fails with its name when a version of W&B no longer has it."""

from __future__ import annotations

import ast
import inspect
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb
from support.disturbances import service_of

from harness.loggers import WandbLogger
from harness.loggers.wandb_service import (
    PRIVATE,
    logs_of,
    mend,
    number_on_server,
    read_log,
    settings_with_limits,
    stored_names,
    wrote_end,
)

ROOT = Path(__file__).parents[2]


@dataclass
class Parts:
    """A run of this process that has not ended, and the file of another one that has."""

    folder: Path
    run: Any
    log: Path
    ended: Path

    @property
    def setup(self) -> Any:
        from wandb.sdk.wandb_setup import singleton

        return singleton()

    @property
    def connection(self) -> Any:
        return self.setup._connection

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_log(self.ended, 60).rows


def started(folder: Path, name: str) -> WandbLogger:
    """A run with a row of each kind."""
    logger = WandbLogger(folder, id=name, offline=True, project="test", settings={"quiet": True})
    logger.log_metrics({"loss": 0.5, "nan": math.nan, "most": math.inf, "least": -math.inf}, 0)
    logger.log_table("table", ["a"], [[1]], step=0)
    logger.log_bar_chart("chart", ["a"], [1.0], step=0)
    return logger


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("output")
    assert started(folder, "ended").finish()
    logger = started(folder, "goes-on")
    assert logger.experiment.id == "goes-on"
    assert logger._run is not None
    while not logger._run.thread.is_idle:
        time.sleep(0.05)
    files = [next((folder / "wandb").rglob(f"run-{name}.wandb")) for name in ("goes-on", "ended")]
    yield Parts(folder, logger.experiment, *files)
    logger.finish()
    assert service_of(os.getpid()) is None
    assert wandb.run is None


def has_singleton(parts: Parts) -> None:
    assert parts.setup is not None
    assert parts.setup is parts.setup  # the state, and not a new one


def has_active_runs(parts: Parts) -> None:
    assert [run.id for run in parts.setup._active_runs] == ["goes-on"]
    assert callable(parts.setup._active_runs.clear)


def has_teardown(parts: Parts) -> None:
    inspect.signature(parts.connection.teardown).bind(0)


def has_process(parts: Parts) -> None:
    process = parts.connection._proc._process
    assert isinstance(process, subprocess.Popen)
    assert process.pid == service_of(os.getpid())


def unsets_globals(parts: Parts) -> None:
    from wandb.sdk.lib.module import unset_globals

    run, wandb.run = wandb.run, parts.run
    try:
        unset_globals()
        assert wandb.run is None
    finally:
        wandb.run = run


def clears_environment(parts: Parts) -> None:
    from wandb.sdk.lib.service.service_token import clear_service_in_env

    address = os.environ["WANDB_SERVICE"]
    clear_service_in_env()
    assert "WANDB_SERVICE" not in os.environ
    os.environ["WANDB_SERVICE"] = address


def unregisters_import_hooks(parts: Parts) -> None:
    """What it does is tested by an import, in test_wandb_that_stops_answering_costs_one_warning_and_no_time."""
    inspect.signature(wandb.Run._unregister_telemetry_import_hooks).bind("id")


def adds_handlers_to_the_logger(parts: Parts) -> None:
    files = [each for each in logging.getLogger("wandb").handlers if isinstance(each, logging.FileHandler)]
    handlers = [file for file in files if Path(file.baseFilename).is_relative_to(parts.folder)]
    assert handlers
    assert all("handleError" in vars(handler) for handler in handlers)


def waits_for_the_service(parts: Parts) -> None:
    assert settings_with_limits({}, 3.0, 4.0).x_service_wait == 3
    assert settings_with_limits(wandb.Settings(x_service_wait=5.0), 3.0, 4.0).x_service_wait == 5
    assert settings_with_limits(None, 3.0, 4.0).finish_timeout == 4


def leaves_out_the_command_line(parts: Parts) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for arguments, expected in ((["api_key=0"], True), (["lr=0"], False)):
            patch.setattr(sys, "argv", ["train", *arguments])
            assert settings_with_limits({}, 3.0, 4.0).x_disable_meta is expected


def has_core(parts: Parts) -> None:
    from wandb.util import get_core_path

    assert os.access(get_core_path(), os.X_OK)


def inspects(parts: Parts) -> None:
    log = read_log(parts.ended, 60)
    assert log.has_started
    assert log.has_ended
    assert [row.get("loss") for row in log.rows] == [0.5, None, None]


def has_blocks(parts: Parts) -> None:
    data, torn = parts.ended.read_bytes(), parts.folder / "torn.wandb"
    torn.write_bytes(data)
    mend(torn)
    assert torn.read_bytes() == data
    torn.write_bytes(data[:-1])
    mend(torn)
    assert 7 < torn.stat().st_size < len(data) - 1
    torn.write_bytes(data[:20])
    mend(torn)
    assert torn.stat().st_size == 7


def stores_media(parts: Parts) -> None:
    names = [{name for name in stored_names(row) if not name.startswith("_")} for row in parts.rows]
    step = "trainer/global_step"
    assert names == [{"loss", "nan", "most", "least", step}, {"table", step}, {"chart_table", step}]


def check(condition: Callable[[Parts], bool]) -> Callable[[Parts], None]:
    def assert_it(parts: Parts) -> None:
        assert condition(parts)

    return assert_it


CHECKS: dict[str, Callable[[Parts], None]] = {
    "wandb.sdk.wandb_setup.singleton": has_singleton,
    "_WandbSetup._connection": check(lambda parts: parts.setup._connection is not None),
    "_WandbSetup._active_runs": has_active_runs,
    "ServiceConnection.owns_service": check(lambda parts: parts.connection.owns_service is True),
    "ServiceConnection._cleanup": check(lambda parts: callable(parts.connection._cleanup)),
    "ServiceConnection.teardown": has_teardown,
    "ServiceConnection._proc": check(lambda parts: parts.connection._proc is not None),
    "ServiceProcess._process": has_process,
    "wandb.sdk.lib.module.unset_globals": unsets_globals,
    "wandb.sdk.lib.service.service_token.clear_service_in_env": clears_environment,
    "Run._unregister_telemetry_import_hooks": unregisters_import_hooks,
    "Run.starting_step": check(lambda parts: number_on_server(parts.run) == 0),
    "logging.getLogger('wandb').addHandler": adds_handlers_to_the_logger,
    "Settings.x_service_wait": waits_for_the_service,
    "Settings.x_disable_meta": leaves_out_the_command_line,
    "wandb.util.get_core_path": has_core,
    "wandb-core leet inspect": inspects,
    "wandb-core leet inspect --summary": check(
        lambda parts: wrote_end(parts.ended, 60) and not wrote_end(parts.log, 60)
    ),
    "*run-*-<id>/run-<id>.wandb": check(lambda parts: logs_of(parts.folder / "wandb", "ended") == [parts.ended]),
    "LevelDB blocks": has_blocks,
    "history: _step": check(lambda parts: [row["_step"] for row in parts.rows] == [0, 1, 2]),
    "history: <name>._type": stores_media,
    "history: NaN, Infinity, -Infinity": check(
        lambda parts: repr([parts.rows[0][name] for name in ("nan", "most", "least")]) == "[nan, inf, -inf]"
    ),
}


def test_each_private_part_has_a_check() -> None:
    assert list(CHECKS) == list(PRIVATE)


@pytest.mark.parametrize("name", PRIVATE)
def test_wandb_has(name: str, parts: Parts) -> None:
    try:
        CHECKS[name](parts)
    except Exception as error:
        pytest.fail(f"W&B {wandb.__version__} has lost {name} ({PRIVATE[name]}): {type(error).__name__}: {error}")


def test_a_file_that_cannot_be_read_is_not_taken_for_an_empty_one(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = tmp_path / "wandb-core"
    reader.write_text("#!/bin/sh\nexit 2\n")
    reader.chmod(0o755)
    monkeypatch.setattr("wandb.util.get_core_path", lambda: str(reader))
    with pytest.raises(RuntimeError, match="holds records, and `wandb leet inspect` finds none"):
        read_log(parts.ended, 60)
    (tmp_path / "empty.wandb").write_bytes(parts.ended.read_bytes()[:20])  # killed before the first record was whole
    assert not read_log(tmp_path / "empty.wandb", 60).has_started


def test_private_parts_are_in_one_file_and_all_of_them_are_listed() -> None:
    names = " ".join(PRIVATE)
    for file in (ROOT / "harness").rglob("*.py"):
        tree = ast.parse(file.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        private = {
            f"{node.module}.{alias.name}"
            for node in imports
            for alias in node.names
            if str(node.module).startswith(("wandb.sdk", "wandb.util"))
        }
        if file.name == "wandb_service.py":
            private |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)
            }
            assert len(private) >= 9
            assert [name for name in sorted(private) if name not in names] == []
        else:
            assert not private, file


def test_versions_of_wandb_are_bounded() -> None:
    """From above at the first version in which these tests have not run."""
    (bounds,) = re.findall(r'^ *"wandb>=([\d.]+),<([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    least, above, found = (tuple(map(int, text.split(".")[:2])) for text in (*bounds, wandb.__version__))
    assert least <= found < above
