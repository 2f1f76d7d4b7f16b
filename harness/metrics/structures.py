r"""Metrics of whole structures: energy and forces within thresholds, and means over structures of their own errors.

They get the whole dictionaries of predictions and labels, and stand in a list of components without a ``field``. Their
states are sums, which travel in the row like all others. A structure of weight w counts as w structures do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from harness.fields import NUM_ATOMS, Batch, field_spec, get_field
from harness.metrics.errors import check_same_shape
from harness.metrics.frames import weights_in
from harness.metrics.vectors import _positive

__all__ = ["EnergyForcesWithinThreshold", "MeanOverStructures"]

_TOTAL_ENERGY, _FORCES, _BATCH = "total_energy", "forces", "batch"


class _MeanOfStructures(Metric):
    """Base: the mean of a number of each structure, over those that have one."""

    full_state_update = False
    takes_weights = True

    structure_sum: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("structure_sum", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor, counts: Tensor, target: Batch, label: str | None = None) -> None:
        """Add values ``[num_graphs]`` of the structures for which ``counts`` is true, with the weights of a label."""
        number = counts.to(torch.float64)
        for name in weights_in(target, label):
            number = number * target[name].reshape(-1)
        self.structure_sum = self.structure_sum + (torch.where(number > 0, values, 0.0) * number).sum()
        self.count = self.count + number.sum()

    def compute(self) -> Tensor:
        """Value over everything added so far: a float64 scalar, NaN without data."""
        has_data = self.count > 0
        return torch.where(has_data, self.structure_sum / torch.where(has_data, self.count, 1.0), torch.nan)


class EnergyForcesWithinThreshold(_MeanOfStructures):
    r"""Fraction of structures whose energy and forces are all within thresholds, OC20's EFwT; larger is better.

    A structure counts as right if :math:`|E - E^\mathrm{ref}| < \tau_E` and, for every component of the force on every
    atom, :math:`|F_{ik} - F^\mathrm{ref}_{ik}| < \tau_F`. Structures without an energy, or with a force component
    missing, are left out. A number from 0 to 1, where OC20 prints percent; there, forces are those of the free atoms,
    here of all.

    Args:
        energy: :math:`\tau_E` in eV, of the whole structure.
        forces: :math:`\tau_F` in eV/Å.

    Raises:
        TypeError, ValueError: a threshold that is not a positive number.

    Source: L. Chanussot et al., ACS Catal. 11, 6059 (2021), with 0.02 eV and 0.03 eV/Å.
    """

    is_differentiable = False
    higher_is_better = True

    def __init__(self, energy: float = 0.02, forces: float = 0.03, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.energy = _positive(energy, "energy")
        self.forces = _positive(forces, "forces")

    def update(self, preds: Batch, target: Batch) -> None:
        """Add a batch.

        Args:
            preds: with ``total_energy`` ``[num_graphs, 1]`` and ``forces`` ``[num_atoms, 3]``.
            target: likewise, with the number of the structure of each atom.

        Raises:
            KeyError: a field is missing.
            ValueError: shapes differ.
        """
        energy = _errors(_TOTAL_ENERGY, preds, target).reshape(-1)
        forces = _errors(_FORCES, preds, target)
        largest = energy.new_zeros(len(energy)).scatter_reduce(
            0,
            _structure_of_atoms(target, len(forces)),
            forces.reshape(len(forces), -1).amax(1).to(energy.dtype),
            "amax",
        )
        known = ~(_is_missing(_TOTAL_ENERGY, target, len(energy)) | _is_missing(_FORCES, target, len(energy)))
        right = (energy < self.energy) & (largest < self.forces)
        # a prediction that is no number is wrong, and must not pass for a measurement
        values = torch.where((energy + largest).isnan(), torch.nan, right.to(torch.float64))
        self._add(values, known, target)

    def __str__(self) -> str:
        return "efwt"


class MeanOverStructures(_MeanOfStructures):
    r"""Mean over structures of each one's own error, :math:`\frac{1}{G} \sum_g e_g`, in the unit of the field.

    ``mae`` is :math:`e_g = \frac{1}{n_g} \sum_{i \in g} |p_i - t_i|` over the :math:`n_g` elements of a structure, and
    ``rmse`` is :math:`e_g = \sqrt{\frac{1}{n_g} \sum_{i \in g} (p_i - t_i)^2}`. A large structure then counts as much
    as a small one, where a mean over all elements counts it by its number of atoms. Elements without a label are left
    out, and structures without any.

    Args:
        of: a field of nodes or graphs, such as ``forces``.
        error: ``mae`` or ``rmse``.

    Raises:
        KeyError: an unknown field.
        ValueError: an unknown error, or a field of edges.
    """

    is_differentiable = True
    higher_is_better = False

    def __init__(self, of: str = "forces", error: str = "mae", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if error not in ("mae", "rmse"):
            raise ValueError(f"error is 'mae' or 'rmse', found {error!r}.")
        if field_spec(of).level not in ("node", "graph"):
            raise ValueError(
                f"of is a field of nodes or graphs, found {of!r}, which is one of {field_spec(of).level}s."
            )
        self.of = of
        self.error = error

    def update(self, preds: Batch, target: Batch) -> None:
        """Add a batch.

        Args:
            preds: with the field.
            target: with the field, and the number of the structure of each atom.

        Raises:
            KeyError: the field is missing.
            ValueError: shapes differ.
        """
        errors = _errors(self.of, preds, target)
        reference = get_field(target, self.of, "target")
        known = ~reference.isnan() if reference.is_floating_point() else torch.ones_like(reference, dtype=torch.bool)
        if self.error == "rmse":
            errors = errors.square()
        rows = len(errors)
        sums = torch.where(known, errors, 0.0).reshape(rows, -1).sum(1, dtype=torch.float64)
        counts = known.reshape(rows, -1).sum(1, dtype=torch.float64)
        if field_spec(self.of).level == "node":
            structure, zeros = _structure_of_atoms(target, rows), sums.new_zeros(_num_structures(target))
            sums, counts = zeros.index_add(0, structure, sums), zeros.index_add(0, structure, counts)
        means = sums / counts.clamp(min=1)
        if self.error == "rmse":
            perfect = means == 0
            means = torch.where(perfect, 0.0, torch.where(perfect, 1.0, means).sqrt())
        self._add(means, counts > 0, target, self.of)

    def __str__(self) -> str:
        return f"{self.of}_{self.error}_by_structure"


def _errors(field: str, preds: Batch, target: Batch) -> Tensor:
    """Absolute errors of a field; those without a label are 0, and so is their gradient."""
    prediction, reference = get_field(preds, field, "predictions"), get_field(target, field, "target")
    check_same_shape(prediction, reference, f"Field {field!r}")
    if not reference.is_floating_point():
        return (prediction - reference).abs()
    known = ~reference.isnan()
    return (torch.where(known, prediction, 0.0) - torch.where(known, reference, 0.0)).abs()


def _is_missing(field: str, target: Batch, num_graphs: int) -> Tensor:
    """Mask of the structures that lack a part of a label: bool ``[num_graphs]``."""
    reference = get_field(target, field, "target")
    missing = reference.isnan().reshape(len(reference), -1).any(1)
    if field_spec(field).level == "graph":
        return missing
    number = missing.new_zeros(num_graphs, dtype=torch.int64)
    return number.index_add(0, _structure_of_atoms(target, len(reference)), missing.to(torch.int64)) > 0


def _num_structures(target: Batch) -> int:
    return len(get_field(target, NUM_ATOMS, "target"))


def _structure_of_atoms(target: Batch, num_atoms: int) -> Tensor:
    """Number of the structure of each atom: int64 ``[num_atoms]``."""
    if _BATCH in target:
        return target[_BATCH]
    numbers = get_field(target, NUM_ATOMS, "target").reshape(-1)
    return torch.arange(len(numbers), device=numbers.device).repeat_interleave(numbers, output_size=num_atoms)
