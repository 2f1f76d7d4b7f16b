"""Reference energies of the atom types, added to what a model of another package predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ReferenceEnergies", "connected_zero"]


class ReferenceEnergies(nn.Module):
    r"""Reference energy of each graph, :math:`E^0_g = \sum_{i \in g} \mu_{t_i}` in eV, float64 ``[num_graphs, 1]``.

    The references of real data are of the order of -1000 eV, where float32 has steps of 0.1 meV: they are kept and
    added in float64, also after ``.float()``, ``.half()`` or ``.to(dtype)``.

    Args:
        shifts: :math:`\mu_t` in eV, one per type.

    Raises:
        ValueError: a reference that is not finite.
    """

    shifts: Tensor

    def __init__(self, shifts: Sequence[float]) -> None:
        super().__init__()
        if not all(math.isfinite(shift) for shift in shifts):
            raise ValueError(f"energy shifts must be finite, found {list(shifts)}")
        self.register_buffer("shifts", torch.tensor([float(value) for value in shifts], dtype=torch.float64))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Reference energies ``[num_graphs, 1]``."""
        per_atom = self.of_atoms(batch)
        sums = per_atom.new_zeros(batch["num_atoms"].shape[0], 1)
        return sums.index_add(0, batch["batch"], per_atom)

    def of_atoms(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Reference energy of each atom, float64 ``[num_atoms, 1]``."""
        return self.shifts.index_select(0, batch["atom_types"]).unsqueeze(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReferenceEnergies:
        # .float() and its like convert every floating-point buffer; the references only follow the device
        exact = self.shifts
        super()._apply(fn, recurse)
        if self.shifts.dtype != torch.float64:
            self.shifts = exact.to(self.shifts.device)
        return self


def connected_zero(module: nn.Module, like: Tensor) -> Tensor:
    """Scalar 0 that depends on every trained parameter, with a gradient of zero for each.

    A rank without frames has nothing to put into a model, but DDP waits for its gradients all the same.

    Args:
        module: with the parameters.
        like: tensor of the dtype and device of the result.
    """
    trained: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total = like.new_zeros(())
    for parameter in trained:
        total = total + parameter.flatten()[:1].sum().to(like.dtype)
    return 0.0 * total
