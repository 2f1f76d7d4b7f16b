"""Trained models as files of other packages: of MACE, NequIP and SevenNet, and plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

from harness.support.start import run_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``harness-export``, see :func:`harness.export.command.main`.

    Args:
        arguments: of the command line; those of the process if not given.
    """
    run_command("harness.export.command", arguments)
