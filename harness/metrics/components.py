"""Components as users write them: a list of dictionaries, checked and parsed into entries, and looked up by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torchmetrics import Metric

from harness.fields import FieldModifier, as_modifier, labels_of, registered_fields
from harness.metrics.adapters import takes_weights
from harness.metrics.errors import ErrorMetric, MeanSquaredError
from harness.metrics.splits import DataNames, Split, chosen_sets, set_coeffs
from harness.metrics.torchmetrics_private import default_states, is_composition
from harness.support.checks import is_number
from harness.support.text import did_you_mean

__all__ = [
    "WEIGHTED_SUM",
    "ComponentMapping",
    "MetricEntry",
    "WeightedEntry",
    "Weights",
    "check_coeff",
    "parse_entries",
]

WEIGHTED_SUM = "weighted_sum"

Weights = Literal["everywhere", "in_sums", "nowhere"]
"""``everywhere``: a frame of weight w counts as w frames do. ``in_sums``: its errors count w times and its number of
elements once, as in MACE. ``nowhere``: every frame counts once."""

_KEYS = (
    "metric",
    "field",
    "coeff",
    "name",
    "per_type",
    "per_type_coeffs",
    "ignore_nan",
    "weights",
    "sets",
    "per_set",
    "per_set_coeffs",
    "per_group",
)
_WEIGHTS: dict[Any, Weights] = {True: "everywhere", "in_sums": "in_sums", False: "nowhere"}
_EVERY_METRIC_HAS = frozenset(vars(MeanSquaredError()))


@dataclasses.dataclass(frozen=True, eq=False)
class MetricEntry:
    """One component as the user wrote it.

    Attributes:
        name: the component's name.
        metric: the metric that measures it.
        field: modifier that reads prediction and target; None for the two whole dictionaries.
        per_type: one value for each atom type.
        per_type_coeffs: weights of the types in the order of ``type_names``; None for equal ones.
        ignore_nan: elements whose target is NaN are left out.
        given_coeff: coefficient as it was given; None if the component is not in the weighted sum.
        weights: where the weights of frames count.
        sets: indices of the data sets whose frames count; None for all frames.
        mean_over: parts that the component is the weighted mean of, by ``set_coeffs``; None if it is no such mean.
        set_coeffs: weights of these parts.
        splits: parts with values of their own, beside that of the whole.
    """

    name: str
    metric: Metric
    field: FieldModifier | None = None
    per_type: bool = False
    per_type_coeffs: tuple[float, ...] | None = None
    ignore_nan: bool = False
    given_coeff: float | None = None
    weights: Weights = "everywhere"
    sets: tuple[int, ...] | None = None
    mean_over: Split | None = None
    set_coeffs: tuple[float, ...] | None = None
    splits: tuple[Split, ...] = ()

    @property
    def num_parts(self) -> int:
        """Number of the whole and the parts that it is split into, each with slots of its own."""
        return 1 + sum(split.num_parts for split in self.splits)

    def num_slots(self, type_names: Sequence[str]) -> int:
        """Number of values that the component is the mean of: the number of types or of sets, or 1."""
        return len(self.mean_over.names) if self.mean_over else len(type_names) if self.per_type else 1

    def type_keys(self, type_names: Sequence[str]) -> list[str]:
        """Names of the component's per-type values, in the order of the types; none if it is not per type."""
        return [f"{self.name}_{type_name}" for type_name in type_names] if self.per_type else []

    def slot_keys(self, type_names: Sequence[str]) -> list[str]:
        """Names of the values that the component is the mean of, of types or sets; none if it is no such mean."""
        return self.mean_over.keys(self.name) if self.mean_over else self.type_keys(type_names)

    def part_keys(self) -> list[str]:
        """Names of the reported values of sets and groups beside the whole, in the order of the parts."""
        return [key for split in self.splits for key in split.keys(self.name)]

    def set_keys(self) -> list[str]:
        """Names of the reported values of sets, those that the component is the mean of or has beside the whole."""
        splits = [split for split in (self.mean_over, *self.splits) if split is not None and split.by == "set"]
        return [key for split in splits for key in split.keys(self.name)]

    def value_keys(self, type_names: Sequence[str]) -> list[str]:
        """Names of all values that are reported beside the component's own: of types, sets and groups."""
        return [*self.slot_keys(type_names), *self.part_keys()]

    def describe(self) -> str:
        """Describe the component's part of a row; only rows of equal descriptions are merged."""
        metric = self.metric
        parameters = {
            key: value.tolist() if isinstance(value, Tensor) else value
            for key, value in sorted(vars(metric).items())
            if key not in _EVERY_METRIC_HAS
            and not key.startswith("_")
            and isinstance(value, int | float | str | tuple | list | dict | Tensor | None)
        }
        if isinstance(metric, ErrorMetric):
            parameters["parameters"] = metric.parameters_of_errors
        field = repr(self.field) if dataclasses.is_dataclass(self.field) else field_label(self.field)
        return (
            f"{self.name}: {type(metric).__name__}{parameters} of {field}"
            f"{' per type' if self.per_type else ''}{' ignoring NaN' if self.ignore_nan else ''}"
            f"{'' if self.weights == 'everywhere' else f' weights {self.weights}'}"
            f"{'' if self.sets is None else f' of sets {list(self.sets)}'}"
            f"{'' if self.mean_over is None else f' mean over sets {list(self.mean_over.names)}'}"
            f"{''.join(f' by {split.by} {list(split.names)}' for split in self.splits)}"
            f"{' and weight 0' if any(split.counts_weightless for split in self.splits) else ''}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedEntry(MetricEntry):
    """A component with its coefficients of the moment, which NequIP's callbacks read as ``loss.entries[name].coeff``.

    ``given_coeff`` and ``per_type_coeffs`` are those of the moment too: given, scheduled, or set since.

    Attributes:
        coeff: coefficient as the weighted sum has it, normalised or as given; None outside of it.
    """

    coeff: float | None = None


class ComponentMapping:
    """Mapping from names to metrics, in the user's order, as NequIP's module and callbacks expect of a loss.

    No ``collections.abc.Mapping``, whose ``==`` compares contents and makes a module unhashable.
    """

    _components: dict[str, MetricEntry]

    def __getitem__(self, name: str) -> Metric:
        try:
            return self._components[name].metric
        except KeyError:
            raise KeyError(
                f"Unknown component {name!r}. {did_you_mean(name, self._components)}Valid names: "
                f"{', '.join(self._components)}."
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)

    def keys(self) -> list[str]:
        """Names of the components."""
        return list(self._components)

    def values(self) -> list[Metric]:
        """Metrics of the components."""
        return [entry.metric for entry in self._components.values()]

    def items(self) -> list[tuple[str, Metric]]:
        """Names and metrics of the components."""
        return [(name, entry.metric) for name, entry in self._components.items()]


def field_label(field: object) -> str:
    """Name of a modifier, the same in every process: its class's name if it defines neither ``str`` nor ``repr``."""
    kind = type(field)
    plain = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    return kind.__name__ if plain else str(field)


def parse_entries(metrics: Sequence[Mapping[str, Any]], names: DataNames) -> dict[str, MetricEntry]:
    """Entries by name, in the order given.

    Raises:
        TypeError, ValueError, KeyError: a mistake, with the component, what was found and what is valid.
    """
    if isinstance(metrics, Mapping | str) or not isinstance(metrics, Sequence):
        raise TypeError(f"`metrics` is a list of dictionaries, found {type(metrics).__name__}.")
    if not metrics:
        raise ValueError("`metrics` is empty; expected at least one dictionary with the key 'metric'.")
    entries: dict[str, MetricEntry] = {}
    for position, specification in enumerate(metrics):
        name = specification.get("name") if isinstance(specification, Mapping) else None
        where = f"metrics[{position}]" if name is None else f"metrics[{position}] ({name})"
        entry = _parse_entry(specification, where, names)
        if entry.name in entries:
            raise ValueError(
                f"Two components are called {entry.name!r}. Names are unique: give one of them a `name` of its own."
            )
        entries[entry.name] = entry
    reported = {*entries, WEIGHTED_SUM}
    for entry in entries.values():
        for key in entry.value_keys(names.types):
            if key in reported:
                raise ValueError(
                    f"The value {key} of component {entry.name!r} would have the name of another value. Give one of "
                    f"the components a `name` of its own."
                )
            if "*" in key:
                raise ValueError(
                    f"The value {key} of component {entry.name!r} has a * in its name, which loggers take for a "
                    f"pattern of names. Rename the set or group."
                )
            reported.add(key)
    return entries


def _parse_entry(specification: Mapping[str, Any], where: str, names: DataNames) -> MetricEntry:
    if not isinstance(specification, Mapping):
        raise TypeError(f"{where} is a dictionary, found {specification!r} ({type(specification).__name__}).")
    given = {str(key): specification[key] for key in specification}
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}. Valid keys: {', '.join(_KEYS)}.")
    if given.get("metric") is None:
        raise ValueError(
            f"{where} has no `metric`, found {given}. Example: {{field: forces, metric: MeanSquaredError()}}."
        )
    metric = _check_metric(given["metric"], where)
    own = metric.own_field if isinstance(metric, ErrorMetric) else None
    field = given.get("field") if own is None else own
    modifier, level = (None, None) if field is None else as_modifier(field)

    name = given.get("name")
    if name is None:
        named = isinstance(metric, ErrorMetric) and type(metric).__str__ is not object.__str__
        metric_name = str(metric) if named else type(metric).__name__
        name = metric_name if given.get("field") is None else f"{field_label(modifier)}_{metric_name}"
    if not isinstance(name, str) or not name:
        raise TypeError(f"{where}: `name` is a non-empty string, found {name!r}.")
    if "*" in name:
        raise ValueError(f"{where}: the name {name!r} has a * in it, which loggers take for a pattern of names.")
    if name == WEIGHTED_SUM:
        raise ValueError(f"{where}: the name {WEIGHTED_SUM!r} is reserved for the weighted sum of all components.")

    per_type = _check_flag(given.get("per_type"), "per_type", name)
    if own is not None and given.get("field") is not None:
        raise ValueError(f"Component {name!r}: {type(metric).__name__} reads fields of its own; leave `field` out.")
    may_be_missing = own is not None or _may_be_missing(modifier)
    ignore_nan = _check_flag(given.get("ignore_nan"), "ignore_nan", name, default=may_be_missing)
    if modifier is None:
        for key in ("per_type", "ignore_nan", "per_type_coeffs", "sets", "per_set", "per_set_coeffs", "per_group"):
            if given.get(key):
                raise ValueError(
                    f"Component {name!r}: `{key}` needs a `field`. Without one the metric gets the two whole "
                    f"dictionaries and must select by itself."
                )
        if isinstance(metric, ErrorMetric):
            raise ValueError(
                f"Component {name!r}: {type(metric).__name__} compares two tensors and needs a `field`, such as forces."
            )
    if per_type and level != "node":
        raise ValueError(
            f"Component {name!r}: `per_type` needs a field with one row for each atom (level node); {modifier} is a "
            f"{level} field."
        )
    if per_type and not names.types:
        raise ValueError(f"Component {name!r}: `per_type` needs `type_names`, the names of the atom types in order.")
    return MetricEntry(
        name=name,
        metric=metric,
        field=modifier,
        per_type=per_type,
        per_type_coeffs=_check_type_coeffs(given.get("per_type_coeffs"), per_type, names.types, name),
        ignore_nan=ignore_nan,
        given_coeff=check_coeff(given.get("coeff"), name),
        weights=_check_weights(given.get("weights"), name, metric),
        **_parse_splits(given, names, name, labels_of(modifier), per_type),
    )


