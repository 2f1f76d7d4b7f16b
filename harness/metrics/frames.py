"""Frames of a batch: their weights, sets and groups, spread over the rows of a field.

A batch may hold, for each frame, float64 ``weight``, ``energy_weight``, ``forces_weight`` and ``stress_weight``, and
int64 ``set_index`` and ``group_index`` (-1 for none), all ``[num_graphs]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from harness.fields import NUM_ATOMS, Batch, get_field
from harness.metrics.splits import Split

__all__ = [
    "FRAME_FIELDS",
    "WEIGHTS_OF_LABELS",
    "WEIGHT_FIELDS",
    "FrameIndices",
    "FramesOfBatch",
    "check_frames",
    "weights_in",
]

WEIGHTS_OF_LABELS = {
    "total_energy": "energy_weight",
    "forces": "forces_weight",
    "stress": "stress_weight",
    "virial": "stress_weight",
}
"""Weight of a frame's label, which multiplies ``weight``, by the field of the label."""
_WEIGHT = "weight"
_INDEX_OF = {"set": "set_index", "group": "group_index"}
WEIGHT_FIELDS = tuple(dict.fromkeys((_WEIGHT, *WEIGHTS_OF_LABELS.values())))
"""Fields of a batch that hold weights of the frames."""
_NAMES_OF_WEIGHTS = frozenset(WEIGHT_FIELDS)
FRAME_FIELDS = (*WEIGHT_FIELDS, *_INDEX_OF.values())
"""Fields of a batch that hold a number of each frame."""
_BATCH, _EDGES = "batch", "edge_index"


class FrameIndices:
    """Tables from the index of a set or group to something about it, on the devices that ask for them."""

    def __init__(self) -> None:
        self._tables: dict[tuple[object, torch.device], Tensor] = {}

    def table(self, entries: Sequence[int], device: torch.device) -> Tensor:
        """Entries for the indices from -1 on: int64 ``[len(entries)]``, made once for a device."""
        key = tuple(entries), device
        if key not in self._tables:
            with torch.inference_mode(False):  # they outlive this step
                self._tables[key] = torch.tensor(entries, dtype=torch.int64).to(device)
        return self._tables[key]


