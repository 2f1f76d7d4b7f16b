"""Forces and stresses against finite differences, symmetries, and the scales and shifts of energies."""

from __future__ import annotations

import pickle

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.spatial.transform import Rotation

from harness.data import DataStatistics, Frame, collate, empty_batch, frame_to_sample
from harness.models import ForceField, ScaleShift, SchNetEnergy, isolated_atom_energies, schnet_force_field
from harness.models.geometry import edge_lengths, edge_vectors

TYPE_NAMES = ["H", "O", "Cu", "Au"]
CUTOFF = 4.0
SHIFTS = [-13.6, -2037.8, -1100.25, -3.0]


def statistics(**changes) -> DataStatistics:
    values = {
        "type_names": tuple(TYPE_NAMES),
        "energy_shifts": torch.tensor(SHIFTS, dtype=torch.float64),
        "force_rms": 1.7,
        "mean_neighbors": 10.0,
        "num_frames": 5,
        "num_atoms": 20,
    }
    return DataStatistics(**{**values, **changes})


def force_field(**options) -> ForceField:
    sizes = {"hidden_channels": 12, "num_filters": 10, "num_interactions": 2, "num_gaussians": 8, "seed": 1}
    return schnet_force_field(statistics(), cutoff=CUTOFF, **{**sizes, **options}).double()


def triclinic(seed: int = 0, num_atoms: int = 5) -> Atoms:
    generator = np.random.default_rng(seed)
    cell = [[4.1, 0.2, 0.0], [0.7, 3.9, -0.3], [0.1, 0.9, 4.4]]
    symbols = generator.choice(TYPE_NAMES, size=num_atoms).tolist()
    return Atoms(symbols, scaled_positions=generator.uniform(-0.3, 1.2, size=(num_atoms, 3)), cell=cell, pbc=True)


def water() -> Atoms:
    atoms = molecule("H2O")
    atoms.cell = np.diag([20.0, 20.0, 20.0])  # a box, but pbc is F
    return atoms


def batch_of(*structures: Atoms, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return collate([frame_to_sample(Frame(atoms), TYPE_NAMES, CUTOFF, dtype=dtype) for atoms in structures])


def energy_of(model: ForceField, atoms: Atoms) -> float:
    return model.eval()(batch_of(atoms))["total_energy"].item()


def test_forces_are_the_negative_gradient_of_the_energy():
    model, atoms, step = force_field(), triclinic(), 1e-4
    forces = model.eval()(batch_of(atoms))["forces"].numpy()
    numerical = np.zeros_like(forces)
    for index in np.ndindex(*forces.shape):
        moved = [atoms.copy(), atoms.copy()]
        for sign, copied in zip((1, -1), moved, strict=True):
            copied.positions[index] += sign * step
        numerical[index] = -(energy_of(model, moved[0]) - energy_of(model, moved[1])) / (2 * step)
    assert np.abs(forces).max() > 1e-2
    np.testing.assert_allclose(forces, numerical, atol=1e-6)
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-10)


def test_stress_is_the_strain_derivative_of_the_energy_by_volume():
    model, atoms, step = force_field(), triclinic(3), 1e-5
    stress = model.eval()(batch_of(atoms))["stress"][0].numpy()
    numerical = np.zeros((3, 3))
    for a, b in np.ndindex(3, 3):
        energies = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[a, b] += 0.5 * sign * step
            strain[b, a] += 0.5 * sign * step
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            energies.append(energy_of(model, strained))
        numerical[a, b] = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
    assert np.abs(stress).max() > 1e-4
    np.testing.assert_allclose(stress, numerical, atol=1e-7)
    np.testing.assert_allclose(stress, stress.T, atol=1e-14)


