"""Models that a config names: their builders are called with plain lists, dictionaries, numbers and objects.

A section has the ``_target_`` of a builder and its arguments, as for ``hydra.utils.instantiate``, which puts lists and
dictionaries into classes of its own, and turns a dataclass into a dictionary where it is told not to. Here:

* What a builder needs of the job is handed over as the object that it is: to a parameter called ``statistics`` or
  ``type_names``, or as the section's ``needs`` says, also to builders with ``**kwargs`` and to other names.
* A nested section with a ``_target_`` is made first, unless the builder makes it itself: it has ``_recursive_: false``
  or the builder has, the builder's parameter is annotated as a dictionary, or arguments are missing that only the
  builder can give.
* Whatever another package does to the process meanwhile is undone.
"""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
import traceback
import typing
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from harness.config.explain import message
from harness.models.packages import hosting
from harness.support.arguments import misfits, type_hints
from harness.support.text import did_you_mean, some

__all__ = ["build", "build_part"]

_KEYS = ("_target_", "_recursive_", "_convert_", "_args_", "_partial_", "needs")
_SHOWN = 12  # arguments of a builder that has failed


def build(section: DictConfig, offered: Mapping[str, Any], name: str = "model") -> Any:
    """Object that a section of a config describes.

    Args:
        section: with ``_target_``, the builder's arguments, and optionally ``needs``: a list of names of what is
            offered, or a mapping of the builder's arguments to such names or their attributes, such as
            ``{avg_num_neighbors: statistics.mean_neighbors}``. Numbers of types are a dictionary by type name.
        offered: by name, what can be handed over.
        name: of the section, for messages.

    Raises:
        hydra.errors.InstantiationException: the builder fails, or a config may not call it.
        ValueError: the builder cannot be found, or ``needs`` names what there is not.
    """
    content: Any = OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
    with hosting(content["_target_"]):
        try:
            builder = _located(content["_target_"])
        except InstantiationException as error:
            if not isinstance(error.__cause__, Exception):
                raise
            raise ValueError(f"{name}._target_={content['_target_']}: {message(error)}") from error
        handed = _by_signature(builder, offered) | _by_needs(content.get("needs"), offered, name)
        return _call(builder, content, handed, name)


def build_part(section: DictConfig, name: str) -> Any:
    """Object of a section by ``hydra.utils.instantiate``, of which every plain argument is one of its annotation.

    Annotations of this package and of Lightning are held to; those of others explain a failure.

    Args:
        section: with ``_target_``.
        name: of the section, for messages.

    Raises:
        hydra.errors.InstantiationException: the target fails, or a config may not call it.
        ValueError: an argument is none that it takes.
    """
    try:
        made = instantiate(section)
    except InstantiationException as error:
        cause = error.__cause__
        wrong = _misfits_of(section, name) if isinstance(cause, Exception) and not _is_explained(cause) else []
        if not wrong:
            raise
        raise ValueError(f"{' '.join(wrong)} (target {section._target_})") from error
    wrong = _misfits_of(section, name)
    if wrong and str(section._target_).startswith(("harness.", "lightning.")):
        raise ValueError(f"{' '.join(wrong)} (target {section._target_})")
    return made


def _misfits_of(section: DictConfig, name: str) -> list[str]:
    content: Any = OmegaConf.to_container(section, resolve=True)
    given = {
        key: value
        for key, value in content.items()
        if key not in _KEYS and not (isinstance(value, dict) and "_target_" in value)
    }
    return misfits(_located(content["_target_"]), given, name)


def _located(target: str) -> Callable[..., Any]:
    # by instantiate(), which refuses targets that a config may not call; get_object() would look up anything
    return instantiate({"_target_": target, "_partial_": True}).func  # type: ignore[no-any-return]


def _call(builder: Callable[..., Any], content: Mapping[str, Any], handed: Mapping[str, Any], name: str) -> Any:
    """Result of a builder, with nested sections made first, but for those that it makes itself."""
    kept: list[str] = []
    makes_all = content.get("_recursive_") is False
    dictionaries = _dictionary_parameters(builder)
    arguments = {
        key: value if makes_all else _made(value, f"{name}.{key}", kept, key in dictionaries)
        for key, value in content.items()
        if key not in _KEYS
    }
    positional = [_made(value, f"{name}._args_", kept) for value in content.get("_args_", ())]
    call = functools.partial(builder, *positional, **{**arguments, **handed})
    if content.get("_partial_"):
        return call
    target = content["_target_"]
    wrong = misfits(builder, arguments, name)
    if wrong and _is_ours(getattr(builder, "__module__", None)):  # annotations of others may mean less
        raise ValueError(f"{' '.join(wrong)} (target {target})")
    try:
        return call()
    except Exception as error:
        note = f", which was given {' and '.join(kept)}" if kept else ""
        if wrong or not _is_explained(error):
            given = wrong or [f"{name} has {_given(builder, arguments)}."]
            note += f". {' '.join(given)}"
        raise InstantiationException(f"Error in call to target '{target}'{note}:\n{error!r}") from error


