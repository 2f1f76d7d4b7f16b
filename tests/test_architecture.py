"""What the layout of the package promises, beyond the layers that import-linter checks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object
from support.commands import ROOT

import harness

MODULES = sorted((ROOT / "harness").rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_one_package_uses_torch_distributed(path: Path) -> None:
    uses = {name for name in imported(path) if name.startswith("torch.distributed")}
    if path.parent.name == "launcher":  # starts ranks, and has no part in what they do
        starting = ("torch.distributed.elastic", "torch.distributed.launcher")
        uses = {name for name in uses if not name.startswith(starting)}
    starts_ranks_of_tests = path.parts[-2:] == ("testing", "ranks.py")
    assert path.parent.name == "distributed" or starts_ranks_of_tests or not uses


def test_public_names_are_there_and_sorted() -> None:
    assert all(hasattr(harness, name) for name in harness.__all__)
    assert harness.__all__ == sorted(harness.__all__)


@pytest.mark.parametrize("name", [name for name in harness.__all__ if name[0].isupper()])
def test_public_classes_are_targets(name: str) -> None:
    assert get_object(f"harness.{name}") is getattr(harness, name)


def test_unknown_names_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(AttributeError, match="ForceFieldModule"):
        harness.ForceField  # noqa: B018


def test_the_core_imports_without_the_heavy_libraries() -> None:
    heavy = ("wandb", "lightning", "ase", "torch_geometric", "hydra")
    check = f"import sys, harness; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# names behind which Hydra and OmegaConf may change from one version to the next
PRIVATE = {
    "_get_node",
    "_is_none",
    "_is_missing",
    "_is_interpolation",
    "_value",
    "_metadata",
    "_return_value",
    "_set_flag",
}


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parent.name != "sweep"],  # until its report reads what runs write for it
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_private_parts_of_hydra_and_omegaconf_are_not_used(path: Path) -> None:
    text = path.read_text()
    assert "._internal" not in text
    attributes = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    if "omegaconf" in text or "hydra" in text:
        assert not attributes & PRIVATE
