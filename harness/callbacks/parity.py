"""Parity plots: predicted against reference labels of the test sets, and of validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from harness.distributed import ProcessGroup, broadcast_object, gather_to_first, rank_in_group
from harness.fields import field_spec, registered_fields
from harness.loggers import log_image
from harness.support.checks import whole_number
from harness.support.figures import new_figure
from harness.support.files import replacing, try_write
from harness.support.log_keys import LogKeys, stage_of_set

__all__ = ["ParityPlot"]

Points = np.ndarray
"""``[num_points, 4]``: random key, reference, prediction, atom type (or -1)."""
MOST_TYPES = 10
"""Largest number of atom types with a panel each."""
FEWEST_IN_HEXAGON = 4
"""Smallest number of points in the fullest hexagon for which a density is drawn."""
_ALL = -2  # in the place of a type: all of them together


class ParityPlot(Callback):
    """Draws predicted against reference values at the end of a test, and of validations if asked to.

    One panel each for the energy per atom, the force components on each atom type and the stress components, and for
    each further label of the data (``data.labels``) that the model predicts, by atom type if it is one of atoms, where
    labelled; more than ten types of atoms share one panel. The colour is the number of points in a hexagon, the inset
    the distribution of the errors. MAE and RMSE in the titles are those of all values of all ranks, while the points
    are a bounded random sample of them.

    Args:
        output_dir: where ``parity_test{i}.png`` and ``parity_val{i}_epoch{e}.png`` are written; images go to W&B too,
            as ``test{i}_report/parity`` and ``val{i}_report/parity``.
        max_points: points drawn in each panel.
        seed: seed of the sample.
        validation_every_n_epochs: draw the validation of each n-th epoch as well; None for no validation.

    Raises:
        ValueError: a number of points or epochs that is none.
    """

    def __init__(
        self,
        output_dir: str | Path = ".",
        max_points: int = 20_000,
        seed: int = 0,
        validation_every_n_epochs: int | None = None,
    ) -> None:
        for name, value in (("max_points", max_points), ("validation_every_n_epochs", validation_every_n_epochs)):
            if value is not None:
                whole_number(name, value)
        self.output_dir = Path(output_dir)
        self.max_points = max_points
        self.seed = seed
        self.validation_every_n_epochs = validation_every_n_epochs
        self.files: list[Path] = []
        """Plots of the last test or validation."""
        self._sets: dict[int, dict[str, _Quantity]] = {}  # by data set and field

    @property
    def written_files(self) -> dict[str, list[Path]]:
        """Plots of the last test or validation, for the end of the job."""
        return {"parity plot": self.files}

    # --- when ---

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty sample."""
        self._start(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch to the sample."""
        self._add(outputs, batch, dataloader_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the samples of all ranks and draw."""
        self._finish(trainer, pl_module, "test", "parity_test{}.png")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty sample, if this validation is drawn."""
        if self._draws_validation(trainer):
            self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch to the sample, if this validation is drawn."""
        if self._draws_validation(trainer):
            self._add(outputs, batch, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the samples of all ranks and draw, if this validation is drawn."""
        if self._draws_validation(trainer):
            self._finish(trainer, pl_module, "val", f"parity_val{{}}_epoch{trainer.current_epoch}.png")

    def _draws_validation(self, trainer: Trainer) -> bool:
        every = self.validation_every_n_epochs
        return every is not None and not trainer.sanity_checking and (trainer.current_epoch + 1) % every == 0

    # --- what ---

    def _start(self, module: LightningModule) -> None:
        self._sets, self.files = {}, []
        self._random = np.random.default_rng((self.seed, rank_in_group(_group(module))))

    def _add(self, outputs: Any, batch: Mapping[str, Tensor], index: int) -> None:
        if not isinstance(outputs, Mapping):
            return
        quantities = self._sets.setdefault(index, {})
        for name in (*_LABELS, *_further_labels(outputs, batch)):
            if name not in outputs or name not in batch:
                continue
            reference, prediction = _numpy(batch[name]), _numpy(outputs[name])
            kind = np.full(len(reference), -1)
            if name == "total_energy":
                atoms = _numpy(batch["num_atoms"]).reshape(-1, 1)
                reference, prediction = reference / atoms, prediction / atoms
            elif field_spec(name).level == "node" and "atom_types" in batch:
                kind = _numpy(batch["atom_types"]).astype(int).reshape(-1)
            columns = reference.size // max(len(reference), 1)
            keys = self._random.random(reference.size)
            table = np.stack([keys, reference.reshape(-1), prediction.reshape(-1), np.repeat(kind, columns)], axis=1)
            quantities.setdefault(name, _Quantity()).add(table, self.max_points)

    def _finish(self, trainer: Trainer, module: LightningModule, kind: Literal["val", "test"], file_name: str) -> None:
        sets = _joined(self._sets, self.max_points, _group(module))
        self._sets = {}
        if not trainer.is_global_zero:
            return
        type_names = list(getattr(module, "type_names", None) or [])
        for index, panels in sorted(sets.items()):
            if not panels:
                continue
            path = self.output_dir / file_name.format(index)
            if not try_write(path, partial(_draw, panels=panels, type_names=type_names)):
                continue
            self.files.append(path)
            log_image(trainer, LogKeys(stage_of_set(kind, index), section="report").key("parity"), path)


@dataclass
class _Panel:
    """Panel of a quantity, or of one atom type's part of it.

    Attributes:
        name: field.
        kind: atom type, or -1 where there is none, or ``_ALL``.
        sums: number of labels, Σ|error| and Σ error² over all of them.
        points: the sample.
    """

    name: str
    kind: int
    sums: np.ndarray
    points: Points


@dataclass
class _Quantity:
    """A field of one data set on this rank: exact sums by atom type, and a bounded random sample."""

    sums: dict[int, np.ndarray] = field(default_factory=dict)
    points: Points = field(default_factory=lambda: np.empty((0, 4)))

    def add(self, table: Points, max_points: int) -> None:
        table = table[np.isfinite(table[:, 1])]  # no label where not
        for kind in np.unique(table[:, 3]).astype(int).tolist():
            error = np.abs(np.diff(table[table[:, 3] == kind, 1:3])[:, 0])
            self.sums[kind] = self.sums.get(kind, 0.0) + np.array([len(error), error.sum(), (error**2).sum()])
        drawn = table[np.isfinite(table[:, 2])]
        self.points = _sample(np.concatenate([self.points, drawn]), max_points)


def _sample(table: Points, number: int) -> Points:
    """The points with the smallest random keys: a uniform sample of each type, or of all if there are many types."""
    kinds = np.unique(table[:, 3])
    if len(kinds) > MOST_TYPES:
        return _smallest_keys(table, number)
    return np.concatenate([_smallest_keys(table[table[:, 3] == kind], number) for kind in kinds] or [table])


def _smallest_keys(table: Points, number: int) -> Points:
    return table if len(table) <= number else table[np.argpartition(table[:, 0], number)[:number]]


def _joined(
    sets: Mapping[int, Mapping[str, _Quantity]], max_points: int, group: ProcessGroup | None
) -> dict[int, list[_Panel]]:
    """Panels of each data set, over all ranks; all must call it, and the first of them has the points.

    The sums go first: they say how small a random key is when the number of points with smaller ones is about
    ``max_points``, so that ranks need not send the others.
    """
    own = {index: {name: each.sums for name, each in quantities.items()} for index, quantities in sets.items()}
    panels = broadcast_object(_panels(gather_to_first(own, group)), group)
    every_panel = [(index, panel) for index, own in panels.items() for panel in own]
    parts = gather_to_first([_part(sets, index, panel, max_points) for index, panel in every_panel], group)
    for position, (_, panel) in enumerate(every_panel if parts else []):
        panel.points = _smallest_keys(np.concatenate([part[position] for part in parts]), max_points)
    return panels


def _panels(everyone: Sequence[Mapping[int, Mapping[str, Mapping[int, np.ndarray]]]]) -> dict[int, list[_Panel]]:
    """Panels of each data set without points, from the sums of all ranks by set, name and atom type."""
    panels: dict[int, list[_Panel]] = {}
    for index in sorted({index for each in everyone for index in each}):
        names = dict.fromkeys(name for each in everyone for name in each.get(index, {}))
        panels[index] = []
        for name in names:
            by_kind: dict[int, np.ndarray] = {}
            for each in everyone:
                for kind, sums in each.get(index, {}).get(name, {}).items():
                    by_kind[kind] = by_kind.get(kind, 0.0) + sums
            if len(by_kind) > MOST_TYPES:
                by_kind = {_ALL: np.sum(list(by_kind.values()), axis=0)}
            panels[index] += [_Panel(name, kind, sums, np.empty((0, 4))) for kind, sums in sorted(by_kind.items())]
    return panels


def _part(sets: Mapping[int, Mapping[str, _Quantity]], index: int, panel: _Panel, max_points: int) -> Points:
    """Points of this rank's sample whose random keys may be among the smallest of all ranks."""
    quantity = sets.get(index, {}).get(panel.name)
    if quantity is None:
        return np.empty((0, 4))
    points = quantity.points
    if panel.kind != _ALL:
        points = points[points[:, 3] == panel.kind]
    largest_key = (1.1 * max_points + 100) / panel.sums[0]  # by five standard deviations more than are needed
    return points[points[:, 0] < largest_key]


def _group(module: LightningModule) -> ProcessGroup | None:
    """Process group of the ranks that share the test set; None for all. Other groups have the same frames again."""
    return getattr(module, "process_group", None)


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy()


# --- drawing ---

_LABELS = {"total_energy": ("energy", "eV/atom"), "forces": ("forces", "eV/Å"), "stress": ("stress", "eV/Å³")}
_GREY = "0.35"


def _draw(path: Path, panels: Sequence[_Panel], type_names: Sequence[str]) -> None:
    from PIL import Image  # which matplotlib needs, too

    rows = 1 if len(panels) <= 3 else 2 if len(panels) <= 8 else 3
    columns = math.ceil(len(panels) / rows)
    # margins in inches: to let matplotlib find them takes as long as to draw
    side, left, right, bottom, top = 3.3, 0.85, 0.55, 0.55, 0.8
    width, height = columns * (left + side + right), rows * (bottom + side + top)
    figure = new_figure(width, height)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    figure.subplots_adjust(wspace=(left + right) / side, hspace=(bottom + top) / side)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, type_names)
    for axis in axes[len(panels) :]:
        axis.remove()
    with replacing(path) as part:  # W&B may be reading the one before
        figure.savefig(part, dpi=130, format="png")
        with Image.open(part) as image:  # in 256 colours: a third of the size, and no difference to be seen
            few = image.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE)
        few.save(part, format="png", optimize=True)


