"""Managers, optimizers and learning-rate schedulers from objects, callables or configs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from harness.metrics import MetricsManager
from harness.module.horizon import HORIZON, Pace
from harness.support.configs import take_out

__all__ = ["ManagerSource", "build_manager", "build_managers", "build_optimizer", "scheduler_options"]

ManagerSource = MetricsManager | Callable[..., MetricsManager] | Mapping[str, Any]
"""A manager, a callable that makes one from ``type_names=``, or a config with the ``_target_`` of such a callable."""


def build_manager(source: ManagerSource, argument: str, type_names: list[str] | None) -> MetricsManager:
    """The manager that a source is or makes.

    Args:
        source: a manager, a callable or a config.
        argument: that it was given as, for the message.
        type_names: names of the atom types.

    Raises:
        TypeError: it makes no manager.
    """
    if isinstance(source, MetricsManager):
        return source
    if isinstance(source, Mapping):
        manager = _instantiate_manager(source, type_names)
    elif callable(source):
        manager = source(type_names=type_names)
    else:
        manager = source
    if not isinstance(manager, MetricsManager):
        raise TypeError(
            f"`{argument}` is a MetricsManager, a callable that makes one from `type_names=`, or a config with a "
            f"`_target_`; found {source!r}."
        )
    return manager


def _instantiate_manager(source: Mapping[str, Any], type_names: list[str] | None) -> Any:
    """The manager of a config; ``interval``, in the section of its schedule, is an argument of the manager's own."""
    rest, schedule = take_out(source, "schedule")
    if not isinstance(schedule, Mapping) or "interval" not in schedule:
        return instantiate(source, type_names=type_names)
    schedule, interval = take_out(schedule, "interval")
    return instantiate(rest, type_names=type_names, schedule=schedule, schedule_interval=interval)


def build_managers(
    source: ManagerSource | None, number: int, argument: str, type_names: list[str] | None
) -> nn.ModuleList:
    """One manager for each data set, since every set has its own sums; none without a source."""
    if source is None:
        return nn.ModuleList()
    if isinstance(source, MetricsManager):
        return nn.ModuleList(copy.deepcopy(source) for _ in range(number))
    return nn.ModuleList(build_manager(source, argument, type_names) for _ in range(number))


def build_optimizer(
    module: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer] | Mapping[str, Any] | None,
    lr_scheduler: Callable[..., Any] | Mapping[str, Any] | None,
    horizon: Callable[[Pace], int] | None = None,
) -> Any:
    """Optimizer of all trained parameters, and its learning-rate scheduler, in the form that Lightning takes.

    Args:
        module: that is trained.
        optimizer: callable from parameters, or a config of one; Adam with 1e-3 if None.
        lr_scheduler: callable from an optimizer, a config of one, or Lightning's dictionary with it as ``scheduler``.
            An argument ``horizon`` of it stands for the length of the training.
        horizon: that length in the turns of a scheduler, at least 1; None where it is not known, and 1 is taken.

    Raises:
        ValueError: nothing to train, or arguments that an optimizer or scheduler does not take.
        TypeError: neither a callable nor a config.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("The model has no parameters that require a gradient: there is nothing to train.")
    built: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=1e-3) if optimizer is None else _call(optimizer, "optimizer", parameters)
    )
    rates = [copy.copy(group.get("lr")) for group in built.param_groups]
    options = scheduler_options(lr_scheduler)
    if options is not None:
        length = None if horizon is None else functools.partial(horizon, Pace.of(options))
        options["scheduler"] = _call(options["scheduler"], "lr_scheduler", built, length)
    for group, rate in zip(built.param_groups, rates, strict=True):
        if rate is not None:  # as most schedulers do: what was asked for, whatever becomes of it
            group.setdefault("initial_lr", rate)
    return built if options is None else {"optimizer": built, "lr_scheduler": options}


def scheduler_options(lr_scheduler: Callable[..., Any] | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Lightning's dictionary of a scheduler, whose ``scheduler`` is still a callable or config; None without one."""
    if lr_scheduler is None:
        return None
    if isinstance(lr_scheduler, Mapping) and "scheduler" in lr_scheduler:
        return {str(key): value for key, value in lr_scheduler.items()}
    return {"scheduler": lr_scheduler}


def _call(
    source: Callable[..., Any] | Mapping[str, Any], what: str, argument: Any, length: Callable[[], int] | None = None
) -> Any:
    """Result of a callable, or of a config's target, on one argument; ``length`` replaces ``horizon``."""
    if isinstance(source, Mapping):
        source = instantiate(source, _partial_=True)
    if not callable(source):
        raise TypeError(f"`{what}` is a callable or a config with a `_target_`, found {source!r}.")
    if isinstance(source, functools.partial):
        named = [name for name, value in source.keywords.items() if isinstance(value, str) and value == HORIZON]
        if named:
            turns = 1 if length is None else max(length(), 1)
            source = functools.partial(source.func, *source.args, **source.keywords | dict.fromkeys(named, turns))
    try:
        return source(argument)
    except (TypeError, ValueError) as error:
        target = getattr(source, "func", source)
        options = getattr(source, "keywords", {})
        name = getattr(getattr(target, "target", target), "__name__", repr(target))
        raise ValueError(f"The {what}, {name} with {dict(options)}, cannot be made: {error}") from error
