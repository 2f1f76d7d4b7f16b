"""Energy, forces and stress of a batch from any model of atomic energies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from harness.models.geometry import full_precision

__all__ = ["ForceField"]


class ForceField(nn.Module):
    r"""Predictions of a batch: energies, forces and stresses as derivatives of a sum of atomic energies.

    .. math:: E_g = \sum_{i \in g} E_i, \qquad F_i = -\frac{\partial E}{\partial r_i}, \qquad
              \sigma_g = \frac{1}{V_g} \left.\frac{\partial E_g}{\partial \varepsilon_g}\right|_{\varepsilon = 0}

    with a symmetric strain :math:`\varepsilon_g` that takes positions and cell vectors :math:`x` to
    :math:`x (1 + \varepsilon_g)`. The sign is ASE's: a positive trace pulls inwards (tension), and a virial
    :math:`-V \sigma` has the opposite sign. The strain trick is that of F. Knuth et al., Comput. Phys. Commun. 190,
    33 (2015).

    Reads ``pos``, ``cell``, ``batch``, ``num_atoms``, optionally ``pbc``, and the inputs of the energy model; the
    batch is not changed. Works in ``torch.no_grad()`` and in ``torch.inference_mode()``. In training mode the
    outputs carry the graph for a loss of any of them, and each depends on every parameter; in evaluation mode they are
    detached. Under autocast the layers of the energy model run in mixed precision; positions, strains, derivatives and
    sums of energies do not. A batch without graphs gives empty outputs, in training mode still connected to the
    parameters, if the energy model takes it.

    Args:
        energy_model: maps a batch to atomic energies in eV, ``[num_atoms, 1]`` or ``[num_atoms]``, and is
            differentiable in ``pos`` and, for the stress, in ``cell``.
        derive_stress: predict ``stress``.
    """

    def __init__(self, energy_model: nn.Module, derive_stress: bool = True) -> None:
        super().__init__()
        self.energy_model = energy_model
        self.derive_stress = bool(derive_stress)

    @property
    def takes_empty_batches(self) -> bool:
        """True if the energy model takes batches without atoms; a training calls no other one for them."""
        return bool(getattr(self.energy_model, "takes_empty_batches", False))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predictions of the batch.

        Returns:
            ``total_energy`` ``[num_graphs, 1]`` in eV, float64; ``atomic_energy`` ``[num_atoms, 1]`` in eV; ``forces``
            ``[num_atoms, 3]`` in eV/Å; and, if stresses are derived, ``stress`` ``[num_graphs, 3, 3]`` in eV/Å³, which
            is zero where a graph is not periodic in all three directions or its cell has no volume.
        """
        # Validation loops run in inference mode, whose tensors autograd refuses; copies of them are ordinary tensors.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = {name: _ordinary(value) for name, value in batch.items()}
            return self._derive(inputs)

    def _derive(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        graph_index = batch["batch"]
        num_graphs = batch["num_atoms"].shape[0]
        position = batch["pos"]
        if not position.requires_grad:
            position = position.detach().requires_grad_()
        variables = [position]
        batch["pos"] = position
        cell = batch["cell"]
        if self.derive_stress:
            displacement = torch.zeros(num_graphs, 3, 3, dtype=position.dtype, device=position.device)
            variables.append(displacement.requires_grad_())
            strain = 0.5 * (displacement + displacement.transpose(-1, -2))
            with full_precision(position.device):
                moved = torch.einsum("ia,iab->ib", position, strain.index_select(0, graph_index))
                batch["pos"] = position + moved
                batch["cell"] = cell + cell @ strain.to(cell.dtype)

        atomic_energy = self.energy_model(batch).reshape(-1, 1)
        total_energy = torch.zeros(num_graphs, 1, dtype=torch.float64, device=atomic_energy.device)
        total_energy = total_energy.index_add(0, graph_index, atomic_energy.double())

        if total_energy.requires_grad:
            # Backward products run in the dtypes of the forward ones. Under autocast it would round those of geometry.
            with full_precision(position.device):
                gradients = torch.autograd.grad(
                    total_energy.sum(), variables, create_graph=self.training, allow_unused=True, materialize_grads=True
                )
        else:  # nothing differentiable in the model, such as constants alone
            gradients = tuple(torch.zeros_like(variable) for variable in variables)

        if self.training:
            # Derivatives do not see constants such as the last bias, but DDP waits for a gradient of every parameter,
            # also under a loss of forces alone. Adding zero times the energy reaches them all.
            zero = 0.0 * total_energy.sum()
            gradients = tuple(gradient + zero.to(gradient.dtype) for gradient in gradients)
        outputs = {"total_energy": total_energy, "atomic_energy": atomic_energy, "forces": -gradients[0]}
        if self.derive_stress:
            outputs["stress"] = _over_volume(gradients[1], cell, batch.get("pbc"))
        if not self.training:
            outputs = {name: value.detach() for name, value in outputs.items()}
        return outputs


def _ordinary(value: Tensor) -> Tensor:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _over_volume(virial: Tensor, cell: Tensor, pbc: Tensor | None) -> Tensor:
    """``virial / |det cell|``, or zero where there is no volume to divide by; tensors of ``[num_graphs, 3, 3]``."""
    first, second, third = cell.detach().unbind(dim=1)
    # the triple product instead of det(), whose factorisation may wait for the device
    volume = (torch.linalg.cross(first, second, dim=-1) * third).sum(dim=-1).abs()
    bulk = volume > 0
    if pbc is not None:
        bulk = bulk & pbc.all(dim=-1)
    inverse = torch.where(bulk, torch.where(bulk, volume, 1.0).reciprocal(), 0.0)
    return virial * inverse.to(virial.dtype)[:, None, None]
