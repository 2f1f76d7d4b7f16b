r"""Errors of a model before the first step of a training from its weights, and references that fit the new labels.

With the model's own prediction :math:`\hat E_g` and references :math:`\mu_t`, new references minimise

.. math:: \sum_g \Big(E_g - \hat E_g - \sum_t n_{gt}\, (\mu'_t - \mu_t)\Big)^2,

so that nothing of the interaction that the model has learnt is taken for a reference. It is what mace-torch does for
``E0s="estimated"``. A fit to the energies themselves, as for a model that is not trained, would leave a jump: a trained
model's predictions have a part that is linear in the composition, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.data import AtomsDataset, collate
from harness.data.device_neighbors import with_edges
from harness.data.references import EnergySums, fit_references, refitted_text
from harness.distributed import launched_rank, share
from harness.job.build import Job
from harness.job.recorded_model import ReferenceChoice, chosen_references
from harness.models import reference_energies, set_reference_energies
from harness.support.text import some

__all__ = ["settle_references"]

_EVALUATED = 100
"""Frames that the errors are of, at most."""
_FITTED, _FITTED_PER_TYPE = 100, 5
"""Frames that references are fitted to, at most: so many, or so many for each type that the frames have."""
_SHOWN = 6  # references
_OFFSET = 0.01  # eV/atom
Array = NDArray[np.float64]


@dataclass
class _Predictions:
    """Energies of labelled frames in eV, by the model and of the labels, and errors of all their forces."""

    counts: Array  # [num_frames, num_types]
    predicted: Array  # [num_frames], NaN of a model that predicts no energy
    labels: Array  # [num_frames]
    force_squares: float
    num_components: int

    def energy_error(self, change: Array | None = None) -> float:
        """Mean absolute error in eV per atom, with references changed by ``[num_types]`` eV; NaN without energies."""
        shifted = self.predicted if change is None else self.predicted + self.counts @ change
        return float(np.mean(np.abs(self.labels - shifted) / self.counts.sum(axis=1)))

    def force_error(self) -> float:
        """Root mean square error of a component in eV/Å; NaN without labels."""
        return float(np.sqrt(self.force_squares / self.num_components)) if self.num_components else float("nan")

    def fitted_change(self) -> Array:
        """Change of the references by least squares, of the least norm."""
        change = np.linalg.lstsq(self.counts, self.labels - self.predicted, rcond=None)[0]
        return np.asarray(change, dtype=np.float64)


def settle_references(job: Job, choice: ReferenceChoice, limit: timedelta) -> tuple[list[str], dict[str, Any]]:
    """Give the model the references that were asked for, and measure it before and after.

    Rank 0 does it for all, on its device, with a part of the frames.

    Args:
        job: with the weights that it starts from.
        choice: ``keep``, ``fit``, or eV by symbol, or the path of a file of isolated atoms.
        limit: time that the other ranks wait.

    Returns:
        Lines to print, and the same as plain data: errors in eV/atom and eV/Å, references in eV.

    Raises:
        ValueError: other references than the checkpoint's were asked for, of a model or data that do not allow it.
    """
    type_names = list(getattr(job.datamodule, "type_names", None) or [])
    before = reference_energies(job.module.model, type_names) if type_names else None
    measured = _set_to_measure(job)
    if choice != "keep" and before is None:
        raise ValueError(f"model.energy_shifts={choice}: the model has no reference energies that could be changed.")
    if measured is None:
        if choice != "keep":
            raise ValueError(f"model.energy_shifts={choice}: the data have no structures with energies to fit to.")
        return [], {}
    if launched_rank() == 0:
        found = json.dumps(_on_one_rank(job, choice, before, type_names, measured))
    lines, facts = json.loads(share("first errors", found if launched_rank() == 0 else "", limit))
    if before is not None and facts["references"] != before:
        set_reference_energies(job.module.model, list(facts["references"].values()))
    return lines, facts


def _on_one_rank(
    job: Job,
    choice: ReferenceChoice,
    before: Mapping[str, float] | None,
    type_names: Sequence[str],
    measured: tuple[str, AtomsDataset],
) -> tuple[list[str], dict[str, Any]]:
    name, dataset = measured
    chosen = _spread(dataset, _labelled(dataset), _EVALUATED)
    errors = _predicted(job, dataset, chosen)
    facts: dict[str, Any] = {
        "set": name,
        "num_frames": len(chosen),
        "forces_rmse": errors.force_error(),
        "per_atom_energy_mae": errors.energy_error(),
        "references": None if before is None else dict(before),
    }
    has_energy = not np.isnan(errors.predicted).all()
    energies = f"energies {facts['per_atom_energy_mae']:.4g} eV/atom (MAE)" if has_energy else "no energies"
    lines = [
        f"before the first step, {len(chosen)} of {len(dataset)} frames of the {name}: {energies}, forces "
        f"{facts['forces_rmse']:.4g} eV/Å (RMSE)"
    ]
    if choice != "keep" and not has_energy:
        raise ValueError(f"model.energy_shifts={choice}: the model predicts no energies that references belong to.")
    if before is None:
        return lines, facts
    if choice == "keep":
        return lines + _hint(errors), facts
    if choice == "fit":
        references, more = _refitted(job, before, type_names)
    else:
        statistics = getattr(job.datamodule, "statistics", None)
        references = chosen_references(choice, before, getattr(statistics, "energy_key", "energy"))
        more = [f"references as given: {_changes(before, references)}"]
    change = np.array([references[each] - before[each] for each in type_names])
    facts |= {
        "references": references,
        "per_atom_energy_mae_before": facts["per_atom_energy_mae"],
        "per_atom_energy_mae": errors.energy_error(change),
    }
    lines[0] += ", with the references of the checkpoint"
    lines += more
    worse = facts["per_atom_energy_mae"] > facts["per_atom_energy_mae_before"]
    lines.append(
        f"with these references: energies {facts['per_atom_energy_mae']:.4g} eV/atom (MAE), forces the same"
        + (". The error has risen: model.energy_shifts=keep leaves the references as they were" if worse else "")
    )
    return lines, facts


def _refitted(job: Job, before: Mapping[str, float], type_names: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """References that fit the training labels, and lines that say so."""
    dataset: AtomsDataset = job.datamodule.train_set  # type: ignore[attr-defined]
    labelled = _labelled(dataset)
    if not labelled:
        raise ValueError("model.energy_shifts=fit needs training frames with energies, found none.")
    compositions = dataset.frames.compositions().take(np.array(labelled))
    symbols = compositions.symbols()
    present = np.array([number for number, name in enumerate(type_names) if name in symbols], dtype=np.int64)
    chosen = _spread(dataset, labelled, max(_FITTED, _FITTED_PER_TYPE * len(present)))
    has = dataset.frames.subset(chosen).symbols()
    for name in (name for name in type_names if name in symbols - has):  # every type is in a frame
        chosen.append(labelled[compositions.first_with(name)])
    found = _predicted(job, dataset, sorted(set(chosen)))
    isolated = dict(getattr(job.datamodule.statistics, "isolated_atoms", None) or {})  # type: ignore[attr-defined]
    prior = {**before, **{name: energy for name, energy in isolated.items() if name in before}}
    # labels less the interaction that the model predicts
    energies = found.labels - found.predicted + found.counts @ np.array(list(before.values()))
    fit = fit_references(EnergySums.of(found.counts, energies), type_names, rows=(found.counts, energies), prior=prior)
    is_present = dict.fromkeys(np.array(type_names)[present].tolist())
    references = {
        name: float(energy) if name in is_present else before[name]
        for name, energy in zip(type_names, fit.energies, strict=True)
    }
    origin = "the isolated atoms and the model's own" if isolated else "the model's own"
    lines = [
        f"references refitted to {len(found.labels)} of {len(labelled)} training frames, by least squares of label "
        f"less prediction: {_changes(before, references)}"
    ]
    text = refitted_text(fit.undetermined, type_names, list(is_present), origin)
    return references, lines + ([text] if text else [])


def _hint(errors: _Predictions) -> list[str]:
    """A line where most of the error of the energies is one of references."""
    now = errors.energy_error()
    if not np.isfinite(now):
        return []
    left = errors.energy_error(errors.fitted_change())
    if now < _OFFSET or left > now / 3:
        return []
    return [
        f"most of the error of the energies is one of references: model=from_checkpoint model.energy_shifts=fit would "
        f"leave about {left:.2g} eV/atom"
    ]


def _changes(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Changed references, the largest changes first."""
    names = sorted((name for name in now if now[name] != before[name]), key=lambda name: -abs(now[name] - before[name]))
    if not names:
        return "none has changed"
    shown = some((f"{name} {before[name]:.4f} → {now[name]:.4f} eV" for name in names), _SHOWN)
    kept = len(now) - len(names)
    return shown + (f"; {kept} of elements that the frames do not have are kept" if kept else "")


