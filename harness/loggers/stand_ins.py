"""Objects in the place of a ``wandb.Run`` that has not started yet, or never will."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["NoRun", "StartingRun"]


class StartingRun:
    """A ``wandb.Run`` that may not have started yet: its attributes wait for it.

    Args:
        wait: returns the run when it has started.
    """

    def __init__(self, wait: Callable[[], Any]) -> None:
        object.__setattr__(self, "_wait", wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_wait")(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_wait")(), name, value)


class NoRun:
    """A run that could not start: takes every call and every value, and does nothing."""

    def __getattr__(self, name: str) -> NoRun:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> NoRun:  # noqa: D102
        return self

    def __getitem__(self, key: Any) -> NoRun:
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass
