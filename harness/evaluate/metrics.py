"""Metrics of an evaluation: those of the training's test, and of what else is labelled and predicted."""

from __future__ import annotations

import pydoc
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torchmetrics

import harness
import harness.metrics

__all__ = ["default_metrics", "ignoring_missing_labels", "metrics_of_training", "nested"]

_PRESETS = {
    "EnergyOnlyMetrics": ("total_energy",),
    "EnergyForceMetrics": ("total_energy", "forces"),
    "EnergyForceStressMetrics": ("total_energy", "forces", "stress"),
}
"""Ready-made metrics and the fields that their ``ignore_nan`` takes."""
_ERRORS = {"rmse": "RootMeanSquaredError", "mae": "MeanAbsoluteError", "maxabserr": "MaximumAbsoluteError"}
_OF_PARTS = ("sets", "per_set", "per_set_coeffs", "per_group")
_OWN = re.compile(r"harness\.(?:\w+\.)*(\w+)")
_TORCHMETRICS = ("torchmetrics.regression.", "torchmetrics.aggregation")
"""Modules of torchmetrics whose metrics a checkpoint may name; others read files or fetch models."""


def nested(settings: Mapping[str, Any], section: str) -> Any:
    """Section of settings that are kept by dotted name, as nested dictionaries and lists; None without one."""
    prefix = f"{section}."
    if section in settings:
        return settings[section]
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if not name.startswith(prefix):
            continue
        place, *parts = found, *name.removeprefix(prefix).split(".")
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = value
    return _with_lists(found) if found else None


def _with_lists(value: Any) -> Any:
    """Dictionaries whose keys are 0, 1, … as lists, at any depth."""
    if not isinstance(value, dict):
        return value
    inside = {key: _with_lists(each) for key, each in value.items()}
    if inside and list(inside) == [str(number) for number in range(len(inside))]:
        return list(inside.values())
    return inside


