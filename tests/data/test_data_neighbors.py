"""Neighbour lists against ASE's, and the lengths of the edges they describe."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list as ase_neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import neighbor_list

TRICLINIC = [[4.0, 0.0, 0.0], [1.0, 5.0, 0.0], [0.5, 0.3, 6.0]]
CELLS = {
    "triclinic": (TRICLINIC, [True, True, True]),
    "smaller than the cutoff": (np.array(TRICLINIC) * 0.45, [True, True, True]),
    "left-handed": (np.array(TRICLINIC)[[1, 0, 2]], [True, True, True]),
    "slab": (TRICLINIC, [True, True, False]),
    "slab without a third vector": (np.diag([4.0, 5.0, 0.0]), [True, True, False]),
    "middle direction not periodic": (TRICLINIC, [True, False, True]),
    "wire without the others": (np.diag([0.0, 3.0, 0.0]), [False, True, False]),
    "molecule in a box": (np.eye(3) * 5.0, [False, False, False]),
    "molecule": (np.zeros((3, 3)), [False, False, False]),
}


def sorted_edges(edge_index, shifts) -> list[tuple[int, ...]]:
    return sorted(map(tuple, np.concatenate((edge_index.T, shifts), axis=1).astype(int).tolist()))


@pytest.mark.parametrize("name", CELLS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), num_atoms=st.integers(1, 9), cutoff=st.floats(1.0, 5.0))
def test_edges_are_those_of_ase(name, seed, num_atoms, cutoff):
    cell, pbc = CELLS[name]
    positions = np.random.default_rng(seed).uniform(-4.0, 9.0, size=(num_atoms, 3))  # also outside of the cell
    edge_index, shifts = neighbor_list(positions, cell, pbc, cutoff)
    centers, neighbors, expected_shifts = ase_neighbor_list(
        "ijS", Atoms(f"H{num_atoms}", positions=positions, cell=cell, pbc=pbc), cutoff
    )
    assert sorted_edges(edge_index, shifts) == sorted_edges(np.stack((centers, neighbors)), expected_shifts)

    vectors = positions[edge_index[1]] - positions[edge_index[0]] + shifts @ np.array(cell)
    lengths = np.linalg.norm(vectors, axis=1)
    assert ((lengths > 0) & (lengths <= cutoff)).all()
    both_ways = sorted_edges(edge_index[::-1], -shifts)
    assert both_ways == sorted_edges(edge_index, shifts)
    assert (shifts[:, ~np.array(pbc)] == 0).all()


@pytest.mark.parametrize("num_atoms", [0, 1])
def test_no_edges(num_atoms):
    edge_index, shifts = neighbor_list(np.zeros((num_atoms, 3)), np.zeros((3, 3)), [False] * 3, 5.0)
    assert edge_index.shape == (2, 0)
    assert edge_index.dtype == np.int64
    assert shifts.shape == (0, 3)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cutoff_that_is_not_positive_is_refused(cutoff):
    with pytest.raises(ValueError, match="positive number of Å"):
        neighbor_list(np.zeros((1, 3)), np.zeros((3, 3)), [False] * 3, cutoff)
