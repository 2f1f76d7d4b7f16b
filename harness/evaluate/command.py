"""Command line of ``harness-eval``: one message for a mistake, whatever the number of ranks, and files of rank 0."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from rich.console import Console

from harness.config.bad_input import BAD_INPUT
from harness.config.explain import HINT, message
from harness.data.reading import file_fingerprint
from harness.distributed import START_LIMIT, RankAbsentError, launched_rank, launched_ranks, share
from harness.evaluate.evaluation import Evaluation, build, picture_names
from harness.evaluate.report import CSV, JSON
from harness.evaluate.settings import Request, parse
from harness.job.consistency import Facts, refusal, versions
from harness.job.failures import reported
from harness.runs import Interrupted, JobFailed, keyboard_interrupts
from harness.runs.ranks import absent_ranks_reported, settle_ranks
from harness.strategies import connect
from harness.support.warn import quieten, settle_rank

__all__ = ["main"]

_NOT_COMPARED = ("output_dir", "write", "trainer.default_root_dir")
"""Settings with paths of rank 0's files."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``harness-eval``; mistakes end it with one message and exit code 1, Ctrl-C with 130.

    Args:
        arguments: of the command line; those of the process if not given.
    """
    quieten()
    with absent_ranks_reported():
        settle_ranks()
        settle_rank(launched_rank())
        try:
            with keyboard_interrupts():
                _evaluate(sys.argv[1:] if arguments is None else arguments)
        except Interrupted:
            print("\nstopped: interrupted", file=sys.stderr)
            raise


def _evaluate(arguments: Sequence[str]) -> None:
    """Evaluate on this rank.

    Raises:
        JobFailed: the evaluation has failed and has reported why.
    """
    begin = time.monotonic()
    evaluation = _start(arguments)
    limit = timedelta(seconds=float(evaluation.request.config.trainer.timeout))
    console = Console(quiet=launched_rank() != 0)
    if not console.is_terminal:
        console.width = 140  # a log file has room for every column
    plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    for line in _beginning(evaluation):
        console.print(line, **plain)
    try:
        with reported(evaluation.position, limit):
            connect(evaluation.trainer)
            evaluation.run()
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if getattr(error, "on_all_ranks", False) is True:
            _fail_together(error, limit)
        if not isinstance(error, BAD_INPUT):
            raise
        _fail(message(error))
    if launched_rank() != 0:
        return
    folder = Path(evaluation.request.config.output_dir)
    evaluation.print_results(console)
    facts = {
        "ranks": launched_ranks(),
        "device": str(evaluation.trainer.strategy.root_device),
        "seconds": round(time.monotonic() - begin, 3),
    }
    try:
        written = evaluation.write_results(folder, facts)
    except OSError as error:
        _fail(f"{folder}: the values cannot be written ({error})")
    for line in evaluation.ending():
        console.print(line, **plain)
    for name, path in written:
        console.print(f"{name:<11} {path}", **plain)


def _start(arguments: Sequence[str]) -> Evaluation:
    """The evaluation, ready on all ranks.

    Raises:
        JobFailed: it cannot start, for the same reason on all ranks, and rank 0 has reported it.
    """
    evaluation, mistake, in_common = None, None, None
    try:
        request = parse(arguments)
        evaluation = build(request)
        in_common = _facts(request)
        if launched_rank() == 0:
            _take_output(evaluation)
    except Exception as error:
        mistake = error
    shown = None
    if mistake is not None:
        shown = message(mistake) if isinstance(mistake, BAD_INPUT) else f"{type(mistake).__name__}: {mistake}"
    refused = refusal(shown, in_common)
    if mistake is not None and (not isinstance(mistake, BAD_INPUT) or os.environ.get("HYDRA_FULL_ERROR") == "1"):
        raise mistake
    if refused or evaluation is None:
        _fail(refused or "the evaluation cannot start")
    return evaluation


def _facts(request: Request) -> Facts | None:
    """Versions, settings and files of this rank, which are to be the same on all."""
    if launched_ranks() == 1:
        return None
    settings: Any = OmegaConf.to_container(request.config, resolve=True)
    flat = {name: repr(value) for name, value in _leaves(settings).items() if name not in _NOT_COMPARED}
    files = {f"file {number}": file_fingerprint(path) for number, path in enumerate(request.files, start=1)}
    return {
        "version": versions(),
        "setting": flat,
        "data": {**files, "checkpoint": file_fingerprint(request.checkpoint)},
    }


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= _leaves(each, f"{name}.{key}" if name else str(key))
    return found


def _take_output(evaluation: Evaluation) -> None:
    """Make the output directory and the file of predictions, before anything is computed.

    Raises:
        ValueError: files would be replaced, or the inputs are among them.
        OSError: there is no permission to write.
    """
    config, request = evaluation.request.config, evaluation.request
    folder = Path(config.output_dir)
    write = None if config.write is None else Path(config.write).expanduser().absolute()
    if write is not None:
        if write.suffix not in (".xyz", ".extxyz"):
            raise ValueError(
                f"--write {config.write}: predictions are written as extended XYZ, to a file such as {write.stem}.xyz"
            )
        if write.resolve() in {path.resolve() for path in (request.checkpoint, *request.files)}:
            raise ValueError(f"--write {config.write} is one of the files that are read; give predictions another name")
    pictures = [folder / name for name in picture_names(evaluation.files)]
    outputs = [folder / JSON, folder / CSV, *pictures] if evaluation.labelled else []
    there = [path for path in (*outputs, *([write] if write else [])) if path.exists()]
    if there and not config.overwrite:
        raise ValueError(
            f"{there[0]} is there already, and would be replaced; give another "
            f"{'--write' if there[0] == write else 'output_dir'}, or --overwrite"
        )
    for place in {*([folder] if evaluation.labelled else []), *([write.parent] if write else [])}:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"{place}: no permission to write there; give another output_dir or --write")


def _beginning(evaluation: Evaluation) -> list[str]:
    """Lines to print at first."""
    ((limited, limit),) = evaluation.limits.items()
    unit = {"batch_size": "frames"}.get(limited, limited.removeprefix("max_"))
    facts, num_ranks = evaluation.facts, launched_ranks()
    read = []
    for file in evaluation.files:
        labels = ", ".join(f"{name} {number}" for name, number in file.labels().items())
        isolated = len(file.frames) - len(file.counted)
        apart = f"; {isolated} isolated atoms are no part of the errors" if isolated else ""
        read.append(f"{file.path}: {len(file.frames)} frames; labelled with {labels}{apart}")
    return [
        f"checkpoint: {facts['checkpoint']} (epoch {facts['epoch']}, step {facts['step']})",
        *read,
        f"{num_ranks} rank{'s' * (num_ranks > 1)} on {evaluation.trainer.strategy.root_device.type}, "
        f"precision {facts['precision']}, data in {facts['dtype']}, batches of {limit} {unit} of all ranks",
        *evaluation.notes,
    ]


def _fail(text: str) -> NoReturn:
    """Report a failure of all ranks once, and end this one.

    Raises:
        JobFailed: always.
    """
    if launched_rank() == 0:
        print(f"\nerror: {text}\n{HINT}", file=sys.stderr, flush=True)
    raise JobFailed(text)


def _fail_together(error: Exception, limit: timedelta) -> NoReturn:
    """Report an error of all ranks once, and end when it is written: a launcher ends the others with the first.

    Raises:
        JobFailed: always.
    """
    if launched_rank() == 0:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
    with suppress(RankAbsentError):
        share("all is written", "", max(limit, START_LIMIT))
    raise JobFailed(str(error)) from error
