"""Record in each checkpoint of what it was made with, as plain data, and what a config has otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from harness.data.extras import Extras
from harness.data.frames import as_frame_set
from harness.job.consistency import data_facts, settings_of, versions
from harness.loggers.secrets import MASK, without_secrets
from harness.models import reference_energies as energy_shifts
from harness.runs import command
from harness.trained.record import (
    ARCHITECTURE,
    MADE_WITH,
    RecordedStatistics,
    made_with,
    packages_of,
    plain,
    self_contained,
    statistics_of,
    units,
)

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

NOT_SET = "not set"
"""Value of a setting that one of two configurations does not have."""
_OF_A_RUN = (
    "output_dir",
    "ckpt_path",
    "init_from",
    "resume",
    "train",
    "test",
    "background_checkpoints",
    "dry_step",
    "name",
    "objectives",
    "logger",
)


class MadeWith(Callback):
    """Writes into every checkpoint what it was made with: plain data, which loads with ``weights_only=True``.

    The entry ``made_with`` is a dictionary:

    * ``architecture``: the section ``model`` as the model was built of it, ``_target_`` and arguments, with the model's
      reference energies as numbers: :func:`harness.load_model` rebuilds it of that and of ``statistics``;
    * ``settings``: values of the resolved configuration by dotted name, without those of loggers and without secrets;
    * ``data``: facts that decide the batches by name, as ``datamodule.fingerprint()`` gives them;
    * ``statistics``: numbers of the training set that the model was built of;
    * ``type_names``, ``cutoff`` in Å, ``dtype`` of the data, ``precision`` of the trainer;
    * ``extras``: further labels, inputs, weights and the key of groups, see :class:`~harness.data.extras.Extras`;
    * ``energy_shifts``: reference energies of the model in eV by chemical symbol, where it has some;
    * ``energy_level``: mean and standard deviation of what they leave of the training labels, in eV/atom;
    * ``units`` by field: those of the cutoff, the batches and the predictions;
    * ``started_from``: weights that the training began with, and its first errors, where it has ``init_from``;
    * ``command``: the overrides of the command line; ``versions`` of the package and its libraries, and ``packages``,
      those of the model.

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
            ARCHITECTURE: _architecture(config),
            "settings": _settings(config),
            "data": plain(data_facts(config, datamodule)),
            "statistics": statistics_of(found),
            "type_names": None if type_names is None else [str(name) for name in type_names],
            "cutoff": _number(getattr(datamodule, "cutoff", config.get("cutoff"))),
            "extras": _extras(datamodule),
            "dtype": str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None,
            "units": units() | _units(datamodule),
            "command": _command(),
            "versions": plain(versions()),
        }
        self._frames = getattr(getattr(datamodule, "train_set", None), "frames", None) or []
        self._level: dict[str, Any] | None = None
        self._packages: dict[str, str] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what a training that goes on had started from."""
        started = (checkpoint.get(MADE_WITH) or {}).get("started_from")
        if started is not None:
            self.record["started_from"] = started

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record."""
        type_names = self.record["type_names"] or getattr(pl_module, "type_names", None) or []
        shifts = energy_shifts(pl_module, type_names)
        if self._level is None and shifts is not None:  # once: of a large set it takes a while
            self._level = energy_level(self._frames, shifts)
        if self._packages is None:
            self._packages = packages_of(getattr(pl_module, "model", pl_module))
        checkpoint[MADE_WITH] = self.record | {
            ARCHITECTURE: self_contained(self.record[ARCHITECTURE], shifts),
            "packages": self._packages,
            "precision": str(trainer.precision),
            "energy_shifts": shifts,
            "energy_level": self._level,
        }


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


def energy_level(frames: Sequence[Any], shifts: Mapping[str, float]) -> dict[str, Any] | None:
    r"""Mean and standard deviation of :math:`(E_g - \sum_t n_{gt} \mu_t) / N_g` over labelled frames, in eV/atom.

    Args:
        frames: with ``atoms`` and ``energy``, as :class:`~harness.data.reading.Frame` has them.
        shifts: :math:`\mu_t` in eV by chemical symbol.

    Returns:
        ``mean``, ``std`` and ``num_frames``; None without labels, or for an element that has no shift.
    """
    known = as_frame_set(frames)
    labelled, compositions = known.labelled("energy"), known.compositions()
    names = [symbol for symbol in shifts if symbol in atomic_numbers]
    if not len(labelled) or not compositions.take(labelled).symbols() <= set(names):
        return None
    references = compositions.sums(np.array([shifts[name] for name in names]), names)[labelled]
    left = (known.column("energy")[labelled] - references) / known.column("num_atoms")[labelled]
    if not np.isfinite(left).all():
        return None
    return {"mean": float(left.mean()), "std": float(left.std()), "num_frames": len(left)}


def _architecture(config: DictConfig) -> dict[str, Any]:
    """Builder of the model and its arguments, resolved."""
    resolved: Any = OmegaConf.to_container(config.model, resolve=True) if config.get("model") else {}
    return dict(plain(without_secrets(resolved)))


def _extras(datamodule: LightningDataModule) -> dict[str, Any] | None:
    """Further labels, inputs, weights and groups of the data; None of a data module that knows none."""
    extras = getattr(datamodule, "extras", None)
    return dict(plain(extras.plain())) if isinstance(extras, Extras) else None


def _units(datamodule: LightningDataModule) -> dict[str, str]:
    """Units of further labels and inputs, by field."""
    extras = getattr(datamodule, "extras", None)
    return {entry.field: entry.unit for entry in extras.entries} if isinstance(extras, Extras) else {}


def _settings(config: DictConfig) -> dict[str, Any]:
    found = settings_of(config, without_secrets)
    return {name: plain(value) for name, value in found.items() if name.partition(".")[0] != "logger"}


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
