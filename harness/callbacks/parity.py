"""Parity plots: predicted against reference energies, forces and stresses of the test sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from harness.distributed import ProcessGroup, gather_objects, global_rank

__all__ = ["ParityPlot"]

Points = np.ndarray
"""``[num_points, 4]``: random key, reference, prediction, atom type (or -1)."""


class ParityPlot(Callback):
    """Draws predicted against reference values of a bounded random sample over all ranks, at the end of a test.

    One panel each for energy per atom, force components (coloured by atom type) and stress components, where labelled.
    The titles give MAE and RMSE of the points drawn; if there were more points than ``max_points``, those are a sample.

    Args:
        output_dir: where ``parity_test{i}.png`` is written; an image goes to W&B too.
        max_points: points kept for each panel.
        seed: seed of the sample.
    """

    def __init__(self, output_dir: str | Path = ".", max_points: int = 20_000, seed: int = 0) -> None:
        self.output_dir = Path(output_dir)
        self.max_points = max_points
        self.seed = seed
        self.files: list[Path] = []
        """Plots written so far."""
        self._points: dict[int, dict[str, Points]] = {}
        self._seen: dict[int, dict[str, int]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty sample."""
        self._points, self._seen, self.files = {}, {}, []
        self._random = np.random.default_rng((self.seed, global_rank(_group(pl_module))))

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
        if not isinstance(outputs, Mapping):
            return
        points = self._points.setdefault(dataloader_idx, {})
        seen = self._seen.setdefault(dataloader_idx, {})
        for name in ("total_energy", "forces", "stress"):
            if name not in outputs or name not in batch:
                continue
            reference, prediction = _numpy(batch[name]), _numpy(outputs[name])
            kind = np.full(len(reference), -1.0)
            if name == "total_energy":
                atoms = _numpy(batch["num_atoms"]).reshape(-1, 1)
                reference, prediction = reference / atoms, prediction / atoms
            elif name == "forces" and "atom_types" in batch:
                kind = _numpy(batch["atom_types"]).astype(float)
            columns = reference.size // max(len(reference), 1)
            table = np.stack(
                [
                    self._random.random(reference.size),
                    reference.reshape(-1),
                    prediction.reshape(-1),
                    np.repeat(kind, columns),
                ],
                axis=1,
            )
            table = table[np.isfinite(table).all(axis=1)]
            seen[name] = seen.get(name, 0) + len(table)
            points[name] = _smallest_keys([points[name], table] if name in points else [table], self.max_points)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the samples of all ranks and draw."""
        gathered = gather_objects((self._points, self._seen), _group(pl_module))
        if not trainer.is_global_zero:
            return
        type_names = list(getattr(pl_module, "type_names", None) or [])
        for index in sorted({index for points, _ in gathered for index in points}):
            parts = [points[index] for points, _ in gathered if index in points]
            names = dict.fromkeys(name for part in parts for name in part)
            joined = {
                name: _smallest_keys([part[name] for part in parts if name in part], self.max_points) for name in names
            }
            total = {name: sum(seen.get(index, {}).get(name, 0) for _, seen in gathered) for name in names}
            joined = {name: points for name, points in joined.items() if len(points)}
            if joined:
                path = self.output_dir / f"parity_test{index}.png"
                _draw(path, joined, total, type_names)
                self.files.append(path)
                for logger in trainer.loggers:
                    if isinstance(logger, WandbLogger):
                        logger.log_image(f"test{index}_parity", [str(path)])


def _group(module: LightningModule) -> ProcessGroup | None:
    """The ranks that share the test set; the others, if a strategy splits the world, have the same frames again."""
    return getattr(module, "process_group", None)


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy()


def _smallest_keys(tables: list[Points], number: int) -> Points:
    """A uniform sample of all tables together: the points with the smallest random keys."""
    table = np.concatenate(tables)
    return table if len(table) <= number else table[np.argpartition(table[:, 0], number)[:number]]


def _draw(path: Path, panels: Mapping[str, Points], total: Mapping[str, int], type_names: list[str]) -> None:
    # Figure without pyplot: no global state and no display
    from matplotlib.figure import Figure

    labels = {
        "total_energy": ("energy", "eV/atom"),
        "forces": ("force components", "eV/Å"),
        "stress": ("stress components", "eV/Å³"),
    }
    figure = Figure(figsize=(5 * len(panels), 4.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axis, (name, table) in zip(axes, panels.items(), strict=True):
        reference, prediction, kind = table[:, 1], table[:, 2], table[:, 3].astype(int)
        for index in np.unique(kind):
            chosen = kind == index
            label = type_names[index] if 0 <= index < len(type_names) else None
            axis.plot(reference[chosen], prediction[chosen], ".", markersize=3, alpha=0.5, label=label, rasterized=True)
        low, high = min(reference.min(), prediction.min()), max(reference.max(), prediction.max())
        axis.plot([low, high], [low, high], "-", color="black", linewidth=0.8)
        quantity, unit = labels[name]
        error = prediction - reference
        sample = "" if total[name] == len(table) else f" ({len(table)} of {total[name]} points)"
        axis.set_title(
            f"{quantity}{sample}\nMAE {np.abs(error).mean():.4g}, RMSE {np.sqrt((error**2).mean()):.4g} {unit}"
        )
        axis.set_xlabel(f"reference ({unit})")
        axis.set_ylabel(f"predicted ({unit})")
        axis.set_aspect("equal", adjustable="datalim")
        if len(np.unique(kind)) > 1:
            axis.legend(markerscale=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
