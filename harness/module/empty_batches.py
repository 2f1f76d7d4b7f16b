"""Batches without graphs, which ranks without frames have: their predictions, for which no model is called.

``reshape`` and the like fail on tensors of no elements, and a model of another package may not know such batches. Its
predictions of them are known without it: no rows, which depend on every trained parameter with a gradient of zero.
A model with the attribute ``takes_empty_batches = True`` is called all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.fields import NUM_ATOMS, Batch, predictions_of, registered_fields
from harness.metrics import MetricsManager
from harness.models.references import connected_zero

__all__ = ["PredictedRows", "empty_like", "fields_read", "has_graphs", "skip_empty_batches", "takes_empty_batches"]


def has_graphs(batch: Batch) -> bool:
    """False if the graph fields of a batch have no rows; without graph fields, its node fields."""
    for known in ({NUM_ATOMS: "graph"}, {name: spec.level for name, spec in registered_fields().items()}):
        for level in ("graph", "node"):
            for name, of_level in known.items():
                value = batch.get(name) if of_level == level else None
                if isinstance(value, Tensor) and value.dim():
                    return value.shape[0] > 0
    return True


def empty_like(batch: Batch) -> dict[str, Tensor]:
    """A batch of no graphs with the fields of another one."""
    return {
        name: value[..., :0] if name == "edge_index" else value[:0]
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.dim()
    }


def takes_empty_batches(model: nn.Module) -> bool:
    """True if a model says that it can be called for a batch without graphs."""
    return bool(getattr(model, "takes_empty_batches", False))


def fields_read(manager: MetricsManager, weighted: bool = False) -> set[str]:
    """Fields of the predictions that the components of a manager read, or those with a coefficient alone."""
    entries = [entry for name, entry in manager.entries.items() if manager.coeffs[name] or not weighted]
    return {name for entry in entries for name in predictions_of(entry.field)}


class PredictedRows:
    """Shape of a row and dtype of each prediction of a model.

    Those of the fields that metrics read are known from the beginning; all others once the model has made some.

    Args:
        fields: that metrics read.
    """

    def __init__(self, fields: Iterable[str]) -> None:
        self._fields = sorted(fields)
        self._seen: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def remember(self, predictions: Mapping[str, Any]) -> None:
        """Take shapes and dtypes over from the first predictions of a batch with graphs."""
        if self._seen or not isinstance(predictions, Mapping):
            return
        self._seen = {
            name: (value.shape[1:], value.dtype)
            for name, value in predictions.items()
            if isinstance(value, Tensor) and value.dim() and value.is_floating_point()
        }

    def of_no_graphs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Predictions of a batch without graphs: zero rows of every prediction.

        In training mode each depends on every trained parameter of the model, and on what of the batch requires a
        gradient. So DDP finds a gradient of zero for each parameter, and the hooks of strategies that split parameters
        run in their backward pass.
        """
        values = [value for value in batch.values() if isinstance(value, Tensor)]
        like = next((value for value in values if value.is_floating_point()), None)
        reference = like if like is not None else values[0].double()
        zero = reference.new_zeros(())
        if model.training:
            zero = connected_zero(model, reference)
            for value in values:
                if value.requires_grad:
                    zero = zero + 0.0 * value.sum()
        rows = {name: self._row(name, batch, reference) for name in self._fields} | self._seen
        return {name: zero.new_zeros(0, *shape, dtype=dtype) + zero.to(dtype) for name, (shape, dtype) in rows.items()}

    @staticmethod
    def _row(name: str, batch: Batch, reference: Tensor) -> tuple[torch.Size, torch.dtype]:
        label, spec = batch.get(name), registered_fields().get(name)
        shape = spec.shape if spec is not None else None
        if shape is None:
            shape = tuple(label.shape[1:]) if label is not None else ()
        return torch.Size(shape), reference.dtype if label is None else label.dtype


def skip_empty_batches(model: nn.Module, rows: PredictedRows) -> None:
    """Let a model itself return the predictions of batches without graphs, once only.

    Strategies that split parameters gather them in hooks around the forward pass, on all ranks together: there every
    rank has to call its model.

    Args:
        model: that does not take empty batches.
        rows: of its predictions.
    """
    if not isinstance(model, _SkipsEmptyBatches):
        kind = type(model)
        model.__class__ = type(f"Skipping{kind.__name__}", (_SkipsEmptyBatches, kind), {"__module__": kind.__module__})
    vars(model)["_predicted_rows"] = rows


class _SkipsEmptyBatches(nn.Module):
    """Mixed into a model by :func:`skip_empty_batches`."""

    takes_empty_batches = True
    _predicted_rows: PredictedRows

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if not has_graphs(batch):
            return self._predicted_rows.of_no_graphs(self, batch)
        predictions: dict[str, Tensor] = super().forward(batch)
        return predictions
