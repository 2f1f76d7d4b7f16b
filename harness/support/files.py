"""Files that a training can do without: pictures and tables, for which no full disk may end it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["is_written"]


def is_written(path: Path, write: Callable[[Path], None]) -> bool:
    """Whether ``write(path)`` has worked, in a folder that is made for it; if not, a warning says why.

    One rank writes while the others go on to their next collective: an error there would leave them waiting.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        rank_zero_warn(f"{path} cannot be written ({error}); the training goes on without it.")
        return False
    return True
