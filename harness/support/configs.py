"""Configs: the objects that OmegaConf has wrapped, and keys that are taken out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

__all__ = ["take_out", "unwrapped"]


def unwrapped(value: Any) -> Any:
    """The dataclass instance behind a config, or the config's content; any other value as it is.

    ``hydra.utils.instantiate`` puts what it has made into OmegaConf's lists and dictionaries, unless it is asked for
    ``_convert_="all"``, and these turn dataclass instances, such as field modifiers and schedules, into configs.
    """
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def take_out(section: Mapping[str, Any], key: str, default: Any = None) -> tuple[Mapping[str, Any], Any]:
    """Copy of a section without a key, and the value of that key; interpolations still resolve in the copy."""
    if not isinstance(section, DictConfig):
        return {name: value for name, value in section.items() if name != key}, section.get(key, default)
    rest = copy.deepcopy(section)  # which keeps the parent
    with flag_override(rest, ["struct", "readonly"], False):
        value = rest.pop(key, default)
    return rest, value
