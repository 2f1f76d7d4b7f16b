"""A job against the checkpoint that it goes on from or tests: what differs, and whether that is refused or named.

:data:`RULES` is the table of settings. Data, type names, reference energies and weights are compared as they are, since
the same setting may mean other ones. Settings of the optimizer, its schedule and the length of a training are no matter
of the model, and none of this file.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase.data import atomic_numbers
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from torch import Tensor, nn

from harness.checkpoints import read
from harness.data.frames import as_frame_set
from harness.job.consistency import data_facts
from harness.job.made_with import MADE_WITH, NOT_SET, differences, energy_level, energy_shifts
from harness.models.conversion import patterns
from harness.models.heads import heads_of

__all__ = [
    "ACCEPTED",
    "RULES",
    "Rule",
    "Start",
    "changed_facts",
    "compare",
    "data_differences",
    "energy_level_text",
    "is_made_anew",
    "rule_of",
    "types_of_checkpoint",
]

Verdict = Literal["same", "named", "refused"]


@dataclass(frozen=True)
class Rule:
    """Consequence of a setting that is not the one of the checkpoint.

    Attributes:
        pattern: of the dotted name; the first rule that fits counts.
        tests: where the checkpoint is only tested.
        goes_on: where a training goes on from it.
    """

    pattern: str
    tests: Verdict
    goes_on: Verdict


RULES = (
    Rule("cutoff", "refused", "refused"),
    Rule("data.cutoff", "refused", "refused"),
    Rule("model.dtype", "named", "refused"),  # moments of the optimizer have it, too
    Rule("model.compile_mode", "named", "named"),
    Rule("model.seed", "same", "same"),  # of initial weights, which the checkpoint's replace
    Rule("model.stress", "named", "named"),
    Rule("model.energy_shifts*", "same", "same"),  # compared by their numbers
    Rule("model.energy_scales*", "named", "refused"),  # the checkpoint's replace them
    Rule("model.trainable_scales", "named", "refused"),  # the optimizer's state has one parameter more or less
    Rule("model.*", "refused", "refused"),
    Rule("data.dtype", "named", "named"),
    Rule("data.keys.*", "named", "named"),
    Rule("data.labels*", "named", "named"),
    Rule("data.inputs*", "named", "named"),
    Rule("data.weights*", "same", "same"),  # compared as facts of the data, as those of a store are
    Rule("data.sets.*.weights*", "same", "same"),
    Rule("trainer.precision", "named", "named"),
    Rule("matmul_precision", "named", "named"),
)
"""Settings that concern the model or what it sees; all others are no matter of it."""

ACCEPTED = "accept_changes"
"""Name of the setting with patterns of settings that may differ although they are refused."""

_LARGEST_LEVEL = 10.0
"""eV/atom; cohesive energies of the elements are below 9 (tungsten): no structure of the same references is so far."""
_MANY_ELEMENTS = 12
_MOST_FITTED = 100_000  # frames that references are fitted to for a message
_NAMED_LEVEL = 0.1
"""eV/atom, and five times the spread of the training labels."""


@dataclass(frozen=True)
class Start:
    """The checkpoint that a job has something from.

    Attributes:
        setting: that names it: ``ckpt_path``, or ``init_from`` for weights alone.
        path: of the file.
        trains: True if a training goes on from it or from its weights, False if there is only a test.
    """

    setting: str
    path: str
    trains: bool

    @classmethod
    def of(cls, config: DictConfig) -> Start | None:
        """That of a config, which may have none."""
        for setting in ("ckpt_path", "init_from"):
            if config.get(setting):
                return cls(setting, str(config.get(setting)), bool(config.train))
        return None

    def __str__(self) -> str:
        """As it was typed."""
        return f"{self.setting}={self.path}"

    def verdict(self, name: str) -> Verdict:
        """Consequence of a setting that differs; without the state of an optimizer, that of a test."""
        rule = rule_of(name)
        if rule is None:
            return "same"
        return rule.goes_on if self.trains and self.setting == "ckpt_path" else rule.tests


def rule_of(name: str) -> Rule | None:
    """The rule of a setting; None for one that is no matter of the model."""
    return next((rule for rule in RULES if fnmatch.fnmatchcase(name, rule.pattern)), None)


def types_of_checkpoint(config: DictConfig) -> dict[str, list[str]]:
    """Argument that gives the data the types of a checkpoint's model, where the config leaves them to the data."""
    start = Start.of(config)
    if start is None or "type_names" not in config.data or config.data.type_names is not None:
        return {}
    names = read(start.path).get("type_names")
    return {"type_names": [str(name) for name in names]} if names else {}


