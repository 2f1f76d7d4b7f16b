"""A model of your own: atomic energies in plain PyTorch, made a force field and trained on a small alloy.

    python examples/own_model.py

You write the energy of each atom. ``ForceField`` adds up the energies of a structure and derives forces and stress by
autograd; ``ForceFieldModule`` trains it on one rank or many. Takes seconds on a laptop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from harness import EnergyForceStressLoss, EnergyForceStressMetrics
from harness.data import DataStatistics, EmbeddedAlloyDataModule
from harness.models import ForceField, ScaleShift
from harness.models.geometry import edge_lengths, edge_vectors
from harness.module import ForceFieldModule


class PairDensityEnergy(nn.Module):
    r"""Energy of each atom from the species and distances of its neighbours, ``[num_atoms, 1]``, of order one.

    .. math:: \varepsilon_i = \mathrm{MLP}\Big(a_{t_i}, \sum_{j \in N(i)} C(d_{ij})\, B(d_{ij}) \otimes b_{t_j}\Big)

    with Gaussians :math:`B` of the distance, a cutoff function :math:`C` that ends smoothly, and a learned vector
    :math:`a_t`, :math:`b_t` for each type.
    """

    def __init__(self, num_types: int, cutoff: float, num_basis: int = 12, channels: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("centers", torch.linspace(1.5, cutoff, num_basis))
        self.width = (cutoff - 1.5) / num_basis
        self.center_types = nn.Embedding(num_types, channels)
        self.neighbor_types = nn.Embedding(num_types, channels)
        self.num_densities = num_basis * channels
        self.mlp = nn.Sequential(
            nn.Linear(channels + self.num_densities, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Energies of the atoms; everything they depend on is computed from ``pos`` and ``cell``, for the autograd."""
        types = batch["atom_types"]
        center, neighbor = batch["edge_index"]
        lengths = edge_lengths(edge_vectors(batch)).unsqueeze(-1)
        basis = torch.exp(-0.5 * ((lengths - self.centers) / self.width).square())
        smooth = 0.5 * (torch.cos(torch.pi * lengths / self.cutoff) + 1) * (lengths < self.cutoff)
        seen = (smooth * basis).unsqueeze(-1) * self.neighbor_types(types[neighbor]).unsqueeze(-2)
        density = lengths.new_zeros(len(types), self.num_densities)
        density = density.index_add(0, center, seen.flatten(1))
        return self.mlp(torch.cat((self.center_types(types), density), dim=-1))


def pair_density_force_field(
    statistics: DataStatistics, *, cutoff: float, hidden: int = 64, stress: bool = True
) -> ForceField:
    """A force field for a training set: ``harness-train`` calls this with the statistics of the data.

    ``ScaleShift`` turns the outputs of order one into eV: a least-squares energy for each type, and the scale of the
    forces. A model that predicts eV itself does without.
    """
    energy = PairDensityEnergy(len(statistics.type_names), cutoff, hidden=hidden)
    scales = [statistics.force_rms] * len(statistics.type_names)
    return ForceField(ScaleShift(energy, scales, statistics.energy_shifts.tolist()), derive_stress=stress)


def main() -> None:
    """Train on 80 frames for a few epochs, and test."""
    seed_everything(0, verbose=False)
    data = EmbeddedAlloyDataModule(num_frames=120, split={"val": 20, "test": 20}, cutoff=4.5, batch_size=8)
    data.setup()
    module = ForceFieldModule(
        pair_density_force_field(data.statistics, cutoff=data.cutoff),
        loss=EnergyForceStressLoss({"total_energy": 10, "forces": 1, "stress": 100}),
        val_metrics=EnergyForceStressMetrics({"forces_rmse": 1}),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
        type_names=data.type_names,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=10,
            accelerator="cpu",
            inference_mode=False,  # forces are gradients, in validation too
            use_distributed_sampler=False,  # the data module brings samplers that neither pad nor drop
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        (results,) = trainer.test(module, datamodule=data, verbose=False)
    for name in ("per_atom_energy_rmse", "forces_rmse", "stress_rmse"):
        print(f"test {name} {results[f'test0_epoch/{name}']:.4f}")
    print(f"RMS of the training forces {data.statistics.force_rms:.4f}")


if __name__ == "__main__":
    main()
