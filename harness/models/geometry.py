"""Vectors and lengths of the edges of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["edge_lengths", "edge_vectors", "full_precision"]


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context in which autocast is off: products have the dtype of their factors.

    Rounded to bfloat16, a position of 10 Å is off by up to 0.03 Å. So geometry and derivatives stay out of mixed
    precision, which is for the layers of the network.
    """
    return torch.autocast(device.type, enabled=False)


def edge_vectors(batch: Mapping[str, Tensor]) -> Tensor:
    r"""Vectors from the centres to the neighbours of all edges, ``[num_edges, 3]`` in Å.

    .. math:: v_e = r_j - r_i + S_e\, h

    with :math:`i, j = ` ``edge_index[:, e]``, the cell shift :math:`S_e` and the rows of the cell :math:`h` of the
    graph. Differentiable with respect to ``pos`` and ``cell``.
    """
    center, neighbor = batch["edge_index"]
    cell = batch["cell"].index_select(0, batch["batch"].index_select(0, center))
    with full_precision(cell.device):
        shift = torch.einsum("ea,eab->eb", batch["edge_cell_shift"].to(cell.dtype), cell)
    return batch["pos"].index_select(0, neighbor) - batch["pos"].index_select(0, center) + shift


def edge_lengths(vectors: Tensor) -> Tensor:
    """Euclidean lengths ``[num_edges]`` of ``vectors`` ``[num_edges, 3]``; the gradient at zero length is zero."""
    squared = vectors.square().sum(dim=-1)
    nonzero = squared > 0
    # where() inside the root too: an infinite slope would turn into NaN in the backward pass
    return torch.where(nonzero, torch.where(nonzero, squared, 1.0).sqrt(), 0.0)
