"""Cost of a loss step on several ranks, side by side in one run: this package, NequIP, and a hand-packed minimum.

    python benchmarks/step.py                      # 2 gloo ranks on the CPU; 1, 20 and 89 atom types
    python benchmarks/step.py --ranks 4 --types 1 89 --device cuda

A step is the loss alone, forward and backward, on ready-made predictions: energy per atom and forces, with one force
error for each atom type. The contestants take turns within the run, on the same data:

* ``minimum``: written by hand for this very loss: one row, one all-reduce, nothing else (no names, epochs or checks);
* ``harness``: ``EnergyForceLoss`` with ``per_type_forces_coeffs``;
* ``nequip``: the same loss of NequIP's ``MetricsManager``, where it is installed.

Collectives, operators and host synchronisations are counted by torch's profiler on a step of their own; times are
medians over rounds in which all take turns, with ranks starting together.
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness import EnergyForceLoss
from harness.distributed import data_parallel_size, gradient_scale

HOST_SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
Batch = dict[str, Tensor]
Step = Callable[[Batch, Batch], Tensor]


class MinimumStep:
    """The same loss by hand: what any implementation has to do at least."""

    def __init__(self, num_types: int, device: torch.device) -> None:
        self.num_types = num_types
        self.weights = torch.linspace(1, 2, num_types, dtype=torch.float64, device=device)

    def __call__(self, preds: Batch, target: Batch) -> Tensor:
        """Loss of a batch."""
        num_atoms = target["num_atoms"].unsqueeze(-1)
        energy = (preds["total_energy"] / num_atoms - target["total_energy"] / num_atoms).square()
        forces = (preds["forces"] - target["forces"]).square().sum(-1, dtype=torch.float64)
        types, zeros = target["atom_types"], forces.new_zeros(self.num_types)
        row = torch.cat(
            (
                energy.sum(dtype=torch.float64).unsqueeze(0),
                zeros.index_add(0, types, forces),
                forces.new_full((1,), energy.numel()),
                zeros.index_add(0, types, forces.new_full(forces.shape, 3.0)),
            )
        )
        row = _SumOverRanks.apply(row)
        sums, counts = row.chunk(2)
        present = counts > 0
        means = sums / torch.where(present, counts, 1.0)
        weights = torch.where(present[1:], self.weights, 0.0)
        forces_mse = torch.dot(weights, means[1:]) / weights.sum()
        return 0.5 * means[0] + 0.5 * forces_mse


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        row = row.clone()
        if data_parallel_size() > 1:
            dist.all_reduce(row)
        return row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def harness_step(num_types: int, device: torch.device) -> Step:
    """This package's ready-made loss."""
    names, weights = _types(num_types)
    manager = EnergyForceLoss(per_type_forces_coeffs=weights, type_names=names)
    return lambda preds, target: manager(preds, target)["weighted_sum"]


def nequip_step(num_types: int, device: torch.device) -> Step | None:
    """NequIP's ready-made loss, synchronised as its own module asks for; None where NequIP is not installed."""
    try:
        from nequip.train import EnergyForceLoss as NequipLoss
    except ImportError:
        return None
    names, weights = _types(num_types)
    manager = NequipLoss(per_type_forces_coeffs=weights, type_names=names).to(device)
    for entry in manager.values():
        # its Lightning module sets this flag on each entry, which for per-type entries is a ModuleList and has no
        # effect: set it where it works, for the same exact loss
        for metric in entry if isinstance(entry, torch.nn.ModuleList) else [entry]:
            metric.dist_sync_on_step = True

    def step(preds: Batch, target: Batch) -> Tensor:
        shared = {key: target[key] for key in ("atom_types", "num_atoms")}
        return manager({**preds, **shared}, target)["weighted_sum"]

    return step


def _types(num_types: int) -> tuple[list[str], dict[str, float]]:
    names = [f"X{index}" for index in range(num_types)]
    return names, dict(zip(names, torch.linspace(1, 2, num_types).tolist(), strict=True))


