"""Energies of atoms in eV from a model's outputs of order one: a scale and a shift for each type."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ase.io
import torch
from torch import Tensor, nn

from harness.models.heads import head_of_graphs
from harness.support.checks import is_number

__all__ = [
    "ScaleShift",
    "TypeStatistics",
    "isolated_atom_energies",
    "reference_energies",
    "resolve_scales",
    "resolve_shifts",
    "set_reference_energies",
]


class TypeStatistics(Protocol):
    """Statistics of a training set that scales and shifts are made of."""

    @property
    def type_names(self) -> Sequence[str]:
        """Chemical symbols in the order of ``atom_types``."""

    @property
    def energy_shifts(self) -> Tensor:
        """Least-squares energies per type in eV, float64 ``[num_types]``."""

    @property
    def force_rms(self) -> float:
        """Root mean square of the force components in eV/Å."""


class ScaleShift(nn.Module):
    r"""Energies of atoms :math:`E_i = \sigma_{t_i} \varepsilon_i + \mu_{t_i}` in eV, float64 ``[num_atoms, 1]``.

    Wraps a model that returns :math:`\varepsilon_i`, as ``[num_atoms, 1]`` or ``[num_atoms]``. Shifts of real data are
    of the order of -1000 eV, where float32 has steps of 0.1 meV: they are kept and added in float64, also after
    ``.float()``, ``.half()`` or ``.to(dtype)``.

    With ``heads`` there are shifts :math:`\mu_{h,t}` for each of them, and ``set_index`` of the batch, int64
    ``[num_graphs]``, says which head a graph has.

    Args:
        energy_model: maps a batch to outputs of order one.
        scales: :math:`\sigma_t` in eV, one per type.
        shifts: :math:`\mu_t` in eV, one per type; with heads, such a list for each head.
        trainable_scales: make the scales parameters, which are trained.
        heads: their names, such as those of the data sets of a mixture; None for a model without.

    Raises:
        ValueError: if scales and shifts differ in length, or are not finite, or a scale is zero.
    """

    scales: Tensor
    shifts: Tensor

    def __init__(
        self,
        energy_model: nn.Module,
        scales: Sequence[float],
        shifts: Sequence[float] | Sequence[Sequence[float]],
        trainable_scales: bool = False,
        heads: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        shift = torch.tensor(shifts, dtype=torch.float64)
        if shift.shape != (len(scales),) if heads is None else shift.shape != (len(heads), len(scales)):
            per = "" if heads is None else f" for each of the heads {', '.join(heads)}"
            raise ValueError(
                f"one scale and one shift per type{per} expected, found {len(scales)} and {list(shift.shape)}"
            )
        if not all(math.isfinite(scale) and scale != 0 for scale in scales):
            raise ValueError(f"energy scales must be finite and not zero, found {list(scales)}")
        if not shift.isfinite().all():
            raise ValueError(f"energy shifts must be finite, found {list(shifts)}")
        self.energy_model = energy_model
        scale = torch.tensor([float(value) for value in scales])
        if trainable_scales:
            self.scales = nn.Parameter(scale)
        else:
            self.register_buffer("scales", scale)
        self.register_buffer("shifts", shift)
        self.set_heads: tuple[str, ...] = tuple(heads or ())
        """Names of the heads, which ``set_index`` of a batch counts; empty without."""

    @property
    def takes_empty_batches(self) -> bool:
        """True if the energy model takes batches without atoms."""
        return bool(getattr(self.energy_model, "takes_empty_batches", False))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Energies ``[num_atoms, 1]`` in eV, float64."""
        atom_types = batch["atom_types"]
        outputs: Tensor = self.energy_model(batch).reshape(-1, 1)
        scaled = outputs * self.scales.index_select(0, atom_types).unsqueeze(-1)
        if not self.set_heads:
            return scaled.double() + self.shifts.index_select(0, atom_types).unsqueeze(-1)
        head = head_of_graphs(batch, self.set_heads).index_select(0, batch["batch"])
        return scaled.double() + self.shifts[head, atom_types].unsqueeze(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaleShift:
        # .float() and its like convert every floating-point buffer; the shifts only follow the device
        exact = self.shifts
        super()._apply(fn, recurse)
        if self.shifts.dtype != torch.float64:
            self.shifts = exact.to(self.shifts.device)
        return self


def reference_energies(model: nn.Module, type_names: Sequence[str]) -> dict[str, float] | None:
    """Reference energies in eV by type name: the tensor ``shifts`` of the first part of a model with one for each type.

    Returns:
        None for a model that has none, or some for each of several heads, or splits them over the ranks.
    """
    shifts = _shifts_of(model, len(type_names))
    return None if shifts is None else dict(zip(type_names, shifts.detach().double().flatten().tolist(), strict=True))


def set_reference_energies(model: nn.Module, energies: Sequence[float]) -> None:
    """Give the tensor that :func:`reference_energies` reads other values, in eV in the order of the types.

    Raises:
        ValueError: the model has no such tensor.
    """
    shifts = _shifts_of(model, len(energies))
    if shifts is None:
        raise ValueError(
            f"the model has no reference energies: no part of it has a tensor `shifts` of {len(energies)} numbers."
        )
    with torch.no_grad():
        shifts.copy_(torch.tensor(list(energies), dtype=torch.float64).reshape(shifts.shape))


def _shifts_of(model: nn.Module, num_types: int) -> Tensor | None:
    for part in model.modules():
        shifts = None if getattr(part, "set_heads", None) else getattr(part, "shifts", None)
        if isinstance(shifts, Tensor) and type(shifts) in (Tensor, nn.Parameter) and shifts.numel() == num_types:
            return shifts
    return None


def isolated_atom_energies(path: str | os.PathLike[str], energy_key: str = "energy") -> dict[str, float]:
    """Energies in eV by chemical symbol from a file of isolated atoms: frames of one atom with an energy.

    Args:
        path: of the file.
        energy_key: name of the energy in the file, as in ``data.keys.energy``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a frame has more than one atom or no energy, or an element has two different energies.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of isolated atoms at {file}")
    energies: dict[str, float] = {}
    for index, atoms in enumerate(ase.io.read(file, index=":")):
        if len(atoms) != 1:
            raise ValueError(
                f"{file}, frame {index}: a file of isolated atoms has one atom a frame, found {len(atoms)}. Isolated "
                f"atoms among the training frames are found by their config_type=IsolatedAtom (energy_shifts=fit)"
            )
        labels = {**atoms.info, **({} if atoms.calc is None else atoms.calc.results)}
        symbol = atoms.get_chemical_symbols()[0]
        if not is_number(labels.get(energy_key)):
            raise ValueError(
                f"{file}, frame {index}: no energy under {energy_key!r} (data.keys.energy), found {sorted(labels)}. "
                f"Rename it in the file, set data.keys.energy to the name that all files have, or write the energies "
                f"as numbers: model.energy_shifts={{{symbol}: eV, ...}}"
            )
        energy = float(labels[energy_key])
        if energies.setdefault(symbol, energy) != energy:
            raise ValueError(
                f"{file}, frame {index}: {symbol} has energy {energy} eV here and {energies[symbol]} before"
            )
    return energies


def _by_type(values: Mapping[Any, Any], type_names: Sequence[str], origin: str) -> list[float]:
    """Values in the order of ``type_names``; elements that are not among the types are left out."""
    missing = [name for name in type_names if name not in values]
    if missing:
        raise KeyError(f"{origin} has no value for {missing}; it has {sorted(values)} and the types are {type_names}")
    for name in type_names:
        if not is_number(values[name]) or not math.isfinite(values[name]):
            raise TypeError(f"{origin} has {values[name]!r} for {name}; expected a finite number of eV")
    return [float(values[name]) for name in type_names]


def resolve_shifts(
    energy_shifts: Mapping[str, float] | str | os.PathLike[str], statistics: TypeStatistics
) -> list[float]:
    """Energy shifts in eV in the order of ``statistics.type_names``.

    Args:
        energy_shifts: eV by chemical symbol; or ``"fit"`` for the least-squares shifts of the training set; or the
            path of a file of isolated atoms, with energies under the name ``statistics.energy_key``.
        statistics: of the training set.

    Raises:
        FileNotFoundError: if it is a path without a file.
        KeyError: if a type has no shift.
        TypeError: if it is none of these.
    """
    type_names = list(statistics.type_names)
    if isinstance(energy_shifts, Mapping):
        return _by_type(energy_shifts, type_names, "energy_shifts")
    if energy_shifts == "fit":
        return torch.as_tensor(statistics.energy_shifts, dtype=torch.float64).tolist()
    if isinstance(energy_shifts, (str, os.PathLike)):
        if not Path(energy_shifts).expanduser().is_file():
            raise FileNotFoundError(
                f"energy_shifts={str(energy_shifts)!r} is neither 'fit' nor the path of a file of isolated atoms"
            )
        energy_key = getattr(statistics, "energy_key", "energy")
        return _by_type(isolated_atom_energies(energy_shifts, energy_key), type_names, str(energy_shifts))
    raise TypeError(
        "energy_shifts must be 'fit', a mapping of symbols to eV, or the path of a file of isolated atoms, found "
        f"{energy_shifts!r}"
    )


def resolve_scales(energy_scales: Mapping[str, float] | str | float, statistics: TypeStatistics) -> list[float]:
    """Energy scales in eV in the order of ``statistics.type_names``.

    Args:
        energy_scales: one number of eV for all types; or eV by chemical symbol; or ``"force_rms"``, the root mean
            square of the force components of the training set times 1 Å.
        statistics: of the training set.

    Raises:
        KeyError: if a type has no scale.
        TypeError: if it is none of these.
        ValueError: if a scale is zero or not finite, or the training set has no forces, or none but zeros, to take it
            from.
    """
    type_names = list(statistics.type_names)
    if isinstance(energy_scales, Mapping):
        scales = _by_type(energy_scales, type_names, "energy_scales")
        if 0.0 in scales:
            raise ValueError(f"energy_scales are numbers of eV that are not zero, found {dict(energy_scales)!r}")
        return scales
    if energy_scales == "force_rms":
        if not (math.isfinite(statistics.force_rms) and statistics.force_rms > 0):
            hint = getattr(statistics, "hints", {}).get("forces")
            if hint:
                raise ValueError(
                    f"none of the training frames has forces, which energy_scales='force_rms' needs. {hint} For a "
                    f"training without forces give a number of eV, such as model.energy_scales=1.0"
                )
            raise ValueError(
                f"energy_scales='force_rms' needs training forces that are not all zero, their RMS is "
                f"{statistics.force_rms}. Are the label keys of the data right? Otherwise give a number of eV, such as "
                f"energy_scales=1.0"
            )
        return [float(statistics.force_rms)] * len(type_names)
    if is_number(energy_scales):
        if not 0 < energy_scales < math.inf:
            raise ValueError(f"energy_scales is a number of eV above 0, or 'force_rms', found {energy_scales!r}")
        return [float(energy_scales)] * len(type_names)
    raise TypeError(
        f"energy_scales must be 'force_rms', a number or a mapping of symbols to eV, found {energy_scales!r}"
    )
