"""Neighbour lists of whole batches, by a kernel library, against those of vesin for each frame."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from lightning.pytorch.strategies import DDPStrategy
from support.alloy import LOSS, build, trainer
from support.lightning_ranks import Ranks
from support.spawning import spawn

from harness.data import (
    AtomsDataset,
    EmbeddedAlloyDataModule,
    Frame,
    MixtureDataModule,
    collate,
    embedded_alloy_file,
    frame_to_sample,
    training_statistics,
)
from harness.data.device_neighbors import DeviceNeighbors, check_on_device, checked_neighbors, invertible_cells
from harness.models import schnet_force_field

try:
    import nvalchemiops.torch.neighbors  # noqa: F401
except ImportError:
    HAS_KERNELS = False
else:
    HAS_KERNELS = True

kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the extra `neighbors` (nvalchemi-toolkit-ops) is not installed")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that CUDA kernels could run on")

TYPES = ["H", "C", "O", "Cu"]
TRICLINIC = np.array([[4.0, 0.0, 0.0], [1.0, 5.0, 0.0], [0.5, 0.3, 6.0]])
SKEWED = np.array([[4.0, 0.0, 0.0], [7.0, 5.0, 0.0], [-6.0, 8.0, 6.0]])
CELLS: dict[str, tuple[Any, list[bool]]] = {
    "triclinic": (TRICLINIC, [True, True, True]),
    "smaller than the cutoff": (TRICLINIC * 0.45, [True, True, True]),
    "skewed": (SKEWED, [True, True, True]),
    "left-handed": (TRICLINIC[[1, 0, 2]], [True, True, True]),
    "rotated": (TRICLINIC[:, [2, 0, 1]], [True, True, True]),
    "large": (TRICLINIC * 4, [True, True, True]),
    "slab": (TRICLINIC, [True, True, False]),
    "skewed slab": (SKEWED, [False, True, True]),
    "slab without a third vector": (np.diag([4.0, 5.0, 0.0]), [True, True, False]),
    "middle direction not periodic": (TRICLINIC, [True, False, True]),
    "wire": (SKEWED, [False, True, False]),
    "wire without the others": (np.diag([0.0, 3.0, 0.0]), [False, True, False]),
    "wire along another axis": ([[0.0, 0.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [True, False, False]),
    "molecule in a box": (np.eye(3) * 5.0, [False, False, False]),
    "molecule": (np.zeros((3, 3)), [False, False, False]),
}


def structures(seed: int) -> dict[str, Atoms]:
    """One of each kind, with atoms in and outside of its cell, one atom alone, and one without neighbours."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, (cell, pbc) in CELLS.items():
        number = int(generator.integers(1, 9))
        positions = generator.uniform(-9.0, 12.0, size=(number, 3))
        found[name] = Atoms(f"H{number}", positions=positions, cell=cell, pbc=pbc)
    found["one atom"] = Atoms("C", positions=[[1.0, 2.0, 3.0]])
    found["no neighbours"] = Atoms("CO", positions=[[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    found["one atom in a large cell"] = Atoms("C", positions=[[1.0, 2.0, 3.0]], cell=np.eye(3) * 30, pbc=True)
    return found


def batch_of(atoms: list[Atoms], cutoff: float | None, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return collate([frame_to_sample(Frame(each), TYPES, cutoff, dtype=dtype) for each in atoms])


def sorted_edges(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    edges = torch.cat((batch["edge_index"].T, batch["edge_cell_shift"].long()), dim=1)
    return sorted(edges.tolist())


# ---- edges


@kernels
@pytest.mark.parametrize("cutoff", [1.5, 3.1, 5.2])
@pytest.mark.parametrize("seed", range(4))
def test_edges_of_a_batch_are_those_of_vesin(seed: int, cutoff: float) -> None:
    """Of all kinds of structures in one batch, and of each alone."""
    kinds = structures(seed)
    neighbors = DeviceNeighbors(cutoff)
    for atoms in (list(kinds.values()), *([each] for each in kinds.values())):
        expected, found = batch_of(atoms, cutoff), neighbors.with_edges(batch_of(atoms, None))
        assert sorted_edges(found) == sorted_edges(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            if not name.startswith("edge"):
                torch.testing.assert_close(found[name], value, equal_nan=True)


@kernels
def test_edges_of_large_frames_are_those_of_vesin() -> None:
    """For which the package takes other kernels than for small ones."""
    crystals = [bulk("Cu", cubic=True) * (5, 5, 5), bulk("Cu", cubic=True) * (2, 2, 2), bulk("Cu") * (9, 9, 9)]
    for seed, atoms in enumerate(crystals):
        atoms.rattle(0.2, seed=seed)
    expected, found = batch_of(crystals, 4.5), DeviceNeighbors(4.5).with_edges(batch_of(crystals, None))
    assert sorted_edges(found) == sorted_edges(expected)


@kernels
def test_more_neighbours_than_the_package_reckons_with_are_all_there() -> None:
    dense = Atoms("H", positions=[[0.2, 0.1, 0.3]], cell=np.eye(3) * 0.79, pbc=True)
    neighbors = DeviceNeighbors(4.0)
    for atoms in ([molecule("H2O")], [molecule("H2O"), dense], [molecule("H2O")]):
        expected, found = batch_of(atoms, 4.0), neighbors.with_edges(batch_of(atoms, None))
        assert sorted_edges(found) == sorted_edges(expected)
    assert len(sorted_edges(batch_of([dense], 4.0))) > 500


@kernels
def test_edges_are_in_one_order_whatever_the_others_of_the_batch() -> None:
    kinds = list(structures(1).values())
    neighbors = DeviceNeighbors(5.2)
    whole = neighbors.with_edges(batch_of(kinds, None))
    alone = collate([neighbors.with_edges(batch_of([each], None)) for each in kinds])
    for name in ("edge_index", "edge_cell_shift"):
        assert torch.equal(whole[name], alone[name])
    assert (whole["edge_index"][0].diff() >= 0).all()


@kernels
def test_single_precision_keeps_its_dtype_and_a_batch_without_graphs_has_no_edges() -> None:
    neighbors = DeviceNeighbors(3.1)
    atoms = list(structures(2).values())
    expected, found = batch_of(atoms, 3.1, torch.float32), neighbors.with_edges(batch_of(atoms, None, torch.float32))
    assert found["edge_cell_shift"].dtype == torch.float32
    assert sorted_edges(found) == sorted_edges(expected)
    empty = neighbors.with_edges(collate([], torch.float64))
    assert empty["edge_index"].shape == (2, 0)
    assert empty["edge_index"].dtype == torch.int64
    assert empty["edge_cell_shift"].shape == (0, 3)


def test_cells_get_orthogonal_vectors_where_they_are_not_periodic() -> None:
    kinds = batch_of(list(structures(0).values()), None)
    cells = invertible_cells(kinds["cell"], kinds["pbc"])
    assert torch.equal(cells[kinds["pbc"]], kinds["cell"][kinds["pbc"]])
    new = cells[~kinds["pbc"]]
    torch.testing.assert_close(new.norm(dim=1), torch.ones(len(new), dtype=new.dtype))
    for cell, pbc in zip(cells, kinds["pbc"], strict=True):
        products = (cell @ cell.T)[~pbc]
        products[:, ~pbc] -= torch.eye(int((~pbc).sum()), dtype=products.dtype)
        torch.testing.assert_close(products, torch.zeros_like(products))


# ---- models and trainings


@kernels
def test_energies_forces_stresses_and_gradients_are_those_with_vesin() -> None:
    crystals = [bulk("Cu", cubic=True), bulk("Cu"), molecule("H2O"), *list(structures(3).values())]
    for atoms in crystals:
        atoms.rattle(0.05, seed=1)
    sizes = {"hidden_channels": 6, "num_filters": 6, "num_interactions": 2, "num_gaussians": 5}
    statistics = AtomsDataset([Frame(atoms) for atoms in crystals], TYPES, 4.0)
    model = (
        schnet_force_field(training_statistics(statistics), cutoff=4.0, seed=0, energy_scales=1.0, **sizes)
        .double()
        .train()
    )
    results = []
    for batch in (batch_of(crystals, 4.0), DeviceNeighbors(4.0).with_edges(batch_of(crystals, None))):
        model.zero_grad()
        predicted = model(batch)
        (predicted["forces"].square().sum() + predicted["stress"].square().sum()).backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        results.append({name: value.detach() for name, value in predicted.items()} | gradients)
    assert {"total_energy", "forces", "stress"} <= results[0].keys()
    assert results[0]["stress"].abs().max() > 1e-6
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


def alloy(cache: Path, neighbors: str, **options: Any) -> EmbeddedAlloyDataModule:
    settings = {"num_frames": 16, "split": {"val": 3, "test": 2}, "cutoff": 4.0, "batch_size": 4, "dtype": "float64"}
    module = EmbeddedAlloyDataModule(**{**settings, **options}, seed=1, cache_dir=cache, neighbors=neighbors)
    module.setup()
    return module


def weights_after_training(rank: int, world_size: int, cache: Path, neighbors: str, **options: Any) -> Any:
    """Weights, and the mean errors of the validation, after an epoch."""
    data = alloy(cache, neighbors, **options)
    parallel = {"strategy": DDPStrategy(cluster_environment=Ranks(rank, world_size)), "devices": world_size}
    running = trainer(cache / f"{neighbors}-{rank}", max_epochs=1, **(parallel if world_size > 1 else {}))
    module = build(data)
    data.check_job(running, module, "fit")
    running.fit(module, data)
    return module.model.state_dict(), module.reports["val0"].values


@kernels
def test_a_training_is_the_same_with_lists_from_workers_and_from_the_device_on_two_ranks(tmp_path: Path) -> None:
    expected = weights_after_training(0, 1, tmp_path, "workers")
    found = [weights_after_training(0, 1, tmp_path, "device", num_workers=1)]
    found += spawn(2, weights_after_training, tmp_path, "device", timeout=200)  # three validation frames on two ranks
    for weights, values in found:
        torch.testing.assert_close(weights, expected[0], rtol=1e-9, atol=1e-9)
        assert values == pytest.approx(expected[1], rel=1e-9)


@kernels
def test_samples_have_no_edges_and_numbers_of_edges_are_known_all_the_same(tmp_path: Path) -> None:
    ours, theirs = (alloy(tmp_path, name, batch_size=None, max_edges=4000) for name in ("device", "workers"))
    assert {"edge_index", "edge_cell_shift"} == theirs.train_set[0].keys() - ours.train_set[0].keys()
    assert ours.statistics.mean_neighbors == theirs.statistics.mean_neighbors
    assert list(ours.training_sampler(0, 1)) == list(theirs.training_sampler(0, 1))
    assert ours.train_set.num_edges().tolist() == theirs.train_set.num_edges().tolist()


@kernels
def test_batches_of_a_mixture_are_those_with_lists_from_workers(tmp_path: Path) -> None:
    files = [embedded_alloy_file(6, seed, tmp_path) for seed in (0, 1)]
    sets = {name: {"train": file, "weight": weight} for name, file, weight in zip("ab", files, (1, 2), strict=True)}
    batches = []
    for neighbors in ("device", "workers"):
        data = MixtureDataModule(sets, cutoff=4.0, batch_size=5, dtype="float64", neighbors=neighbors)
        data.setup()
        batches.append([data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()])
    for found, expected in zip(*batches, strict=True):
        assert sorted_edges(found) == sorted_edges(expected)
        assert found.keys() == expected.keys()
        assert torch.equal(found["set_index"], expected["set_index"])


# ---- refusals


def test_the_command_that_installs_the_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvalchemiops"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvalchemiops", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs .* nvalchemi-toolkit-ops.*harness\[neighbors\]'"):
        EmbeddedAlloyDataModule(num_frames=8, cache_dir=tmp_path, cutoff=3.0, batch_size=2, neighbors="device")


def test_another_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'workers' .* or 'device' .* found 'gpu'"):
        checked_neighbors("gpu")


@kernels
def test_edges_that_are_not_those_of_vesin_are_refused_before_a_training(tmp_path: Path) -> None:
    data = alloy(tmp_path, "device")
    cpu = torch.device("cpu")
    check_on_device(DeviceNeighbors(4.0), data.train_set, cpu)
    with pytest.raises(ValueError, match=r"finds \d+ edges on cpu in .*, and vesin \d+; \d+ of them differ"):
        check_on_device(DeviceNeighbors(3.5), data.train_set, cpu)
    with pytest.raises(ValueError, match="cannot make neighbour lists on meta"):
        check_on_device(DeviceNeighbors(4.0), data.train_set, torch.device("meta"))


# ---- on a GPU


@kernels
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_on_a_gpu_are_those_of_vesin_in_the_order_of_the_cpu(dtype: torch.dtype) -> None:
    neighbors = DeviceNeighbors(4.0)
    for seed in range(4):
        atoms = list(structures(seed).values())
        expected, bare = batch_of(atoms, 4.0, dtype), batch_of(atoms, None, dtype)
        found = neighbors.with_edges({name: value.cuda() for name, value in bare.items()})
        assert all(value.is_cuda for value in found.values())
        on_host = {name: value.cpu() for name, value in found.items()}
        assert sorted_edges(on_host) == sorted_edges(expected)
        assert torch.equal(on_host["edge_index"], neighbors.with_edges(bare)["edge_index"])


@kernels
@gpu
def test_a_training_on_a_gpu_is_that_with_lists_from_workers(tmp_path: Path) -> None:
    values = []
    for neighbors in ("workers", "device"):
        data = alloy(tmp_path, neighbors)
        running = trainer(tmp_path / neighbors, accelerator="gpu")
        module = build(data, loss=LOSS)
        data.check_job(running, module, "fit")
        running.fit(module, data)
        values.append(module.reports["val0"].values)
    assert values[1] == pytest.approx(values[0], rel=1e-6)
