"""A structure that is made up: what an exported model is tried on, and the example that NequIP's tools want."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ase import Atoms

__all__ = ["example_structure"]


def example_structure(type_names: Sequence[str], cutoff: float) -> Atoms:
    """A periodic crystal with every element, disordered, whose atoms have neighbours within the cutoff.

    A simple cubic lattice of at least 8 atoms, 2.5 Å apart or 0.6 times the cutoff if that is less. Displacements have
    a standard deviation of 4 % of the distance. No structure of a training is in it, and it is always the same.

    Args:
        type_names: chemical symbols.
        cutoff: in Å.
    """
    sites = max(2, math.ceil(len(type_names) ** (1 / 3)))
    distance = min(2.5, 0.6 * cutoff)
    generator = np.random.default_rng(0)
    positions = distance * np.stack(np.meshgrid(*[np.arange(sites)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    positions = positions + generator.normal(scale=0.04 * distance, size=positions.shape)
    symbols = [type_names[number % len(type_names)] for number in range(len(positions))]
    return Atoms(symbols, positions=positions, cell=[sites * distance] * 3, pbc=True)
