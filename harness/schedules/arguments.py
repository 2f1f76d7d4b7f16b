"""Arguments of schedules: coefficients, epochs and settings of the optimizer as users give them, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from harness.support.checks import is_number

__all__ = [
    "Coefficients",
    "Frozen",
    "check_same_names",
    "number_of",
    "read_coefficients",
    "read_epoch",
    "read_optimizer_settings",
    "union",
]

Coefficients = Mapping[str, Any]
"""Coefficients by component, or by component and atom type; a schedule that is made has numbers by flat name."""

Key = TypeVar("Key")
Value = TypeVar("Value")


class Frozen(Mapping[Key, Value], Generic[Key, Value]):
    """Mapping that cannot be changed; its text, as its equality, does not depend on the order of its keys."""

    def __init__(self, content: Mapping[Key, Value]) -> None:
        self._content = dict(content)

    def __getitem__(self, key: Key) -> Value:
        return self._content[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(frozenset(self._content.items()))

    def __repr__(self) -> str:
        return repr(dict(sorted(self._content.items())))  # keys are all text or all numbers


def read_coefficients(coeffs: object, what: str, may_be_empty: bool = False) -> Frozen[str, float]:
    """Coefficients by flat name, checked.

    Raises:
        TypeError, ValueError: the name, what was found and what is valid.
    """
    if not isinstance(coeffs, Mapping):
        raise TypeError(f"{what} maps components to coefficients, found {coeffs!r} ({type(coeffs).__name__}).")
    if not coeffs and not may_be_empty:
        raise ValueError(f"{what} names no component. Constant({{}}) is what changes nothing.")
    flat: dict[str, float] = {}
    for component, given in coeffs.items():
        _check_key(component, f"{what}: the name of a component")
        if not isinstance(given, Mapping):
            entries = {component: given}
        else:
            if not given:
                raise ValueError(f"{what}: {component} maps atom types to weights, found none.")
            for type_name in given:
                _check_key(type_name, f"{what}: the name of an atom type of {component}")
            entries = {f"{component}_{type_name}": weight for type_name, weight in given.items()}
        for name, value in entries.items():
            if name in flat:
                raise ValueError(f"{what} sets {name} twice. Per-type weights go by {{component}}_{{type}}.")
            flat[name] = _coefficient(value, f"{what}: {name}")
    return Frozen(flat)


def read_optimizer_settings(settings: object) -> Frozen[str, Any]:
    """Settings of an optimizer: numbers, booleans, or tuples of numbers by name, checked.

    Raises:
        TypeError, ValueError: the name, what was found and what is valid.
    """
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"Stage: `optimizer` maps names of settings to values, such as {{lr: 1e-3}}, found {settings!r}."
        )
    read: dict[str, Any] = {}
    for name, value in settings.items():
        _check_key(name, "Stage: `optimizer`: the name of a setting")
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not all(isinstance(each, bool) or is_number(each) for each in (value if is_list else [value])):
            raise TypeError(
                f"Stage: `optimizer`: {name} is a number, true or false, or a list of numbers, found {value!r} "
                f"({type(value).__name__})."
            )
        if name == "lr" and (isinstance(value, bool) or is_list or not 0 <= float(value) < math.inf):
            raise ValueError(f"Stage: `optimizer`: lr is a finite number of at least 0, found {value!r}.")
        read[name] = tuple(value) if is_list else value
    return Frozen(read)


def _check_key(key: object, what: str) -> None:
    if not isinstance(key, str) or not key:
        hint = " (YAML reads an unquoted No, Y or N as a boolean: quote it)" if isinstance(key, bool) else ""
        raise TypeError(f"{what} is text, found {key!r}{hint}.")


def _coefficient(value: object, what: str) -> float:
    if value is None:
        raise TypeError(f"{what} is null; expected a number. 0 keeps the component in the sum, without weight.")
    if not is_number(value):
        raise TypeError(f"{what} is a number, found {value!r} ({type(value).__name__}).")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what} must be finite and not negative, found {value}.")
    return abs(float(value))  # -0.0 is 0


def read_epoch(value: object, what: str) -> float:
    """A number of epochs, finite and at least 0.

    Raises:
        TypeError, ValueError: what was found and what is valid.
    """
    if not is_number(value):
        raise TypeError(f"{what} is a number of epochs, found {value!r} ({type(value).__name__}).")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what} is a finite number of epochs, at least 0, found {value}.")
    return abs(float(value))  # -0.0 is 0


def number_of(key: object) -> object:
    """A number for text that is one, as keys in YAML may be; everything else as it is."""
    if isinstance(key, str):
        try:
            return float(key)
        except ValueError:
            return key
    return key


def check_same_names(what: str, **two: Coefficients) -> None:
    """Refuse two sets of coefficients, given by the names of their arguments, that name different components.

    Raises:
        ValueError: with the names that only one of them has.
    """
    (one, first), (other, second) = two.items()
    differ = [name for name in union((first, second)) if (name in first) != (name in second)]
    if differ:
        raise ValueError(
            f"{what}: `{one}` and `{other}` must name the same components; {', '.join(differ)} is in one of them only. "
            f"`{one}`: {', '.join(first)}; `{other}`: {', '.join(second)}."
        )


def union(several: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All names in order, without repetitions."""
    return tuple(dict.fromkeys(name for names in several for name in names))
