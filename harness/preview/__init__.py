"""Coefficients of a training before it is started: a table and a picture over the epochs."""

from __future__ import annotations

from collections.abc import Sequence

from harness.support.start import run_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m harness.preview``, see :func:`harness.preview.command.main`.

    Args:
        arguments: of the command line; those of the process if not given.
    """
    run_command("harness.preview.command", arguments)
