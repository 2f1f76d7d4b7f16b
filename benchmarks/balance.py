"""How unequal the ranks' work is in a step, side by side: frames dealt out in turn, and parts of similar sums.

    python benchmarks/balance.py                       # 2, 8 and 64 ranks, 8 frames on each in the mean
    python benchmarks/balance.py --ranks 4 --frames-per-rank 2

The ranks wait for the one with most to do, so that a step takes as long as the largest part and the ranks idle for

    1 - sum over steps of the mean over ranks / sum over steps of the maximum over ranks.

Samplers, with as many steps an epoch but for rounding:

* ``strided``: ``TrainingBatchSampler``, every global batch a fixed number of frames, dealt out in turn;
* ``balance``: the same global batches, divided by ``sizes``: atoms or edges;
* ``budget``: ``BudgetBatchSampler``, global batches within a budget of atoms or edges.

``mean`` and ``worst`` are those over an epoch's steps of the maximum over the mean of the ranks; ``bound`` is the mean
of what no division can be better than, since a rank cannot have less than the largest frame; ``batch`` is the largest
global batch over the mean one; ``seconds`` of processor time are those of the order and the division of an epoch. The
rest are counts, not times: that work is proportional to atoms, or to edges, is an assumption. Sizes are those of the
embedded alloy, of two data sets if they are in ``../shared/data`` beside the checkout, and drawn ones with a heavy tail
(log-normal, 4 to 500 atoms).
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import platform
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.data import (
    AtomsDataModule,
    BudgetBatchSampler,
    EmbeddedAlloyDataModule,
    GlobalBatchSampler,
    TrainingBatchSampler,
)
from harness.data.balance import balanced_shares

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
Sizes = dict[str, NDArray[np.int64]]


def sizes_of(module: AtomsDataModule) -> Sizes:
    """Atoms and edges of the training frames."""
    module.setup()
    return {"atoms": module.train_set.num_atoms(), "edges": module.train_set.num_edges()}


def data_sets(cutoff: float, num_drawn: int) -> dict[str, Sizes]:
    """Sizes of the frames of every data set at hand, and of drawn ones."""
    found = {
        "embedded alloy": sizes_of(EmbeddedAlloyDataModule(num_frames=2000, cutoff=cutoff, batch_size=1, split={}))
    }
    files = {
        "ethanol, methanol": ("ethanol_methanol/train_eth_meth.xyz", {}),
        "carbon": ("carbon/carbon_100.xyz", {"forces": "force"}),
    }
    for name, (file, keys) in files.items():
        if (SHARED / file).exists():
            found[name] = sizes_of(AtomsDataModule(SHARED / file, keys=keys, cutoff=cutoff, batch_size=1))
    generator = np.random.default_rng(0)
    atoms = np.exp(generator.normal(np.log(40), 0.9, num_drawn)).clip(4, 500).astype(np.int64)
    neighbors = generator.uniform(20, 60, len(atoms)).clip(max=atoms - 1)  # differing densities
    return {**found, "heavy tail": {"atoms": atoms, "edges": (atoms * neighbors).astype(np.int64)}}


def parts(sampler: GlobalBatchSampler, num_ranks: int) -> list[list[NDArray[np.int64]]]:
    """Samples of every rank in every step of an epoch."""
    return [
        [batch[rank::num_ranks] for rank in range(num_ranks)]
        if sampler.sizes is None
        else [batch[share] for share in balanced_shares(sampler.sizes[batch], num_ranks)]
        for batch in sampler.global_batches()
    ]


def measure(work: NDArray[np.int64], steps: list[list[NDArray[np.int64]]]) -> dict[str, float]:
    """Mean, bound and worst imbalance of the ranks, idle share, and largest over mean global batch."""
    shares = np.array([[work[part].sum() for part in of_step] for of_step in steps])
    largest_frame = np.array([max(work[part].max() for part in of_step) for of_step in steps])
    mean, most, totals = shares.mean(axis=1), shares.max(axis=1), shares.sum(axis=1)
    return {
        "mean": (most / mean).mean(),
        "bound": (np.maximum(largest_frame, mean) / mean).mean(),
        "worst": (most / mean).max(),
        "idle": 1 - mean.sum() / most.sum(),
        "batch": totals.max() / totals.mean(),
    }


def samplers(
    sizes: NDArray[np.int64], unit: str, num_ranks: int, frames_per_rank: int
) -> dict[str, GlobalBatchSampler]:
    """The contestants: as many steps an epoch."""
    num_batches = max(1, len(sizes) // (frames_per_rank * num_ranks))
    # 2 % more than the mean batch has: no packing of whole frames is exact
    by_budget = BudgetBatchSampler(sizes, int(1.02 * sizes.sum() / num_batches), 0, num_ranks, unit=unit)
    batch_size = -(-len(sizes) // len(by_budget))
    return {
        "strided": TrainingBatchSampler(len(sizes), batch_size, 0, num_ranks),
        "balance": TrainingBatchSampler(len(sizes), batch_size, 0, num_ranks, sizes=sizes),
        "budget": by_budget,
    }


def report(name: str, sizes: Sizes, num_ranks: int, frames_per_rank: int) -> None:
    """Print a line for each unit and sampler."""
    for unit, work in sizes.items():
        try:
            contestants = samplers(work, unit, num_ranks, frames_per_rank)
        except ValueError as error:
            print(f"{name:18}{num_ranks:>5}  {unit}: left out, {str(error).partition(';')[0]}")
            continue
        for kind, sampler in contestants.items():
            start = time.process_time()
            steps = parts(sampler, num_ranks)
            seconds = time.process_time() - start
            seen = measure(work, steps)
            print(
                f"{name:18}{num_ranks:>5}  {unit:6} {kind:8}{len(steps):>6}{seen['mean']:>8.3f}{seen['bound']:>8.3f}"
                f"{seen['worst']:>8.3f}{seen['idle']:>8.1%}{seen['batch']:>8.3f}{seconds:>9.3f}"
            )


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--frames-per-rank", type=int, default=8, help="in the mean")
    parser.add_argument("--drawn", type=int, default=20_000, help="number of drawn frames")
    parser.add_argument("--cutoff", type=float, default=4.5, help="of the neighbour lists, in Å")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, NumPy {np.__version__}; {arguments.frames_per_rank} frames a rank")
    columns = "".join(f"{column:>8}" for column in ("mean", "bound", "worst", "idle", "batch"))
    print(f"{'data':18}{'ranks':>5}  {'work':6} {'sampler':8}{'steps':>6}{columns}{'seconds':>9}")
    for name, sizes in data_sets(arguments.cutoff, arguments.drawn).items():
        for num_ranks in arguments.ranks:
            report(name, sizes, num_ranks, arguments.frames_per_rank)


if __name__ == "__main__":
    main()
