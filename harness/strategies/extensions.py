"""Locks of compiled extensions that an ended process has left: torch would wait for them without an end or a word."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from harness.support.warn import warn

__all__ = ["extension_folders", "is_held", "remove_abandoned_locks"]

MINUTES = 10
"""Age at which a lock that no process of this machine holds counts as abandoned on shared file systems too."""


def extension_folders() -> list[Path]:
    """Folders in which torch compiles and keeps extensions: one for each of them."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [folder for pattern in ("*", "*/*") for folder in root.glob(pattern) if folder.is_dir()]


def is_held(path: Path) -> bool | None:
    """Tell if a process of this machine has a file open; None where the system does not say (no ``/proc``)."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").exists():
        return None
    wanted = path.stat()
    for descriptor in processes.glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the process ended, or belongs to somebody else
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def remove_abandoned_locks(seconds: float = 60 * MINUTES) -> list[Path]:
    """Remove locks that a killed process has left where it compiled an extension, and warn of younger ones.

    torch makes a file ``lock`` while it compiles, and the next process waits until it is gone. Where the first one
    was killed, it never is: DeepSpeed then stands still before its first message, in every later training.

    Args:
        seconds: age of a lock that counts as abandoned if no process of this machine holds it. A process of another
            machine may compile in the same folder; one that does takes less than this.

    Returns:
        The files that were removed.
    """
    removed = []
    for folder in extension_folders():
        lock = folder / "lock"
        with suppress(FileNotFoundError):  # released meanwhile
            age = time.time() - lock.stat().st_mtime
            if is_held(lock) is not False:
                continue
            if age < seconds:
                warn(
                    f"An extension is being compiled in {folder} by a process of another machine, or one was killed "
                    f"there {age:.0f} s ago. The training waits for it. If nothing is compiled, remove {lock}."
                )
                continue
            lock.unlink()
            warn(f"Removed {lock}, which a process that was killed left {age / 60:.0f} min ago.")
            removed.append(lock)
    return removed
