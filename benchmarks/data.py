"""Loaders of batches: samples a second of one worker beside NequIP's and MACE's, hand-over, neighbour lists, plans.

    python benchmarks/data.py                                    # 1000 frames of 32 atoms, plans of 1 and 10 million
    python benchmarks/data.py --mace-python .venv-mace/bin/python
    python benchmarks/data.py --only plans --frames-planned 1000000

Four tables:

* ``loaders``: the same frames of the same file, read before, drawn at random in batches of 8 by one worker; the median
  of rounds in which the packages take turns, each in a process of its own. ``made``: neighbour lists are made when a
  sample is drawn. ``kept``: they are in memory. NequIP's data sets make them each time; MACE's training from a file
  makes all of them beforehand, and *made* is its ``AtomicData.from_config`` called on access. A package that cannot be
  imported is left out.
* ``hand-over``: a batch of kept samples from a worker, as one buffer and tensor by tensor.
* ``lists``: neighbour lists of a batch, made by vesin frame by frame, as workers do, and of the whole batch on the
  device (``data.neighbors=device``, where its extra is installed), and what else the making of a batch costs.
* ``plans``: seconds for the plan at the start and for that of an epoch, and the division among 64 ranks, for drawn
  sizes (log-normal about 40 atoms, 4 to 500).
"""

from __future__ import annotations

import os
import sys

# this folder, where a file would be found in the place of Python's own logging
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("harness", "nequip", "mace")


def write_frames(path: Path, number: int, repeats: int) -> None:
    """Extended XYZ of copper cells, rattled, with made-up labels."""
    import ase.io
    from ase.build import bulk
    from ase.calculators.singlepoint import SinglePointCalculator

    generator = np.random.default_rng(0)
    frames = []
    for seed in range(number):
        atoms = bulk("Cu", cubic=True) * (repeats, repeats, repeats)
        atoms.rattle(0.1, seed=seed)
        labels = {"energy": float(generator.normal()), "forces": generator.normal(size=(len(atoms), 3))}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


# ---- loaders: each package in a process of its own


def of_harness(path: Path, cutoff: float, kept: bool) -> tuple[Dataset[Any], type[DataLoader[Any]], dict[str, Any]]:
    """This package's data set, loader and options."""
    from harness.data import AtomsDataset, collate, read_frames

    return AtomsDataset(read_frames(path), ["Cu"], cutoff, cache_neighbors=kept), DataLoader, {"collate_fn": collate}


def of_nequip(path: Path, cutoff: float, kept: bool) -> tuple[Dataset[Any], type[DataLoader[Any]], dict[str, Any]]:
    """NequIP's, with its transforms of a training."""
    from nequip.data.datamodule._base_datamodule import _default_collate_fn_factory
    from nequip.data.dataset import ASEDataset
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform

    if kept:
        raise LookupError("NequIP keeps no neighbour lists")
    transforms = [ChemicalSpeciesToAtomTypeMapper(["Cu"]), NeighborListTransform(cutoff)]
    return ASEDataset(str(path), transforms), DataLoader, {"collate_fn": _default_collate_fn_factory()}


class OfConfigs(Dataset[Any]):
    """MACE's ``AtomicData`` of configurations, made on access."""

    def __init__(self, configs: list[Any], make: Callable[[Any], Any]) -> None:
        self.configs, self.make = configs, make

    def __len__(self) -> int:
        return len(self.configs)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.configs[index])


def of_mace(path: Path, cutoff: float, kept: bool) -> tuple[Any, type[DataLoader[Any]], dict[str, Any]]:
    """MACE's, as its training from a file has it."""
    import ase.io
    from mace.data import AtomicData, KeySpecification, config_from_atoms
    from mace.tools import torch_geometric
    from mace.tools.utils import AtomicNumberTable

    keys = KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    configs = []
    for atoms in ase.io.read(path, index=":"):
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
        configs.append(config_from_atoms(atoms, keys))
    table = AtomicNumberTable([29])

    def make(config: Any) -> Any:
        return AtomicData.from_config(config, z_table=table, cutoff=cutoff)

    data: Any = [make(config) for config in configs] if kept else OfConfigs(configs, make)
    return data, torch_geometric.dataloader.DataLoader, {}


def measure_loader(package: str, path: Path, cutoff: float, kept: bool, batch_size: int, workers: int) -> float:
    """Samples a second in the second epoch: workers are there, and what is kept has been made."""
    make = {"harness": of_harness, "nequip": of_nequip, "mace": of_mace}[package]
    data, loader_class, options = make(path, cutoff, kept)
    if kept and package == "harness":
        for index in range(len(data)):  # type: ignore[arg-type]
            data[index]
    options |= {"num_workers": workers, "persistent_workers": workers > 0}
    loader = loader_class(data, batch_size=batch_size, shuffle=True, drop_last=True, **options)
    seconds = [seconds_of(loader)[0] for _ in range(3)]
    return len(loader) * batch_size / min(seconds[1:])


