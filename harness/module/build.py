"""Managers, optimizers and learning-rate schedulers from objects, callables or configs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import inspect
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from hydra.utils import instantiate
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from harness.metrics import MetricsManager
from harness.module.bounds import wrong_settings
from harness.module.horizon import HORIZON, Pace
from harness.module.learning_rates import WarmUp
from harness.module.parameters import ParameterGroups
from harness.schedules import check_interval
from harness.support.checks import whole_number
from harness.support.configs import take_out
from harness.support.text import reason

__all__ = [
    "CODE",
    "TARGET",
    "ManagerSource",
    "asked_for",
    "build_manager",
    "build_managers",
    "build_optimizer",
    "recipe",
    "scheduler_options",
    "try_first_turn",
    "warm_up_of",
]

TARGET = "_target_"
"""Key in a recipe of the dotted path of a callable."""
CODE = "_code_"
"""Key in a recipe of the digest of a function: ``major.minor:hexadecimal``, of the Python that compiled it."""
_ARGUMENTS = "_args_"
_WARM_UP = "warm_up"
_OPTIONS = ("scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau")
_OF_HYDRA = ("_partial_", "_convert_", "_recursive_")

_asked: WeakKeyDictionary[torch.optim.Optimizer, dict[str, Any]] = WeakKeyDictionary()

ManagerSource = MetricsManager | Callable[..., MetricsManager] | Mapping[str, Any]
"""A manager, a callable that makes one from ``type_names=``, or a config with the ``_target_`` of such a callable.

A callable that takes ``group_names``, ``set_names`` or ``labelled_sets`` is given them too, where the data have any."""


def build_manager(
    source: ManagerSource, argument: str, type_names: list[str] | None, frames: Mapping[str, Any] | None = None
) -> MetricsManager:
    """The manager that a source is or makes.

    Args:
        source: a manager, a callable or a config.
        argument: that it was given as, for the message.
        type_names: names of the atom types.
        frames: names of groups and sets of frames, by argument; those that are there are given to a callable that
            takes them.

    Raises:
        TypeError: it makes no manager.
    """
    if isinstance(source, MetricsManager):
        return source
    if isinstance(source, Mapping):
        manager = _instantiate_manager(source, type_names, frames or {})
    elif callable(source):
        manager = source(type_names=type_names, **_taken(source, frames or {}))
    else:
        manager = source
    if not isinstance(manager, MetricsManager):
        raise TypeError(
            f"`{argument}` is a MetricsManager, a callable that makes one from `type_names=`, or a config with a "
            f"`_target_`; found {source!r}."
        )
    return manager


def _instantiate_manager(source: Mapping[str, Any], type_names: list[str] | None, frames: Mapping[str, Any]) -> Any:
    """The manager of a config; ``interval``, in the section of its schedule, is an argument of the manager's own."""
    names = {"type_names": type_names}
    if any(frames.values()) and TARGET in source:
        names |= _taken(instantiate({TARGET: source[TARGET], "_partial_": True}).func, frames)
    rest, schedule = take_out(source, "schedule")
    if not isinstance(schedule, Mapping) or "interval" not in schedule:
        return instantiate(source, **names)
    schedule, interval = take_out(schedule, "interval")
    return instantiate(rest, **names, schedule=schedule, schedule_interval=interval)


