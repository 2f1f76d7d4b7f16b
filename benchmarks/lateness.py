"""Cost of ranks that are late in turn: one in its forward pass, another in its backward pass, in the same step.

    python benchmarks/lateness.py                      # 2 gloo ranks, late by 100 ms
    python benchmarks/lateness.py --late 0.2 --steps 40

In every step one rank sleeps within its forward pass and the next one within its backward pass; they swap with each
step. A step that waits between its passes pays for both, one that does not for one of them. The rest of a step is a
small model under ``DistributedDataParallel``, whose gradients all ranks wait for in any case. Contestants:

* ``announced``: the loss with the counts of the step announced before the forward pass (``MetricsManager.window``), as
  in every training step of ``ForceFieldModule``;
* ``merged``: the same loss, whose rows are merged before the backward pass, as one that is not linear needs it.

Printed is what a step takes more than without late ranks, divided by the time that a rank is late.
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
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness import EnergyForceLoss
from harness.distributed import gradient_scale
from harness.metrics import begin_step

WAYS = ("announced", "merged")


class Late(nn.Module):
    """A model of energies and forces whose passes can be made to take longer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.in_forward = self.in_backward = 0.0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions by field name, late by ``in_forward`` seconds; their gradient is late by ``in_backward``."""
        time.sleep(self.in_forward)
        forces: Tensor = self.layer(batch["pos"])
        seconds = self.in_backward
        forces.register_hook(lambda gradient: time.sleep(seconds))
        return {"forces": forces, "total_energy": forces.sum().reshape(1, 1)}


def measure(way: str, rank: int, arguments: argparse.Namespace, late: float) -> float:
    """Median seconds of a step."""
    torch.manual_seed(rank)
    model = Late()
    wrapped = DistributedDataParallel(model)
    loss = EnergyForceLoss()
    batch = {
        "pos": torch.randn(16 + rank, 3),
        "forces": torch.randn(16 + rank, 3),
        "total_energy": torch.zeros(1, 1),
        "num_atoms": torch.tensor([16 + rank]),
    }
    seconds = []
    for step in range(arguments.steps + 2):
        turn = (rank + step) % arguments.ranks
        model.in_forward, model.in_backward = late * (turn == 0), late * (turn == 1)
        dist.barrier()
        start = time.perf_counter()
        window = loss.window([batch] if way == "announced" else None)
        running = begin_step(loss, preds=wrapped(batch), target=batch, window=window)
        (running.own.weighted_sum * gradient_scale()).backward()
        running.value().to_host()  # behind the backward pass, as a guard or a logger reads it
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first steps look at the labels, and wait


def worker(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=arguments.ranks,
        timeout=datetime.timedelta(minutes=5),
    )
    if rank == 0:
        print(f"torch {torch.__version__}, {arguments.ranks} gloo ranks, late by {1e3 * arguments.late:.0f} ms")
    for way in WAYS:
        punctual, late = (measure(way, rank, arguments, seconds) for seconds in (0.0, arguments.late))
        if rank == 0:
            times = (late - punctual) / arguments.late
            print(
                f"{way:10} {1e3 * punctual:8.1f} ms  late {1e3 * late:8.1f} ms  more: {times:5.2f} times the lateness"
            )
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Parse the command line and run the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--late", type=float, default=0.1, help="seconds")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (arguments, str(Path(folder) / "rendezvous")), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
