"""Weights of a trained model as plain tensors, with what is known about them as plain data."""

from __future__ import annotations

from typing import Any

from ase.data import atomic_numbers
from torch import Tensor

from harness.trained import TrainedCheckpoint

__all__ = ["FORMAT", "state_dict_file"]

FORMAT = "potential-harness state dict 1"
"""Entry ``format`` of the metadata."""


def state_dict_file(checkpoint: TrainedCheckpoint) -> dict[str, Any]:
    """A dictionary of tensors, numbers, strings, lists and dictionaries, which loads with ``weights_only=True``.

    ``state_dict`` has the weights by their names in the model, in the dtypes of the training: averaged ones where the
    training has averaged them. ``metadata`` has ``format``; ``model``, the ``_target_`` and arguments of the function
    that builds the model; ``type_names``, ``atomic_numbers``, ``cutoff`` in Å, ``energy_shifts`` in eV by element,
    ``statistics`` of the training set, ``units``, ``dtype`` of the positions, ``precision``, ``versions``,
    ``averaged``, ``epoch`` and ``step``. Nothing of the optimizer, the loss or the metrics is in it.

    Raises:
        ValueError: the checkpoint does not say which model the weights are of, as those of version 0.1.0.
    """
    record, names = checkpoint.record, checkpoint.type_names
    metadata = {
        "format": FORMAT,
        "model": checkpoint.architecture,
        "type_names": names,
        "atomic_numbers": None if names is None else [atomic_numbers.get(name) for name in names],
        "cutoff": checkpoint.cutoff,
        **{
            name: record.get(name)
            for name in ("energy_shifts", "statistics", "units", "dtype", "precision", "versions", "packages")
        },
        "averaged": checkpoint.are_averaged,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
    }
    weights = {name: value.detach().clone() for name, value in checkpoint.weights.items() if isinstance(value, Tensor)}
    return {"state_dict": weights, "metadata": metadata}
