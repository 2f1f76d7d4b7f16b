"""Command lines of runs and sweep points: overrides, names, groups, objectives."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

__all__ = [
    "QUIET_RANK",
    "TYPED",
    "Command",
    "as_typed",
    "asks_for_sweep",
    "command",
    "goes_on",
    "group",
    "label",
    "objective",
    "point_name",
    "sweep_dir",
    "typed",
]


@dataclass(frozen=True)
class Command:
    """What a run was asked for."""

    typed: tuple[str, ...]
    """Arguments of the command line; those of the whole sweep for a point of one."""
    overrides: tuple[str, ...]
    """Hydra's overrides of this run; of a point, with its own values."""
    point: int | None = None
    """Number in the sweep; None for a run on its own."""

    @property
    def identity(self) -> list[str]:
        """What is the same if the same run is asked for again: in any order, and whether it is to be resumed or not."""
        given = self.typed if self.point is None else self.overrides
        return sorted(str(each) for each in given if not str(each).lstrip("+").startswith("resume="))


TYPED = "HARNESS_COMMAND"
"""Environment variable with the arguments of a sweep, for processes that a launcher starts for its points."""

# hydra.run.dir is a folder that is there: Hydra would make one on this rank's node too
QUIET_RANK = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.run.dir=."]
"""What :mod:`harness.train` adds to the arguments of ranks other than 0."""


def typed() -> tuple[str, ...]:
    """Arguments of the command line, as the user has typed them."""
    handed = os.environ.get(TYPED)
    return tuple(json.loads(handed) if handed else [each for each in sys.argv[1:] if each not in QUIET_RANK])


def asks_for_sweep(arguments: Sequence[str]) -> bool:
    """Whether a command line starts a sweep: by ``--multirun``, ``hydra.mode`` or a file of ``conf/sweep``."""
    plain = [each.lstrip("+").replace(" ", "") for each in arguments]
    return bool(
        {"-m", "--multirun"} & set(plain)
        or any(each.startswith("sweep=") and each not in ("sweep=null", "sweep=") for each in plain)
        or "hydra.mode=MULTIRUN" in plain
    )


def command() -> Command:
    """What the run that Hydra has started now was asked for."""
    if not HydraConfig.initialized():
        return Command(typed(), ())
    hydra = HydraConfig.get()
    return Command(
        typed(), as_typed(hydra.overrides.task), None if OmegaConf.is_missing(hydra.job, "num") else int(hydra.job.num)
    )


def as_typed(overrides: Any) -> tuple[str, ...]:
    """Hydra's list of overrides with interpolations as they are: ``${oc.env:...}`` may be a secret."""
    return tuple(str(each) for each in cast(list[Any], OmegaConf.to_container(overrides, resolve=False)))


def _is_point() -> bool:
    return HydraConfig.initialized() and command().point is not None


def point_name() -> str | None:
    """Swept values of a point, such as ``forces=10,total_energy=1``; None for a run on its own.

    That is what the point's overrides have beyond those which the command line and ``hydra.sweeper.params`` fix. A
    setting goes by the last part of its name if no other one has that.
    """
    if not _is_point():
        return None
    params = HydraConfig.get().sweeper.get("params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *typed()]
    fixed = {key for key, is_swept in map(_parsed, given) if not is_swept}
    swept = {}
    for override in command().overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key not in fixed:
            swept[key] = value
    endings = Counter(key.rpartition(".")[2] for key in swept)
    names = {key: key.rpartition(".")[2] if endings[key.rpartition(".")[2]] == 1 else key for key in swept}
    return ",".join(f"{names[key]}={_short(value)}" for key, value in swept.items()) or None


def _parsed(argument: str) -> tuple[str, bool]:
    """Key of an argument, and whether it gives several values to sweep over."""
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(argument)
        return override.get_key_element().lstrip("+"), override.is_sweep_override()
    return argument, False


def _short(value: str) -> str:
    """A number that a sampler has drawn, to four digits."""
    with suppress(ValueError):
        if len(value) > 6 and "." in value:
            return f"{float(value):.4g}"
    return value


def label(number: int, name: str | None) -> str:
    """How messages call a point."""
    return f"point {number} ({name})" if name else f"point {number}"


def sweep_dir() -> Path:
    """Directory of the sweep that this run is a point of."""
    return Path(str(HydraConfig.get().sweep.dir)).absolute()


def group(name: str) -> str:
    """Group of a run in W&B: its name, and for a point the directory of its sweep, which all its points share."""
    return f"{name}/{sweep_dir().name}" if _is_point() else name


def goes_on(config: DictConfig) -> bool:
    """Whether a run is to go on where the same command was interrupted, and a sweep to leave what has finished."""
    restarts = max(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return bool(config.resume == "auto" or (config.resume == "restart" and restarts > 0))


def objective(config: DictConfig, values: Mapping[str, Any]) -> float | tuple[float | None, ...] | None:
    """What a sampler gets to see of a run: the monitored value, or those of ``objectives``. None if it is NaN."""

    def value(key: str) -> float | None:
        found = values.get(key)
        return None if found is None or found != found else float(found)

    keys = config.get("objectives")
    return tuple(value(key) for key in keys) if keys else value(config.monitor)
