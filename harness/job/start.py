"""Start of a job: ranks of the launcher; built and checked on all of them; its output directory and checkpoint."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Callback
from omegaconf import DictConfig

from harness.config.bad_input import BAD_INPUT
from harness.config.explain import message
from harness.distributed import (
    START_LIMIT,
    launched_rank,
    launched_ranks,
    share,
)
from harness.job.build import time_limit
from harness.job.consistency import facts, refusal
from harness.job.job import Job, prepare
from harness.job.protocols import KeepsCheckpoints
from harness.runs import Command, claim, goes_on, is_interrupted

__all__ = ["start", "time_limit"]


def start(config: DictConfig, limit: timedelta, command: Command) -> Job:
    """The job, ready on all ranks, in an output directory of its own.

    Args:
        config: the whole configuration.
        limit: time that ranks wait for each other.
        command: by which the job was started.

    Raises:
        ValueError: it cannot start, for the same reason on all ranks.
        Exception: the error of this rank.
    """
    job, mistake, in_common = None, None, None
    # whatever is wrong, the other ranks must not wait for this one
    try:
        job = prepare(config)
    except Exception as error:
        mistake = error
    try:
        in_common = facts(config, job.datamodule if job else None) if launched_ranks() > 1 else None
    except Exception as error:
        mistake = mistake or error
    shown = None
    if mistake is not None:
        shown = message(mistake) if isinstance(mistake, BAD_INPUT) else f"{type(mistake).__name__}: {mistake}"
    refused = refusal(shown, in_common, max(limit, START_LIMIT))  # ranks start less evenly than they step
    if mistake is not None:
        raise mistake
    if job is None or refused:
        raise ValueError(refused)
    found: dict[str, str | None] = {}
    if launched_rank() == 0:  # one rank looks for all: they must go on from the same
        try:
            job.lock = claim(Path(config.output_dir))
            found["checkpoint"] = _checkpoint_to_resume(config, job.callbacks, command)
        except BAD_INPUT as error:
            found["error"] = message(error)
    found = json.loads(share("resume", json.dumps(found), limit))
    if found.get("error"):
        raise ValueError(found["error"])
    job.resume_from = found.get("checkpoint")
    return job


def _checkpoint_to_resume(config: DictConfig, callbacks: list[Callback], command: Command) -> str | None:
    """The newest whole checkpoint of this command in this output directory, if it was interrupted and is to go on."""
    keeping = next((callback for callback in callbacks if isinstance(callback, KeepsCheckpoints)), None)
    if keeping is None or not config.train:
        return None
    is_awaited = goes_on(config)
    if not is_awaited or not is_interrupted(Path(config.output_dir), command):
        if is_awaited and command.point is None:
            print(f"resume: no interrupted run of this command; it starts anew in {config.output_dir}", flush=True)
        if not config.ckpt_path or Path(config.ckpt_path).resolve().parent != keeping.dirpath.resolve():
            keeping.put_aside()
        return None
    newest = keeping.newest()
    if newest is None and command.point is None:
        print(f"resume: the run in {config.output_dir} left no checkpoint; it starts anew", flush=True)
    return None if newest is None else str(newest)
