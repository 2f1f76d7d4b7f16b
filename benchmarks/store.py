"""Formats of a store, and the start of a training from one: time to the first step, memory of a rank.

    python benchmarks/store.py formats                  # every format whose library is installed
    python benchmarks/store.py start --frames 1000 1000000
    python benchmarks/store.py build --frames 20000

``formats`` writes frames of 24 to 40 atoms in float64 (elements, positions, forces, cell, energy, stress) in each format
and reads single frames in a random order, in a fresh process each. Libraries that are tried where they are installed:
lmdb, h5py, zarr, pyarrow; none of them is needed by the package.

* ``records``: one flat ``.npy`` file, the numbers of a frame side by side, read by ``pread`` with a CRC-32 of each frame;
  what :mod:`harness.data.store` does;
* ``columns``: one flat ``.npy`` file for each quantity, by memory map;
* ``lmdb``: a value for each frame; ``h5py``, ``zarr``: a data set for each quantity, in chunks of a frame's size or one
  chunk; ``arrow``: an IPC file of lists by memory map; ``parquet``: row groups of 1000 frames.

``own MiB`` is memory that a reader of all frames has more at the end, without pages of files; ``pages MiB`` are pages of
files that count as its resident memory. ``damage``: a flipped bit in the file is told, or is read as a number.

``start`` makes stores of synthetic frames by the writer itself and starts ``harness-train data=store`` on 2 ranks: seconds
from the command to the first step, less the imports, and memory of rank 0 in its first epoch. ``build`` measures
``harness-data build`` of an extended XYZ file.
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import importlib.util
import shutil
import subprocess
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
SHAPES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "positions": ("node", "<f8", (3,)),
    "forces": ("node", "<f8", (3,)),
    "cell": ("graph", "<f8", (3, 3)),
    "stress": ("graph", "<f8", (3, 3)),
    "energy": ("graph", "<f8", ()),
    "numbers": ("node", "|u1", ()),
}


def sizes_of(num_frames: int) -> NDArray[np.int64]:
    """Numbers of atoms of the synthetic frames."""
    return np.random.default_rng(0).integers(24, 41, num_frames)


def frames_of(num_frames: int) -> Iterator[Arrays]:
    """Synthetic frames; the energy of one is its number."""
    generator = np.random.default_rng(1)
    for number, size in enumerate(sizes_of(num_frames).tolist()):
        yield {
            "positions": generator.normal(size=(size, 3)),
            "forces": generator.normal(size=(size, 3)),
            "cell": np.eye(3) * 8.0,
            "stress": np.zeros((3, 3)),
            "energy": np.asarray(float(number)),
            "numbers": generator.integers(1, 9, size).astype(np.uint8),
        }


class Format(ABC):
    """Frames in files of one format."""

    libraries: tuple[str, ...] = ()

    @abstractmethod
    def write(self, folder: Path, num_frames: int) -> None:
        """Write the synthetic frames."""

    @abstractmethod
    def open(self, folder: Path, num_frames: int) -> None:
        """Open for reading."""

    @abstractmethod
    def read(self, index: int) -> Arrays:
        """One frame."""


class Records(Format):
    """A flat file, the numbers of a frame side by side."""

    def write(self, folder: Path, num_frames: int) -> None:
        offsets, checksums, records = [0], [], []
        for frame in frames_of(num_frames):
            record = b"".join(frame[name].tobytes() for name in SHAPES)
            records.append(record)
            offsets.append(offsets[-1] + len(record))
            checksums.append(zlib.crc32(record))
        np.save(folder / "offsets.npy", np.array(offsets))
        np.save(folder / "checksums.npy", np.array(checksums, dtype=np.uint32))
        np.save(folder / "records.npy", np.frombuffer(b"".join(records), np.uint8))

    def open(self, folder: Path, num_frames: int) -> None:
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.checksums = np.load(folder / "checksums.npy", mmap_mode="r")
        self.start = np.load(folder / "records.npy", mmap_mode="r").offset
        self.file = os.open(folder / "records.npy", os.O_RDONLY)
        self.sizes = sizes_of(num_frames)

    def read(self, index: int) -> Arrays:
        begin, end = self.offsets[index : index + 2].tolist()
        record = os.pread(self.file, end - begin, self.start + begin)
        if zlib.crc32(record) != self.checksums[index]:
            raise ValueError(f"frame {index} is damaged")
        return self.parts(record, int(self.sizes[index]))

    @staticmethod
    def parts(record: bytes, size: int) -> Arrays:
        found, start = {}, 0
        for name, (level, dtype, shape) in SHAPES.items():
            whole = (size, *shape) if level == "node" else shape
            count = int(np.prod(whole))
            found[name] = np.frombuffer(record, dtype, count, start).reshape(whole)
            start += found[name].nbytes
        return found


class Columns(Format):
    """A flat file for each quantity, by memory map."""

    def write(self, folder: Path, num_frames: int) -> None:
        frames = list(frames_of(num_frames))
        for name, (level, _, _) in SHAPES.items():
            joined = np.concatenate if level == "node" else np.stack
            np.save(folder / f"{name}.npy", joined([frame[name] for frame in frames]))

    def open(self, folder: Path, num_frames: int) -> None:
        self.columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in SHAPES}
        self.ends = np.cumsum([0, *sizes_of(num_frames)])

    def read(self, index: int) -> Arrays:
        begin, end = self.ends[index : index + 2].tolist()
        return {
            name: np.array(self.columns[name][begin:end] if SHAPES[name][0] == "node" else self.columns[name][index])
            for name in SHAPES
        }


class Lmdb(Format):
    """A value for each frame."""

    libraries = ("lmdb",)

    def write(self, folder: Path, num_frames: int) -> None:
        import lmdb

        with lmdb.open(str(folder / "data.lmdb"), subdir=False, map_size=1 << 36, sync=False) as environment:
            with environment.begin(write=True) as transaction:
                for index, frame in enumerate(frames_of(num_frames)):
                    record = b"".join(frame[name].tobytes() for name in SHAPES)
                    transaction.put(index.to_bytes(8, "big"), record)
            environment.sync(True)

    def open(self, folder: Path, num_frames: int) -> None:
        import lmdb

        self.file = lmdb.open(str(folder / "data.lmdb"), subdir=False, readonly=True, lock=False, readahead=False)
        self.sizes = sizes_of(num_frames)

    def read(self, index: int) -> Arrays:
        with self.file.begin() as transaction:
            return Records.parts(transaction.get(index.to_bytes(8, "big")), int(self.sizes[index]))


class Hdf5(Columns):
    """A data set for each quantity, in one piece."""

    libraries = ("h5py",)

    def write(self, folder: Path, num_frames: int) -> None:
        import h5py

        frames = list(frames_of(num_frames))
        with h5py.File(folder / "data.h5", "w") as file:
            for name, (level, _, _) in SHAPES.items():
                joined = np.concatenate if level == "node" else np.stack
                file.create_dataset(name, data=joined([frame[name] for frame in frames]))

    def open(self, folder: Path, num_frames: int) -> None:
        import h5py

        self.file = h5py.File(folder / "data.h5", "r")
        self.columns = {name: self.file[name] for name in SHAPES}
        self.ends = np.cumsum([0, *sizes_of(num_frames)])


class Zarr(Columns):
    """A data set for each quantity, in chunks of 1000 rows."""

    libraries = ("zarr",)

    def write(self, folder: Path, num_frames: int) -> None:
        import zarr

        frames = list(frames_of(num_frames))
        group = zarr.open_group(str(folder / "data.zarr"), mode="w")
        for name, (level, _, _) in SHAPES.items():
            joined = np.concatenate if level == "node" else np.stack
            values = joined([frame[name] for frame in frames])
            array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(1000, *values.shape[1:]))
            array[:] = values

    def open(self, folder: Path, num_frames: int) -> None:
        import zarr

        group = zarr.open_group(str(folder / "data.zarr"), mode="r")
        self.columns = {name: group[name] for name in SHAPES}
        self.ends = np.cumsum([0, *sizes_of(num_frames)])


class Arrow(Format):
    """An IPC file of lists, by memory map."""

    libraries = ("pyarrow",)

    def table(self, num_frames: int) -> Any:
        import pyarrow

        frames = list(frames_of(num_frames))
        return pyarrow.table({name: [frame[name].ravel() for frame in frames] for name in SHAPES})

    def write(self, folder: Path, num_frames: int) -> None:
        import pyarrow.feather

        pyarrow.feather.write_feather(self.table(num_frames), folder / "data.arrow", compression="uncompressed")

    def open(self, folder: Path, num_frames: int) -> None:
        import pyarrow

        self.rows = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / "data.arrow"))).read_all().combine_chunks()

    def read(self, index: int) -> Arrays:
        return {
            name: self.rows[name][index].values.to_numpy(zero_copy_only=False).copy().reshape(-1, *shape)
            for name, (_, _, shape) in SHAPES.items()
        }


class Parquet(Arrow):
    """Row groups of 1000 frames."""

    def write(self, folder: Path, num_frames: int) -> None:
        import pyarrow.parquet

        pyarrow.parquet.write_table(self.table(num_frames), folder / "data.parquet", row_group_size=1000)

    def open(self, folder: Path, num_frames: int) -> None:
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(folder / "data.parquet", page_checksum_verification=True)

    def read(self, index: int) -> Arrays:
        group, place = divmod(index, 1000)
        rows = self.file.read_row_group(group)
        return {
            name: rows[name][place].values.to_numpy(zero_copy_only=False).copy().reshape(-1, *shape)
            for name, (_, _, shape) in SHAPES.items()
        }


FORMATS: dict[str, type[Format]] = {
    "records": Records, "columns": Columns, "lmdb": Lmdb, "h5py": Hdf5, "zarr": Zarr, "arrow": Arrow, "parquet": Parquet,
}  # fmt: skip


def memory() -> tuple[float, float]:
    """Memory of this process in MiB: its own, and pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, pages = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, pages


