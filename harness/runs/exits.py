"""Exits of a run, with their exit codes: failed (1), requeue (75), interrupted (130)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from hydra.errors import CompactHydraException

__all__ = [
    "REQUEUE_EXIT_CODE",
    "Interrupted",
    "JobFailed",
    "PointFailedError",
    "Preempted",
    "keyboard_interrupts",
]

REQUEUE_EXIT_CODE = 75
"""Exit code of a rank that was preempted and can go on later: EX_TEMPFAIL of sysexits.h, "try again"."""


class _Exit(SystemExit):
    """End of the process with a code of its own and a message, unless somebody catches it."""

    exit_code: ClassVar[int]

    def __init__(self, message: str) -> None:
        super().__init__(self.exit_code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class JobFailed(_Exit):
    """The job has failed and has reported why; the process exits with 1 unless somebody catches it."""

    exit_code = 1


class Preempted(_Exit):
    """The training was asked to stop and has saved its state; the same command continues it.

    The process exits with :data:`REQUEUE_EXIT_CODE` unless somebody catches it.
    """

    exit_code = REQUEUE_EXIT_CODE


class Interrupted(_Exit):
    """The user has pressed Ctrl-C; the process exits with 130, as shells have it."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted (Ctrl-C)")


class PointFailedError(CompactHydraException):
    """A sweep point has failed; Hydra shows the message without a traceback."""


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Raise :class:`Interrupted` for Ctrl-C; Lightning turns it into an exit that looks like that of an error."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise Interrupted from None
        raise