def compare(
    start: Start, config: DictConfig, datamodule: LightningDataModule, module: nn.Module, keeps_references: bool = True
) -> tuple[list[str], list[str]]:
    """Compare a job with the checkpoint that it goes on from or tests.

    Args:
        start: the checkpoint.
        config: of the job, whole.
        datamodule: of the job, set up.
        module: of the job, with the weights that it was made with.
        keeps_references: False if the model is given other reference energies before the first step.

    Returns:
        Lines to print, and warnings.

    Raises:
        ValueError: a difference that the weights of the checkpoint cannot go with.
    """
    checkpoint = read(start.path)
    record: dict[str, Any] | None = checkpoint.get(MADE_WITH)
    lines, warned = [], []
    if record is None:
        lines.append(
            f"{start} has no record of what it was made with, as those of version 0.1.0: cutoff, data and dtypes "
            f"cannot be compared with those of this command"
        )
    else:
        changed = differences(record, config)
        _refuse_settings(start, changed, config.get(ACCEPTED) or ())
        lines += [f"differs from the checkpoint: {text}" for text in _named_settings(start, changed)]
        lines += data_differences(record, config, datamodule)
    _refuse_types(start, checkpoint, getattr(datamodule, "type_names", None))
    lines += _compare_sets(start, checkpoint, datamodule, module, config.get(ACCEPTED) or ())
    _refuse_weights(start, checkpoint["state_dict"], module, config.get("init_anew") or ())
    found = _references(start, checkpoint, record, datamodule, module)
    if found:
        lines.append(found)
    if record is not None and keeps_references:
        level = energy_level_text(start, record, datamodule)
        if level:
            warned.append(level)
    return lines, warned


# --- settings ---


def _refuse_settings(start: Start, changed: Sequence[tuple[str, Any, Any]], accepted: Sequence[str]) -> None:
    refused = _without_copies([each for each in changed if start.verdict(each[0]) == "refused"], changed)
    refused = [each for each in refused if not any(fnmatch.fnmatchcase(each[0], name) for name in accepted)]
    if not refused:
        return
    shown = "\n".join(f"  {name}: {before} → {now}" for name, before, now in refused)
    message = (
        f"{start} was made with other settings that shape the model, or what it sees, than this command has "
        f"(before → now):\n{shown}\nGive this command those of the checkpoint: "
        f"{' '.join(_override(*each) for each in refused)}."
    )
    own = [name for name, _, _ in refused if name.startswith("model.") and not name.endswith("cutoff")]
    if own:
        message += f" A setting that does not change what your model computes is accepted: '{ACCEPTED}=[{own[0]}]'."
    raise ValueError(message)


def _named_settings(start: Start, changed: Sequence[tuple[str, Any, Any]]) -> list[str]:
    named = [each for each in changed if start.verdict(each[0]) == "named"]
    # an argument that only one of two kinds of data has is no difference of theirs
    return [f"{name}: {before} → {now}" for name, before, now in named if NOT_SET not in (before, now)]


def _without_copies(some: list[tuple[str, Any, Any]], changed: Sequence[tuple[str, Any, Any]]) -> list[Any]:
    """Settings without those that follow another one of the last part of their name, as data.cutoff follows cutoff."""
    own = {name: pair for name, *pair in changed if "." not in name}
    return [each for each in some if "." not in each[0] or own.get(each[0].rpartition(".")[2]) != list(each[1:])]


def _override(name: str, before: Any, now: Any) -> str:
    if before == NOT_SET:
        return f"~{name}"
    return f"{'+' if now == NOT_SET else ''}{name}={'null' if before is None else before}"


# --- data ---


def data_differences(record: Mapping[str, Any], config: DictConfig, datamodule: LightningDataModule) -> list[str]:
    """A line for data that are not those of the checkpoint: content of files, the split, weights of frames."""
    changed = changed_facts(record, config, datamodule)
    if not changed:
        return []
    line = f"data differ from those of the checkpoint: {', '.join(changed.values())}"
    facts = data_facts(config, datamodule)
    is_split_otherwise = any("split, part" in name for name in changed)
    if is_split_otherwise and any("file" in name for name in facts) and not any("file" in name for name in changed):
        line += ". The files are the same: what is validated and tested now may have been trained on"
    return [line]


