"""Checks of arguments: numbers, which booleans are not although Python counts them among the integers."""

from __future__ import annotations

from numbers import Real
from typing import Any, TypeGuard

__all__ = ["is_number", "is_whole_number", "whole_number"]


def is_number(value: Any) -> TypeGuard[float]:
    """True for a real number that is no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole_number(value: Any) -> TypeGuard[int]:
    """True for an integer that is no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(name: str, value: Any, least: int = 1, error: type[Exception] = ValueError) -> int:
    """The value, if it is a whole number that is large enough.

    Args:
        name: of the argument, for the message.
        value: anything.
        least: smallest valid number.
        error: class of the exception.

    Raises:
        ValueError: or ``error``, with what was found and expected.
    """
    if not is_whole_number(value) or value < least:
        raise error(f"{name} is a whole number, at least {least}, found {value!r}.")
    return value
