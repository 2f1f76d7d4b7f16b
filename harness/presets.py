"""Ready-made managers for the common trainings: energy, forces and stress, as loss and as metrics.

Every function returns a plain :class:`~harness.metrics.MetricsManager`. The names of the components are those that
schedules, sweeps and log keys refer to. Names and defaults follow NequIP's simplified wrappers. The functions take
those of these arguments that their signatures show:

- ``coeffs``: of a loss, ``{field: weight}``, by default 1 for every field; null leaves a field out of the sum. Of
  metrics, ``{component: weight}`` in the monitored ``weighted_sum``, by default 1 for ``total_energy_rmse``,
  ``forces_rmse`` and ``stress_rmse``; if given, components that are not named stay out of the sum.
- ``per_atom_energy``: divide energies by the number of atoms, (eV/atom)², instead of eV².
- ``per_type_forces_coeffs``: ``{type: weight}``; the force error becomes the weighted mean over the atom types.
- ``type_names``: names of the atom types.
- ``group_names``, ``set_names``, ``labelled_sets``: of groups and sets of frames, as
  :class:`~harness.metrics.MetricsManager` takes them.
- ``ignore_nan``: ``{field: true}`` leaves out NaN labels of a field.
- ``extra_metrics``: further components, as :class:`~harness.metrics.MetricsManager` takes them.
- ``schedule``: drives coefficients by epoch, see :mod:`harness.schedules`.
- ``schedule_interval``: ``epoch`` or ``step``, how often a training moves on along the schedule.
- ``coefficients``: ``normalised``, divided by their sum, or ``as_given``, for the plain sum of coefficient × component.

The fields are ``total_energy``, ``forces`` and ``stress``, as far as the function has them. An unknown key of
``coeffs`` or ``ignore_nan`` is a ``ValueError`` that lists the valid ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from harness.fields import FieldModifier, PerAtomModifier
from harness.metrics import (
    ErrorMetric,
    MaximumAbsoluteError,
    MeanAbsoluteError,
    MeanSquaredError,
    MetricsManager,
    Normalisation,
    RootMeanSquaredError,
)
from harness.schedules import Interval, Schedule

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
Names = Sequence[str] | None
LabelledSets = Mapping[str, Collection[str]] | None

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
"""Prefix of the component's name → (its key in ``ignore_nan``, the field or modifier that it reads)."""


def EnergyForceLoss(
    coeffs: Coeffs | None = None,
    per_atom_energy: bool = True,
    per_type_forces_coeffs: Mapping[str, float] | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
    schedule_interval: Interval = "epoch",
    coefficients: Normalisation = "normalised",
    group_names: Names = None,
    set_names: Names = None,
    labelled_sets: LabelledSets = None,
) -> MetricsManager:
    """Loss of energy and forces: ``per_atom_energy_mse`` (or ``total_energy_mse``) and ``forces_mse``."""
    metrics = _errors_of_loss(
        ("total_energy", "forces"), coeffs, ignore_nan, extra_metrics, per_atom_energy, per_type_forces_coeffs
    )
    frames = {"group_names": group_names, "set_names": set_names, "labelled_sets": labelled_sets}
    return _manager(metrics, type_names, schedule, schedule_interval, coefficients, frames)


def EnergyForceStressLoss(
    coeffs: Coeffs | None = None,
    per_atom_energy: bool = True,
    per_type_forces_coeffs: Mapping[str, float] | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
    schedule_interval: Interval = "epoch",
    coefficients: Normalisation = "normalised",
    group_names: Names = None,
    set_names: Names = None,
    labelled_sets: LabelledSets = None,
) -> MetricsManager:
    """Loss of energy, forces and stress: as :func:`EnergyForceLoss`, and ``stress_mse``."""
    metrics = _errors_of_loss(
        ("total_energy", "forces", "stress"), coeffs, ignore_nan, extra_metrics, per_atom_energy, per_type_forces_coeffs
    )
    frames = {"group_names": group_names, "set_names": set_names, "labelled_sets": labelled_sets}
    return _manager(metrics, type_names, schedule, schedule_interval, coefficients, frames)


