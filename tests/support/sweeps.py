"""Sweeps of small trainings, and what their points leave."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.commands import BIN, TINY

POINT = (
    *(each for each in TINY if not each.startswith("max_epochs")),
    "max_epochs=1",
    "callbacks.learning_rate=null",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "hydra.sweep.dir=sweep",
)

TORCHRUN = ("--multirun", "hydra/launcher=torchrun")
LOGGERS = "logger=[wandb,csv]"
needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="the extra `sweep` is not installed"
)
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="the extra `sweep` is not installed"
)


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def wandb_run(folder: Path) -> dict[str, Any]:
    """What the one offline W&B run of a point says of itself: name, group, config and how it ended."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [str(BIN / "wandb"), "leet", "inspect", "--json"]
    lines = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in lines.splitlines() if '"type":"run"' in line]
    summary = subprocess.run(
        [*command, "--summary", str(file)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return {**next(each["run"] for each in records if each["type"] == "run"), **json.loads(summary)}
