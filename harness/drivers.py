"""What moves the coefficients of a loss, and that it is one thing only: the later of two would undo the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["refuse_other_drivers", "refuse_several_drivers"]

# those of NequIP do not say so themselves
_OF_NEQUIP = ("SoftAdapt", "LossCoefficientScheduler", "LinearLossCoefficientScheduler")


def refuse_several_drivers(loss: Any, callbacks: Iterable[Callback]) -> None:
    """Refuse two things that both move the coefficients of a loss: the later one would undo the other, silently.

    Args:
        loss: a manager, whose schedule or weighting may be one of them.
        callbacks: those with an attribute ``drives_coefficients`` that is true are others.

    Raises:
        ValueError: with the names of both.
    """
    drivers = [_name(each) for each in callbacks if _drives(each)]
    if getattr(loss, "schedule", None) is not None:
        drivers.append(f"the schedule {type(loss.schedule).__name__}")
    if getattr(loss, "weighting", None) is not None:
        drivers.append(type(loss.weighting).__name__)
    if len(drivers) > 1:
        raise ValueError(
            f"The coefficients of the loss are moved by {' and by '.join(drivers)}; only one of them can. For several "
            f"stages in one schedule use Join, or Together, of harness.schedules."
        )


def refuse_other_drivers(callback: Callback, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a module whose loss a callback cannot drive, or not alone; for the callback's ``setup``.

    Args:
        callback: what drives the coefficients of ``pl_module.loss``.
        trainer: its callbacks are the others.
        pl_module: what is trained.

    Raises:
        TypeError: the module has no loss whose coefficients can be set.
        ValueError: something else drives them too.
    """
    loss = getattr(pl_module, "loss", None)
    if not callable(getattr(loss, "set_coeffs", None)) or not hasattr(loss, "entries"):
        raise TypeError(
            f"{type(callback).__name__} moves the coefficients of the module's `loss`, found {type(loss).__name__} in "
            f"{type(pl_module).__name__}; expected a manager of components, such as harness.MetricsManager."
        )
    others = [each for each in trainer.callbacks if each is not callback]  # type: ignore[attr-defined]
    refuse_several_drivers(loss, [callback, *others])


def _drives(callback: Callback) -> bool:
    kind = type(callback)
    return getattr(callback, "drives_coefficients", False) or (
        kind.__module__.startswith("nequip.") and kind.__name__ in _OF_NEQUIP
    )


def _name(callback: Callback) -> str:
    kind = type(callback)
    return f"NequIP's {kind.__name__}" if kind.__module__.startswith("nequip.") else kind.__name__
