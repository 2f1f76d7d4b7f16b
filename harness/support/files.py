"""Files that readers see whole or not at all, and files that a training can do without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replacing", "try_write", "write_text_whole"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Path of a file beside ``path``, which takes its place when the block ends; after an error it is removed.

    Readers find the old file or the new one at any time, also where this process is killed.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file that readers see whole or not at all."""
    with replacing(path) as part:
        part.write_text(text)


def try_write(path: Path, write: Callable[[Path], None]) -> bool:
    """Call ``write(path)`` in a folder that is made for it; a warning replaces an ``OSError``.

    One rank writes while the others go on to their next collective: an error there would leave them waiting.

    Returns:
        True if the file has been written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        from lightning.pytorch.utilities import rank_zero_warn  # here: what only reads and writes does without

        with suppress(Warning):  # where warnings are errors, this one must not stop the training either
            rank_zero_warn(f"{path} cannot be written ({error}); the training goes on without it.")
        return False
    return True
