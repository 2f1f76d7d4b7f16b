"""States of managers and of learnt coefficients in a checkpoint, and checkpoints that were made with other ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.metrics import MetricsManager

__all__ = ["adopt_managers", "adopt_weighting", "managers_by_key"]

_EXTRA_STATE = "_extra_state"
_MANAGERS = ("loss.", "train_metrics.", "val_metrics.", "test_metrics.")
_WEIGHTING = "loss.weighting."


def managers_by_key(module: nn.Module) -> dict[str, MetricsManager]:
    """All managers of a module by the key of their state in a checkpoint."""
    return {f"{name}.{_EXTRA_STATE}": part for name, part in module.named_modules() if isinstance(part, MetricsManager)}


def adopt_managers(module: nn.Module, states: dict[str, Any]) -> None:
    """Make the managers' states of a checkpoint those of a module: drop other ones, and let missing ones start anew.

    Args:
        module: which is to load them.
        states: by key, changed in place.
    """
    managers = managers_by_key(module)
    for key in [key for key in states if key.startswith(_MANAGERS) and key.endswith(_EXTRA_STATE)]:
        if key not in managers:
            del states[key]
    for key, manager in managers.items():
        states.setdefault(key, manager.get_extra_state())


def adopt_weighting(weighting: Any, states: dict[str, Any], trains: bool) -> None:
    """Let a checkpoint be tested with another adaptive weighting than it was trained with.

    Args:
        weighting: of the loss that is to load it, or None.
        states: by key, changed in place.
        trains: whether a training continues from it.

    Raises:
        ValueError: a training is to go on from it, whose optimizer would have other parameters.
    """
    own: dict[str, Any] = {}
    if isinstance(weighting, nn.Module):
        own = weighting.state_dict(prefix=_WEIGHTING)
    found = [key for key in states if key.startswith(_WEIGHTING)]
    if not states or set(own) == set(found):
        return
    if trains:
        raise ValueError(
            f"The checkpoint has {', '.join(found) or 'no learnt coefficients'}, this training "
            f"{', '.join(own) or 'no learnt coefficients'}: its optimizer cannot go on. Continue with the same "
            f"adaptive weighting, or start anew."
        )
    for key in found:
        del states[key]
    states.update(own)
