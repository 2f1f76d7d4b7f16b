"""Private parts of W&B: the only file that reaches for them.

W&B may rename any of these between two versions, which is why ``pyproject.toml`` bounds its version from above. All of
them are in :data:`PRIVATE`, and ``tests/loggers/test_wandb_service.py`` fails with the name of one that is lost. A
training goes on without it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from harness.loggers.secrets import arguments_have_secrets

__all__ = [
    "PRIVATE",
    "RunLog",
    "end_service",
    "ignore_imports",
    "logs_of",
    "mend",
    "number_on_server",
    "read_log",
    "settings_with_limits",
    "silence_debug_log",
    "stored_names",
    "wrote_end",
]

PRIVATE = {
    # the service, a process of W&B's beside each process that has a run; without these, W&B ends it as it likes
    "wandb.sdk.wandb_setup.singleton": "state of W&B in this process",
    "_WandbSetup._connection": "connection to the service, None where there is none; the next run makes a new one",
    "_WandbSetup._active_runs": "runs that W&B would finish when Python exits",
    "ServiceConnection.owns_service": "True if this process has started the service",
    "ServiceConnection._cleanup": "takes back what would be called when Python exits",
    "ServiceConnection.teardown": "asks the service to end, and waits for it",
    "ServiceConnection._proc": "the service",
    "ServiceProcess._process": "its ``subprocess.Popen``, to be killed where it does not end",
    "wandb.sdk.lib.module.unset_globals": "resets ``wandb.run``, which would be taken for a run in progress",
    "wandb.sdk.lib.service.service_token.clear_service_in_env": "unsets the address of the service in ``os.environ``",
    # a run
    "Run._unregister_telemetry_import_hooks": "removes import hooks, which raise once the service is dead",
    "Run.starting_step": "number of rows that the server has of a run that goes on",
    "logging.getLogger('wandb').addHandler": "is given the handler of each run's debug.log",
    # settings, which are taken as W&B has them where they are missing
    "Settings.x_service_wait": "seconds that the service may take to start",
    "Settings.x_disable_meta": "keeps the command line out of the run",
    # files
    "wandb.util.get_core_path": "W&B's program, which reads files a second faster than the command ``wandb``",
    "wandb-core leet inspect": "prints the records of a file as JSON (new in W&B 0.31)",
    "wandb-core leet inspect --summary": "prints an ``exit_code``, null until the end of the run has been written",
    "*run-*-<id>/run-<id>.wandb": "the file of a start",
    "LevelDB blocks": "the format of the file: blocks of 32 KiB of chunks, behind a header of 7 bytes",
    "history: _step": "number of a row in its run, over all its starts",
    "history: <name>._type": "media are stored as several values, a chart as its table under <name>_table",
    "history: NaN, Infinity, -Infinity": "numbers that are not finite are stored as texts",
}
"""Private parts of W&B that this file uses, and what each is for."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Numbers by their texts in W&B's files."""
_BLOCK = 32768
"""Bytes of a block in LevelDB's format."""
_HEADER = 7
"""Bytes of the header of a chunk in it, and of W&B's header of the file."""


# --- the service ---


def end_service(patience: float = 2.0) -> None:
    """End W&B's own process, within ``2 × patience`` seconds.

    W&B would do so when Python exits, and wait without a limit for a process that is stuck, or that cannot reach its
    server to say goodbye. All values are written or uploaded by then, or never will be.
    """
    with suppress(Exception):
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.module import unset_globals
        from wandb.sdk.lib.service import service_token

        setup = cast(Any, wandb_setup.singleton())
        if setup._connection is None or not setup._connection.owns_service:
            return
        connection, setup._connection = setup._connection, None
        setup._active_runs.clear()
        unset_globals()
        connection._cleanup()
        service_token.clear_service_in_env()

        def end() -> None:
            with suppress(Exception):
                connection.teardown(0)

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(patience)
        if ending.is_alive():
            connection._proc._process.kill()
            ending.join(patience)


# --- a run ---