def _draw_panel(axis: Any, panel: _Panel, type_names: Sequence[str]) -> None:
    quantity, unit = _LABELS.get(panel.name) or (panel.name.replace("_", " "), field_spec(panel.name).unit)
    number, mean, square = panel.sums / [1, panel.sums[0], panel.sums[0]]
    if panel.kind >= 0:
        quantity += f" on {_type_name(panel.kind, type_names)}"
    drawn = len(panel.points)
    sample = f"{number:,.0f} points" if drawn == number else f"sample of {drawn:,} of {number:,.0f} points"
    factor, milli = (1e3, "m") if mean < 0.1 and unit else (1, "")
    errors = f"MAE {_rounded(factor * mean)}, RMSE {_rounded(factor * np.sqrt(square))} {milli}{unit}".rstrip()
    axis.set_title(quantity, loc="left", fontsize=13, fontweight="bold", pad=34)
    axis.text(0, 1.02, f"{errors}\n{sample}", fontsize=9.5, linespacing=1.3, color=_GREY, transform=axis.transAxes)
    behind = f" ({unit})" if unit else ""
    axis.set(xlabel=f"reference{behind}", ylabel=f"predicted{behind}")
    if not drawn:
        axis.text(0.5, 0.5, "no prediction is finite", ha="center", transform=axis.transAxes)
        return
    reference, prediction = panel.points[:, 1], panel.points[:, 2]
    low, high = min(reference.min(), prediction.min()), max(reference.max(), prediction.max())
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    low, high = low - margin, high + margin
    axis.plot([low, high], [low, high], "-", color=_GREY, linewidth=0.8, zorder=1)
    _draw_density(axis, reference, prediction, (low, high, low, high))
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axis.locator_params(nbins=6)  # the same ticks on both axes
    axis.spines[["top", "right"]].set_visible(False)
    _draw_errors(
        axis.inset_axes((0.66, 0.1, 0.31, 0.2)),
        factor * (prediction - reference),
        f"error ({milli}{unit})" if unit else "error",
    )


