"""Heads of a model: one for each data set of a mixture, with reference energies of its own."""

from __future__ import annotations

from torch import nn

__all__ = ["heads_of"]


def heads_of(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the heads of a model: ``set_heads`` of the first part that has some; None for a model without.

    Such a part takes ``set_index`` of the batch, int64 ``[num_graphs]``: positions among these names.
    """
    for part in model.modules():
        heads = getattr(part, "set_heads", None)
        if heads:
            return tuple(str(name) for name in heads)
    return None