def _parse_splits(
    given: Mapping[str, Any], names: DataNames, name: str, labels: Sequence[str], per_type: bool
) -> dict[str, Any]:
    """Arguments of an entry about sets and groups."""
    sets = chosen_sets(given.get("sets"), names, name, labels)
    per_set, per_group = (_check_flag(given.get(key), key, name) for key in ("per_set", "per_group"))
    groups = (names.split_by_group(name),) if per_group else ()
    coeffs = given.get("per_set_coeffs")
    if coeffs is None:
        split = (names.split_by_set(name, sets, "per_set"),) if per_set else ()
        return {"sets": sets, "splits": (*split, *groups)}
    if per_type:
        raise ValueError(
            f"Component {name!r} has both `per_type` and `per_set_coeffs`: it is a mean over types or over sets. Make "
            f"two components of it."
        )
    mean_over = names.split_by_set(name, sets, "per_set_coeffs")
    return {
        "sets": mean_over.indices,  # frames of no set are in no part of the mean
        "mean_over": mean_over,
        "set_coeffs": set_coeffs(coeffs, mean_over, name),
        "splits": groups,
    }


def _check_weights(given: object, name: str, metric: Metric) -> Weights:
    if given is None:
        return "everywhere"
    if not isinstance(given, bool | str) or given not in _WEIGHTS:
        raise ValueError(
            f"Component {name!r}: `weights` is true (a frame of weight w counts as w frames), in_sums (w times in "
            f"sums, once in the number that they are divided by) or false, found {given!r}."
        )
    if given and not isinstance(metric, ErrorMetric) and not (given is True and takes_weights(metric)):
        lacks = "has weights in all of its sums, or in none" if takes_weights(metric) else "knows no weights of frames"
        raise ValueError(
            f"Component {name!r} has `weights: {given}`, but {type(metric).__name__} {lacks}. Use an error metric of "
            f"this package, such as MeanAbsoluteError, or leave `weights` out."
        )
    return _WEIGHTS[given]


