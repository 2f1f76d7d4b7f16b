"""Build of a store from files: in parallel, and resumed where it was stopped."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from harness.data.checks import check_distances, check_lengths, check_magnitudes, check_units, check_work
from harness.data.extras import Extras, Found
from harness.data.frames import FrameList
from harness.data.reading import Frame, LabelKeys, frames_of, has_key
from harness.data.store.format import MANIFEST, VERSION
from harness.data.store.information import encode_information
from harness.data.store.sources import Piece, Source, found_files, read_piece, units_of
from harness.data.store.stored import StoredFrames, is_store
from harness.data.store.writing import has_part, join_parts, name_store, read_part, write_part
from harness.support.checks import whole_number
from harness.support.files import write_text_whole
from harness.support.process import PARENT, end_with_parent

__all__ = ["BuildSettings", "build_store", "found_of", "plain_found"]

_PLAN = "plan.json"
Progress = Callable[[int, int, int], None]
"""Called with the number of parts that are done, that of all parts, and the frames that are done."""


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a build that decide what is in the store.

    Attributes:
        keys: names of the labels in the files.
        extras: further labels, inputs, weights and groups.
        min_distance: frames with closer atoms are refused, in Å; None does not look.
        check_units: whether files in other units are refused, where that shows.
        cutoffs: in Å, for which the numbers of edges are counted.
    """

    keys: LabelKeys = field(default_factory=LabelKeys)
    extras: Extras = field(default_factory=Extras)
    min_distance: float | None = 0.1
    check_units: bool = True
    cutoffs: tuple[float, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return found | {"keys": asdict(self.keys), "extras": self.extras.plain(), "cutoffs": list(self.cutoffs)}


def plain_found(found: Found) -> dict[str, Any]:
    """Names that frames have, as plain data."""
    return {
        "fields": sorted(found.fields),
        "keys": sorted(found.keys),
        "values": {name: sorted(values) for name, values in found.values.items()},
        "available": sorted(found.available),
        "fitting": {name: sorted(keys) for name, keys in found.fitting.items()},
    }


def found_of(recorded: Mapping[str, Any]) -> Found:
    """Names that frames have, from plain data."""
    values = {name: frozenset(each) for name, each in recorded["values"].items()}
    names = (frozenset(recorded[name]) for name in ("fields", "keys", "available"))
    fields_, keys, available = names
    fitting = {name: frozenset(each) for name, each in recorded.get("fitting", {}).items()}
    return Found(fields_, keys, values, available, fitting)


def build_store(
    path: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    settings: BuildSettings | None = None,
    *,
    num_workers: int = 1,
    restart: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> StoredFrames:
    """Build a store, or go on with a build that was stopped, and return its frames.

    The build is in the folder ``<path>.building``, part by part, and is renamed when it is complete: what has the name
    of the store is whole. A build that is refused keeps its parts only where other settings may go on with them.

    Args:
        path: of the store, which must not be there.
        files: that ASE reads, or folders of such files.
        settings: what is read and checked.
        num_workers: number of processes.
        restart: whether to begin anew where an unfinished build is there.
        progress: is called after each part.
        tell: is called with a sentence on a key that the first part lacks, while the others are still to be read.

    Raises:
        FileExistsError: there is something at ``path``.
        FileNotFoundError: a file is missing.
        KeyError: a label key is in none of the frames.
        ValueError: a file or frame is unusable, or an unfinished build is one of other files or settings.
        OSError: the store cannot be written.
    """
    target, chosen = Path(path).expanduser(), settings or BuildSettings()
    whole_number("the number of workers", num_workers)
    if target.exists():
        what = "a store" if is_store(target) else "no store"
        raise FileExistsError(f"{target} exists ({what}); give another name, or remove it")
    folder = target.with_name(f"{target.name}.building")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        with lock.acquire(timeout=0):
            try:
                build = _Build(target, folder, files, chosen, restart)
                store = build.run(num_workers, progress or _silent, tell or _silent)
            finally:
                if not folder.exists():  # there is nothing to go on with
                    Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise ValueError(f"another process is building {target}; wait for it, or give another name") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space is left for {folder}, of which {_written(folder) / 2**30:.2f} GiB are written. Nothing is "
            f"lost: free space and give the command again, and it goes on"
        ) from error
    return store


def _silent(*_: Any) -> None:
    """Progress that nobody looks at."""


def _written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class _Build:
    """One build, in its folder."""

    def __init__(
        self,
        target: Path,
        folder: Path,
        files: Sequence[str | os.PathLike[str]],
        settings: BuildSettings,
        restart: bool,
    ) -> None:
        self.target, self.folder, self.settings = target, folder, settings
        found, self.skipped = found_files([Path(file) for file in files])
        self.sources = [Source.of(file) for file in found]
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        self.units = self._plan()

    def _plan(self) -> list[list[Piece]]:
        """Units of the build: those of the unfinished one, or new ones."""
        begun = {"version": VERSION, "sources": list(map(asdict, self.sources)), "settings": self.settings.plain()}
        begun = json.loads(json.dumps(begun))
        file = self.folder / _PLAN
        if file.is_file():
            plan = json.loads(file.read_text())
            before = {**plan, "settings": _loosened(plan["settings"], begun["settings"])}
            differing = [name for name in begun if before.get(name) != begun[name]]
            if differing:
                raise ValueError(
                    f"{self.folder} is an unfinished build of other {' and '.join(differing)}. Give the command "
                    f"that it was begun with, and it goes on; or begin anew: add --restart"
                )
            return [[Piece(**piece) for piece in unit] for unit in plan["units"]]
        self.folder.mkdir(exist_ok=True)
        units = units_of(self.sources)
        plain = [[piece.plain() for piece in unit] for unit in units]
        write_text_whole(file, json.dumps({**begun, "units": plain}))
        return units

    def run(self, num_workers: int, progress: Progress, tell: Callable[[str], None]) -> StoredFrames:
        """Write what is missing, check the whole, and give the store its name."""
        if not (self.folder / MANIFEST).is_file():
            try:
                self._write_parts(num_workers, progress, tell)
                facts = self._parts()
                of_all = _joined(facts)
                self._refuse_unknown_keys(facts)
                self.settings.extras.check(of_all, self._files())
            except (ValueError, TypeError, KeyError):
                self._remove_useless()
                raise
            digests = {number: digest for part in facts for number, digest in part["digests"].items()}
            sources = [
                asdict(source) | {"absolute": os.path.abspath(source.path), "sha256": digests[str(number)]}
                for number, source in enumerate(self.sources)
            ]
            store = join_parts(
                self.folder,
                len(self.units),
                {"sources": sources, "settings": self.settings.plain(), "found": plain_found(of_all)},
            )
            self._check(store)
        else:
            store = StoredFrames(self.folder, json.loads((self.folder / MANIFEST).read_text()))
        name_store(store, self.target)
        return StoredFrames(self.target)

    def _parts(self) -> list[dict[str, Any]]:
        """Facts of the parts that are written."""
        numbers = range(len(self.units))
        return [read_part(self.folder, number) for number in numbers if has_part(self.folder, number)]

    def _files(self) -> str:
        return ", ".join(source.path for source in self.sources[:3])

    def _unknown_key(self) -> str:
        """Message of a key that no frame of the parts so far has; no text if all are known."""
        parts = self._parts()
        labels = [entry.field for entry in self.settings.extras.labels]
        try:
            self._refuse_unknown_keys(parts)
            self.settings.extras.check_labels(_joined(parts), self._files(), labels)
        except KeyError as error:
            return str(error.args[0])
        return ""

    def _remove_useless(self) -> None:
        """Remove a build that was refused, unless some of its parts are of use for a build of the same keys."""
        parts = self._parts()
        if not 0 < len(parts) < len(self.units) or self._unknown_key():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write_parts(self, num_workers: int, progress: Progress, tell: Callable[[str], None]) -> None:
        done = [number for number in range(len(self.units)) if has_part(self.folder, number)]
        num_frames = sum(int(read_part(self.folder, number)["frames"]) for number in done)
        todo = [number for number in range(len(self.units)) if number not in set(done)]
        total, finished = len(self.units), len(done)
        progress(finished, total, num_frames)

        def follow(written: int) -> None:
            nonlocal num_frames, finished
            num_frames, finished = num_frames + written, finished + 1
            progress(finished, total, num_frames)
            unknown = self._unknown_key() if finished == 1 < total else ""
            if unknown:
                tell(f"warning, after 1 of {total} parts: {unknown}. The build is refused if this remains so")

        tasks = [(self.folder, number, self.units[number], self.sources, self.settings) for number in todo]
        if num_workers == 1 or len(tasks) < 2:
            for task in tasks:
                follow(_write(*task))
            return
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        pool = ProcessPoolExecutor(
            min(num_workers, len(tasks)), multiprocessing.get_context(method), _begin, (os.getpid(),)
        )
        try:
            waiting: set[Future[int]] = {pool.submit(_write, *task) for task in tasks}
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    follow(future.result())
        except BrokenProcessPool:
            raise OSError(
                f"a process of the build of {self.target} was killed, perhaps since the memory was full. Nothing is "
                f"lost: give the command again, with fewer --workers, and it goes on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _refuse_unknown_keys(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a key of a label that no frame of a file in these parts has, as for files that are read whole."""
        read = sorted({int(number) for part in parts for number in part["keys"]})
        for label, key in self.settings.keys.changed().items():
            having = {int(number) for part in parts for number, keys in part["keys"].items() if key in keys}
            for number in read:
                if number not in having:
                    raise KeyError(
                        f"no frame of {self.sources[number].path} has the {label} key {key!r}; the frames have "
                        f"{sorted(_joined(parts).available)}"
                    )

    def _check(self, store: StoredFrames) -> None:
        """Check what takes all frames of a file, of those that were read in several pieces; and isolated atoms."""
        if self.settings.check_units:
            pieces = [piece.source for unit in self.units for piece in unit]
            names, origins = store.origin_names(), store.column("origin")
            for number in sorted({number for number in pieces if pieces.count(number) > 1}):
                code = names.index(self.sources[number].path)
                frames = store.subset(np.flatnonzero(origins == code))
                check_lengths(frames)
                check_work(frames)


def _joined(parts: Sequence[Mapping[str, Any]]) -> Found:
    """Names that the frames of parts have."""
    return reduce(or_, (found_of(part["found"]) for part in parts), Found())


def _loosened(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a build was begun with, without those of its checks that are looser now: its parts have passed."""
    found = dict(before)
    if before["check_units"]:
        found["check_units"] = now["check_units"]
    distance = now["min_distance"]
    if before["min_distance"] is not None and (distance is None or distance <= before["min_distance"]):
        found["min_distance"] = distance
    return found


def _begin(parent: int) -> None:
    """End this process with the one that has started it, and leave Ctrl-C to it."""
    os.environ[PARENT] = str(parent)
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write(folder: Path, number: int, unit: Sequence[Piece], sources: Sequence[Source], settings: BuildSettings) -> int:
    """Read, check and write one part; returns its number of frames."""
    frames: list[Frame] = []
    found = Found()
    keys: dict[int, list[str]] = {}
    digests: dict[int, str] = {}
    changed = settings.keys.changed()
    for piece in unit:
        source = sources[piece.source]
        structures = read_piece(source, piece)
        if not structures:
            raise ValueError(f"{source.path} has no frames")
        keys[piece.source] = [key for key in changed.values() if has_key(structures, key)]
        read = frames_of(structures, settings.keys, source.path, piece.first, not settings.extras.labels)
        read = settings.extras.read(read, require_labels=True)
        found |= settings.extras.found(read)
        if settings.check_units:  # first: positions in nm are neighbours within any distance
            (check_units if piece.kind == "whole" else check_magnitudes)(FrameList(read))
        if settings.min_distance is not None:
            check_distances(read, settings.min_distance)
        if not piece.first:
            digests[piece.source] = source.sha256()
        source.refuse_change()
        frames += read
    facts = {"found": plain_found(found), "keys": keys, "digests": digests}
    information = [encode_information(frame, asdict(settings.keys), settings.extras) for frame in frames]
    write_part(folder, number, frames, settings.cutoffs, facts, information)
    return len(frames)
