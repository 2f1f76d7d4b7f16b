r"""Coefficients that change during a training: pure functions of the epoch, which nest.

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
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

from harness.support.checks import is_number
from harness.support.configs import unwrapped

__all__ = [
    "NO_SETTINGS",
    "Constant",
    "Cosine",
    "Exponential",
    "Interval",
    "Join",
    "LearningRateCoupled",
    "Linear",
    "PiecewiseConstant",
    "Ramp",
    "Scale",
    "Schedule",
    "Settings",
    "Stage",
    "Together",
    "as_schedule",
    "check_interval",
    "described",
    "unreached",
]

Coefficients = Mapping[str, Any]
"""Coefficients by component, or by component and atom type; a schedule that is made has numbers by flat name."""

Interval = Literal["epoch", "step"]
"""Interval of a training's moves along a schedule: the start of every epoch, or every step, with fractions of epochs.

It belongs to what follows a schedule, such as :meth:`harness.metrics.MetricsManager.follow`.
"""

_NO_SCHEDULES = ("NO_SETTINGS", "Interval", "Ramp", "Schedule", "Settings")

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Frozen(Mapping[Key, Value], Generic[Key, Value]):
    """Mapping that cannot be changed; its text, as its equality, does not depend on the order of its keys."""

    def __init__(self, content: Mapping[Key, Value]) -> None:
        self._content = dict(content)

    def __getitem__(self, key: Key) -> Value:
        return self._content[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(frozenset(self._content.items()))

    def __repr__(self) -> str:
        return repr(dict(sorted(self._content.items())))  # keys are all text or all numbers


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


@dataclass(frozen=True)
class Constant(Schedule):
    r"""The same coefficients at all times; without any, those that the loss was given.

    .. math:: c_k(e) = \text{coeffs}_k

    Args:
        coeffs: coefficients by component, or by component and atom type.

    Raises:
        TypeError, ValueError: a mistake in the coefficients, with its name and what is valid.

    Example:
        >>> Constant({"per_atom_energy_mse": 1, "forces_mse": {"H": 5, "O": 1}})(0)
        {'per_atom_energy_mse': 1.0, 'forces_mse_H': 5.0, 'forces_mse_O': 1.0}
        >>> Constant({})(0)
        {}

    As ``optax.constant_schedule`` (https://optax.readthedocs.io).
    """

    coeffs: Coefficients

    def __post_init__(self) -> None:
        self._set(coeffs=_coefficients(self.coeffs, "Constant: `coeffs`", may_be_empty=True))

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """The coefficients."""
        return dict(self.coeffs)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return tuple(self.coeffs)


@dataclass(frozen=True)
class Stage(Constant):
    r"""Constant coefficients with settings of the optimizer and of averaged weights that hold as long as they do.

    A part of a :class:`Join`, whose boundaries say when; alone, it holds all along.

    Args:
        coeffs: coefficients as in :class:`Constant`; empty for those that the loss was given.
        optimizer: settings of the optimizer in the place of its own. ``lr`` is then the learning rate, whatever the
            scheduler says: of a group of parameters with a factor, times that factor. Other settings, such as
            ``weight_decay`` and ``betas``, hold in the groups that have none of their own. None for none.
        average_decay: decay of the exponential moving average of the weights, at least 0 and below 1; 0 lets the
            average be the weights themselves. None for the callback's own.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or settings, with what is valid.

    Example:
        >>> second = Stage({"per_atom_energy_mse": 1000, "forces_mse": 100}, optimizer={"lr": 0.001})
        >>> two_stages = Join([Constant({}), second], boundaries=[75])
        >>> two_stages(75)
        {'per_atom_energy_mse': 1000.0, 'forces_mse': 100.0}
        >>> dict(two_stages.settings(74).optimizer), dict(two_stages.settings(75).optimizer)
        ({}, {'lr': 0.001})

    The second stage of ``mace_run_train`` (``--stage_two``, formerly ``--swa``): Batatia et al., NeurIPS 2022.
    """

    optimizer: Mapping[str, Any] | None = field(default_factory=dict)
    average_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average_decay is not None and (not is_number(self.average_decay) or not 0 <= self.average_decay < 1):
            raise ValueError(
                f"Stage: `average_decay` is at least 0 and below 1, or null for that of the callback, found "
                f"{self.average_decay!r}."
            )
        self._set(optimizer=_optimizer_settings(self.optimizer))

    def settings(self, epoch: float) -> Settings:
        """The settings of the stage."""
        return Settings(self.optimizer or {}, self.average_decay)

    @property
    def has_settings(self) -> bool:
        """True if the stage has settings beside the coefficients."""
        return bool(self.settings(0))


@dataclass(frozen=True)
class PiecewiseConstant(Schedule):
    r"""For each name the coefficient of the last milestone so far that names it.

    .. math:: c_k(e) = m_k(e'), \qquad e' = \max \{\text{milestones} \le e \text{ that name } k\}

    A component that a milestone does not name keeps its coefficient. Before the first milestone that names it, the
    loss's own coefficient holds.

    Args:
        milestones: ``{epoch: coefficients}``, in any order; epochs may be written as text, as in YAML.

    Raises:
        TypeError, ValueError: a mistake in the milestones, with the epoch and what is valid.

    Example:
        >>> schedule = PiecewiseConstant({0: {"forces_mse": 10, "stress_mse": 1}, 100: {"forces_mse": 1}})
        >>> schedule(99.5)
        {'forces_mse': 10.0, 'stress_mse': 1.0}
        >>> schedule(100)
        {'forces_mse': 1.0, 'stress_mse': 1.0}

    Written as the ``schedule`` of NequIP's ``LossCoefficientScheduler`` (https://nequip.readthedocs.io), which drops
    a component that a milestone does not name.
    """

    milestones: Mapping[Any, Coefficients]

    def __post_init__(self) -> None:
        what = "PiecewiseConstant: `milestones`"
        if not isinstance(self.milestones, Mapping) or not self.milestones:
            raise TypeError(
                f"{what} maps epochs to coefficients, such as {{0: {{forces_mse: 10}}}}, found {self.milestones!r}."
            )
        read: dict[float, Coefficients] = {}
        for key, coeffs in self.milestones.items():
            epoch = _epoch(_number_of(key), f"{what}: a milestone")
            if epoch in read:
                raise ValueError(f"{what}: epoch {epoch:g} stands there twice. Join the two into one.")
            read[epoch] = _coefficients(coeffs, f"{what}: epoch {epoch:g}")
        self._set(milestones=_Frozen(dict(sorted(read.items()))))

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients of the last milestones."""
        current: dict[str, float] = {}
        for milestone, coeffs in self.milestones.items():
            if milestone <= epoch:
                current.update(coeffs)
        return current

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return _union(self.milestones.values())

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The milestones."""
        return tuple(self.milestones)


@dataclass(frozen=True)
class Ramp(Schedule):
    """From some coefficients to others between two epochs; base of ramps, and of your own, which define the curve.

    Args:
        start: coefficients up to ``start_epoch``.
        end: coefficients from ``end_epoch`` on, of the same names.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.
    """

    start: Coefficients
    end: Coefficients
    start_epoch: float
    end_epoch: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        self._set(
            start=_coefficients(self.start, f"{name}: `start`"),
            end=_coefficients(self.end, f"{name}: `end`"),
            start_epoch=_epoch(self.start_epoch, f"{name}: `start_epoch`"),
            end_epoch=_epoch(self.end_epoch, f"{name}: `end_epoch`"),
        )
        _check_same_names(name, start=self.start, end=self.end)
        if not self.start_epoch < self.end_epoch:
            raise ValueError(
                f"{name}: `start_epoch` is before `end_epoch`, found {self.start_epoch:g} and {self.end_epoch:g}. For "
                f"a jump use PiecewiseConstant or Join."
            )

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients between the two ends, and exactly those at and beyond them."""
        if epoch <= self.start_epoch:
            return dict(self.start)
        if epoch >= self.end_epoch:
            return {name: self.end[name] for name in self.names}
        progress = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        between = {}
        for name, start in self.start.items():
            low, high = sorted((start, self.end[name]))
            between[name] = min(max(self.between(start, self.end[name], progress), low), high)  # rounding may lead out
        return between

    @abstractmethod
    def between(self, start: float, end: float, progress: float) -> float:
        """Coefficient at a progress between 0 and 1."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return tuple(self.start)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Start and end of the ramp."""
        return (self.start_epoch, self.end_epoch)


@dataclass(frozen=True)
class Linear(Ramp):
    r"""Along a straight line from some coefficients to others.

    .. math:: c_k(e) = (1 - t)\, \text{start}_k + t\, \text{end}_k, \qquad
        t = \frac{e - \text{start\_epoch}}{\text{end\_epoch} - \text{start\_epoch}} \text{ within } [0, 1]

    Before and after, the coefficients are exactly those of the start and of the end. A ramp from 0 has its component
    in the sum from the beginning.

    Args:
        start: coefficients up to ``start_epoch``.
        end: coefficients from ``end_epoch`` on, of the same names.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.

    Example:
        >>> Linear({"forces_mse": 0}, {"forces_mse": 10}, start_epoch=10, end_epoch=20)(12.5)
        {'forces_mse': 2.5}

    As ``optax.linear_schedule`` (https://optax.readthedocs.io).
    """

    def between(self, start: float, end: float, progress: float) -> float:
        """A point of the straight line."""
        return (1 - progress) * start + progress * end


@dataclass(frozen=True)
class Cosine(Ramp):
    r"""Along half a cosine from some coefficients to others: slowly at both ends.

    .. math:: c_k(e) = \text{end}_k + (\text{start}_k - \text{end}_k) \frac{1 + \cos(\pi t)}{2}, \qquad
        t = \frac{e - \text{start\_epoch}}{\text{end\_epoch} - \text{start\_epoch}} \text{ within } [0, 1]

    Args:
        start: coefficients up to ``start_epoch``.
        end: coefficients from ``end_epoch`` on, of the same names.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.

    Example:
        >>> Cosine({"forces_mse": 1}, {"forces_mse": 9}, start_epoch=0, end_epoch=10)(5)
        {'forces_mse': 5.0}

    The shape is that of Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """

    def between(self, start: float, end: float, progress: float) -> float:
        """A point of half a cosine."""
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Exponential(Ramp):
    r"""By the same factor in every epoch from some coefficients to others: a straight line of their logarithms.

    .. math:: c_k(e) = \text{start}_k^{1 - t}\; \text{end}_k^{t}, \qquad
        t = \frac{e - \text{start\_epoch}}{\text{end\_epoch} - \text{start\_epoch}} \text{ within } [0, 1]

    Args:
        start: coefficients up to ``start_epoch``, above 0.
        end: coefficients from ``end_epoch`` on, of the same names, above 0.
        start_epoch: where the ramp begins.
        end_epoch: where it ends.

    Raises:
        TypeError, ValueError: a mistake in the coefficients or epochs, with what is valid.

    Example:
        >>> Exponential({"forces_mse": 1000}, {"forces_mse": 10}, start_epoch=0, end_epoch=10)(5)
        {'forces_mse': 100.0}

    As ``optax.exponential_decay`` (https://optax.readthedocs.io), with the end in the place of a rate.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, coeffs in (("start", self.start), ("end", self.end)):
            zeros = [name for name, value in coeffs.items() if value == 0]
            if zeros:
                raise ValueError(
                    f"Exponential: `{what}` has 0 for {', '.join(zeros)}, where no factor leads to. Use Linear for a "
                    f"ramp from or to 0."
                )

    def between(self, start: float, end: float, progress: float) -> float:
        """A geometric mean of the two ends."""
        return float(start ** (1 - progress) * end**progress)


@dataclass(frozen=True)
class Join(Schedule):
    r"""One schedule after the other; at a boundary the later one holds.

    .. math:: c(e) = s_i(e), \qquad b_{i-1} \le e < b_i

    Each is called with the epoch of the training, not with that since its own beginning as in
    ``optax.join_schedules``: a ``Linear`` that follows a boundary of 50 is given a ``start_epoch`` of 50 or later.
    What the schedule that holds does not name has the loss's own coefficient, whatever came before.

    Args:
        schedules: in the order of time.
        boundaries: epochs between them, one less than there are schedules, rising.

    Raises:
        TypeError, ValueError: something that is no schedule, or boundaries that do not fit.

    Example:
        >>> two_stages = Join([Constant({}), Constant({"per_atom_energy_mse": 1000})], boundaries=[75])
        >>> two_stages(74), two_stages(75)
        ({}, {'per_atom_energy_mse': 1000.0})

    As ``optax.join_schedules`` (https://optax.readthedocs.io). Two stages, the second with more weight on the energy,
    are those of MACE: Batatia et al., NeurIPS 2022.
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[float]

    def __post_init__(self) -> None:
        if not isinstance(self.boundaries, Sequence) or isinstance(self.boundaries, str):
            raise TypeError(f"Join: `boundaries` is a list of epochs, found {self.boundaries!r}.")
        self._set(
            schedules=_schedules(self.schedules, "Join"),
            boundaries=tuple(_epoch(epoch, f"Join: `boundaries[{i}]`") for i, epoch in enumerate(self.boundaries)),
        )
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ValueError(
                f"Join: {len(self.schedules)} schedules have {len(self.schedules) - 1} boundaries between them, found "
                f"{len(self.boundaries)}: {list(self.boundaries)}."
            )
        if any(later <= earlier for earlier, later in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"Join: `boundaries` rise strictly, found {list(self.boundaries)}.")

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients of the schedule that holds."""
        return self._of(epoch)(epoch, learning_rate)

    def settings(self, epoch: float) -> Settings:
        """Settings of the schedule that holds."""
        return self._of(epoch).settings(epoch)

    def _of(self, epoch: float) -> Schedule:
        return self.schedules[bisect_right(self.boundaries, epoch)]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return _union(schedule.names for schedule in self.schedules)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The boundaries, and the breakpoints of every schedule while it holds."""
        begins, ends = (-math.inf, *self.boundaries), (*self.boundaries, math.inf)
        inner = {
            breakpoint
            for schedule, begin, end in zip(self.schedules, begins, ends, strict=True)
            for breakpoint in schedule.breakpoints
            if begin <= breakpoint < end
        }
        return tuple(sorted({*self.boundaries, *inner}))

    @property
    def _parts(self) -> Sequence[Schedule]:
        return self.schedules


@dataclass(frozen=True)
class Scale(Schedule):
    r"""A schedule times the factors that another one gives for some of its names.

    .. math:: c_k(e) = s_k(e)\, f_k(e)

    with a factor of 1 for what ``by`` does not name. Where ``schedule`` does not set a name at an epoch, there is
    nothing to be multiplied: it is absent, and the loss's own coefficient holds unchanged.

    Args:
        schedule: gives coefficients.
        by: gives factors, at least 0, for some of the same names.

    Raises:
        TypeError: one of the two is no schedule.
        ValueError: ``by`` names what ``schedule`` never sets; the valid names are listed.

    Example:
        >>> stages = PiecewiseConstant({0: {"forces_mse": 10}, 50: {"forces_mse": 4}})
        >>> warm_up = Linear({"forces_mse": 0}, {"forces_mse": 1}, start_epoch=0, end_epoch=10)
        >>> schedule = Scale(stages, by=warm_up)
        >>> schedule(5), schedule(20), schedule(50)
        ({'forces_mse': 5.0}, {'forces_mse': 10.0}, {'forces_mse': 4.0})

    As ``optax.scale_by_schedule`` (https://optax.readthedocs.io), which multiplies updates by a schedule.
    """

    schedule: Schedule
    by: Schedule

    def __post_init__(self) -> None:
        self._set(
            schedule=as_schedule(self.schedule, "Scale: `schedule`"),
            by=as_schedule(self.by, "Scale: `by`"),
        )
        unknown = [name for name in self.by.names if name not in self.schedule.names]
        if unknown:
            raise ValueError(
                f"Scale: `by` names {', '.join(unknown)}, which `schedule` never sets. It sets "
                f"{', '.join(self.schedule.names) or 'nothing'}. A factor multiplies what `schedule` gives: name the "
                f"coefficient there too."
            )

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients times factors."""
        factors = self.by(epoch, learning_rate)
        coeffs = self.schedule(epoch, learning_rate)
        return {name: coeff * factors[name] if name in factors else coeff for name, coeff in coeffs.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return self.schedule.names

    @property
    def _parts(self) -> Sequence[Schedule]:
        return (self.schedule, self.by)


@dataclass(frozen=True)
class Together(Schedule):
    r"""Several schedules at the same time, each of other names.

    .. math:: c_k(e) = s_{i,k}(e), \qquad s_i \text{ the one schedule that names } k

    Args:
        schedules: no two of them set the same name.

    Raises:
        TypeError: something that is no schedule.
        ValueError: two schedules set the same name.

    Example:
        >>> energy = Linear({"per_atom_energy_mse": 0}, {"per_atom_energy_mse": 8}, start_epoch=0, end_epoch=10)
        >>> forces = Cosine({"forces_mse": 8}, {"forces_mse": 0}, start_epoch=0, end_epoch=10)
        >>> Together([energy, forces])(5)
        {'per_atom_energy_mse': 4.0, 'forces_mse': 4.0}

    As ``optax.partition`` (https://optax.readthedocs.io), which gives each part of the parameters a transformation of
    its own.
    """

    schedules: Sequence[Schedule]

    def __post_init__(self) -> None:
        self._set(schedules=_schedules(self.schedules, "Together"))
        owner: dict[str, int] = {}
        for position, schedule in enumerate(self.schedules):
            for name in schedule.names:
                if name in owner:
                    raise ValueError(
                        f"Together: schedules[{owner[name]}] and schedules[{position}] both set {name}. Each name is "
                        f"set by one of them; for one after the other use Join, for a product Scale."
                    )
                owner[name] = position

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients of all of them."""
        together: dict[str, float] = {}
        for schedule in self.schedules:
            together |= schedule(epoch, learning_rate)
        return together

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return _union(schedule.names for schedule in self.schedules)

    @property
    def _parts(self) -> Sequence[Schedule]:
        return self.schedules


@dataclass(frozen=True)
class LearningRateCoupled(Schedule):
    r"""From some coefficients to others as the learning rate falls.

    .. math:: c_k = \text{limit}_k + (\text{start}_k - \text{limit}_k) \frac{\mathrm{lr}(e)}{\mathrm{lr}_0}

    which is ``start`` at the learning rate :math:`\mathrm{lr}_0` that the optimizer was given and would be ``limit`` at
    one of 0. A learning rate above :math:`\mathrm{lr}_0` leads beyond ``start``; the result is never below 0.

    Args:
        start: coefficients at the learning rate that the optimizer was given.
        limit: coefficients that are approached as the learning rate falls to 0, of the same names.

    Raises:
        TypeError, ValueError: a mistake in the coefficients; when called, no learning rate.

    Example:
        >>> LearningRateCoupled(start={"forces_mse": 1000}, limit={"forces_mse": 1})(10, learning_rate=0.5)
        {'forces_mse': 500.5}

    The prefactors of DeePMD-kit: Wang et al., Comput. Phys. Commun. 228, 178 (2018).
    """

    start: Coefficients
    limit: Coefficients

    def __post_init__(self) -> None:
        self._set(
            start=_coefficients(self.start, "LearningRateCoupled: `start`"),
            limit=_coefficients(self.limit, "LearningRateCoupled: `limit`"),
        )
        _check_same_names("LearningRateCoupled", start=self.start, limit=self.limit)

    def __call__(self, epoch: float, learning_rate: float | None = None) -> dict[str, float]:
        """Coefficients at a learning rate.

        Raises:
            ValueError: the learning rate is not given, not finite or below 0.
        """
        if learning_rate is None or not 0 <= learning_rate < math.inf:
            raise ValueError(
                f"LearningRateCoupled needs the learning rate, as a part of that which the optimizer was given: a "
                f"finite number of at least 0; found {learning_rate!r}."
            )
        # written so that a ratio of 1 gives `start` to the last bit
        return {
            name: max(start * learning_rate + self.limit[name] * (1 - learning_rate), 0.0)
            for name, start in self.start.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is ever set, in order."""
        return tuple(self.start)

    @property
    def needs_learning_rate(self) -> bool:
        """Always."""
        return True


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
    valid = ", ".join(name for name in __all__ if name[0].isupper() and name not in _NO_SCHEDULES)
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


def _schedules(values: object, what: str) -> tuple[Schedule, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{what}: `schedules` is a list of schedules, found {values!r} ({type(values).__name__}).")
    if not values:
        raise ValueError(f"{what}: `schedules` is empty; expected at least one. Constant({{}}) changes nothing.")
    return tuple(as_schedule(value, f"{what}: schedules[{position}]") for position, value in enumerate(values))


def _coefficients(coeffs: object, what: str, may_be_empty: bool = False) -> _Frozen[str, float]:
    """Coefficients by flat name, checked.

    Raises:
        TypeError, ValueError: the name, what was found and what is valid.
    """
    if not isinstance(coeffs, Mapping):
        raise TypeError(f"{what} maps components to coefficients, found {coeffs!r} ({type(coeffs).__name__}).")
    if not coeffs and not may_be_empty:
        raise ValueError(f"{what} names no component. Constant({{}}) is what changes nothing.")
    flat: dict[str, float] = {}
    for component, given in coeffs.items():
        _check_key(component, f"{what}: the name of a component")
        if not isinstance(given, Mapping):
            entries = {component: given}
        else:
            if not given:
                raise ValueError(f"{what}: {component} maps atom types to weights, found none.")
            for type_name in given:
                _check_key(type_name, f"{what}: the name of an atom type of {component}")
            entries = {f"{component}_{type_name}": weight for type_name, weight in given.items()}
        for name, value in entries.items():
            if name in flat:
                raise ValueError(f"{what} sets {name} twice. Per-type weights go by {{component}}_{{type}}.")
            flat[name] = _coefficient(value, f"{what}: {name}")
    return _Frozen(flat)


def _optimizer_settings(settings: object) -> _Frozen[str, Any]:
    """Settings of an optimizer: numbers, booleans, or tuples of numbers by name, checked.

    Raises:
        TypeError, ValueError: the name, what was found and what is valid.
    """
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"Stage: `optimizer` maps names of settings to values, such as {{lr: 1e-3}}, found {settings!r}."
        )
    read: dict[str, Any] = {}
    for name, value in settings.items():
        _check_key(name, "Stage: `optimizer`: the name of a setting")
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not all(isinstance(each, bool) or is_number(each) for each in (value if is_list else [value])):
            raise TypeError(
                f"Stage: `optimizer`: {name} is a number, true or false, or a list of numbers, found {value!r} "
                f"({type(value).__name__})."
            )
        if name == "lr" and (isinstance(value, bool) or is_list or not 0 <= float(value) < math.inf):
            raise ValueError(f"Stage: `optimizer`: lr is a finite number of at least 0, found {value!r}.")
        read[name] = tuple(value) if is_list else value
    return _Frozen(read)


def _check_key(key: object, what: str) -> None:
    if not isinstance(key, str) or not key:
        hint = " (YAML reads an unquoted No, Y or N as a boolean: quote it)" if isinstance(key, bool) else ""
        raise TypeError(f"{what} is text, found {key!r}{hint}.")


def _coefficient(value: object, what: str) -> float:
    if value is None:
        raise TypeError(f"{what} is null; expected a number. 0 keeps the component in the sum, without weight.")
    if not is_number(value):
        raise TypeError(f"{what} is a number, found {value!r} ({type(value).__name__}).")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what} must be finite and not negative, found {value}.")
    return abs(float(value))  # -0.0 is 0


def _epoch(value: object, what: str) -> float:
    if not is_number(value):
        raise TypeError(f"{what} is a number of epochs, found {value!r} ({type(value).__name__}).")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what} is a finite number of epochs, at least 0, found {value}.")
    return abs(float(value))  # -0.0 is 0


def _number_of(key: object) -> object:
    """A number for text that is one, as keys in YAML may be; everything else as it is."""
    if isinstance(key, str):
        try:
            return float(key)
        except ValueError:
            return key
    return key


def _check_same_names(what: str, **two: Coefficients) -> None:
    (one, first), (other, second) = two.items()
    differ = [name for name in _union((first, second)) if (name in first) != (name in second)]
    if differ:
        raise ValueError(
            f"{what}: `{one}` and `{other}` must name the same components; {', '.join(differ)} is in one of them only. "
            f"`{one}`: {', '.join(first)}; `{other}`: {', '.join(second)}."
        )


def _union(several: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All names in order, without repetitions."""
    return tuple(dict.fromkeys(name for names in several for name in names))