def EnergyOnlyLoss(
    per_atom_energy: bool = True,
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
    schedule_interval: Interval = "epoch",
    coefficients: Normalisation = "normalised",
    group_names: Names = None,
    set_names: Names = None,
    labelled_sets: LabelledSets = None,
) -> MetricsManager:
    """Loss of the energy alone: ``per_atom_energy_mse`` (or ``total_energy_mse``).

    The coefficient matters only beside extra metrics that have one.
    """
    metrics = _errors_of_loss(("total_energy",), coeffs, ignore_nan, extra_metrics, per_atom_energy)
    frames = {"group_names": group_names, "set_names": set_names, "labelled_sets": labelled_sets}
    return _manager(metrics, type_names, schedule, schedule_interval, coefficients, frames)


def EnergyForceMetrics(
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
    schedule_interval: Interval = "epoch",
    coefficients: Normalisation = "normalised",
    group_names: Names = None,
    set_names: Names = None,
    labelled_sets: LabelledSets = None,
) -> MetricsManager:
    """Errors ``rmse``, ``mae`` and ``maxabserr`` of ``total_energy_``, ``per_atom_energy_`` and ``forces_``.

    Units: eV, eV/atom, eV/Å.
    """
    metrics = _errors_to_monitor(("total_energy", "per_atom_energy", "forces"), coeffs, ignore_nan, extra_metrics)
    frames = {"group_names": group_names, "set_names": set_names, "labelled_sets": labelled_sets}
    return _manager(metrics, type_names, schedule, schedule_interval, coefficients, frames)


def EnergyForceStressMetrics(
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
    schedule_interval: Interval = "epoch",
    coefficients: Normalisation = "normalised",
    group_names: Names = None,
    set_names: Names = None,
    labelled_sets: LabelledSets = None,
) -> MetricsManager:
    """Errors of energy, forces and stress: as :func:`EnergyForceMetrics`, and those of ``stress_`` in eV/Å³."""
    metrics = _errors_to_monitor(tuple(_MONITORED), coeffs, ignore_nan, extra_metrics)
    frames = {"group_names": group_names, "set_names": set_names, "labelled_sets": labelled_sets}
    return _manager(metrics, type_names, schedule, schedule_interval, coefficients, frames)


def EnergyOnlyMetrics(
    coeffs: Coeffs | None = None,
    type_names: Sequence[str] | None = None,
    ignore_nan: Mapping[str, bool] | None = None,
    extra_metrics: Extra | None = None,
    schedule: Schedule | None = None,
    schedule_interval: Interval = "epoch",
    coefficients: Normalisation = "normalised",
    group_names: Names = None,
    set_names: Names = None,
    labelled_sets: LabelledSets = None,
) -> MetricsManager:
    """Errors ``rmse``, ``mae`` and ``maxabserr`` of ``total_energy_`` (eV) and ``per_atom_energy_`` (eV/atom)."""
    metrics = _errors_to_monitor(("total_energy", "per_atom_energy"), coeffs, ignore_nan, extra_metrics)
    frames = {"group_names": group_names, "set_names": set_names, "labelled_sets": labelled_sets}
    return _manager(metrics, type_names, schedule, schedule_interval, coefficients, frames)


def _manager(
    metrics: Sequence[Mapping[str, Any]],
    type_names: Sequence[str] | None,
    schedule: Schedule | None,
    schedule_interval: Interval,
    coefficients: Normalisation,
    frames: Mapping[str, Any],
) -> MetricsManager:
    return MetricsManager(
        metrics,
        type_names,
        schedule=schedule,
        schedule_interval=schedule_interval,
        coefficients=coefficients,
        **frames,
    )


def _errors_of_loss(
    fields: tuple[str, ...],
    coeffs: Coeffs | None,
    ignore_nan: Mapping[str, bool] | None,
    extra_metrics: Extra | None,
    per_atom_energy: bool,
    per_type_forces_coeffs: Mapping[str, float] | None = None,
) -> list[Mapping[str, Any]]:
    """Mean squared error of every field, and the extra metrics."""
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
    return [*metrics, *(extra_metrics or ())]


def _errors_to_monitor(
    prefixes: tuple[str, ...],
    coeffs: Coeffs | None,
    ignore_nan: Mapping[str, bool] | None,
    extra_metrics: Extra | None,
) -> list[Mapping[str, Any]]:
    """The three errors of every prefix, and the extra metrics."""
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
    return [*metrics, *(extra_metrics or ())]


def _checked(given: Mapping[str, Any] | None, valid: tuple[str, ...], what: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"`{what}` is a dictionary, found {given!r} ({type(given).__name__}).")
    for key in given:
        if key not in valid:
            raise ValueError(f"`{what}` has the unknown key {key!r}. Valid keys: {', '.join(valid)}.")
    return {str(key): given[key] for key in given}
