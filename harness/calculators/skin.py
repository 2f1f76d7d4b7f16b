"""Neighbour list of a moving structure, which is made anew only when atoms may have come closer than the cutoff."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from harness.data.neighbors import neighbor_list

__all__ = ["SkinNeighbors"]

_MARGIN = 1e-9  # Å, above the rounding of positions


class SkinNeighbors:
    r"""Edges within a cutoff, picked from pairs within ``cutoff + skin`` of an earlier structure.

    With the earlier positions :math:`r` and cell :math:`h`, the new cell is :math:`h' = h F`, and the new positions are
    :math:`r'_i = r_i F + u_i`. A vector :math:`v_{ij}` between atoms or images becomes :math:`v_{ij} F + u_j - u_i`. So
    a pair that was farther apart than :math:`r_\mathrm{cut} + s` is now farther apart than

    .. math:: \sigma_\mathrm{min}(F)\, (r_\mathrm{cut} + s) - 2 \max_i |u_i|

    with the smallest singular value :math:`\sigma_\mathrm{min}`. The pairs serve as long as that is more than the
    cutoff; common motion of all atoms is taken out of :math:`u` first. Another number of atoms, other periodic
    directions, and atoms that jump to another image make the list anew.

    Args:
        cutoff: in Å.
        skin: in Å; 0 makes the list for every structure.

    Attributes:
        num_lists: number of lists that were made.

    Raises:
        ValueError: the cutoff is not positive, or the skin is negative.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        if not (np.isfinite(cutoff) and cutoff > 0):
            raise ValueError(f"the cutoff must be a positive number of Å, found {cutoff}")
        if not (np.isfinite(skin) and skin >= 0):
            raise ValueError(f"the skin must be 0 or a positive number of Å, found {skin}")
        self.cutoff = float(cutoff)
        self.skin = float(skin)
        self.num_lists = 0
        self._positions: NDArray[np.float64] | None = None  # of the structure that the list was made for
        self._cell = np.zeros((3, 3))
        self._pbc = np.zeros(3, dtype=bool)
        self._pairs: tuple[Tensor, Tensor] = (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3))
        self._offsets: tuple[NDArray[np.float64], Tensor] | None = None  # of the images, and the cell that they are for

    def edges(self, atoms: Atoms, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Edges of a structure as :func:`~harness.data.neighbors.neighbor_list` has them, in another order.

        Args:
            atoms: the structure.
            device: of the result; the pairs stay there.

        Returns:
            ``edge_index`` ``[2, num_edges]`` and ``edge_cell_shift`` ``[num_edges, 3]``, float64.
        """
        positions, cell = np.asarray(atoms.positions, dtype=np.float64), np.asarray(atoms.cell.array, dtype=np.float64)
        if not self._serves(positions, cell, atoms.pbc):
            made = neighbor_list(positions, cell, atoms.pbc, self.cutoff + self.skin)
            self._pairs = torch.from_numpy(made[0]).to(device), torch.from_numpy(made[1]).to(device)
            self._positions, self._cell, self._pbc = positions.copy(), cell.copy(), atoms.pbc.copy()
            self._offsets = None
            self.num_lists += 1
        index, shifts = self._pairs = self._pairs[0].to(device), self._pairs[1].to(device)
        if not self.skin:
            return index, shifts
        near = self._lengths(positions, cell) < self.cutoff
        chosen = near.nonzero().squeeze(1)
        return index.index_select(1, chosen), shifts.index_select(0, chosen)

    def _lengths(self, positions: NDArray[np.float64], cell: NDArray[np.float64]) -> Tensor:
        """Lengths of all pairs in Å, on their device."""
        index, shifts = self._pairs
        if self._offsets is None or not np.array_equal(cell, self._offsets[0]):
            self._offsets = cell.copy(), shifts @ torch.from_numpy(cell).to(shifts.device)
        offsets = self._offsets[1].to(shifts.device)
        points = torch.from_numpy(positions).to(shifts.device)
        vectors = points.index_select(0, index[1]) - points.index_select(0, index[0]) + offsets
        return torch.linalg.vector_norm(vectors, dim=1)

    def _serves(self, positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> bool:
        """True if no pair within the cutoff can be missing in the list."""
        before = self._positions
        if before is None or not self.skin or before.shape != positions.shape or not np.array_equal(pbc, self._pbc):
            return False
        smallest = 1.0
        if not np.array_equal(cell, self._cell):
            if abs(np.linalg.det(self._cell)) < _MARGIN:
                return False
            deformation = np.linalg.solve(self._cell, cell)
            smallest = float(np.linalg.svd(deformation, compute_uv=False)[-1])
            before = before @ deformation
        moved = positions - before
        if len(moved):
            moved = moved - moved.mean(axis=0)
        largest = float(np.sqrt(np.square(moved).sum(axis=1).max(initial=0.0)))
        return smallest * (self.cutoff + self.skin) - 2 * largest > self.cutoff + _MARGIN
