"""Ready-made managers for the common trainings: energy, forces and stress, as loss and as metrics.

Every function returns a plain :class:`~harness.metrics.MetricsManager`; the names of the components are given in each
docstring, and are what schedules, sweeps and log keys refer to. Names and defaults follow NequIP's simplified wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.fields import FieldModifier, PerAtomModifier
from harness.metrics import (
    ErrorMetric,
    MaximumAbsoluteError,
    MeanAbsoluteError,
    MeanSquaredError,
    MetricsManager,
    RootMeanSquaredError,
)
from harness.schedules import Schedule

__all__ = [
    "EnergyForceLoss",
    "EnergyForceMetrics",
    "EnergyForceStressLoss",
    "EnergyForceStressMetrics",
    "EnergyOnlyLoss",
    "EnergyOnlyMetrics",
]

Coeffs = Mapping[str, float | None]
Extra = Sequence[Mapping[str, Any]]

_ERRORS: dict[str, type[ErrorMetric]] = {
    "rmse": RootMeanSquaredError,
    "mae": MeanAbsoluteError,
    "maxabserr": MaximumAbsoluteError,
}
_MONITORED: dict[str, tuple[str, str | FieldModifier]] = {
    "total_energy": ("total_energy", "total_energy"),
    "per_atom_energy": ("total_energy", PerAtomModifier("total_energy")),
    "forces": ("forces", "forces"),
    "stress": ("stress", "stress"),
}
"""Prefix of the component's name → (its key in ``ignore_nan``, what it reads)."""


def EnergyForceLoss(
    coeffs: Coeffs | None = None,
    per_atom_energy: bool = True,
    per_type_forces_coeffs: Mapping[str, float] | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
) -> MetricsManager:
    """Loss of energy and force mean squared errors: ``per_atom_energy_mse`` (or ``total_energy_mse``), ``forces_mse``.

    Args:
        coeffs: weights of ``total_energy`` and ``forces``; 1 for one that is not named, null leaves it out of the sum.
        per_atom_energy: divide energies by the number of atoms, (eV/atom)², instead of eV².
        per_type_forces_coeffs: ``{type: weight}``; the force error becomes the weighted mean over the atom types.
        type_names: names of the atom types.
        ignore_nan: ``{field: true}`` leaves out NaN labels of ``total_energy`` or ``forces``.
        extra_metrics: further components, as :class:`~harness.metrics.MetricsManager` takes them.
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`.

    Raises:
        ValueError: an unknown key; the valid ones are listed.
    """
    return _loss(
        ("total_energy", "forces"),
        coeffs,
        per_atom_energy,
        per_type_forces_coeffs,
        type_names,
        ignore_nan,
        extra_metrics,
        schedule,
    )


def EnergyForceStressLoss(
    coeffs: Coeffs | None = None,
    per_atom_energy: bool = True,
    per_type_forces_coeffs: Mapping[str, float] | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
) -> MetricsManager:
    """Loss of energy, force and stress mean squared errors: as :func:`EnergyForceLoss`, and ``stress_mse``.

    Args:
        coeffs: weights of ``total_energy``, ``forces`` and ``stress``; 1 for one that is not named, null leaves it out
            of the sum.
        per_atom_energy: divide energies by the number of atoms, (eV/atom)², instead of eV².
        per_type_forces_coeffs: ``{type: weight}``; the force error becomes the weighted mean over the atom types.
        type_names: names of the atom types.
        ignore_nan: ``{field: true}`` leaves out NaN labels of ``total_energy``, ``forces`` or ``stress``.
        extra_metrics: further components, as :class:`~harness.metrics.MetricsManager` takes them.
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`.

    Raises:
        ValueError: an unknown key; the valid ones are listed.
    """
    return _loss(
        ("total_energy", "forces", "stress"),
        coeffs,
        per_atom_energy,
        per_type_forces_coeffs,
        type_names,
        ignore_nan,
        extra_metrics,
        schedule,
    )


def EnergyOnlyLoss(
    per_atom_energy: bool = True,
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
) -> MetricsManager:
    """Loss of the energy mean squared error alone: ``per_atom_energy_mse`` (or ``total_energy_mse``).

    Args:
        per_atom_energy: divide energies by the number of atoms, (eV/atom)², instead of eV².
        coeffs: weight of ``total_energy``; matters only beside extra metrics that have a coefficient.
        type_names: names of the atom types.
        ignore_nan: ``{total_energy: true}`` leaves out NaN labels.
        extra_metrics: further components, as :class:`~harness.metrics.MetricsManager` takes them.
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`.

    Raises:
        ValueError: an unknown key; the valid ones are listed.
    """
    return _loss(("total_energy",), coeffs, per_atom_energy, None, type_names, ignore_nan, extra_metrics, schedule)


