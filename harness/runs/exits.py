"""Exits of a run: requeue, interrupted, failed, with their exit codes."""

from __future__ import annotations

from hydra.errors import CompactHydraException

__all__ = ["REQUEUE_EXIT_CODE", "Interrupted", "JobFailed", "PointFailedError", "Preempted"]


class JobFailed(SystemExit):
    """A job has failed and has said why; the process exits with 1 unless somebody catches it."""

    def __init__(self, message: str) -> None:
        super().__init__(1)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupted(SystemExit):
    """Somebody has pressed Ctrl-C; the process exits with 130, as shells have it."""

    def __init__(self) -> None:
        super().__init__(130)

    def __str__(self) -> str:
        return "interrupted (Ctrl-C)"


class PointFailedError(CompactHydraException):
    """A point of a sweep has failed; Hydra shows the message without a traceback."""


REQUEUE_EXIT_CODE = 75
"""Exit code of a rank that was told to leave and can go on later: EX_TEMPFAIL of sysexits.h, "try again"."""


class Preempted(SystemExit):
    """The training was told to leave and has saved where it is; the same command continues it.

    The process exits with :data:`REQUEUE_EXIT_CODE` unless somebody catches it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(REQUEUE_EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message
