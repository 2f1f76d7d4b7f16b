"""Checkpoint of SevenNet's own: what its calculator and its tools read."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor, nn

from harness.export.format import Format, parts_of
from harness.models.packages import missing_package
from harness.models.sevennet import SevenNetEnergy
from harness.support.guest import guest

__all__ = ["SevenNetFormat", "sevennet_checkpoint", "sevennet_predictions"]

_RESCALE = "rescale_atomic_energy"


class SevenNetFormat(Format):
    """A checkpoint of SevenNet's training, for ``SevenNetCalculator`` and the ``sevenn`` commands."""

    name = "sevennet"
    models = ("sevennet",)
    suffix = "-sevennet.pth"
    only_dtype = torch.float32

    def takes(self, model: nn.Module) -> bool:
        """True for a force field whose atomic energies are those of SevenNet."""
        return parts_of(model, SevenNetEnergy) is not None

    def content(self, model: nn.Module, example: Atoms, dtype: torch.dtype | None) -> dict[str, Any]:
        """The checkpoint."""
        return sevennet_checkpoint(model)

    def predictions(
        self, path: Path, example: Atoms, batch: Mapping[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """By ``SevenNetCalculator``, of the modality that the model gives."""
        return sevennet_predictions(path, example, modality_of(model))

    def uses(self, file: Path, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """ASE, SevenNet's own evaluation, LAMMPS."""
        name = modality_of(model)
        of_python, of_shell = (f', modal="{name}"', f" --modal {name}") if name else ("", "")
        return [
            f'SevenNetCalculator("{file}", device="cpu"{of_python})',
            f"sevenn inference {file} structures.xyz{of_shell}",
            f"sevenn get_model {file}{of_shell}",
        ]

    def remarks(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """SevenNet's single precision, and the references of a model of several modalities."""
        name = modality_of(model)
        others = (
            [f"reference energies are those of the modality {name}; other ones have none of their own"] if name else []
        )
        return ["SevenNet computes in float32: total energies have steps of 6e-8 of their size", *others]


def modality_of(force_field: nn.Module) -> str | None:
    """Name of the modality whose energies a force field of SevenNet gives; None if it has no modalities."""
    parts = parts_of(force_field, SevenNetEnergy)
    if parts is None or parts[1].modality is None:
        return None
    names: Mapping[str, int] = (parts[1].config or {}).get("_modal_map") or {}
    return next((name for name, index in names.items() if index == parts[1].modality), None)


def sevennet_checkpoint(force_field: nn.Module) -> dict[str, Any]:
    """Checkpoint that ``SevenNetCalculator``, ``sevenn_inference`` and ``sevenn_get_model`` take.

    It has the config of the model and its weights, with the references of the training as shifts. SevenNet works in
    float32, and weights of a training in float64 are rounded to it.

    Args:
        force_field: see :meth:`SevenNetFormat.takes`.

    Raises:
        ModuleNotFoundError: sevenn is not installed.
        TypeError: a force field of another kind.
        ValueError: the model was not built from a config, or has an energy scale for each type outside of SevenNet.
    """
    parts = parts_of(force_field, SevenNetEnergy)
    if parts is None:
        raise TypeError(f"a force field of SevenNet was expected, found {type(force_field).__name__} of another model")
    outer, energy = parts
    if energy.config is None:
        raise ValueError("The SevenNet model was not built by sevennet_force_field: its config is not known.")
    if not bool((outer.scales == 1).all()):
        raise ValueError(f"Energy scales outside of SevenNet are not 1 but {outer.scales.tolist()}.")
    with guest(torch.float32):
        try:
            from sevenn import __version__
        except ModuleNotFoundError as error:
            raise missing_package(error, "SevenNet", "sevennet") from error
    weights = {name: value.detach().cpu() for name, value in energy.layers.state_dict().items()}
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    own, references = weights[f"{_RESCALE}.shift"].double(), outer.shifts.detach().cpu()
    shifts = (own + references.reshape(own.shape)).flatten()
    weights[f"{_RESCALE}.shift"] = shifts.float().reshape(own.shape)
    return {
        "config": {**energy.config, "shift": shifts.tolist(), "version": __version__},
        "model_state_dict": weights,
        "optimizer_state_dict": {},
        "scheduler_state_dict": {},
        "epoch": 0,
        "time": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "hash": uuid.uuid4().hex,
    }


def sevennet_predictions(path: Path, atoms: Atoms, modality: str | None = None) -> dict[str, Tensor]:
    """Predictions of a checkpoint by SevenNet's calculator, with the shapes of this package.

    Args:
        path: of a file that is trusted: SevenNet unpickles it.
        atoms: one structure.
        modality: whose energies are predicted, of a model of several.
    """
    with guest(torch.float32):
        from sevenn.calculator import SevenNetCalculator

        calculator = SevenNetCalculator(str(path), device="cpu", modal=modality)
        calculator.calculate(atoms)
    found = calculator.results
    return {
        "total_energy": torch.tensor([[float(found["energy"])]], dtype=torch.float64),
        "forces": torch.as_tensor(found["forces"]).double(),
        "stress": torch.as_tensor(voigt_6_to_full_3x3_stress(found["stress"])).double()[None],
    }
