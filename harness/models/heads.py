"""Heads of a model: one for each data set of a mixture, with reference energies of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["head_of_graphs", "heads_of", "index_of_head", "resolve_heads", "shifts_of_heads"]


def heads_of(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the heads of a model: ``set_heads`` of the first part that has some; None for a model without.

    Such a part takes ``set_index`` of the batch, int64 ``[num_graphs]``: positions among these names.
    """
    for part in model.modules():
        heads = getattr(part, "set_heads", None)
        if heads:
            return tuple(str(name) for name in heads)
    return None


def head_of_graphs(batch: Mapping[str, Tensor], heads: Sequence[str]) -> Tensor:
    """Position of each graph's head among the names, int64 ``[num_graphs]``: the field ``set_index`` of the batch.

    Raises:
        KeyError: the batch has no such field.
    """
    if "set_index" not in batch:
        raise KeyError(
            f"the model has the heads {', '.join(heads)}, and the batch has no 'set_index' that says which of them a "
            f"structure is predicted by; expected int64 [num_graphs], as the batches of data=mixture have it"
        )
    return batch["set_index"]


def index_of_head(heads: Sequence[str], head: str | None, model: str = "the model") -> int | None:
    """Position of a head among their names; None for no heads.

    Args:
        heads: names of them.
        head: the one that is asked for; None is enough where there is one.
        model: name of the model in the message.

    Raises:
        ValueError: there are several and none is named, or there is no such head.
    """
    if head is None and len(heads) < 2:
        return 0 if heads else None
    if head in heads:
        return list(heads).index(head)  # type: ignore[arg-type]
    if not heads:
        raise ValueError(
            f"{model} has no heads, found head={head}; leave it out, or load the model with it, for energies of one of "
            f"its data sets: harness.load_model(path, head={head!r})."
        )
    found = "none was chosen" if head is None else f"found head={head}"
    raise ValueError(f"{model} has the heads {', '.join(heads)}, {found}; expected head={heads[0]} or another of them.")


def resolve_heads(heads: Sequence[str] | str | None, statistics: Any) -> tuple[str, ...]:
    """Names of the heads that a config asks for; none for None.

    Args:
        heads: ``sets`` for one for each data set of a mixture, or the names of these sets, or None.
        statistics: of the training set.

    Raises:
        ValueError: the data are no mixture, or the names are not those of its sets.
    """
    if heads is None:
        return ()
    sets = tuple(getattr(statistics, "set_references", None) or ())
    if not sets:
        raise ValueError(f"model.heads={heads} is for several data sets (data=mixture), found data of one set.")
    if heads == "sets":
        return sets
    if isinstance(heads, str) or not isinstance(heads, Sequence) or tuple(heads) != sets:
        raise ValueError(
            f"model.heads is null, sets, or a list of the names of the sets, [{', '.join(sets)}], found {heads!r}."
        )
    return sets


def shifts_of_heads(shifts: Sequence[float], heads: Sequence[str], statistics: Any) -> list[list[float]]:
    """Reference energies of each head in eV, ``[num_heads][num_types]``.

    Args:
        shifts: in eV by type, for the types that a set does not have.
        heads: names of the sets.
        statistics: of the training set, with ``set_references``: eV by symbol of each set.
    """
    given = statistics.set_references
    return [
        [float(given[head].get(name, shift)) for name, shift in zip(statistics.type_names, shifts, strict=True)]
        for head in heads
    ]
