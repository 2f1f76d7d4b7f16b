"""Weights of components and of atom types within them: given by the user, driven by a schedule, normalised.

One flat dictionary names them as values are named: ``forces_mse`` is the coefficient of that component, and
``forces_mse_H`` the weight of hydrogen in its average. What holds at an epoch is what was given, overlaid with what the
schedule says for that epoch: a component that a schedule does not name keeps its coefficient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from harness.metrics.components import MetricEntry, check_coeff
from harness.schedules import Interval, Schedule, as_schedule, check_interval, described
from harness.support.text import did_you_mean

__all__ = ["Coefficients"]

Given = Mapping[str, float | Mapping[str, float] | None]


class Coefficients:
    """Keeps the entries' coefficients and type weights; every change is checked as a whole before it is made.

    Args:
        entries: components by name; their ``given_coeff``, ``coeff`` and ``per_type_coeffs`` are kept up to date.
        type_names: names of the atom types.

    Attributes:
        schedule: what drives some of them, or None.
        interval: how often a training moves on along the schedule.
        position: epoch and relative learning rate that the schedule was moved to last.
    """

    def __init__(self, entries: Mapping[str, MetricEntry], type_names: Sequence[str]) -> None:
        self._entries = entries
        self._type_keys = {
            key: (entry.name, index)
            for entry in entries.values()
            for index, key in enumerate(entry.type_keys(type_names))
        }
        self._given: dict[str, float | None] = {name: entry.given_coeff for name, entry in entries.items()}
        for entry in entries.values():
            if entry.per_type_coeffs is not None:
                self._given |= dict(zip(entry.type_keys(type_names), entry.per_type_coeffs, strict=True))
        self.schedule: Schedule | None = None
        self.interval: Interval = "epoch"
        self.position: tuple[float, float | None] = (0.0, None)
        self._check_total(self._given)
        self._apply(self._given)
        self._configured = dict(self._given)

    # --- changes ---

    def change(self, coeffs: Given) -> None:
        """Change some; the others stay as they were given.

        Raises:
            KeyError: an unknown name; the valid ones are listed.
            ValueError: one that is negative or not finite, only zeros, or one that the schedule drives.
        """
        changed = self._flat(coeffs)
        driven = [name for name in changed if self.schedule is not None and name in self.schedule.names]
        if driven:
            raise ValueError(
                f"The coefficient of {driven[0]!r} is driven by the schedule {type(self.schedule).__name__}, which "
                f"would overwrite it. Change the schedule, or leave it out."
            )
        given = {**self._given, **changed}
        self._check(given, self.position)
        self._given = given
        self._apply(self._at(given, self.position))

    def follow(self, schedule: Schedule | None, interval: Interval = "epoch") -> None:
        """Let a schedule drive them from now on; None for none.

        Raises:
            TypeError: no schedule.
            ValueError: a name in it that there is no component or type for, an epoch at which nothing is left, or an
                unknown interval.
        """
        chosen, interval = None if schedule is None else as_schedule(schedule), check_interval(interval)
        unknown = [name for name in (chosen.names if chosen else ()) if not self._is_known(name)]
        if unknown:
            raise ValueError(
                f"The schedule names {', '.join(map(repr, unknown))}, which this set of components does not have. "
                f"{self._hint(unknown[0])}{self._valid_names()}"
            )
        before, self.schedule = self.schedule, chosen
        try:
            for epoch in (0.0, *(chosen.breakpoints if chosen else ())):
                for rate in (1.0, 0.0) if chosen and chosen.needs_learning_rate else (None,):
                    self._check(self._given, (epoch, rate))
        except ValueError:
            self.schedule = before
            raise
        self.interval = interval
        epoch, rate = self.position
        self.move_to(epoch, 1.0 if rate is None and chosen and chosen.needs_learning_rate else rate)

    def move_to(self, epoch: float, learning_rate: float | None = None) -> bool:
        """Take up what the schedule says for an epoch; returns whether anything has changed.

        Args:
            epoch: number of the epoch, with a fraction within it.
            learning_rate: the learning rate divided by that of the start, for schedules that follow it.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, Real) or not 0 <= float(epoch) < math.inf:
            raise ValueError(f"An epoch is a number of at least 0, found {epoch!r}.")
        if self.schedule is not None and self.schedule.needs_learning_rate and learning_rate is None:
            if epoch > 0:
                raise ValueError(
                    f"The schedule follows the learning rate: give it beside the epoch, as a part of that which the "
                    f"optimizer was given, such as move_to({epoch}, learning_rate=scheduler.get_last_lr()[0] / 1e-3)."
                )
            learning_rate = 1.0  # before a training has begun
        self.position = (float(epoch), learning_rate)
        wanted = self._at(self._given, self.position)
        if wanted == self._current:
            return False
        self._check_total(wanted)
        self._apply(wanted)
        return True

    # --- what is known of them ---

    @property
    def weighted(self) -> dict[str, float]:
        """Given coefficients of the components that are in the weighted sum now."""
        return {name: coeff for name in self._entries if (coeff := self._current[name]) is not None}

    @property
    def ever_weighted(self) -> set[str]:
        """Components that are in the weighted sum now, or will be at some time."""
        driven = self.schedule.names if self.schedule is not None else ()
        return set(self.weighted) | {name for name in driven if name in self._entries}

    @property
    def type_weights(self) -> dict[str, float]:
        """Weights of all types of the components in which any is given or driven, as fractions of their sum."""
        keys = (*self._current, *(self.schedule.names if self.schedule is not None else ()))
        named = {self._type_keys[key][0] for key in keys if key in self._type_keys}
        weights = self._weights(self._current, named)
        return {
            key: weights[name][index] / sum(weights[name])
            for key, (name, index) in self._type_keys.items()
            if name in weights
        }

    def _is_known(self, name: str) -> bool:
        return name in self._entries or name in self._type_keys

    def _hint(self, unknown: str) -> str:
        """The name that may be meant, or what weights of types need where the name of a component stands before."""
        if any(str(unknown).startswith(f"{component}_") for component in self._entries):
            return "Weights of atom types need a component with `per_type: true` (per_type_forces_coeffs). "
        return did_you_mean(unknown, (*self._entries, *self._type_keys))

    def _valid_names(self) -> str:
        text = f"Valid names: {', '.join(self._entries)}"
        return f"{text}; and of atom types: {', '.join(self._type_keys)}." if self._type_keys else f"{text}."

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """What a restart needs: numbers and strings only."""
        return {
            "given": dict(self._given),
            "configured": dict(self._configured),
            "schedule": None if self.schedule is None else described(self.schedule, self.interval),
            "position": list(self.position),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, unless the configuration has changed since: then that wins, with a warning."""
        schedule = None if self.schedule is None else described(self.schedule, self.interval)
        if dict(state["configured"]) == self._configured:
            self._given = dict(state["given"])
        elif dict(state["given"]) != self._given:
            warnings.warn(
                f"The checkpoint was made with the coefficients {dict(state['configured'])}, this run is "
                f"configured with {self._configured}: the configuration is used.",
                stacklevel=4,
            )
        if state["schedule"] != schedule:
            warnings.warn(
                f"The checkpoint was made with the schedule {state['schedule']}, this run is configured with "
                f"{schedule}: the configuration is used.",
                stacklevel=4,
            )
        epoch, learning_rate = state["position"]
        if learning_rate is None and self.schedule is not None and self.schedule.needs_learning_rate:
            learning_rate = 1.0  # of a checkpoint of another schedule; the next epoch or step brings the right one
        self.position = (epoch, learning_rate)
        self._apply(self._at(self._given, self.position))

    # --- inside ---

    def _flat(self, coeffs: Given) -> dict[str, float | None]:
        """Checked numbers by flat name."""
        flat: dict[str, float | None] = {}
        for name, value in coeffs.items():
            by_type = isinstance(value, Mapping)
            numbers = {f"{name}_{key}": each for key, each in value.items()} if by_type else {name: value}  # type: ignore[union-attr]
            for key, number in numbers.items():
                if not self._is_known(key):
                    raise KeyError(f"Unknown component {key!r}. {self._hint(key)}{self._valid_names()}")
                flat[key] = check_coeff(number, key)
                if number is None and key in self._type_keys:
                    raise ValueError(f"The weight of the atom type {key!r} is a number, found null; 0 leaves it out.")
        return flat

    def _at(self, given: Mapping[str, float | None], position: tuple[float, float | None]) -> dict[str, float | None]:
        if self.schedule is None:
            return dict(given)
        return {**given, **self.schedule(*position)}

    def _check(self, given: Mapping[str, float | None], position: tuple[float, float | None]) -> None:
        rate = 1.0 if position[1] is None and self.schedule and self.schedule.needs_learning_rate else position[1]
        self._check_total(self._at(given, (position[0], rate)), f" at epoch {position[0]:g}" if self.schedule else "")

    def _check_total(self, flat: Mapping[str, float | None], when: str = "") -> None:
        """Refuse what no average can be made of."""
        weighted = {name: coeff for name in self._entries if (coeff := flat[name]) is not None}
        total = sum(weighted.values())
        if weighted and not 0 < total < math.inf:
            raise ValueError(
                f"The coefficients {weighted} sum to {total}{when}; at least one must be above 0. To leave a component "
                f"out of the weighted sum, set its coefficient to null."
            )
        for name, weights in self._weights(flat).items():
            if not 0 < sum(weights) < math.inf:
                raise ValueError(
                    f"The weights of the atom types in {name!r} sum to {sum(weights)}{when}; at least one must be "
                    f"above 0."
                )

    def _weights(self, flat: Mapping[str, float | None], named: Collection[str] = ()) -> dict[str, tuple[float, ...]]:
        """Weights of all types of the components for which any is given, and of those named; 1 for the others."""
        weights: dict[str, list[float]] = {}
        for key, (name, index) in self._type_keys.items():
            if key in flat or name in named:
                num_types = sum(component == name for component, _ in self._type_keys.values())
                each = weights.setdefault(name, [1.0] * num_types)
                each[index] = (flat[key] or 0.0) if key in flat else 1.0
        return {name: tuple(each) for name, each in weights.items()}

    def _apply(self, flat: dict[str, float | None]) -> None:
        self._current = flat
        total = sum(self.weighted.values())
        weights = self._weights(flat)
        for name, entry in self._entries.items():
            coeff = flat[name]
            entry.given_coeff = coeff
            entry.coeff = None if coeff is None else coeff / total
            entry.per_type_coeffs = weights.get(name)  # a schedule may end before the training
