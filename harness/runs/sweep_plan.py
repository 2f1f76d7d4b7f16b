"""Plan of a sweep: ``sweep.json`` in its directory, with the points that were asked for and how they are judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import datetime
from itertools import product
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from harness.runs.command import as_typed, typed
from harness.runs.records import report_entries, write_json

__all__ = ["SWEEP", "settings_of", "write_plan"]

SWEEP = "sweep.json"


def write_plan(folder: Path, config: DictConfig) -> None:
    """Write ``sweep.json``.

    Its entries are ``command``; ``fixed``, the settings that all points share; ``swept``, those with several values, in
    order; ``planned``, the number of points, null if it is not known; ``points``, the swept settings of each point of a
    grid, in the order of their numbers, null for other sweeps; ``monitor``, ``objectives``, and W&B's ``project``,
    ``group`` and ``entity``; ``started``.

    Args:
        folder: directory of the sweep.
        config: configuration of the sweep, as Hydra hands it to ``on_multirun_start``.
    """
    overrides = _overrides(config)
    swept = [override for override in overrides if override.is_sweep_override()]
    fixed = [override for override in overrides if not override.is_sweep_override()]
    points = _grid(swept) if OmegaConf.select(config, "hydra.runtime.choices.hydra/sweeper") == "basic" else None
    trials = OmegaConf.select(config, "hydra.sweeper.n_trials")
    with _as_point(config) as first:
        of_config = report_entries(first)
    del of_config["name"]  # of the point
    write_json(
        folder / SWEEP,
        {
            "command": list(typed()),
            "fixed": {_name(override): override.get_value_element_as_str() for override in fixed},
            "swept": [_name(override) for override in swept],
            "planned": trials if points is None else len(points),
            "points": points,
            **of_config,
            "started": datetime.now().isoformat(timespec="seconds"),
        },
    )


def settings_of(overrides: Iterable[str]) -> dict[str, str]:
    """Values of overrides as they are written, by the name of the setting."""
    pairs = [override.partition("=") for override in overrides]
    return {name.lstrip("+~"): value for name, _, value in pairs}


def _overrides(config: DictConfig) -> list[Override]:
    """Overrides of the sweeper's ``params`` and of the command line, of which the later one counts; one for a key."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    given = [f"{name}={value}" for name, value in params.items()]
    given += as_typed(config.hydra.overrides.task)
    # the loader lists the files that a glob stands for
    loader = GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else None
    with suppress(HydraException):  # params of another sweeper may have a language of their own
        parsed = OverridesParser.create(loader).parse_overrides(given)
        return list({override.get_key_element(): override for override in parsed}.values())
    return []


def _name(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _grid(swept: Sequence[Override]) -> list[dict[str, str]] | None:
    """Swept settings of all points, in the order in which Hydra's basic sweeper numbers them; None if it is not known.

    That is so for a range, which needs a sampler, and for values that Hydra is going to shuffle.
    """
    if any(not override.is_discrete_sweep() or getattr(override.value(), "shuffle", False) for override in swept):
        return None
    names = [_name(override) for override in swept]
    values = product(*(override.sweep_string_iterator() for override in swept))
    return [dict(zip(names, point, strict=True)) for point in values]


@contextmanager
def _as_point(config: DictConfig) -> Iterator[DictConfig]:
    """Configuration as the first point sees it: resolvers such as ``harness.group`` ask Hydra for the job's number."""
    hydra, first = HydraConfig.instance(), deepcopy(config)
    first.hydra.job.num = 0
    before = hydra.cfg
    hydra.set_config(first)
    try:
        yield first
    finally:
        hydra.cfg = before
