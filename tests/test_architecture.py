"""What the layout of the package promises, beyond the layers that import-linter checks."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from hydra.utils import get_object
from support.commands import ROOT

import harness

TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted((ROOT / "harness").rglob("*.py"))}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    return names


def test_only_one_package_uses_torch_distributed() -> None:
    uses = {
        file: {name for name in imported(tree) if name.startswith("torch.distributed")} for file, tree in TREES.items()
    }
    for file in (
        "harness/launcher/agent.py",
        "harness/launcher/launch.py",
    ):  # start ranks, and have no part in their work
        starting = ("torch.distributed.elastic", "torch.distributed.launcher")
        uses[file] = {name for name in uses[file] if not name.startswith(starting)}
    del uses["harness/testing/ranks.py"]  # starts ranks of tests
    assert not {file: names for file, names in uses.items() if names and not file.startswith("harness/distributed/")}
    assert any(names for file, names in uses.items() if file.startswith("harness/distributed/"))


def test_docstrings_name_the_thing_first() -> None:
    """The first word is the thing or an imperative verb, and never a question."""
    questions = ("What", "Whatever", "Whether", "Which", "Who", "Whose", "How", "Where", "When", "Why")
    found = []
    for file, tree in TREES.items():
        bodies = [getattr(owner, "body", None) for owner in ast.walk(tree)]
        for node in (node for body in bodies if isinstance(body, list) for node in body if isinstance(node, ast.Expr)):
            text = node.value.value if isinstance(node.value, ast.Constant) else None
            if isinstance(text, str) and text.split(maxsplit=1)[0] in questions:
                found.append(f"{file}:{node.lineno}: {text.splitlines()[0]}")
    assert not found


def test_no_class_does_too_much() -> None:
    classes = {
        f"{file}: {node.name}": sum(isinstance(each, ast.FunctionDef) for each in node.body)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert not {name: number for name, number in classes.items() if number > 26}


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


def test_private_parts_of_hydra_and_omegaconf_are_not_used() -> None:
    found = {}
    for file, tree in TREES.items():
        names = imported(tree)
        if not any(name.startswith(("hydra", "omegaconf")) for name in names):
            continue
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        found[file] = (attributes & PRIVATE) | {name for name in names if "._internal" in name}
    assert len(found) > 10
    assert not {file: names for file, names in found.items() if names}
