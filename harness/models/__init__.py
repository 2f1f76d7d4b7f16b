"""Models: batch dictionary → predicted energies, forces and stresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.models.force_field import ForceField
from harness.models.scale_shift import (
    ScaleShift,
    isolated_atom_energies,
    reference_energies,
    set_reference_energies,
)

if TYPE_CHECKING:
    from harness.models.build import schnet_force_field
    from harness.models.schnet import SchNetEnergy

__all__ = [
    "ForceField",
    "ScaleShift",
    "SchNetEnergy",
    "isolated_atom_energies",
    "reference_energies",
    "schnet_force_field",
    "set_reference_energies",
]


def __getattr__(name: str) -> Any:
    """Import SchNet when it is asked for: PyTorch Geometric takes a quarter of the time of a start."""
    if name == "schnet_force_field":
        from harness.models.build import schnet_force_field

        return schnet_force_field
    if name == "SchNetEnergy":
        from harness.models.schnet import SchNetEnergy

        return SchNetEnergy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
