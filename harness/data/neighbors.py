"""Neighbour lists of periodic, partly periodic and isolated structures."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from vesin import NeighborList

__all__ = ["neighbor_list"]


def neighbor_list(
    positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    r"""All ordered pairs of atoms within ``cutoff``, as edges and the cell shifts of the neighbours.

    An edge :math:`e` points from its centre :math:`i = ` ``edge_index[0, e]`` to its neighbour
    :math:`j = ` ``edge_index[1, e]`` (NequIP's convention), along

    .. math:: v_e = r_j - r_i + S_e\, h, \qquad 0 < |v_e| < r_\mathrm{cut}

    with the integer shift :math:`S_e` and the rows of the cell :math:`h`. Each pair is there in both directions. In a
    cell smaller than the cutoff an atom is a neighbour of its own images. Positions need not lie inside the cell.

    Args:
        positions: ``[num_atoms, 3]`` in Å.
        cell: ``[3, 3]`` in Å, rows are lattice vectors; those of directions without periodicity are not used.
        pbc: ``[3]`` booleans, which lattice vectors are periodic.
        cutoff: in Å.

    Returns:
        ``edge_index`` ``[2, num_edges]`` and ``edge_cell_shift`` ``[num_edges, 3]``.

    Raises:
        ValueError: if the cutoff is not positive and finite.
    """
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"the cutoff of a neighbour list must be a positive number of Å, found {cutoff}")
    points = np.ascontiguousarray(positions, dtype=np.float64).reshape(-1, 3)
    periodic = np.asarray(pbc, dtype=bool).reshape(3)
    if len(points) == 0:
        return np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3))
    # One thread: structures are small, every rank and loader worker of the machine makes its own lists, and threads
    # started before a worker is forked would hang in it.
    search = NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
    centers, neighbors, shifts = search.compute(
        points, np.asarray(cell, dtype=np.float64).reshape(3, 3), periodic, quantities="ijS"
    )
    edge_index = np.stack((centers, neighbors)).astype(np.int64)
    return edge_index, np.asarray(shifts, dtype=np.float64).reshape(-1, 3)
