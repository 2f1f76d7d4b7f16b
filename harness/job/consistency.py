"""Consistency of the ranks: the same versions, settings and data on all, before anything is trained or written."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import harness
from harness.data.reading import file_fingerprint
from harness.distributed import START_LIMIT, decide, other_than_first

__all__ = ["MAY_DIFFER", "Facts", "data_facts", "difference", "facts", "refusal", "settings_of", "versions"]


def refusal(
    error: str | None, facts: Facts | None = None, timeout: timedelta = START_LIMIT, stage: str = "start"
) -> str | None:
    """Reason why the job cannot start, the same text on all ranks, or None if it can on each of them.

    Each rank compares its facts with those of rank 0, which then reduces the answers of all ranks to one.

    Args:
        error: message of a mistake that this rank has found.
        facts: of this rank, see :func:`facts`.
        timeout: how long ranks wait for each other.
        stage: name of the exchange, different from those of other exchanges.

    Raises:
        RankAbsentError: some ranks did not answer in time; they are named.
    """
    first = other_than_first(f"{stage}/facts", json.dumps(facts or {}), timeout)
    differs = None if first is None else difference(json.loads(first), facts or {})
    return decide(stage, json.dumps([socket.gethostname(), differs, error]), _reason, timeout) or None


def _reason(answers: list[str]) -> str:
    """Text for all ranks from ``[host, difference, error]`` of each, on rank 0; empty if the job can start.

    A disagreement comes first, since it may be the cause of an error.
    """
    found = [json.loads(answer) for answer in answers]
    disagreeing = [rank for rank, (_, differs, _) in enumerate(found) if differs]
    if disagreeing:
        rank, count = disagreeing[0], len(disagreeing)
        host, (section, name, first, own), _ = found[rank]
        text = (
            f"the ranks disagree on the {section} {name}:\n  {first} on rank 0 (host {found[0][0]})\n"
            f"  {own} on rank {rank} (host {host})\n{_FIXES[section]}"
        )
        return text + (f"\n{count} of {len(found)} ranks disagree with rank 0." if count > 1 else "")
    errors = [(rank, host, error) for rank, (host, _, error) in enumerate(found) if error]
    if not errors:
        return ""
    rank, host, error = errors[0]
    everywhere = len({error for _, _, error in errors}) == 1 and len(errors) == len(found)
    return error if everywhere else f"on rank {rank} (host {host}): {error}"


_FIXES = {
    "version": "Install the same environment on all nodes, or start from one checkout that all nodes see.",
    "setting": "Start all nodes with the same command line and config directory.",
    "data": "Give all nodes the same files: a shared file system, or fresh copies.",
}


_OF_WANDB = (
    "project",
    "entity",
    "name",
    "group",
    "id",
    "dir",
    "offline",
    "start_timeout",
    "finish_timeout",
    "settings",
)
MAY_DIFFER = (
    *("output_dir", "ckpt_path", "init_from", "data.train", "data.val", "data.test", "data.cache_dir"),
    *(f"logger.*.{name}" for name in _OF_WANDB),
)
"""Settings that may differ between nodes: the output directory; what follows W&B's own variables and its key, which
rank 0 alone needs; and paths of files, whose content is compared instead (the paths themselves, if the data module has
no ``fingerprint``)."""

Facts = dict[str, dict[str, str]]
"""Section → name → value; values are texts, compared and shown as they are."""


def facts(config: DictConfig, datamodule: LightningDataModule | None) -> Facts:
    """Versions, settings and data of this rank, by section and name.

    Args:
        config: of this rank.
        datamodule: of this rank, set up; None if it could not be made, which is an error of its own.
    """
    settings = settings_of(config)
    described = {
        "version": versions(),
        "setting": {name: repr(value) for name, value in settings.items() if not _may_differ(name)},
    }
    if datamodule is not None:
        described["data"] = data_facts(config, datamodule)
        start = config.ckpt_path or config.get("init_from")
        if start:
            described["data"]["checkpoint"] = file_fingerprint(Path(start))
    return described


def data_facts(config: DictConfig, datamodule: LightningDataModule) -> dict[str, str]:
    """Facts of the data by name: its ``fingerprint()``, or the paths in the config where it has none."""
    if hasattr(datamodule, "fingerprint"):
        return dict(datamodule.fingerprint())
    settings = settings_of(config)
    return {name: repr(settings[name]) for name in sorted(settings) if name.startswith("data.") and _may_differ(name)}


def difference(first: Mapping[str, Mapping[str, str]], second: Mapping[str, Mapping[str, str]]) -> list[str] | None:
    """The first name with different values, as ``[section, name, value, other value]``; None if all are the same.

    Sections that only one of the two has are left out.
    """
    for section in first:
        if section not in second:
            continue
        left, right = first[section], second[section]
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                return [section, name, left.get(name, "not set"), right.get(name, "not set")]
    return None


def _may_differ(name: str) -> bool:
    patterns = (pattern for key in MAY_DIFFER for pattern in (key, f"{key}.*"))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def versions() -> dict[str, str]:
    """Versions of the package and of the libraries that decide what is trained, by name."""
    return {
        "harness": harness.__version__,
        "the sources of harness": _sources(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


@cache
def _sources() -> str:
    """Digest of the source files: checkouts of one version may have different code."""
    folder, digest = Path(harness.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def settings_of(config: DictConfig, masked: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Every value of the resolved configuration, by its dotted name; the output directory is ``<output_dir>``.

    Args:
        config: the whole configuration.
        masked: makes the nested dictionary of settings another one, such as one without secrets.
    """
    # values that are made of the output directory may differ as it does
    neutral = OmegaConf.merge(config, {"output_dir": "<output_dir>"})
    try:
        resolved: Any = OmegaConf.to_container(neutral, resolve=True)
    except OmegaConfBaseException:  # of a value that no part reads; where one does, it is an error of its own
        resolved = OmegaConf.to_container(neutral)
    return dict(_leaves(resolved if masked is None else masked(resolved)))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        children = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, child in children:
        yield from _leaves(child, f"{name}.{key}" if name else str(key))
    if not children:
        yield name, value