def settings_with_limits(given: Any, start_timeout: float, finish_timeout: float) -> Any:
    """Copy of ``wandb.Settings``, or settings from a dictionary, with time limits where the user has set none.

    The command line is kept out of the run if it looks as if it had a secret in it.
    """
    import wandb

    settings = wandb.Settings(**given) if isinstance(given, Mapping) else (given or wandb.Settings()).model_copy()
    limits = {"init_timeout": start_timeout, "x_service_wait": start_timeout, "finish_timeout": finish_timeout}
    if arguments_have_secrets():
        limits["x_disable_meta"] = True
    for name, value in limits.items():
        if name in type(settings).model_fields and name not in settings.model_fields_set:
            setattr(settings, name, value)
    return settings


def ignore_imports(run: Any) -> None:
    """Remove what W&B hangs on the import of well-known packages: it would raise there once its process is dead."""
    with suppress(Exception):
        run._unregister_telemetry_import_hooks(run.id)


def number_on_server(run: Any) -> int:
    """Number of rows that W&B's server has of a run that goes on."""
    return int(run.starting_step)


def silence_debug_log() -> None:
    """Ignore a full disk under W&B's debug.log; Python would show a traceback for each line of it."""
    log = logging.getLogger("wandb")

    def add(handler: logging.Handler) -> None:
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        logging.Logger.addHandler(log, handler)

    log.addHandler = add  # type: ignore[method-assign, assignment]


# --- files ---


@dataclass(frozen=True)
class RunLog:
    """Records in the file of one start.

    Args:
        has_started: the run has been written; ``wandb sync`` stops at a file without it.
        has_ended: the end of the run has been written.
        rows: its rows, as far as the file is whole.
    """

    has_started: bool
    has_ended: bool
    rows: list[dict[str, Any]]


def logs_of(folder: Path, run_id: str) -> list[Path]:
    """Files of a run in W&B's folder, one for each start, in their order."""
    return sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"))


def read_log(log: Path, timeout: float) -> RunLog:
    """Read the file of one start.

    Raises:
        RuntimeError: the file holds records, and W&B's reader does not find them.
    """
    text = _inspect(log, timeout)
    if not text and _whole_length(log.read_bytes()) > _HEADER:  # not to be taken for a run that never started
        raise RuntimeError(f"{log} holds records, and `wandb leet inspect` finds none. Which version is W&B?")
    records = [json.loads(line) for line in text.splitlines() if '"type":"history"' in line]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = [
        {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in item.items()}
        for item in items
    ]
    return RunLog('"type":"run"' in text, '"type":"exit"' in text, rows)


def wrote_end(log: Path, timeout: float) -> bool:
    """True once the end of a run is in its file, which W&B writes after it says that the run has finished."""
    return json.loads(_inspect(log, timeout, "--summary"))["exit_code"] is not None


def stored_names(row: Mapping[str, Any]) -> set[str]:
    """Names under which the values of a row have been logged; those of W&B's own begin with ``_``."""
    media = {name.removesuffix("._type") for name in row if name.endswith("._type")}
    return {name for name in row if name.rpartition(".")[0] not in media} | media


def mend(log: Path) -> None:
    """Cut a file that was torn after its last whole record: ``wandb sync`` would stop there, short of later files."""
    data = log.read_bytes()
    end = _whole_length(data)
    if end < len(data):
        os.truncate(log, end)


def _whole_length(data: bytes) -> int:
    """Bytes up to the end of the last whole record, :data:`_HEADER` if there is none.

    The format is LevelDB's: blocks of chunks with a checksum, a length and a kind, 1 for a whole record and 2, 3, 4 for
    the beginning, the middle and the end of one.
    """
    position = end = _HEADER
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        position += _HEADER + length
        if kind not in (1, 2, 3, 4) or position > len(data):
            break
        if kind in (1, 4):
            end = position
    return end


def _inspect(log: Path, timeout: float, *options: str) -> str:
    """Output of ``wandb leet inspect --json``, without the second that Python takes to start it."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *options, "--run-file", str(log)]
    return subprocess.run(
        [*command, str(log.parents[1])],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    ).stdout
