"""Stores that are made of large files without being asked for, in the cache directory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from harness.data.embedded import default_cache_dir
from harness.data.store.building import BuildSettings, build_store
from harness.data.store.format import VERSION
from harness.data.store.sources import Source
from harness.data.store.stored import StoredFrames, is_store
from harness.distributed import launched_ranks

__all__ = ["cached_store", "is_large", "num_bytes", "remove_unused", "tell_of_rank"]

_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # where rank_zero_info tells, on rank 0 alone
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_LOOKS = 20.0  # a second, of all ranks together that wait for a store: they may share a file system
_LONGEST_WAIT = 5.0  # seconds between two looks of a rank
_UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


def num_bytes(size: Any, name: str = "store_above") -> int | None:
    """Number of bytes of a size such as ``512 MiB``; None for None.

    Args:
        size: as it was given.
        name: of the setting, for the message.

    Raises:
        ValueError: if it is something else.

    Example:
        >>> num_bytes("512 MiB"), num_bytes(100), num_bytes(None)
        (536870912, 100, None)
    """
    if size is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)?\s*", str(size))
    if isinstance(size, bool) or not found:
        raise ValueError(f"{name} is a size such as '512 MiB' ({', '.join(_UNITS)}) or null, found {size!r}")
    return int(float(found[1]) * 2 ** _UNITS[found[2] or "B"])


def is_large(paths: Sequence[Path], limit: int | None) -> bool:
    """True if files are larger than a limit, all together."""
    sizes = (path.expanduser().stat().st_size for path in paths if path.expanduser().is_file())
    return limit is not None and sum(sizes) > limit


def tell_of_rank(text: str) -> None:
    """Log a sentence on this rank, whichever it is; those of other ranks than 0 begin with their number."""
    rank = getattr(rank_zero_only, "rank", 0)
    _LOG.info(f"rank {rank}: {text}" if rank else text)


def cached_store(
    path: Path,
    settings: BuildSettings,
    cache_dir: str | os.PathLike[str] | None,
    tell: Callable[[str], None],
    limit: int | None = None,
) -> StoredFrames:
    """Store of a file in the cache directory, which one process builds if it is not there while others wait.

    The process that builds tells how far it is, whichever that is. Of those that wait, the first two ranks of a node
    say so, so that each node is heard of, and hundreds of ranks do not repeat it.

    Its name has a hash of the file (its name, size, time of change, and samples of its content) and of the settings.
    After a build, the stores that were used longest ago are removed until all together keep to a limit, see
    :func:`remove_unused`.

    Args:
        path: of the file.
        settings: of the build.
        cache_dir: see :func:`~harness.data.embedded.default_cache_dir`.
        tell: is called with sentences on what takes a while; on any rank, such as :func:`tell_of_rank`.
        limit: bytes that the stores in the directory may have together; None for any number.

    Raises:
        OSError: the store cannot be written.
        FileNotFoundError, KeyError, ValueError: as :func:`~harness.data.store.build_store`.
    """
    file = path.expanduser()
    folder = (default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()) / "stores"
    target = folder / f"{file.name}-{_key(file, settings)}.store"
    with ExitStack() as undone:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            in_use = _mark_as_used(target)  # before it is looked for: from now on it is not removed
            if in_use is not None:
                undone.callback(os.close, in_use)
            if not is_store(target):
                _build(path, target, settings, tell)
                remove_unused(folder, limit, tell)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not file.is_file():
                raise
            raise OSError(
                f"the store of {path} is kept in {folder}, which cannot be written ({error}). Name another folder by "
                f"the variable HARNESS_CACHE or data.cache_dir=..., or read the file as a whole: data.store_above=null"
            ) from error
        store = StoredFrames(target)
        undone.pop_all()
    if in_use is not None:
        store.hold(in_use)
    return store


def _build(path: Path, target: Path, settings: BuildSettings, tell: Callable[[str], None]) -> None:
    """Build a store, or wait until another process has built it."""
    file = path.expanduser()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank > 0:
        time.sleep(1)  # the first rank of the node builds if it can
    lock = FileLock(f"{target}.lock")
    if not _has_lock(lock) and local_rank < 2:
        tell(f"waiting for another process that builds the store of {path} in {target}")
    between = min(_LONGEST_WAIT, launched_ranks() / _LOOKS)
    while not (is_store(target) or _has_lock(lock)):  # that process may end before it is done
        time.sleep(between)
    try:
        if not is_store(target):
            size = file.stat().st_size / 2**20
            tell(
                f"{path} has {size:.0f} MiB: building a store of it once, in {target} (data.store_above). "
                f"`harness-data build` does so beforehand"
            )
            workers = len(os.sched_getaffinity(0))
            build_store(target, [file], settings, num_workers=workers, progress=_told(tell), tell=tell)
    finally:
        lock.release()


def _mark_as_used(target: Path) -> int | None:
    """Note that a store is used now, and keep others from removing it.

    Returns:
        An open file, whose shared lock lasts until it is closed, also by the end of the process; None in a directory
        that cannot be written, from which nothing is removed.
    """
    try:
        found = os.open(f"{target}.used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        if is_store(target):
            return None
        raise
    fcntl.flock(found, fcntl.LOCK_SH)
    with suppress(OSError):  # of another user's file
        os.utime(found)
    return found


def remove_unused(folder: Path, limit: int | None, tell: Callable[[str], None]) -> None:
    """Remove stores that no process uses, those that were used longest ago first, until the others keep to a limit.

    Unfinished builds that no process goes on with count as stores.

    Args:
        folder: of the stores.
        limit: bytes that all stores may have together; None removes nothing.
        tell: is called with a sentence on each store that is removed.
    """
    if limit is None:
        return
    found = [each for kind in ("*.store", "*.store.building") for each in folder.glob(kind) if each.is_dir()]
    sizes = {each: _num_bytes_in(each) for each in found}
    total = sum(sizes.values())
    for store in sorted(found, key=_last_used):
        if total <= limit:
            return
        if _remove(store):
            total -= sizes[store]
            tell(f"removed {store}, which was used longest ago: stores have {limit / 2**30:g} GiB (data.store_limit)")


def _num_bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _used_file(store: Path) -> Path:
    return store.with_name(f"{store.name.removesuffix('.building')}.used")


def _last_used(store: Path) -> float:
    used = _used_file(store)
    return (used if used.exists() else store).stat().st_mtime


def _remove(store: Path) -> bool:
    """Remove a store if no process uses it. What is left has another name at once, so that no store is half there."""
    in_use = os.open(_used_file(store), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = store.with_name(f"{store.name}.removed")
        shutil.rmtree(left, ignore_errors=True)
        os.replace(store, left)
        shutil.rmtree(left, ignore_errors=True)
    except OSError:  # it is in use, or another user's
        return False
    finally:
        os.close(in_use)
    return True


def _has_lock(lock: FileLock) -> bool:
    """True if this process has a lock, or could take it at once."""
    try:
        if not lock.is_locked:
            lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _told(tell: Callable[[str], None]) -> Callable[[int, int, int], None]:
    """Progress by one sentence for each tenth."""
    tenths = {0}

    def progress(done: int, total: int, num_frames: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth not in tenths:
            tenths.add(tenth)
            tell(f"store: {done} of {total} parts, {num_frames} frames")

    return progress


def _key(file: Path, settings: BuildSettings) -> str:
    source = Source.of(file)
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for number in range(_SAMPLES):
            opened.seek(max(0, (source.bytes - _SAMPLE_BYTES) * number // (_SAMPLES - 1)))
            digest.update(opened.read(_SAMPLE_BYTES))
    facts = [VERSION, file.name, source.bytes, source.modified, digest.hexdigest(), settings.plain()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
