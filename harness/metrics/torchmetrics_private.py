"""All of torchmetrics that is not documented and that this package uses, in one place.

``tests/metrics/test_torchmetrics_private.py`` fails if a version of torchmetrics no longer has one of these names, or
uses it for something else; ``pyproject.toml`` bounds the version accordingly.

* ``Metric._defaults``: initial value of each state by its name, as ``add_state`` was given it.
* ``Metric._reductions``: reduction over ranks of each state by its name; the functions ``dim_zero_*`` for the words
  ``sum``, ``mean``, ``max``, ``min`` and ``cat``.
* ``Metric._update_count``: number of updates since the last reset; metrics warn if they compute at 0.
* ``type(metric).update`` and ``type(metric).compute``: the functions of the class. Those of the instance are wrapped:
  ``update`` switches gradients off and counts, ``compute`` synchronises and caches.
* ``CompositionalMetric``: a sum or ratio of metrics.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

__all__ = [
    "REDUCTIONS",
    "compute_of_class",
    "concatenate",
    "default_states",
    "is_composition",
    "reductions",
    "set_default_state",
    "set_num_updates",
    "update_of_class",
]

REDUCTIONS: dict[Any, Literal["sum", "mean", "max", "min"]] = {
    dim_zero_sum: "sum",
    dim_zero_mean: "mean",
    dim_zero_max: "max",
    dim_zero_min: "min",
}
"""Names of the reductions that a row can carry out, by torchmetrics' function."""
concatenate = dim_zero_cat
"""The reduction of a list of samples."""


def default_states(metric: Metric) -> dict[str, Tensor | list[Any]]:
    """Initial value of each state, by its name: a tensor, or an empty list."""
    return metric._defaults


def set_default_state(metric: Metric, name: str, value: Tensor) -> None:
    """Replace the initial value of a state; it holds from the next ``reset`` on."""
    metric._defaults[name] = value


def reductions(metric: Metric) -> dict[str, Any]:
    """Reduction over ranks of each state, by its name: a function, or None for a state that is only gathered."""
    return metric._reductions


def set_num_updates(metric: Metric, number: int) -> None:
    """Set the number of updates, for states that were not made by ``update``."""
    metric._update_count = number


def update_of_class(metric: Metric, *inputs: Any) -> None:
    """Call ``update`` of the class, through which gradients flow."""
    getattr(type(metric), "update")(metric, *inputs)  # noqa: B009 mypy takes the class attribute for a string


def compute_of_class(metric: Metric) -> Any:
    """Call ``compute`` of the class, which neither synchronises nor caches."""
    return getattr(type(metric), "compute")(metric)  # noqa: B009 mypy takes the class attribute for a string


def is_composition(metric: Metric) -> bool:
    """True for a sum or ratio of metrics, such as ``a + b``."""
    return isinstance(metric, CompositionalMetric)