def _set_to_measure(job: Job) -> tuple[str, AtomsDataset] | None:
    """The first validation set with energies, or the training set."""
    named = [(f"validation set {index}", each) for index, each in enumerate(getattr(job.datamodule, "val_sets", []))]
    named.append(("training set", getattr(job.datamodule, "train_set", None)))
    for name, dataset in named:
        if isinstance(dataset, AtomsDataset) and _labelled(dataset):
            return name, dataset
    return None


def _labelled(dataset: AtomsDataset) -> list[int]:
    return dataset.frames.labelled("energy").tolist()


def _spread(dataset: AtomsDataset, indices: Sequence[int], largest: int) -> list[int]:
    """At most so many of the indices, at equal distances."""
    places = np.unique(np.linspace(0, len(indices) - 1, min(len(indices), largest)).round().astype(int))
    return [indices[place] for place in places]


def _predicted(job: Job, dataset: AtomsDataset, indices: Sequence[int]) -> _Predictions:
    """Predictions of frames of a data set, on the device of the training."""
    model, device = job.module.model, job.trainer.strategy.root_device
    was_training = model.training
    model.eval().to(device)
    energies: list[float] = []
    squares, num_components = 0.0, 0
    try:
        with job.trainer.precision_plugin.forward_context():
            for batch in _batches(job, dataset, indices):
                moved = {name: value.to(device) for name, value in batch.items()}
                found = model(with_edges(moved, job.datamodule))
                no_energy = torch.full_like(batch["num_atoms"], torch.nan, dtype=torch.float64)
                energies += found.get("total_energy", no_energy).detach().double().flatten().cpu().tolist()
                if "forces" in found and "forces" in batch:
                    differences = (found["forces"].detach().double().cpu() - batch["forces"].double()).numpy()
                    squares += float(np.nansum(differences**2))
                    num_components += int(np.count_nonzero(~np.isnan(differences)))
    finally:
        model.train(was_training).to("cpu")
    frames = dataset.frames.subset(indices)
    counts, labels = frames.compositions().dense(dataset.type_names), np.nan_to_num(frames.column("energy"))
    return _Predictions(counts, np.array(energies), labels, squares, num_components)


def _batches(job: Job, dataset: AtomsDataset, indices: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
    size = getattr(job.datamodule, "eval_batch_size", None) or 4
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        yield collate([dataset[index] for index in part], dataset.dtype)
