"""What the layout of the package promises, beyond the layers that import-linter checks."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import subprocess
import sys
import textwrap

import lightning.pytorch.loggers
import pytest
from hydra.utils import get_object
from support.commands import ROOT

import harness
from harness.support import lightning_private, torch_private

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


# --- private parts of libraries ---

LISTS = {  # files that may reach for the private parts of one library, each with a list of them
    "harness/distributed/torch_private.py",
    "harness/loggers/wandb_service.py",
    "harness/metrics/torchmetrics_private.py",
    "harness/strategies/deepspeed_private.py",
    "harness/support/lightning_private.py",
    "harness/support/torch_private.py",
}
NOT_PRIVATE = {"_exit", "_replace", "_target_"}  # of os, of named tuples, and in configs


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Names that functions, classes, assignments and fields give."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def test_private_parts_of_objects_of_libraries_are_in_the_list_of_their_library() -> None:
    """An underscored attribute that nothing in the package defines is that of somebody else's object."""
    listed = {name for names in lightning_private.INHERITED.values() for name in names}
    own = set().union(*map(defined, TREES.values())) | NOT_PRIVATE | listed
    found = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own and file not in LISTS
    ]
    assert not found


def test_private_parts_that_subclasses_share_with_a_library_are_in_a_list() -> None:
    """Attributes of ``self`` that a class of the package uses or defines, and a base class of a library has as well."""
    known = {*lightning_private.NAMES, *lightning_private.OVERRIDDEN, *torch_private.OVERRIDDEN}
    found, seen = [], 0
    for file, tree in TREES.items():
        if file.endswith("__main__.py"):
            continue
        module = importlib.import_module(file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            cls = getattr(module, node.name, None)
            bases = [each for each in getattr(cls, "__mro__", ()) if not each.__module__.startswith("harness")]
            theirs = {name for each in bases for name in _private_parts(each)}
            used = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and _is_of_self(each.value)}
            used |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            listed = {name for each in bases for name in lightning_private.INHERITED.get(each.__name__, ())}
            seen += bool(theirs & used)
            found += [f"{file}: {node.name}.{name}" for name in sorted((theirs & used) - listed - known)]
    assert not found
    assert seen  # the loggers


def _is_of_self(value: ast.expr) -> bool:
    is_super = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
    return is_super or (isinstance(value, ast.Name) and value.id == "self")


@functools.cache
def _private_parts(cls: type) -> frozenset[str]:
    """Underscored names of a class's own, and of the attributes that its methods give to ``self``."""
    if cls.__module__ in ("builtins", "typing", "abc"):
        return frozenset()
    names = {name for name in vars(cls) if is_private(name) and not name.startswith("_abc_")}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset(names)
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return frozenset(names | {node.attr for node in stored if is_private(node.attr) and _is_of_self(node.value)})


def test_attributes_that_loggers_inherit_are_lightnings() -> None:
    for name, attributes in lightning_private.INHERITED.items():
        base = getattr(lightning.pytorch.loggers, name)
        assert set(attributes) <= {part for each in base.__mro__ for part in _private_parts(each)}, name


def test_functions_that_are_looked_for_on_the_stack_are_lightnings() -> None:
    from lightning.pytorch.trainer import call

    assert all(callable(getattr(call, name)) for name in lightning_private.ON_THE_STACK)
