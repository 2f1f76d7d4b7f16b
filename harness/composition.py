"""What Hydra composes a configuration with, and what is said of a configuration that is wrong."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc

from harness.points import group, point_name

__all__ = [
    "BAD_INPUT",
    "HINT",
    "RUN_STAMP",
    "config_folder",
    "explain",
    "message",
    "now",
    "register_resolvers",
]

RUN_STAMP = "HARNESS_RUN_STAMP"
"""Variable of the environment with the moment that a run's directory is named by: the same on all ranks."""
BAD_INPUT = (
    ValueError,
    TypeError,
    KeyError,
    OSError,
    hydra.errors.InstantiationException,
    OmegaConfBaseException,
    MisconfigurationException,
)
"""What a mistake of a user is raised as."""
HINT = "(HYDRA_FULL_ERROR=1 shows where it was found)"


def config_folder() -> str:
    """``conf/`` beside the package in a checkout, inside of it when installed."""
    inside, beside = Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf"
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


register_resolvers()


def message(error: Exception) -> str:
    """What a user needs to know of an error: its own words, and the config that Hydra was at."""
    if isinstance(error, hydra.errors.InstantiationException):
        place = str(error).splitlines()[0].removeprefix("Error ").rstrip(":")  # such as: in call to target 'x.Y'
        return f"{message(error.__cause__)} ({place})" if isinstance(error.__cause__, Exception) else str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{str(error).splitlines()[0]}. Give it on the command line, such as {error.full_key}=..."
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def explain(text: str) -> str:
    """What Hydra says of a wrong configuration, with the setting that a misspelt one may be meant for."""
    told = text.partition("Set the environment variable HYDRA_FULL_ERROR")[0].strip()
    plugin = re.search(r"Could not find 'hydra/(?:sweeper|launcher)(?:/sampler)?/(optuna|tpe|submitit_\w+|ray)'", told)
    if plugin is not None and plugin.group(1) == "ray":
        return f"hydra-ray-launcher is not installed: pip install hydra-ray-launcher.\n({told})"
    if plugin is not None:
        of = "hydra-submitit-launcher" if plugin.group(1).startswith("submitit") else "hydra-optuna-sweeper"
        return f"{of} is not installed; it comes with pip install 'potential-harness[sweep]'.\n({told})"
    if "BasicSweeper does not support sweep type" in told:
        last = told.splitlines()[-1]
        return f"a range of values needs a sampler that draws from it: sweep=optuna or sweep=pareto.\n({last})"
    misspelt = re.search(r"Could not override '([\w.]+)'", told)
    if misspelt is None:
        return told or "the configuration cannot be composed"
    full = re.search(r"^\s*full_key: ([\w.]+)", told, re.MULTILINE)  # a key within the value that was given
    key = full.group(1) if full else misspelt.group(1)
    of_hydra = key.startswith("hydra.")
    close = difflib.get_close_matches(key, _valid_settings("hydra" if of_hydra else None), n=3, cutoff=0.6)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    meant += "It is one of sweep=optuna and sweep=pareto. " if key == "hydra.sweeper.n_trials" else ""
    listed = "hydra" if of_hydra else "job"
    return f"there is no setting {key}. {meant}`harness-train --cfg {listed}` lists all of them.\n({told})"


def _valid_settings(part: str | None = None) -> list[str]:
    """Dotted names of all settings, or of those of Hydra, with the choices of groups that have been typed."""
    folder = Path(config_folder())
    choices = [each for each in sys.argv[1:] if (folder / each.partition("=")[0]).is_dir()]
    with initialize_config_dir(str(folder), version_base="1.3"):
        try:
            config = compose("train", choices, return_hydra_config=part is not None)
        except hydra.errors.HydraException:  # a choice of a directory of the user's own
            config = compose("train", return_hydra_config=part is not None)
        return _settings_of(config[part], f"{part}.") if part else _settings_of(config)


def _settings_of(config: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    names = []
    for key in map(str, config):
        node = config._get_node(key)
        names.append(f"{prefix}{key}")
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            names += _settings_of(node, f"{prefix}{key}.")
    return names