def _check_metric(metric: object, where: str) -> Metric:
    if isinstance(metric, type) and issubclass(metric, Metric):
        try:
            return _check_metric(metric(), where)
        except TypeError as error:
            raise TypeError(
                f"{where}: the class {metric.__name__} needs arguments ({error}). Give an instance instead."
            ) from error
    if isinstance(metric, Metric):
        children = [type(each).__name__ for each in metric.modules() if each is not metric and isinstance(each, Metric)]
        if is_composition(metric) or children or not default_states(metric):
            inner = f"holds other metrics ({', '.join(children)})" if children else "has no states of its own"
            raise ValueError(
                f"{where}: {type(metric).__name__} {inner}, and what it has seen cannot be merged over batches and "
                f"ranks. Give plain metrics, each as a component, and combine their values."
            )
        return metric.clone()  # one metric may stand in several components
    hint = " Is `_target_` missing, or was the list not instantiated?" if isinstance(metric, Mapping) else ""
    raise TypeError(f"{where}: `metric` is a torchmetrics.Metric or a class of them, found {metric!r}.{hint}")


def _may_be_missing(modifier: FieldModifier | None) -> bool:
    """True if the labels that a modifier reads are known to have gaps, as further labels of the data may."""
    known = registered_fields()
    return any(label in known and known[label].may_be_missing for label in labels_of(modifier))


