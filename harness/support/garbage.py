"""The garbage collector, out of the way while a process starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["importing", "without_collections"]


@contextmanager
def without_collections() -> Iterator[None]:
    """Leave out collections, which would go through all that has been imported, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Import what stays as long as the process: without collections, and out of all later ones (:func:`gc.freeze`).

    Nothing may be garbage yet that holds memory, since it would stay, too.
    """
    with without_collections():
        yield
        gc.freeze()
