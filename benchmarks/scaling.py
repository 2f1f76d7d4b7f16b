"""Messages and bytes of a job as its ranks grow: counted at a start, in a step, at a checkpoint, a fault and a restart.

    python benchmarks/scaling.py                       # 2, 8, 32 and 64 ranks on this machine
    python benchmarks/scaling.py --ranks 2 4 --beyond 4096

The ranks are light processes, forked once everything is imported, and without a model. They meet at a store that a
process of its own keeps, as torchrun's agent does, and call what a training calls, over gloo: the rendezvous, the
agreement on a real configuration, the merge of a loss, the gather of a checkpoint's random states, the report of a rank
that is lost, and the rendezvous of the ranks that are started in their place, at the same store.

Counts are the kernel's (``TCP_INFO``), taken of every socket of every rank between two phases, so that they have what
torch and gloo send by themselves, too:

* ``store requests``: messages to the store, of all ranks together; each is answered, by one process;
* ``store KiB``: to the store and back, of all ranks together;
* ``sent by a rank``: messages to other ranks, of the rank that sends most;
* ``KiB of rank 0`` and ``KiB of another``: to and from other ranks, of rank 0 and of the other rank with most.

Laws of growth are fitted by least squares of relative deviations, the simplest of those within a tenth: a constant,
log N, N, N log N, N², N³, each with a constant beside it. Collectives of gloo are those of a ring; with NCCL a rank
sends as many bytes, and waits for log N messages where trees are used. The last table is work without messages: what
every rank does for all ranks when it divides a global batch, 8 frames for each.
"""

from __future__ import annotations

import os
import sys

# this folder, where logging.py would be found in the place of Python's own
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import argparse
import multiprocessing
import pickle
import signal
import socket
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir

from harness import EnergyForceLoss, compute_together
from harness.callbacks import ResumeCheckpoint
from harness.config.resolvers import config_folder
from harness.data import TrainingBatchSampler
from harness.distributed import Board, gather_to_first, join, max_over_ranks, share, sum_over_ranks
from harness.distributed.rendezvous import start_prefix
from harness.job.consistency import Facts, facts, refusal
from harness.job.failures import FailureReporter, TrainingPosition
from harness.metrics import begin_step

NUM_TYPES = 89
NUM_PARAMETERS = 25_000
ATOMS_OF_PREDICTIONS = 100_000
LIMIT = timedelta(seconds=120)
FORK = multiprocessing.get_context("fork")
WHAT = ("store requests", "store KiB", "sent by a rank", "KiB of rank 0", "KiB of another")


@dataclass(frozen=True)
class Counts:
    """Traffic of a rank: messages and bytes, with the store and with other ranks."""

    store_requests: int = 0
    store_bytes: int = 0
    sent: int = 0
    bytes: int = 0

    def since(self, before: Counts) -> Counts:
        """Difference of two counts."""
        return Counts(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))


def traffic(store_port: int) -> Counts:
    """Counts of all sockets of this process so far."""
    found = [0, 0, 0, 0]
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as each:
                if each.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                first = 0 if each.getpeername()[1] == store_port else 2
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (received,), (sent,) = struct.unpack_from("=Q", info, 128), struct.unpack_from("=Q", info, 200)
            found[first] += struct.unpack_from("=I", info, 156)[0]
            found[first + 1] += received + sent
    return Counts(*found)


# --- what a rank does ---


