"""Control of a loss's coefficients by one part at a time: a later one would undo the other silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["controllers_of", "loss_of", "refuse_other_controllers", "refuse_several"]

# they do not say so themselves
_OF_NEQUIP = ("SoftAdapt", "LossCoefficientScheduler", "LinearLossCoefficientScheduler")


def controllers_of(loss: Any, callbacks: Sequence[Callback]) -> list[str]:
    """Names of all that moves the coefficients of a loss: its schedule, what it learns, and callbacks.

    Callbacks say so by an attribute ``controls_coefficients = True``; those of a class with ``counts_once = True``
    count once.
    """
    found = [each for each in callbacks if getattr(each, "controls_coefficients", False)]
    names = [type(each).__name__ for each in found if not getattr(each, "counts_once", False)]
    names += dict.fromkeys(type(each).__name__ for each in found if getattr(each, "counts_once", False))
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
    """Refuse more than one driver.

    Raises:
        ValueError: with the names of all.
    """
    if len(names) > 1:
        raise ValueError(
            f"The coefficients of the loss are moved by {' and by '.join(names)}; only one of them can. For several "
            f"stages in one schedule use Join, or Together, of harness.schedules."
        )


def refuse_other_controllers(callback: Callback, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to move the coefficients of a module's loss if anything else of this trainer does.

    Raises:
        TypeError: the module has no loss with coefficients.
        ValueError: with the names of all.
    """
    callbacks = [callback, *(each for each in trainer.callbacks if each is not callback)]  # type: ignore[attr-defined]
    refuse_several(controllers_of(loss_of(pl_module), callbacks))
