r"""The interface of schedules: an epoch, and a learning rate, to the coefficients and settings that hold then.

A schedule is called with an epoch, and with the learning rate where it needs it, and returns the coefficients that
hold then, by name. It has no state: a training that is continued at an epoch has the coefficients of that epoch.

    >>> ramp = Linear({"forces_mse": 0}, {"forces_mse": 10}, start_epoch=0, end_epoch=20)
    >>> later = Constant({"forces_mse": 10, "per_atom_energy_mse": 100})
    >>> Join([ramp, later], boundaries=[50])(5)
    {'forces_mse': 2.5}

**Coefficients** are given as users give them to a loss: ``{component: number}``, finite and at least 0; the loss
normalises them, or takes them as given. ``{component: {type: number}}`` are the weights of a component's average over
the atom types. They go by the names that the per-type values are reported under, ``{component}_{type}``, so that
``{"forces_mse": {"H": 5, "O": 1}}`` and ``{"forces_mse_H": 5, "forces_mse_O": 1}`` are the same. A name that is absent
at an epoch is one that the schedule does not touch then: the coefficient that the loss was given holds. 0 is not
absence: the component stays in the sum, with no weight.

**Epochs** are absolute, in every schedule and also inside of :class:`Join`: 0 is the start of the training. Fractions
are the steps within an epoch.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from harness.support.configs import unwrapped

__all__ = [
    "NO_SETTINGS",
    "Interval",
    "Schedule",
    "Settings",
    "as_schedule",
    "check_interval",
    "described",
    "read_schedules",
    "unreached",
]

Interval = Literal["epoch", "step"]
"""Interval of a training's moves along a schedule: the start of every epoch, or every step, with fractions of epochs.

