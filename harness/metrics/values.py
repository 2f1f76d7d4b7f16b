"""Values of a step or an epoch: on the device, and as Python numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.metrics.components import WEIGHTED_SUM
from harness.support.device import SentNumbers

__all__ = ["Evaluated", "NamedValues", "Report", "Values"]


@dataclass(frozen=True)
class Report:
    """Values of one step or epoch with coefficients, contributions and counts, as Python numbers.

    Attributes:
        values: components, per-type values, and ``weighted_sum`` if any component has a coefficient; NaN without data.
        coeffs: coefficients of the components in the weighted sum, as it was made with them.
        contributions: coefficient × value of these components: they add up to ``weighted_sum``. 0 without data.
        counts: number of elements behind a value that is made of a sum of errors: three for each atom in ``forces``,
            each as often as the weight of its frame says.
        by_group: value of each group, of the components that are split by group.
        frames_by_group: number of frames of each group, whatever their weights and labels; empty where they are not
            counted.
    """

    values: dict[str, float]
    coeffs: dict[str, float]
    contributions: dict[str, float]
    counts: dict[str, float]
    by_group: dict[str, list[float]] = field(default_factory=dict)
    frames_by_group: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluated:
    """Values of a row before coefficients; what is reported of them is made when it is asked for.

    Attributes:
        averages: float64 ``[num_averages]``: components in the layout's order, then values of their parts; 0 without
            data.
        slots: float64 ``[num_slots]``; None if each is an average of its own.
        averages_have_data: bool ``[num_averages]``.
        slots_have_data: bool ``[num_slots]``; None if each is an average of its own.
        num_components: number of components.
        counts: float64 ``[num_slots]``: number of elements in each slot of sums.
        nan: float64 scalar.
        instead: position of the value that stands in for each one without data; None if all are their own.
    """

    averages: Tensor
    slots: Tensor | None
    averages_have_data: Tensor
    slots_have_data: Tensor | None
    num_components: int
    counts: Tensor
    nan: Tensor
    instead: Tensor | None = None

    @property
    def components(self) -> Tensor:
        """Values of the components: float64 ``[num_components]``; 0 without data."""
        if self.averages.shape[0] == self.num_components:
            return self.averages
        return self.averages[: self.num_components]

    @functools.cached_property
    def has_data(self) -> Tensor:
        """Mask of the reported values that have data: bool ``[num_values]``."""
        of_values = self._own_data
        return of_values if self.instead is None else of_values | of_values[self.instead]

    @functools.cached_property
    def reported(self) -> Tensor:
        """Components, values of their parts, values of slots: float64 ``[num_values]``; NaN without data."""
        with torch.enable_grad():  # it is kept for whoever else reads it
            values = self.averages if self.slots is None else torch.cat((self.averages, self.slots))
            if self.instead is not None:
                values = torch.where(self._own_data, values, values[self.instead])
            return torch.where(self.has_data, values, self.nan)

    @functools.cached_property
    def _own_data(self) -> Tensor:
        if self.slots_have_data is None:
            return self.averages_have_data
        return torch.cat((self.averages_have_data, self.slots_have_data))

    def map(self, function: Callable[..., Tensor], *others: Evaluated) -> Evaluated:
        """The same with a function applied to the values, together with those of ``others`` in the same layout."""
        averages = function(self.averages, *(other.averages for other in others))
        slots = None if self.slots is None else function(self.slots, *(other.slots for other in others))
        return Evaluated(
            averages,
            slots,
            self.averages_have_data,
            self.slots_have_data,
            self.num_components,
            self.counts,
            self.nan,
            self.instead,
        )


@dataclass(frozen=True)
class Values:
    """Every value of one step or epoch, still on the device.

    Attributes:
        names: names of the reported values, in the order of ``reported``.
        order: the order in which users see them.
        evaluated: values before coefficients.
        weighted_sum: float64 scalar, or None if no component has a coefficient.
        coeffs: float64 ``[num_components]``: the coefficients that made ``weighted_sum``; 0 outside of it.
        weighted: positions of the components in the weighted sum.
        counted: slots of sums that the elements of a value are in, by its name.
        by_group: positions of the values of the groups in ``reported``, by component.
        frames_by_group: float64 ``[num_groups]``: number of frames of each group; None where they are not counted.
    """

    names: tuple[str, ...]
    order: tuple[int, ...]
    evaluated: Evaluated
    weighted_sum: Tensor | None
    coeffs: Tensor | None = None
    weighted: tuple[int, ...] = ()
    counted: Mapping[str, range] = field(default_factory=dict)
    by_group: Mapping[str, range] = field(default_factory=dict)
    frames_by_group: Tensor | None = None

    @property
    def reported(self) -> Tensor:
        """Components, values of their parts, values of slots: float64 ``[num_values]``; NaN without data."""
        return self.evaluated.reported

    @property
    def has_data(self) -> Tensor:
        """Mask of the reported values that have data: bool ``[num_values]``."""
        return self.evaluated.has_data

    @property
    def counts(self) -> Tensor:
        """Number of elements in each slot of sums, see :mod:`harness.metrics.layout`: float64 ``[num_slots]``."""
        return self.evaluated.counts

    def detach(self) -> Values:
        """The same values without a graph."""
        if not self.evaluated.averages.requires_grad:
            return self
        weighted_sum = None if self.weighted_sum is None else self.weighted_sum.detach()
        return self.with_values(self.evaluated.map(Tensor.detach), weighted_sum)

    def with_values(self, evaluated: Evaluated, weighted_sum: Tensor | None) -> Values:
        """Other values of the same components."""
        return Values(
            self.names,
            self.order,
            evaluated,
            weighted_sum,
            self.coeffs,
            self.weighted,
            self.counted,
            self.by_group,
            self.frames_by_group,
        )

    def as_dict(self, prefix: str = "", suffix: str = "") -> dict[str, Tensor]:
        """Values by name, as scalar tensors on the device."""
        scalars = self.reported.unbind()
        values = {f"{prefix}{self.names[index]}{suffix}": scalars[index] for index in self.order}
        if self.weighted_sum is not None:
            values[f"{prefix}{WEIGHTED_SUM}{suffix}"] = self.weighted_sum
        return values

    def by_name(self, prefix: str = "", suffix: str = "") -> NamedValues:
        """The dictionary of :meth:`as_dict`, whose entries are made when they are asked for."""
        return NamedValues(self, prefix, suffix)

    def to_host(self, prefix: str = "", suffix: str = "") -> dict[str, float]:
        """Values by name as Python numbers: one copy, which the host waits for."""
        return {f"{prefix}{name}{suffix}": value for name, value in self.to_report().values.items()}

    def to_report(self) -> Report:
        """Values, coefficients, contributions and counts as Python numbers: one copy, which the host waits for."""
        return self.report_later()()

    def report_later(self) -> Callable[[], Report]:
        """Start the one copy to the host, and return the function that makes the report of it.

        On a GPU the host waits in that function, until the device has come to the values; best is to call it once the
        backward pass and the optimizer's step have been handed to the device.
        """
        pieces = [self.reported, self.weighted_sum, self.coeffs, self.counts, self.frames_by_group]
        lengths = [0 if piece is None else piece.numel() for piece in pieces]
        copy = SentNumbers(torch.cat([piece.detach().reshape(-1) for piece in pieces if piece is not None]))
        return lambda: self._report(copy.read(), lengths)

    def _report(self, vector: Iterable[float], lengths: Sequence[int]) -> Report:
        numbers = iter(vector)
        reported, total, coeffs, counts, frames = ([next(numbers) for _ in range(length)] for length in lengths)
        values = {self.names[index]: reported[index] for index in self.order}
        if total:
            values[WEIGHTED_SUM] = total[0]
        in_sum = {self.names[index]: coeffs[index] for index in self.weighted}
        return Report(
            values,
            {name: in_sum[name] for name in values if name in in_sum},
            {name: _contribution(in_sum[name], values[name]) for name in values if name in in_sum},
            {name: sum(counts[slot] for slot in self.counted[name]) for name in values if name in self.counted},
            {name: [reported[position] for position in cells] for name, cells in self.by_group.items()},
            [int(number) for number in frames],
        )


class NamedValues(MutableMapping[str, Tensor]):
    """Dictionary of the values of a step, as scalar tensors on the device, which are made when they are asked for.

    A training needs ``weighted_sum`` alone, of what may be hundreds of values; any other key makes all of them.

    Args:
        values: of the step.
        prefix: put before every name.
        suffix: put behind every name.
    """

    def __init__(self, values: Values, prefix: str = "", suffix: str = "") -> None:
        self._values, self._prefix, self._suffix = values, prefix, suffix
        self._weighted_sum = f"{prefix}{WEIGHTED_SUM}{suffix}"
        self._made: dict[str, Tensor] | None = None

    @property
    def _entries(self) -> dict[str, Tensor]:
        if self._made is None:
            self._made = self._values.as_dict(self._prefix, self._suffix)
        return self._made

    def __getitem__(self, key: str) -> Tensor:
        if self._made is None and key == self._weighted_sum and self._values.weighted_sum is not None:
            return self._values.weighted_sum
        return self._entries[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)


def _contribution(coeff: float, value: float) -> float:
    """Part of the weighted sum; nothing where there is no data, or no weight."""
    return 0.0 if coeff == 0 or math.isnan(value) else coeff * value
