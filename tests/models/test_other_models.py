"""MACE, NequIP, Allegro and SevenNet: their adapters beside their own code, and what a training asks of a model.

Runs for the packages that are installed: `make test` has NequIP and Allegro, `make test-mace` and
`make test-sevennet` the others.
"""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from support.other_models import CUTOFF, INSTALLED, PACKAGES, build, own_forward

from harness.data import DataStatistics, Frame, collate, empty_batch, frame_to_sample
from harness.models.scale_shift import reference_energies

TYPE_NAMES = ("Cu", "H", "O")  # not in the order of atomic numbers
SHIFTS = (-1100.25, -13.6, -2037.8)

pytestmark = pytest.mark.skipif(not INSTALLED, reason="none of these packages is installed")
each = pytest.mark.parametrize("name", INSTALLED)


def statistics(shifts: tuple[float, ...] = SHIFTS) -> DataStatistics:
    return DataStatistics(TYPE_NAMES, torch.tensor(shifts, dtype=torch.float64), 1.7, 12.0, 5, 20)


def crystal(seed: int = 0, num_atoms: int = 6) -> Atoms:
    generator = np.random.default_rng(seed)
    cell = [[4.1, 0.2, 0.0], [0.7, 3.9, -0.3], [0.1, 0.9, 4.4]]
    symbols = generator.choice(TYPE_NAMES, size=num_atoms).tolist()
    return Atoms(symbols, scaled_positions=generator.uniform(-0.3, 1.2, size=(num_atoms, 3)), cell=cell, pbc=True)


def water(box: float = 20.0) -> Atoms:
    atoms = molecule("H2O")
    atoms.cell = np.diag([box] * 3)  # a box, but pbc is F
    return atoms


def slab() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.cell[2] = 0.0
    atoms.pbc = (True, True, False)
    return atoms


def batch_of(*structures: Atoms, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return collate([frame_to_sample(Frame(atoms), TYPE_NAMES, CUTOFF, dtype=dtype) for atoms in structures])


def loss(predictions: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum((predictions[field].double() - 0.1).square().sum() for field in ("total_energy", "forces", "stress"))


@each
def test_predictions_and_gradients_are_those_of_the_package(name: str) -> None:
    model = build(name, statistics((-3.0, -1.0, -2.0))).train()
    batch = batch_of(crystal(0), crystal(1), crystal(2, num_atoms=3))
    predictions = model(batch)
    reference = own_forward(name, model, batch)
    for field in ("total_energy", "forces", "stress"):
        assert float(reference[field].detach().abs().max()) > 1e-4, field
        torch.testing.assert_close(predictions[field], reference[field], rtol=1e-10, atol=1e-10)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = torch.autograd.grad(loss(own_forward(name, model, batch)), trained, allow_unused=True)
    ours = torch.autograd.grad(loss(model(batch)), trained)
    assert max(float(gradient.abs().max()) for gradient in ours) > 1e-2
    for first, second in zip(ours, own, strict=True):
        torch.testing.assert_close(first, torch.zeros_like(first) if second is None else second, rtol=1e-8, atol=1e-8)


@each
def test_references_are_found_in_the_model(name: str) -> None:
    assert reference_energies(build(name, statistics()), TYPE_NAMES) == dict(zip(TYPE_NAMES, SHIFTS, strict=True))


@each
def test_molecules_without_a_cell_are_those_of_the_package(name: str) -> None:
    model = build(name, statistics((-3.0, -1.0, -2.0))).train()
    batch = batch_of(water(), water(30.0))
    predictions = model(batch)
    reference = own_forward(name, model, batch)  # with a box, as MACE gives one to molecules
    for field in ("total_energy", "forces"):
        torch.testing.assert_close(predictions[field], reference[field], rtol=1e-10, atol=1e-10)
    assert bool((predictions["stress"] == 0).all())


@each
def test_large_energies_keep_the_digits_of_float64_references(name: str) -> None:
    exact, rough = build(name, statistics()), build(name, statistics(), dtype="float32")
    rough.load_state_dict(exact.state_dict())
    batch = batch_of(crystal(0), crystal(1))
    high, low = exact.eval()(batch), rough.eval()(batch)
    assert low["total_energy"].dtype == torch.float64
    energies = high["total_energy"].abs().max()
    assert float(energies) > 5000
    # float32 has steps of 5e-4 eV there
    torch.testing.assert_close(low["total_energy"], high["total_energy"], rtol=0, atol=2e-5)
    torch.testing.assert_close(low["forces"].double(), high["forces"].double(), rtol=0, atol=2e-4)


@each
@pytest.mark.parametrize("without_cell", [False, True])
def test_molecules_slabs_and_lone_atoms_beside_crystals_give_finite_gradients(name: str, without_cell: bool) -> None:
    model = build(name, statistics()).train()
    molecular, lone = water(), Atoms("Cu", positions=[[0.0, 0.0, 0.0]], cell=[9.0, 9.0, 9.0], pbc=True)
    if without_cell:
        molecular.cell = np.zeros((3, 3))
        lone = Atoms("Cu", positions=[[1.0, 2.0, 3.0]])
    predictions = model(batch_of(crystal(0), molecular, lone, slab()))
    expected = model(batch_of(crystal(0)))
    torch.testing.assert_close(predictions["stress"][:1], expected["stress"], rtol=1e-10, atol=1e-12)
    assert bool((predictions["stress"][1] == 0).all())
    assert bool((predictions["stress"][3] == 0).all())
    loss(predictions).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool((gradient != 0).any()) for gradient in gradients)


@each
def test_only_lone_atoms_are_their_references_and_a_constant(name: str) -> None:
    model = build(name, statistics()).train()
    predictions = model(batch_of(Atoms("Cu"), Atoms("O")))
    assert bool(predictions["total_energy"].isfinite().all())
    assert bool((predictions["forces"] == 0).all())
    assert abs(float(predictions["total_energy"][0]) - SHIFTS[0]) < 50
    loss(predictions).backward()


@each
def test_no_frames_give_no_rows_and_a_gradient_of_zero_for_every_parameter(name: str) -> None:
    model = build(name, statistics()).train()
    predictions = model(empty_batch(torch.float64))
    assert {field: tuple(value.shape) for field, value in predictions.items()}.items() >= {
        "total_energy": (0, 1),
        "forces": (0, 3),
        "stress": (0, 3, 3),
    }.items()
    for field in ("total_energy", "forces", "stress"):
        model.zero_grad()
        predictions = model(empty_batch(torch.float64))
        predictions[field].sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and bool((parameter.grad == 0).all()) for parameter in trained), field
    model.eval()
    with torch.inference_mode():
        assert not any(value.requires_grad for value in model(empty_batch(torch.float64)).values())


