"""What all sides of a comparison share: data, order of frames, initial weights, and the CPU seconds of epochs."""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning import Callback

CUTOFF = 4.5
COLUMNS = ("per_atom_energy_rmse", "forces_rmse", "forces_mae")
CLOCK = "cpu_seconds.json"


class Clock:
    """CPU seconds of this process at the start of each epoch of training and at the end of the last one.

    Args:
        path: file that has them, in JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.marks = Path(path), []  # type: tuple[Path, list[float]]

    def mark(self) -> None:
        """Note the CPU seconds of now."""
        self.marks.append(time.process_time())
        self.path.write_text(json.dumps(self.marks))


class EpochClock(Callback):
    """:class:`Clock` of a training by Lightning.

    Args:
        path: file of the seconds.
    """

    def __init__(self, path: str) -> None:
        self.clock = Clock(path)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Mark the start of an epoch."""
        self.clock.mark()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Mark the end of the last one."""
        self.clock.mark()


class Marked:
    """Batches of a loader, with a mark whenever an epoch of them begins.

    Args:
        loader: any loader.
        mark: called at the start.
    """

    def __init__(self, loader: Any, mark: Callable[[], None]) -> None:
        self.loader, self.mark = loader, mark

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.mark()
        return iter(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def epoch_seconds(folder: Path) -> float:
    """Median of the CPU seconds of the epochs behind the first one, with validation and checkpoints."""
    marks = json.loads((folder / CLOCK).read_text())
    epochs = [after - before for before, after in itertools.pairwise(marks)]
    return statistics.median(epochs[1:] or epochs)


class InOrder:
    """Batches of given frames, those of one epoch after those of the other.

    Args:
        order: frames of each batch of each epoch.
        epoch: number of the epoch that begins.
    """

    def __init__(self, order: list[list[list[int]]], epoch: Callable[[], int]) -> None:
        self.order, self.epoch = order, epoch

    def __len__(self) -> int:
        return len(self.order[0])

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.order[self.epoch()]


def adopt(module: Any, weights: dict[str, Any]) -> None:
    """Give a module trained parameters by their names."""
    import torch

    own = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if own.keys() != weights.keys():
        raise SystemExit(f"Parameters of one side only: {sorted(own.keys() ^ weights.keys())}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name].reshape(parameter.shape))


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> float:
    """CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
