"""Everything that is read of a frame beyond energy, forces and stress: labels, inputs, weights and its group."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from harness.data.batch_fields import BatchField
from harness.data.frames import FrameSet
from harness.data.groups import GROUP_KEY, group_fields, group_of, refuse_unknown_group_key
from harness.data.labels import FieldEntry, entries_of
from harness.data.reading import Frame, available_keys, available_labels, information
from harness.data.weights import WEIGHTS, Weighting, WeightKeys, value_text, weight_fields
from harness.support.configs import unwrapped

__all__ = ["Extras", "Found", "split_keys"]

_SHOWN = 10  # groups by name
_LOOKED_AT = 20  # frames about, for names that are meant instead of one that is not there
_MEANT = 3  # names that are told


@dataclass(frozen=True)
class Found:
    """Names and values that frames have of what :class:`Extras` ask for; those of several files merge by ``|``.

    Attributes:
        fields: labels and inputs that any frame has.
        keys: names of weights and of the group that any frame has.
        values: of each key of ``data.weights``.
        available: everything that the first thousand frames have.
        fitting: names of numbers of the right shape in some of the frames, by the field of a label that none has.
    """

    fields: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    values: Mapping[str, frozenset[str]] = field(default_factory=dict)
    available: frozenset[str] = frozenset()
    fitting: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __or__(self, other: Found) -> Found:
        """Names and values that the frames of either have."""
        return Found(
            self.fields | other.fields,
            self.keys | other.keys,
            _merged(self.values, other.values),
            self.available | other.available,
            _merged(self.fitting, other.fitting),
        )


@dataclass(frozen=True)
class Extras:
    """Labels and inputs, weights and groups of a data set, as a config asks for them.

    Attributes:
        entries: labels, and inputs of the model.
        weighting: of the frames.
        group_key: name in the files whose value is the group of a frame; None for no groups.
    """

    entries: tuple[FieldEntry, ...] = ()
    weighting: Weighting = field(default_factory=Weighting)
    group_key: str | None = None

    @classmethod
    def from_config(
        cls,
        labels: Any = None,
        inputs: Any = None,
        weights: Any = None,
        group_key: str | None = GROUP_KEY,
        weight_keys: Mapping[str, Any] | None = None,
    ) -> Extras:
        """Extras of ``data.labels``, ``data.inputs``, ``data.weights``, ``data.group_key`` and ``data.keys``.

        The fields of labels and inputs are registered.

        Raises:
            TypeError, ValueError: an option that is unknown, of the wrong kind, or contradicts another.
        """
        if group_key is not None and (not isinstance(group_key, str) or not group_key):
            raise TypeError(f"data.group_key is a name in the files, or null for no groups, found {group_key!r}")
        entries = (*entries_of(labels), *entries_of(inputs, is_input=True))
        names = [entry.field for entry in entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is in data.labels and in data.inputs; expected one of them")
        for entry in entries:
            entry.register()
        return cls(entries, Weighting.from_config(weight_keys, weights), group_key)

    @classmethod
    def joined(cls, of_sets: Mapping[str, Extras]) -> Extras:
        """Extras of several data sets: the labels, inputs and weights of any, each as the first set that has it.

        Args:
            of_sets: by the names of the sets.

        Raises:
            ValueError: an input without a default, which another set does not have.
        """
        entries: dict[str, FieldEntry] = {}
        factors: dict[str, dict[str, float]] = {}
        for name, extras in of_sets.items():
            for entry in extras.entries:
                entries.setdefault(entry.field, entry)
            for key, factor_of in extras.weighting.factors.items():
                factors[key] = {**factor_of, **factors.get(key, {})}
            for entry in extras.inputs:
                for other, its in of_sets.items():
                    if entry.default is None and entry.field not in {each.field for each in its.inputs}:
                        raise ValueError(
                            f"the set {other} has no input {entry.field}, which the model gets of the set {name} and "
                            f"which has no default; expected it in every set. Add it to data.sets.{other}.inputs, or "
                            f"give data.sets.{name}.inputs.{entry.field}.default"
                        )
        first = next(iter(of_sets.values()))
        return replace(first, entries=tuple(entries.values()), weighting=replace(first.weighting, factors=factors))

    @property
    def labels(self) -> tuple[FieldEntry, ...]:
        """Entries of labels."""
        return tuple(entry for entry in self.entries if not entry.is_input)

    @property
    def inputs(self) -> tuple[FieldEntry, ...]:
        """Entries of inputs."""
        return tuple(entry for entry in self.entries if entry.is_input)

    def read(self, frames: Iterable[Frame], require_labels: bool = False) -> list[Frame]:
        """Frames with the labels, inputs, weights and group that their files have.

        Args:
            frames: as :func:`~harness.data.reading.read_frames` returns them.
            require_labels: whether a frame without any label, further ones included, is an error.

        Raises:
            ValueError: a value that is unusable, with the frame.
        """
        found = [self._read(frame) for frame in frames]
        names = [entry.field for entry in self.labels]
        for frame in found if require_labels and names else ():
            if not frame.is_labelled and not any(name in frame.extras for name in names):
                available = available_keys([frame.atoms])
                raise ValueError(
                    f"{frame.location}: no energy, forces or stress under the names of data.keys, and no "
                    f"{', '.join(names)} (data.labels); the frame has {available}. Give the keys that the file uses, "
                    f"or remove the frame"
                )
        return found

    def _read(self, frame: Frame) -> Frame:
        values = {entry.field: entry.read(frame) for entry in self.entries}
        extras = {name: value for name, value in values.items() if value is not None}
        weights, group = self.weighting.of(frame), group_of(frame, self.group_key)
        if not extras and not weights and group is None:
            return frame
        return replace(frame, extras={**frame.extras, **extras}, weights=weights, group=group)

    def found(self, frames: Sequence[Frame]) -> Found:
        """Names and values in the frames of a file, of those that :meth:`read` has returned."""
        asked = [getattr(self.weighting.keys, name) for name in WEIGHTS] + [self.group_key]
        fields, keys, values = set[str](), set[str](), {key: set[str]() for key in self.weighting.factors}
        for frame in frames:
            fields.update(frame.extras)
            keys.update(key for key in asked if key not in (None, *keys) and information(frame.atoms, key) is not None)
            for key, found in values.items():
                text = value_text(information(frame.atoms, key))
                if text is not None:
                    found.add(text)
        available = available_keys([frame.atoms for frame in frames[:1000]])  # a file is like its beginning
        by_key = {key: frozenset(each) for key, each in values.items()}
        lacking = [entry for entry in self.labels if entry.field not in fields]
        sample = frames[:: max(1, len(frames) // _LOOKED_AT)] if lacking else []
        taken = {*asked, *self.weighting.factors, *(entry.key for entry in self.entries)}
        names = [name for name, might_be in available_labels(sample).items() if not might_be and name not in taken]
        fitting = {entry.field: frozenset(name for name in names if _fits(entry, sample, name)) for entry in lacking}
        return Found(frozenset(fields), frozenset(keys), by_key, frozenset(available), fitting)

    def check(self, found: Found, where: str) -> None:
        """Refuse names of labels, weights and groups that no frame of the data has.

        An input with a default may be in none.

        Args:
            found: in all files.
            where: the files, for the message.

        Raises:
            KeyError: with what the frames have, and the name that may be meant.
        """
        self.check_labels(found, where, [entry.field for entry in self.labels])
        self.weighting.refuse_unknown(found.keys, found.values, found.available)
        refuse_unknown_group_key(self.group_key, self.group_key in found.keys, found.available)

    def check_labels(self, found: Found, where: str, asked: Collection[str]) -> None:
        """Refuse labels that no frame of the data has.

        Args:
            found: in all files.
            where: the files, for the message.
            asked: fields of the labels that must be there.

        Raises:
            KeyError: with what the frames have, and the name that may be meant.
        """
        for entry in self.labels:
            if entry.field in found.fields or entry.field not in asked:
                continue
            if entry.key in found.available:
                raise KeyError(f"{entry.setting}: the key {entry.key!r} is NaN in all frames of {where}")
            raise KeyError(
                f"{entry.setting}: no frame of {where} has the key {entry.key!r}. {_meant(entry, found)}The frames "
                f"have {sorted(found.available)}"
            )

    def batch_fields(self, weights: Collection[str], groups: Collection[str]) -> tuple[BatchField, ...]:
        """Fields of the batches of all sets of a data module.

        Args:
            weights: that any frame of any set has.
            groups: names of the groups of all sets, in their order.
        """
        return (*(entry.batch_field() for entry in self.entries), *weight_fields(weights), *group_fields(groups))

    def inputs_alone(self) -> Extras:
        """The inputs of the model, without labels, weights and groups: what a structure needs for a prediction."""
        return Extras(self.inputs, Weighting(WeightKeys(None, None, None, None)))

    def describe(self, frames: FrameSet, groups: Sequence[str]) -> list[str]:
        """Lines on inputs, weights and groups of the training frames, those of which there are any.

        Args:
            frames: of the training set.
            groups: names of the groups of all sets.
        """
        lines, counts = [], frames.label_counts()
        if self.inputs:
            given = ", ".join(f"{entry.field} {counts.get(entry.field, 0)}" for entry in self.inputs)
            lines.append(f"inputs of the model, and training frames that have them (others: the default): {given}")
        for name in frames.weight_names():
            weights = frames.column(name)
            lines.append(
                f"{name.replace('_', ' ')} of the training frames: {weights.min():g} to {weights.max():g}, sum "
                f"{weights.sum():g}; {int((weights == 0).sum())} frames with 0"
            )
        if groups:
            names, codes = frames.group_names(), frames.column("group")
            numbers = {names[code]: int((codes == code).sum()) for code in np.unique(codes).tolist() if code >= 0}
            listed = ", ".join(f"{name} {numbers.get(name, 0)}" for name in groups[:_SHOWN])
            more = f" and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
            without = int((codes < 0).sum())
            rest = f"; {without} of none" if without else ""
            lines.append(f"training frames by {self.group_key}: {listed}{more}{rest}")
        return lines

    def hint(self, name: str, frames: FrameSet) -> str:
        """Sentences on a label that frames lack: where it is looked for, and what they have instead."""
        entry = next((entry for entry in self.labels if entry.field == name), None)
        if entry is None or frames.label_counts().get(name):
            return ""
        return (
            f"It is looked for under {entry.key!r} ({entry.setting}.key); the frames have {sorted(frames.available())}."
        )

    def plain(self) -> dict[str, Any]:
        """Labels, inputs, weights and the key of groups as plain data, for the record in a checkpoint."""
        return {
            "labels": {entry.field: entry.plain() for entry in self.labels},
            "inputs": {entry.field: entry.plain() for entry in self.inputs},
            "weights": self.weighting.plain(),
            "group_key": self.group_key,
        }

    @classmethod
    def from_plain(cls, recorded: Mapping[str, Any] | None) -> Extras:
        """Extras of a record; none of one that has none."""
        if not recorded:
            return cls()
        weights = recorded.get("weights") or {}
        return cls.from_config(
            recorded.get("labels"),
            recorded.get("inputs"),
            weights.get("factors"),
            recorded.get("group_key"),
            weights.get("keys"),
        )


def split_keys(keys: Any) -> tuple[Any, dict[str, Any] | None]:
    """Names of labels and names of weights among those of ``data.keys``; the first as it was if it is no mapping."""
    keys = unwrapped(keys)
    if not isinstance(keys, Mapping):
        return keys, None
    of_weights = {name: key for name, key in keys.items() if name in WEIGHTS}
    return {name: key for name, key in keys.items() if name not in WEIGHTS}, of_weights or None


def _merged(one: Mapping[str, frozenset[str]], other: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    nothing: frozenset[str] = frozenset()
    return {name: one.get(name, nothing) | other.get(name, nothing) for name in {*one, *other}}


def _fits(entry: FieldEntry, frames: Sequence[Frame], name: str) -> bool:
    """True if all frames that have a value under a name have numbers of the right shape there."""
    having = [frame for frame in frames if information(frame.atoms, name) is not None]
    return bool(having) and all(entry.fits(frame, name) for frame in having)


def _meant(entry: FieldEntry, found: Found) -> str:
    """Question whether another key was meant: one that is like the key or the field, or else any of the right shape."""
    words = [word.lower() for word in (entry.key, entry.field, entry.field.rstrip("s"))]

    def likeness(name: str) -> float:
        return max(SequenceMatcher(None, name.lower(), word).ratio() for word in words)

    names = sorted(sorted(found.fitting.get(entry.field, ())), key=likeness, reverse=True)[:_MEANT]
    names = [name for name in names if any(word in name.lower() for word in words)] or names
    return f"Did you mean {' or '.join(f'{entry.setting}.key={name}' for name in names)}? " if names else ""
