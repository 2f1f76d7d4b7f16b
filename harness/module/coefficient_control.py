"""Coefficient control: one schedule, learnt weighting or callback moves the coefficients of a loss, never two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["NORMALISING", "controllers_of", "loss_of", "refuse_other_controllers", "refuse_several"]

# callbacks of NequIP have no attribute `controls_coefficients`
_OF_NEQUIP = ("SoftAdapt", "LossCoefficientScheduler", "LinearLossCoefficientScheduler")
NORMALISING = ("NequIP's SoftAdapt", "NequIP's LinearLossCoefficientScheduler")
"""Controllers whose coefficients do not have the sum of those that the loss was given."""


def controllers_of(loss: Any, callbacks: Sequence[Callback]) -> list[str]:
    """Names of all controllers of a loss's coefficients: its schedule, its weighting, and callbacks.

    Callbacks that control coefficients have an attribute ``controls_coefficients = True``. All instances of a class
    with ``counts_once = True`` count as one, such as the stages of a ramp.
    """
    found = [callback for callback in callbacks if getattr(callback, "controls_coefficients", False)]
    several = [type(callback).__name__ for callback in found if getattr(callback, "counts_once", False)]
    names = [type(callback).__name__ for callback in found if not getattr(callback, "counts_once", False)]
    names += dict.fromkeys(several)
    kinds = dict.fromkeys(map(type, callbacks))
    names += [f"NequIP's {kind.__name__}" for kind in kinds if _is_of_nequip(kind) and kind.__name__ in _OF_NEQUIP]
    if getattr(loss, "schedule", None) is not None:
        names.append(f"the schedule {type(loss.schedule).__name__}")
    if getattr(loss, "weighting", None) is not None:
        names.append(type(loss.weighting).__name__)
    return names


def _is_of_nequip(kind: type) -> bool:
    return kind.__module__.startswith("nequip.")


def loss_of(pl_module: LightningModule) -> Any:
    """The manager of a module's loss.

    Raises:
        TypeError: the module has none.
    """
    loss = getattr(pl_module, "loss", None)
    if not callable(getattr(loss, "set_coeffs", None)) or not hasattr(loss, "entries"):
        raise TypeError(
            f"{type(pl_module).__name__}.loss is no manager of components with `set_coeffs` and `entries`, found "
            f"{type(loss).__name__}. Use harness.ForceFieldModule, or give your module a `loss` that is a "
            f"harness.MetricsManager."
        )
    return loss


def refuse_several(names: list[str]) -> None:
    """Refuse more than one controller.

    Raises:
        ValueError: with the names of all.
    """
    if len(names) > 1:
        raise ValueError(
            f"The coefficients of the loss are moved by {' and by '.join(names)}; only one of them can. For several "
            f"stages in one schedule use Join, or Together, of harness.schedules."
        )


def refuse_other_controllers(callback: Callback, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a callback that controls the coefficients of a module's loss beside another controller.

    Raises:
        TypeError: the module has no loss with coefficients.
        ValueError: with the names of all.
    """
    callbacks = [callback, *(other for other in trainer.callbacks if other is not callback)]  # type: ignore[attr-defined]
    refuse_several(controllers_of(loss_of(pl_module), callbacks))
