"""The documents hold what they say: code runs, links lead somewhere, and every public name is in the reference."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

import harness

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def python_blocks(text: str) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for block in blocks if "--8<--" not in block]


class Model(torch.nn.Module):
    """Stands for the reader's model."""

    def __init__(self) -> None:
        super().__init__()
        self.energies = torch.nn.Embedding(3, 1)
        self.matrix = torch.nn.Linear(3, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        energies = self.energies(batch["atom_types"])
        total = torch.zeros(len(batch["num_atoms"]), 1).index_add(0, batch["batch"], energies)
        return {"total_energy": total, "forces": self.matrix(batch["pos"])}


def make_batches(number: int) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "pos": torch.randn(8, 3),
            "atom_types": torch.tensor([0, 1, 2, 0, 0, 1, 2, 2]),
            "batch": torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]),
            "num_atoms": torch.tensor([3, 5]),
            "total_energy": torch.randn(2, 1),
            "forces": torch.randn(8, 3),
        }
        for _ in range(number)
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/losses-and-metrics.md", "docs/training.md"])
def test_python_blocks_run(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks((ROOT / page).read_text())
    assert blocks
    for block in blocks:
        names: dict[str, object] = {"__name__": "document", "model": Model(), "batches": make_batches(3)}
        exec(compile(block, page, "exec"), names)
        if page == "README.md":
            assert torch.isfinite(torch.tensor(float(capsys.readouterr().out.split("(")[1].split(",")[0])))
        if "LogCosh" in names:
            metric = names["LogCosh"]()  # type: ignore[operator]
            manager = harness.MetricsManager([{"field": "forces", "metric": metric}])
            value = manager({"forces": torch.ones(2, 3)}, {"forces": torch.zeros(2, 3)})["F_log_cosh"]
            assert value.item() == pytest.approx(torch.log(torch.cosh(torch.tensor(1.0))).item())


def test_only_the_pages_tested_above_have_python_blocks() -> None:
    have = {str(page.relative_to(ROOT)) for page in PAGES if python_blocks(page.read_text())}
    assert have == {"README.md", "docs/losses-and-metrics.md", "docs/training.md"}


@pytest.mark.parametrize("name", NAMES)
def test_links_to_files_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name} links to {target}"
    for source in re.findall(r'--8<-- "([^":]+)', page.read_text()):
        assert (ROOT / source).is_file(), f"{name} includes {source}"


def first_value(word: str) -> str:
    """An override, with the first of the values that it sweeps over."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))
    return f"{override.get_key_element()}={first}"


@pytest.mark.parametrize("name", NAMES)
def test_config_keys_on_command_lines_exist(name: str) -> None:
    """Every ``harness-train`` line of the documents composes; quoting is that of the shell."""
    lines = [line.split(" #")[0] for line in (ROOT / name).read_text().splitlines()]
    commands = [line for line in lines if line.startswith("harness-train ")]
    commands += [line.partition("-m harness.train")[2] for line in lines if line.startswith("torchrun")]
    for command in commands:
        words = [first_value(word) for word in shlex.split(command) if "=" in word]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            compose("train", overrides=words)


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "api" / "harness.md").read_text()
    listed = set(re.findall(r"^\| \[`(\w+)`\]\[harness\.", text, flags=re.MULTILINE))
    assert listed == set(harness.__all__)


def test_every_module_is_in_the_reference() -> None:
    documented = {
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.MULTILINE)
    }
    internal = {
        "harness.train",
        "harness.callbacks.tables",
        "harness.job.best",
        "harness.job.consistency",
        "harness.job.failures",
        "harness.job.run",
        "harness.job.start",
        "harness.job.trainer",
        "harness.loggers.journal",
        "harness.loggers.media",
        "harness.loggers.stand_ins",
        "harness.loggers.summaries",
        "harness.loggers.wandb_rows",
        "harness.loggers.wandb_run",
        "harness.loggers.wandb_service",
        "harness.loggers.wandb_thread",
        "harness.runs.ranks",
        "harness.runs.resuming",
        "harness.runs.sweep_plan",
        "harness.support.deferred",
        "harness.support.garbage",
        "harness.support.lazy",
        "harness.support.process",
        "harness.support.text",
        "harness.support.warn",
    }
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "harness").glob("**/*.py")
        if not file.stem.startswith("__") and not file.stem.endswith("_private") and file.parent.name != "config"
    }
    assert modules - internal == documented


def test_picture_is_small() -> None:
    assert (ROOT / "docs" / "assets" / "parity.png").stat().st_size < 150_000


def test_formulas_and_references_of_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    import importlib.util

    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (
        "See :class:`~harness.metrics.manager.Values`, :math:`x\n  y`.\n\n.. math:: a = b\n    + c\n\nAnd :func:`f`.\n"
    )
    assert module.to_markdown(text) == (
        "See [`Values`][harness.metrics.manager.Values], $x y$.\n\n$$\na = b\n+ c\n$$\n\nAnd `f`.\n"
    )