def _check_flag(value: object, key: str, name: str, default: bool = False) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TypeError(f"Component {name!r}: `{key}` is true or false, found {value!r} ({type(value).__name__}).")
    return value


def check_coeff(coeff: object, name: str) -> float | None:
    """Coefficient of the component ``name`` as a float, or None; an error if it is negative or not finite."""
    if coeff is None:
        return None
    if not is_number(coeff):
        raise TypeError(f"The coefficient of {name!r} is a number or null, found {coeff!r} ({type(coeff).__name__}).")
    if not 0 <= float(coeff) < math.inf:
        raise ValueError(f"The coefficient of {name!r} must be finite and not negative, found {coeff}.")
    return float(coeff)


def _check_type_coeffs(
    coeffs: object, per_type: bool, type_names: tuple[str, ...], name: str
) -> tuple[float, ...] | None:
    if coeffs is None:
        return None
    if not per_type:
        raise ValueError(f"Component {name!r}: `per_type_coeffs` needs `per_type: true`.")
    if not isinstance(coeffs, Mapping):
        raise TypeError(
            f"Component {name!r}: `per_type_coeffs` maps type names to weights, found {coeffs!r} "
            f"({type(coeffs).__name__})."
        )
    unknown = [str(key) for key in coeffs if key not in type_names]
    missing = [key for key in type_names if key not in coeffs]
    if unknown or missing:
        raise ValueError(
            f"Component {name!r}: `per_type_coeffs` needs one weight for each of the types {list(type_names)}; "
            f"unknown: {unknown or 'none'}, missing: {missing or 'none'}."
        )
    weights = []
    for key in type_names:
        weight = coeffs[key]
        if not is_number(weight):
            raise TypeError(f"Component {name!r}: the weight of type {key} is a number, found {weight!r}.")
        if not 0 < float(weight) < math.inf:
            raise ValueError(
                f"Component {name!r}: the weight of type {key} must be finite and above 0, found {weight}."
            )
        weights.append(float(weight))
    return tuple(weights)
