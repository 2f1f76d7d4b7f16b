"""Stores that are made of large files without being asked for, in the cache directory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
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

__all__ = ["cached_store", "is_large", "num_bytes", "tell_of_rank"]

_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # where rank_zero_info tells, on rank 0 alone
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_LOOKS = 20.0  # a second, of all ranks together that wait for a store: they may share a file system
_LONGEST_WAIT = 5.0  # seconds between two looks of a rank
_UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


def num_bytes(size: Any) -> int | None:
    """Number of bytes of a size such as ``512 MiB``; None for None.

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
        raise ValueError(f"store_above is a size such as '512 MiB' ({', '.join(_UNITS)}) or null, found {size!r}")
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
    path: Path, settings: BuildSettings, cache_dir: str | os.PathLike[str] | None, tell: Callable[[str], None]
) -> StoredFrames:
    """Store of a file in the cache directory, which one process builds if it is not there while others wait.

    The process that builds tells how far it is, whichever that is. Of those that wait, the first two ranks of a node
    say so, so that each node is heard of, and hundreds of ranks do not repeat it.

    Its name has a hash of the file (its name, size, time of change, and samples of its content) and of the settings.

    Args:
        path: of the file.
        settings: of the build.
        cache_dir: see :func:`~harness.data.embedded.default_cache_dir`.
        tell: is called with sentences on what takes a while; on any rank, such as :func:`tell_of_rank`.

    Raises:
        OSError: the store cannot be written.
        FileNotFoundError, KeyError, ValueError: as :func:`~harness.data.store.build_store`.
    """
    file = path.expanduser()
    folder = (default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()) / "stores"
    target = folder / f"{file.name}-{_key(file, settings)}.store"
    if is_store(target):
        return StoredFrames(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not file.is_file():
            raise
        raise OSError(
            f"the store of {path} is kept in {folder}, which cannot be written ({error}). Name another folder by the "
            f"variable HARNESS_CACHE or data.cache_dir=..., or read the file as a whole: data.store_above=null"
        ) from error
    return StoredFrames(target)


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