def test_the_sign_of_the_stress_is_that_of_ase():
    # ASE gives a stretched crystal, which pulls inwards, a positive trace, and so must we for bonds like springs
    class Springs(torch.nn.Module):
        def forward(self, batch):
            lengths = edge_lengths(edge_vectors(batch))
            center = batch["edge_index"][0]
            return torch.zeros(batch["pos"].shape[0], dtype=lengths.dtype).index_add(0, center, (lengths - 2.4) ** 2)

    stretched = bulk("Cu", "fcc", a=3.9)
    stretched.calc = EMT()
    assert (stretched.get_stress()[:3] > 0).all()
    stress = ForceField(Springs()).eval()(batch_of(stretched))["stress"][0]
    assert (stress.diagonal() > 0).all()


def test_rotation_translation_and_permutation_of_atoms():
    model, atoms = force_field().eval(), triclinic(4)
    before = model(batch_of(atoms))
    rotation = Rotation.from_rotvec([0.3, -1.1, 0.6]).as_matrix()
    order = np.random.default_rng(0).permutation(len(atoms))
    moved = Atoms(
        atoms.get_chemical_symbols(),
        positions=(atoms.positions + np.array([0.4, -2.0, 9.0])) @ rotation.T,
        cell=atoms.cell.array @ rotation.T,
        pbc=True,
    )[order]
    after = model(batch_of(moved))
    turn = torch.from_numpy(rotation)
    torch.testing.assert_close(after["total_energy"], before["total_energy"])
    torch.testing.assert_close(after["forces"], (before["forces"] @ turn.T)[order])
    torch.testing.assert_close(after["stress"][0], turn @ before["stress"][0] @ turn.T)
    torch.testing.assert_close(after["atomic_energy"], before["atomic_energy"][order])


def test_a_supercell_has_as_many_times_the_energy():
    model, atoms = force_field().eval(), triclinic(5)
    once, eight_times = model(batch_of(atoms)), model(batch_of(atoms * (2, 2, 2)))
    torch.testing.assert_close(eight_times["total_energy"], 8 * once["total_energy"])
    torch.testing.assert_close(eight_times["forces"], once["forces"].repeat(8, 1))
    torch.testing.assert_close(eight_times["stress"], once["stress"])


def test_a_batch_is_its_frames_one_by_one_and_is_left_as_it_was():
    model = force_field().eval()
    structures = [triclinic(0), water(), triclinic(1, num_atoms=2), Atoms("O", cell=np.zeros((3, 3)), pbc=False)]
    batch = batch_of(*structures)
    before = {name: value.clone() for name, value in batch.items()}
    together = model(batch)
    separate = [model(batch_of(atoms)) for atoms in structures]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([outputs[name] for outputs in separate]))
        assert not value.requires_grad
    assert batch.keys() == before.keys()
    for name, value in batch.items():
        torch.testing.assert_close(value, before[name], equal_nan=True)
        assert not value.requires_grad


