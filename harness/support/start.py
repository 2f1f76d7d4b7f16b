"""Start of a command whose package is imported once it is certain which process it is in."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from harness.support.deferred import defer
from harness.support.garbage import importing

__all__ = ["run_command"]


def run_command(module: str, arguments: Sequence[str] | None) -> None:
    """Import the module of a command and call its ``main``.

    Without arguments the process belongs to the command: modules that libraries import and it does not use are put off
    (:func:`~harness.support.deferred.defer`). A program of your own, which calls it with arguments, is left alone.

    Args:
        module: its name.
        arguments: of the command line; those of the process if None.
    """
    if arguments is None:
        defer()
        with importing():
            command = import_module(module)
    else:
        command = import_module(module)
    command.main(arguments)
