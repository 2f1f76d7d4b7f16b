"""Packages whose names are imported when they are asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["names_of"]


def names_of(package: str, places: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that imports a name when it is asked for.

    The package lists its names in ``__all__``, and imports them under ``TYPE_CHECKING`` for readers of types.

    Args:
        package: its ``__name__``.
        places: names by the module that defines them.
    """
    place_of = {name: module for module, names in places.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in place_of:
            public = ", ".join(sys.modules[package].__all__)
            raise AttributeError(f"module {package!r} has no attribute {name!r}. Public names: {public}.")
        found = getattr(importlib.import_module(place_of[name]), name)
        setattr(sys.modules[package], name, found)
        return found

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *place_of})

    return __getattr__, __dir__
