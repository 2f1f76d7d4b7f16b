"""Values of groups of frames and of all files together, beside those of each file."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from harness.data.frames import FrameSet
from harness.data.reading import available_keys, information
from harness.fields import registered_fields
from harness.metrics import WEIGHTED_SUM, MetricsManager, Report, compute_together
from harness.metrics.frames import WEIGHT_FIELDS
from harness.support.text import did_you_mean

__all__ = ["ALL", "NO_GROUP", "GroupValues", "frames_part", "group_names"]

ALL = -1
"""In the place of a set: all of them together."""
NO_GROUP = "(none)"
"""Group of the frames that lack the name."""
MOST_GROUPS = 200
"""Largest number of groups."""


def group_names(sets: Sequence[FrameSet], name: str | None, is_asked_for: bool) -> tuple[list[list[str]] | None, str]:
    """Group of each frame of each set, and a note; None without groups.

    Args:
        sets: frames of each set.
        name: of the information that says the group; None for no groups.
        is_asked_for: whether the user has named it. Otherwise no groups are made where no frame has it, or too many do.

    Raises:
        ValueError: the user has named it, and no frame has it, or it has more than 200 values.
    """
    num_frames = sum(map(len, sets))
    if name is None or not num_frames:
        return None, ""
    found = [[_text(information(frame.atoms, name)) for frame in of_set] for of_set in sets]
    values = Counter(value for of_set in found for value in of_set)
    if set(values) == {NO_GROUP}:
        if not is_asked_for:
            return None, ""
        available = available_keys([frame.atoms for of_set in sets for frame in of_set[:1000]])
        raise ValueError(
            f"group={name}: no frame has it. {did_you_mean(name, available)}The frames have {available}; group=null "
            f"makes no groups"
        )
    if len(values) > MOST_GROUPS:
        text = f"group={name}: {len(values)} different values in {num_frames} frames, expected at most {MOST_GROUPS}"
        if is_asked_for:
            raise ValueError(f"{text}. Give a name whose values many frames share")
        return None, f"{text}: there are no groups"
    return found, ""


def _text(value: Any) -> str:
    return NO_GROUP if value is None else str(value)


class GroupValues(Callback):
    """Measures the groups of each set, and all sets together, in the batches of a test.

    Frames of a group are taken out of a batch and its predictions, so that the model sees each frame once. Where all
    frames of a group have weight 0 for a component, that of its label included, its value is of these, each counted
    once.

    Args:
        manager: whose components are measured; copies of it keep the sums.
        counted: positions of the sets that are measured; other sets are passed over.
        groups: group of each frame of each set; None for no groups.
    """

    def __init__(
        self, manager: MetricsManager, counted: Sequence[int], groups: Sequence[Sequence[str]] | None = None
    ) -> None:
        self._counted, self._groups = set(counted), groups
        cells: list[tuple[int, str | None]] = []
        several = len(self._counted) > 1
        for index in sorted(self._counted):
            cells += [(index, name) for name in self._names(index)]
        if several:
            names = dict.fromkeys(name for index in sorted(self._counted) for name in self._names(index))
            cells += [(ALL, None), *((ALL, name) for name in names)]
        self._managers = {(*cell, False): copy.deepcopy(manager) for cell in cells}
        # of the frames of weight 0 in each group
        self._managers |= {(*cell, True): copy.deepcopy(manager) for cell in cells if cell[1] is not None}
        self.reports: dict[tuple[int, str | None], Report] = {}
        """Values by set and group; the set :data:`ALL` is all of them, the group None is the whole set."""

    def _names(self, index: int) -> list[str]:
        """Groups of a set, in order of their first frames."""
        return [] if self._groups is None else list(dict.fromkeys(self._groups[index]))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with empty sums, on the device and the ranks of the module."""
        for manager in self._managers.values():
            manager.to(pl_module.device)
            manager.reset()
            manager.process_group = getattr(pl_module, "process_group", None)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch to its groups, and to all sets together."""
        if dataloader_idx not in self._counted or not self._managers:
            return
        with torch.no_grad():
            self._add(outputs, batch, (ALL, None))
            if self._groups is None:
                return
            names = [self._groups[dataloader_idx][number] for number in batch["frame_index"].tolist()]
            weightless = _weightless(batch, len(names))
            once = {field: values for field, values in batch.items() if field not in WEIGHT_FIELDS}
            for name in dict.fromkeys(names):
                chosen = [position for position, each in enumerate(names) if each == name]
                for source, positions in ((batch, chosen), (once, [each for each in chosen if weightless[each]])):
                    if positions:
                        is_whole = len(positions) == len(names)
                        predicted, labels = (outputs, source) if is_whole else frames_part(outputs, source, positions)
                        self._add(predicted, labels, (dataloader_idx, name), source is once)
                        self._add(predicted, labels, (ALL, name), source is once)

    def _add(
        self,
        outputs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        cell: tuple[int, str | None],
        is_weightless: bool = False,
    ) -> None:
        manager = self._managers.get((*cell, is_weightless))
        if manager is not None:
            manager(outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge over the ranks, all groups together."""
        with warnings.catch_warnings():
            # a group without atoms of a type is nothing to warn of
            warnings.filterwarnings("ignore", message="No data in the whole epoch")
            values = compute_together(list(self._managers.values()))
        found = {cell: each.to_report() for cell, each in zip(self._managers, values, strict=True)}
        self.reports = {}
        for (index, name, is_weightless), report in found.items():
            if not is_weightless:
                instead = found.get((index, name, True))
                manager = self._managers[index, name, False]
                self.reports[index, name] = report if instead is None else _completed(report, instead, manager)


