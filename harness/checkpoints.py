"""Checkpoint files that a kill, a full disk or a flipped bit cannot turn into a lost training."""

from __future__ import annotations

import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

__all__ = ["COMPLETE", "AtomicCheckpointIO", "newest_valid", "read", "step_of", "why_invalid"]

COMPLETE = "complete"
"""Key in the checkpoint of a complete training, with its last values by log key."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to the disk, and only then gives it its name.

    Whatever happens in between, the target holds either the old checkpoint or the new one. A checkpoint that cannot be
    written (full disk, read-only file system, quota) is warned about once and training goes on with the old one in
    place. The first checkpoint of a process is read back with ``weights_only=True`` before it replaces anything, so
    that one which could not be loaded is noticed when it is written.
    """

    def __init__(self) -> None:
        self._proven = False
        self._warned = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            TypeError: ``storage_options`` are given.
            ValueError: the checkpoint holds something that only arbitrary unpickling could load.
        """
        if storage_options is not None:
            raise TypeError(f"AtomicCheckpointIO takes no storage_options, found {storage_options!r}.")
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for stale in target.parent.glob(f".{target.name}.*.part"):  # of a process that was killed while writing
                stale.unlink(missing_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if not self._proven:
                self._prove(part)
            os.replace(part, target)
            _flush_folder(target.parent)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            cause = _cause(error)
            if cause is None:
                raise
            if not self._warned:
                self._warned = True
                free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
                warnings.warn(
                    f"The checkpoint {target} cannot be written ({cause}; {free / 2**20:.0f} MiB are free). Training "
                    f"goes on without it; the one before is kept. This is said once.",
                    stacklevel=2,
                )
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _prove(self, part: Path) -> None:
        try:
            torch.load(part, map_location="meta", weights_only=True)
        except Exception as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"The checkpoint holds something that does not load with weights_only=True: "
                f"{found.group(1) if found else error}, in a callback's state or the hyperparameters, perhaps. Keep to "
                f"tensors, numbers, strings, lists and dictionaries."
            ) from error
        self._proven = True


def _cause(error: BaseException | None) -> BaseException | None:
    """Error of the file system behind that of torch's writer; None if there is none."""
    while error is not None and not isinstance(error, OSError):
        if "PytorchStreamWriter" in str(error):
            return error
        error = error.__context__
    return error


def _flush_folder(folder: Path) -> None:
    """Make the new name survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems have no such thing
        pass
    finally:
        os.close(descriptor)


def why_invalid(path: Path) -> str | None:
    """Reason why a file is no valid checkpoint, or None; reads all of it, and runs nothing that it holds."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()  # torch.load does not look at the checksums
        if torn is not None:
            return f"the checksum of {torn} is wrong"
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a torn or foreign file brings up
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'unreadable'}"
    missing = [key for key in ("state_dict", "loops", "global_step") if key not in checkpoint]
    return f"it has no {', '.join(missing)}" if missing else None


def read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint file; its tensors are read when they are used."""
    found: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return found


def step_of(path: Path) -> int:
    """Number of optimizer steps at which a checkpoint was written."""
    return int(read(path)["global_step"])


def newest_valid(paths: Iterable[Path]) -> Path | None:
    """The first of ``paths``, newest first, that is a whole checkpoint; None if there is none.

    Warns of a damaged one with the one that is taken in its place.
    """
    damaged: list[str] = []
    for path in paths:
        if not path.exists():
            continue
        reason = why_invalid(path)
        if reason is None:
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}. The one before is used: {path}.", stacklevel=2)
            return path
        damaged.append(f"The checkpoint {path} is damaged: {reason}")
    if damaged:
        warnings.warn(f"{'; '.join(damaged)}. There is no other: training starts anew.", stacklevel=2)
    return None
