"""Record in each checkpoint of what it was made with, as plain data, and what a config has otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from harness.checkpoints import read
from harness.job.consistency import data_facts, settings_of, versions
from harness.loggers.secrets import MASK, without_secrets
from harness.models import reference_energies as energy_shifts
from harness.runs import command

__all__ = [
    "MADE_WITH",
    "NOT_SET",
    "MadeWith",
    "RecordedStatistics",
    "differences",
    "energy_level",
    "energy_shifts",
    "made_with",
    "statistics_of",
]

MADE_WITH = "made_with"
"""Key in a checkpoint."""
NOT_SET = "not set"
"""Value of a setting that one of two configurations does not have."""
_OF_A_RUN = (
    "output_dir",
    "ckpt_path",
    "init_from",
    "resume",
    "train",
    "test",
    "dry_step",
    "name",
    "objectives",
    "logger",
)
_STATISTICS = (
    "type_names",
    "energy_shifts",
    "force_rms",
    "mean_neighbors",
    "num_frames",
    "num_atoms",
    "undetermined",
    "isolated_atoms",
)


class MadeWith(Callback):
    """Writes into every checkpoint what it was made with: plain data, which loads with ``weights_only=True``.

    The entry ``made_with`` is a dictionary:

    * ``settings``: values of the resolved configuration by dotted name, without those of loggers and without secrets;
    * ``data``: facts that decide the batches by name, as ``datamodule.fingerprint()`` gives them;
    * ``statistics``: numbers of the training set that the model was built of;
    * ``type_names``, ``cutoff`` in Å, ``dtype`` of the data, ``precision`` of the trainer;
    * ``energy_shifts``: reference energies of the model in eV by chemical symbol, where it has some;
    * ``energy_level``: mean and standard deviation of what they leave of the training labels, in eV/atom;
    * ``command``: the overrides of the command line; ``versions`` of the package and its libraries.

    What is not known is None.

    Args:
        config: the whole configuration.
        datamodule: set up.
        statistics: of the training set that the model was built of; those of ``datamodule`` if None.
    """

    def __init__(self, config: DictConfig, datamodule: LightningDataModule, statistics: Any = None) -> None:
        found = statistics if statistics is not None else getattr(datamodule, "statistics", None)
        type_names = getattr(datamodule, "type_names", None)
        dtype = getattr(datamodule, "dtype", None)
        self.record: dict[str, Any] = {
            "settings": _settings(config),
            "data": _plain(data_facts(config, datamodule)),
            "statistics": statistics_of(found),
            "type_names": None if type_names is None else [str(name) for name in type_names],
            "cutoff": _number(getattr(datamodule, "cutoff", config.get("cutoff"))),
            "dtype": str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None,
            "command": _command(),
            "versions": _plain(versions()),
        }
        self._frames = getattr(getattr(datamodule, "train_set", None), "frames", None) or []
        self._level: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record."""
        type_names = self.record["type_names"] or getattr(pl_module, "type_names", None) or []
        shifts = energy_shifts(pl_module, type_names)
        if self._level is None and shifts is not None:  # once: of a large set it takes a while
            self._level = energy_level(self._frames, shifts)
        checkpoint[MADE_WITH] = self.record | {
            "precision": str(trainer.precision),
            "energy_shifts": shifts,
            "energy_level": self._level,
        }


def made_with(path: str | Path) -> dict[str, Any] | None:
    """Record of a checkpoint file; None in one that has none, as those of version 0.1.0."""
    found = read(Path(path)).get(MADE_WITH)
    return found if isinstance(found, dict) else None


def differences(made_with: Mapping[str, Any], config: DictConfig) -> list[tuple[str, Any, Any]]:
    """Settings that a config has otherwise than the one that a checkpoint was made with.

    Settings that concern a run as such are left out: paths of its output and its checkpoint, its name, its loggers,
    what it resumes, and whether it trains and tests.

    Args:
        made_with: record of the checkpoint.
        config: of now, whole.

    Returns:
        Dotted name, value before and value now, in the order of the config; :data:`NOT_SET` where there is none.
    """
    before, now = made_with.get("settings") or {}, _settings(config)
    pairs = {name: (before.get(name, NOT_SET), now.get(name, NOT_SET)) for name in dict.fromkeys([*now, *before])}
    return [
        (name, *pair) for name, pair in pairs.items() if pair[0] != pair[1] and name.partition(".")[0] not in _OF_A_RUN
    ]


def statistics_of(statistics: Any) -> dict[str, Any] | None:
    """Statistics of a training set as plain numbers, those of them that there are; None without any."""
    found = {name: getattr(statistics, name) for name in _STATISTICS if hasattr(statistics, name)}
    return {name: _plain(value) for name, value in found.items()} or None


def energy_level(frames: Sequence[Any], shifts: Mapping[str, float]) -> dict[str, Any] | None:
    r"""Mean and standard deviation of :math:`(E_g - \sum_t n_{gt} \mu_t) / N_g` over labelled frames, in eV/atom.

    Args:
        frames: with ``atoms`` and ``energy``, as :class:`~harness.data.reading.Frame` has them.
        shifts: :math:`\mu_t` in eV by chemical symbol.

    Returns:
        ``mean``, ``std`` and ``num_frames``; None without labels, or for an element that has no shift.
    """
    by_number = np.full(len(atomic_numbers) + 1, np.nan)
    for symbol, shift in shifts.items():
        if symbol in atomic_numbers:
            by_number[atomic_numbers[symbol]] = shift
    labelled = [frame for frame in frames if frame.energy is not None]
    left = np.array([(frame.energy - by_number[frame.atoms.numbers].sum()) / len(frame.atoms) for frame in labelled])
    if not len(left) or not np.isfinite(left).all():
        return None
    return {"mean": float(left.mean()), "std": float(left.std()), "num_frames": len(left)}


class RecordedStatistics:
    """Statistics that a checkpoint's model was built of, with the attributes of those of a training set.

    Args:
        recorded: entry ``statistics`` of the record.
        now: statistics of the training set of now, for attributes that were not recorded.
    """

    def __init__(self, recorded: Mapping[str, Any], now: Any = None) -> None:
        self._now = now
        values = dict(recorded)
        for name in ("energy_shifts", "undetermined"):
            if values.get(name) is not None:
                values[name] = torch.tensor(values[name], dtype=torch.float64)
        if "type_names" in values:
            values["type_names"] = tuple(values["type_names"])
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._now, name)


def _settings(config: DictConfig) -> dict[str, Any]:
    found = settings_of(config, without_secrets)
    return {name: _plain(value) for name, value in found.items() if name.partition(".")[0] != "logger"}


def _command() -> list[str]:
    """Overrides of this run, with their interpolations as they were typed."""
    overrides = command().overrides if HydraConfig.initialized() else ()
    return [_masked(override) for override in overrides]


def _masked(override: str) -> str:
    """An override, its value masked if there is a secret in it at any depth, such as in ``{api_key: ...}``."""
    name, sign, value = override.partition("=")
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
    except Exception:  # no YAML: only its name can tell
        parsed = {"value": value}
    plain = {name: parsed["value"] if isinstance(parsed, dict) else value, "text": value}
    return override if without_secrets(plain) == plain else f"{name}{sign}{MASK}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _plain(value: Any) -> Any:
    """A value as plain data: subclasses of numbers and strings would not load with ``weights_only=True``."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if kind is None:
        return None if value is None else str(value)
    return kind(value)
