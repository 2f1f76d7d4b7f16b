"""Frames of the oracle's data one by one: repeated as often as a weight says, and chosen by set or group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support import oracle
from support.oracle import Batch

WEIGHT_OF = {"total_energy": "energy_weight", "forces": "forces_weight", "stress": "stress_weight"}


def chosen(features: Batch, target: Batch, indices: Sequence[int]) -> tuple[Batch, Batch]:
    """Frames at these positions, in this order, each as often as it is named."""
    num_frames = len(target["num_atoms"])
    frames = oracle.split(features, target, range(1, num_frames)) if num_frames > 1 else [(features, target)]
    parts = [frames[index] for index in indices] or [oracle.split(features, target, [0])[0]]
    return oracle.join([part[0] for part in parts]), oracle.join([part[1] for part in parts])


def repeated(features: Batch, target: Batch, field: str) -> tuple[Batch, Batch]:
    """Each frame as often as its whole-numbered weight for a field says."""
    times = target["weight"].clone()
    if WEIGHT_OF[field] in target:
        times *= target[WEIGHT_OF[field]]
    return chosen(features, target, [index for index, n in enumerate(times.int().tolist()) for _ in range(n)])


def weighted(seed: int, num_frames: int, choices: Sequence[float] = (0, 1, 2, 3)) -> Batch:
    """Weights of frames: of the whole, of energy and of forces."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor(list(choices), dtype=torch.float64)
    return {
        name: numbers[torch.randint(0, len(numbers), (num_frames,), generator=generator)]
        for name in ("weight", "energy_weight", "forces_weight")
    }
