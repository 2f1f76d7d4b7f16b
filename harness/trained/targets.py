"""Builders that the record of a checkpoint names: those of this package are called, others where the caller says so.

What a checkpoint names is imported and called with arguments of its choice, and it may be somebody else's. So it is
checked first: the path, before anything is imported for it, and then the place where the callable is defined, since a
module shows whatever it has imported (``my_models.os.system``).
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from harness.support.guest import guest

__all__ = ["TARGET", "Trust", "check_targets", "trusted_prefixes"]

TARGET = "_target_"
"""Key of the dotted path of a callable."""
Trust = str | Sequence[str]
"""Beginnings of dotted paths, whole names of packages, modules or callables: ``my_models`` or ``[my_models.pair]``."""

_BUILDERS = "harness.models"
_LAYERS = ("torch.nn", "nequip", "allegro")
"""Packages whose modules (``torch.nn.Module``) may be parts of a model."""
_FUNCTIONS = ("nequip.nn", "allegro.nn")
"""Packages whose functions that make a module may be called for a part of a model."""


def trusted_prefixes(trust: Trust) -> tuple[str, ...]:
    """The prefixes that a caller allows.

    Raises:
        TypeError: they are no strings.
        ValueError: one of them is no dotted name.
    """
    prefixes = (trust,) if isinstance(trust, str) else tuple(trust) if isinstance(trust, list | tuple | set) else None
    if prefixes is None or not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(
            f"trust is a name or a list of names of packages or modules, such as ['my_models'], not {trust!r}"
        )
    for prefix in prefixes:
        if not all(part.isidentifier() for part in prefix.split(".")):
            raise ValueError(f"trust names packages or modules, such as my_models or my_models.pair, found {prefix!r}")
    return prefixes


def check_targets(architecture: Mapping[str, Any], trust: Trust, path: Path) -> None:
    """Refuse an architecture that names callables which are neither models of this package nor trusted.

    Args:
        architecture: section of a config, with nested ones.
        trust: by the caller.
        path: of the checkpoint, for messages.

    Raises:
        ValueError: it has no target, one that is not allowed, or an interpolation.
        ModuleNotFoundError: a package that is allowed is not installed.
    """
    prefixes = trusted_prefixes(trust)
    if not isinstance(architecture.get(TARGET), str):
        raise ValueError(f"{path}: the record of its model has no {TARGET}, the builder of the model.")
    for name, value in _strings(architecture):
        if "${" in value:
            raise ValueError(
                f"{path}: model.{name} has an interpolation, {value!r}, which no record of a training has."
            )
        if name.rpartition(".")[2] == TARGET:
            _check(value, name == TARGET, prefixes, path)
    shifts = architecture.get("energy_shifts")
    if isinstance(shifts, str) and shifts != "fit" and architecture[TARGET].startswith(f"{_BUILDERS}."):
        raise ValueError(
            f"{path}: model.energy_shifts names a file, {shifts!r}, expected numbers. Give the energies in eV: "
            f"energy_shifts={{symbol: eV, ...}}"
        )


def _check(target: str, is_model: bool, prefixes: tuple[str, ...], path: Path) -> None:
    allowed = [prefix for prefix in (*prefixes, _BUILDERS, *(() if is_model else _LAYERS)) if _within(target, prefix)]
    if not allowed:
        raise ValueError(
            f"{path} names {target} as {'the builder' if is_model else 'a part'} of its model, which is none of this "
            f"package: nothing was imported or called. Loading would import {target.rpartition('.')[0] or target} and "
            f"call {target} with arguments of the file. If you trust it, allow it: "
            f"trust=[{target.partition('.')[0]!r}], or more narrowly trust=[{target!r}]."
        )
    found = _resolved(target, path)
    if any(_within(_defined(found), prefix) for prefix in prefixes):
        return
    if _within(_defined(found), _BUILDERS) and _makes_module(found):
        return
    is_layer = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_model and is_layer and any(_within(_defined(found), layers) for layers in _LAYERS):
        return
    if not is_model and any(_within(_defined(found), place) for place in _FUNCTIONS) and _makes_module(found):
        return
    trusted = [prefix for prefix in allowed if prefix in prefixes]
    raise ValueError(
        f"{path} names {target} as {'the builder' if is_model else 'a part'} of its model. "
        + (
            f"trust={trusted} allows that name, but it is {_defined(found)}, which is defined elsewhere. If you trust "
            f"that too, allow both."
            if trusted
            else f"It is {_defined(found)}, which makes no model: it was not called."
        )
    )


def _resolved(target: str, path: Path) -> Any:
    """The object behind a dotted path whose beginning is allowed."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            with guest():
                found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and _within(module, error.name) and length > 1:
                continue  # an attribute, perhaps
            raise ModuleNotFoundError(
                f"{path}: its model is made by {target}, but {error.name} cannot be imported. Install it, or put the "
                f"folder that it is in on PYTHONPATH.",
                name=error.name,
            ) from error
        for part in parts[length:]:
            if not hasattr(found, part):
                raise ValueError(f"{path}: its model is made by {target}, but {module} has no {part}: another version?")
            found = getattr(found, part)
        return found
    raise ValueError(f"{path}: {target!r} is no dotted path of a builder.")


def _defined(found: Any) -> str:
    """Dotted path of the place where a class or function is defined."""
    return f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', repr(found))}"


def _makes_module(found: Callable[..., Any]) -> bool:
    made: Any = found
    if inspect.isfunction(found):
        made = typing.get_type_hints(found).get("return")
    return isinstance(made, type) and issubclass(made, nn.Module)


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All strings at any depth by dotted name; targets of any kind are among them."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{name}.{key}" if name else str(key)
            yield from [(inner, str(item))] if key == TARGET else _strings(item, inner)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _strings(item, f"{name}.{index}")
