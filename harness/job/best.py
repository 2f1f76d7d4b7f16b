"""The checkpoint with the best monitored value, of a run and of the one that it continues."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig

from harness.checkpoints import read
from harness.job.made_with import MADE_WITH, NOT_SET, differences
from harness.job.match import changed_facts
from harness.metrics import WEIGHTED_SUM
from harness.module import ForceFieldModule
from harness.strategies import load_weights

__all__ = ["ComparableScores", "best_before", "best_checkpoint", "load_checkpoint", "why_scores_differ"]

_OF_VALIDATION = (
    *("val_metrics", "val_metrics.*", "data.keys.*", "data.sets.*.keys.*", "data.evaluation"),
    "trainer.limit_val_batches",
)
_OF_TRAINING = ("loss.*", "schedule.*", "adaptive.*", "train_metrics.*", "trainer.limit_train_batches")
_OF_WEIGHTED_SUM = ("val_metrics.coeff*", "val_metrics.schedule*")
_OF_SET = re.compile(r"(set .+, )(?=(?:train|val|test) file \d|split, part |weights$)")
"""Beginning of the name of a fact of one set of a mixture."""
_EXTRA = re.compile(r"(val_metrics\.extra_metrics\.\d+)\.")


def _monitoring(trainer: Trainer) -> ModelCheckpoint | None:
    """The first callback that keeps checkpoints by a monitored value."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, ModelCheckpoint) and each.monitor), None)


def best_before(trainer: Trainer, resumed_from: str | None) -> dict[str, Any]:
    """State of the callback that monitors, in the checkpoint that a run continues; empty without one.

    Read it before the training: rank 0 moves the checkpoint while other ranks go on.
    """
    monitoring = _monitoring(trainer)
    if monitoring is None or not resumed_from:
        return {}
    checkpoint = read(resumed_from)
    return checkpoint["callbacks"].get(monitoring.state_key, {})  # type: ignore[no-any-return]


def best_checkpoint(trainer: Trainer, before: dict[str, Any]) -> str | None:
    """Path of the best checkpoint of this run or the one before; None if nothing is monitored, or no file is left.

    Args:
        trainer: of this run.
        before: what :func:`best_before` has read; empty if its score does not compete.
    """
    monitoring = _monitoring(trainer)
    if monitoring is None:
        return None
    candidates = [
        (monitoring.best_model_score, monitoring.best_model_path),
        (before.get("best_model_score"), before.get("best_model_path", "")),
    ]
    # a full disk may have kept it from being written
    found = [(float(score), path) for score, path in candidates if score is not None and Path(path).is_file()]
    return (min if monitoring.mode == "min" else max)(found)[1] if found else None


def why_scores_differ(
    record: Mapping[str, Any] | None, config: DictConfig, datamodule: LightningDataModule, monitor: str
) -> str | None:
    """Reason why values of ``monitor`` before and after a checkpoint do not compare; None if they do.

    They are of one kind where the metrics are defined alike and the data are the same: those of the validation set for
    ``val0_epoch/...``, all data and the loss for any other value. A checkpoint without a record counts as alike.

    Args:
        record: of the checkpoint, see :class:`~harness.job.made_with.MadeWith`.
        config: of now, whole.
        datamodule: of now, set up.
        monitor: key of a value, or ``val`` for all of the validation.
    """
    if record is None:
        return None
    of_validation = monitor.startswith("val")
    patterns = _OF_VALIDATION if of_validation else (*_OF_VALIDATION, *_OF_TRAINING)
    changed = differences(record, config)
    for name, before, now in changed:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and _defines(monitor, name, record, changed):
            return f"{name}: {before} → {now}"
    facts = changed_facts(record, config, datamodule)
    if of_validation:
        facts = _facts_of_validation(facts, {*record.get("data", {}), *facts}, monitor)
    return next(iter(facts.values()), None)


