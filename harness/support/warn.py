"""Warnings: given (:func:`warn`), given once (:class:`OneWarning`), filtered (:func:`quieten`); and who warns."""

from __future__ import annotations

import logging
import threading
import warnings
from contextlib import suppress
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

__all__ = ["OneWarning", "is_rank_zero", "quieten", "settle_rank", "warn"]


def is_rank_zero() -> bool:
    """True on the rank that writes files and logs."""
    return getattr(rank_zero_only, "rank", 0) == 0


def warn(text: str) -> None:
    """Warn of what must not stop a training, not even where warnings are errors."""
    with suppress(Warning):
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def settle_rank(rank: int) -> None:
    """Let Lightning's messages of rank 0 be those of this rank 0, before Lightning knows the ranks itself."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]


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
        warn(text)


def quieten() -> None:
    """Leave out warnings that libraries give at every start and no user of ``harness-train`` can act on."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # of the strides of dimensions of size 1, which mean nothing
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # of a run that goes on in another directory, and of averaged weights that it adds or leaves out: told in our words
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message=".*Please add the following callbacks")
    warnings.filterwarnings("ignore", message="The checkpoint was not created with WeightAveraging")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of Optuna
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    warnings.formatwarning = _formatted


_FORMAT = warnings.formatwarning
_PACKAGE = Path(__file__).parents[1]


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Warnings of this package without the line of code that they come from, which is of no use to a user."""
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _FORMAT(message, category, filename, lineno, line)
