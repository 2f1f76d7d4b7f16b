"""Start of a training from a checkpoint with other settings than it was made with, or from its weights alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from harness.checkpoints import read
from harness.job.made_with import MADE_WITH, NOT_SET, differences
from harness.job.match import is_made_anew, rule_of
from harness.models.conversion import patterns
from harness.module import ForceFieldModule
from harness.trained.checkpoint import model_weights

__all__ = ["StartedFrom", "changed_settings", "check_continuation", "load_initial_weights"]

_OF_THE_MODULE = ("freeze", "freeze.*", "optimizer", "optimizer.*", "lr_scheduler", "lr_scheduler.*", "data.batch_size")
"""Settings that the module compares by the states that they have made."""


def check_continuation(path: str, module: ForceFieldModule, trainer: Trainer) -> None:
    """Refuse a training that cannot go on from a checkpoint; nothing is changed.

    Raises:
        ValueError: with the reason.
    """
    module.go_on_from(read(path), trainer)


def changed_settings(path: str, config: DictConfig) -> list[str]:
    """Lines for the settings that differ from those of a checkpoint, ``name: before → now``.

    Those of the optimizer and the learning-rate scheduler are told by the module; those that concern the model are
    compared by :mod:`harness.job.match`.
    """
    record = read(path).get(MADE_WITH)
    if not isinstance(record, Mapping):
        return []
    changed = _whole_parts(differences(record, config))
    own = {(name, str(before), str(now)) for name, before, now in changed if "." not in name}
    return [
        f"{name}: {before} → {now}"
        for name, before, now in changed
        if rule_of(name) is None
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _OF_THE_MODULE)
        # trainer.max_epochs follows max_epochs
        and ("." not in name or (name.rpartition(".")[2], str(before), str(now)) not in own)
    ]


def _whole_parts(changed: Sequence[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Differences with one entry, of the class, for a part such as a callback that only one of the two commands has."""
    ending = "._target_"
    parts = {name.removesuffix(ending) for name, *pair in changed if name.endswith(ending) and NOT_SET in pair}
    found: list[tuple[str, Any, Any]] = []
    for name, before, now in changed:
        if name.removesuffix(ending) in parts and name.endswith(ending):
            old, new = (value if value == NOT_SET else str(value).rpartition(".")[2] for value in (before, now))
            found.append((name.removesuffix(ending), old, new))
        elif not any(name.startswith(f"{part}.") for part in parts):
            found.append((name, before, now))
    return found


@dataclass(frozen=True)
class StartedFrom:
    """Weights that a training has begun with.

    Attributes:
        lines: to print, names as patterns.
        facts: the same as plain data, with every name.
    """

    lines: list[str]
    facts: dict[str, Any]


def load_initial_weights(path: str, module: ForceFieldModule, anew: Sequence[str] = ()) -> StartedFrom:
    """Load the weights of a checkpoint into a new training; averaged ones where there are both.

    Args:
        path: of the checkpoint.
        module: of the training, whose model has the weights of the checkpoint by name and shape.
        anew: patterns of names of weights that the model keeps as it was made with them.
    """
    checkpoint = read(path)
    weights, own = model_weights(checkpoint), module.model.state_dict()
    loaded = {name: value for name, value in weights.items() if not is_made_anew(name, anew)}
    left_out = [name for name in weights if name not in loaded]
    made_anew = [name for name in own if is_made_anew(name, anew)]
    module.model.load_state_dict(loaded, strict=not anew)
    kind = "averaged weights" if "current_model_state" in checkpoint else "weights"
    lines = [
        f"starts from the {kind} of {path} ({len(loaded)} tensors, of step {checkpoint['global_step']}): a new "
        f"training, whose optimizer, epochs and steps begin at 0",
        f"loaded: {patterns([name for name in loaded if name in dict(module.model.named_parameters())])}; left out: "
        f"{patterns(left_out)}; made anew: {patterns(made_anew)}",
    ]
    facts = {"file": Path(path).name, "loaded": list(loaded), "left_out": left_out, "made_anew": made_anew}
    return StartedFrom(lines, facts)
