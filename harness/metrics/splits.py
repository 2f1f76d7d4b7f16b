"""Sets and groups of frames in components: names that stand behind indices, and what a component is split by.

A component may count the frames of some sets only, have a value for each set or group beside that of the whole, or be
the weighted mean of its values of the sets. A frame says its set and group by ``set_index`` and ``group_index``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.support.checks import is_number
from harness.support.text import did_you_mean

__all__ = ["DataNames", "Split", "check_names", "chosen_sets", "set_coeffs"]

Kind = Literal["set", "group"]
"""Index that tells frames apart: ``set_index`` or ``group_index`` of a batch."""


@dataclass(frozen=True)
class Split:
    """Parts of the frames, each with a value of its own.

    Attributes:
        by: ``set`` or ``group``.
        names: of the parts, in the order of their slots.
        indices: index in a batch that each part stands for.
        num_indices: number of sets or groups that there are.
        is_shown: the values of the parts are reported as ``{component}@{part}``, and not in tables alone.
        counts_weightless: frames of weight 0 are counted too, once each, apart from the others: where a part has no
            other frames, its values are of these.
    """

    by: Kind
    names: tuple[str, ...]
    indices: tuple[int, ...]
    num_indices: int
    is_shown: bool = True
    counts_weightless: bool = False

    @property
    def num_parts(self) -> int:
        """Number of parts; those of frames of weight 0 are behind the others, in the same order."""
        return len(self.names) * (2 if self.counts_weightless else 1)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slot of each index from -1 on (no set or group); one past the last slot for those in none."""
        slot_of = {index: slot for slot, index in enumerate(self.indices)}
        return tuple(slot_of.get(index, self.num_parts) for index in range(-1, self.num_indices))

    def keys(self, component: str) -> list[str]:
        """Names of the values of the parts of a component; none of parts that are in tables alone."""
        return [f"{component}@{name}" for name in self.names] if self.is_shown else []

    def value_names(self, component: str) -> list[str]:
        """Name of the value of each part, empty for those that are not reported."""
        keys = self.keys(component)
        return keys + [""] * (self.num_parts - len(keys))


@dataclass(frozen=True)
class DataNames:
    """Names that indices in batches stand for.

    Attributes:
        types: of the atom types.
        groups: of the groups of frames.
        sets: of the data sets of a mixture.
        labelled_sets: sets that have labels of a field, by its name; fields that are not there are not known.
    """

    types: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    labelled_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        type_names: Sequence[str] | None = None,
        group_names: Sequence[str] | None = None,
        set_names: Sequence[str] | None = None,
        labelled_sets: Mapping[str, Collection[str]] | None = None,
    ) -> DataNames:
        """Checked names; those that are not given are empty.

        Raises:
            TypeError, ValueError: no list of distinct strings, or labels of a set that there is not.
        """
        sets = check_names(set_names, "set_names")
        labelled = {label: tuple(names) for label, names in (labelled_sets or {}).items()}
        unknown = {name for names in labelled.values() for name in names}.difference(sets)
        if unknown:
            raise ValueError(
                f"`labelled_sets` maps fields to names of sets, of {', '.join(sets) or 'which there are none'}; found "
                f"{', '.join(sorted(map(repr, unknown)))}."
            )
        return cls(check_names(type_names, "type_names"), check_names(group_names, "group_names"), sets, labelled)

    def split_by_group(self, component: str, is_shown: bool = True) -> Split:
        """One part for each group.

        Raises:
            ValueError: there are no groups.
        """
        if not self.groups:
            raise ValueError(
                f"Component {component!r}: `per_group` needs `group_names`, the groups of the data's frames: do the "
                f"frames have the key that data.group_key names?"
            )
        return Split("group", self.groups, tuple(range(len(self.groups))), len(self.groups), is_shown)

    def split_by_set(self, component: str, sets: tuple[int, ...] | None, key: str) -> Split:
        """One part for each set that counts.

        Raises:
            ValueError: there are no sets.
        """
        self.need_sets(component, key)
        indices = tuple(range(len(self.sets))) if sets is None else sets
        return Split("set", tuple(self.sets[index] for index in indices), indices, len(self.sets))

    def need_sets(self, component: str, key: str) -> None:
        """Refuse the key of a component where there are no sets."""
        if not self.sets:
            raise ValueError(
                f"Component {component!r}: `{key}` needs `set_names`, the names of the data sets, which a mixture has "
                f"(data=mixture)."
            )


