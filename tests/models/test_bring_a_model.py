"""A model of a package that is no extra, as the page on it shows: runs where TorchMD-Net is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from support.commands import NO_FIGURES, ROOT, read_csv, train

from harness.data import DataStatistics, Frame, collate, frame_to_sample

pytest.importorskip("torchmdnet")

TYPES = ("H", "C", "O")
STATISTICS = DataStatistics(TYPES, torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64), 2.0, 12.0, 5, 20)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from torchmd_tensornet import tensornet_force_field

    torch.manual_seed(0)
    made = tensornet_force_field(STATISTICS, cutoff=4.5, channels=8).double()
    sys.modules.pop("torchmd_tensornet")
    return made


def batch_of(*structures: Atoms) -> dict[str, torch.Tensor]:
    return collate([frame_to_sample(Frame(atoms), TYPES, 4.5, dtype=torch.float64) for atoms in structures])


def test_energies_and_forces_are_those_of_the_package(built: torch.nn.Module) -> None:
    from torchmdnet.models.tensornet import TensorNet

    energy = built.energy_model.energy_model
    own = TensorNet(8, 1, 16, cutoff_upper=4.5, static_shapes=False, dtype=torch.float64).double()
    own.load_state_dict(energy.body.state_dict(), strict=False)
    batch = batch_of(molecule("CH3CH2OH"), molecule("H2O"))
    position = batch["pos"].clone().requires_grad_()
    outputs = own(batch["atomic_numbers"], position, batch["batch"])
    atoms = 2.0 * energy.readout.pre_reduce(*outputs) + STATISTICS.energy_shifts[batch["atom_types"]].unsqueeze(1)
    expected = torch.zeros(2, 1, dtype=torch.float64).index_add(0, batch["batch"], atoms)
    (gradient,) = torch.autograd.grad(expected.sum(), position)
    found = built.eval()(batch)
    torch.testing.assert_close(found["total_energy"], expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["forces"], -gradient, rtol=1e-9, atol=1e-10)
    assert float(found["forces"].abs().max()) > 1e-3


def test_a_cell_below_the_cutoff_is_its_repetition(built: torch.nn.Module) -> None:
    atoms = Atoms("CO", scaled_positions=[[0.1, 0, 0], [0.5, 0.4, 0.6]], cell=np.diag([3.1, 3.4, 3.9]), pbc=True)
    small, large = built.eval()(batch_of(atoms)), built(batch_of(atoms.repeat((2, 1, 2))))
    torch.testing.assert_close(4 * small["total_energy"], large["total_energy"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small["stress"], large["stress"], rtol=1e-8, atol=1e-10)
    assert float(small["stress"].abs().max()) > 1e-4


def test_it_learns(tmp_path: Path) -> None:
    conf, small = ROOT / "examples" / "own_config", ["data.num_frames=40", "data.split={val:8,test:8}"]
    settings = ["max_epochs=4", "optimizer.lr=0.01", "logger=csv", "data.batch_size=4", *NO_FIGURES]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'examples'}"}
    arguments = [f"--config-dir={conf}", "experiment=alloy", "model=tensornet", *small, *settings]
    done = train(*arguments, folder=tmp_path, ranks=2, **path)
    assert done.code == 0, done.err[-3000:]
    errors = [row["val0_epoch/forces_rmse"] for row in read_csv(done.runs[0]) if "val0_epoch/forces_rmse" in row]
    assert errors[-1] < 0.8 * errors[0]