def read_all(name: str, folder: Path, num_frames: int, num_reads: int) -> None:
    """Read frames in a random order, and print µs a frame and memory; in a process of its own."""
    store = FORMATS[name]()
    store.open(folder, num_frames)
    order = np.random.default_rng(os.getpid()).permutation(num_frames)[:num_reads].tolist()
    store.read(0)
    before, start = memory(), time.perf_counter()
    for index in order:
        found = store.read(index)
        if float(found["energy"].reshape(-1)[0]) != index:
            raise ValueError(f"read {found['energy']} in the place of {index}")
    seconds = time.perf_counter() - start
    own, pages = (now - then for now, then in zip(memory(), before, strict=True))
    print(1e6 * seconds / len(order), own, pages)


def damaged(name: str, folder: Path, num_frames: int) -> str:
    """Outcome of a flipped bit in the middle of the largest file."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))
    store = FORMATS[name]()
    try:
        store.open(folder, num_frames)
        for index in range(num_frames):
            store.read(index)
    except Exception as error:
        return f"told ({type(error).__name__})"
    return "not told"


def formats(num_frames: int, num_reads: int, only: list[str]) -> None:
    """Print the table of formats."""
    print(f"{num_frames} frames of 24 to 40 atoms, float64; {num_reads} read at random, page cache warm")
    print("format     write µs/frame   KiB/frame  files   read µs/frame   2 readers   own MiB   pages MiB   damage")
    for name, kind in FORMATS.items():
        missing = [each for each in kind.libraries if importlib.util.find_spec(each) is None]
        if missing or (only and name not in only):
            if missing:
                print(f"{name:10} {', '.join(missing)} is not installed")
            continue
        reads = min(num_reads, num_frames, 500 if name in ("zarr", "parquet") else num_reads)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            start = time.perf_counter()
            kind().write(folder, num_frames)
            written = time.perf_counter() - start
            files = [path for path in folder.rglob("*") if path.is_file()]
            size = sum(path.stat().st_blocks * 512 for path in files)
            command = [sys.executable, __file__, "read", name, str(folder), str(num_frames), str(reads)]
            runs = []
            for number in (1, 2):
                started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
                printed = [process.communicate()[0] for process in started]
                if any(process.returncode for process in started):
                    raise SystemExit(f"{name} cannot be read by {number} processes")
                runs.append(np.mean([[float(each) for each in line.split()] for line in printed], axis=0))
            (alone, own, pages), (together, _, _) = runs
            print(
                f"{name:10} {1e6 * written / num_frames:14.1f} {size / num_frames / 1024:11.2f} {len(files):6} "
                f"{alone:15.1f} {together:11.1f} {own:9.1f} {pages:11.1f}   {damaged(name, folder, num_frames)}",
                flush=True,
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_formats = commands.add_parser("formats")
    of_formats.add_argument("--frames", type=int, default=50_000)
    of_formats.add_argument("--reads", type=int, default=20_000)
    of_formats.add_argument("--only", nargs="+", default=[], choices=list(FORMATS))
    of_read = commands.add_parser("read")
    for name, kind in (("name", str), ("folder", Path), ("frames", int), ("reads", int)):
        of_read.add_argument(name, type=kind)
    options = parser.parse_args()
    if options.command == "read":
        read_all(options.name, options.folder, options.frames, options.reads)
    else:
        formats(options.frames, options.reads, options.only)


if __name__ == "__main__":
    main()