class FramesOfBatch:
    """Weights, sets and groups of the frames of one batch, for the rows of its fields; each is looked up once.

    Args:
        preds: predictions, whose batch may be asked for what the target lacks.
        target: labels, with weights and indices of the frames.
        indices: tables of the reader.
    """

    def __init__(self, preds: Batch, target: Batch, indices: FrameIndices) -> None:
        self._preds, self._target, self._indices = preds, target, indices
        self._known: dict[object, Tensor] = {}
        self._has_weights = not _NAMES_OF_WEIGHTS.isdisjoint(target)

    def weights(self, labels: Sequence[str], level: str, reference: Tensor) -> Tensor | None:
        """Weight of the frame of each row, float64 ``[rows]``; None if the batch has none for these labels.

        Args:
            labels: fields of the labels that the rows are of.
            level: of the rows.
            reference: tensor with these rows.
        """
        names = weights_in(self._target, labels) if self._has_weights else []
        if not names:
            return None
        key = ("weights", *names)
        if key not in self._known:
            weights = self._target[names[0]].reshape(-1).to(torch.float64)
            for name in names[1:]:
                weights = weights * self._target[name].reshape(-1)
            self._known[key] = weights
        return self._spread(key, level, reference)

    def are_of(self, sets: Sequence[int], num_sets: int, level: str, reference: Tensor, component: str) -> Tensor:
        """Mask of the rows whose frame is of one of these sets: bool ``[rows]``."""
        key = ("sets", *sets)
        if key not in self._known:
            index = self._index("set", reference, component)
            chosen = [int(number in sets) for number in range(-1, num_sets)]
            self._known[key] = self._indices.table(chosen, index.device)[index + 1] > 0
        return self._spread(key, level, reference)

    def parts(self, split: Split, level: str, reference: Tensor, component: str) -> Tensor:
        """Part of the split that each row is in, int64 ``[rows]``; the number of parts where it is in none."""
        key = ("parts", split.by, split.slots)
        if key not in self._known:
            index = self._index(split.by, reference, component)
            self._known[key] = self._indices.table(split.slots, index.device)[index + 1]
        return self._spread(key, level, reference)

    def numbers_of_groups(self, num_groups: int, device: torch.device) -> Tensor:
        """Number of frames of each group, whatever their weights and labels: float64 ``[num_groups]``."""
        numbers = torch.zeros(num_groups + 1, dtype=torch.float64, device=device)  # the first is of those in none
        if _INDEX_OF["group"] in self._target:  # a batch of no frames may lack it
            index = self._target[_INDEX_OF["group"]].reshape(-1)
            numbers = numbers.index_add(0, index + 1, numbers.new_ones(len(index)))
        return numbers[1:]

    def _index(self, by: str, reference: Tensor, component: str) -> Tensor:
        name = _INDEX_OF[by]
        if name in self._target:
            return self._target[name].reshape(-1)
        if not len(reference):  # the batch of no frames has none of the fields that only some data have
            return torch.zeros(0, dtype=torch.int64, device=reference.device)
        raise KeyError(
            f"Component {component!r} tells frames apart by their {by}, but the batch has no {name!r}. It has "
            f"{', '.join(map(str, self._target))}."
        )

    def _spread(self, key: tuple[object, ...], level: str, reference: Tensor) -> Tensor:
        """A number of each frame, for each row of a level."""
        of_frames, spread = self._known[key], (level, *key)
        if spread not in self._known:
            if not len(reference):
                self._known[spread] = of_frames.new_zeros(0)
            else:
                self._known[spread] = of_frames if level == "graph" else of_frames[self._frames(level, reference)]
        of_rows = self._known[spread]
        if of_rows.shape != reference.shape[:1]:
            raise ValueError(
                f"The batch has weights or indices of {len(of_frames)} frames, with {len(of_rows)} rows of the level "
                f"{level}, but a field of it has shape {list(reference.shape)}; expected one row for each."
            )
        return of_rows

    def _frames(self, level: str, reference: Tensor) -> Tensor:
        """Frame of each row of a level, int64 ``[rows]``."""
        if level not in self._known:
            if level == "edge":
                centres = get_field(self._target, _EDGES, "target")[0]
                self._known[level] = get_field(self._target, _BATCH, "target")[centres]
            elif _BATCH in self._target:
                self._known[level] = self._target[_BATCH]
            else:
                numbers = self._target[NUM_ATOMS] if NUM_ATOMS in self._target else self._preds[NUM_ATOMS]
                self._known[level] = torch.arange(len(numbers), device=numbers.device).repeat_interleave(
                    numbers, output_size=len(reference)
                )
        return self._known[level]


def weights_in(target: Batch, labels: Sequence[str]) -> list[str]:
    """Weights of a batch that multiply to that of what is compared: names of fields, none if it has no such weights.

    The weight of a label counts for what compares that label alone.
    """
    names = [_WEIGHT, *(WEIGHTS_OF_LABELS.get(label, "") for label in labels if len(labels) == 1)]
    return [name for name in names if name in target]


def check_frames(target: Batch, numbers: Mapping[str, int]) -> None:
    """Refuse weights that are none, and indices that stand for nothing; makes the host wait.

    Args:
        target: a batch.
        numbers: of sets and groups that there are, by ``set`` and ``group``, as far as components tell them apart.

    Raises:
        TypeError, ValueError: with what was found.
    """
    for name in WEIGHT_FIELDS:
        if name in target:
            _check_weights(name, target[name])
    for by, number in numbers.items():
        name = _INDEX_OF[by]
        if name in target:
            _check_index(name, target[name], number, f"{by}_names")


def _check_weights(name: str, weights: Tensor) -> None:
    lowest, highest = _range(weights)
    if not (lowest >= 0 and highest < math.inf):
        raise ValueError(
            f"{name!r} has weights from {lowest:g} to {highest:g}; the weight of a frame is finite and not negative. "
            f"Look at data.weights and at the weights in the files."
        )


def _check_index(name: str, index: Tensor, number: int, names: str) -> None:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name!r} has dtype {index.dtype}; expected integers, such as torch.int64.")
    lowest, highest = _range(index)
    if lowest < -1 or highest >= number:
        raise ValueError(
            f"{name!r} has indices from {lowest} to {highest}, but there are {number} {names}: expected 0 to "
            f"{number - 1}, or -1 for none. Do data and metrics use the same {names}?"
        )


def _range(values: Tensor) -> Iterable[float]:
    lowest, highest = torch.stack((values.min(), values.max())).tolist()
    return lowest, highest