def changed_facts(record: Mapping[str, Any], config: DictConfig, datamodule: LightningDataModule) -> dict[str, str]:
    """Facts of the data that are not those of a checkpoint: by name, a text with what they were and are."""
    before, now = record.get("data") or {}, data_facts(config, datamodule)
    if not before:  # of a model of another package
        return {}
    names = [name for name in dict.fromkeys([*now, *before]) if name not in ("type names", "cutoff")]
    return {
        name: f"{name} ({_change(before.get(name), now.get(name))})"
        for name in names
        if before.get(name) != now.get(name)
    }


def _change(before: Any, now: Any) -> str:
    """Two facts without their digests."""
    texts = ["none" if fact is None else str(fact).partition(", sha256")[0] for fact in (before, now)]
    return f"{texts[0]} → {texts[1]}" if texts[0] != texts[1] else f"{texts[0]}, others than before"


# --- types and weights ---


def is_made_anew(name: str, patterns: Sequence[str]) -> bool:
    """True if a weight of the model is not taken from the checkpoint, by the patterns of ``init_anew``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_types(start: Start, checkpoint: Mapping[str, Any], now: Sequence[str] | None) -> None:
    before = checkpoint.get("type_names")
    if before is None or now is None or list(before) == list(now):
        return
    raise ValueError(
        f"{start} was trained with the atom types {', '.join(before)}, those of this data are "
        f"{', '.join(now)}: an index would mean another element. Leave data.type_names out, for those of the "
        f"checkpoint, or give 'data.type_names=[{', '.join(before)}]'."
    )


def _compare_sets(
    start: Start,
    checkpoint: Mapping[str, Any],
    datamodule: LightningDataModule,
    module: nn.Module,
    accepted: Sequence[str],
) -> list[str]:
    """A line if the sets of the mixture, or their order, are not those of the checkpoint; refused for heads of them."""
    before, now = checkpoint.get("set_names"), list(getattr(datamodule, "set_names", None) or ())
    if before is None or list(before) == now:
        return []
    pair = " → ".join(", ".join(map(str, names)) or "no mixture" for names in (before, now))
    if heads_of(module) is not None and not any(fnmatch.fnmatchcase("data.sets", name) for name in accepted):
        raise ValueError(
            f"{start} was trained with heads for other sets, or in another order, than data.sets has now (before → "
            f"now): {pair}. A head would go on with another set. Give the sets the names and the order that they "
            f"had. If each head is meant for the set that has its place now, it is accepted: "
            f"'{ACCEPTED}=[data.sets]'."
        )
    return [f"differs from the checkpoint: sets of the mixture: {pair}"]


def _refuse_weights(start: Start, states: Mapping[str, Any], module: nn.Module, anew: Sequence[str]) -> None:
    """Refuse a model whose weights are not those of the checkpoint by name and shape, but for those made anew."""
    model = getattr(module, "model", None)
    if model is None or any(nn.parameter.is_lazy(each) for each in model.parameters()):
        return
    own = {f"model.{name}": value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    unused = [
        pattern for pattern in anew if not any(is_made_anew(name.removeprefix("model."), [pattern]) for name in own)
    ]
    if unused:
        names = patterns([name.removeprefix("model.") for name in own])
        raise ValueError(f"init_anew={unused}: no weight of the model has such a name. Its names are {names}.")
    theirs = {name: value for name, value in states.items() if name.startswith("model.") and isinstance(value, Tensor)}
    for weights in (own, theirs):
        for name in [name for name in weights if is_made_anew(name.removeprefix("model."), anew)]:
            del weights[name]
    wrong = [f"{name} is not in the checkpoint" for name in own if name not in theirs]
    wrong += [f"{name} is not in this model" for name in theirs if name not in own]
    wrong += [
        f"{name} is {list(theirs[name].shape)} in the checkpoint and {list(own[name].shape)} in this model"
        for name in own
        if name in theirs and own[name].shape != theirs[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{start} has the weights of another model: {'; '.join(wrong[:3])}{more}. Give this command the "
            f"model's settings of the run that has written it: they are in its .hydra/config.yaml."
        )


# --- reference energies ---


def _references(
    start: Start,
    checkpoint: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    datamodule: LightningDataModule,
    module: nn.Module,
) -> str | None:
    """A line with the reference energies that the model will have; refused if other ones were asked for."""
    names = getattr(datamodule, "type_names", None) or []
    asked = energy_shifts(module, names)
    if asked is None:
        return None
    theirs = record.get("energy_shifts") if record is not None else _shifts_in(checkpoint, module, names)
    if theirs is None or set(theirs) != set(asked):
        return None
    shown = {name: theirs[name] for name in theirs if name in _elements_of(datamodule, theirs)}
    line = f"reference energies of the model in eV, from the checkpoint: {_by_element(shown)}"
    differ = [name for name in asked if abs(asked[name] - theirs[name]) > 1e-6 * max(1.0, abs(theirs[name]))]
    if not differ:
        return line
    pairs = ", ".join(f"{name} {theirs[name]:.6g} → {asked[name]:.6g}" for name in differ)
    if start.trains and record is not None:
        exact = ", ".join(f"{name}: {value!r}" for name, value in theirs.items())
        raise ValueError(
            f"{start} was made with other reference energies than this command asks for, in eV before → now: "
            f"{pairs}. Its weights are of no use with others. Give this command those of the checkpoint: "
            f"'model.energy_shifts={{{exact}}}', or as it was given then, or train anew."
        )
    return f"{line}; not those that this command would have made ({pairs})"


def _elements_of(datamodule: LightningDataModule, names: Mapping[str, float]) -> set[str]:
    """Elements of the training frames, if the model has many more."""
    frames = getattr(getattr(datamodule, "train_set", None), "frames", None) or []
    return set(names) if len(names) <= _MANY_ELEMENTS or not frames else as_frame_set(frames).symbols()


def _shifts_in(checkpoint: Mapping[str, Any], module: nn.Module, names: Sequence[str]) -> dict[str, float] | None:
    """Reference energies in the weights of a checkpoint, at the place where a module has them."""
    for name, part in module.named_modules():
        if energy_shifts(part, names) is not None and isinstance(getattr(part, "shifts", None), Tensor):
            found = checkpoint["state_dict"].get(f"{name}.shifts")
            if isinstance(found, Tensor) and found.numel() == len(names):
                return dict(zip(names, found.double().flatten().tolist(), strict=True))
    return None


def energy_level_text(start: Start, record: Mapping[str, Any], datamodule: LightningDataModule) -> str | None:
    """A warning of energies whose reference level is not that of the checkpoint's training; refused where it must be.

    What is compared is :math:`(E_g - \\sum_t n_{gt} \\mu_t) / N_g` with the model's references: the mean and spread of
    the training labels, and the mean of the labels of now. Whatever the references are, it is the energy per atom that
    is left to the network.
    """
    before, shifts = record.get("energy_level"), record.get("energy_shifts")
    if not before or not shifts:
        return None
    sets = {"test set": getattr(datamodule, "test_sets", [])}
    if start.trains:
        train, val = getattr(datamodule, "train_set", None), getattr(datamodule, "val_sets", [])
        sets = {"training set": [train], "validation set": val, **sets}
    for label, members in sets.items():
        for member in members:
            frames = getattr(member, "frames", None) or []
            now = energy_level(frames, shifts)
            far = 0.0 if now is None else abs(now["mean"] - before["mean"])
            if now is None or far <= max(_NAMED_LEVEL, 5 * before["std"]):
                continue
            pairs = ", ".join(
                f"{name} {shifts[name]:.6g} → {value:.6g}" for name, value in _fitted(frames, shifts).items()
            )
            text = (
                f"energies of the {label} less the reference energies of {start} are {now['mean']:.4g} eV per "
                f"atom on average, those of its training {before['mean']:.4g} ± {before['std']:.2g}. References in eV, "
                f"of the model → by least squares of this set: {pairs}"
            )
            if label == "test set":
                return (
                    f"{text}. The model's errors of energies will be about {far:.3g} eV/atom; forces and stresses do "
                    f"not depend on references"
                )
            if far > _LARGEST_LEVEL:
                raise ValueError(
                    f"{text}. This is no difference between structures, whose cohesive energies are below 9 eV/atom: "
                    f"the labels have another reference level, or the compositions of before did not determine the "
                    f"references (energies of isolated atoms would have). The model keeps its own. "
                    f"Label both with the same (total energies of one code and its settings, or both less the same "
                    f"isolated atoms), or train anew."
                )
            return f"{text}. Is the reference level the same?"
    return None


def _fitted(frames: Sequence[Any], near: Mapping[str, float]) -> dict[str, float]:
    """Energies by element that fit the labels best, of the elements that the frames have.

    Where compositions leave them open, they are those with the least change from energies that are near.
    """
    known = as_frame_set(frames)
    labelled = known.labelled("energy")
    chosen = known.subset(labelled[:: -(-len(labelled) // _MOST_FITTED)])
    names = sorted(chosen.symbols(), key=lambda name: atomic_numbers[name])
    rows, energies = chosen.energy_rows(names)
    before = np.asarray([near.get(name, 0.0) for name in names])
    found = before + np.linalg.lstsq(rows, energies - rows @ before, rcond=None)[0]
    return dict(zip(names, found.tolist(), strict=True))


def _by_element(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