def check_names(given: Sequence[str] | None, what: str) -> tuple[str, ...]:
    """Names as a tuple, empty for None; an error if they are no list of distinct strings."""
    if given is None:
        return ()
    example = {"type_names": "[H, C, O]", "group_names": "[bulk, surface]"}.get(what, "[bulk, molecules]")
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"`{what}` is a list of names such as {example}, found {given!r}.")
    names = tuple(given)
    for name in names:
        if not isinstance(name, str) or not name:
            hint = " (YAML reads an unquoted No, Y or N as a boolean: quote it)" if isinstance(name, bool) else ""
            raise TypeError(f"`{what}` holds strings, found {name!r} in {list(names)}{hint}.")
    if len(set(names)) != len(names):
        raise ValueError(f"`{what}` repeats a name: {list(names)}.")
    return names


def chosen_sets(given: Any, names: DataNames, component: str, labels: Sequence[str]) -> tuple[int, ...] | None:
    """Indices of the sets whose frames a component counts; None for all frames.

    Without a choice of the user's these are the sets that have the labels, so that the missing labels of the others are
    no missing labels of the component.

    Args:
        given: the user's list of names; None for no choice.
        names: of the data.
        component: its name, for messages.
        labels: fields that it compares with, as far as they are known.

    Raises:
        TypeError: no list.
        ValueError: an unknown set, or one without a label.
    """
    lacking = {
        at: label
        for label in labels
        for at, name in enumerate(names.sets)
        if name not in names.labelled_sets.get(label, names.sets)
    }
    if given is None:
        having = tuple(at for at in range(len(names.sets)) if at not in lacking)
        return having if lacking and having else None
    names.need_sets(component, "sets")
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
        raise TypeError(f"Component {component!r}: `sets` is a list of names of sets, found {given!r}.")
    for name in given:
        if name not in names.sets:
            raise ValueError(
                f"Component {component!r}: unknown set {name!r} in `sets`. {did_you_mean(str(name), names.sets)}"
                f"Valid names: {', '.join(names.sets)}."
            )
    indices = tuple(sorted({names.sets.index(name) for name in given}))
    for index in indices:
        if index in lacking:
            raise ValueError(
                f"Component {component!r}: no frame of the set {names.sets[index]} has {lacking[index]}. Take it out "
                f"of `sets`, or look at the keys of its labels."
            )
    return indices


def set_coeffs(given: Any, split: Split, component: str) -> tuple[float, ...]:
    """Weights of the sets in the mean that a component is, in the order of the split's parts.

    Raises:
        TypeError, ValueError: no mapping from each of the sets to a positive number.
    """
    where = f"Component {component!r}: `per_set_coeffs`"
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} maps names of sets to weights, found {given!r} ({type(given).__name__}).")
    unknown = [str(key) for key in given if key not in split.names]
    missing = [key for key in split.names if key not in given]
    if unknown or missing:
        raise ValueError(
            f"{where} needs one weight for each of the sets {list(split.names)}; unknown: {unknown or 'none'}, "
            f"missing: {missing or 'none'}. A set is left out with `sets`."
        )
    for name in split.names:
        weight = given[name]
        if not is_number(weight):
            raise TypeError(f"{where}: the weight of set {name} is a number, found {weight!r}.")
        if not 0 < float(weight) < math.inf:
            raise ValueError(f"{where}: the weight of set {name} must be finite and above 0, found {weight}.")
    return tuple(float(given[name]) for name in split.names)