def _weightless(batch: Mapping[str, Tensor], number: int) -> list[bool]:
    """True for the frames of a batch that have a weight of 0, or one of a label."""
    weights = [batch[field].reshape(-1) == 0 for field in WEIGHT_FIELDS if field in batch]
    return torch.stack(weights).any(dim=0).tolist() if weights else [False] * number


def _completed(report: Report, instead: Report, manager: MetricsManager) -> Report:
    """Report whose components without data have the values of another one, and their numbers of elements."""
    lacking = [entry for entry in manager.entries.values() if not _has_data(report, entry.name)]
    keys = [key for entry in lacking for key in (entry.name, *entry.value_keys(manager.type_names))]
    if len(lacking) == len(manager):
        keys.append(WEIGHTED_SUM)

    def completed(numbers: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
        return {**numbers, **{key: others[key] for key in keys if key in others}}

    return replace(
        report, values=completed(report.values, instead.values), counts=completed(report.counts, instead.counts)
    )


def _has_data(report: Report, name: str) -> bool:
    if name in report.counts:
        return report.counts[name] > 0
    return not math.isnan(report.values[name])  # a maximum, or a metric of another package


def frames_part(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], chosen: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Predictions and labels of some of the frames of a batch; fields of edges, and unknown ones, are left out.

    Args:
        outputs: predictions of the batch.
        batch: with ``num_atoms`` and ``batch``.
        chosen: positions of the frames in the batch.
    """
    levels = {name: spec.level for name, spec in registered_fields().items()}
    device = batch["num_atoms"].device
    graphs = torch.tensor(list(chosen), dtype=torch.int64, device=device)
    place = torch.full((len(batch["num_atoms"]),), -1, dtype=torch.int64, device=device)
    place[graphs] = torch.arange(len(graphs), device=device)
    of_atoms = place[batch["batch"]]
    atoms = (of_atoms >= 0).nonzero()[:, 0]

    def part(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = {"graph": graphs, "node": atoms}
        return {name: value[rows[levels[name]]] for name, value in values.items() if levels.get(name) in rows}

    return part(outputs), {**part(batch), "batch": of_atoms[atoms]}
