"""Coefficients of components, and weights of atom types within them: given, scheduled or learnt.

:class:`WeightedComponents` keeps the coefficients that were given, a schedule and a position in it, and makes a
:class:`Coefficients` of them: a frozen snapshot, which is all that an evaluation needs. A change makes a new snapshot.

One flat dictionary names all of them as values are named: ``forces_mse`` is the coefficient of that component, and
``forces_mse_H`` the weight of hydrogen in its average. At an epoch, the schedule's coefficients overlay those that were
given: a component that a schedule does not name keeps its coefficient. Then they are divided by their sum, or used
as they are, see :data:`Normalisation`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from harness.metrics.components import ComponentMapping, MetricEntry, WeightedEntry, check_coeff
from harness.schedules import Interval, Schedule, as_schedule, check_interval, described
from harness.support.checks import is_number
from harness.support.device import to_device
from harness.support.text import did_you_mean

__all__ = ["Coefficients", "CoefficientsOnDevice", "Normalisation", "WeightedComponents", "Weighting"]

Given = Mapping[str, float | Mapping[str, float] | None]
"""``{component: coefficient}``, or ``{component: {type: weight}}``."""
Flat = dict[str, float | None]
"""Coefficients and weights of types by their flat names."""
Position = tuple[float, float | None]
"""Epoch, and relative learning rate where a schedule follows it."""
Normalisation = Literal["normalised", "as_given"]
"""``normalised``: coefficients are divided by their sum. ``as_given``: the loss is the plain sum of coefficients times
components, as in published recipes, whose weight decay and clipping of gradients depend on its scale."""


class Weighting(Protocol):
    """Changes coefficients on the device by learnt parameters; an ``nn.Module``."""

    def prepare(self, names: Sequence[str]) -> None:
        """Make the parameters, for these components in this order."""

    def __call__(self, coeffs: Tensor) -> Tensor:
        """Map coefficients to others of the same sum: float64 ``[num_components]``; 0 stays 0."""


@dataclass(frozen=True)
class CoefficientsOnDevice:
    """A snapshot's numbers as tensors on one device.

    Attributes:
        coeffs: float64 ``[num_components]``; 0 outside of the weighted sum.
        contributes: bool ``[num_components]``, where the coefficient is above 0.
        slot_weights: float64 ``[num_slots]`` of all components.
        zero: float64 scalar.
    """

    coeffs: Tensor
    contributes: Tensor
    slot_weights: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Coefficients:
    """Snapshot of coefficients and weights of types, in the order of a row's components.

    Two snapshots are equal if their numbers are.

    Attributes:
        coeffs: coefficient of each component, as the weighted sum has it; None outside of it.
        slot_weights: weight of each slot (an atom type, or the whole component) in the average of its component.
        weighted: positions of the components in the weighted sum.
        all_contribute: every component has a coefficient above 0.
        all_slots_weigh: every slot has a weight above 0.
    """

    coeffs: tuple[float | None, ...]
    slot_weights: tuple[float, ...]
    weighted: tuple[int, ...] = field(init=False, compare=False)
    all_contribute: bool = field(init=False, compare=False)
    all_slots_weigh: bool = field(init=False, compare=False)
    _on_devices: dict[torch.device, CoefficientsOnDevice] = field(
        init=False, compare=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        weighted = tuple(position for position, coeff in enumerate(self.coeffs) if coeff is not None)
        object.__setattr__(self, "weighted", weighted)
        object.__setattr__(self, "all_contribute", all(self.coeffs))
        object.__setattr__(self, "all_slots_weigh", all(self.slot_weights))

    def __str__(self) -> str:
        return str((*self.coeffs, *self.slot_weights))

    def is_trained(self, position: int) -> bool:
        """True if gradients flow through a component: those outside of the sum would send 0 × inf = NaN."""
        return not self.weighted or bool(self.coeffs[position])

    def on(self, device: torch.device) -> CoefficientsOnDevice:
        """Tensors on a device, copied once for a snapshot without the host waiting."""
        if device not in self._on_devices:
            numbers = to_device([*(coeff or 0.0 for coeff in self.coeffs), *self.slot_weights], device)
            with torch.inference_mode(False):  # they outlive this step, and training saves them for backward
                coeffs, slot_weights = torch.split(numbers, [len(self.coeffs), len(self.slot_weights)])
                zero = torch.zeros((), dtype=torch.float64, device=device)
                self._on_devices[device] = CoefficientsOnDevice(coeffs, coeffs > 0, slot_weights, zero)
        return self._on_devices[device]

    def weighted_sum(self, components: Tensor, coeffs: Tensor) -> Tensor:
        r"""Sum :math:`\sum_k c_k v_k` over components that contribute; differentiable.

        Args:
            components: values :math:`v_k`, float64 ``[num_components]``.
            coeffs: coefficients :math:`c_k` on their device: those of :meth:`on`, or learnt ones made of them.
        """
        if not self.all_contribute:
            on_device = self.on(components.device)
            components = torch.where(on_device.contributes, components, on_device.zero)
        return torch.dot(coeffs, components)


class WeightedComponents(ComponentMapping, nn.Module):
    """Named components whose coefficients can be set, scheduled and learnt; each change is checked before it is made.

    Args:
        components: components by name, in the user's order.
        order: the same components in the order of the row, which is that of the snapshot.
        type_names: names of the atom types.
        coefficients: ``normalised`` or ``as_given``, see :data:`Normalisation`.

    Attributes:
        normalisation: that of ``coefficients``.
        coefficients: snapshot of the coefficients of the moment.
        weighting: changes the coefficients on the device by learnt parameters, see :meth:`weigh_by`.
    """

    def __init__(
        self,
        components: dict[str, MetricEntry],
        order: Sequence[MetricEntry],
        type_names: tuple[str, ...],
        coefficients: Normalisation = "normalised",
    ) -> None:
        super().__init__()
        if coefficients not in get_args(Normalisation):
            raise ValueError(
                f"`coefficients` is {' or '.join(get_args(Normalisation))}, found {coefficients!r}; the numbers "
                f"themselves are `coeffs`."
            )
        self.normalisation: Normalisation = coefficients
        self.type_names = type_names
        self.weighting: Weighting | None = None
        self._components = components
        self._order = tuple(order)
        self._names = _Names(components.values(), type_names)
        self._given: Flat = {name: entry.given_coeff for name, entry in components.items()}
        for entry in components.values():
            if entry.per_type_coeffs is not None:
                self._given |= dict(zip(entry.type_keys(type_names), entry.per_type_coeffs, strict=True))
        self._configured = dict(self._given)
        self._schedule: Schedule | None = None
        self._schedule_interval: Interval = "epoch"
        self._position: Position = (0.0, None)
        self._names.check_totals(self._given)
        self.coefficients = self._snapshot()
        self._ever_weighted: tuple[Coefficients | None, Schedule | None, set[str]] = (None, None, set())

    # --- coefficients of the moment ---

    @property
    def entries(self) -> dict[str, WeightedEntry]:
        """Components with their coefficients of the moment, by name."""
        current = self._current
        weights, coeffs = self._names.weights_of_types(current), self.coeffs
        return {
            name: WeightedEntry(
                **{**vars(entry), "given_coeff": current[name], "per_type_coeffs": weights.get(name)},
                coeff=coeffs[name],
            )
            for name, entry in self._components.items()
        }

    @property
    def do_weighted_sum(self) -> bool:
        """True if any component has a coefficient, as NequIP's module asks."""
        return bool(self.coefficients.weighted)

    @property
    def given_coeffs(self) -> Flat:
        """Coefficients as given or scheduled, by component."""
        current = self._current
        return {name: current[name] for name in self._components}

    @property
    def coeffs(self) -> Flat:
        """Coefficients by component, as the weighted sum has them; None for those outside of it."""
        by_name = {entry.name: coeff for entry, coeff in zip(self._order, self.coefficients.coeffs, strict=True)}
        return {name: by_name[name] for name in self._components}

    def effective_coeffs(self) -> dict[str, float]:
        """Coefficients of the components in the weighted sum, as a step uses them.

        They differ from :attr:`coeffs` under a :attr:`weighting`; then the host waits for the device.
        """
        given = {name: coeff for name, coeff in self.coeffs.items() if coeff is not None}
        if self.weighting is None:
            return given
        device = next(cast(nn.Module, self.weighting).parameters()).device
        with torch.no_grad():
            used = self.coeffs_on(device).tolist()
        by_name = {entry.name: coeff for entry, coeff in zip(self._order, used, strict=True)}
        return {name: by_name[name] for name in given}

    def coeffs_on(self, device: torch.device) -> Tensor:
        """Coefficients as a step uses them, float64 ``[num_components]`` in the order of the row."""
        coeffs = self.coefficients.on(device).coeffs
        return coeffs if self.weighting is None else self.weighting(coeffs)

    @property
    def type_weights(self) -> dict[str, float]:
        """Weights of atom types that were given or scheduled, by ``{name}_{type}``; they sum to 1 in a component."""
        driven = self._schedule.names if self._schedule is not None else ()
        return self._names.fractions_of_types(self._current, driven)

    @property
    def ever_weighted(self) -> set[str]:
        """Components that are in the weighted sum now, or at another epoch of the schedule."""
        coefficients, schedule, weighted = self._ever_weighted
        if coefficients is not self.coefficients or schedule is not self._schedule:
            driven = self._schedule.names if self._schedule is not None else ()
            weighted = {self._order[position].name for position in self.coefficients.weighted}
            weighted |= {name for name in driven if name in self._components}
            self._ever_weighted = self.coefficients, self._schedule, weighted
        return weighted

    # --- changes ---

    def set_coeffs(self, coeffs: Given) -> None:
        """Change some coefficients; the others stay as they were given. Where they are normalised, all are anew.

        Args:
            coeffs: ``{component: coefficient}``; None takes a component out of the weighted sum. A dictionary
                ``{type: weight}`` in place of the coefficient changes weights of a ``per_type`` component's types.

        Raises:
            KeyError: an unknown component; the valid ones are listed. Nothing is changed then.
            ValueError: a coefficient that is negative or not finite, or only zeros; or one that a schedule drives.
        """
        changed = self._names.flatten(coeffs)
        driven = [name for name in changed if self._schedule is not None and name in self._schedule.names]
        if driven:
            raise ValueError(
                f"The coefficient of {driven[0]!r} is driven by the schedule {type(self._schedule).__name__}, which "
                f"would overwrite it. Change the schedule, or leave it out."
            )
        given = {**self._given, **changed}
        self._check(given, self._schedule, self._position)
        self._given = given
        self._take_up()

    @property
    def schedule(self) -> Schedule | None:
        """Schedule that drives coefficients by epoch, or None."""
        return self._schedule

    @property
    def schedule_interval(self) -> Interval:
        """``epoch`` or ``step``: how often a training moves on along the schedule."""
        return self._schedule_interval

    @property
    def position(self) -> Position:
        """Epoch, and relative learning rate where it matters, that the schedule was moved to last."""
        return self._position

    def follow(self, schedule: Schedule | None, interval: Interval = "epoch") -> None:
        """Let a schedule drive coefficients from now on, in place of the one before; None for none.

        Args:
            schedule: coefficients as a function of the epoch.
            interval: how often a training moves on: at the start of every ``epoch``, or at every ``step``, with
                fractions of epochs.

        Raises:
            TypeError: no schedule.
            ValueError: a name in it is no component or type, all coefficients are 0 at some epoch, or the interval is
                unknown.
        """
        chosen, interval = None if schedule is None else as_schedule(schedule), check_interval(interval)
        unknown = [name for name in (chosen.names if chosen else ()) if name not in self._names]
        if unknown:
            raise ValueError(
                f"The schedule names {', '.join(map(repr, unknown))}, which this set of components does not have. "
                f"{self._names.hint(unknown[0])}{self._names.valid()}"
            )
        for epoch in (0.0, *(chosen.breakpoints if chosen else ())):
            for rate in (1.0, 0.0) if chosen and chosen.needs_learning_rate else (None,):
                self._check(self._given, chosen, (epoch, rate))
        self._schedule, self._schedule_interval = chosen, interval
        epoch, rate = self._position
        self.move_to(epoch, 1.0 if rate is None and chosen and chosen.needs_learning_rate else rate)

    def move_to(self, epoch: float, learning_rate: float | None = None) -> None:
        """Take up the coefficients of an epoch; any epoch, in any order, and not in the middle of a step.

        Args:
            epoch: number of the epoch, with a fraction within it.
            learning_rate: the learning rate divided by that of the start, for schedules that follow it.

        Raises:
            ValueError: no epoch, or no learning rate for a schedule that follows it.
        """
        if not is_number(epoch) or not 0 <= epoch < math.inf:
            raise ValueError(f"An epoch is a number of at least 0, found {epoch!r}.")
        if self._schedule is not None and self._schedule.needs_learning_rate and learning_rate is None:
            if epoch > 0:
                raise ValueError(
                    f"The schedule follows the learning rate: give it beside the epoch, as a part of that which the "
                    f"optimizer was given, such as move_to({epoch}, learning_rate=scheduler.get_last_lr()[0] / 1e-3)."
                )
            learning_rate = 1.0  # before a training has begun
        position = (float(epoch), learning_rate)
        self._names.check_totals(_overlaid(self._given, self._schedule, position))
        self._position = position
        self._take_up()

    def weigh_by(self, weighting: Weighting) -> None:
        """Let learnt parameters change the coefficients on the device, from those given or scheduled."""
        weighting.prepare([entry.name for entry in self._order])
        self.weighting = weighting

    def order_as(self, components: Sequence[MetricEntry]) -> None:
        """Take up the same components in the order of another row, with other slots."""
        self._order = tuple(components)
        self.coefficients = self._snapshot()

    # --- checkpoints ---

    def _coefficient_state(self) -> dict[str, Any]:
        """State of the coefficients for a checkpoint: numbers and strings only."""
        state: dict[str, Any] = {
            "given": dict(self._given),
            "configured": dict(self._configured),
            "schedule": self._described_schedule,
            "position": list(self._position),
        }
        if self.normalisation != "normalised":  # whose state is that of version 0.1.0
            state["normalisation"] = self.normalisation
        return state

    def _restore_coefficients(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, unless the configuration has changed since: then that wins, with a warning."""
        schedule = self._described_schedule
        before = state.get("normalisation", "normalised")
        if before != self.normalisation:
            warnings.warn(
                f"The checkpoint was made with coefficients {before}, this run is configured with coefficients "
                f"{self.normalisation}: the configuration is used.",
                stacklevel=4,
            )
        elif dict(state["configured"]) == self._configured:
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
        if learning_rate is None and self._schedule is not None and self._schedule.needs_learning_rate:
            learning_rate = 1.0  # of a checkpoint of another schedule; the next epoch or step brings the right one
        self._position = (epoch, learning_rate)
        self._take_up()

    # --- inside ---

    @property
    def _described_schedule(self) -> str | None:
        return None if self._schedule is None else described(self._schedule, self._schedule_interval)

    @property
    def _current(self) -> Flat:
        """Coefficients of the moment by flat name, as given or scheduled."""
        return _overlaid(self._given, self._schedule, self._position)

    def _check(self, given: Flat, schedule: Schedule | None, position: Position) -> None:
        epoch, rate = position
        rate = 1.0 if rate is None and schedule and schedule.needs_learning_rate else rate
        self._names.check_totals(_overlaid(given, schedule, (epoch, rate)), f" at epoch {epoch:g}" if schedule else "")

    def _take_up(self) -> None:
        """Make the snapshot of the moment; the one before stays if its numbers are the same."""
        snapshot = self._snapshot()
        if snapshot != self.coefficients:
            self.coefficients = snapshot

    def _snapshot(self) -> Coefficients:
        current = self._current
        total = 1.0
        if self.normalisation == "normalised":
            total = sum(coeff for name in self._components if (coeff := current[name]) is not None)
        weights = self._names.weights_of_types(current)
        return Coefficients(
            tuple(None if (coeff := current[entry.name]) is None else coeff / total for entry in self._order),
            tuple(
                weight
                for entry in self._order
                for weight in entry.num_parts
                * (weights.get(entry.name) or entry.set_coeffs or (1.0,) * entry.num_slots(self.type_names))
            ),
        )


class _Names:
    """Names of the coefficients and weights of a set of components, and checks of numbers by these names."""

    def __init__(self, components: Iterable[MetricEntry], type_names: tuple[str, ...]) -> None:
        entries = list(components)
        self.components = [entry.name for entry in entries]
        self.types = {
            key: (entry.name, index) for entry in entries for index, key in enumerate(entry.type_keys(type_names))
        }
        self._num_types = len(type_names)

    def __contains__(self, name: object) -> bool:
        return name in self.components or name in self.types

    def hint(self, unknown: str) -> str:
        """Suggest a similar name, or ``per_type`` for a name that looks like the weight of a type."""
        if any(str(unknown).startswith(f"{component}_") for component in self.components):
            return "Weights of atom types need a component with `per_type: true` (per_type_forces_coeffs). "
        return did_you_mean(unknown, (*self.components, *self.types))

    def valid(self) -> str:
        """List of all names, for messages."""
        text = f"Valid names: {', '.join(self.components)}"
        return f"{text}; and of atom types: {', '.join(self.types)}." if self.types else f"{text}."

    def flatten(self, coeffs: Given) -> Flat:
        """Checked numbers by flat name.

        Raises:
            KeyError: an unknown name; the valid ones are listed.
            TypeError, ValueError: no number, or one that is negative or not finite.
        """
        flat: Flat = {}
        for name, value in coeffs.items():
            by_type = isinstance(value, Mapping)
            numbers = {f"{name}_{key}": weight for key, weight in value.items()} if by_type else {name: value}  # type: ignore[union-attr]
            for key, number in numbers.items():
                if key not in self:
                    raise KeyError(f"Unknown component {key!r}. {self.hint(key)}{self.valid()}")
                flat[key] = check_coeff(number, key)
                if number is None and key in self.types:
                    raise ValueError(f"The weight of the atom type {key!r} is a number, found null; 0 leaves it out.")
        return flat

    def check_totals(self, flat: Flat, when: str = "") -> None:
        """Refuse coefficients, or weights of types, that no average can be made of.

        Raises:
            ValueError: their sum is 0 or not finite.
        """
        weighted = {name: coeff for name in self.components if (coeff := flat[name]) is not None}
        total = sum(weighted.values())
        if weighted and not 0 < total < math.inf:
            raise ValueError(
                f"The coefficients {weighted} sum to {total}{when}; at least one must be above 0. To leave a component "
                f"out of the weighted sum, set its coefficient to null."
            )
        for name, weights in self.weights_of_types(flat).items():
            if not 0 < sum(weights) < math.inf:
                raise ValueError(
                    f"The weights of the atom types in {name!r} sum to {sum(weights)}{when}; at least one must be "
                    f"above 0."
                )

    def weights_of_types(self, flat: Flat, named: Collection[str] = ()) -> dict[str, tuple[float, ...]]:
        """Weights of all types of the components for which any is given, and of those named; 1 for the others."""
        weights: dict[str, list[float]] = {}
        for key, (name, index) in self.types.items():
            if key in flat or name in named:
                of_component = weights.setdefault(name, [1.0] * self._num_types)
                of_component[index] = (flat[key] or 0.0) if key in flat else 1.0
        return {name: tuple(of_component) for name, of_component in weights.items()}

    def fractions_of_types(self, flat: Flat, driven: Collection[str]) -> dict[str, float]:
        """Weights of types as fractions of their sum in a component, for components with any given or driven one."""
        weighed = {self.types[key][0] for key in (*flat, *driven) if key in self.types}
        weights = self.weights_of_types(flat, weighed)
        return {
            key: weights[name][index] / sum(weights[name])
            for key, (name, index) in self.types.items()
            if name in weights
        }


def _overlaid(given: Flat, schedule: Schedule | None, position: Position) -> Flat:
    """Coefficients that were given, overlaid with the schedule's at a position."""
    return dict(given) if schedule is None else {**given, **schedule(*position)}