def test_frames_without_a_volume_have_zero_stress_and_finite_gradients():
    model = force_field().train()
    slab = Atoms("HO", positions=[[0, 0, 0], [0, 0, 1.1]], cell=np.diag([3.0, 3.0, 0.0]), pbc=[True, True, False])
    outputs = model(batch_of(water(), slab, Atoms("O", cell=np.zeros((3, 3)), pbc=False), triclinic()))
    assert (outputs["stress"][:3] == 0).all()
    assert (outputs["stress"][3] != 0).any()
    sum(value.square().sum() for value in outputs.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    torch.testing.assert_close(outputs["atomic_energy"][5:6].detach(), outputs["total_energy"][2:3].detach())


def test_a_loss_of_forces_and_stress_has_the_right_gradient():
    model = force_field().train()
    batch = batch_of(triclinic(0), triclinic(1))

    def loss() -> torch.Tensor:
        outputs = model(batch)
        return outputs["forces"].square().sum() + 10 * outputs["stress"].square().sum() + outputs["total_energy"].mean()

    loss().backward()
    parameter = model.energy_model.energy_model.schnet.interactions[0].conv.nn[0].weight
    analytic = parameter.grad[2, 3].item()
    numerical, step = [], 1e-5
    with torch.no_grad():
        for sign in (1, -2):
            parameter[2, 3] += sign * step
            numerical.append(loss().item())
    assert analytic == pytest.approx((numerical[0] - numerical[1]) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients(context):
    model = force_field().eval()
    expected = model(batch_of(triclinic()))
    with context():
        outputs = model(batch_of(triclinic()))
        assert not any(value.requires_grad for value in outputs.values())
    for name, value in outputs.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("structures", [[], [water()], [triclinic(), water()]])
@pytest.mark.parametrize("output", ["total_energy", "atomic_energy", "forces", "stress"])
def test_every_output_reaches_every_parameter(output, structures):
    # DDP waits for the gradient of every parameter on every rank, also where a rank has no graphs
    model = force_field(trainable_scales=True).train()
    model(batch_of(*structures) if structures else empty_batch(torch.float64))[output].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert structures or (parameter.grad == 0).all(), name


def test_an_empty_batch_gives_empty_outputs():
    shapes = {"total_energy": (0, 1), "atomic_energy": (0, 1), "forces": (0, 3), "stress": (0, 3, 3)}
    for model in (force_field().train(), force_field().eval()):
        outputs = model(empty_batch(torch.float64))
        assert {name: tuple(value.shape) for name, value in outputs.items()} == shapes


def test_isolated_atoms_and_atoms_in_the_same_place():
    model = force_field().train()
    alone = model(batch_of(Atoms("OH", positions=[[0, 0, 0], [9, 0, 0]])))
    assert (alone["forces"] == 0).all()
    vectors = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    lengths = edge_lengths(vectors)
    lengths.sum().backward()
    assert (lengths == 0).all()
    assert (vectors.grad == 0).all()


def test_without_stress_there_is_none():
    outputs = force_field(stress=False)(batch_of(triclinic()))
    assert set(outputs) == {"total_energy", "atomic_energy", "forces"}
    expected = force_field()(batch_of(triclinic()))
    torch.testing.assert_close(outputs["forces"], expected["forces"])


def test_positions_that_already_require_grad_are_used_as_they_are():
    model = force_field().train()
    batch = batch_of(triclinic())
    batch["pos"].requires_grad_()
    outputs = model(batch)
    (gradient,) = torch.autograd.grad(outputs["total_energy"].sum(), batch["pos"])
    torch.testing.assert_close(-gradient, outputs["forces"])


def test_a_step_does_not_wait_for_the_device():
    model = force_field().train()
    batch = batch_of(triclinic(), water())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = model(batch)
        sum(value.square().sum() for value in outputs.values()).backward()
    operations = {event.key for event in profile.key_averages()}
    assert "aten::index_select" in operations
    assert not operations & {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}


@pytest.mark.parametrize("cast", [lambda model: model.float(), lambda model: model.to(torch.bfloat16).float()])
def test_shifts_keep_their_last_digits_in_any_dtype(cast):
    model = cast(force_field()).eval()
    scale_shift = model.energy_model
    assert scale_shift.shifts.dtype == torch.float64
    assert scale_shift.scales.dtype == torch.float32
    assert scale_shift.shifts.tolist() == SHIFTS
    outputs = model(batch_of(triclinic(), dtype=torch.float32))
    assert outputs["total_energy"].dtype == torch.float64
    assert outputs["forces"].dtype == torch.float32
    restored = force_field(energy_shifts=dict.fromkeys(TYPE_NAMES, 0.0)).float()
    restored.load_state_dict(model.state_dict())
    assert restored.energy_model.shifts.tolist() == SHIFTS


def test_scale_and_shift_are_applied_by_type():
    class Ones(torch.nn.Module):
        def forward(self, batch):
            return torch.ones(batch["pos"].shape[0])  # [num_atoms] is as good as [num_atoms, 1]

    module = ScaleShift(Ones(), [1.0, 2.0, 3.0, 4.0], SHIFTS)
    energies = module(batch_of(Atoms("HOCuAu", positions=np.eye(4, 3) * 9)))
    np.testing.assert_allclose(energies.flatten().numpy(), np.arange(1, 5) + SHIFTS, rtol=1e-15)
    outputs = ForceField(module)(batch_of(triclinic()))
    assert (outputs["forces"] == 0).all()


def test_initial_weights_are_reproducible_and_leave_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = force_field(seed=3), force_field(seed=3)
    assert torch.equal(torch.rand(1), expected)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    other = force_field(seed=4)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_the_model_can_be_pickled():
    model, batch = force_field().eval(), batch_of(triclinic())
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(batch)["forces"], model(batch)["forces"])


def isolated_atoms_file(path, energies) -> None:
    frames = []
    for symbol, energy in energies:
        atoms = Atoms(symbol)
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


def test_shifts_from_isolated_atoms(tmp_path):
    path = tmp_path / "isolated.xyz"
    isolated_atoms_file(path, [*zip(TYPE_NAMES, SHIFTS, strict=True), ("N", -1.0)])
    assert isolated_atom_energies(path)["O"] == SHIFTS[1]
    assert force_field(energy_shifts=str(path)).energy_model.shifts.tolist() == SHIFTS
    isolated_atoms_file(path, [("H", -1.0), ("Cu", -2.0)])
    with pytest.raises(KeyError, match=r"no value for \['O', 'Au'\]"):
        force_field(energy_shifts=path)
    isolated_atoms_file(path, [("H", -1.0), ("H2", -2.0)])
    with pytest.raises(ValueError, match=r"frame 1: .* one atom a frame, found 2"):
        isolated_atom_energies(path)
    isolated_atoms_file(path, [("H", -1.0), ("H", -2.0)])
    with pytest.raises(ValueError, match=r"frame 1: H has energy -2.0 eV here and -1.0 before"):
        isolated_atom_energies(path)
    with pytest.raises(FileNotFoundError, match="neither 'fit' nor the path"):
        force_field(energy_shifts="fitt")


def test_scales_by_type_and_trainable():
    model = force_field(energy_scales={name: index + 1.0 for index, name in enumerate(TYPE_NAMES)})
    assert model.energy_model.scales.tolist() == [1, 2, 3, 4]
    assert force_field().energy_model.scales.tolist() == pytest.approx([1.7] * 4)
    trainable = force_field(energy_scales=2.0, trainable_scales=True)
    assert "energy_model.scales" in dict(trainable.named_parameters())
    trainable.train()(batch_of(triclinic()))["total_energy"].sum().backward()
    assert trainable.energy_model.scales.grad.abs().sum() > 0


def test_bad_scales_shifts_and_sizes_are_refused():
    with pytest.raises(KeyError, match=r"no value for \['Au'\]"):
        force_field(energy_scales=dict.fromkeys(["H", "O", "Cu"], 1.0))
    with pytest.raises(TypeError, match="must be 'force_rms', a number or a mapping"):
        force_field(energy_scales="force_std")
    with pytest.raises(ValueError, match="not zero, found"):
        force_field(energy_scales=dict.fromkeys(["H", "O", "Cu", "Au"], 0.0))
    with pytest.raises(ValueError, match=r"above 0, or 'force_rms', found 0\.0"):
        force_field(energy_scales=0.0)
    with pytest.raises(TypeError, match="energy_shifts has nan for Cu; expected a finite number of eV"):
        force_field(energy_shifts={"H": 1.0, "O": 1.0, "Cu": float("nan"), "Au": 1.0})
    with pytest.raises(ValueError, match="training forces that are not all zero"):
        schnet_force_field(statistics(force_rms=float("nan")), cutoff=CUTOFF)
    with pytest.raises(ValueError, match=r"no such element is \['Xx'\]"):
        schnet_force_field(statistics(type_names=("H", "O", "Cu", "Xx")), cutoff=CUTOFF)
    with pytest.raises(ValueError, match="num_gaussians must be at least 2, found 1"):
        SchNetEnergy(CUTOFF, num_gaussians=1)
    with pytest.raises(ValueError, match="cutoff must be a positive"):
        SchNetEnergy(0.0)