It belongs to what follows a schedule, such as :meth:`harness.metrics.MetricsManager.follow`.
"""


@dataclass(frozen=True)
class Settings:
    """Settings that hold at an epoch beside the coefficients.

    Attributes:
        optimizer: settings of the optimizer in the place of its own, such as ``lr`` and ``weight_decay``.
        average_decay: decay of the exponential moving average of the weights; None for the callback's own.

    Example:
        >>> bool(Settings()), bool(Settings({"lr": 0.001}))
        (False, True)
    """

    optimizer: Mapping[str, Any] = field(default_factory=dict)
    average_decay: float | None = None

    def __bool__(self) -> bool:
        return bool(self.optimizer) or self.average_decay is not None

    def __or__(self, other: Settings) -> Settings:
        decay = self.average_decay if other.average_decay is None else other.average_decay
        return Settings({**self.optimizer, **other.optimizer}, decay)


_KINDS = (
    "Constant",
    "Cosine",
    "Exponential",
    "Join",
    "LearningRateCoupled",
    "Linear",
    "PiecewiseConstant",
    "Scale",
    "Stage",
    "Together",
)
"""Names of the schedules of this package, for messages."""
NO_SETTINGS = Settings()
"""Settings of schedules without stages: none."""


class Schedule(ABC):
    """Coefficients as a function of the epoch; base of all schedules, and of your own.

    A schedule is a frozen dataclass: its text, made of its arguments, is its identity in checkpoints. One of your own
    defines :meth:`__call__` and :attr:`names`:

        >>> @dataclass(frozen=True)
        ... class Pulse(Schedule):
        ...     name: str
        ...
        ...     def __call__(self, epoch, learning_rate=None):
        ...         return {self.name: float(epoch % 2 < 1)}
        ...
        ...     @property
        ...     def names(self):
        ...         return (self.name,)
        >>> Scale(Constant({"forces_mse": 10}), by=Pulse("forces_mse"))(3)
        {'forces_mse': 0.0}

    Hydra hands dataclasses that stand in lists through OmegaConf, which knows ``Mapping`` and ``Sequence`` in
    annotations of fields, but not ``tuple[Schedule, ...]``.
    """

    def __new__(cls, *args: object, **arguments: object) -> Schedule:
        """Refuse ``interval``, a key of a config's outermost schedule that never arrives here."""
        if "interval" in arguments and "interval" not in inspect.signature(cls.__init__).parameters:
            raise TypeError(
                f"{cls.__name__} has no `interval`, which belongs to what follows the schedule. Expected `interval: "
                f"{arguments['interval']}` in the outermost schedule of a config, or the argument schedule_interval="
                f"{arguments['interval']!r} of a loss or metrics."
            )
        return super().__new__(cls)

    @abstractmethod
    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients at an epoch, by flat name; those that are not set then are absent.

        Args:
            epoch: number of epochs since the training began, at least 0; a fraction within an epoch.
            learning_rate: learning rate now over that which the optimizer was given, a ratio. Only
                :class:`LearningRateCoupled` reads it.
        """

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""

    @property
    def needs_learning_rate(self) -> bool:
        """True if the coefficients depend on the learning rate."""
        return any(part.needs_learning_rate for part in self._parts)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Epochs where something begins or ends, sorted."""
        return tuple(sorted({breakpoint for part in self._parts for breakpoint in part.breakpoints}))

    def settings(self, epoch: float) -> Settings:
        """Settings of the optimizer and of averaged weights at an epoch: those of the stages that hold."""
        return functools.reduce(Settings.__or__, (part.settings(epoch) for part in self._parts), NO_SETTINGS)

    @property
    def has_settings(self) -> bool:
        """True if any stage has settings beside the coefficients."""
        return any(part.has_settings for part in self._parts)

    @property
    def _parts(self) -> Sequence[Schedule]:
        """Schedules that this one is made of."""
        return ()

    def _set(self, **fields: object) -> None:
        """Checked fields in the place of those given, once, in ``__post_init__``."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)


def as_schedule(value: object, what: str = "`schedule`") -> Schedule:
    """The value, if it is a schedule.

    Args:
        value: a schedule, or the config that OmegaConf has made of one.
        what: name of the value in messages.

    Raises:
        TypeError: it is something else.
    """
    schedule = unwrapped(value)
    if isinstance(schedule, Schedule):
        return schedule
    hint = " Is `_target_` missing, or was the config not instantiated?" if isinstance(value, Mapping) else ""
    valid = ", ".join(_KINDS)
    raise TypeError(
        f"{what} is a schedule, one of {valid} of harness.schedules; found {value!r} ({type(value).__name__}).{hint}"
    )


def check_interval(interval: object, what: str = "`interval`") -> Interval:
    """The value, if it is an interval.

    Raises:
        ValueError: it is neither ``epoch`` nor ``step``.
    """
    if interval not in get_args(Interval):
        raise ValueError(f"{what} is epoch or step, found {interval!r}.")
    return interval  # type: ignore[return-value]


def described(schedule: Schedule, interval: Interval) -> str:
    """Text by which a checkpoint knows a schedule and how it is followed.

    The interval stands where it was an argument of the schedule, so that checkpoints of then go on.
    """
    return repr(schedule) if interval == "epoch" else f"{repr(schedule)[:-1]}, interval={interval!r})"


def unreached(schedule: Schedule, num_epochs: int, interval: Interval = "epoch") -> list[float]:
    """Epochs at which a schedule does something that a training of ``num_epochs`` epochs does not come to.

    Args:
        schedule: the schedule.
        num_epochs: number of epochs of the training.
        interval: how often the training moves on.
    """
    # within the last epoch nothing moves any more, unless it does by steps
    last = num_epochs - 1 if interval == "epoch" else num_epochs
    return [epoch for epoch in schedule.breakpoints if epoch > last and epoch != num_epochs]


def read_schedules(values: object, what: str) -> tuple[Schedule, ...]:
    """A list of schedules, checked.

    Raises:
        TypeError, ValueError: what was found and what is valid.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{what}: `schedules` is a list of schedules, found {values!r} ({type(values).__name__}).")
    if not values:
        raise ValueError(f"{what}: `schedules` is empty; expected at least one. Constant({{}}) changes nothing.")
    return tuple(as_schedule(value, f"{what}: schedules[{position}]") for position, value in enumerate(values))
