"""Folder of the configs, and the functions that they call as ``${harness.devices:}`` and the like."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.config.precision import DEFAULT, places, weights_dtype
from harness.distributed import launched_on_node, launched_ranks
from harness.loggers import wandb_variables
from harness.runs import RUN_STAMP, group, point_name, point_number

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


def _wandb_dir(save_dir: str, output_dir: str) -> str:
    """Folder of W&B's files: ``WANDB_DIR`` if there is one, and the user has not given another ``save_dir``."""
    return wandb_variables.variable("DIR", save_dir) if save_dir == output_dir else save_dir


def _wandb_id() -> str | None:
    """Id of W&B's run by ``WANDB_RUN_ID``; each point of a sweep has a run of its own, with its number in the id."""
    run_id, point = wandb_variables.variable("RUN_ID", None), point_number()
    return run_id if run_id is None or point is None else f"{run_id}-{point}"


def _precision(place: str, _root_: DictConfig) -> str:
    """``data`` or ``trainer``: the setting of that place that ``precision`` stands for."""
    return str(getattr(places(_root_.get("precision", DEFAULT)), place))


def _recorded_cutoff(*paths: str | None) -> float | None:
    """Cutoff in Å of the first checkpoint that is given and can be read; None without one."""
    for path in filter(None, paths):
        from harness.checkpoints import read  # here, with torch: hardly any command names a checkpoint

        with suppress(Exception):  # what is wrong with a file is told where it is read for good
            found = (read(path).get("made_with") or {}).get("cutoff")
            return None if found is None else float(found)
    return None


def register_resolvers() -> None:
    """Register the functions that ``conf/`` calls as ``${harness.devices:}`` and the like."""
    cached: dict[str, Callable[..., Any]] = {
        "harness.run_stamp": lambda: os.environ.get(RUN_STAMP) or now(),
        "harness.part": _part,
        "harness.weights_dtype": weights_dtype,
        "harness.recorded_cutoff": _recorded_cutoff,
        "harness.first": lambda *values: next((value for value in values if value is not None), None),
        "harness.wandb_offline": lambda: wandb_variables.mode(None, None) == "offline",  # of runs of version 0.1.0
    }
    # not cached: each rank and each sweep point has its own
    own: dict[str, Callable[..., Any]] = {
        # ranks that a launcher has started on this node; one without a launcher
        "harness.devices": launched_on_node,
        "harness.nodes": lambda: launched_ranks() // launched_on_node(),
        "harness.precision": _precision,
        "harness.point_name": point_name,
        "harness.group": group,
        "harness.wandb": wandb_variables.variable,
        "harness.wandb_dir": _wandb_dir,
        "harness.wandb_id": _wandb_id,
    }
    for name, resolver in cached.items():
        OmegaConf.register_new_resolver(name, resolver, use_cache=True, replace=True)
    for name, resolver in own.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
