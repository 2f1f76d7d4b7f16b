"""Data, models, clocks and counters that the sections of the GPU report share."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness.data import EmbeddedAlloyDataModule, collate

Batch = dict[str, Tensor]
CUTOFF = 4.5


@dataclass(frozen=True)
class Sizes:
    """Amount of work: that of a GPU, or little of everything."""

    graphs: int
    steps: int
    warm_up: int
    rounds: int

    @classmethod
    def of(cls, device: torch.device) -> Sizes:
        """Sizes for a device."""
        return cls(64, 40, 10, 3) if device.type == "cuda" else cls(2, 2, 1, 1)


def benchmark(name: str) -> ModuleType:
    """Another benchmark of the folder above, which must not be on the path: its logging.py would hide Python's."""
    spec = importlib.util.spec_from_file_location(
        f"benchmark_{name}", Path(__file__).resolve().parents[1] / f"{name}.py"
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alloy(device: torch.device, dtype: str = "float32") -> tuple[EmbeddedAlloyDataModule, list[Batch]]:
    """The embedded alloy, and batches of it on the host, in page-locked memory for a GPU."""
    graphs = Sizes.of(device).graphs
    data = EmbeddedAlloyDataModule(
        num_frames=2 * graphs + 4, split={"val": 2, "test": 2}, cutoff=CUTOFF, batch_size=graphs, dtype=dtype
    )
    data.setup()
    samples = [data.train_set[number] for number in range(2 * graphs)]
    batches = [collate(samples[:graphs]), collate(samples[graphs:])]
    if device.type == "cuda":
        batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches]
    return data, batches


def make_model(name: str, data: EmbeddedAlloyDataModule, device: torch.device, dtype: str = "float32") -> nn.Module:
    """SchNet, NequIP or MACE in a common size, on the device; the same initial weights in every dtype."""
    is_small = device.type != "cuda"
    torch.manual_seed(0)
    model: nn.Module
    if name == "schnet":
        from harness.models import schnet_force_field

        size = 16 if is_small else 128
        model = schnet_force_field(
            data.statistics,
            cutoff=CUTOFF,
            hidden_channels=size,
            num_filters=size,
            num_interactions=1 if is_small else 4,
        )
        model = model.double() if dtype == "float64" else model
    elif name == "nequip":
        from harness.models.nequip import nequip_force_field

        small: dict[str, Any] = {"num_layers": 1, "num_features": 4, "radial_mlp_width": 8, "parity": False}
        model = nequip_force_field(data.statistics, cutoff=CUTOFF, dtype=dtype, **(small if is_small else {}))
    else:
        from harness.models.mace import mace_force_field

        small = {"channels": 4, "max_L": 0, "max_ell": 1, "correlation": 1, "radial_mlp": (8,)}
        model = mace_force_field(data.statistics, cutoff=CUTOFF, dtype=dtype, seed=0, **(small if is_small else {}))
    return model.to(device)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device, as Lightning moves it: without a wait where it is in page-locked memory."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Timing:
    """Seconds of a step: in which the host is busy with it, and from one to the next."""

    host: list[float]
    whole: list[float]

    @classmethod
    def empty(cls) -> Timing:
        """No round yet."""
        return cls([], [])

    @property
    def medians(self) -> tuple[float, float]:
        """Medians of the rounds."""
        return statistics.median(self.host), statistics.median(self.whole)


def time_round(run: Callable[[], Any], timing: Timing, steps: int, device: torch.device) -> None:
    """Add a round of several steps, between two waits for the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    timing.host.append((time.perf_counter() - start) / steps)
    synchronize(device)
    timing.whole.append((time.perf_counter() - start) / steps)


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Places at which the host waits for the GPU within the block, with their numbers; none are seen on a CPU."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if "synchroniz" in str(each.message):
            places["/".join(Path(each.filename).parts[-3:]) + f":{each.lineno}"] += 1


def memory(device: torch.device) -> str:
    """Most memory allocated since the last reset, in GiB."""
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if device.type == "cuda" else ""


def reset_memory(device: torch.device) -> None:
    """Count the most memory from now on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def listed(places: Counter[str]) -> str:
    """Places of waits in words."""
    return "; ".join(f"`{place}` {number} times" for place, number in places.most_common(8))
