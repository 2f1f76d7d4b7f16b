"""Per-atom energies by SchNet, on the edges that the batch brings along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.nn.models import SchNet

from harness.models.geometry import edge_lengths, edge_vectors
from harness.support.checks import is_number, is_whole_number

__all__ = ["SchNetEnergy"]

_NUM_EMBEDDINGS = 100  # rows of PyTorch Geometric's embedding table; row 0 stands for padding


class _PerAtom(Aggregation):
    """Readout that returns the values of the atoms, without a sum."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The base class asks the device for the number of graphs here, which would make the host wait.
        return x

    forward = __call__


def _given_edges(edges: tuple[Tensor, Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
    """Interaction graph of :class:`SchNet` that is handed its edges in the place of the positions."""
    return edges


class SchNetEnergy(nn.Module):
    r"""Energy :math:`\varepsilon_i` of each atom by continuous-filter convolutions, ``[num_atoms, 1]``.

    .. math:: x_i \leftarrow x_i + f\Big(\sum_{j \in N(i)} x_j \odot W(|v_{ij}|)\, C(|v_{ij}|)\Big), \qquad
              C(d) = \tfrac12\big(\cos(\pi d / r_\mathrm{cut}) + 1\big)

    PyTorch Geometric's ``SchNet`` with the periodic neighbour list of the batch as its interaction graph and without
    the sum over atoms. Reads ``pos``, ``cell``, ``batch``, ``atomic_numbers``, ``edge_index`` and
    ``edge_cell_shift``; depends on the positions through distances only.

    Args:
        cutoff: length in Å at which the filters vanish; the neighbour list must reach as far.
        hidden_channels: features of an atom.
        num_filters: features of a convolution.
        num_interactions: number of interaction blocks.
        num_gaussians: radial basis functions between 0 and the cutoff.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if a size is too small or the cutoff not positive.

    Reference:
        K. T. Schütt et al., "SchNet: A continuous-filter convolutional neural network for modeling quantum
        interactions", NeurIPS 2017.
    """

    takes_empty_batches = True
    max_atomic_number = _NUM_EMBEDDINGS - 1

    def __init__(
        self,
        cutoff: float,
        hidden_channels: int = 64,
        num_filters: int = 64,
        num_interactions: int = 3,
        num_gaussians: int = 32,
    ) -> None:
        super().__init__()
        if not is_number(cutoff) or not float(cutoff) > 0:
            raise ValueError(f"cutoff must be a positive number of Å, found {cutoff}")
        smallest = {"hidden_channels": 2, "num_filters": 1, "num_interactions": 1, "num_gaussians": 2}
        sizes = {
            "hidden_channels": hidden_channels,
            "num_filters": num_filters,
            "num_interactions": num_interactions,
            "num_gaussians": num_gaussians,
        }
        for name, size in sizes.items():
            if not is_whole_number(size):
                raise TypeError(f"{name} must be a whole number, found {size!r}")
            if size < smallest[name]:
                raise ValueError(f"{name} must be at least {smallest[name]}, found {size}")
        self.cutoff = float(cutoff)
        self.schnet = SchNet(**sizes, cutoff=self.cutoff, interaction_graph=_given_edges, readout=_PerAtom())

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Energies ``[num_atoms, 1]`` of the atoms, in the dtype of the parameters."""
        lengths = edge_lengths(edge_vectors(batch)).to(self.schnet.lin1.weight.dtype)
        # messages run from row 0 to row 1 there: from the neighbour to the centre
        edges = (batch["edge_index"].flip(0), lengths)
        outputs: Tensor = self.schnet(batch["atomic_numbers"], edges, batch["batch"])
        return outputs