def _defines(monitor: str, name: str, record: Mapping[str, Any], changed: Sequence[tuple[str, Any, Any]]) -> bool:
    """False for a setting that the monitored value does not depend on: coefficients, or a further metric beside it."""
    value, is_sum = monitor.rpartition("/")[2], monitor.endswith(WEIGHTED_SUM)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _OF_WEIGHTED_SUM):
        return is_sum or "/" not in monitor
    extra = _EXTRA.match(name)
    if extra is None:
        return True
    settings = record.get("settings") or {}
    pairs = {each: (before, now) for each, before, now in changed}

    def found(key: str) -> list[Any]:
        both = pairs.get(f"{extra[1]}.{key}", (settings.get(f"{extra[1]}.{key}"),) * 2)
        return [each for each in both if each not in (None, NOT_SET)]

    if is_sum:
        return bool(found("coeff"))
    is_new = pairs.get(f"{extra[1]}.name", ("", ""))[0] == NOT_SET
    return not is_new if "/" not in monitor else any(value.startswith(str(each)) for each in found("name"))


def _facts_of_validation(facts: dict[str, str], names: set[str], monitor: str) -> dict[str, str]:
    """Changed facts that a validation set depends on: its file, or what it was split from, and weights of frames."""
    if not any(" file " in name for name in names):  # paths of a data module without a fingerprint
        return facts
    by_set: dict[str, set[str]] = {}  # without the sets of a mixture, whose values are of all together
    for name in names:
        found = _OF_SET.match(name)
        by_set.setdefault(found[1] if found else "", set()).add(name[found.end() :] if found else name)
    number = monitor.partition("_")[0].removeprefix("val")
    depends = {"weights"}
    for of_set, own in by_set.items():
        files = {name for name in own if name.startswith("val file ")}
        if number.isdigit() and files and not of_set:
            files = {f"val file {int(number) + 1}"}
        if "split, part val" in own:
            files |= {name for name in own if name.startswith("train file ") or name == "split, part val"}
        depends |= {f"{of_set}{name}" for name in (*files, "weights")}
    return {name: text for name, text in facts.items() if name in depends}


class ComparableScores(Callback):
    """Forgets the best values of a checkpoint whose scores do not compare with those of the training that goes on.

    Bests of every callback with a ``monitor``, such as ``ModelCheckpoint`` and ``EarlyStopping``, or with a ``best_of``
    (``val``, for all of the validation), and of ``ReduceLROnPlateau`` start anew then. An ``EarlyStopping`` keeps the
    patience of now.

    Args:
        config: the whole configuration.
        datamodule: set up.
    """

    def __init__(self, config: DictConfig, datamodule: LightningDataModule) -> None:
        self._config, self._datamodule = config, datamodule

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take bests out of the checkpoint, before the callbacks and schedulers are given theirs."""
        record, states = checkpoint.get(MADE_WITH), checkpoint.get("callbacks") or {}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None) or getattr(callback, "best_of", None)
            if monitor and why_scores_differ(record, self._config, self._datamodule, monitor):
                states.pop(callback.state_key, None)
            state = states.get(callback.state_key)
            if isinstance(callback, EarlyStopping) and state:
                state["patience"] = callback.patience
        monitor = (self._config.lr_scheduler or {}).get("monitor")
        if not record or not monitor:
            return
        before = (record.get("settings") or {}).get("lr_scheduler.monitor", monitor)
        if before != monitor or why_scores_differ(record, self._config, self._datamodule, monitor):
            for state in checkpoint.get("lr_schedulers") or []:
                if "num_bad_epochs" in state:  # of ReduceLROnPlateau
                    state |= {"best": state.get("mode_worse", math.inf), "num_bad_epochs": 0}


def load_checkpoint(module: ForceFieldModule, path: str) -> None:
    """Load the weights of a checkpoint into a module that may be split over the ranks.

    The trainer would let a callback that averages weights put back those that are not averaged.
    """
    checkpoint = read(path)
    module.on_load_checkpoint(checkpoint)
    load_weights(module, checkpoint["state_dict"])
