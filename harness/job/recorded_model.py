"""A model whose architecture a config takes from the checkpoint that the job starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from harness.job.match import Start
from harness.models import isolated_atom_energies
from harness.trained.checkpoint import TrainedCheckpoint
from harness.trained.targets import check_targets

__all__ = ["TARGET", "ReferenceChoice", "chosen_references", "from_checkpoint", "settle_model"]

TARGET = "harness.job.from_checkpoint"
"""Builder that ``conf/model/from_checkpoint.yaml`` names."""
ReferenceChoice = str | Mapping[str, float]
"""``keep`` for the reference energies of the checkpoint, ``fit`` for those that fit the new labels, or eV by symbol."""
_OWN = ("_target_", "path", "energy_shifts", "stress", "dtype")


def from_checkpoint(path: str, **changes: Any) -> nn.Module:
    """The model of a checkpoint with its weights, whose architecture is that of the file.

    Args:
        path: of a checkpoint of this package, or of one that ``harness-convert`` has written.
        changes: arguments of its builder that replace those of the file.

    Raises:
        ValueError: the file is no such checkpoint, or names a builder that is none of this package.
    """
    return TrainedCheckpoint.read(path).build(changes=changes)


def settle_model(config: DictConfig) -> ReferenceChoice:
    """Replace the section ``model`` of ``model=from_checkpoint`` by that of the checkpoint; others stay as they are.

    So what the job writes has the whole architecture, and does not depend on the file that it started from. The record
    only names its builder: one that is none of this package's is neither imported nor called.

    Args:
        config: the whole configuration, which is changed.

    Returns:
        The references that were asked for.

    Raises:
        ValueError: no checkpoint is given, or it lacks an architecture.
    """
    section = config.model
    if not isinstance(section, DictConfig) or section.get("_target_") != TARGET:
        return "keep"
    start = Start.of(config)
    if start is None:
        raise ValueError(
            "model=from_checkpoint takes the model of a checkpoint: name it by init_from=FILE, or by ckpt_path=FILE."
        )
    checkpoint = TrainedCheckpoint.read(start.path)
    architecture = dict(checkpoint.architecture)
    check_targets(architecture, (), Path(start.path))
    if config.cutoff is not None and checkpoint.cutoff is not None and float(config.cutoff) != checkpoint.cutoff:
        raise ValueError(
            f"cutoff={config.cutoff}, but the model of {start} has one of {checkpoint.cutoff} Å, which belongs to its "
            f"weights. Leave cutoff out: model=from_checkpoint takes that of the file."
        )
    asked: dict[Any, Any] = OmegaConf.to_container(section, resolve=True)  # type: ignore[assignment]
    choice = asked.get("energy_shifts", "keep")
    references = checkpoint.record.get("energy_shifts")
    if references:
        architecture["energy_shifts"] = dict(references)
    for name in ("stress", "dtype"):
        if name in architecture and asked.get(name) is not None:
            architecture[name] = asked[name]
    architecture |= {str(name): value for name, value in asked.items() if name not in _OWN}
    if choice != "keep" and (start.setting != "init_from" or not start.trains):
        raise ValueError(
            f"model.energy_shifts={choice}: references are changed where a new training starts, with init_from; with "
            f"{start.setting} they are those of the checkpoint. Leave model.energy_shifts out."
        )
    choice = _checked(choice)
    if isinstance(choice, Mapping) and references:
        chosen_references(choice, references)  # which refuses elements that the model does not have
    with open_dict(config):
        config.model = architecture
    return choice


def _checked(choice: Any) -> ReferenceChoice:
    if choice in ("keep", "fit"):
        return str(choice)
    if isinstance(choice, Mapping):
        return {str(name): float(value) for name, value in choice.items()}
    if isinstance(choice, str) and Path(choice).expanduser().is_file():
        return choice
    raise ValueError(
        f"model.energy_shifts={choice!r} is none of keep, fit, {{symbol: eV, ...}}, and the path of a file of isolated "
        f"atoms."
    )


def chosen_references(
    choice: ReferenceChoice, before: Mapping[str, float], energy_key: str = "energy"
) -> dict[str, float]:
    """References with those that were given in the place of those before; elements that are not given keep theirs.

    Args:
        choice: eV by symbol, or the path of a file of isolated atoms.
        before: references of the checkpoint in eV by symbol.
        energy_key: name of the energies in the file.

    Raises:
        ValueError: an element that the model does not have.
    """
    given = choice if isinstance(choice, Mapping) else isolated_atom_energies(choice, energy_key)
    unknown = [name for name in given if name not in before]
    if unknown and isinstance(choice, Mapping):
        raise ValueError(
            f"model.energy_shifts has {', '.join(unknown)}, which the model does not have; it has {', '.join(before)}."
        )
    return {**before, **{name: float(value) for name, value in given.items() if name in before}}