def seconds_of(batches: Iterable[Any]) -> tuple[float, int]:
    """Seconds for all batches, and their number."""
    start = time.perf_counter()
    number = sum(1 for _ in batches)
    return time.perf_counter() - start, number


def ask(python: str, arguments: list[str]) -> dict[str, Any]:
    """What this script prints in another process, as one line of JSON; an ``error`` if it fails."""
    command = [python, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()
        return {"error": last[-1] if last else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def report_loaders(arguments: argparse.Namespace, folder: Path) -> None:
    """Print samples a second of each package, and how many times those of this one that is."""
    path = folder / "frames.xyz"
    write_frames(path, arguments.frames, arguments.repeats)
    pythons = {"harness": sys.executable, "nequip": sys.executable, "mace": arguments.mace_python}
    print(
        f"loaders: {arguments.frames} frames of {4 * arguments.repeats**3} atoms, cutoff {arguments.cutoff} Å, batches "
        f"of {arguments.batch_size}, one worker; samples a second, median of {arguments.rounds}"
    )
    print(f"{'':10}{'made':>10}{'harness is':>14}{'kept':>10}{'harness is':>14}")
    found: dict[tuple[str, bool], list[float]] = {}
    missing: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for package in PACKAGES:
            for kept in (False, True):
                if package in missing or (kept and package == "nequip"):
                    continue
                options = ["--package", package, "--file", str(path), *(["--kept"] if kept else [])]
                options += ["--cutoff", str(arguments.cutoff), "--batch-size", str(arguments.batch_size)]
                answer = ask(pythons[package], options)
                if "error" in answer:
                    missing[package] = answer["error"]
                else:
                    found.setdefault((package, kept), []).append(answer["rate"])
    for package in PACKAGES:
        if package in missing:
            print(f"{package:10}left out: {missing[package]}")
            continue
        line = f"{package:10}"
        for kept in (False, True):
            if (package, kept) in found:
                rate = statistics.median(found[package, kept])
                ratio = statistics.median(found["harness", kept]) / rate
                line += f"{rate:>10.0f}{ratio:>12.2f} x"
            else:
                line += f"{'-':>10}{'-':>14}"
        print(line)


# ---- hand-over


def apart(samples: Any) -> dict[str, Tensor]:
    """A batch of tensors each of which has its own memory."""
    from harness.data import collate

    return {name: value.clone() for name, value in collate(samples).items()}


def report_hand_over(arguments: argparse.Namespace) -> None:
    """Print milliseconds for a batch of kept samples from a worker, packed and not."""
    from ase.build import bulk

    from harness.data import AtomsDataset, Frame, collate

    frames = []
    for seed in range(arguments.frames):
        atoms = bulk("Cu", cubic=True) * ((arguments.repeats,) * 3)
        atoms.rattle(0.1, seed=seed)
        frames.append(Frame(atoms))
    data = AtomsDataset(frames, ["Cu"], arguments.cutoff)
    data.num_edges()  # keeps all samples
    print("\nhand-over: a batch from a worker, in ms, the least of 5 epochs")
    print(f"{'frames':>10}{'one buffer':>14}{'tensor by tensor':>20}{'ratio':>8}{'no worker':>12}")
    for batch_size in (arguments.batch_size, 4 * arguments.batch_size):
        least = []
        for workers, collate_fn in ((1, collate), (1, apart), (0, collate)):
            loader = DataLoader(
                data, batch_size=batch_size, num_workers=workers, collate_fn=collate_fn, persistent_workers=workers > 0
            )
            epochs = [seconds_of(loader) for _ in range(6)][1:]
            least.append(min(1e3 * seconds / number for seconds, number in epochs))
        packed, by_tensor, none = least
        print(f"{batch_size:>10}{packed:>14.2f}{by_tensor:>20.2f}{by_tensor / packed:>8.1f}{none:>12.2f}")


# ---- neighbour lists


def milliseconds(function: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Least time of a call, of the processor or, on a GPU, by the clock; two calls before are not counted."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found = []
    for _ in range(rounds + 2):
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e3 * (clock() - start))
    return min(found[2:])


def report_lists(arguments: argparse.Namespace) -> None:
    """Print milliseconds for the neighbour lists of a batch, and for the batch without them."""
    from ase.build import bulk

    from harness.data import Frame, collate, frame_to_sample, neighbor_list
    from harness.data.device_neighbors import DeviceNeighbors

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, cutoff = arguments.batch_size, arguments.cutoff
    print(f"\nlists: {size} frames a batch, cutoff {cutoff} Å, float32; ms a batch, least of {arguments.rounds * 10}")
    try:
        neighbors = DeviceNeighbors(cutoff)
    except ModuleNotFoundError as error:
        print(f"left out: {error}")
        return
    print(f"{'atoms':>10}{'edges':>10}{'vesin':>10}{f'on {device}':>10}{'all else':>10}")
    for repeats in (arguments.repeats, 5 * arguments.repeats // 2):
        frames = []
        for seed in range(size):
            atoms = bulk("Cu", cubic=True) * ((repeats,) * 3)
            atoms.rattle(0.1, seed=seed)
            frames.append(Frame(atoms))

        def bare(frames: list[Frame] = frames) -> dict[str, Tensor]:
            return collate([frame_to_sample(frame, ["Cu"], None) for frame in frames])

        def by_vesin(frames: list[Frame] = frames) -> None:
            for frame in frames:
                neighbor_list(frame.atoms.positions, frame.atoms.cell.array, frame.atoms.pbc, cutoff)

        batch = {name: value.to(device) for name, value in bare().items()}
        num_edges = neighbors.with_edges(batch)["edge_index"].shape[1]
        calls: list[Callable[[], Any]] = [by_vesin, lambda batch=batch: neighbors.with_edges(batch), bare]
        times = [milliseconds(call, 10 * arguments.rounds, device) for call in calls]
        print(f"{4 * repeats**3:>10}{num_edges:>10}" + "".join(f"{each:>10.2f}" for each in times))


# ---- plans


def report_plans(numbers: list[int]) -> None:
    """Print seconds for the plans of samplers."""
    from harness.data import BudgetBatchSampler, EvaluationBudgetSampler, TrainingBatchSampler

    print("\nplans: CPU seconds on each rank; batches beyond what the budget asks for at least")
    print(f"{'frames':>10}  {'sampler':34}{'start':>8}{'epoch':>8}{'ranks':>8}{'batches':>10}{'beyond':>9}")
    for number in numbers:
        generator = np.random.default_rng(0)
        sizes = np.exp(generator.normal(np.log(40), 0.9, number)).clip(4, 500).astype(np.int64)
        for num_ranks, frames_each, slack in ((1, 8, 1.02), (1, 32, 1.02), (64, 8, 1.02), (64, 8, 1.3)):
            budget = max(int(sizes.max()), int(slack * frames_each * num_ranks * sizes.mean()))
            start = time.process_time()
            try:
                sampler = BudgetBatchSampler(sizes, budget, 0, num_ranks)
            except ValueError:  # too few frames for so many ranks
                continue
            planned = time.process_time()
            sampler.global_batches()
            epoch = time.process_time() - planned
            least = -(-int(sizes.sum()) // budget)
            name = f"budget of {budget} atoms, {num_ranks} ranks"
            print(
                f"{number:>10}  {name:34}{planned - start:>8.2f}{epoch:>8.2f}{'':>8}{len(sampler):>10}"
                f"{len(sampler) / least - 1:>9.2%}"
            )
        batch_size = min(512, number)
        start = time.process_time()
        balanced = TrainingBatchSampler(number, batch_size, 0, min(64, batch_size), sizes=sizes)
        plan = balanced.plan(0)
        planned = time.process_time()
        for _ in balanced._parts(plan, 0):
            pass
        divided = time.process_time() - planned
        name = f"balance, {batch_size} frames, 64 ranks"
        print(f"{number:>10}  {name:34}{'':>8}{planned - start:>8.2f}{divided:>8.2f}{len(balanced):>10}")
        start = time.process_time()
        evaluation = EvaluationBudgetSampler(sizes, 1000, 0, 1)
        seconds = time.process_time() - start
        print(f"{number:>10}  {'evaluation by 1000 atoms':34}{seconds:>8.2f}{'':>16}{len(evaluation):>10}")


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1000, help="of the loaders")
    parser.add_argument("--repeats", type=int, default=2, help="cells of 4 atoms in each direction")
    parser.add_argument("--cutoff", type=float, default=4.5, help="of the neighbour lists, in Å")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames-planned", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--only", choices=("loaders", "hand-over", "lists", "plans"), nargs="+")
    parser.add_argument(
        "--mace-python", default=str(ROOT / ".venv-mace" / "bin" / "python"), help="interpreter with MACE"
    )
    parser.add_argument("--package", choices=PACKAGES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.package:
        rate = measure_loader(
            arguments.package, arguments.file, arguments.cutoff, arguments.kept, arguments.batch_size, workers=1
        )
        print(json.dumps({"rate": rate}))
        return
    if not Path(arguments.mace_python).exists():
        arguments.mace_python = sys.executable
    tables = arguments.only or ["loaders", "hand-over", "lists", "plans"]
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        if "loaders" in tables:
            report_loaders(arguments, Path(folder))
    if "hand-over" in tables:
        report_hand_over(arguments)
    if "lists" in tables:
        report_lists(arguments)
    if "plans" in tables:
        report_plans(arguments.frames_planned)


if __name__ == "__main__":
    main()
