"""Checkpoint files that a kill, a full disk or a flipped bit cannot turn into a lost training, and do not stop it."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from harness.models.conversion import KINDS, kind_of
from harness.support.background import BackgroundCalls
from harness.support.host_copy import HostCopy
from harness.support.text import some

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "COMPLETE",
    "OF_A_TRAINING",
    "AtomicCheckpointIO",
    "CheckpointError",
    "after_writing",
    "best_in",
    "is_writing",
    "newest_valid",
    "read",
    "step_of",
    "wait_for_checkpoints",
    "why_invalid",
    "writing_at_once",
]

COMPLETE = "complete"
"""Key in the checkpoint of a complete training, with its last values by log key."""
OF_A_TRAINING = ("state_dict", "loops", "epoch", "global_step")
"""Keys of a checkpoint that a training goes on from."""
_MOST_COPIES = 2  # of a state in memory: the best checkpoint and the newest are often saved one after the other


class CheckpointError(ValueError):
    """A file that is no whole checkpoint.

    Attributes:
        reason: without the name of the file, such as ``its end is missing``.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to the disk, and only then gives it its name.

    Whatever happens in between, the target holds either the old checkpoint or the new one. A checkpoint that cannot be
    written (full disk, read-only file system, quota) is warned about once and training goes on with the old one in
    place. The first checkpoint of a process is read back with ``weights_only=True`` before it replaces anything, so
    that one which could not be loaded is noticed when it is written.

    In the background, a thread writes from a copy of the state in the host's memory, which is all that the training
    waits for. The first checkpoint, and those within :func:`writing_at_once`, are written before it goes on. At most
    two copies are waiting; a third waits until the first is written. Files are written, renamed and removed in the
    order in which that was asked for. An error other than that of a disk is raised by the next save, or at the end.
    Until a checkpoint is written, its target holds the one before. One that is to be removed for a checkpoint that
    could not be written stays.

    Args:
        background: write in a thread.
    """

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self._proven = False
        self._warned = False
        self._is_behind = False  # the last checkpoint could not be written
        self._calls = BackgroundCalls("checkpoints")
        self._copies: deque[Future[None]] = deque()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            TypeError: ``storage_options`` are given.
            ValueError: the checkpoint holds something that only arbitrary unpickling could load.
        """
        if storage_options is not None:
            raise TypeError(f"AtomicCheckpointIO takes no storage_options, found {storage_options!r}.")
        if not self.background or not self._proven:
            self.wait()
            self._write(checkpoint, Path(path))
            return
        self._calls.check()
        while len(self._copies) >= _MOST_COPIES:
            self._calls.wait(self._copies.popleft())
        copied = HostCopy(checkpoint)
        self._copies.append(self._calls.submit(lambda: self._write(copied.arrived(), Path(path))))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Content of a checkpoint, by Lightning's own reading, once all have been written."""
        self.wait()
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, once those that were saved before have been written; the last of them takes its place."""

        def remove() -> None:
            if not self._is_behind:
                super(AtomicCheckpointIO, self).remove_checkpoint(path)

        self.after(remove)

    def after(self, call: Callable[[], None]) -> None:
        """Call a function once the checkpoints that have been saved so far are written."""
        if self._calls.is_idle:
            self._calls.check()
            call()
        else:
            self._calls.submit(call)

    @property
    def is_writing(self) -> bool:
        """True as long as a thread writes; any thread may ask."""
        return not self._calls.is_idle

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            Exception: what has kept a checkpoint from being written, other than the disk.
        """
        self._copies.clear()
        self._calls.wait()

    def teardown(self) -> None:
        """Wait until everything is written, and end the thread; an error that has ended the training comes first."""
        before = sys.exc_info()[1]
        try:
            self._calls.end()
        except Exception as error:
            if before is None:
                raise
            warnings.warn(f"A checkpoint could not be written: {type(error).__name__}: {error}", stacklevel=2)

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        self._is_behind = True
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
            self._is_behind = False
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
                    stacklevel=3,
                )
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _prove(self, part: Path) -> None:
        try:
            torch.load(part, map_location="meta", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"The checkpoint holds something that does not load with weights_only=True: "
                f"{_unsafe(error) or error}, in a callback's state or the hyperparameters, perhaps. Keep to "
                f"tensors, numbers, strings, lists and dictionaries."
            ) from error
        self._proven = True


@contextmanager
def writing_at_once(trainer: Trainer) -> Iterator[None]:
    """Context in which a trainer's checkpoints are written before the training goes on, and so are those before."""
    writer = trainer.strategy.checkpoint_io
    if not isinstance(writer, AtomicCheckpointIO):
        yield
        return
    before, writer.background = writer.background, False
    try:
        yield
    finally:
        writer.background = before


def after_writing(trainer: Trainer, call: Callable[[], None]) -> None:
    """Call a function on this rank once the checkpoints that it has saved so far are written."""
    writer = trainer.strategy.checkpoint_io
    if isinstance(writer, AtomicCheckpointIO):
        writer.after(call)
    else:
        call()


