"""Parameters chosen by patterns of their names: groups of an optimizer, and parameters that are frozen.

Names are those within the model, as ``model.named_parameters()`` has them; the ``state_dict`` of a checkpoint has them
behind ``model.``. Patterns are those of the shell, as :mod:`fnmatch` reads them: ``*`` is any text, dots included,
``?`` one character, ``[01]`` one of these. A pattern has to match the whole name: ``*.bias``, ``energy_model.*``.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from harness.support.checks import is_number
from harness.support.text import did_you_mean, some

__all__ = ["ParameterGroup", "ParameterGroups", "freeze", "parameter_names", "parameter_table"]

_COMPILED = "_orig_mod."
"""Part of the names of a module that ``torch.compile`` has wrapped."""
_MODEL = "model."
_REST = "rest"


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a model by name; one that several parts share has several names."""
    return {name.replace(_COMPILED, ""): each for name, each in model.named_parameters(remove_duplicate=False)}


def _matching(pattern: str, model: nn.Module, setting: str) -> list[str]:
    """Names of the parameters that a pattern matches.

    Raises:
        ValueError: there are none; with names that are near.
    """
    names = list(parameter_names(model))
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if found:
        return found
    inside = pattern.removeprefix(_MODEL)
    buffers = [name for name, _ in model.named_buffers() if fnmatch.fnmatchcase(name, pattern)]
    hint = f"Expected some of {some(names)}."
    if inside != pattern and any(fnmatch.fnmatchcase(name, inside) for name in names):
        hint = f"Names are those within the model, without `{_MODEL}`: {inside!r}."
    elif buffers:
        hint = f"{some(buffers)} is a buffer, which is no parameter and is not trained."
    else:
        words = dict.fromkeys(word for name in names for word in name.split(".") if not word.isdigit())
        parts = [part for part in pattern.replace("*", ".").split(".") if part]
        near = next(filter(None, (did_you_mean(part, words) for part in parts if part not in words)), "")
        hint = f"{near}{hint} A pattern is of the whole name, with * for what it leaves open."
    raise ValueError(f"{setting}: the pattern {pattern!r} matches no parameter of the model. {hint}")


def _check_patterns(patterns: Any, setting: str) -> list[str]:
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not is_list or not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"{setting} is a list of patterns of names, such as ['*.bias'], found {patterns!r}.")
    return list(patterns)


# --- frozen parameters ---


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters that patterns match: they get no gradient, and are in no optimizer.

    Call it before the model is handed to a strategy: DDP then sends nothing for them. Buffers stay as they are.

    Args:
        model: whose parameters are frozen.
        patterns: of names, see :mod:`harness.module.parameters`.

    Returns:
        Names of the frozen parameters.

    Raises:
        TypeError: no list of patterns.
        ValueError: a pattern that matches nothing, or no parameter is left to train.
    """
    chosen = dict.fromkeys(
        name for pattern in _check_patterns(patterns, "freeze") for name in _matching(pattern, model, "freeze")
    )
    parameters = parameter_names(model)
    for name in chosen:
        parameters[name].requires_grad_(False)
    if chosen and not any(each.requires_grad for each in parameters.values()):
        raise ValueError(
            f"freeze: {list(patterns)} leaves no parameter of the model to train. Freeze fewer of them, or test the "
            f"model alone, with train=false and ckpt_path."
        )
    return list(chosen)


# --- groups of an optimizer ---


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with settings of the optimizer of their own.

    Attributes:
        name: in logs, as ``lr-Adam/NAME``.
        match: patterns of names, see :mod:`harness.module.parameters`.
        lr_factor: the group's learning rate is that of the optimizer times this factor; schedulers move both.
        weight_decay: of the group; None for that of the optimizer.
    """

    name: str
    match: tuple[str, ...]
    lr_factor: float = 1.0
    weight_decay: float | None = None

    @classmethod
    def of(cls, section: Any, number: int) -> ParameterGroup:
        """Group of a config.

        Args:
            section: mapping with ``match`` and some of the other attributes.
            number: of the group, from 1; it is named after it if it has no name.

        Raises:
            TypeError, ValueError: with what was found and what was expected.
        """
        where = f"optimizer.groups[{number - 1}]"
        valid = tuple(cls.__dataclass_fields__)
        if not isinstance(section, Mapping) or "match" not in section:
            raise TypeError(f"{where} is a mapping with `match`, a list of patterns of names, found {section!r}.")
        unknown = [str(key) for key in section if key not in valid]
        if unknown:
            meant = did_you_mean(unknown[0], valid)
            raise ValueError(f"{where} has the unknown key {unknown[0]!r}. {meant}Valid keys: {', '.join(valid)}.")
        name = section.get("name") or f"group{number}"
        if not isinstance(name, str):
            raise TypeError(f"{where}.name is text, found {name!r}.")
        factor, decay = section.get("lr_factor"), section.get("weight_decay")
        factor = 1.0 if factor is None else factor
        if not is_number(factor) or not 0 < factor < math.inf:
            raise ValueError(
                f"{where}.lr_factor is a number above 0, found {factor!r}. What is not to be trained belongs into "
                f"`freeze`."
            )
        if decay is not None and (not is_number(decay) or not 0 <= decay < math.inf):
            raise ValueError(f"{where}.weight_decay is a number of at least 0 or null, found {decay!r}.")
        match = tuple(_check_patterns(section["match"], f"{where}.match"))
        return cls(name, match, float(factor), None if decay is None else float(decay))


