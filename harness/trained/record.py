"""The record in a checkpoint of what it was made with: plain data, which load with ``weights_only=True``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints import read
from harness.fields import field_spec

__all__ = [
    "ARCHITECTURE",
    "MADE_WITH",
    "RecordedStatistics",
    "made_with",
    "packages_of",
    "plain",
    "self_contained",
    "statistics_of",
    "units",
]

MADE_WITH = "made_with"
"""Key in a checkpoint."""
ARCHITECTURE = "architecture"
"""Key in the record of the section ``model`` of the config: ``_target_`` and arguments of the builder."""
_STATISTICS = (
    "type_names",
    "energy_shifts",
    "force_rms",
    "mean_neighbors",
    "num_frames",
    "num_atoms",
    "undetermined",
    "isolated_atoms",
    "set_references",
    "mixture_references",
    "set_undetermined",
)
_WITH_UNITS = ("pos", "cell", "total_energy", "atomic_energy", "forces", "stress", "virial")
_WITHOUT_VERSION = ("harness", "torch", "builtins", "__main__")


def made_with(path: str | Path) -> dict[str, Any] | None:
    """Record of a checkpoint file; None in one that has none, as those of version 0.1.0."""
    found = read(path).get(MADE_WITH)
    return found if isinstance(found, dict) else None


def statistics_of(statistics: Any) -> dict[str, Any] | None:
    """Statistics of a training set as plain numbers, those of them that there are; None without any."""
    found = {name: getattr(statistics, name) for name in _STATISTICS if hasattr(statistics, name)}
    return {name: plain(value) for name, value in found.items()} or None


def units() -> dict[str, str]:
    """Units of the inputs and predictions of a model, by field; ``stress`` has ASE's sign, positive in tension."""
    return {"cutoff": "Å"} | {name: field_spec(name).unit for name in _WITH_UNITS}


def packages_of(model: nn.Module) -> dict[str, str]:
    """Versions of the installed packages that a model's parts are of, but for torch and this package.

    Those of base classes are among them: FSDP2 and the like put a class of their own in front of a model's.
    """
    kinds = {base for part in model.modules() for base in type(part).__mro__}
    names = sorted({kind.__module__.partition(".")[0] for kind in kinds} - {*_WITHOUT_VERSION})
    found = {name: _version_by_name(name) for name in names}
    if None in found.values():  # half a second, at the first checkpoint of a training
        distributions = importlib.metadata.packages_distributions()
        for name in names:
            if found[name] is None and name in distributions:
                found[name] = importlib.metadata.version(distributions[name][0])
    return {name: version for name, version in found.items() if version is not None}


def _version_by_name(package: str) -> str | None:
    """Version of a package that is distributed under its own name; None of one that is not, such as ``mace``."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    is_its_own = any(file.parts[0] in (package, f"{package}.py") for file in distribution.files or ())
    return distribution.version if is_its_own else None


def self_contained(architecture: Mapping[str, Any], energy_shifts: Mapping[str, float] | None) -> dict[str, Any]:
    """An architecture with the model's own reference energies, in eV by type: not a file, a fit, or those of before."""
    given = architecture.get("energy_shifts")
    numbers = {"energy_shifts": dict(energy_shifts)} if isinstance(given, str | Mapping) and energy_shifts else {}
    return {**architecture, **numbers}


class RecordedStatistics:
    """Statistics that a checkpoint's model was built of, with the attributes of those of a training set.

    Args:
        recorded: entry ``statistics`` of the record.
        now: statistics of the training set of now, for attributes that were not recorded.
    """

    def __init__(self, recorded: Mapping[str, Any], now: Any = None) -> None:
        self._now = now
        values = dict(recorded)
        for name in ("energy_shifts", "undetermined"):
            if values.get(name) is not None:
                values[name] = torch.tensor(values[name], dtype=torch.float64)
        if "type_names" in values:
            values["type_names"] = tuple(values["type_names"])
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._now is None:
            raise AttributeError(f"the checkpoint has no {name} of its training set; it has {', '.join(vars(self))}")
        return getattr(self._now, name)


def plain(value: Any) -> Any:
    """A value as plain data: subclasses of numbers and strings would not load with ``weights_only=True``."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if kind is None:
        return None if value is None else str(value)
    return kind(value)
