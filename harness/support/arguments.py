"""Arguments of a callable beside its annotations: values that a config gives and the callable cannot take.

``Annotated`` adds what a number or a text must be: ``num_layers: Count`` is a whole number, at least 1. Annotations
that say nothing of plain values, such as classes and protocols, are left alone.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

from harness.support.checks import is_number, is_whole_number

__all__ = [
    "Above",
    "AtLeast",
    "AtMost",
    "Below",
    "Count",
    "OneOf",
    "Order",
    "Positive",
    "WeightsDtype",
    "misfits",
    "type_hints",
]


@dataclass(frozen=True)
class AtLeast:
    """Smallest valid number."""

    least: float

    def __call__(self, value: Any) -> bool:
        """True for a valid number."""
        return bool(value >= self.least)

    def __str__(self) -> str:
        return f", at least {self.least:g}"


@dataclass(frozen=True)
class Above:
    """Number that a valid one is larger than."""

    bound: float

    def __call__(self, value: Any) -> bool:
        """True for a valid number."""
        return bool(value > self.bound)

    def __str__(self) -> str:
        return f" above {self.bound:g}"


@dataclass(frozen=True)
class AtMost:
    """Largest valid number."""

    most: float

    def __call__(self, value: Any) -> bool:
        """True for a valid number."""
        return bool(value <= self.most)

    def __str__(self) -> str:
        return f", at most {self.most:g}"


@dataclass(frozen=True)
class Below:
    """Number that a valid one is smaller than."""

    bound: float

    def __call__(self, value: Any) -> bool:
        """True for a valid number."""
        return bool(value < self.bound)

    def __str__(self) -> str:
        return f", below {self.bound:g}"


class OneOf:
    """Valid texts.

    Args:
        values: all of them.
    """

    def __init__(self, *values: str) -> None:
        self.values = values

    def __call__(self, value: Any) -> bool:
        """True for a valid text."""
        return value in self.values

    def __str__(self) -> str:
        return f": {', '.join(self.values[:-1])} or {self.values[-1]}"


Count = Annotated[int, AtLeast(1)]
"""A whole number, at least 1."""
Order = Annotated[int, AtLeast(0)]
"""A whole number, at least 0."""
Positive = Annotated[float, Above(0)]
"""A number above 0."""
WeightsDtype = Annotated[str, OneOf("float32", "float64")]
"""Name of a dtype of weights."""

_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", is_whole_number),
    float: ("a finite number", lambda value: is_number(value) and math.isfinite(value)),
    str: ("a text", lambda value: isinstance(value, str)),
    NoneType: ("null", lambda value: value is None),
    None: ("null", lambda value: value is None),
}


def misfits(
    called: Callable[..., Any], arguments: Mapping[str, Any], section: str, known: Mapping[str, Any] | None = None
) -> list[str]:
    """A sentence for each argument that is none of its annotation, with what was found and expected.

    Args:
        called: with annotations.
        arguments: by name, plain values of a config.
        section: of the config, for the name of the setting.
        known: annotations by name that hold in the place of those of ``called``.
    """
    hints = {**type_hints(called), **(known or {})}
    return [
        f"{section}.{name} is {_words(hints[name])}, found {value!r}."
        for name, value in arguments.items()
        if name in hints and _fits(value, hints[name]) is False
    ]


def type_hints(called: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function, or of the constructor of a class, as objects where they can be resolved."""
    owner = called.__init__ if isinstance(called, type) else called  # type: ignore[misc]
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except Exception:  # of names that are there for type checkers alone
        return dict(getattr(owner, "__annotations__", {}))


def _fits(value: Any, hint: Any) -> bool | None:
    """True for a value of an annotation; None if the annotation says nothing of plain values."""
    if hint in _PLAIN:
        return _PLAIN[hint][1](value)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _fits(value, inner[0])
        return found and all(check(value) for check in inner[1:] if callable(check))
    if origin is Literal:
        return value in inner
    if origin in (typing.Union, UnionType):
        return _any(_fits(value, member) for member in inner)
    if origin in (list, Sequence) or (origin is tuple and inner[-1:] == (...,)):
        return isinstance(value, list | tuple) and _all(_fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and _all(_fits(item, inner[1]) for item in value.values())
    if isinstance(hint, type) and hint.__module__.partition(".")[0] == "torch":  # no text or list of a config
        return isinstance(value, hint)
    return None


def _any(found: typing.Iterable[bool | None]) -> bool | None:
    seen = set(found)
    return True if True in seen else None if None in seen else False


def _all(found: typing.Iterable[bool | None]) -> bool | None:
    seen = set(found)
    return False if False in seen else None if None in seen else True


def _words(hint: Any) -> str:
    """Words for the values of an annotation."""
    if hint in _PLAIN:
        return _PLAIN[hint][0]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = _words(inner[0]).replace("a finite number", "a number")
        return number + "".join(str(check) for check in inner[1:] if callable(check))
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (typing.Union, UnionType):
        members = sorted(inner, key=lambda member: member in (None, NoneType))
        return " or ".join(filter(None, map(_words, members)))
    if origin in (list, tuple, Sequence):
        return f"a list of which each entry is {_words(inner[0])}"
    if origin in (dict, Mapping):
        return f"a mapping in which each value is {_words(inner[1])}"
    return ""
