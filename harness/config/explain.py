"""Explanations of a wrong configuration: the setting or target that was meant, and what it takes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from harness.config.resolvers import config_folder, register_resolvers
from harness.runs import config_options
from harness.support.text import did_you_mean, reason

__all__ = ["HINT", "explain", "message"]

HINT = "(HYDRA_FULL_ERROR=1 shows where it was found)"


register_resolvers()


def message(error: Exception) -> str:
    """Message of an error for a user: its own words, and the config that Hydra was at."""
    if isinstance(error, hydra.errors.InstantiationException):
        cause = error.__cause__
        if not isinstance(cause, Exception):
            return str(error)
        place = str(error).splitlines()[0].removeprefix("Error ").rstrip(":")  # such as: in call to target 'x.Y'
        target = re.search(r"target '([\w.]+)'", place)
        if target is not None and place.startswith("locating"):
            return f"{_not_found(target.group(1), cause)} (locating target '{target.group(1)}')"
        reported = _wrong_arguments(target.group(1), cause) if target is not None else None
        return f"{reported or message(cause)} ({place})"
    if isinstance(error, MissingMandatoryValue):
        return f"{str(error).splitlines()[0]}. Give it on the command line, such as {error.full_key}=..."
    return reason(error)


_PUBLIC = (
    "harness",
    "harness.schedules",
    "harness.adaptive",
    "harness.callbacks",
    "harness.metrics",
    "harness.presets",
    "harness.loggers",
    "harness.models",
    "harness.data",
    "harness.strategies",
)
"""Modules with what a `_target_` may name."""


def _not_found(target: str, cause: Exception) -> str:
    """Message of a `_target_` that is not there, with the one that may be meant."""
    parts = target.split(".")
    # Hydra has imported all that there is on the way
    depth = next((number for number in range(len(parts), 0, -1) if ".".join(parts[:number]) in sys.modules), 0)
    owner = ".".join(parts[:depth])
    error = cause.__cause__
    asked_for = {".".join(parts[: depth + 1]), parts[0]}
    if not (isinstance(error, AttributeError) or (isinstance(error, ModuleNotFoundError) and error.name in asked_for)):
        where = ".".join(parts[: depth + 1])
        return f"{where} cannot be imported: {type(error).__name__}: {error}" if error else str(cause)
    found: Any = sys.modules.get(owner)
    while found is not None and depth < len(parts) - 1 and hasattr(found, parts[depth]):  # such as a class
        found = getattr(found, parts[depth])
        depth += 1
    name = parts[-1]
    own, elsewhere = _public(owner), [path for module in _PUBLIC for path in _public(module)]
    meant = (
        [path for path in (*own, *elsewhere) if path.rpartition(".")[2] == name]
        or _closest(name, own)
        or _closest(name, elsewhere)
    )
    what = f"{'.'.join(parts[:depth])} has no {parts[depth]}." if depth else f"There is no module {parts[0]}."
    if meant:
        return f"{what} Did you mean {meant[0]}?"
    listed = 0 < len(own) <= 30 and found is sys.modules.get(owner)
    has = f" It has {', '.join(path.rpartition('.')[2] for path in own)}." if listed else ""
    return f"{what}{has}" if depth else f"{what} Is it installed, or its folder on PYTHONPATH?"


def _public(module: str) -> list[str]:
    """Dotted paths of the public names of a module: those that it lists, or else the callables that it defines."""
    if not module:
        return []
    try:
        found = importlib.import_module(module)
    except ImportError:  # without an extra that it needs
        return []
    defined = (name for name, each in vars(found).items() if getattr(each, "__module__", None) == module)
    names = getattr(found, "__all__", None) or [name for name in defined if not name.startswith("_")]
    return [f"{module}.{name}" for name in names]


def _closest(name: str, paths: Sequence[str]) -> list[str]:
    """The path whose last part is nearest, if any is near."""
    by_name = {path.rpartition(".")[2]: path for path in reversed(paths)}
    return [by_name[each] for each in difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)]


def _wrong_arguments(target: str, cause: Exception) -> str | None:
    """Message of a target that was called with arguments that it does not take, or without some that it needs."""
    if not isinstance(cause, TypeError) or cause.__traceback__ is None or cause.__traceback__.tb_next is not None:
        return None  # raised within it
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    missing = re.search(r"missing \d+ required .*arguments?: (.+)", str(cause))
    if unexpected is None and missing is None:
        return None
    try:
        called = instantiate({"_target_": target, "_partial_": True}).func
        parameters = inspect.signature(called).parameters
    except (hydra.errors.InstantiationException, ValueError, TypeError):  # it has no signature
        return None
    taken = [name for name, each in parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    takes = f"It takes {', '.join(taken)}." if taken else "It takes none."
    name = getattr(called, "__qualname__", target)
    if missing is not None:
        return f"{name} is not given {missing.group(1).replace(chr(39), '')}. {takes}"
    wrong = unexpected.group(1) if unexpected is not None else ""
    return f"{name} takes no argument {wrong!r}. {did_you_mean(wrong, taken)}{takes}"


def explain(text: str, overrides: Sequence[str] | None = None, config_dir: str | None = None) -> str:
    """Message of Hydra on a wrong configuration, with the setting that a misspelt one may be meant for.

    Args:
        text: Hydra's message.
        overrides: of the configuration; those of the command line if not given.
        config_dir: of the user's own; that of the command line if ``overrides`` are not given.
    """
    reported = text.partition("Set the environment variable HYDRA_FULL_ERROR")[0].strip()
    plugin = re.search(
        r"Could not find 'hydra/(?:sweeper|launcher)(?:/sampler)?/(optuna|tpe|submitit_\w+|ray)'", reported
    )
    if plugin is not None and plugin.group(1) == "ray":
        return f"hydra-ray-launcher is not installed: pip install hydra-ray-launcher.\n({reported})"
    if plugin is not None:
        of = "hydra-submitit-launcher" if plugin.group(1).startswith("submitit") else "hydra-optuna-sweeper"
        return f"{of} is not installed; it comes with pip install 'potential-harness[sweep]'.\n({reported})"
    if "BasicSweeper does not support sweep type" in reported:
        last = reported.splitlines()[-1]
        return f"a range of values needs a sampler that draws from it: sweep=optuna or sweep=pareto.\n({last})"
    unwritable = _unwritable(reported)
    if unwritable is not None:
        return unwritable
    if "override_grammar" in reported:
        given = overrides if overrides is not None else config_options(sys.argv[1:], every=True)[1]
        return _ungrammatical(given) or reported
    misspelt = re.search(r"Could not override '([^'\n]+)'", reported)
    if misspelt is None:
        return reported or "the configuration cannot be composed"
    full = re.search(r"^\s*full_key: (\S.*?)\s*$", reported, re.MULTILINE)  # a key within the value that was given
    key = full.group(1) if full else misspelt.group(1)
    shown = re.search(r"^To append to your config use \+(.+)$", reported, re.MULTILINE)
    wrong = shown.group(1) if shown else misspelt.group(1)
    of_hydra = key.startswith("hydra.")
    if overrides is None:
        options, overrides = config_options(sys.argv[1:])
        config_dir = options.get("config_dir")
    config = _composed(overrides, wrong, config_dir, of_hydra)
    answer = _new_in_dictionary(config, key, wrong)
    if answer is not None:
        return answer
    elsewhere = _elsewhere(config, key)
    if elsewhere is not None:
        return f"there is no setting {key}: {elsewhere}"
    valid = _settings_of(config.hydra, "hydra.") if of_hydra else _settings_of(config)
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.9) or difflib.get_close_matches(key, valid, cutoff=0.6)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    meant += "It is one of sweep=optuna and sweep=pareto. " if key == "hydra.sweeper.n_trials" else ""
    listed = "hydra" if of_hydra else "job"
    return f"there is no setting {key}. {meant}`harness-train --cfg {listed}` lists all of them.\n({reported})"


def _elsewhere(config: DictConfig, key: str) -> str | None:
    """Sentence of the class that a section is for (``settings_elsewhere``) on a setting that has another place."""
    section, _, rest = key.partition(".")
    target = OmegaConf.select(config, f"{section}._target_")
    if not isinstance(target, str):
        return None
    try:
        made = instantiate({"_target_": target, "_partial_": True}).func
    except hydra.errors.InstantiationException:
        return None
    found: str | None = getattr(made, "settings_elsewhere", {}).get(rest.partition(".")[0])
    return found


def _unwritable(text: str) -> str | None:
    """Message of an output directory that Hydra could not make, by its traceback; None if it is of other things."""
    found = re.findall(r"^\w*Error: \[Errno \d+\] (.+?): '(.+)'$", text, re.MULTILINE)
    if not found or not text.endswith(f"'{found[-1][1]}'") or "mkdir(" not in text:
        return None
    reason, path = found[-1]
    return (
        f"the output directory cannot be made: {path} in {Path.cwd()} ({reason}). Start where you may write, or give "
        f"it a place: output_dir=/scratch/run, for a sweep hydra.sweep.dir=/scratch/sweep."
    )


def _ungrammatical(overrides: Sequence[str]) -> str | None:
    """Message of the argument that is against Hydra's grammar, with the quotes that it needs; None if there is none."""
    for override in overrides:
        found = _refused_by_grammar(override)
        if found is None:
            continue
        name, equals, value = override.partition("=")
        if not equals:
            return (
                f"the argument {shlex.quote(override)} has no value: a setting is given as name=value, and taken away "
                f"as ~name."
            )
        for quoted in (_quoted(value), _list_with_quotes(value)):
            fixed = f"{name}={quoted}"
            if quoted is not None and _refused_by_grammar(fixed) is None:
                return (
                    f"the argument {shlex.quote(override)} has characters that mean something to Hydra ({found}). "
                    f"Quote its value, once for Hydra and once for the shell:\n  {shlex.quote(fixed)}"
                )
        return f"the argument {shlex.quote(override)} is none that Hydra can read: {found}"
    return None