def _taken(function: Callable[..., Any], frames: Mapping[str, Any]) -> dict[str, Any]:
    """Names of groups and sets that there are and that a function takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # it has none, as some builtins
        return {}
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return {name: value for name, value in frames.items() if value and (takes_all or name in parameters)}


def build_managers(
    source: ManagerSource | None,
    number: int,
    argument: str,
    type_names: list[str] | None,
    frames: Mapping[str, Any] | None = None,
) -> nn.ModuleList:
    """One manager for each data set, since every set has its own sums; none without a source."""
    if source is None:
        return nn.ModuleList()
    if isinstance(source, MetricsManager):
        return nn.ModuleList(copy.deepcopy(source) for _ in range(number))
    return nn.ModuleList(build_manager(source, argument, type_names, frames) for _ in range(number))


def build_optimizer(
    module: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer] | Mapping[str, Any] | None,
    lr_scheduler: Callable[..., Any] | Mapping[str, Any] | None,
    horizon: Callable[[Pace], int] | None = None,
) -> Any:
    """Optimizer of all trained parameters, and its learning-rate scheduler, in the form that Lightning takes.

    Args:
        module: that is trained.
        optimizer: callable from parameters, or a config of one, which may have ``groups`` of parameters beside the
            arguments, see :class:`~harness.module.parameters.ParameterGroup`; Adam with 1e-3 if None.
        lr_scheduler: callable from an optimizer, a config of one, or Lightning's dictionary with it as ``scheduler``.
            An argument ``horizon`` of it stands for the length of the training.
        horizon: that length in the turns of a scheduler, at least 1; None where it is not known, and 1 is taken.

    Raises:
        ValueError: nothing to train, groups that are none, or arguments that an optimizer or scheduler does not take.
        TypeError: neither a callable nor a config.
    """
    parameters: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("The model has no parameters that require a gradient: there is nothing to train.")
    optimizer, sections = take_out(optimizer, "groups") if isinstance(optimizer, Mapping) else (optimizer, None)
    groups = ParameterGroups(module, sections) if sections is not None and sections not in ([], ()) else None
    if groups is not None:
        parameters = groups.for_optimizer()
    built: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=1e-3) if optimizer is None else _call(optimizer, "optimizer", parameters)
    )
    own_rate = copy.copy(built.param_groups[0].get("lr"))
    if groups is not None:
        groups.scale_rates(built)
    rates = [copy.copy(group.get("lr")) for group in built.param_groups]
    _asked[built] = {"rate": recipe(own_rate), "settings": [_settings(group) for group in built.param_groups]}
    warm_up = warm_up_of(lr_scheduler)
    if warm_up is not None:
        _asked[built]["warm_up"] = dataclasses.asdict(warm_up)
    options = scheduler_options(lr_scheduler)
    if options is not None:
        _asked[built]["recipe"] = recipe(options["scheduler"])
        length = None if horizon is None else functools.partial(horizon, Pace.of(options))
        options["scheduler"] = _call(options["scheduler"], "lr_scheduler", built, length)
    for group, rate in zip(built.param_groups, rates, strict=True):
        if rate is not None:  # as most schedulers do: what was asked for, whatever becomes of it
            group.setdefault("initial_lr", rate)
    if groups is not None and own_rate is not None:
        groups.check_rates(built, own_rate)
    return built if options is None else {"optimizer": built, "lr_scheduler": options}


def asked_for(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Settings that :func:`build_optimizer` made an optimizer from, in plain data; empty for another's optimizer.

    Returns:
        ``settings``, those of each group before a scheduler moved any, ``rate``, the learning rate of the optimizer
        without factors of groups, and ``recipe`` of the scheduler and ``warm_up`` if there is one.
    """
    return _asked.get(optimizer, {})


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: recipe(value) for name, value in group.items() if name != "params"}


def recipe(source: Any) -> Any:
    """Plain data that says what is asked for: a config, a callable with its arguments, or one of these arguments.

    A callable is a dictionary with its dotted path as :data:`TARGET`, its arguments by their names, and, of a function
    of Python, a digest of its code, defaults and plain variables as :data:`CODE`. A config and the partial that it
    stands for have the same recipe.
    """
    if source is None or isinstance(source, bool | int | float | str):
        return source
    if isinstance(source, torch.Tensor):
        return source.tolist()
    if isinstance(source, functools.partial):
        made = recipe(source.func)
        made = dict(made) if isinstance(made, dict) else {TARGET: made}
        if source.args:
            made[_ARGUMENTS] = [*made.get(_ARGUMENTS, []), *map(recipe, source.args)]
        return made | {name: recipe(value) for name, value in source.keywords.items()}
    if isinstance(source, Mapping):
        return {str(name): recipe(value) for name, value in source.items() if name not in _OF_HYDRA}
    if isinstance(source, Sequence | set | frozenset):
        found = map(recipe, source)
        return sorted(found, key=repr) if isinstance(source, set | frozenset) else list(found)
    if isinstance(source, types.MethodType):
        return {TARGET: _dotted(source.__func__), "self": recipe(source.__self__)}
    if isinstance(source, types.FunctionType):
        digest = hashlib.sha256("\n".join(_content(source, set())).encode()).hexdigest()[:16]
        return {TARGET: _dotted(source), CODE: f"{sys.version_info[0]}.{sys.version_info[1]}:{digest}"}
    if isinstance(source, type | types.BuiltinFunctionType):
        return {TARGET: _dotted(source)}
    if callable(source) and hasattr(source, "__dict__"):
        return {TARGET: _dotted(type(source))} | {name: _plain(value) for name, value in vars(source).items()}
    return _plain(source)


