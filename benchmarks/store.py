"""Formats of a store, and the start of a training from one: time to the first step, memory of a rank.

    python benchmarks/store.py formats                  # every format whose library is installed
    python benchmarks/store.py start --frames 1000 1000000
    python benchmarks/store.py build --frames 3000 --workers 1 2

``formats`` writes frames of 24 to 40 atoms in float64 (elements, positions, forces, cell, energy, stress) in each
format, and reads single frames in a random order, in a fresh process each. Libraries that are tried where they are
installed, and that the package does not need: lmdb, h5py, zarr, pyarrow.

* ``records``: one flat ``.npy`` file, the numbers of a frame side by side, read by ``pread`` with a CRC-32 of each
  frame, as ``harness.data.store`` does;
* ``columns``: one flat ``.npy`` file for each quantity, by memory map;
* ``lmdb``: a value for each frame; ``h5py``: a data set for each quantity; ``zarr``: likewise, in chunks of 1000 rows;
  ``arrow``: an IPC file of lists by memory map; ``parquet``: row groups of 1000 frames.

Times are of the processor, so that other work on the machine counts less. ``own MiB`` is how much the memory of a
reader has grown when all frames are read, without pages of files; ``pages MiB`` are pages of files that count as its
resident memory. ``damage``: a flipped bit in the middle of the largest file is told, or read as a number.

``start`` makes stores of synthetic frames of 24 to 32 atoms by the writer itself (10 000 different ones, over and over)
and starts ``harness-train data=store`` on 2 ranks. ``first step`` is the time from the command to the end of the first
step of rank 0, once by the clock and once of its processor; the imports alone are told too. Memory is that of rank 0
after ``--steps`` steps: ``own``, and ``resident`` with pages of files.

``build`` builds a store of extended XYZ with ``--frames`` frames in each of two files, by each number of ``--workers``,
beside ``ase.io.read`` of the files alone, each in a process of its own and without its imports.
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.typing import NDArray
from typing_extensions import override

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

    @override
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

    @override
    def open(self, folder: Path, num_frames: int) -> None:
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.checksums = np.load(folder / "checksums.npy", mmap_mode="r")
        self.start = np.load(folder / "records.npy", mmap_mode="r").offset
        self.file = os.open(folder / "records.npy", os.O_RDONLY)
        self.sizes = sizes_of(num_frames)

    @override
    def read(self, index: int) -> Arrays:
        begin, end = self.offsets[index : index + 2].tolist()
        record = os.pread(self.file, end - begin, self.start + begin)
        if zlib.crc32(record) != self.checksums[index]:
            raise ValueError(f"frame {index} is damaged")
        return self.parts(record, int(self.sizes[index]))

    @staticmethod
    def parts(record: bytes, size: int) -> Arrays:
        """Quantities of a record."""
        found, start = {}, 0
        for name, (level, dtype, shape) in SHAPES.items():
            whole = (size, *shape) if level == "node" else shape
            count = math.prod(whole)
            found[name] = np.frombuffer(record, dtype, count, start).reshape(whole)
            start += found[name].nbytes
        return found


class Columns(Format):
    """A flat file for each quantity, by memory map."""

    @override
    def write(self, folder: Path, num_frames: int) -> None:
        frames = list(frames_of(num_frames))
        for name, (level, _, _) in SHAPES.items():
            joined = np.concatenate if level == "node" else np.stack
            np.save(folder / f"{name}.npy", joined([frame[name] for frame in frames]))

    @override
    def open(self, folder: Path, num_frames: int) -> None:
        self.columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in SHAPES}
        self.ends = np.cumsum([0, *sizes_of(num_frames)])

    @override
    def read(self, index: int) -> Arrays:
        begin, end = self.ends[index : index + 2].tolist()
        return {
            name: np.array(self.columns[name][begin:end] if SHAPES[name][0] == "node" else self.columns[name][index])
            for name in SHAPES
        }


class Lmdb(Format):
    """A value for each frame."""

    libraries = ("lmdb",)

    @override
    def write(self, folder: Path, num_frames: int) -> None:
        import lmdb

        with lmdb.open(str(folder / "data.lmdb"), subdir=False, map_size=1 << 36, sync=False) as environment:
            with environment.begin(write=True) as transaction:
                for index, frame in enumerate(frames_of(num_frames)):
                    record = b"".join(frame[name].tobytes() for name in SHAPES)
                    transaction.put(index.to_bytes(8, "big"), record)
            environment.sync(True)

    @override
    def open(self, folder: Path, num_frames: int) -> None:
        import lmdb

        self.file = lmdb.open(str(folder / "data.lmdb"), subdir=False, readonly=True, lock=False, readahead=False)
        self.sizes = sizes_of(num_frames)

    @override
    def read(self, index: int) -> Arrays:
        with self.file.begin() as transaction:
            return Records.parts(transaction.get(index.to_bytes(8, "big")), int(self.sizes[index]))


class Hdf5(Columns):
    """A data set for each quantity, in one piece."""

    libraries = ("h5py",)

    @override
    def write(self, folder: Path, num_frames: int) -> None:
        import h5py

        frames = list(frames_of(num_frames))
        with h5py.File(folder / "data.h5", "w") as file:
            for name, (level, _, _) in SHAPES.items():
                joined = np.concatenate if level == "node" else np.stack
                file.create_dataset(name, data=joined([frame[name] for frame in frames]))

    @override
    def open(self, folder: Path, num_frames: int) -> None:
        import h5py

        self.file = h5py.File(folder / "data.h5", "r")
        self.columns = {name: self.file[name] for name in SHAPES}
        self.ends = np.cumsum([0, *sizes_of(num_frames)])


class Zarr(Columns):
    """A data set for each quantity, in chunks of 1000 rows."""

    libraries = ("zarr",)

    @override
    def write(self, folder: Path, num_frames: int) -> None:
        import zarr

        frames = list(frames_of(num_frames))
        group = zarr.open_group(str(folder / "data.zarr"), mode="w")
        for name, (level, _, _) in SHAPES.items():
            joined = np.concatenate if level == "node" else np.stack
            values = joined([frame[name] for frame in frames])
            array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(1000, *values.shape[1:]))
            array[:] = values

    @override
    def open(self, folder: Path, num_frames: int) -> None:
        import zarr

        group = zarr.open_group(str(folder / "data.zarr"), mode="r")
        self.columns = {name: group[name] for name in SHAPES}
        self.ends = np.cumsum([0, *sizes_of(num_frames)])


class Arrow(Format):
    """An IPC file of lists, by memory map."""

    libraries = ("pyarrow",)

    def table(self, num_frames: int) -> Any:
        """All frames, a row each."""
        import pyarrow

        frames = list(frames_of(num_frames))
        return pyarrow.table({name: [frame[name].ravel() for frame in frames] for name in SHAPES})

    @override
    def write(self, folder: Path, num_frames: int) -> None:
        import pyarrow.feather

        pyarrow.feather.write_feather(self.table(num_frames), folder / "data.arrow", compression="uncompressed")

    @override
    def open(self, folder: Path, num_frames: int) -> None:
        import pyarrow

        self.rows = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / "data.arrow"))).read_all().combine_chunks()

    @override
    def read(self, index: int) -> Arrays:
        return {
            name: self.rows[name][index].values.to_numpy(zero_copy_only=False).copy().reshape(-1, *shape)
            for name, (_, _, shape) in SHAPES.items()
        }


class Parquet(Arrow):
    """Row groups of 1000 frames."""

    @override
    def write(self, folder: Path, num_frames: int) -> None:
        import pyarrow.parquet

        pyarrow.parquet.write_table(self.table(num_frames), folder / "data.parquet", row_group_size=1000)

    @override
    def open(self, folder: Path, num_frames: int) -> None:
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(folder / "data.parquet", page_checksum_verification=True)

    @override
    def read(self, index: int) -> Arrays:
        group, place = divmod(index, 1000)
        rows = self.file.read_row_group(group)
        return {
            name: rows[name][place].values.to_numpy(zero_copy_only=False).copy().reshape(-1, *shape)
            for name, (_, _, shape) in SHAPES.items()
        }


FORMATS: dict[str, type[Format]] = {
    "records": Records, "columns": Columns, "lmdb": Lmdb, "h5py": Hdf5, "zarr": Zarr, "arrow": Arrow,
    "parquet": Parquet,
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
    before, start = memory(), time.process_time()
    for index in order:
        found = store.read(index)
        if float(found["energy"].reshape(-1)[0]) != index:
            raise ValueError(f"read {found['energy']} in the place of {index}")
    seconds = time.process_time() - start
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
        reads = min(num_reads, num_frames, 100 if name in ("zarr", "parquet") else num_reads)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            start = time.process_time()
            kind().write(folder, num_frames)
            written = time.process_time() - start
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


PROBE = """
import json, os, time
from pathlib import Path
from lightning.pytorch import Callback

