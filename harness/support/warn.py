"""Warnings: given (:func:`warn`), given once (:class:`OneWarning`), filtered (:func:`quieten`); and who warns."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["OneWarning", "is_rank_zero", "own_handlers", "quieten", "settle_rank", "warn"]


def is_rank_zero() -> bool:
    """True on the rank that writes files and logs: Lightning's, or the launcher's before Lightning is there."""
    lightning: Any = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if lightning is None:
        return int(os.environ.get("RANK", "0")) == 0
    return getattr(lightning.rank_zero_only, "rank", 0) == 0


def warn(text: str) -> None:
    """Warn of what must not stop a training, not even where warnings are errors."""
    with suppress(Warning):
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def settle_rank(rank: int) -> None:
    """Let Lightning's messages of rank 0 be those of this rank 0, before Lightning knows the ranks itself."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # here: it takes a second

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


@contextmanager
def own_handlers() -> Iterator[None]:
    """Import libraries as if nobody had set up logging: Lightning then shows its messages itself, as they are.

    It looks when it is imported, and else leaves them to the handlers of the root logger, which are Hydra's.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:0] = handlers


_FORMAT = warnings.formatwarning
_PACKAGE = Path(__file__).parents[1]


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Warnings of this package without the line of code that they come from, which is of no use to a user."""
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _FORMAT(message, category, filename, lineno, line)
