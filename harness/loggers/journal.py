"""Rows on disk from the moment they are logged: a kill takes with it what W&B holds in memory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.loggers.media import Media
from harness.support.files import replacing

__all__ = ["Journal", "rows_in"]

_open: set[Path] = set()
"""Journals that are written by this process."""


class Journal:
    """A file with a line for each row: its values, and its step.

    It begins with the rows of the one before it whose steps are less than ``step``; those without a step are logged by
    each start. Several threads may write. A disk that cannot be written is no error: the first is kept in ``error``.

    Args:
        path: the file, in a folder that is made if it is missing.
        step: of the checkpoint that the job goes on from; None keeps nothing.
    """

    def __init__(self, path: Path, step: int | None) -> None:
        self.path = path.absolute()
        self.error: OSError | None = None
        self.goes_on = False
        """True if there was one, of a job that had not come to its end."""
        self.kept: list[bytes] = []
        """Lines of the one before it."""
        self._file: int | None = None
        self._torn = False
        self._lock = threading.RLock()  # a signal's handler may log while a row is written
        if self.path in _open:  # another logger's of this process, in the same folder
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.goes_on = path.is_file()
            if self.goes_on and step is not None:
                self.kept = [line for line in path.read_bytes().splitlines(keepends=True) if _is_before(line, step)]
            with replacing(path) as part:
                part.write_bytes(b"".join(self.kept))
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            _open.add(self.path)
        except OSError as error:
            self.error = error

    def write(self, row: Mapping[str, Any], step: int | None) -> bool:
        """Write a row, unless the disk cannot be written.

        Returns:
            False if a value is no number, no text and no media that JSON can hold.
        """
        if not all(isinstance(value, int | float | str | Media) for value in row.values()):
            return False
        try:
            line = f"{json.dumps([row, step], default=_described)}\n".encode()
        except (TypeError, ValueError):
            return False
        with self._lock:
            if self._file is not None:
                try:
                    line = b"\n" + line if self._torn else line
                    self._torn = True
                    self._torn = os.write(self._file, line) < len(line)
                except OSError as error:
                    self.error = self.error or error
        return True

    def close(self) -> None:
        """Close the file; later rows are ignored."""
        with self._lock:
            if self._file is not None:
                file, self._file = self._file, None
                _open.discard(self.path)
                with suppress(OSError):
                    os.close(file)

    def remove(self) -> None:
        """Close and remove the file, all rows of which are in the run."""
        is_own = self._file is not None
        self.close()
        if is_own:
            self.path.unlink()


def rows_in(lines: Iterable[bytes]) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Rows and steps in lines of a journal, without lines that were torn."""
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError):
            row, step = json.loads(line)
            yield {key: Media(**value) if isinstance(value, dict) else value for key, value in row.items()}, step


def _is_before(line: bytes, step: int) -> bool:
    """True for a whole line of an earlier step; its row is not decoded, since there may be many."""
    try:
        return line.endswith(b"]\n") and float(line[:-2].rpartition(b", ")[2]) < step
    except ValueError:
        return False


def _described(value: Any) -> dict[str, Any]:
    if not isinstance(value, Media):
        raise TypeError(f"{type(value).__name__} is not for JSON")
    return {"kind": value.kind, "arguments": value.arguments}
