"""Assembly of a SchNet force field from the statistics of its training set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

import torch
from ase.data import atomic_numbers

from harness.models.force_field import ForceField
from harness.models.scale_shift import ScaleShift, TypeStatistics, resolve_scales, resolve_shifts
from harness.models.schnet import SchNetEnergy
from harness.support.arguments import AtLeast, Count, Positive

__all__ = ["schnet_force_field"]


def schnet_force_field(
    statistics: TypeStatistics,
    *,
    cutoff: Positive,
    hidden_channels: Annotated[int, AtLeast(2)] = 32,
    num_filters: Count = 32,
    num_interactions: Count = 2,
    num_gaussians: Annotated[int, AtLeast(2)] = 24,
    energy_shifts: Mapping[str, float] | str | os.PathLike[str] = "fit",
    energy_scales: Mapping[str, float] | str | float = "force_rms",
    trainable_scales: bool = False,
    stress: bool = True,
    seed: int | None = None,
) -> ForceField:
    """SchNet with energies scaled and shifted by type, and the forces and stresses derived from them.

    Args:
        statistics: ``type_names``, ``energy_shifts`` and ``force_rms`` of the training set.
        cutoff: in Å; that of the neighbour lists.
        hidden_channels: features of an atom.
        num_filters: features of a convolution.
        num_interactions: number of interaction blocks.
        num_gaussians: radial basis functions between 0 and the cutoff.
        energy_shifts: see :func:`~harness.models.scale_shift.resolve_shifts`.
        energy_scales: see :func:`~harness.models.scale_shift.resolve_scales`.
        trainable_scales: train the scales.
        stress: predict stresses.
        seed: of the initial weights, which then neither depend on the global random state nor change it; None draws
            them from it.

    Raises:
        ValueError: if a type name is not the symbol of an element that SchNet can embed, or from the parts.
    """
    valid = {symbol for symbol, number in atomic_numbers.items() if 1 <= number <= SchNetEnergy.max_atomic_number}
    unknown = [name for name in statistics.type_names if name not in valid]
    if unknown:
        raise ValueError(
            f"SchNet embeds atomic numbers 1 to {SchNetEnergy.max_atomic_number}; no such element is {unknown}"
        )
    shifts = resolve_shifts(energy_shifts, statistics)
    scales = resolve_scales(energy_scales, statistics)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        energy_model = SchNetEnergy(cutoff, hidden_channels, num_filters, num_interactions, num_gaussians)
    return ForceField(ScaleShift(energy_model, scales, shifts, trainable_scales), derive_stress=stress)
