r"""The row: the few additive numbers that every error measure is a function of, and how rows merge.

For N elements with errors :math:`\varphi(r_i)` and weights :math:`w_i` (those of their frames, 0 where masked)

.. math::
    \text{sum} = \sum_i w_i \varphi(r_i), \qquad \text{count} = \sum_i w_i, \qquad
    \text{maximum} = \max_{w_i > 0} |r_i|

Sums and counts of a batch form ``additive``, maxima ``maxima``: both float64 vectors whose length never depends on
data. Rows merge by addition and by the larger value, whether they come from batches, ranks, micro-batches or the two
halves of an interrupted epoch: a rank is just another batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.distributed import Merging, ProcessGroup, merge_over_ranks

__all__ = ["Elements", "MergingRows", "Row", "merge_rows_over_ranks"]

_NO_MAXIMUM = -float("inf")


@dataclass(frozen=True)
class Row:
    """Statistics of some data: ``additive [num_additive]`` and ``maxima [num_maxima]``, both float64."""

    additive: Tensor
    maxima: Tensor

    @classmethod
    def neutral(cls, num_additive: int, num_maxima: int, device: torch.device | str = "cpu") -> Row:
        """The row of no data: its merge with any row changes nothing."""
        return cls(
            torch.zeros(num_additive, dtype=torch.float64, device=device),
            torch.full((num_maxima,), _NO_MAXIMUM, dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, additive: Sequence[Tensor], maxima: Sequence[Tensor], device: torch.device) -> Row:
        """Row from its float64 pieces, in order."""
        return cls(_concatenate(additive, device), _concatenate(maxima, device))

    @property
    def requires_grad(self) -> bool:
        """True if gradients flow through any number of the row."""
        return self.additive.requires_grad or self.maxima.requires_grad

    def merge(self, other: Row) -> Row:
        """Row of both data together, on this row's device: sums and counts add, maxima take the larger."""
        if not self.maxima.numel():
            return Row(self.additive + other.additive.to(self.additive.device), self.maxima)
        return Row(
            self.additive + other.additive.to(self.additive.device),
            torch.maximum(self.maxima, other.maxima.to(self.maxima.device)),
        )

    def detach(self) -> Row:
        """The same numbers without a graph."""
        maxima = self.maxima.detach() if self.maxima.requires_grad else self.maxima
        return Row(self.additive.detach(), maxima) if self.requires_grad else self


def merge_rows_over_ranks(rows: Sequence[Row], group: ProcessGroup | None = None) -> list[Row]:
    """Rows merged over the group, all in one SUM all-reduce, and one MAX all-reduce if there are maxima."""
    packed = _pack(rows)
    return _unpack(Row(*merge_over_ranks(packed.additive, packed.maxima, group)), rows)


class MergingRows:
    """Rows whose merge over the ranks is under way, see :class:`harness.distributed.Merging`.

    Args:
        rows: of this rank; without their graph.
        group: the data-parallel group; the whole world if None.
    """

    def __init__(self, rows: Sequence[Row], group: ProcessGroup | None = None) -> None:
        packed = _pack(rows)
        self._rows = [row.detach() for row in rows]
        self._merging = Merging(packed.additive, packed.maxima, group)

    def wait(self) -> list[Row]:
        """Rows of all ranks."""
        return _unpack(Row(*self._merging.wait()), self._rows)


def _pack(rows: Sequence[Row]) -> Row:
    """Rows behind one another, on the device of the first."""
    if len(rows) == 1:
        return rows[0]
    device = rows[0].additive.device
    return Row(torch.cat([row.additive.to(device) for row in rows]), torch.cat([row.maxima.to(device) for row in rows]))


def _unpack(packed: Row, like: Sequence[Row]) -> list[Row]:
    """Rows of the lengths of others, which were packed."""
    if len(like) == 1:
        return [packed]
    additive = torch.split(packed.additive, [row.additive.numel() for row in like])
    maxima = torch.split(packed.maxima, [row.maxima.numel() for row in like])
    return [Row(*pair) for pair in zip(additive, maxima, strict=True)]


