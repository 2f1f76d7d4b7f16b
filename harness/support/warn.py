"""Warnings of which only the first counts, and the rank that gives them."""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress

from lightning.fabric.utilities.rank_zero import rank_zero_only

__all__ = ["OneWarning", "is_rank_zero"]


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
