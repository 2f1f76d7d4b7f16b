"""Parts of a job that users write: each is asked once on every rank, can refuse the job, and has its files listed."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import ase.io
import pytest
from support import own_parts
from support.bad_input import BASE, captured, composed, frames
from support.commands import ROOT, Finished, train

from harness.job import prepare
from harness.train import run_job

OWN = (
    "+callbacks.own={_target_: support.own_parts.OwnCallback, output_dir: '${output_dir}'}",
    "+callbacks.wrong={_target_: support.own_parts.WrongFiles}",
    "+logger.own={_target_: support.own_parts.OwnLogger}",
    "~model",
    "+model={_target_: support.own_parts.OwnModel}",
    "data._target_=support.own_parts.OwnData",
    "~adaptive",
    "+adaptive={_target_: support.own_parts.OwnWeighting}",
)
PARTS = ("callback", "data", "logger", "model", "part", "weighting")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small training in which every part is a user's own."""
    path = tmp_path_factory.mktemp("frames") / "frames.xyz"
    ase.io.write(path, frames(), format="extxyz")
    base = [override for override in BASE if not override.startswith("model.")]
    return [*base, f"data.train={path}", *OWN]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    monkeypatch.setenv("NOTES", str(folder))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return folder


def read(notes: Path, rank: int) -> list[str]:
    return sorted((notes / f"rank{rank}").read_text().splitlines())


def seen(stage: str) -> list[str]:
    """A note of every part, once; each has seen the module, callbacks and the logger."""
    return [f"{part} {stage} ForceFieldModule True 1" for part in PARTS]


def two_ranks(overrides: list[str], tmp_path: Path) -> Finished:
    own = [override for override in overrides if override != "hydra.output_subdir=null"]
    return train(*own, ranks=2, folder=tmp_path / "run")


def test_every_part_is_asked_once_on_every_rank_and_its_files_are_listed(
    overrides: list[str], notes: Path, tmp_path: Path
) -> None:
    done = two_ranks([*overrides, "callbacks.parity=null"], tmp_path)
    assert done.code == 0, done.err[-3000:]
    assert read(notes, 0) == read(notes, 1) == seen("fit")
    (folder,) = done.runs
    places = done.out[done.out.index("output      ") :].splitlines()
    assert places[0] == f"output      {folder}"
    assert places[1].startswith("checkpoint  ")
    assert f"one file    {folder}/one.txt" in places
    assert "two files   a.txt" in places
    assert "two files   b [1].txt" in places  # no markup of a terminal
    assert not [line for line in places if line.startswith("none")]
    assert done.err.count("WrongFiles.written_files is a mapping of labels to paths, found ('a.txt',)") == 1
    assert places[-1] == "own run     https://example.org/run/1"


@pytest.mark.parametrize("part", PARTS)
def test_any_part_can_refuse_a_job(
    part: str, overrides: list[str], notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSES", part)
    output = tmp_path / "output"

    def job() -> None:
        config = composed(overrides)
        config.output_dir = str(output)
        run_job(config)

    said = captured(job)
    assert said.code != 0
    assert said.err.count("\nerror: ") == 1
    assert f"\nerror: the {part} found this; expected that. Do something else.\n" in said.err
    assert "Traceback" not in said.err + said.out
    assert "Epoch 0" not in said.err + said.out
    assert not output.exists()


@pytest.mark.parametrize("ranks", [pytest.param("1", marks=pytest.mark.slow), "0,1"])
def test_a_refusal_on_two_ranks_is_one_message_and_leaves_no_trace(
    ranks: str, overrides: list[str], notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSES", "logger")
    monkeypatch.setenv("REFUSES_ON", ranks)
    done = two_ranks(overrides, tmp_path)
    assert done.code != 0
    assert done.err.count("error: ") == 1, done.err
    message = "the logger found this; expected that. Do something else.\n"
    where = "error: " if ranks == "0,1" else "error: on rank 1 (host "
    assert where in done.err
    assert message in done.err
    assert (f"error: {message}" in done.err) is (ranks == "0,1")
    assert "Epoch 0" not in done.out + done.err
    assert [len([note for note in read(notes, rank) if note.startswith("logger")]) for rank in (0, 1)] == [1, 1]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_test_alone_is_another_stage(
    overrides: list[str], notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed([*overrides, "callbacks.parity=null"])
    config.output_dir = str(tmp_path / "trained")
    run_job(config)
    assert read(notes, 0) == seen("fit")
    (notes / "rank0").unlink()
    config = composed([*overrides, "train=false", f"ckpt_path={tmp_path}/trained/checkpoints/last.ckpt"])
    config.output_dir = str(tmp_path / "tested")
    prepare(config)
    assert read(notes, 0) == seen("test")
    assert not (tmp_path / "tested").exists()


def test_parts_are_made_once(overrides: list[str], notes: Path, tmp_path: Path) -> None:
    """Also the strategy and the trainer, which the checks ask and the training uses."""
    own_parts.MADE.clear()
    strategy = "+strategy={_target_: support.own_parts.OwnStrategy}"
    trainer = "trainer._target_=support.own_parts.OwnTrainer"
    config = composed([*overrides, trainer, "~strategy", strategy, "dry_step=false"])  # which copies the model
    config.output_dir = str(tmp_path / "output")
    job = prepare(config)
    assert (
        dict.fromkeys(
            ["OwnCallback", "OwnData", "OwnLogger", "OwnModel", "OwnPart", "OwnStrategy", "OwnTrainer", "OwnWeighting"],
            1,
        )
        == own_parts.MADE
    )
    assert type(job.trainer) is own_parts.OwnTrainer
    assert type(job.trainer.strategy) is own_parts.OwnStrategy
    assert read(notes, 0) == sorted([*seen("fit"), "strategy fit ForceFieldModule True 1"])
    assert not (tmp_path / "output").exists()


def test_no_callback_weighting_or_logger_is_known_by_its_class() -> None:
    """What the job does with a part of this package it does with a user's."""
    rooms = ("harness.callbacks", "harness.adaptive", "harness.loggers")
    modules = [importlib.import_module(room) for room in rooms]
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    classes = {name for name, value in public.items() if inspect.isclass(value) and value.__module__.startswith(rooms)}
    assert {"ParityPlot", "GradientBalance", "WandbLogger"} <= classes
    for path in (ROOT / "harness" / "job").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & classes, path