def is_writing(trainer: Trainer) -> bool:
    """True as long as a thread of this rank writes checkpoints of a trainer; any thread may ask."""
    writer = trainer.strategy.checkpoint_io
    return isinstance(writer, AtomicCheckpointIO) and writer.is_writing


def wait_for_checkpoints(trainer: Trainer) -> None:
    """Wait on all ranks until the checkpoints that a trainer has saved are written; all ranks must call it."""
    writer = trainer.strategy.checkpoint_io
    if isinstance(writer, AtomicCheckpointIO) and writer.background:
        writer.wait()
        trainer.strategy.barrier("wait_for_checkpoints")


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


def _unsafe(error: BaseException) -> str | None:
    """Name of the callable that ``weights_only=True`` has refused to load."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found.group(1) if found else None


def best_in(folder: str | Path) -> Path | None:
    """Path of the best checkpoint in the folder of a run, or in its folder of checkpoints; None without one."""
    candidates = (Path(folder) / "checkpoints" / "best.ckpt", Path(folder) / "best.ckpt")
    return next((file for file in candidates if file.is_file()), None)


def read(
    path: str | Path,
    needs: Sequence[str] = ("state_dict",),
    checksums: bool = False,
    setting: str | None = None,
) -> dict[str, Any]:
    """Content of a checkpoint file, by ``torch.load(..., weights_only=True)``: nothing that it holds is run.

    Tensors are on the CPU, and are read from the file when they are used.

    Args:
        path: of the file.
        needs: keys that it must have.
        checksums: read the whole file first and compare its checksums, which ``torch.load`` does not look at.
        setting: name of the setting that has the path, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is a folder, a model of another package, damaged, or no checkpoint.
    """
    file = Path(path)
    assigned = f"{setting}=" if setting else ""
    shown = f"{assigned}{file}"
    if file.is_dir():
        inside = best_in(file)
        example = f" in it: {assigned}{inside}, or last.ckpt beside it" if inside else " in one file, such as best.ckpt"
        raise CheckpointError(f"{shown} is a folder, expected a checkpoint{example}.", "it is a folder")
    if not file.is_file():
        raise FileNotFoundError(f"{shown}: there is no such file, expected a checkpoint.")
    kind = kind_of(file)
    if kind is not None:  # a pickle, which is not read here
        raise CheckpointError(
            f"{shown} is a {KINDS[kind]}: convert it once, which runs the code that it holds, and go on with what is "
            f"written:\n  harness-convert {file} --unpickle -o {file.name.partition('.')[0]}.ckpt",
            f"it is a {KINDS[kind]}",
        )
    damage = _damage(file, checksums)
    if damage is not None:
        raise CheckpointError(
            f"{shown} is damaged: {damage}. Copy it again, or take another one, such as previous.ckpt.", damage
        )
    cause: Exception | None = None
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        foreign = _foreign(found, needs)
    except Exception as error:  # of pickle, zip and torch, each in its own words
        cause, foreign = error, _why_unreadable(file, error)
    if foreign is not None:
        raise CheckpointError(
            f"{shown} is no checkpoint of this package: {foreign}. Give one of the files in the folder "
            f"checkpoints/ of a run, such as best.ckpt.",
            foreign,
        ) from cause
    return found  # type: ignore[no-any-return]


def _damage(file: Path, checksums: bool) -> str | None:
    """Part of a file that is missing or wrong, as far as it is an archive; None if none is."""
    size = file.stat().st_size
    if not size:
        return "it is empty"
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            is_archive = opened.read(2) == b"PK"
        return f"it was cut off after {size} bytes, its end is missing" if is_archive else None
    if not checksums:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            torn = archive.testzip()
    except Exception as error:  # whatever a torn archive brings up
        return f"it cannot be read to its end ({type(error).__name__}: {error})"
    return None if torn is None else f"the checksum of {torn} is wrong"


def _why_unreadable(file: Path, error: Exception) -> str:
    """Reason why ``torch.load`` has refused a file."""
    if not zipfile.is_zipfile(file):
        return "it is no archive, as torch.save writes it"
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            return "it is an archive, but none that torch.save has written"
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"it holds {_unsafe(error) or 'something'}, which only unpickling could load, and that would run what the "
            f"file says. It was not loaded"
        )
    first = (str(error).splitlines() or ["without words"])[0]
    return f"torch cannot read it ({type(error).__name__}: {first})"


def _foreign(found: Any, needs: Sequence[str]) -> str | None:
    """Reason why content that was read is not that of a checkpoint; None if it is."""
    if not isinstance(found, dict):
        return f"it holds {type(found).__name__}, expected a dictionary with {', '.join(needs)}"
    missing = [key for key in needs if key not in found]
    if missing:
        return f"it has no {', '.join(missing)}; it has {some(map(str, found)) or 'nothing'}"
    weights = found.get("state_dict", {})
    return None if isinstance(weights, dict) else f"its state_dict is {type(weights).__name__}, expected a dictionary"


def why_invalid(path: Path) -> str | None:
    """Reason why a file is no whole checkpoint of a training, or None; reads all of it, and runs nothing of it."""
    try:
        read(path, OF_A_TRAINING, checksums=True)
    except CheckpointError as error:
        return error.reason
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


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
