r"""Metrics of whole structures: energy and forces within thresholds, and means over structures of their own errors.

A modifier makes a number of each structure of the fields that it reads, and the metric is the mean of these numbers: a
sum and a count as other error metrics are. So weights, sets and groups of frames count as ever. Components give no
``field``, and by themselves the metrics get the whole dictionaries of predictions and labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.fields import NUM_ATOMS, Batch, FieldModifier, Level, field_spec, get_field, labels_of
from harness.metrics.errors import ErrorMetric, check_same_shape
from harness.metrics.frames import weights_in
from harness.metrics.row import Elements, sum_rows
from harness.metrics.vectors import _positive

__all__ = ["EnergyForcesWithinThreshold", "MeanOverStructures", "StructureErrors", "StructuresWithin"]

_TOTAL_ENERGY, _FORCES, _BATCH = "total_energy", "forces", "batch"


@dataclass(frozen=True)
class StructuresWithin:
    """Modifier: 1 for each structure whose energy and forces are all within thresholds, and 0 for others.

    The target is 0, or NaN for structures that lack a label. Shapes: both ``[num_graphs]``, float64.

    Attributes:
        energy: threshold in eV.
        forces: threshold in eV/Å.
    """

    energy: float
    forces: float

    level: ClassVar[Level] = "graph"
    shape: ClassVar[tuple[int, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = (_TOTAL_ENERGY, _FORCES)

    def __call__(self, preds: Batch, target: Batch) -> tuple[Tensor, Tensor]:
        """Number of each structure, and its target."""
        energy = _errors(_TOTAL_ENERGY, preds, target).detach().reshape(-1)
        forces = _errors(_FORCES, preds, target).detach()
        largest = energy.new_zeros(len(energy)).scatter_reduce(
            0, _structure_of_atoms(target, len(forces)), forces.flatten(1).amax(1).to(energy.dtype), "amax"
        )
        right = (energy < self.energy) & (largest < self.forces)
        # a prediction that is no number is wrong, and must not pass for a measurement
        values = torch.where((energy + largest).isnan(), torch.nan, right.to(torch.float64))
        for name in self.fields:  # a gradient of exactly 0, so that DDP finds one
            values = values + get_field(preds, name, "predictions").reshape(-1)[:0].sum(dtype=torch.float64)
        return values, self.target_of(target)

    def target_of(self, target: Batch) -> Tensor:
        """Target alone."""
        number = _num_structures(target)
        missing = _is_missing(_TOTAL_ENERGY, target, number) | _is_missing(_FORCES, target, number)
        return _nan_where(missing)

    def __str__(self) -> str:
        return "energy_and_forces_within"


@dataclass(frozen=True)
class StructureErrors:
    r"""Modifier: error of each structure in a field, :math:`e_g` of :class:`MeanOverStructures`.

    The target is 0, or NaN for structures without any label. Shapes: both ``[num_graphs]``, float64.

    Attributes:
        field: of nodes or graphs.
        error: ``mae`` or ``rmse``.
    """

    field: str
    error: str

    level: ClassVar[Level] = "graph"
    shape: ClassVar[tuple[int, ...]] = ()

    def __call__(self, preds: Batch, target: Batch) -> tuple[Tensor, Tensor]:
        """Error of each structure, and its target."""
        errors, numbers = _errors(self.field, preds, target), self._numbers(target)
        if self.error == "rmse":
            errors = errors.square()
        means = self._of_structures(sum_rows(errors), target) / numbers.clamp(min=1)
        if self.error == "rmse":
            perfect = means == 0  # rather than `means > 0`, which would hide a NaN
            means = torch.where(perfect, 0.0, torch.where(perfect, 1.0, means).sqrt())
        return means, _nan_where(numbers == 0)

    def target_of(self, target: Batch) -> Tensor:
        """Target alone."""
        return _nan_where(self._numbers(target) == 0)

    def _numbers(self, target: Batch) -> Tensor:
        """Number of labelled elements of each structure: float64 ``[num_graphs]``."""
        return self._of_structures(sum_rows(~get_field(target, self.field, "target").isnan()), target)

    def _of_structures(self, rows: Tensor, target: Batch) -> Tensor:
        """Sum of a number of each row over the rows of each structure."""
        if field_spec(self.field).level == "graph":
            return rows
        return rows.new_zeros(_num_structures(target)).index_add(0, _structure_of_atoms(target, len(rows)), rows)

    def __str__(self) -> str:
        return f"{self.field}_{self.error}_by_structure"


class _MeanOfStructures(ErrorMetric):
    """Base: the mean of a number of each structure, over those that have one."""

    own_field: FieldModifier

    def __init__(self, own_field: FieldModifier, **kwargs: Any) -> None:
        super().__init__(own_field, **kwargs)
        self.own_field = own_field

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Numbers of the structures."""
        return prediction - target

    def update(self, preds: Batch, target: Batch) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            preds: with the fields that are read.
            target: likewise, with the number of the structure of each atom (``batch``, or ``num_atoms``), and perhaps
                weights of frames.

        Raises:
            KeyError: a field is missing.
            ValueError: shapes differ.
        """
        prediction, reference = self.own_field(preds, target)
        weights = [target[name].reshape(-1).to(torch.float64) for name in weights_in(target, labels_of(self.own_field))]
        product = math.prod(weights[1:], start=weights[0]) if weights else None
        self._add(Elements.read(prediction, reference, ignore_nan=True, weights=product))


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
    dimensionless = True

    def __init__(self, energy: float = 0.02, forces: float = 0.03, **kwargs: Any) -> None:
        super().__init__(StructuresWithin(_positive(energy, "energy"), _positive(forces, "forces")), **kwargs)

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

    def __init__(self, of: str = "forces", error: str = "mae", **kwargs: Any) -> None:
        if error not in ("mae", "rmse"):
            raise ValueError(f"error is 'mae' or 'rmse', found {error!r}.")
        if field_spec(of).level not in ("node", "graph"):
            raise ValueError(
                f"of is a field of nodes or graphs, found {of!r}, which is one of {field_spec(of).level}s."
            )
        super().__init__(StructureErrors(of, error), **kwargs)

    def __str__(self) -> str:
        return str(self.own_field)


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
    missing = sum_rows(reference.isnan()) > 0
    if field_spec(field).level == "graph":
        return missing
    number = missing.new_zeros(num_graphs, dtype=torch.int64)
    return number.index_add(0, _structure_of_atoms(target, len(reference)), missing.to(torch.int64)) > 0


def _nan_where(mask: Tensor) -> Tensor:
    """Zeros, but NaN where a mask is true: float64 of its shape."""
    return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(mask, torch.nan)


def _num_structures(target: Batch) -> int:
    return len(get_field(target, NUM_ATOMS, "target"))


def _structure_of_atoms(target: Batch, num_atoms: int) -> Tensor:
    """Number of the structure of each atom: int64 ``[num_atoms]``."""
    if _BATCH in target:
        return target[_BATCH]
    numbers = get_field(target, NUM_ATOMS, "target").reshape(-1)
    return torch.arange(len(numbers), device=numbers.device).repeat_interleave(numbers, output_size=num_atoms)