class Probe(Callback):
    def __init__(self, path, steps):
        self.path, self.steps, self.found = path, steps, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not self.found:
            started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
            now = float(Path("/proc/uptime").read_text().split()[0])
            self.found["seconds"] = now - started / os.sysconf("SC_CLK_TCK")
            self.found["processor"] = time.process_time()
        if trainer.global_step == self.steps and trainer.is_global_zero:
            Path(self.path).write_text(json.dumps({**self.found, "last": self.memory()}))

    def memory(self):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return [int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS", "VmHWM")]
"""


def synthetic_frame(generator: np.random.Generator, index: int) -> Atoms:
    """Rattled crystal of 24 to 32 atoms of four elements, with random labels."""
    atoms = bulk("Cu", cubic=True) * 2
    del atoms[generator.choice(32, int(generator.integers(0, 9)), replace=False).tolist()]
    atoms.numbers = generator.choice([29, 46, 47, 79], len(atoms))
    atoms.rattle(0.1, rng=generator)
    return atoms


def synthetic_store(path: Path, num_frames: int, different: int = 10_000) -> None:
    """Store of synthetic frames, whose parts after the first are copies of it, but for the hashes of structures."""
    from harness.data import Frame
    from harness.data.extras import Found
    from harness.data.store import BuildSettings
    from harness.data.store.building import plain_found
    from harness.data.store.writing import PART_FACTS, join_parts, name_store, write_part

    generator = np.random.default_rng(0)
    folder, size = path.with_name(f"{path.name}.building"), min(num_frames, different)
    frames = []
    for index in range(size):
        atoms = synthetic_frame(generator, index)
        energy = float(np.dot([-1.0, -2.0, -3.0, -4.0], [(atoms.numbers == z).sum() for z in (29, 46, 47, 79)]))
        forces, stress = generator.normal(size=(len(atoms), 3)), 0.01 * np.eye(3)
        frames.append(Frame(atoms, energy + generator.normal(), forces, stress, "synthetic", index))
    write_part(folder, 0, frames)
    parts = -(-num_frames // size)
    for number in range(1, parts):
        name = f"{number:05d}"
        shutil.copytree(folder / "parts" / "00000", folder / "parts" / name)
        shutil.copy(folder / "records" / "00000.npy", folder / "records" / f"{name}.npy")
        for file, change in (("structure.npy", number * 0x9E3779B97F4A7C15 % 2**64), (PART_FACTS, 0)):
            place = folder / "parts" / name / file
            if change:
                np.save(place, np.load(place) ^ np.uint64(change))
            else:
                place.write_text(place.read_text().replace("records/00000.npy", f"records/{name}.npy"))
    facts = {"sources": [], "settings": BuildSettings().plain(), "found": plain_found(Found())}
    name_store(join_parts(folder, parts, facts), path)


def start(sizes: list[int], steps: int, folder: Path, options: list[str]) -> None:
    """Print the table of starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    (folder / "store_probe.py").write_text(PROBE)
    code = "import time, harness.train, harness.job; print(time.process_time())"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    imports = time.perf_counter() - begin
    print(f"imports alone: {imports:.1f} s, {float(done.stdout):.1f} s of the processor")
    print(f"{steps} steps of 8 frames on 2 ranks")
    print("frames      store MiB   first step s   of the processor s   own MiB   resident MiB   largest MiB")
    found: dict[int, tuple[float, list[float]]] = {}
    for size in sizes:
        path, result = folder / f"{size}.store", folder / f"{size}.json"
        synthetic_store(path, size)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(
                "-m",
                "harness.train",
                "data=store",
                f"data.train={path}",
                "trainer=cpu",
                "logger=none",
                "callbacks=none",
            ),
            *(
                "callbacks=none",
                "max_epochs=1",
                f"+trainer.limit_train_batches={steps}",
                "+trainer.limit_val_batches=1",
            ),
            *("test=false", "trainer.enable_progress_bar=false", f"hydra.run.dir={folder}/run-{size}", *options),
            f"+callbacks.probe={{_target_: store_probe.Probe, path: {result}, steps: {steps}}}",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        if done.returncode or not result.is_file():
            raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        measured = json.loads(result.read_text())
        own, resident, largest = measured["last"]
        found[size] = measured["processor"], measured["last"]
        disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20
        times = f"{measured['seconds']:14.1f} {measured['processor']:20.1f}"
        print(f"{size:<10} {disk:10.1f} {times} {own:9.0f} {resident:14.0f} {largest:13.0f}", flush=True)
        shutil.rmtree(path)
    if len(sizes) > 1:
        small, large = min(sizes), max(sizes)
        factor = 10_000_000 / (large - small)
        (seconds, memories), (more_seconds, more_memories) = found[small], found[large]
        ten = seconds + factor * (more_seconds - seconds)
        resident = memories[1] + factor * (more_memories[1] - memories[1])
        more = f"{more_seconds - seconds:.1f} s of the processor more"
        print(f"{large} beside {small} frames: {more}, {more_memories[1] / memories[1]:.3f} x the memory")
        print(f"extrapolated to 10000000: {ten:.0f} s of the processor, {resident:.0f} MiB resident")


TIMED = """
import os, sys, time
import ase.io
from harness.data import build_store
clock, before = time.perf_counter(), os.times()
{code}
print(time.perf_counter() - clock, sum(os.times()[:4]) - sum(before[:4]))
"""


def build(num_frames: int, workers: list[int], folder: Path) -> None:
    """Print times of builds by different numbers of processes, and of ASE's reading alone."""
    generator, frames = np.random.default_rng(0), []
    for index in range(num_frames):
        atoms = synthetic_frame(generator, index)
        labels = {"energy": -float(len(atoms)), "forces": generator.normal(size=(len(atoms), 3))}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    file = folder / "frames.xyz"
    ase.io.write(file, frames)
    shutil.copy(file, folder / "again.xyz")  # of several files, as they are
    size = file.stat().st_size / 2**20
    print(f"{num_frames} frames of 24 to 32 atoms, {size:.1f} MiB of extended XYZ, in each of two files")
    print("                        µs/frame by the clock   of the processors   frames/s")
    ase_code = "[ase.io.read(file, ':') for file in sys.argv[1:]]"
    build_code = "build_store(sys.argv[1], sys.argv[3:], num_workers=int(sys.argv[2]))"
    files = [str(file), str(folder / "again.xyz")]
    runs = {"ase.io.read": (ase_code, files)}
    for number in workers:
        target = [str(folder / f"{number}.store"), str(number)]
        runs[f"build, {number} workers"] = (build_code, [*target, *files])
    for name, (code, arguments) in runs.items():
        done = subprocess.run(
            [sys.executable, "-c", TIMED.format(code=code), *arguments], check=True, capture_output=True, text=True
        )
        clock, processor = map(float, done.stdout.split())
        each = 1e6 / (2 * num_frames)
        print(f"{name:22} {clock * each:22.0f} {processor * each:19.0f} {1 / (clock * each) * 1e6:10.0f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_formats = commands.add_parser("formats")
    of_formats.add_argument("--frames", type=int, default=50_000)
    of_formats.add_argument("--reads", type=int, default=20_000)
    of_formats.add_argument("--only", nargs="+", default=[], choices=list(FORMATS))
    of_start = commands.add_parser("start")
    of_start.add_argument("--frames", type=int, nargs="+", default=[1000, 1_000_000])
    of_start.add_argument("--steps", type=int, default=50)
    of_start.add_argument("settings", nargs="*", help="of harness-train")
    of_build = commands.add_parser("build")
    of_build.add_argument("--frames", type=int, default=3000)
    of_build.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    of_read = commands.add_parser("read")
    for name, kind in (("name", str), ("folder", Path), ("frames", int), ("reads", int)):
        of_read.add_argument(name, type=kind)
    options = parser.parse_args()
    if options.command == "read":
        read_all(options.name, options.folder, options.frames, options.reads)
    elif options.command == "formats":
        formats(options.frames, options.reads, options.only)
    else:
        with tempfile.TemporaryDirectory() as place:
            if options.command == "start":
                start(options.frames, options.steps, Path(place), options.settings)
            else:
                build(options.frames, options.workers, Path(place))


if __name__ == "__main__":
    main()