def phases(rank: int, num_ranks: int, in_common: Facts, folder: Path) -> Iterator[str]:
    """Go through a job, and give a name to each part once it is done."""
    prefix = start_prefix()
    yield "start: ranks meet"
    share("output_dir", str(folder))
    refusal(None, in_common, LIMIT)
    share("resume", "{}", LIMIT)
    yield "start: agreement on settings and data"
    join("gloo", LIMIT)
    board = Board()
    board.put(f"host/{rank}", socket.gethostname())
    yield "start: process group"
    names = [f"X{number}" for number in range(NUM_TYPES)]
    loss = EnergyForceLoss(per_type_forces_coeffs=dict.fromkeys(names, 1.0), type_names=names)
    types = torch.arange(4) % NUM_TYPES
    target = {
        "total_energy": torch.zeros(1, 1),
        "forces": torch.zeros(4, 3),
        "atom_types": types,
        "num_atoms": torch.tensor([4]),
    }
    preds = {"total_energy": torch.ones(1, 1, requires_grad=True), "forces": torch.ones(4, 3, requires_grad=True)}
    announces = loss.announces(target)  # asked once in a training
    yield "first step: can counts be announced?"
    step = begin_step(loss, preds=preds, target=target, window=loss.window([target] if announces else None))
    cast(torch.Tensor, step.own.weighted_sum).backward()
    step.values()
    yield f"step: loss, {NUM_TYPES} types"
    sum_over_ranks(torch.zeros(NUM_PARAMETERS))
    yield f"step: gradients of {NUM_PARAMETERS} parameters"
    max_over_ranks(torch.zeros(2, dtype=torch.float64))
    yield "logged step: rates"
    compute_together([loss])
    yield "epoch end: values"
    total = {"epoch_progress": {"total": {"started": 1, "processed": 1, "completed": 0}}}
    ResumeCheckpoint(folder).on_save_checkpoint(None, None, {"loops": {"fit_loop": total}})  # type: ignore[arg-type]
    yield "checkpoint: random states"
    mine = range(rank, ATOMS_OF_PREDICTIONS // 100, num_ranks)
    gather_to_first({number: {"forces": np.zeros((100, 3))} for number in mine})
    yield f"predictions of {ATOMS_OF_PREDICTIONS} atoms"
    board.read("failure")
    yield "faults: one look at the board"
    reporter = FailureReporter(TrainingPosition(), LIMIT)
    if rank == num_ranks - 1 and prefix:  # it is lost without a word
        return
    reporter.end_with(RuntimeError("Connection closed by peer"))
    yield "faults: a rank is lost"


def phases_again(rank: int, num_ranks: int, in_common: Facts, folder: Path) -> Iterator[str]:
    """Start of ranks at a store that has the keys of an earlier start."""
    start_prefix()
    yield "restart: ranks meet again"


Phases = Callable[[int, int, Facts, Path], Iterator[str]]


def run_rank(rank: int, num_ranks: int, port: int, attempt: int, barriers: Any, in_common: Facts, folder: Path) -> None:
    """One rank, from its fork to its end; what it has counted is in a file, by phase."""
    signal.alarm(int(3 * LIMIT.total_seconds()))
    sys.stderr.flush()
    os.dup2(os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "benchmark",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }
    found: dict[str, Counts] = {}
    made: Phases = phases_again if attempt else phases
    try:
        before = Counts()
        for name in made(rank, num_ranks, in_common, folder):
            is_last = name.startswith("faults: a rank")
            barriers[is_last].wait()  # all have sent what they send in this phase
            now = traffic(port)
            if is_last:  # connections between ranks are closed by then, and their counts gone
                now = Counts(now.store_requests, now.store_bytes, before.sent, before.bytes)
            found[name], before = now.since(before), now
            barriers[is_last].wait()
        (folder / f"counts.{attempt}.{rank}").write_bytes(pickle.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def keep_store(connection: Any) -> None:
    """Keep a store until this process is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection.send(store.port)
    signal.pause()


def count(num_ranks: int, in_common: Facts) -> dict[str, dict[str, float]]:
    """Counts of a job of so many ranks: of each phase, by what is counted."""
    ours, theirs = FORK.Pipe()
    keeper = FORK.Process(target=keep_store, args=(theirs,), daemon=True)
    keeper.start()
    port = ours.recv()
    by_rank: list[dict[str, Counts]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="scaling-") as name:
            folder = Path(name)
            for attempt in range(2):
                barriers = (FORK.Barrier(num_ranks), FORK.Barrier(max(num_ranks - 1, 1)))
                ranks = [
                    FORK.Process(target=run_rank, args=(rank, num_ranks, port, attempt, barriers, in_common, folder))
                    for rank in range(num_ranks)
                ]
                for process in ranks:
                    process.start()
                for process in ranks:
                    process.join()
                if any(process.exitcode for process in ranks):
                    failed = next(rank for rank, process in enumerate(ranks) if process.exitcode)
                    text = (folder / f"stderr.{failed}").read_text()[-3000:]
                    raise RuntimeError(f"rank {failed} of {num_ranks} ended with {ranks[failed].exitcode}:\n{text}")
                files = [folder / f"counts.{attempt}.{rank}" for rank in range(num_ranks)]
                by_rank += [pickle.loads(file.read_bytes()) for file in files]
    finally:
        keeper.kill()
        keeper.join()
    table: dict[str, dict[str, float]] = {}
    for phase in dict.fromkeys(phase for each in by_rank for phase in each):
        every = [each[phase] for each in by_rank if phase in each]
        table[phase] = dict(
            zip(
                WHAT,
                (
                    sum(each.store_requests for each in every),
                    sum(each.store_bytes for each in every) / 1024,
                    max(each.sent for each in every),
                    every[0].bytes / 1024,
                    max((each.bytes for each in every[1:]), default=0) / 1024,
                ),
                strict=True,
            )
        )
    return table


# --- laws of growth ---

LAWS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.zeros_like,
    "log N": np.log2,
    "N": np.asarray,
    "N log N": lambda n: n * np.log2(n),
    "N²": np.square,
    "N³": lambda n: n**3,
}


def law(ranks: np.ndarray, values: np.ndarray, beyond: int) -> tuple[str, float]:
    """Name of the simplest law within a tenth of all values, or the closest one, and its value at ``beyond`` ranks."""
    if len(ranks) < 3:  # of which anything could be said
        return "?", float("nan")
    found: dict[str, tuple[float, float]] = {}
    weights = 1 / np.maximum(np.abs(values), 1e-12)
    for name, function in LAWS.items():
        columns = np.stack([np.ones_like(ranks), function(ranks)], axis=1)[:, : 1 if name == "constant" else 2]
        fit = np.linalg.lstsq(columns * weights[:, None], values * weights, rcond=None)[0]
        worst = float(np.abs((columns @ fit - values) * weights).max())
        at = np.stack([np.ones(1), function(np.array([float(beyond)]))], axis=1)[:, : len(fit)]
        found[name] = (worst, float((at @ fit)[0]))
    chosen = next((name for name, (worst, _) in found.items() if worst < 0.1), None)
    chosen = chosen or min(found, key=lambda name: found[name][0])
    return chosen, found[chosen][1]


def seconds_of_division(num_ranks: int, steps: int = 20) -> float:
    """Processor time of one rank for its part of a step's global batch, divided by sizes."""
    batch = 8 * num_ranks
    sizes = np.random.default_rng(0).integers(4, 200, batch * steps)
    sampler = TrainingBatchSampler(batch * steps, batch, 0, num_ranks, sizes=sizes)
    begin = time.process_time()
    assert len(list(sampler)) == steps
    return (time.process_time() - begin) / steps


def shown(value: float) -> str:
    """A count in a table."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32, 64], help="numbers of ranks, at least 2")
    parser.add_argument("--beyond", type=int, default=1000, help="ranks that the laws are continued to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        in_common = facts(compose("train", ["output_dir=."]), None)
    tables = {}
    for num_ranks in options.ranks:
        begin = time.monotonic()
        tables[num_ranks] = count(num_ranks, in_common)
        print(f"{num_ranks} ranks counted in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    ranks = np.array(options.ranks, dtype=float)
    columns = " | ".join(map(str, options.ranks))
    print(f"| phase | counted | {columns} ranks | grows as | {options.beyond} ranks |")
    print("| --- " * (len(options.ranks) + 4) + "|")
    for phase, row in tables[options.ranks[0]].items():
        for what in row:
            values = np.array([tables[num_ranks][phase][what] for num_ranks in options.ranks])
            if not values.any():
                continue
            name, at = law(ranks, values, options.beyond)
            print(f"| {phase} | {what} | {' | '.join(map(shown, values))} | {name} | {shown(at)} |")
    print()
    print("| ranks | time of a rank to divide a global batch, over that for 2 ranks |")
    print("| --- | --- |")
    of_two = seconds_of_division(2)
    for num_ranks in sorted({*options.ranks, options.beyond}):
        print(f"| {num_ranks} | {seconds_of_division(num_ranks) / of_two:.1f} |")


if __name__ == "__main__":
    main()