def _is_ours(module: str | None) -> bool:
    return str(module).partition(".")[0] == "harness"


def _is_explained(error: Exception) -> bool:
    """True for an error in words of this package; of a call with other arguments; or of a package that is missing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    depth = sum(1 for _ in traceback.walk_tb(error.__traceback__))
    raised_in = None if trace is None else trace.tb_frame.f_globals.get("__name__")
    return depth < 2 or _is_ours(raised_in) or isinstance(error, ModuleNotFoundError | AssertionError)


def _given(builder: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Arguments that differ from the defaults of a builder, as ``name=value``."""
    parameters = _parameters(builder)
    changed = {
        key: value for key, value in arguments.items() if key not in parameters or parameters[key].default != value
    }
    return some((f"{key}={reprlib.repr(value)}" for key, value in changed.items()), _SHOWN) or "its defaults"


def _made(value: Any, name: str, kept: list[str], as_dictionary: bool = False) -> Any:
    """A value with its nested sections made; the names of those that stay dictionaries are added to ``kept``."""
    if isinstance(value, list):
        return [_made(item, f"{name}[{index}]", kept) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: _made(item, f"{name}.{key}", kept) for key, item in value.items()}
    if as_dictionary or value.get("_recursive_") is False:
        return value
    builder = _located(value["_target_"])
    lacking = _lacking(builder, value)
    if lacking:
        kept.append(f"{name} as a dictionary, since {', '.join(lacking)} of {value['_target_']} is not given in it")
        return value
    return _call(builder, value, {}, name)


def _parameters(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(builder).parameters
    except (ValueError, TypeError):  # it has none, as some builtins
        return {}


def _lacking(builder: Callable[..., Any], content: Mapping[str, Any]) -> list[str]:
    """Parameters without a default that a section gives no argument for."""
    if content.get("_partial_") or content.get("_args_"):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [key for key, each in _parameters(builder).items() if each.kind in kinds and each.default is each.empty]
    return [key for key in needed if key not in content]


def _dictionary_parameters(builder: Callable[..., Any]) -> set[str]:
    """Parameters that are annotated as dictionaries: what a builder makes objects of by itself."""
    return {key for key, hint in type_hints(builder).items() if _is_dictionary(hint)}


def _is_dictionary(hint: Any) -> bool:
    if isinstance(hint, str):
        return re.match(r"(Optional\[)?(\w+\.)*(Dict|dict|Mapping|MutableMapping|DictConfig)\b", hint) is not None
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, UnionType):
        members = [member for member in typing.get_args(hint) if member is not NoneType]
        return bool(members) and all(map(_is_dictionary, members))
    return isinstance(origin, type) and issubclass(origin, Mapping | DictConfig)


def _by_signature(builder: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    wanted = _parameters(builder)
    return {name: value for name, value in offered.items() if name in wanted}


def _by_needs(needs: Any, offered: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Arguments that ``needs`` asks for."""
    if needs is None:
        return {}
    if isinstance(needs, list) and all(isinstance(name, str) for name in needs):
        needs = {name.rpartition(".")[2]: name for name in needs}
    if not isinstance(needs, dict) or not all(isinstance(source, str) for source in needs.values()):
        raise ValueError(
            f"{section}.needs is a list of what the builder is handed, such as [statistics, type_names], or a mapping "
            f"of its arguments to them, such as {{species: type_names}}, found {needs!r}."
        )
    return {argument: _source(source, offered, section) for argument, source in needs.items()}


def _source(source: str, offered: Mapping[str, Any], section: str) -> Any:
    """Object of a name; numbers of an attribute of it as plain ones, those of types in a dictionary."""
    name, *attributes = source.split(".")
    if offered.get(name) is None:
        known = [each for each, value in offered.items() if value is not None]
        reason = f"the data have no {name}" if name in offered else f"there is no {name}"
        raise ValueError(
            f"{section}.needs asks for {source}, but {reason}. {did_you_mean(name, known)}It can ask for "
            f"{', '.join(known) or 'nothing of these data'}."
        )
    value = offered[name]
    for attribute in attributes:
        try:
            value = getattr(value, attribute)
        except AttributeError:
            valid = sorted(each for each in dir(value) if not each.startswith("_"))
            raise ValueError(
                f"{section}.needs asks for {source}, but {name} has no {attribute}. "
                f"{did_you_mean(attribute, valid)}It has {', '.join(valid)}."
            ) from None
    if not attributes or not isinstance(value, Tensor):
        return value
    numbers, names = value.tolist(), offered.get("type_names") or ()
    return dict(zip(names, numbers, strict=True)) if value.shape == (len(names),) else numbers
