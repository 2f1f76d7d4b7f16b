"""Values that optimizers and learning-rate schedulers can take, for those that a config gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor

from harness.support.arguments import Above, AtLeast, AtMost, Below, Positive, misfits
from harness.support.checks import is_number
from harness.support.configs import unwrapped

__all__ = ["wrong_settings"]

_NotNegative = Annotated[float, AtLeast(0)]
_Turns = Annotated[float, AtLeast(1)]  # whole numbers, which torch takes as floats too
_Part = Annotated[float, Above(0), AtMost(1)]
_OF_TORCH: dict[str, Any] = {
    "lr": _NotNegative | Tensor,  # 0 looks at a model without changing it
    "weight_decay": _NotNegative,
    "eps": _NotNegative | Tensor,
    "momentum": _NotNegative,
    "betas": Sequence[Annotated[float, AtLeast(0), Below(1)]] | Tensor,
    "T_max": _Turns,
    "T_0": _Turns,
    "step_size": _Turns,
    "gamma": Positive,
    "factor": _Part,
    "start_factor": _Part,
    "patience": _NotNegative,
    "cooldown": _NotNegative,
    "threshold": _NotNegative,
    "eta_min": _NotNegative,
    "min_lr": _NotNegative | Sequence[_NotNegative],
}
"""Arguments of torch's optimizers and schedulers by name, where its own checks leave out what fails later."""


def wrong_settings(target: Callable[..., Any], options: Mapping[str, Any], section: str) -> list[str]:
    """A sentence for each option that an optimizer or scheduler cannot take, with its setting.

    Those of torch and of this package are held to what they mean; of others only texts, lists and the like in the place
    of numbers are found, since annotations of whole numbers mean floats often.

    Args:
        target: class or function that is called with the options.
        options: by name.
        section: of the config that they are in.
    """
    plain = {name: unwrapped(value) for name, value in options.items()}
    package = str(getattr(target, "__module__", "")).partition(".")[0]
    known = _OF_TORCH if package == "torch" else {}
    if package != "harness":
        plain = {name: value for name, value in plain.items() if name in known or not is_number(value)}
    return misfits(target, plain, section, known)
