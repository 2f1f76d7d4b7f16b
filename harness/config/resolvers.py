"""Folder of the configs, and the functions that they call as ``${harness.devices:}`` and the like."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from harness.runs import group, point_name

__all__ = ["RUN_STAMP", "config_folder", "now", "register_resolvers"]

RUN_STAMP = "HARNESS_RUN_STAMP"
"""Variable of the environment with the moment that a run's directory is named by: the same on all ranks."""


def config_folder() -> str:
    """``conf/`` beside the package in a checkout, inside of it when installed."""
    inside, beside = Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf"
    return str(inside if inside.is_dir() else beside)


def now() -> str:
    """The moment, as in the names of directories."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _part(number: float, fraction: float) -> float:
    """A fraction of a number such as ``max_epochs``, for the epochs of schedules."""
    if number < 0:
        raise ValueError(
            f"{fraction:g} of {number:g} epochs is no epoch: this schedule needs a number. Give max_epochs=..., "
            f"or write the epochs in the schedule as numbers."
        )
    return number * fraction


def register_resolvers(noted: Callable[[], None] | None = None) -> None:
    """Make the functions known that ``conf/`` calls as ``${harness.devices:}`` and the like.

    Args:
        noted: called whenever somebody asks for what each rank is to find out by itself, the number of ranks and
            variables of the environment.
    """
    of_ranks: dict[str, Callable[..., Any]] = {
        # ranks that a launcher has started on this node; one without a launcher
        "harness.devices": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "harness.nodes": lambda: int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "oc.env": oc.env,
    }
    of_all: dict[str, Callable[..., Any]] = {
        "harness.run_stamp": lambda: os.environ.get(RUN_STAMP) or now(),
        "harness.part": _part,
        # online only with a key; otherwise a run is kept on disk for `wandb sync`
        "harness.wandb_offline": lambda: not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()),
    }
    for name, resolver in of_all.items():
        OmegaConf.register_new_resolver(name, resolver, use_cache=True, replace=True)
    for name, resolver in of_ranks.items():
        OmegaConf.register_new_resolver(name, _noted(resolver, noted) if noted else resolver, replace=True)
    # not kept: each point of a sweep has its own
    OmegaConf.register_new_resolver("harness.point_name", point_name, replace=True)
    OmegaConf.register_new_resolver("harness.group", group, replace=True)


def _noted(resolver: Callable[..., Any], noted: Callable[[], None]) -> Callable[..., Any]:
    def asked(*arguments: Any) -> Any:
        noted()
        return resolver(*arguments)

    return asked
