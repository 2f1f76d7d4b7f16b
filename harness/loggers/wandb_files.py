"""Reading and mending what W&B keeps on disk of a run: its rows, and files that were torn."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.loggers.journal import Media

__all__ = ["STEP", "inspected", "mend", "row_key", "rows_of"]

STEP = "trainer/global_step"
"""Name of the optimizer step among W&B's values, chosen by Lightning."""


def row_key(row: Mapping[str, Any], step: Any) -> tuple[int, frozenset[str]]:
    """What tells a row from others: its step and the names in it."""
    media = {name.removesuffix("._type") for name in row if name.endswith("._type")}  # stored as several values
    names = {name for name in row if name.rpartition(".")[0] not in media and not name.startswith("_")}
    names.discard(STEP)
    charts = {name for name in names if _is_chart(row.get(name))}  # stored as the table behind it
    names = names - charts | {f"{name}_table" for name in charts}
    return -1 if step is None else int(step), frozenset(names | media)


def _is_chart(value: Any) -> bool:
    from wandb.plot import CustomChart

    return isinstance(value, CustomChart) or (isinstance(value, Media) and value.kind == "bar_chart")


def mend(log: Path) -> None:
    """Cut a file of W&B's that was torn after its last whole record: ``wandb sync`` would stop there, short of others.

    It is a log in LevelDB's format: blocks of 32 KiB of chunks with a checksum, a length and a kind, 1 for a whole
    record and 2, 3, 4 for the beginning, the middle and the end of one.
    """
    data, block, header = log.read_bytes(), 32768, 7
    position = end = header  # of the file, as long as that of a chunk
    while position + header <= len(data):
        left = block - position % block
        if left < header:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        position += header + length
        if kind not in (1, 2, 3, 4) or position > len(data):
            break
        if kind in (1, 4):
            end = position
    if end < len(data):
        os.truncate(log, end)


def rows_of(text: str) -> list[dict[str, Any]]:
    """Rows among what is in a file of W&B's, as far as it is whole."""
    lines = (line for line in text.splitlines() if '"type":"history"' in line)
    records = [json.loads(line) for line in lines]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def inspected(log: Path, timeout: float, *options: str) -> str:
    """What ``wandb leet inspect --json`` prints of a file, without the second that Python takes to start it."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *options, "--run-file", str(log)]
    return subprocess.run(
        [*command, str(log.parents[1])], capture_output=True, text=True, timeout=timeout, check=False
    ).stdout
