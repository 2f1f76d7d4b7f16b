"""Samples and batches: what they hold, how they come from workers, and what is kept of them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor
from torch.utils.data import DataLoader

from harness.data import AtomsDataset, Frame, collate, empty_batch, frame_to_sample
from harness.data import dataset as dataset_file
from harness.data.neighbors import neighbor_list
from harness.data.packing import PackedBatch

TYPES = ["H", "O", "Cu"]


def frames() -> list[Frame]:
    """A cell with all labels but one force, a molecule with an energy, an atom without neighbours."""
    random = np.random.default_rng(0)
    cell = bulk("Cu", cubic=True)
    cell.rattle(0.1, seed=1)
    forces = random.normal(size=(4, 3))
    forces[2] = np.nan
    return [
        Frame(cell, -1.0 / 3, forces, random.normal(size=(3, 3))),
        Frame(molecule("H2O"), energy=-9000.123456789),
        Frame(Atoms("O")),
    ]


def as_torch_makes_it(frame: Frame, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    atoms = frame.atoms
    edge_index, shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 3.0)
    nan = float("nan")
    return {
        "pos": torch.tensor(atoms.positions, dtype=dtype),
        "atom_types": torch.tensor([TYPES.index(symbol) for symbol in atoms.get_chemical_symbols()]),
        "atomic_numbers": torch.tensor(atoms.numbers.tolist()),
        "batch": torch.tensor([0] * len(atoms)),
        "num_atoms": torch.tensor([len(atoms)]),
        "cell": torch.tensor(np.array([atoms.cell.array]), dtype=dtype),
        "pbc": torch.tensor([atoms.pbc.tolist()]),
        "edge_index": torch.tensor(edge_index),
        "edge_cell_shift": torch.tensor(shifts, dtype=dtype),
        "total_energy": torch.tensor([[nan if frame.energy is None else frame.energy]], dtype=torch.float64),
        "forces": torch.tensor([[nan] * 3] * len(atoms) if frame.forces is None else frame.forces, dtype=dtype),
        "stress": torch.tensor(np.full((1, 3, 3), nan) if frame.stress is None else frame.stress[None], dtype=dtype),
        "frame_index": torch.tensor([index]),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name].nan_to_num(nan=77.0), value.nan_to_num(nan=77.0)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_as_torch_makes_them(dtype):
    for index, frame in enumerate(frames()):
        sample = frame_to_sample(frame, TYPES, 3.0, index, dtype)
        assert_same(sample, as_torch_makes_it(frame, index, dtype))
        before = frame.atoms.positions.copy(), None if frame.forces is None else frame.forces.copy()
        for value in sample.values():
            value.zero_()  # tensors of their own
        np.testing.assert_array_equal(frame.atoms.positions, before[0])
        if before[1] is not None:
            np.testing.assert_array_equal(frame.forces, before[1])


class WithFields(AtomsDataset):
    """Samples with further fields, of graphs and of nodes."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        charge, weight = torch.tensor([index], dtype=torch.int32), torch.tensor([0.5 * index], dtype=torch.float64)
        return {**sample, "charge": charge, "spin": sample["pos"][:, :1] > 0, "weight": weight}


def loader(num_workers: int, batches: list[list[int]], dtype: torch.dtype = torch.float32) -> DataLoader:
    data = WithFields(frames(), TYPES, 3.0, dtype)
    return DataLoader(data, batch_sampler=batches, num_workers=num_workers, collate_fn=partial(collate, dtype=dtype))


def test_batches_of_workers_are_those_of_the_process_itself():
    batches = [[0, 1, 2], [2], [], [1, 0, 1]]
    for found, expected in zip(loader(1, batches), loader(0, batches), strict=True):
        assert_same(found, expected)
        assert type(found) is dict
    (whole, *_) = loader(1, batches)
    assert len({value.untyped_storage().data_ptr() for value in whole.values()}) == 1  # one buffer
    whole["pos"][:] = 0
    assert_same(next(iter(loader(0, [[0, 1, 2]]))) | {"pos": whole["pos"]}, whole)  # which no other field is in


def test_a_packed_batch_is_a_batch():
    layout = (("a", torch.float32, (2, 3), 0), ("none", torch.int64, (0, 3), 64), ("b", torch.bool, (3,), 64))
    packed = PackedBatch(torch.zeros(128, dtype=torch.uint8), layout)
    packed["b"][1] = True
    function, arguments = packed.__reduce__()
    assert {name: value.tolist() for name, value in function(*arguments).items()} == {
        "a": [[0.0] * 3] * 2,
        "none": [],
        "b": [False, True, False],
    }
    assert function(*arguments)["none"].shape == (0, 3)


def test_offsets_of_batches_of_batches():
    data = AtomsDataset(frames(), TYPES, 3.0)
    parts = [collate([data[0], data[2]]), empty_batch(), data[1]]
    assert_same(collate(parts), collate([data[0], data[2], data[1]]))
    assert collate(parts)["batch"].tolist() == [0] * 4 + [1] + [2] * 3
    assert data[1]["batch"].tolist() == [0] * 3  # samples are left as they are


def test_samples_are_kept_up_to_a_bound(monkeypatch):
    size = sum(value.nbytes for value in frame_to_sample(frames()[1], TYPES, 3.0).values())
    monkeypatch.setattr(dataset_file, "_CACHED_BYTES", 2 * size)
    data = AtomsDataset([frames()[1]] * 5, TYPES, 3.0)
    assert data.num_edges().tolist() == [6] * 5
    assert [data[index] is data[index] for index in range(5)] == [True, True, False, False, False]
    share = DataLoader(
        data, num_workers=2, collate_fn=lambda samples: [data[index] is data[index] for index in range(5)]
    )
    monkeypatch.setattr(data, "_samples", {})
    monkeypatch.setattr(data, "_cached_bytes", 0)
    assert next(iter(share)) == [True, False, False, False, False]
