"""Every benchmark runs as its documents say, here with little to do, and prints its table."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = {
    "step.py": (["--types", "1", "2", "--rounds", "2", "--atoms", "8"], "minimum             1           0"),
    "lateness.py": (["--late", "0.02", "--steps", "4"], "merged "),
    "balance.py": (["--ranks", "2", "--drawn", "100"], "heavy tail            2  edges  budget"),
    "logging.py": (["--types", "2", "--steps", "60", "--atoms", "8"], "| 2 | with everything |"),
    "training.py": (
        ["--frames", "1", "--ranks", "1", "--rounds", "2", "--where"],
        "| [Callback]NonFiniteGuard.on_before_optimizer_step |",
    ),
    "continuation.py": (["--output", "rates"], "| extended to 8 |  |  |  |  | 0.0025 |"),
    "store.py": (["formats", "--frames", "200", "--only", "records", "columns"], "told (ValueError)"),
    "data.py": (
        ["--only", "hand-over", "lists", "plans", "--frames", "16", "--repeats", "1", "--frames-planned", "2000"],
        "      2000  evaluation by 1000 atoms",
    ),
    "scaling.py": (["--ranks", "2", "3", "4", "--beyond", "8"], "| restart: ranks meet again | store requests |"),
    "schedules.py": (["--epochs", "1", "--seeds", "0", "--only", "constant", "deepmd"], "| deepmd |"),
}


def loaded(script: str) -> ModuleType:
    """A script as a module of this process."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(script).stem}", ROOT / "benchmarks" / script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def run(script: str, arguments: list[str], folder: Path) -> str:
    """What a script prints, run from another folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


ELSEWHERE = {"recipes.py"}  # tests/jobs/test_recipes.py


GPU_SECTIONS = {
    "machine": "| torch | ",
    "loss": "| 89 | harness | ",
    "training-schnet": "| module, default callbacks | ",
    "precision-schnet": "| bf16-mixed | ",
    "ranks": "| gloo | 2 | ",
    "compiled": "| CUDA graph | GPUs only",
    "tests": "Skipped: ",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_report_is_written(tmp_path: Path) -> None:
    """On the CPU with little to do; sections of models that are not installed say so, and the others go on."""
    sections = [*GPU_SECTIONS, "training-mace"]
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--output", str(tmp_path / "gpu.md")]
    done = subprocess.run(
        [*command, "--only", *sections], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580
    )
    written = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{written}"
    assert all(line in written for line in GPU_SECTIONS.values()), written
    assert len(re.findall("^## ", written, flags=re.MULTILINE)) == len(sections)
    assert "the same on all ranks" in written
    assert not re.search(r"\bnan\b|Failed", written), written


def test_a_section_that_fails_is_written_with_its_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which this section would not miss")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "report.py"), "--only", "machine"]
    done = subprocess.run([*command, "--output", "gpu.md"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    written = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 1
    assert "failed: machine" in done.stdout
    assert "is this torch built with CUDA" in written


def test_wheels_stand_in_for_missing_packages_alone(tmp_path: Path) -> None:
    """Nothing is installed: their contents are in a folder on the path of the sections."""
    report = loaded("gpu/report.py")
    for name in ("not_there", "torch"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    assert report.unpacked(tmp_path / "none", tmp_path / "empty", only_missing=True) == []
    missing, of_model = tmp_path / "missing", tmp_path / "of_model"
    assert report.unpacked(tmp_path, missing, only_missing=True) == [str(missing)]
    assert [path.name for path in missing.iterdir()] == ["not_there"]
    assert report.unpacked(tmp_path, of_model, only_missing=False) == [str(of_model)]
    assert sorted(path.name for path in of_model.iterdir()) == ["not_there", "torch"]


def test_every_benchmark_is_run() -> None:
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {*SMALL, *ELSEWHERE}


@pytest.mark.parametrize("script", [*SMALL, *ELSEWHERE])
def test_a_script_does_not_find_this_folder(script: str, tmp_path: Path) -> None:
    """Where logging.py would hide Python's own module."""
    assert "--help" in run(script, ["--help"], tmp_path)


def test_loaders_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and without the other packages: the table starts each in a process of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script changes
    benchmark = loaded("data.py")
    benchmark.write_frames(tmp_path / "frames.xyz", 8, 1)
    made, kept = (
        benchmark.measure_loader("harness", tmp_path / "frames.xyz", 3.0, kept, 2, workers=0) for kept in (False, True)
    )
    assert kept > made > 10  # samples a second


def test_ranks_send_no_more_than_they_must(tmp_path: Path) -> None:
    """Counts on 2, 4 and 8 ranks, by phase and what is counted."""
    printed = run("scaling.py", ["--ranks", "2", "4", "8"], tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "| " in line]
    rows = [row for row in rows if len(row) == 7 and row[0] not in ("phase", "---")]
    counted = {(row[0], row[1]): [float(cell.replace(",", "")) for cell in row[2:5]] for row in rows}
    _, of_four, of_eight = counted["start: process group", "store requests"]
    assert of_eight <= 8 * 8, "addresses are read one by one, for each pair of ranks"
    assert of_four <= 8 * 4
    settings = counted["start: agreement on settings and data", "store KiB"]
    assert settings[2] - settings[1] < 4 * 4, "all ranks read the settings of rank 0"
    assert counted["start: agreement on settings and data", "store requests"][2] < 8 * 20
    writer, another = (counted["checkpoint: random states", f"KiB of {rank}"][2] for rank in ("rank 0", "another"))
    assert another < writer / 3, "all ranks get the random states of all"
    assert counted["faults: one look at the board", "store requests"] == [2, 4, 8]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", SMALL)
def test_a_table_is_printed(script: str, tmp_path: Path) -> None:
    arguments, line = SMALL[script]
    printed = run(script, arguments, tmp_path)
    assert line in printed
    if script != "schedules.py":  # a single seed has no deviation
        assert not re.search(r"\bnan\b", printed), printed
    if script == "schedules.py":
        assert (tmp_path / "outputs" / "schedules" / "schedules.png").is_file()
