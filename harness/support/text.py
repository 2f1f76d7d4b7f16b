"""Text for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "one_line"]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``Did you mean forces_mse? `` for a name that is close to one of the valid ones, or part of it; else no text."""
    name, names = str(name), list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)  # stress_mse is no misspelt forces_mse
    close = close or [candidate for candidate in names if len(name) > 2 and name in candidate]
    return f"Did you mean {close[0]}? " if close else ""


def one_line(error: BaseException) -> str:
    """An error as part of a warning."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
