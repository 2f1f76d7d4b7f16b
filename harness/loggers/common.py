"""What both loggers need: who writes, and one warning."""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress

from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = ["OneWarning", "is_rank_zero", "one_line"]


def is_rank_zero() -> bool:
    """Whether this process writes."""
    return getattr(rank_zero_only, "rank", 0) == 0


class OneWarning:
    """Says the first thing that goes wrong, and is silent about all that follows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.said: str | None = None

    def __call__(self, text: str) -> None:
        """Say it, if nothing has been said."""
        with self._lock:
            if self.said is not None:
                return
            self.said = text
        with suppress(Warning):  # where warnings are errors, this one must not stop the training either
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def one_line(error: BaseException) -> str:
    """An error as part of a warning."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