class ParameterGroups:
    """Division of all trained parameters of a module into groups: each parameter is in exactly one.

    What no pattern matches is in the first group, ``rest``, with the optimizer's own settings; so are parameters
    outside of the model, such as learnt coefficients of the loss.

    Args:
        module: whose ``model`` has the parameters that patterns are of.
        groups: configs of the groups, see :class:`ParameterGroup`.

    Raises:
        TypeError: no list of groups.
        ValueError: a pattern that matches nothing, or nothing but frozen parameters; a parameter that two groups match;
            two groups of one name.
    """

    def __init__(self, module: nn.Module, groups: Sequence[Any]) -> None:
        if not isinstance(groups, Sequence) or isinstance(groups, str):
            raise TypeError(f"optimizer.groups is a list of groups such as {{match: ['*.bias']}}, found {groups!r}.")
        self.groups = [ParameterGroup.of(section, number) for number, section in enumerate(groups, 1)]
        names = [_REST, *(group.name for group in self.groups)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"optimizer.groups: two groups are named {twice[0]!r}. Give each a `name` of its own.")
        self._members = self._divide(module, module.get_submodule("model"))

    def _divide(self, module: nn.Module, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Parameters of each group by its name."""
        parameters = parameter_names(model)
        owner: dict[int, ParameterGroup] = {}
        for number, group in enumerate(self.groups):
            setting = f"optimizer.groups[{number}].match"
            for pattern in group.match:
                found = _matching(pattern, model, setting)
                if not any(parameters[name].requires_grad for name in found):
                    raise ValueError(
                        f"{setting}: the pattern {pattern!r} matches frozen parameters alone: {some(found)}. Leave it "
                        f"out, or let some of them be trained (freeze)."
                    )
                for name in found:
                    other = owner.setdefault(id(parameters[name]), group)
                    if other is not group:
                        raise ValueError(
                            f"optimizer.groups: the parameter {name} is matched by the groups {other.name!r} "
                            f"({', '.join(other.match)}) and {group.name!r} ({', '.join(group.match)}). Each is in one "
                            f"group: make the patterns of one of them narrower."
                        )
        members: dict[str, list[nn.Parameter]] = {_REST: [], **{group.name: [] for group in self.groups}}
        for parameter in module.parameters():
            if parameter.requires_grad:
                members[owner[id(parameter)].name if id(parameter) in owner else _REST].append(parameter)
        return {name: found for name, found in members.items() if found}

    def for_optimizer(self) -> list[dict[str, Any]]:
        """Groups as torch's optimizers take them, with the learning rate of the optimizer."""
        decays = {group.name: group.weight_decay for group in self.groups}
        return [
            {"params": found, "name": name} | ({} if decays.get(name) is None else {"weight_decay": decays[name]})
            for name, found in self._members.items()
        ]

    def scale_rates(self, optimizer: Optimizer) -> None:
        """Multiply the learning rates of an optimizer's groups by their factors, before a scheduler is made.

        Raises:
            ValueError: the optimizer has no learning rate, or no weight decay.
        """
        for group in self.groups:
            for setting, is_given in (("lr", group.lr_factor != 1), ("weight_decay", group.weight_decay is not None)):
                if is_given and setting not in optimizer.defaults:
                    raise ValueError(
                        f"optimizer.groups: {type(optimizer).__name__} has no setting {setting}, which the group "
                        f"{group.name!r} gives; it has {', '.join(optimizer.defaults)}."
                    )
        for of_optimizer in optimizer.param_groups:
            factor = self._factor(of_optimizer["name"])
            if factor != 1:
                of_optimizer["lr"] = of_optimizer["lr"] * factor

    def check_rates(self, optimizer: Optimizer, rate: Any) -> None:
        """Refuse a scheduler that has given all groups one learning rate, so that factors are lost.

        Args:
            optimizer: behind its scheduler's making.
            rate: the optimizer's own learning rate.

        Raises:
            ValueError: with the rates.
        """
        starts = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups if "lr" in group]
        wanted = [float(rate) * self._factor(group["name"]) for group in optimizer.param_groups if "lr" in group]
        if starts and any(
            not math.isclose(start * wanted[0], starts[0] * other, rel_tol=1e-6)
            for start, other in zip(starts, wanted, strict=True)
        ):
            factors = ", ".join(f"{group['name']} {self._factor(group['name']):g}" for group in optimizer.param_groups)
            raise ValueError(
                f"lr_scheduler: it starts the groups of parameters with the learning rates "
                f"{', '.join(f'{start:g}' for start in starts)}, which are not in the ratio of their factors "
                f"({factors}). Give schedulers such as OneCycleLR and CyclicLR one rate for each group: "
                f"max_lr: [{', '.join(f'{each:g}' for each in wanted)}]."
            )

    def _factor(self, name: str) -> float:
        return next((group.lr_factor for group in self.groups if group.name == name), 1.0)


def parameter_table(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Lines with the numbers of trained and frozen parameters, and of those in each group of an optimizer."""
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for parameter in model.parameters():
        kinds[parameter.requires_grad].append(parameter.numel())
    trained, frozen = (f"{sum(kinds[kind])} {word} in {len(kinds[kind])} tensors" for kind, word in _KINDS)
    lines = [f"parameters: {trained}, {frozen if kinds[False] else 'none frozen'}"]
    if len(optimizer.param_groups) > 1 or "name" in optimizer.param_groups[0]:
        for number, group in enumerate(optimizer.param_groups):
            sizes = [parameter.numel() for parameter in group["params"]]
            shown = {"lr": group.get("initial_lr", group.get("lr")), "weight_decay": group.get("weight_decay")}
            settings = "".join(f", {name} {float(value):g}" for name, value in shown.items() if value is not None)
            lines.append(f"  {group.get('name', f'group {number}')}: {sum(sizes)} in {len(sizes)} tensors{settings}")
    return lines


_KINDS = ((True, "trained"), (False, "frozen"))