def _dotted(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _plain(value: Any) -> Any:
    """A value of no known kind, without the address that tells objects of one process apart."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _content(function: types.FunctionType, seen: set[int]) -> list[str]:
    """Parts of a function that its result depends on: code, constants, defaults, and variables that are plain."""
    if id(function) in seen:
        return []
    seen.add(id(function))
    parts = [*_content_of_code(function.__code__), repr(recipe(function.__defaults__ or ()))]
    parts.append(repr(recipe(function.__kwdefaults__ or {})))
    variables = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            variables[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    names = function.__code__.co_names
    variables |= {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, value in variables.items():
        if isinstance(value, types.FunctionType):
            is_own = value.__module__ == function.__module__
            parts += [name, *(_content(value, seen) if is_own else [_dotted(value)])]
        elif isinstance(value, type):
            parts += [name, _dotted(value)]
        elif value is None or isinstance(value, bool | int | float | str | list | tuple | dict | functools.partial):
            parts += [name, repr(recipe(value))]
    return parts


def _content_of_code(code: types.CodeType) -> list[str]:
    parts = [code.co_code.hex(), repr(code.co_names)]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts += _content_of_code(constant)
        elif isinstance(constant, frozenset):
            parts.append(repr(sorted(constant, key=repr)))
        else:
            parts.append(repr(constant))
    return parts


def scheduler_options(lr_scheduler: Callable[..., Any] | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Lightning's dictionary of a scheduler, whose ``scheduler`` is still a callable or config; None without one.

    Raises:
        ValueError: a key that neither Lightning nor this package knows, or an interval or frequency that is none.
    """
    if lr_scheduler is None:
        return None
    if not isinstance(lr_scheduler, Mapping) or "scheduler" not in lr_scheduler:
        return {"scheduler": lr_scheduler}
    options = {str(key): value for key, value in lr_scheduler.items() if key != _WARM_UP}
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise ValueError(
            f"lr_scheduler has no {', '.join(unknown)}. Valid names: {', '.join((*_OPTIONS, _WARM_UP))}; arguments of "
            f"the scheduler itself are given as lr_scheduler.scheduler.{unknown[0]}."
        )
    check_interval(options.get("interval", "epoch"), "lr_scheduler.interval")
    whole_number("lr_scheduler.frequency", options.get("frequency", 1))
    return None if options["scheduler"] is None else options


def warm_up_of(lr_scheduler: Callable[..., Any] | Mapping[str, Any] | None) -> WarmUp | None:
    """Warm-up in front of a scheduler, by its key ``warm_up``; None without one.

    Raises:
        ValueError: numbers out of range.
    """
    is_dictionary = isinstance(lr_scheduler, Mapping) and "scheduler" in lr_scheduler
    return WarmUp.of(lr_scheduler.get(_WARM_UP)) if is_dictionary else None  # type: ignore[union-attr]


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
    target, options = getattr(source, "func", source), getattr(source, "keywords", {})
    wrong = wrong_settings(target, options, what if what == "optimizer" else f"{what}.scheduler")
    name = getattr(getattr(target, "target", target), "__name__", repr(target))
    if wrong:
        raise ValueError(f"{' '.join(wrong)} (target {name})")
    try:
        return source(argument)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"The {what}, {name} with {dict(options)}, cannot be made: {error}") from error


def try_first_turn(options: Mapping[str, Any]) -> None:
    """Let a scheduler that is thrown away afterwards take a turn, so that a setting that fails then is found before.

    Args:
        options: Lightning's dictionary of it.

    Raises:
        ValueError: it fails, or gives a learning rate that is no number of at least 0.
    """
    scheduler = options["scheduler"]
    name = type(scheduler).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no step of the optimizer has come before
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        rates = [group["lr"] for group in scheduler.optimizer.param_groups]
    except Exception as error:
        raise ValueError(f"lr_scheduler.scheduler: {name} fails at its first turn: {reason(error)}") from error
    wrong = [rate for rate in map(float, rates) if not (math.isfinite(rate) and rate >= 0)]
    if wrong:
        raise ValueError(
            f"lr_scheduler.scheduler: the first turn of {name} gives a learning rate of {wrong[0]:g}, expected a "
            f"number of at least 0. Look at its settings."
        )
