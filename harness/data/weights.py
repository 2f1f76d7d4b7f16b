"""Weights of the frames: read from the files, and by the value of a key such as ``config_type``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from harness.data.batch_fields import WeightField
from harness.data.facts import WEIGHTS
from harness.data.frames import FrameSet
from harness.data.reading import Frame, information
from harness.support.checks import is_number
from harness.support.configs import unwrapped
from harness.support.text import did_you_mean

__all__ = ["WEIGHTS", "WeightKeys", "Weighting", "refuse_weightless", "value_text", "weight_fields"]


@dataclass(frozen=True)
class WeightKeys:
    """Names under which a file keeps weights; None for one that is not read. The defaults are those of MACE.

    Attributes:
        weight: of everything in the frame.
        energy_weight: of its energy.
        forces_weight: of its forces.
        stress_weight: of its stress.
    """

    weight: str | None = "config_weight"
    energy_weight: str | None = "config_energy_weight"
    forces_weight: str | None = "config_forces_weight"
    stress_weight: str | None = "config_stress_weight"

    def changed(self) -> dict[str, str]:
        """Weights whose key is not the default, and the key."""
        keys = {
            each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default
        }
        return {name: key for name, key in keys.items() if key is not None}


@dataclass(frozen=True)
class Weighting:
    r"""Weights of frames: of the files, times those of the values of keys.

    A weight w counts as w frames do, in sums and counts: :math:`\sum_g w_g \varphi_g / \sum_g w_g`. It is a property of
    the frame, the same in training, validation and test. With 0 a frame trains nothing, and is measured in its group.

    Attributes:
        keys: names of the weights in the files.
        factors: ``{key: {value: factor}}``, of ``weight``; several keys multiply.
    """

    keys: WeightKeys = WeightKeys()
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, keys: Mapping[str, Any] | None, factors: Any) -> Weighting:
        """Weights of ``data.keys`` and ``data.weights``.

        Args:
            keys: names of :data:`WEIGHTS` alone; None for the defaults.
            factors: as ``data.weights`` has them.

        Raises:
            TypeError: no mappings of keys to mappings of values to numbers.
            ValueError: a factor that is negative or not finite.
        """
        for name, key in (keys or {}).items():
            if key is not None and (not isinstance(key, str) or not key):
                raise TypeError(f"data.keys.{name} is the name of a weight in the files, or null, found {key!r}")
        return cls(WeightKeys(**dict(keys or {})), _factors(factors))

    def of(self, frame: Frame) -> dict[str, float]:
        """Weights of a frame by name; those that are there.

        Raises:
            ValueError: no number, or one that is negative or not finite.
        """
        found = {}
        for name in WEIGHTS:
            key = getattr(self.keys, name)
            value = None if key is None else information(frame.atoms, key)
            if value is not None:
                found[name] = _weight(value, f"{frame.location}: the {name.replace('_', ' ')} {key!r}")
        for key, factor_of in self.factors.items():
            factor = factor_of.get(value_text(information(frame.atoms, key)) or "")
            if factor is not None:
                found["weight"] = found.get("weight", 1.0) * factor
        return found

    def refuse_unknown(
        self, keys: Collection[str], values: Mapping[str, Collection[str]], available: Collection[str]
    ) -> None:
        """Refuse names that no frame of the data has.

        Args:
            keys: of those that are asked for, those that any frame has.
            values: of each key of the factors in the frames.
            available: everything that the frames have, for the message.

        Raises:
            KeyError: a key or value that no frame has.
        """
        names = sorted(available)
        for name, key in self.keys.changed().items():
            if key not in keys:
                raise KeyError(
                    f"data.keys.{name}={key}: no frame has it. {did_you_mean(key, names)}The frames have {names}"
                )
        for key, factor_of in self.factors.items():
            there = sorted(values.get(key, ()))
            if not there:
                raise KeyError(
                    f"data.weights.{key}: no frame has {key!r}. {did_you_mean(key, names)}The frames have {names}"
                )
            for value in factor_of:
                if value not in there:
                    raise KeyError(
                        f"data.weights.{key}.{value}: no frame has {key}={value}. {did_you_mean(value, there)}Values "
                        f"of {key} are {there[:20]}"
                    )

    def text(self) -> str:
        """Names and factors where they are not the defaults, in words; empty otherwise."""
        defaults = WeightKeys()
        named = [(name, getattr(self.keys, name)) for name in WEIGHTS]
        parts = [f"{name} from {key or 'nothing'}" for name, key in named if key != getattr(defaults, name)]
        for key, factor_of in sorted(self.factors.items()):
            parts.append(f"{key} {', '.join(f'{value}: {factor:g}' for value, factor in sorted(factor_of.items()))}")
        return "; ".join(parts)

    def plain(self) -> dict[str, Any]:
        """The arguments of :meth:`from_config` as plain data."""
        keys = {name: getattr(self.keys, name) for name in WEIGHTS}
        return {"keys": keys, "factors": {key: dict(of_key) for key, of_key in self.factors.items()}}


def weight_fields(weights: Collection[str]) -> tuple[WeightField, ...]:
    """Fields of a batch for the weights that any frame has, in the order of :data:`WEIGHTS`."""
    return tuple(WeightField(name) for name in WEIGHTS if name in weights)


def refuse_weightless(frames: FrameSet) -> None:
    """Refuse a training set whose frames all have the weight 0.

    Raises:
        ValueError: with what helps.
    """
    if len(frames) and not frames.column("weight").any():
        raise ValueError(
            f"all {len(frames)} training frames have the weight 0, so that nothing is trained; expected a weight above "
            f"0 for some of them. Correct data.weights, or the key of the weights (data.keys.weight)"
        )


def value_text(value: Any) -> str | None:
    """Value of a key as text, by which frames are told apart; None without one."""
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else value.tolist()
    return None if value is None else str(value)


def _weight(value: Any, what: str) -> float:
    try:
        numbers = np.array(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be a number, found {value!r}") from None
    if numbers.size != 1:
        raise ValueError(f"{what} must be one number, found {numbers.size}")
    weight = float(numbers[0])
    if not 0 <= weight < math.inf:
        raise ValueError(f"{what} must be finite and at least 0, found {weight:g}; correct or remove it")
    return weight


def _factors(given: Any) -> dict[str, dict[str, float]]:
    given = unwrapped(given)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"data.weights is a mapping such as {{config_type: {{Vacancy: 5}}}}, found {given!r}")
    found: dict[str, dict[str, float]] = {}
    for key, factor_of in given.items():
        if not isinstance(factor_of, Mapping):
            raise TypeError(
                f"data.weights.{key} is a mapping of the values of {key} to weights, such as {{Vacancy: 5}}, found "
                f"{factor_of!r}"
            )
        for value, factor in factor_of.items():
            if not is_number(factor):
                raise TypeError(f"data.weights.{key}.{value} is a number, found {factor!r}")
            if not 0 <= factor < math.inf:
                raise ValueError(f"data.weights.{key}.{value} must be finite and at least 0, found {factor}")
        found[str(key)] = {str(value): float(factor) for value, factor in factor_of.items()}
    return found
