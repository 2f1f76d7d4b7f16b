"""Models: batch dictionary → predicted energies, forces and stresses."""

from harness.models.build import schnet_force_field
from harness.models.force_field import ForceField
from harness.models.scale_shift import ScaleShift, isolated_atom_energies, reference_energies
from harness.models.schnet import SchNetEnergy

__all__ = [
    "ForceField",
    "ScaleShift",
    "SchNetEnergy",
    "isolated_atom_energies",
    "reference_energies",
    "schnet_force_field",
]
