"""Ends of processes: with the process that has started them, and with a message about a mistake."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["PARENT", "end_with_parent", "mistakes_reported"]

PARENT = "HARNESS_PARENT"
"""Environment variable with the process id of the parent, which it sets for children that are to end with it."""


def end_with_parent(number: signal.Signals) -> bool:
    """Let the kernel send a signal to this process when its parent ends, even by SIGKILL; on Linux alone.

    The variable :data:`PARENT` is taken out of the environment: children of this process have another parent. Exits
    with 1 if the parent has ended before this call.

    Args:
        number: the signal.

    Returns:
        True if the parent has asked for it.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return False
    with suppress(OSError, AttributeError, TypeError):  # there is no such call but on Linux
        ctypes.CDLL(None, use_errno=True).prctl(1, number.value, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit(1)
    return True


@contextmanager
def mistakes_reported() -> Iterator[None]:
    """End a command with exit code 1 and one line on standard error where a mistake of its user is raised.

    Mistakes are ``ValueError``, ``OSError`` and ``ModuleNotFoundError``; all else is an error of the program.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
