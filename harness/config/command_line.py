"""Hydra's command line: the configuration is composed, and the job is called with it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import hydra
from omegaconf import DictConfig

from harness.config.explain import explain
from harness.config.resolvers import config_folder
from harness.runs import Session, current_session

__all__ = ["ConfigError", "run_with_hydra"]


class ConfigError(Exception):
    """The configuration that the command line asks for cannot be composed.

    Args:
        message: why, for the user.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_with_hydra(job: Callable[[DictConfig], Any]) -> None:
    """Compose the configuration of the command line, and call the job with it, or for each point of a sweep.

    Raises:
        ConfigError: it cannot be composed, by what Hydra, its sweeper or its launcher finds.
        SystemExit: the job has ended with an exit code.
    """
    session = current_session()
    held = io.StringIO()
    try:
        with redirect_stderr(_HeldStderr(held, session)):
            hydra.main(version_base="1.3", config_path=config_folder(), config_name="train")(job)()
    except SystemExit as error:
        if error.code not in (None, 0) and not session.has_composed:
            raise ConfigError(explain(held.getvalue()), error.code if isinstance(error.code, int) else 1) from None
        if error.code in (None, 0):  # --help and the like
            sys.stderr.write(held.getvalue())
        raise
    sys.stderr.write(held.getvalue())  # of a sweep whose points run in other processes


class _HeldStderr(io.TextIOBase):
    """Buffer for standard error until the job is called, so that one rank reports Hydra's error.

    Hydra reports a wrong configuration by itself and exits, on every rank, and argparse does so with wrong options; one
    rank is to report it, with an explanation. Handlers of logging keep the stream, so that it must go on when the job
    runs.
    """

    def __init__(self, held: io.StringIO, session: Session) -> None:
        self._held, self._session, self._stderr = held, session, sys.stderr

    def write(self, text: str) -> int:
        return (self._stderr if self._session.has_composed else self._held).write(text)

    def flush(self) -> None:
        self._stderr.flush()

    def isatty(self) -> bool:
        return self._stderr.isatty()

    def fileno(self) -> int:
        return self._stderr.fileno()
