"""What is checked before anything is trained or written: mistakes that would cost an epoch, or be told in riddles."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import socket
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import harness
from harness.data.reading import file_fingerprint
from harness.distributed import START_LIMIT, decide, launched_rank, share

__all__ = ["MAY_DIFFER", "Facts", "difference", "facts", "refusal"]


def refusal(
    error: str | None, facts: Facts | None = None, timeout: timedelta = START_LIMIT, stage: str = "start"
) -> str | None:
    """Why the job cannot start, the same text on all ranks, or None if it can on each of them.

    Each rank compares itself with rank 0, and tells rank 0 what is wrong, which makes one verdict of it.

    Args:
        error: what is wrong on this rank.
        facts: what this rank must have in common with the others.
        timeout: how long ranks wait for each other.
        stage: name of the moment.

    Raises:
        RankAbsentError: some ranks did not come; they are named.
    """
    host = socket.gethostname()
    first_host, first_facts = json.loads(share(f"{stage}/facts", json.dumps([host, facts or {}]), timeout))
    differs = difference(first_facts, facts or {})
    told = None
    if differs:
        what, name, first, own = differs
        told = (
            f"the ranks disagree on the {what} {name}:\n  {first} on rank 0 (host {first_host})\n"
            f"  {own} on rank {launched_rank()} (host {host})\n{_AGREE[what]}"
        )
    return decide(stage, json.dumps([host, told, error]), _verdict, timeout) or None


def _verdict(answers: list[str]) -> str:
    """What rank 0 makes of ``[host, disagreement, error]`` of every rank: the disagreement may explain the error."""
    found = [json.loads(each) for each in answers]
    differing = [told for _, told, _ in found if told]
    if differing:
        count = len(differing)
        return differing[0] + (f"\n{count} of {len(found)} ranks disagree with rank 0." if count > 1 else "")
    wrong = [(rank, host, text) for rank, (host, _, text) in enumerate(found) if text]
    if not wrong:
        return ""
    rank, host, text = wrong[0]
    everywhere = len({text for _, _, text in wrong}) == 1 and len(wrong) == len(found)
    return text if everywhere else f"on rank {rank} (host {host}): {text}"


_AGREE = {
    "version": "Install the same environment on all nodes, or start from one checkout that all nodes see.",
    "setting": "Start all nodes with the same command line and config directory.",
    "data": "Give all nodes the same files: a shared file system, or fresh copies.",
}


MAY_DIFFER = ("output_dir", "ckpt_path", "logger.*.offline", "data.train", "data.val", "data.test", "data.cache_dir")
"""Settings that nodes may have each their own: where rank 0 writes, whether it has a W&B key, and where files are,
whose content is compared instead (the paths themselves, if the data module has no ``fingerprint``)."""

Facts = dict[str, dict[str, str]]
"""Section → name → value; all of it is text, so that it reads the same in a message as it compares."""


def facts(config: DictConfig, datamodule: LightningDataModule | None) -> Facts:
    """What this rank is about to do.

    Args:
        config: its configuration.
        datamodule: its data, set up; None if that could not be made, which then is an error of its own.
    """
    settings = _settings(config)
    may_differ = {name for name in settings if _may_differ(name)}
    described = {
        "version": _versions(),
        "setting": {name: value for name, value in settings.items() if name not in may_differ},
    }
    if datamodule is not None:
        described["data"] = (
            dict(datamodule.fingerprint())
            if hasattr(datamodule, "fingerprint")
            else {name: settings[name] for name in sorted(may_differ) if name.startswith("data.")}
        )
        if config.ckpt_path:
            described["data"]["checkpoint"] = file_fingerprint(Path(config.ckpt_path))
    return described


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
    return any(fnmatch.fnmatchcase(name, each) or fnmatch.fnmatchcase(name, f"{each}.*") for each in MAY_DIFFER)


def _versions() -> dict[str, str]:
    return {
        "harness": harness.__version__,
        "the sources of harness": _sources(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def _sources() -> str:
    """Checkouts of one version may have different code."""
    folder, digest = Path(harness.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def _settings(config: DictConfig) -> dict[str, str]:
    """Every value of the resolved configuration, by its dotted name."""
    # values that are made of the output directory may differ as it does
    neutral = OmegaConf.merge(config, {"output_dir": "<output_dir>"})
    try:
        resolved = OmegaConf.to_container(neutral, resolve=True)
    except OmegaConfBaseException:  # a value that nobody may ask for; otherwise it is told as an error of its own
        resolved = OmegaConf.to_container(neutral)
    return {name: repr(value) for name, value in _leaves(resolved)}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        children = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, child in children:
        yield from _leaves(child, f"{name}.{key}" if name else str(key))
    if not children:
        yield name, value
