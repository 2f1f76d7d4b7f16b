"""Command lines of runs and sweep points: overrides, names, groups, objectives."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

__all__ = [
    "POINT",
    "QUIET_RANK",
    "RUN_STAMP",
    "TYPED",
    "Command",
    "SweepPoint",
    "arguments_of_rank",
    "as_typed",
    "asks_for_sweep",
    "command",
    "config_options",
    "goes_on",
    "group",
    "hydra_elsewhere",
    "label",
    "objective",
    "point_name",
    "point_number",
    "sweep_dir",
    "swept_settings",
    "typed",
    "with_run_dir",
]


@dataclass(frozen=True)
class Command:
    """Command line and overrides that a run was started with."""

    typed: tuple[str, ...]
    """Arguments of the command line; those of the whole sweep for a point of one."""
    overrides: tuple[str, ...]
    """Hydra's overrides of this run; of a point, with its own values."""
    point: int | None = None
    """Number in the sweep; None for a run on its own."""

    @property
    def identity(self) -> list[str]:
        """Arguments by which the same run is known again: sorted, and without ``resume``."""
        given = self.typed if self.point is None else self.overrides
        return sorted(str(argument) for argument in given if not str(argument).lstrip("+").startswith("resume="))


TYPED = "HARNESS_COMMAND"
"""Environment variable with the arguments of a sweep, for processes that Hydra's launchers start for its points."""
RUN_STAMP = "HARNESS_RUN_STAMP"
"""Environment variable with the moment that a run's directory is named by: the same on all ranks."""
POINT = "HARNESS_POINT"
"""Environment variable with a :class:`SweepPoint`, for the ranks that ``hydra/launcher=torchrun`` starts for it."""


@dataclass(frozen=True)
class SweepPoint:
    """A point of a sweep, as ``hydra/launcher=torchrun`` describes it to its ranks.

    Args:
        number: of the sweep point, from 0.
        name: its swept values, see :func:`point_name`.
        sweep_dir: directory of the sweep.
        typed: arguments of the command line of the sweep.
    """

    number: int
    name: str | None
    sweep_dir: str
    typed: tuple[str, ...]

    @classmethod
    def of_environment(cls) -> SweepPoint | None:
        """The sweep point that this process is a rank of, if it is one."""
        given = os.environ.get(POINT)
        if not given:
            return None
        found = json.loads(given)
        return cls(found["number"], found["name"], found["sweep_dir"], tuple(found["typed"]))

    def to_json(self) -> str:
        """Value of the variable :data:`POINT`."""
        return json.dumps(asdict(self))


# not by hydra/job_logging=none: overrides of hydra.job_logging would have nothing to change then
_QUIET = ("hydra.output_subdir=null", "hydra.job_logging.root=null", "hydra.hydra_logging.root=null")
# a folder that is there: Hydra would make one on this rank's node too
QUIET_RANK = (*_QUIET, "hydra.run.dir=.")
"""Arguments that :mod:`harness.train` adds on ranks other than 0."""


def arguments_of_rank(arguments: Sequence[str], rank: int) -> list[str]:
    """Arguments of the command line for a rank of a launcher: rank 0 alone writes the files and the log of Hydra.

    The ranks of a sweep point keep its folder, which its launcher has made.
    """
    if rank == 0:
        return list(arguments)
    return [*arguments, *(QUIET_RANK if SweepPoint.of_environment() is None else _QUIET)]


def with_run_dir(arguments: Sequence[str], is_sweep: bool) -> list[str]:
    """Arguments of the command line, with ``hydra.run.dir`` where ``output_dir`` was given: one directory has both.

    Raises:
        ValueError: two directories were given, or one for all points of a sweep.
    """
    by_key = {
        key: argument.partition("=")[2]
        for key in ("output_dir", "hydra.run.dir")
        for argument in arguments
        if argument.lstrip("+").startswith(f"{key}=")
    }
    output_dir, run_dir = by_key.get("output_dir"), by_key.get("hydra.run.dir")
    if output_dir is None:
        return list(arguments)
    if is_sweep:
        raise ValueError(
            f"output_dir={output_dir} would be the directory of every point of the sweep, and they would write over "
            f"each other. Give the sweep a directory, in which each point has its own: hydra.sweep.dir={output_dir}"
        )
    if run_dir is None:
        return [*arguments, f"hydra.run.dir={output_dir}"]
    if run_dir != output_dir:
        raise ValueError(
            f"output_dir={output_dir} and hydra.run.dir={run_dir} are two directories for one run: what reads it would "
            f"not find its configuration. Give one of them; the other one follows."
        )
    return list(arguments)