def _further_labels(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> list[str]:
    """Names of the labels of a batch beside energy, forces and stress that there are predictions of.

    They are registered as labels that may be missing. A label that the model hands on with the batch is no prediction.
    """
    known = registered_fields()
    labels = [name for name in batch if name not in _LABELS and name in known and known[name].may_be_missing]
    predicted = [name for name in labels if name in outputs and outputs[name] is not batch[name]]
    return [name for name in predicted if outputs[name].numel() == batch[name].numel()]


def _draw_density(axis: Any, reference: np.ndarray, prediction: np.ndarray, extent: tuple[float, ...]) -> None:
    """Number of points in each hexagon; dots where hardly two points share one."""
    hexagons = axis.hexbin(
        reference, prediction, gridsize=(100, 58), extent=extent, bins="log", mincnt=1, cmap="viridis", zorder=2,
        linewidths=0.2,
    )  # fmt: skip
    most = hexagons.get_array().max()
    if most < FEWEST_IN_HEXAGON:
        hexagons.remove()
        axis.plot(reference, prediction, ".", color=hexagons.cmap(0.25), markersize=6, alpha=0.7, zorder=2)
        return
    bar = axis.figure.colorbar(hexagons, cax=axis.inset_axes((1.02, 0, 0.025, 1)), format="{x:,.0f}")
    bar.ax.minorticks_off()
    bar.set_ticks([*(10**power for power in range(int(np.log10(most / 1.5)) + 1)), most])
    bar.ax.tick_params(labelsize=7, length=2, pad=2)
    bar.ax.set_title("points", fontsize=7, color=_GREY, loc="left")
    bar.outline.set_visible(False)


def _draw_errors(axis: Any, errors: np.ndarray, label: str) -> None:
    """Histogram of errors, of all but the largest hundredth."""
    widest = np.quantile(np.abs(errors), 0.99) or 1.0
    axis.hist(errors, bins=31, range=(-widest, widest), color=_GREY)
    axis.set_xlabel(label, fontsize=7, labelpad=1)
    axis.tick_params(labelsize=7, pad=1, length=2)
    axis.set(yticks=[], facecolor="none", xlim=(-widest, widest))
    axis.spines[["top", "left", "right"]].set_visible(False)


def _rounded(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _type_name(kind: int, type_names: Sequence[str]) -> str:
    return type_names[kind] if 0 <= kind < len(type_names) else f"type {kind}"