def EnergyForceMetrics(
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
) -> MetricsManager:
    """Errors ``rmse``, ``mae`` and ``maxabserr`` of ``total_energy_``, ``per_atom_energy_`` and ``forces_``.

    Units: eV, eV/atom, eV/Å.

    Args:
        coeffs: weights of the components in the monitored ``weighted_sum``. Default: 1 for ``total_energy_rmse`` and
            ``forces_rmse``; if given, components that are not named stay out of the sum.
        type_names: names of the atom types.
        ignore_nan: ``{field: true}`` leaves out NaN labels of ``total_energy`` or ``forces``.
        extra_metrics: further components, as :class:`~harness.metrics.MetricsManager` takes them.
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`.

    Raises:
        ValueError: an unknown key; the valid ones are listed.
    """
    return _monitor(
        ("total_energy", "per_atom_energy", "forces"), coeffs, type_names, ignore_nan, extra_metrics, schedule
    )


def EnergyForceStressMetrics(
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
) -> MetricsManager:
    """Errors of energy, forces and stress: as :func:`EnergyForceMetrics`, and ``stress_`` × the same errors in eV/Å³.

    Args:
        coeffs: weights of the components in the monitored ``weighted_sum``. Default: 1 for ``total_energy_rmse``,
            ``forces_rmse`` and ``stress_rmse``; if given, components that are not named stay out of the sum.
        type_names: names of the atom types.
        ignore_nan: ``{field: true}`` leaves out NaN labels of ``total_energy``, ``forces`` or ``stress``.
        extra_metrics: further components, as :class:`~harness.metrics.MetricsManager` takes them.
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`.

    Raises:
        ValueError: an unknown key; the valid ones are listed.
    """
    return _monitor(tuple(_MONITORED), coeffs, type_names, ignore_nan, extra_metrics, schedule)


def EnergyOnlyMetrics(
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
) -> MetricsManager:
    """Errors ``rmse``, ``mae`` and ``maxabserr`` of ``total_energy_`` (eV) and ``per_atom_energy_`` (eV/atom).

    Args:
        coeffs: weights of the components in the monitored ``weighted_sum``. Default: 1 for ``total_energy_rmse``; if
            given, components that are not named stay out of the sum.
        type_names: names of the atom types.
        ignore_nan: ``{total_energy: true}`` leaves out NaN labels.
        extra_metrics: further components, as :class:`~harness.metrics.MetricsManager` takes them.
        schedule: drives coefficients by epoch, see :mod:`harness.schedules`.

    Raises:
        ValueError: an unknown key; the valid ones are listed.
    """
    return _monitor(("total_energy", "per_atom_energy"), coeffs, type_names, ignore_nan, extra_metrics, schedule)


def _loss(
    fields: tuple[str, ...],
    coeffs: Coeffs | None,
    per_atom_energy: bool,
    per_type_forces_coeffs: Mapping[str, float] | None,
    type_names: Sequence[str] | None,
    ignore_nan: Mapping[str, bool] | None,
    extra_metrics: Extra | None,
    schedule: Schedule | None,
) -> MetricsManager:
    weights = {**dict.fromkeys(fields, 1.0), **_checked(coeffs, fields, "coeffs")}
    masked = _checked(ignore_nan, fields, "ignore_nan")
    metrics: list[Mapping[str, Any]] = []
    for name in fields:
        per_atom = name == "total_energy" and per_atom_energy
        per_type = name == "forces" and per_type_forces_coeffs is not None
        metrics.append(
            {
                "name": "per_atom_energy_mse" if per_atom else f"{name}_mse",
                "field": PerAtomModifier(name) if per_atom else name,
                "metric": MeanSquaredError(),
                "coeff": weights[name],
                "ignore_nan": masked.get(name),
                "per_type": per_type,
                "per_type_coeffs": per_type_forces_coeffs if per_type else None,
            }
        )
    return MetricsManager([*metrics, *(extra_metrics or ())], type_names, schedule=schedule)


def _monitor(
    prefixes: tuple[str, ...],
    coeffs: Coeffs | None,
    type_names: Sequence[str] | None,
    ignore_nan: Mapping[str, bool] | None,
    extra_metrics: Extra | None,
    schedule: Schedule | None,
) -> MetricsManager:
    names = {f"{prefix}_{error}": (prefix, error) for prefix in prefixes for error in _ERRORS}
    default: Coeffs = {f"{prefix}_rmse": 1.0 for prefix in prefixes if prefix != "per_atom_energy"}
    weights = default if coeffs is None else _checked(coeffs, tuple(names), "coeffs")
    masked = _checked(ignore_nan, tuple(dict.fromkeys(_MONITORED[prefix][0] for prefix in prefixes)), "ignore_nan")
    metrics: list[Mapping[str, Any]] = []
    for name, (prefix, error) in names.items():
        key, field = _MONITORED[prefix]
        metrics.append(
            {
                "name": name,
                "field": field,
                "metric": _ERRORS[error](),
                "coeff": weights.get(name),
                "ignore_nan": masked.get(key),
            }
        )
    return MetricsManager([*metrics, *(extra_metrics or ())], type_names, schedule=schedule)


def _checked(given: Mapping[str, Any] | None, valid: tuple[str, ...], what: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"`{what}` is a dictionary, found {given!r} ({type(given).__name__}).")
    for key in given:
        if key not in valid:
            raise ValueError(f"`{what}` has the unknown key {key!r}. Valid keys: {', '.join(valid)}.")
    return {str(key): given[key] for key in given}