def hydra_elsewhere(config: DictConfig) -> str | None:
    """Message of an ``output_dir`` that is not where Hydra writes, as one of a file would be; None if they agree."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get().runtime.output_dir
    if Path(str(config.output_dir)).absolute() == Path(str(hydra)).absolute():
        return None
    return (
        f"output_dir is {config.output_dir}, but Hydra writes the configuration of the run in {hydra}: what reads it "
        f"would not find both. In a file of the configuration, set hydra.run.dir (of a sweep: hydra.sweep.dir), which "
        f"output_dir follows."
    )


def typed() -> tuple[str, ...]:
    """Arguments of the command line, as the user has typed them; those of the whole sweep for a point of one."""
    point = SweepPoint.of_environment()
    if point is not None:
        return point.typed
    handed = os.environ.get(TYPED)
    return tuple(json.loads(handed)) if handed else tuple(word for word in sys.argv[1:] if word not in QUIET_RANK)


def config_options(arguments: Sequence[str], every: bool = False) -> tuple[dict[str, str], list[str]]:
    """Options of a command line by which Hydra finds the configuration, such as ``config_dir``, and the overrides.

    Args:
        arguments: of the command line.
        every: also what is meant for an override and is none, since it has no ``=``.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for option, short in (("--config-dir", "-cd"), ("--config-path", "-cp"), ("--config-name", "-cn")):
        parser.add_argument(option, short)
    parser.add_argument("--cfg", "-c")  # otherwise -c is an abbreviation of any of them
    options, others = parser.parse_known_args(list(arguments))
    overrides = [argument for argument in others if "=" in argument or argument.startswith("~")]
    if every:
        overrides = [argument for argument in others if not argument.startswith("-")]
    return {name: value for name, value in vars(options).items() if value is not None and name != "cfg"}, overrides


def asks_for_sweep(arguments: Sequence[str]) -> bool:
    """True for a command line of a sweep: by ``--multirun``, ``hydra.mode`` or a file of ``conf/sweep``."""
    plain = [argument.lstrip("+").replace(" ", "") for argument in arguments]
    return bool(
        {"-m", "--multirun"} & set(plain)
        or any(argument.startswith("sweep=") and argument not in ("sweep=null", "sweep=") for argument in plain)
        or "hydra.mode=MULTIRUN" in plain
    )


def command() -> Command:
    """Command of the run that Hydra has started in this process."""
    if not HydraConfig.initialized():
        return Command(typed(), ())
    hydra = HydraConfig.get()
    return Command(
        typed(), as_typed(hydra.overrides.task), None if OmegaConf.is_missing(hydra.job, "num") else int(hydra.job.num)
    )


def as_typed(overrides: Any) -> tuple[str, ...]:
    """Hydra's list of overrides, with its interpolations unresolved: ``${oc.env:...}`` may be a secret."""
    return tuple(str(override) for override in cast(list[Any], OmegaConf.to_container(overrides, resolve=False)))


def _is_point() -> bool:
    return point_number() is not None


def point_number() -> int | None:
    """Number of this run in its sweep, from 0; None for a run on its own."""
    point = SweepPoint.of_environment()
    if point is not None:
        return point.number
    return command().point if HydraConfig.initialized() else None


def point_name() -> str | None:
    """Swept values of a sweep point, such as ``forces=10,total_energy=1``; None for a run on its own.

    These are the overrides of the point without those that the command line and ``hydra.sweeper.params`` fix. A setting
    goes by the last part of its name if no other one has that.
    """
    point = SweepPoint.of_environment()
    if point is not None:
        return point.name
    if not _is_point():
        return None
    swept = swept_settings()
    endings = Counter(key.rpartition(".")[2] for key in swept)
    names = {key: key.rpartition(".")[2] if endings[key.rpartition(".")[2]] == 1 else key for key in swept}
    return ",".join(f"{names[key]}={_short(value)}" for key, value in swept.items()) or None


def swept_settings() -> dict[str, str]:
    """Values of the settings that the sweep of this point sweeps; none for a run on its own."""
    if not HydraConfig.initialized() or not _is_point():
        return {}
    params = HydraConfig.get().sweeper.get("params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *typed()]
    fixed = {key for key, is_swept in map(_parsed, given) if not is_swept}
    swept = {}
    for override in command().overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key not in fixed:
            swept[key] = value
    return swept


def _parsed(argument: str) -> tuple[str, bool]:
    """Key of an argument, and True if it gives several values to sweep over."""
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
    """Name of a sweep point in messages."""
    return f"point {number} ({name})" if name else f"point {number}"


def sweep_dir() -> Path:
    """Directory of the sweep that this run is a point of."""
    point = SweepPoint.of_environment()
    return Path(str(HydraConfig.get().sweep.dir) if point is None else point.sweep_dir).absolute()


def group(name: str) -> str:
    """Group of a run in W&B: its name, and for a sweep point the directory of the sweep, which all its points share."""
    return f"{name}/{sweep_dir().name}" if _is_point() else name


def goes_on(config: DictConfig) -> bool:
    """True if a run is to go on where the same command was interrupted, and a sweep to keep its finished points."""
    restarts = max(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return bool(config.resume == "auto" or (config.resume == "restart" and restarts > 0))


def objective(config: DictConfig, values: Mapping[str, Any]) -> float | tuple[float | None, ...] | None:
    """Value of a run for the sampler of a sweep: that of ``monitor``, or those of ``objectives``; None for NaN."""

    def value(key: str) -> float | None:
        found = values.get(key)
        return None if found is None or found != found else float(found)

    keys = config.get("objectives")
    return tuple(value(key) for key in keys) if keys else value(config.monitor)