def make_batch(num_types: int, num_graphs: int, num_atoms: int, rank: int, device: torch.device) -> tuple[Batch, Batch]:
    """Predictions that want gradients and labels; every type on every rank, unequal atoms."""
    generator = torch.Generator().manual_seed(rank)
    sizes = torch.randint(num_atoms // 2, num_atoms * 3 // 2, (num_graphs,), generator=generator)
    total = max(int(sizes.sum()), num_types)
    sizes[-1] += total - int(sizes.sum())
    types = torch.arange(total) % num_types
    target = {
        "total_energy": torch.randn(num_graphs, 1, generator=generator, dtype=torch.float64),
        "forces": torch.randn(total, 3, generator=generator),
        "atom_types": types,
        "num_atoms": sizes,
    }
    preds = {
        "total_energy": torch.randn(num_graphs, 1, generator=generator, dtype=torch.float64),
        "forces": torch.randn(total, 3, generator=generator),
    }
    return (
        {key: value.to(device).requires_grad_() for key, value in preds.items()},
        {key: value.to(device) for key, value in target.items()},
    )


def run_step(step: Step, preds: Batch, target: Batch) -> Tensor:
    """Forward and backward, as a training does it."""
    for value in preds.values():
        value.grad = None
    loss = step(preds, target)
    (loss * gradient_scale()).backward()
    return loss.detach()


def count(step: Step, preds: Batch, target: Batch) -> tuple[int, int, int]:
    """Collectives, host synchronisations and aten operators of one step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_step(step, preds, target)
    names = [event.name for event in profiler.events()]
    collectives = sum(name.startswith("c10d::") for name in names)
    return collectives, sum(name in HOST_SYNCS for name in names), sum(name.startswith("aten::") for name in names)


@dataclass
class Contest:
    """One loss over one batch, with what was seen of it."""

    name: str
    num_types: int
    step: Step
    preds: Batch
    target: Batch
    counts: tuple[int, int, int] = (0, 0, 0)
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def contests(num_types: int, arguments: argparse.Namespace, rank: int, device: torch.device) -> list[Contest]:
    """Contestants on the same batch, once they have been seen to compute the same loss."""
    preds, target = make_batch(num_types, arguments.graphs, arguments.atoms, rank, device)
    steps = {
        "minimum": MinimumStep(num_types, device),
        "harness": harness_step(num_types, device),
        "nequip": nequip_step(num_types, device),
    }
    found = [Contest(name, num_types, step, preds, target) for name, step in steps.items() if step is not None]
    losses = [[run_step(each.step, preds, target) for _ in range(3)][-1].item() for each in found]
    for each, loss in zip(found, losses, strict=True):
        if abs(loss - losses[0]) > 1e-5 * abs(losses[0]):
            raise RuntimeError(f"{each.name} computes {loss}, the minimum {losses[0]}: not the same loss")
        each.counts = count(each.step, preds, target)
    return found


def measure(found: list[Contest], rounds: int, device: torch.device) -> None:
    """Time all contestants with all numbers of types in turns, so that none has a quieter machine than another."""
    for _ in range(rounds):
        for each in found:
            repeats = 1 if each.name == "nequip" else 10
            dist.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                run_step(each.step, each.preds, each.target)
            if device.type == "cuda":
                torch.cuda.synchronize()
            each.seconds.append((time.perf_counter() - start) / repeats)


def report(found: list[Contest]) -> None:
    """Print a table for each number of types, with the ratios."""
    one_type = {each.name: each.median for each in reversed(found)}
    for num_types in dict.fromkeys(each.num_types for each in found):
        group = {each.name: each for each in found if each.num_types == num_types}
        print(f"\n{num_types} types")
        print(
            " " * 9 + f"collectives  host syncs  aten ops      median  / minimum  / {found[0].num_types} type".rjust(67)
        )
        for name, each in group.items():
            collectives, syncs, operators = each.counts
            print(
                f"{name:9}{collectives:>12}{syncs:>12}{operators:>10}{each.median * 1e3:>9.3f} ms"
                f"{each.median / group['minimum'].median:>11.2f}{each.median / one_type[name]:>10.2f}"
            )
        if "nequip" in group:
            faster = group["nequip"].median / group["harness"].median
            print(f"harness is {faster:.0f} times as fast as nequip")
        else:
            print("NequIP is not installed: pip install nequip to compare with it.")


def worker(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank; rank 0 prints."""
    torch.set_num_threads(1)
    device = torch.device(arguments.device, rank) if arguments.device == "cuda" else torch.device("cpu")
    dist.init_process_group(
        "nccl" if arguments.device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=arguments.ranks,
        timeout=datetime.timedelta(minutes=5),
    )
    found = [each for num_types in arguments.types for each in contests(num_types, arguments, rank, device)]
    measure(found, arguments.rounds, device)
    if rank == 0:
        atoms = arguments.graphs * arguments.atoms
        print(f"torch {torch.__version__}, {arguments.ranks} ranks on {arguments.device}, about {atoms} atoms a rank")
        report(found)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of the profiler or of gloo abort one process in five or so that takes down its group itself


def main() -> None:
    """Parse the command line and run the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=int, nargs="+", default=[1, 20, 89], help="numbers of atom types")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--graphs", type=int, default=8, help="structures a rank")
    parser.add_argument("--atoms", type=int, default=64, help="atoms a structure, about")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}  # the profiler is talkative
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (arguments, str(Path(folder) / "rendezvous")), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
