"""Learning rates that torch has no scheduler of: warm-up, stable phase and decay; and a warm-up of any scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from harness.schedules import Interval, check_interval
from harness.support.arguments import Above, AtLeast, AtMost, Below, Count, OneOf
from harness.support.checks import is_number, is_whole_number

__all__ = ["WarmUp", "stable_then_decay"]

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


@dataclass(frozen=True)
class WarmUp:
    r"""Factor of the learning rate at the beginning of a training, which rises along a straight line to 1.

    .. math:: f(t) = s + (1 - s)\, \min(1, t / n)

    of the steps or complete epochs :math:`t` since the training began. It multiplies what the scheduler says, which
    takes its turns meanwhile. It is a function of the position alone: there is no state.

    Args:
        length: :math:`n` steps or epochs; 0 for no warm-up.
        interval: ``step`` or ``epoch``, of the length.
        start: :math:`s`, above 0 and at most 1.

    Raises:
        ValueError: a number out of range, or another interval.

    The factor is that of ``torch.optim.lr_scheduler.LinearLR``, which moves at the scheduler's interval only.
    """

    length: int = 0
    interval: Interval = "step"
    start: float = 0.01

    def __post_init__(self) -> None:
        if not is_whole_number(self.length) or self.length < 0:
            raise ValueError(
                f"lr_scheduler.warm_up.length is a whole number of steps or epochs, 0 for no warm-up, found "
                f"{self.length!r}."
            )
        check_interval(self.interval, "lr_scheduler.warm_up.interval")
        if not is_number(self.start) or not 0 < self.start <= 1:
            raise ValueError(
                f"lr_scheduler.warm_up.start is a part of the learning rate, above 0 and at most 1, found "
                f"{self.start!r}."
            )

    @classmethod
    def of(cls, section: object) -> WarmUp | None:
        """Warm-up of the section ``warm_up`` of a scheduler; None without one, or of a length of 0.

        Raises:
            ValueError: it is no mapping, has unknown keys, or numbers out of range.
        """
        if section is None:
            return None
        valid = "length, interval, start"
        if not isinstance(section, Mapping):
            raise ValueError(f"lr_scheduler.warm_up is a mapping of {valid}, found {section!r}.")
        unknown = [str(key) for key in section if key not in ("length", "interval", "start")]
        if unknown:
            raise ValueError(f"lr_scheduler.warm_up has no {', '.join(unknown)}. Valid names: {valid}.")
        made = cls(**{str(key): value for key, value in section.items()})
        return made if made.length else None

    def factor(self, epoch: int, step: int) -> float:
        """Factor at an epoch and a step of the optimizer, both counted from 0."""
        done = step if self.interval == "step" else epoch
        return self.start + (1 - self.start) * min(1.0, done / self.length)


def stable_then_decay(
    optimizer: Optimizer,
    length: Count,
    decay: Annotated[float, Above(0), AtMost(1)] = 0.2,
    end: Annotated[float, AtLeast(0), Below(1)] = 0.0,
    shape: Annotated[str, OneOf(*_SHAPES)] = "linear",
) -> LambdaLR:
    r"""Learning rate that stays as it is, and falls in the last part of the training.

    .. math:: \frac{\mathrm{lr}(t)}{\mathrm{lr}_0} = \begin{cases} 1 & t < (1 - d)\, T \\
              e + (1 - e)\, g\Big(\frac{t - (1 - d) T}{d\, T}\Big) & \text{else} \end{cases}

    with :math:`g(p) = 1 - p` (``linear``), :math:`(1 + \cos \pi p) / 2` (``cosine``) or :math:`1 - \sqrt p`
    (``sqrt``). With a :class:`WarmUp` in front of it, it is the schedule *warm-up, stable, decay* (WSD).

    Args:
        optimizer: whose learning rates are moved.
        length: :math:`T`, turns of the whole training; ``horizon`` in a config.
        decay: :math:`d`, the part of the training in which the rate falls, above 0 and at most 1.
        end: :math:`e`, factor at the end, at least 0 and below 1.
        shape: ``linear``, ``cosine`` or ``sqrt``.

    Raises:
        ValueError: a number out of range, or an unknown shape.

    Reference:
        S. Hu et al., "MiniCPM: Unveiling the potential of small language models with scalable training strategies",
        COLM 2024; A. Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations",
        NeurIPS 2024 (the shape ``sqrt``).
    """
    if not is_whole_number(length) or length < 1:
        raise ValueError(f"`length` is the number of turns of the training, or horizon, found {length!r}.")
    for name, value, is_valid in (("decay", decay, 0 < decay <= 1), ("end", end, 0 <= end < 1)):
        if not is_valid:
            limits = "above 0 and at most 1" if name == "decay" else "at least 0 and below 1"
            raise ValueError(f"`{name}` is {limits}, found {value!r}.")
    if shape not in _SHAPES:
        raise ValueError(f"`shape` is one of {', '.join(_SHAPES)}, found {shape!r}.")
    curve, first = _SHAPES[shape], (1 - decay) * length

    def factor(turn: int) -> float:
        progress = min(max((turn - first) / (length - first), 0.0), 1.0)
        return end + (1 - end) * curve(progress) if progress else 1.0

    return LambdaLR(optimizer, factor)