@each
def test_every_parameter_gets_a_gradient_from_forces_alone(name: str) -> None:
    model = build(name, statistics()).train()
    model(batch_of(crystal(0)))["forces"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@each
def test_evaluation_in_inference_mode_leaves_the_batch_alone(name: str) -> None:
    model = build(name, statistics())
    batch = batch_of(crystal(0), water())
    before = {field: value.clone() for field, value in batch.items()}
    expected = model.train()(batch)
    model.eval()
    with torch.inference_mode():
        found = model(batch)
    for field in ("total_energy", "forces", "stress"):
        assert not found[field].requires_grad
        torch.testing.assert_close(found[field], expected[field].detach(), rtol=1e-10, atol=1e-12)
    assert batch.keys() == before.keys()
    for field, value in before.items():
        torch.testing.assert_close(batch[field], value, rtol=0, atol=0, equal_nan=True)  # labels are NaN
    assert not any(value.requires_grad for value in batch.values())


@each
def test_float64_positions_go_into_float32_weights(name: str) -> None:
    model = build(name, statistics(), dtype="float32").train()
    predictions = model(batch_of(crystal(0)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert predictions["forces"].dtype == torch.float64
    loss(predictions).backward()


@each
def test_the_process_is_as_before_and_checkpoints_stay_safe(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state is what is looked at
    before = _process()
    build(name, statistics())
    assert _process() == before
    marker = tmp_path / "unpickled"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(marker),)

    torch.save({"state_dict": Malicious()}, tmp_path / "bad.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "bad.ckpt")
    assert not marker.exists()


def _process() -> dict[str, object]:
    return {
        "dtype": torch.get_default_dtype(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "matmul": torch.get_float32_matmul_precision(),
        "sharing": torch.multiprocessing.get_sharing_strategy(),
        "unsafe": os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
    }


@each
def test_a_seed_gives_the_same_weights_whatever_the_random_state(name: str) -> None:
    torch.manual_seed(1)
    first = build(name, statistics()).state_dict()
    torch.manual_seed(2)
    second = build(name, statistics()).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", [name for name in PACKAGES if name not in INSTALLED])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'potential-harness\[{name}\]'"):
        build(name, statistics())


@pytest.mark.skipif("nequip" not in INSTALLED, reason="nequip is not installed")
def test_a_refusal_of_nequip_is_told_with_its_words() -> None:
    with pytest.raises(ValueError, match=r"NequIP refuses its arguments.*at least one convnet layer"):
        build("nequip", statistics(), num_layers=0)
    with pytest.raises(ValueError, match="letters and digits"):
        build("nequip", DataStatistics(("H_1",), torch.zeros(1), 1.0, 12.0, 1, 1))


@pytest.mark.skipif("mace" not in INSTALLED, reason="mace-torch is not installed")
def test_names_that_mace_does_not_know_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"model\.interaction=Nothing.*RealAgnosticResidualInteractionBlock"):
        build("mace", statistics(), interaction="Nothing")
    with pytest.raises(ValueError, match="one energy scale"):
        build("mace", statistics(), energy_scales={"H": 1.0})
