"""Folder of the configs, and the functions that they call as ``${harness.devices:}`` and the like."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness.distributed import launched_on_node, launched_ranks
from harness.runs import RUN_STAMP, group, point_name

__all__ = ["config_folder", "now", "register_resolvers"]


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


def register_resolvers() -> None:
    """Register the functions that ``conf/`` calls as ``${harness.devices:}`` and the like."""
    cached: dict[str, Callable[..., Any]] = {
        "harness.run_stamp": lambda: os.environ.get(RUN_STAMP) or now(),
        "harness.part": _part,
        # of a model's weights, for a precision of the trainer
        "harness.weights_dtype": lambda precision: "float64" if str(precision) in ("64", "64-true") else "float32",
        # online only with a key; otherwise a run is kept on disk for `wandb sync`
        "harness.wandb_offline": lambda: not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()),
    }
    # not cached: each rank and each sweep point has its own
    own: dict[str, Callable[..., Any]] = {
        # ranks that a launcher has started on this node; one without a launcher
        "harness.devices": launched_on_node,
        "harness.nodes": lambda: launched_ranks() // launched_on_node(),
        "harness.point_name": point_name,
        "harness.group": group,
    }
    for name, resolver in cached.items():
        OmegaConf.register_new_resolver(name, resolver, use_cache=True, replace=True)
    for name, resolver in own.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