@dataclass(frozen=True)
class Elements:
    """Prediction and target of the elements of a field, with the mask, weights and groups that errors are reduced by.

    Attributes:
        prediction: ``[rows, ...]``; 0 where masked.
        target: same shape; 0 where masked.
        mask: bool of the same shape, False where an element is left out; None if all count.
        types: int64 ``[rows]``, the group that each row belongs to, such as its atom type; None for one group.
        num_groups: number of groups, such as that of atom types, or 1.
        num_rest: number of groups behind these, whose rows are in none of them.
        weights: float64 ``[rows]``, weight of the frame of each row, above 0 where ``mask`` is True; None if each row
            counts once.
    """

    prediction: Tensor
    target: Tensor
    mask: Tensor | None = None
    types: Tensor | None = None
    num_groups: int = 1
    num_rest: int = 0
    weights: Tensor | None = None

    @classmethod
    def read(
        cls,
        prediction: Tensor,
        target: Tensor,
        *,
        ignore_nan: bool | Tensor,
        types: Tensor | None = None,
        num_groups: int = 1,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Elements:
        """Elements of a pair; those with a NaN target masked out if ``ignore_nan``, and rows that do not count.

        Both sides are replaced by 0 where masked, *before* any arithmetic, so that neither a NaN nor its gradient
        gets through; boolean indexing would synchronise host and device.

        Args:
            prediction: ``[rows, ...]``.
            target: same shape.
            ignore_nan: leave out elements whose target is NaN; in some of the rows alone if it is a mask of them,
                bool ``[rows]``.
            types: group of each row, int64 ``[rows]``.
            num_groups: number of groups.
            rows: bool ``[rows]``, those that count; None for all.
            weights: weight of each row, float64 ``[rows]``; rows of weight 0 do not count.
        """
        mask = _mask(target, ignore_nan, rows, weights)
        if mask is not None:
            prediction, target = torch.where(mask, prediction, 0.0), torch.where(mask, target, 0.0)
        return cls(prediction, target, mask, types, num_groups, weights=weights)

    @classmethod
    def of_target(
        cls,
        target: Tensor,
        *,
        ignore_nan: bool | Tensor,
        types: Tensor | None = None,
        num_groups: int = 1,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Elements:
        """Elements as :meth:`read` makes them, without a prediction, for :meth:`counts` alone."""
        return cls(target, target, _mask(target, ignore_nan, rows, weights), types, num_groups, weights=weights)

    def detach(self) -> Elements:
        """The same elements without a graph."""
        return replace(self, prediction=self.prediction.detach())

    def sums(self, errors: Tensor) -> Tensor:
        """Weighted sum of the errors of each group: float64 ``[num_groups]``. Masked errors must be 0."""
        if self.types is None and self.weights is None:
            return errors.sum(dtype=torch.float64).unsqueeze(0)
        return self._add(sum_rows(errors))

    def counts(self) -> Tensor:
        """Number of elements that count in each group, each as often as its weight says: float64 ``[num_groups]``."""
        if self.types is None and self.weights is None:
            if self.mask is not None:
                return self.mask.sum(dtype=torch.float64).unsqueeze(0)
            return self.target.new_full((1,), float(self.target.numel()), dtype=torch.float64)
        if self.mask is not None:
            return self._add(sum_rows(self.mask))
        rows = self.target.shape[0]
        per_row = float(self.target.numel() // rows) if rows else 0.0
        return self._add(self.target.new_full((rows,), per_row, dtype=torch.float64))

    def maxima(self, errors: Tensor) -> Tensor:
        """Largest error of each group: float64 ``[num_groups]``, ``-inf`` for a group without elements."""
        if self.mask is not None:
            errors = torch.where(self.mask, errors, _NO_MAXIMUM)
        empty = errors.new_full((self.num_groups + self.num_rest,), _NO_MAXIMUM, dtype=torch.float64)
        if not errors.numel():
            # Stays in the graph, so that a rank without data takes part in the same backward.
            return self._without_rest(empty + errors.sum() if errors.requires_grad else empty)
        if self.types is None:
            return errors.amax().to(torch.float64).unsqueeze(0)
        largest = errors if errors.dim() == 1 else errors.flatten(1).amax(1)
        return self._without_rest(empty.scatter_reduce(0, self.types, largest.to(torch.float64), "amax"))

    def _add(self, values: Tensor) -> Tensor:
        """Sum of a number of each row, times its weight, over the rows of each group."""
        values = values if self.weights is None else values * self.weights
        if self.types is None:
            return values.sum().unsqueeze(0)
        zeros = values.new_zeros(self.num_groups + self.num_rest)
        return self._without_rest(zeros.index_add(0, self.types, values))

    def _without_rest(self, values: Tensor) -> Tensor:
        return values[: self.num_groups] if self.num_rest else values


def _mask(target: Tensor, ignore_nan: bool | Tensor, rows: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Mask of the elements that count, of the shape of the target; None if all do."""
    mask = None if ignore_nan is False else _labelled(target)
    if isinstance(ignore_nan, Tensor) and mask is not None:
        mask = mask | ~_of_rows(ignore_nan, target)
    if weights is not None:
        rows = weights > 0 if rows is None else rows & (weights > 0)
    if rows is None:
        return mask
    rows = _of_rows(rows, target)
    return rows.expand(target.shape) if mask is None else mask & rows


def _of_rows(values: Tensor, target: Tensor) -> Tensor:
    """A number of each row ``[rows]`` in as many dimensions as the target has."""
    return values.reshape(-1, *[1] * (target.dim() - 1))


def _labelled(target: Tensor) -> Tensor | None:
    """Mask of the elements with a label; None if all have one: integers have no NaN."""
    return ~target.isnan() if target.is_floating_point() else None


def sum_rows(values: Tensor) -> Tensor:
    """Float64 sum of each row over all other dimensions: ``[rows, ...] -> [rows]``."""
    if values.dim() == 1:
        return values.to(torch.float64)
    return values.sum(dim=tuple(range(1, values.dim())), dtype=torch.float64)


def _concatenate(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(pieces)) if pieces else _no_numbers(device)


@functools.cache
def _no_numbers(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives this step
        return torch.empty(0, dtype=torch.float64, device=device)
