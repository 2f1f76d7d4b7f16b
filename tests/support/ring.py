"""Ranks in a ring of collectives, of which one is killed: started by a test as ``python -m support.ring RANKS FOLDER``.

Prints the seconds from the kill until all have left, and their exit codes; what a rank says is in ``stderr.RANK``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from harness.distributed import join
from harness.job.failures import TrainingPosition, reported
from harness.runs import JobFailed

LIMIT = timedelta(seconds=100)


def run_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.dup2(os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    join("gloo", LIMIT)
    try:
        with reported(TrainingPosition(), LIMIT):
            for step in range(10**6):
                if step == 5 and rank == ranks // 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                dist.all_reduce(torch.ones(10))
    except JobFailed:
        os._exit(1)


def main() -> None:
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(rank, ranks, port, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    processes[ranks // 2].join()
    killed = time.monotonic()
    for process in processes:
        process.join(max(0.0, killed + 60 - time.monotonic()))
    print(time.monotonic() - killed, [process.exitcode for process in processes], flush=True)
    for process in processes:
        process.kill()


if __name__ == "__main__":
    main()
