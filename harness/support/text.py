"""Text for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "one_line", "reason", "some"]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """``Did you mean forces_mse? `` for a name that is close to one of the valid ones, or part of it; else no text."""
    name, names = str(name), list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)  # stress_mse is no misspelt forces_mse
    close = close or [candidate for candidate in names if len(name) > 2 and name in candidate]
    return f"Did you mean {close[0]}? " if close else ""


def reason(error: BaseException) -> str:
    """Words of an error; of an assertion, and of an error without words, the file and line that raised it too."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or (text and not isinstance(error, AssertionError)):
        return text
    kind = "an assertion" if isinstance(error, AssertionError) else type(error).__name__
    place = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}"
    return f"{text} ({kind} in {place})" if text else f"{kind} without words in {place}"


def one_line(error: BaseException) -> str:
    """An error as part of a warning."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def some(names: Iterable[str], limit: int = 6, more: str = "more") -> str:
    """The first few different names of a list, and the number of the others: ``a, b and 3 more``."""
    listed = list(dict.fromkeys(names))
    rest = f" and {len(listed) - limit} {more}" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
