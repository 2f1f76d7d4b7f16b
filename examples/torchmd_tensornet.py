"""A model of another package: TensorNet of TorchMD-Net, with forces, stress and references from this one.

pip install torchmd-net
PYTHONPATH=examples harness-train --config-dir examples/own_config model=tensornet
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmdnet.models.output_modules import Scalar
from torchmdnet.models.tensornet import TensorNet

from harness.data import DataStatistics
from harness.models import ForceField, ScaleShift
from harness.models.geometry import edge_lengths, edge_vectors


class GivenEdges(nn.Module):
    """Neighbour search that is handed edges in the place of the positions."""

    def forward(self, edges: tuple[Tensor, Tensor, Tensor], batch: Tensor, box: None) -> tuple[Tensor, Tensor, Tensor]:
        """The edges."""
        return edges


class TensorNetEnergy(nn.Module):
    """Energy of each atom by TensorNet, ``[num_atoms, 1]``, of order one."""

    def __init__(self, cutoff: float, channels: int, num_layers: int, num_rbf: int) -> None:
        super().__init__()
        self.body = TensorNet(channels, num_layers, num_rbf, cutoff_upper=cutoff, static_shapes=False)
        self.body.distance = GivenEdges()  # the periodic neighbour list of the batch
        self.readout = Scalar(channels)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Energies of the atoms; differentiable in ``pos`` and ``cell``."""
        vectors, index = -edge_vectors(batch), batch["edge_index"]
        lengths = edge_lengths(vectors)
        own_image = (index[0] == index[1]).unsqueeze(1)  # such edges are not normalised there
        vectors = torch.where(own_image, vectors / lengths.unsqueeze(1), vectors)
        atoms = torch.arange(len(batch["pos"]), device=index.device)  # it wants each atom as its own neighbour, too
        edges = (
            torch.cat((index, atoms.expand(2, -1)), dim=1),
            torch.cat((lengths, lengths.new_zeros(len(atoms)))),
            torch.cat((vectors, vectors.new_zeros(len(atoms), 3))),
        )
        return self.readout.pre_reduce(*self.body(batch["atomic_numbers"], edges, batch["batch"]))


def tensornet_force_field(
    statistics: DataStatistics, *, cutoff: float, channels: int = 32, num_layers: int = 1, num_rbf: int = 16
) -> ForceField:
    """TensorNet for a training set: ``harness-train`` hands over its statistics."""
    energy = TensorNetEnergy(cutoff, channels, num_layers, num_rbf)
    scales = [statistics.force_rms] * len(statistics.type_names)
    return ForceField(ScaleShift(energy, scales, statistics.energy_shifts.tolist()))
