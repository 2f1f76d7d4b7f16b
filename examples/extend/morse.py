"""A model of your own: Morse potentials between pairs of atom types, whose depths, widths and lengths are learnt.

PYTHONPATH=examples/extend harness-train --config-dir examples/extend/conf model=morse
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from harness.data import DataStatistics
from harness.models import ForceField, ScaleShift
from harness.models.geometry import edge_lengths, edge_vectors


class MorseEnergy(nn.Module):
    r"""Energy of each atom in eV, ``[num_atoms, 1]``: half of the energies of its pairs.

    .. math:: \varepsilon_i = \tfrac12 \sum_{j \in N(i)} C(d_{ij})\, D \big((1 - e^{-a (d_{ij} - d_0)})^2 - 1\big)

    with :math:`D, a, d_0` of the pair of types, and a function :math:`C` that ends smoothly at the cutoff.

    Args:
        num_types: number of atom types.
        cutoff: in Å, that of the neighbour lists.
    """

    def __init__(self, num_types: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        # logarithms, which stay meaningful wherever the optimizer takes them: eV, 1/Å, Å
        start = torch.tensor([0.3, 1.5, 2.7]).log()
        self.logarithms = nn.Parameter(start.repeat(num_types, num_types, 1))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Energies of the atoms, from ``pos`` and ``cell`` differentiably: forces are derived from them."""
        types = batch["atom_types"]
        center, neighbor = batch["edge_index"]
        lengths = edge_lengths(edge_vectors(batch))
        symmetric = 0.5 * (self.logarithms + self.logarithms.transpose(0, 1))
        depth, width, length = symmetric[types[center], types[neighbor]].exp().unbind(-1)
        pair = depth * ((1 - torch.exp(-width * (lengths - length))).square() - 1)
        smooth = 0.5 * (torch.cos(torch.pi * lengths / self.cutoff) + 1) * (lengths < self.cutoff)
        energies = pair.new_zeros(len(types)).index_add(0, center, 0.5 * smooth * pair)
        return energies.unsqueeze(-1)


def morse_force_field(statistics: DataStatistics, *, cutoff: float, stress: bool = True) -> ForceField:
    """The model of a config: energies, forces and stresses, from what is known of the training set.

    Args:
        statistics: given by ``harness-train``, which hands it to a target with a parameter of this name, as it does
            with ``type_names``.
        cutoff: in Å.
        stress: whether stresses are predicted.
    """
    energy = MorseEnergy(len(statistics.type_names), cutoff)
    shifts = statistics.energy_shifts.tolist()  # eV of each type, by least squares
    return ForceField(ScaleShift(energy, [1.0] * len(shifts), shifts), derive_stress=stress)
