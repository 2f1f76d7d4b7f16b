"""A checkpoint as what a training has made: the weights of its model, and the record that the model is rebuilt from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from torch import Tensor, nn

from harness.checkpoints import read
from harness.config.builders import build
from harness.config.explain import message
from harness.support.text import some
from harness.trained.record import ARCHITECTURE, MADE_WITH, RecordedStatistics
from harness.trained.targets import TARGET, Trust, check_targets

__all__ = ["TrainedCheckpoint", "model_weights"]

_MODEL = "model."
_COMPILED = "_orig_mod."


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the model by their names in it, averaged ones where the training averages them.

    Those of the loss and its metrics belong to a training.
    """
    named = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(_MODEL)}
    return {name.removeprefix(_MODEL).replace(_COMPILED, ""): value for name, value in named.items()}


@dataclass(frozen=True)
class TrainedCheckpoint:
    """Content of a checkpoint that the model is rebuilt from.

    Attributes:
        path: of the file.
        record: its entry ``made_with``, see :class:`~harness.job.made_with.MadeWith`; empty in those of version 0.1.0.
        weights: of the model by their names in it, on the CPU.
        are_averaged: True if the weights are an average over the training, and the last ones are beside them.
        type_names: of the atom types in their order; None if the data have none.
        set_names: of the data sets of a mixture, in the order of ``set_index``; None if the data were no mixture.
        epoch: number of the epoch that it was written in, counted from 0; None if it is not known.
        step: number of optimizer steps; None if it is not known.
    """

    path: Path
    record: Mapping[str, Any]
    weights: Mapping[str, Any]
    are_averaged: bool
    type_names: list[str] | None
    set_names: list[str] | None
    epoch: int | None
    step: int | None

    @classmethod
    def read(cls, path: str | Path) -> TrainedCheckpoint:
        """Read a checkpoint, with ``weights_only=True``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none of this package, or a damaged one.
        """
        file = Path(path).expanduser()
        found = read(file, checksums=True)
        if not any(name.startswith(_MODEL) for name in found["state_dict"]):
            raise ValueError(
                f"{file} is no checkpoint of this package: no weight in its state_dict has a name that begins with "
                f"{_MODEL}"
            )
        record = found.get(MADE_WITH)
        record = record if isinstance(record, dict) else {}
        names = found.get("type_names") or record.get("type_names")
        return cls(
            path=file,
            record=record,
            weights=model_weights(found),
            are_averaged="current_model_state" in found,
            type_names=None if names is None else [str(name) for name in names],
            set_names=[str(name) for name in found.get("set_names") or ()] or None,
            epoch=found.get("epoch"),
            step=found.get("global_step"),
        )

    @property
    def architecture(self) -> dict[str, Any]:
        """Builder of the model as ``_target_``, and its arguments: the section ``model`` of the config.

        Raises:
            ValueError: the record has none, as in checkpoints of version 0.1.0.
        """
        found = self.record.get(ARCHITECTURE)
        if isinstance(found, dict):
            return found
        lacks = [
            "architecture",
            *(name for name in ("statistics", "cutoff", "dtype", "units") if name not in self.record),
        ]
        raise ValueError(
            f"{self.path} cannot be rebuilt to a model: it has weights{' and type names' if self.type_names else ''}, "
            f"but lacks what they belong to ({', '.join(lacks)}), as checkpoints of version 0.1.0 do. Go on from it "
            f"for an epoch with the config and data of its training (ckpt_path={self.path} max_epochs=...): what that "
            f"writes is complete."
        )

    @property
    def cutoff(self) -> float | None:
        """Cutoff of the neighbour lists in Å; None if the data have none."""
        found = self.record.get("cutoff")
        return None if found is None else float(found)

    @property
    def statistics(self) -> RecordedStatistics | None:
        """Numbers of the training set that the model was built of; None if there were none."""
        found = self.record.get("statistics")
        return RecordedStatistics(found) if found else None

    def build(self, trust: Trust = (), changes: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with its weights, on the CPU, in training mode, in the dtypes of the weights.

        Builders of ``harness.models`` are called as they are. Any other is somebody's own, which the checkpoint only
        names: it is imported and called if ``trust`` allows it.

        Args:
            trust: names of packages or modules whose builders may be called, such as ``["my_models"]``.
            changes: arguments of the builder that replace those of the architecture.

        Raises:
            ValueError: the checkpoint has no architecture, its builder is not trusted or fails, or its weights do not
                fit.
            ModuleNotFoundError: a package that the model needs is not installed.
        """
        architecture = {**self.architecture, **(changes or {})}
        check_targets(architecture, trust, self.path)
        model = self._built(architecture)
        self._load(model)
        return model

    def _built(self, architecture: dict[str, Any]) -> nn.Module:
        try:
            offered = {"statistics": self.statistics, "type_names": self.type_names, "set_names": self.set_names}
            model = _build(architecture, offered)
        except (InstantiationException, ValueError, TypeError, AttributeError) as error:
            missing = _cause(error)
            if missing is not None:
                raise ModuleNotFoundError(f"{self.path}: {missing}", name=missing.name) from error
            raise ValueError(
                f"the model of {self.path} cannot be made by {architecture[TARGET]}: {message(error)}{self._versions()}"
            ) from error
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{self.path}: {architecture[TARGET]} made {type(model).__name__}, expected a torch module."
            )
        return model

    def _load(self, model: nn.Module) -> None:
        """Load the weights, after the model has their dtype."""
        own = _floating(dict(model.named_parameters()))
        trained = _floating(
            {name: value for name, value in self.weights.items() if name in dict(model.named_parameters())}
        )
        if len(trained) == 1 and trained != own:
            model.to(next(iter(trained)))  # as the trainer's precision did, 64-true or bf16-true
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise ValueError(
                f"the weights of {self.path} do not fit the model of its record: {_misfits(model, self.weights)}. Was "
                f"the model's code changed, or is its package another version?{self._versions()}"
            ) from error

    def _versions(self) -> str:
        """A sentence about packages that were in another version."""
        found = []
        for name, then in (self.record.get("packages") or {}).items():
            names = importlib.metadata.packages_distributions().get(name)
            now = importlib.metadata.version(names[0]) if names else "not installed"
            if now != then:
                found.append(f"{name} {then} (here {now})")
        return f" It was made with {', '.join(found)}." if found else ""


def _build(architecture: dict[str, Any], offered: Mapping[str, Any]) -> Any:
    """Model of an architecture, as in a training."""
    return build(OmegaConf.create(architecture), offered)


def _cause(error: BaseException | None) -> ModuleNotFoundError | None:
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    return error


def _floating(tensors: Mapping[str, Any]) -> set[torch.dtype]:
    return {value.dtype for value in tensors.values() if isinstance(value, Tensor) and value.dtype.is_floating_point}


def _misfits(model: nn.Module, weights: Mapping[str, Any]) -> str:
    """Names that only one of the two has, and shapes that differ."""
    own = model.state_dict()
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(value.shape)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(weights.get(name), Tensor) and weights[name].shape != value.shape
    ]
    lists = {
        "shapes": shapes,
        "the file lacks": [name for name in own if name not in weights],
        "the model has no": [name for name in weights if name not in own],
    }
    return "; ".join(f"{what} {some(names)}" for what, names in lists.items() if names)