def metrics_of_training(settings: Mapping[str, Any], head: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """Config of the metrics of a training's test.

    What a checkpoint names is only called if it is a metric, a field or a ready-made manager of this package, or a
    metric of torchmetrics: a checkpoint of others must not decide which code runs.

    Args:
        settings: of the training by dotted name, as its checkpoint has recorded them.
        head: data set of the training that the files are of; components of other sets are left out.

    Returns:
        The config, or None; and a note: the reason for None, or the components that are left out.
    """
    found = nested(settings, "test_metrics") or nested(settings, "val_metrics")
    if not isinstance(found, dict) or "_target_" not in found:
        return None, ""
    strangers = [target for target in _targets(found) if not _is_known(target)]
    if strangers:
        return None, (
            f"the test metrics of the training are of {strangers[0]}, which a checkpoint alone does not make run: the "
            f"usual ones are taken"
        )
    return _of_all_frames({name: value for name, value in found.items() if not name.startswith("schedule")}, head)


def _of_all_frames(config: dict[str, Any], head: str | None) -> tuple[dict[str, Any] | None, str]:
    """Config without what tells frames apart by a set or group of the training, which files have not, and a note.

    Components of some sets are those of all frames if the head is one of them, and left out otherwise; None if nothing
    is left.
    """
    left_out: list[str] = []
    for name in ("extra_metrics", "metrics"):
        entries = config.get(name)
        if isinstance(entries, list):
            kept = [entry for entry in entries if not entry.get("sets") or head in entry["sets"]]
            left_out += [_text_of_sets(entry) for entry in entries if entry not in kept]
            if name == "metrics" and not kept:
                return None, _note_on(left_out, head)
            config[name] = [{key: entry[key] for key in entry if key not in _OF_PARTS} for entry in kept]
    return config, _note_on(left_out, head)


def _text_of_sets(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('name') or _field_of(entry) or 'a component'} (sets {', '.join(map(str, entry['sets']))})"


def _note_on(left_out: Sequence[str], head: str | None) -> str:
    if not left_out:
        return ""
    why = "head=NAME says which set the files are of" if head is None else f"the files are of the set {head}"
    return f"metrics of other sets of the training are left out: {', '.join(left_out)}; {why}"


def default_metrics(
    config: Mapping[str, Any] | None, labelled: Collection[str], predicted: Collection[str]
) -> dict[str, Any]:
    """Config of metrics, with errors by atom type and of the stress added where it has none of them.

    What is added has no coefficient: the weighted sum stays that of the training.

    Args:
        config: of the training's test; None takes the usual errors of what is labelled and predicted.
        labelled: fields with labels in any of the files.
        predicted: fields that the model predicts.
    """
    known = set(labelled) & set(predicted)
    if config is None:
        names = ["EnergyOnlyMetrics", "EnergyForceMetrics", "EnergyForceStressMetrics"]
        name = names[2 if "stress" in known else 1 if "forces" in predicted else 0]
        first = {"total_energy": "per_atom_energy_rmse", "forces": "forces_rmse", "stress": "stress_rmse"}
        coeffs = {first[field]: 1.0 for field in _PRESETS[name]}
        config = {"_target_": f"harness.{name}", "coeffs": coeffs}
    target = str(config["_target_"]).rpartition(".")[2]
    if target not in _PRESETS:
        return dict(config)
    added: list[dict[str, Any]] = []
    extra = config.get("extra_metrics") or []
    if "stress" in known and "stress" not in (*_PRESETS[target], *(entry.get("field") for entry in extra)):
        added += [_entry(f"stress_{short}", "stress", name) for short, name in _ERRORS.items()]
    if "forces" in known and not any(entry.get("per_type") for entry in extra if entry.get("field") == "forces"):
        added += [
            {**_entry(f"forces_{short}_per_type", "forces", _ERRORS[short]), "per_type": True}
            for short in ("rmse", "mae")
        ]
    further = sorted(known - {"total_energy", "forces", "stress", *map(_field_of, extra)})
    added += [_entry(f"{field}_{short}", field, name) for field in further for short, name in _ERRORS.items()]
    return {**config, "extra_metrics": [*extra, *added]}


def ignoring_missing_labels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Config of metrics that leave out elements without a label, wherever they can; other values do not change."""
    changed = dict(config)
    fields = _PRESETS.get(str(config.get("_target_")).rpartition(".")[2])
    if fields is not None:
        changed["ignore_nan"] = dict.fromkeys(fields, True)
    for name in ("extra_metrics", "metrics"):
        entries = config.get(name)
        if isinstance(entries, list):
            changed[name] = [{**entry, "ignore_nan": True} if entry.get("field") else entry for entry in entries]
    return changed


def _entry(name: str, field: str, metric: str) -> dict[str, Any]:
    return {"name": name, "field": field, "metric": {"_target_": f"harness.{metric}"}}


def _field_of(entry: Mapping[str, Any]) -> str | None:
    """Field of a component of a config that it reads as it is."""
    field = entry.get("field")
    return field if isinstance(field, str) else None


def _targets(config: Any) -> list[str]:
    """Values of ``_target_`` at any depth."""
    if isinstance(config, dict):
        own = [str(config["_target_"])] if "_target_" in config else []
        return own + [target for value in config.values() for target in _targets(value)]
    return [target for value in config for target in _targets(value)] if isinstance(config, list) else []


def _is_known(target: str) -> bool:
    own = _OWN.fullmatch(target)
    if own is not None:
        name = own.group(1)  # of a class or ready-made set, and no function such as load_model
        return name[0].isupper() and name in {*harness.__all__, *harness.metrics.__all__}
    if not target.startswith("torchmetrics."):
        return False
    try:
        found = pydoc.locate(target)  # what the path leads to: a module shows whatever it has imported
    except Exception:  # of a module that cannot be imported
        return False
    is_metric = isinstance(found, type) and issubclass(found, torchmetrics.Metric)
    return is_metric and found.__module__.startswith(_TORCHMETRICS)