def _refused_by_grammar(override: str) -> str | None:
    """Complaint of Hydra's grammar about an override; None if it can be read."""
    try:
        OverridesParser.create().parse_override(override)
    except hydra.errors.HydraException as error:
        return str(error).splitlines()[0]
    return None


def _quoted(value: str) -> str | None:
    """A value in quotes of Hydra; None for a list or dictionary, which they would turn into text."""
    if value[:1] in ("[", "{"):
        return None
    kind = '"' if '"' not in value else "'"
    escaped = re.sub(r"(\\*)" + kind, lambda found: found.group(1) * 2 + "\\" + kind, value)
    return kind + re.sub(r"(\\+)$", r"\1\1", escaped) + kind


def _list_with_quotes(value: str) -> str | None:
    """A list whose entries are in quotes where they need them."""
    if not re.fullmatch(r"\[.*\]", value) or any(bracket in value[1:-1] for bracket in "[]{}"):
        return None
    entries = [entry.strip() for entry in value[1:-1].split(",")]
    return "[" + ",".join(f"{_quoted(each)}" if _refused_by_grammar(f"x={each}") else each for each in entries) + "]"


def _composed(overrides: Sequence[str], wrong: str, config_dir: str | None, of_hydra: bool) -> DictConfig:
    """Compose the config that a wrong override was applied to: all choices, and the values given before it."""
    folders = [Path(config_folder()), *([Path(config_dir).absolute()] if config_dir else [])]
    before = list(overrides).index(wrong) if wrong in overrides else len(overrides)
    chosen = [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in overrides]
    kept = [f"hydra.searchpath=[file://{folder}]" for folder in folders[1:]]
    kept += [
        override
        for number, override in enumerate(overrides)
        if override != wrong and (number < before or any((folder / chosen[number]).is_dir() for folder in folders))
    ]
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        try:
            return compose("train", kept, return_hydra_config=of_hydra)
        except hydra.errors.HydraException:  # such as values of a sweep
            good: list[str] = []
            for override in kept:
                with suppress(hydra.errors.HydraException):
                    compose("train", [*good, override])
                    good.append(override)
            return compose("train", good, return_hydra_config=of_hydra)


