"""Ranks on one device: NCCL with one and, where it allows that, two ranks, and gloo with two on tensors of the GPU."""

from __future__ import annotations

import datetime
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Sizes, benchmark, synchronize

NUM_TYPES = 89


def worker(rank: int, backend: str, num_ranks: int, kind: str, folder: str) -> None:
    """One rank: loss steps, and all-reduces of a row of their size; rank 0 writes what it has seen."""
    torch.set_num_threads(1)
    device = torch.device(kind, 0 if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    sizes, step = Sizes.of(device), benchmark("step")
    preds, target = step.make_batch(NUM_TYPES, sizes.graphs, 32, rank, device)
    contestants = {name: getattr(step, name)(NUM_TYPES, device) for name in ("MinimumStep", "harness_step")}
    losses = {
        name: [step.run_step(run, preds, target) for _ in range(3)][-1].item() for name, run in contestants.items()
    }
    row = torch.zeros(2 * (NUM_TYPES + 1), dtype=torch.float64, device=device)
    runs = {"all-reduce": lambda: dist.all_reduce(row)} | {
        name: lambda run=run: step.run_step(run, preds, target) for name, run in contestants.items()
    }
    times = {}
    for name, run in runs.items():
        rounds = []
        for _ in range(3 * sizes.rounds):
            dist.barrier()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(2 * sizes.steps):
                run()
            synchronize(device)
            rounds.append((time.perf_counter() - start) / (2 * sizes.steps))
        times[name] = statistics.median(rounds)
    gathered: list[object] = [None] * num_ranks
    dist.all_gather_object(gathered, losses)
    agree = (
        len({str(each) for each in gathered}) == 1 and abs(losses["harness_step"] / losses["MinimumStep"] - 1) < 1e-5
    )
    if rank == 0:
        cells = " | ".join(f"{times[name] * 1e6:.0f} µs" for name in runs)
        Path(folder, "row").write_text(f"{cells} | {'the same on all ranks' if agree else gathered}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo can abort a process that takes down its group


def tables(device: torch.device) -> str:
    """Table of what backends do on one device."""
    wanted = [("nccl", 1), ("nccl", 2), ("gloo", 2)] if device.type == "cuda" else [("gloo", 1), ("gloo", 2)]
    lines = [
        f"All-reduce of {2 * (NUM_TYPES + 1)} float64 numbers, and the loss step at {NUM_TYPES} types, on one "
        f"{'GPU' if device.type == 'cuda' else 'CPU'}.",
        "",
        "| backend | ranks | all-reduce | minimum | harness | losses |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    failures = []
    for backend, num_ranks in wanted:
        with tempfile.TemporaryDirectory() as folder:
            try:
                mp.spawn(worker, (backend, num_ranks, device.type, folder), nprocs=num_ranks)
                row = Path(folder, "row").read_text()
            except Exception as error:
                reason = next((line for line in str(error).splitlines() if "uplicate GPU" in line), str(error)[-300:])
                row = f"does not run: {' '.join(reason.split()).replace('|', '/')} | | |"
                failures += [(backend, num_ranks)]
        lines.append(f"| {backend} | {num_ranks} | {row} |")
    if any(failure != ("nccl", 2) for failure in failures):  # NCCL takes a GPU for one rank only
        raise RuntimeError("\n".join(lines))
    return "\n".join(lines)
