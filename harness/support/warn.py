"""Warnings of which only the first counts, and the rank that gives them."""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress

from lightning.fabric.utilities.rank_zero import rank_zero_only

__all__ = ["OneWarning", "is_rank_zero"]


def is_rank_zero() -> bool:
    """True on the rank that writes files and logs."""
    return getattr(rank_zero_only, "rank", 0) == 0


class OneWarning:
    """Warns of the first thing that goes wrong; later calls do nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.text: str | None = None
        """The warning that has been given."""

    def __call__(self, text: str) -> None:
        """Give a warning, if it is the first."""
        with self._lock:
            if self.text is not None:
                return
            self.text = text
        with suppress(Warning):  # where warnings are errors, this one must not stop the training either
            warnings.warn(text, RuntimeWarning, stacklevel=2)
