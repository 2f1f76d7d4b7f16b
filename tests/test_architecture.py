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


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Docstrings of a file, of attributes too, with their lines."""
    bodies = [getattr(owner, "body", None) for owner in ast.walk(ast.parse(path.read_text()))]
    nodes = [node for body in bodies if isinstance(body, list) for node in body if isinstance(node, ast.Expr)]
    return [
        (node.lineno, node.value.value)
        for node in nodes
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_the_thing_first(path: Path) -> None:
    """The first word is the thing or an imperative verb, and never a question."""
    questions = ("What", "Whatever", "Whether", "Which", "Who", "Whose", "How", "Where", "When", "Why")
    assert not [line for line, text in docstrings(path) if text.split(maxsplit=1)[0] in questions]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_class_does_too_much(path: Path) -> None:
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    methods = {each.name: sum(isinstance(node, ast.FunctionDef) for node in each.body) for each in classes}
    assert not {name: number for name, number in methods.items() if number > 26}


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