def _new_in_dictionary(config: DictConfig, key: str, wrong: str) -> str | None:
    """Message of a name that a dictionary of names, such as coefficients, does not have; None if it is none.

    Args:
        config: what the override was given for.
        key: dotted name of what is not there.
        wrong: the override.
    """
    place, _, name = key.rpartition(".")
    node = _at(config, place)
    given, _, value = wrong.partition("=")
    if node is _ABSENT or place.startswith("hydra."):
        return None
    if given.startswith(f"{place}."):
        for part in reversed(given.removeprefix(f"{place}.").split(".")):
            value = f"{{{part}: {value}}}"  # as a dictionary at `place`
    anew = f"{shlex.quote(f'~{place}')} {shlex.quote(f'+{place}={value}')}"
    if isinstance(node, dict) and "_target_" in node:
        if given != place or "_target_" not in value:
            return None
        return (
            f"{place} is a {node['_target_']}, which a dictionary on the command line is merged into, and "
            f"has no {name}. To put another one in its place:\n  {anew}"
        )
    if "." not in place:  # a group
        return None
    if node is None:
        return f"{place} is null, and takes no {name} alone. Give all of it:\n  {shlex.quote(f'{place}={value}')}"
    if not isinstance(node, dict):
        return None
    names = [str(each) for each in node]
    if name in names:
        return (
            f"{place}.{name} is no dotted name, since {name} is a number. Write\n  {shlex.quote(f'+{place}={value}')}"
        )
    meant = did_you_mean(name, names) if not name.lstrip("-").isdigit() else ""
    if meant and given != place:
        anew = f"{shlex.quote(f'~{place}')} {shlex.quote(f'+{place}={{...}}')}"
    has = f"it has {', '.join(names)}" if names else "it is empty"
    return (
        f"{place} has no {name}; {has}. {meant}A dictionary on the "
        f"command line is merged into the one of the file, and new names in it need a +:\n"
        f"  {shlex.quote(f'+{wrong}')}  adds them" + f"\n  {anew}  puts these in the place of all" * bool(names)
    )


_ABSENT = object()


def _at(config: DictConfig, place: str) -> Any:
    """Value at a dotted name, also below keys that are numbers, with interpolations as text; or ``_ABSENT``."""
    found: Any = OmegaConf.to_container(config)
    for part in place.split("."):
        if not isinstance(found, dict):
            return _ABSENT
        found = {str(key): value for key, value in found.items()}.get(part, _ABSENT)
    return found


def _settings_of(config: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    return list(_names(OmegaConf.to_container(config), prefix))


def _names(content: Any, prefix: str) -> Iterator[str]:
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
