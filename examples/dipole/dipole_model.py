"""SchNet with a second network for atomic charges, which give the dipole beside energy and forces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from harness.data import DataStatistics
from harness.models import SchNetEnergy, schnet_force_field


class ChargesAndDipole(nn.Module):
    r"""Energy and forces of a force field, and charges :math:`q_i` that add up to zero, with their dipole.

    .. math:: q_i = c_i - \frac{1}{N_g} \sum_{j \in g} c_j, \qquad \mu_g = \sum_{i \in g} q_i r_i

    Args:
        force_field: predicts ``total_energy`` and ``forces``.
        charges: one number :math:`c_i` for each atom, ``[num_atoms, 1]``.
    """

    def __init__(self, force_field: nn.Module, charges: nn.Module) -> None:
        super().__init__()
        self.force_field = force_field
        self.charges = charges

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predictions, with ``dipole`` ``[num_graphs, 3]`` in e·Å and ``charges`` ``[num_atoms, 1]`` in e."""
        graph, numbers = batch["batch"], batch["num_atoms"].reshape(-1, 1)
        raw = self.charges(batch)
        mean = raw.new_zeros(len(numbers), 1).index_add(0, graph, raw) / numbers
        charges = raw - mean[graph]
        dipole = raw.new_zeros(len(numbers), 3).index_add(0, graph, charges * batch["pos"])
        return {**self.force_field(batch), "dipole": dipole, "charges": charges}


def dipole_force_field(statistics: DataStatistics, *, cutoff: float, **options: Any) -> ChargesAndDipole:
    """The model of a config.

    Args:
        statistics: of the training set.
        cutoff: in Å.
        options: of :func:`~harness.models.build.schnet_force_field`.
    """
    force_field = schnet_force_field(statistics, cutoff=cutoff, stress=False, **options)
    return ChargesAndDipole(force_field, SchNetEnergy(cutoff, 16, 16, 1, 16))
