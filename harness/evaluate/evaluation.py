"""One evaluation: built and checked on all ranks, run by Lightning's test loop, and its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console

import harness
from harness.callbacks import ParityPlot
from harness.callbacks.tables import values_table
from harness.checkpoints import read
from harness.data.collate import frame_to_sample
from harness.data.evaluation import (
    EvaluatedFile,
    EvaluationDataModule,
    content_digests,
    label_notes,
    read_evaluated,
    refuse_unknown_elements,
)
from harness.data.frames import FrameList, FrameSet, JoinedFrames
from harness.data.reading import Frame
from harness.data.references import outside_text
from harness.evaluate.groups import ALL, GroupValues, group_names
from harness.evaluate.metrics import default_metrics, ignoring_missing_labels, metrics_of_training
from harness.evaluate.predictions import PredictionFile
from harness.evaluate.report import CSV, JSON, Errors, overview, write_csv, write_json
from harness.evaluate.settings import Request, batch_limit, extras_of, label_keys
from harness.job.failures import TrainingPosition
from harness.job.match import Start, energy_level_text
from harness.job.trainer import make_strategy, make_trainer, withheld
from harness.metrics import MetricsManager
from harness.module import ForceFieldModule
from harness.module.build import build_manager
from harness.support.log_keys import stage_of_set
from harness.trained import TrainedModel

__all__ = ["Evaluation", "build", "picture_names"]

_LABELS = {"energy": "total_energy", "forces": "forces", "stress": "stress"}
"""Fields of the labels of a frame."""


@dataclass
class Evaluation:
    """Parts of an evaluation on this rank.

    Attributes:
        request: of the command line.
        files: that are read.
        sets: position in ``files`` of each set of the test; None for that of the isolated atoms.
        labelled: sets with labels, which errors are of.
        data: batches of the sets.
        module: model and metrics.
        trainer: whose test loop runs.
        manager: metrics of one set; those of the module have the same components.
        groups: errors of groups and of all files together.
        group_of: group of each frame of each set; None without groups.
        parity: pictures.
        predictions: the file of predictions, if it was asked for.
        position: callback that reports where a rank has failed.
        notes: lines to print.
        facts: of the checkpoint and the run, for the JSON file.
        limits: of a batch.
    """

    request: Request
    files: list[EvaluatedFile]
    sets: list[int | None]
    labelled: list[int]
    data: EvaluationDataModule
    module: ForceFieldModule
    trainer: Trainer
    manager: MetricsManager
    groups: GroupValues
    group_of: list[list[str]] | None
    parity: ParityPlot
    predictions: PredictionFile | None
    position: TrainingPosition
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Evaluate on all ranks."""
        self.trainer.test(self.module, datamodule=self.data, verbose=False)

    # --- results ---

    @property
    def results(self) -> tuple[list[Errors], Errors | None]:
        """Errors of each file with labels, and of all of them together; None without labels."""
        files = [self._of_set(index) for index in self.labelled]
        if len(files) < 2:
            return files, files[0] if files else None
        sizes = np.concatenate([self._sizes(index) for index in self.labelled])
        return files, self._errors(ALL, "all files", sizes, self.groups.reports[ALL, None])

    def _of_set(self, index: int) -> Errors:
        file = self.files[self.sets[index]]  # type: ignore[index]
        report = self.module.reports[stage_of_set("test", index)]
        return replace(self._errors(index, str(file.path), self._sizes(index), report), facts={"labels": file.labels()})

    def _errors(self, index: int, name: str, sizes: NDArray[np.int64], report: Any) -> Errors:
        """Errors of a set, or of all, whose frames have so many atoms, with those of its groups."""
        chosen = self.labelled if index == ALL else [index]
        members: dict[str, list[int]] = {}
        for each in chosen if self.group_of is not None else []:
            for size, group in zip(self._sizes(each).tolist(), self.group_of[each], strict=True):  # type: ignore[index]
                members.setdefault(group, []).append(size)
        groups = [
            Errors(group, len(own), sum(own), self.groups.reports[index, group]) for group, own in members.items()
        ]
        return Errors(name, len(sizes), int(sizes.sum()), report, groups)

    def _sizes(self, index: int) -> NDArray[np.int64]:
        """Number of atoms of each frame of a set."""
        return self.data.test_sets[index].frames.num_atoms()

    def print_results(self, console: Console) -> None:
        """Print a table of each file, its groups, and an overview of several files."""
        files, everything = self.results
        group = self.request.config.group
        for errors in files:
            console.print(self._table(errors), highlight=False)
            if len(errors.groups) > 1:
                console.print(overview(f"by {group}", str(group), errors.groups, self.manager), highlight=False)
        if len(files) > 1 and everything is not None:
            console.print(self._table(everything), highlight=False)
            if len(everything.groups) > 1:
                console.print(overview(f"by {group}", str(group), everything.groups, self.manager), highlight=False)
            console.print(overview("by file", "file", [*files, everything], self.manager), highlight=False)

    def _table(self, errors: Errors) -> Any:
        title = f"{errors.name}: {errors.frames} frames, {errors.atoms} atoms"
        return values_table(title, self.manager, errors.report.values, type_names=self.present_types)

    @property
    def present_types(self) -> list[str]:
        """Atom types that any evaluated frame has, in the model's order."""
        present = set[str]().union(*(file.frames.symbols() for file in self.files))
        return [name for name in self.manager.type_names if name in present]

    def ending(self) -> list[str]:
        """Lines to print at last: predictions that are not finite, and where the file of predictions is."""
        lines, every = [], JoinedFrames([file.frames for file in self.files])
        _, everything = self.results
        if everything is not None:
            values, counts = everything.report.values, everything.report.counts
            wrong = [name for name, count in counts.items() if count and math.isnan(values[name])]
            if wrong:
                lines.append(f"NaN, since predictions are not finite: {', '.join(wrong)}")
        if self.predictions is None:
            return lines
        numbers = self.predictions.not_finite
        if numbers:
            first = every.location(numbers[0])
            lines.append(f"{len(numbers)} of {len(every)} frames have predictions that are not finite; first: {first}")
        return [*lines, f"predictions {self.predictions.path} ({len(every)} frames)"]

    def write_results(self, folder: Path, facts: Mapping[str, Any]) -> list[tuple[str, Path]]:
        """Write values and name the pictures after the files.

        Returns:
            Written files, each with a label.
        """
        files, everything = self.results
        if everything is None:
            return []
        write_json(folder / JSON, {**self.facts, **facts}, files, everything, self.manager)
        write_csv(folder / CSV, files, everything, self.manager)
        written = [("values", folder / JSON), ("table", folder / CSV)]
        names = picture_names(self.files)
        for picture in self.parity.files:
            number = self.sets[int(picture.stem.removeprefix("parity_test"))]
            if number is not None:
                written.append(("parity plot", picture.replace(folder / names[number])))
        return written


def picture_names(files: Sequence[EvaluatedFile]) -> list[str]:
    """Name of the parity picture of each file: that of the file, with its number where others have the same."""
    stems = [file.path.stem for file in files]
    return [
        f"parity_{stem}.png" if stems.count(stem) == 1 else f"parity_{stem}_{number}.png"
        for number, stem in enumerate(stems, start=1)
    ]


def build(request: Request) -> Evaluation:
    """Parts of an evaluation: read, checked, and tried on one frame.

    Raises:
        ValueError, TypeError, KeyError, OSError: a mistake of the user.
    """
    config, path = request.config, request.checkpoint
    config.output_dir = str(Path(config.output_dir).expanduser().absolute())
    trained = harness.load_model(path, trust=list(config.trust), head=config.head)
    if trained.type_names is None or trained.cutoff is None:
        raise ValueError(f"{path} has no type names or no cutoff, so the batches of its model are not known")
    head = trained.head_index()
    record, checkpoint = trained.record, read(path)
    settings: dict[str, Any] = record.get("settings") or {}
    keys, named = label_keys(config, settings)
    extras, asked = extras_of(config, record.get("extras"))
    type_names = trained.type_names
    files = read_evaluated(
        request.files, keys, named,
        config.data.min_distance, config.data.check_units, config.data.isolated_atoms, extras, asked,
    )  # fmt: skip
    refuse_unknown_elements(files, type_names, f"the model of {path}")
    notes = [note for file in files for note in label_notes(file, keys)] + _trained_on(request.files, record)
    sets, labelled, frames, places = _sets(files, with_predictions=config.write is not None)
    if not labelled and config.write is None:
        raise ValueError("\n".join([*notes, "There is nothing to compare; --write FILE.xyz writes predictions"]))

    config.precision = config.precision or str(record.get("precision") or "32-true")
    config.matmul_precision = config.matmul_precision or settings.get("matmul_precision") or "highest"
    torch.set_float32_matmul_precision(config.matmul_precision)
    dtype = config.data.dtype or ("float64" if config.precision == "64-true" else record.get("dtype") or "float32")
    limits = batch_limit(config, settings)
    data = EvaluationDataModule(
        frames,
        type_names,
        trained.cutoff, _dtype(dtype), **limits,
        num_workers=config.data.num_workers, pin_memory=config.data.pin_memory, head=head,
        extras=extras,
    )  # fmt: skip

    _check_device(config.device)
    position = TrainingPosition()
    parity = ParityPlot(config.output_dir)
    with withheld():
        # the callbacks are made for the fields that the model is seen to predict, on the device that it is tried on
        trainer = make_trainer(config, make_strategy(config), [position, *([parity] if config.parity else [])])
    predictions = None
    every_frame = JoinedFrames([file.frames for file in files])
    if config.write is not None:
        further = [entry.field for entry in extras.labels]
        predictions = PredictionFile(Path(config.write), every_frame, places, config.prefix, further)
    model = trainer.precision_plugin.convert_module(trained.model).to(trainer.strategy.root_device)
    sample, found = _try(model, every_frame[int(every_frame.num_atoms().argmin())], data, trainer, head)
    metrics, note = _metrics(request, settings, files, found, trained.head)
    manager = build_manager(metrics, "metrics", type_names)
    if labelled:
        manager.measure(found, sample)  # refuses components of fields that there are not
    group_of, of_groups = group_names(frames, config.group, "group" in request.given)
    groups = GroupValues(manager, labelled, group_of)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks += [groups, *([predictions] if predictions else [])]
    module = ForceFieldModule(
        model, harness.EnergyOnlyLoss, test_metrics=manager, type_names=type_names, num_test_sets=len(sets)
    )
    names = ["isolated atoms" if number is None else str(files[number].path) for number in sets]
    notes += [text for text in (note, of_groups) if text] + _references(trained, data, names)
    facts = {
        "checkpoint": str(path.absolute()),
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
        "precision": config.precision,
        "dtype": dtype,
        "keys": {name: getattr(keys, name) for name in ("energy", "forces", "stress", "virial")},
        "labels": {entry.field: entry.key for entry in extras.labels},
        "weights": None if config.data.unweighted else extras.weighting.plain(),
        "group": config.group if group_of is not None else None,
    }
    return Evaluation(
        request, files, sets, labelled, data, module, trainer, manager, groups, group_of, parity, predictions, position,
        notes, facts, limits,
    )  # fmt: skip


def _sets(
    files: Sequence[EvaluatedFile], with_predictions: bool
) -> tuple[list[int | None], list[int], list[FrameSet], list[list[int]]]:
    """Sets of the test: the file of each, which have labels, their frames, and the places of these among all frames.

    Isolated atoms are a last set, without labels, since no errors are of them. Without a file of predictions, it and
    files without labels are left out.
    """
    sets: list[int | None] = []
    labelled: list[int] = []
    frames: list[FrameSet] = []
    places: list[list[int]] = []
    isolated: list[Frame] = []
    places_isolated: list[int] = []
    start = 0
    for number, file in enumerate(files):
        has_labels = any(file.labels().values())
        if file.counted and (has_labels or with_predictions):
            labelled += [len(sets)] if has_labels else []
            sets.append(number)
            frames.append(file.structures)
            places.append([start + position for position in file.counted])
        others = sorted(set(range(len(file.frames))) - set(file.counted))
        isolated += [_without_labels(file.frames[position], file.fields) for position in others]
        places_isolated += [start + position for position in others]
        start += len(file.frames)
    if isolated and with_predictions:
        sets.append(None)
        frames.append(FrameList(isolated))
        places.append(places_isolated)
    return sets, labelled, frames, places


def _without_labels(frame: Frame, fields: Sequence[str]) -> Frame:
    """A frame that errors are not of; inputs of the model stay."""
    extras = {name: value for name, value in frame.extras.items() if name not in fields}
    return replace(frame, energy=None, forces=None, stress=None, extras=extras, group=None)


def _try(
    model: torch.nn.Module, frame: Frame, data: EvaluationDataModule, trainer: Trainer, head: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sample of a frame, and the predictions of the model for it."""
    frame = replace(frame, group=None)  # it may be an isolated atom, which is in no set and in no group
    sample = frame_to_sample(frame, data.type_names, data.cutoff, 0, data.dtype, data.batch_fields)
    if head is not None:
        sample["set_index"] = torch.tensor([head])
    sample = {name: value.to(trainer.strategy.root_device) for name, value in sample.items()}
    with torch.enable_grad(), trainer.precision_plugin.forward_context():
        found = model.eval()(sample)
    return sample, {name: value.detach() for name, value in found.items()}


def _metrics(
    request: Request,
    settings: Mapping[str, Any],
    files: Sequence[EvaluatedFile],
    predicted: Mapping[str, Any],
    head: str | None,
) -> tuple[dict[str, Any], str]:
    """Config of the metrics, and a note: those that were given, or those of the training's test and more."""
    chosen = request.config.get("metrics")
    if chosen is not None:
        given: Any = OmegaConf.to_container(chosen, resolve=True)
        return ignoring_missing_labels(given), ""
    numbers = [file.labels() for file in files]
    labelled = {_LABELS.get(label, label) for each in numbers for label, number in each.items() if number}
    config, note = metrics_of_training(settings, head)
    return ignoring_missing_labels(default_metrics(config, labelled, predicted)), note


def _trained_on(paths: Sequence[Path], record: Mapping[str, Any]) -> list[str]:
    """Sentences on files that the model was trained on, by their content."""
    by_digest = {
        str(fact).rpartition("sha256 ")[2]: name
        for name, fact in (record.get("data") or {}).items()
        if name.startswith("train file")
    }
    found = []
    for path in paths:
        name = next((by_digest[digest] for digest in sorted(content_digests(path)) if digest in by_digest), None)
        if name is not None:
            found.append(
                f"{path} has the content of {name} of the model's training: its errors are smaller than those of "
                f"frames that the model has not seen"
            )
    return found


def _references(trained: TrainedModel, data: EvaluationDataModule, names: Sequence[str]) -> list[str]:
    """Sentences on energies whose reference is not that of the model's training, or was arbitrary there."""
    record, head = {**trained.record, "energy_shifts": trained.energy_shifts}, trained.head
    level = energy_level_text(Start("checkpoint", str(trained.path), trains=False), record, data)
    found = [level] if level else []
    directions, type_names = _open_directions(trained), trained.type_names or []
    for name, each in zip(names, data.test_sets, strict=True):
        of_others = trained.elements_of_others(each.frames.symbols())
        if of_others:
            found.append(_of_other_sets(name, each.frames, of_others, str(head)))
        if directions is not None:
            of_set = name if head is None else f"{name}, of the set {head}"
            found.append(outside_text(of_set, each.frames, directions, type_names))
    return list(filter(None, found))


def _open_directions(trained: TrainedModel) -> NDArray[np.float64] | None:
    """Directions ``[num_types, number]`` in which the training left the model's references open; None if not known.

    Those of the chosen data set are of its own elements alone.
    """
    statistics, type_names = trained.record.get("statistics") or {}, trained.type_names or []
    of_sets = statistics.get("set_undetermined")
    if trained.head is not None and of_sets is not None:
        rows, present = of_sets[trained.head], statistics["set_references"][trained.head]
        nothing = [0.0] * len(next(iter(rows.values()), []))
        return np.array([rows[name] if name in rows and name in present else nothing for name in type_names])
    undetermined, fitted = statistics.get("undetermined"), statistics.get("energy_shifts")
    shifts = list((trained.energy_shifts or {}).values())
    if undetermined is None or fitted is None or (shifts and not np.allclose(shifts, fitted, 1e-6, 1e-9)):
        return None
    return np.asarray(undetermined).reshape(len(type_names), -1)


def _of_other_sets(name: str, frames: FrameSet, symbols: Sequence[str], head: str) -> str:
    """Sentences on frames with elements that the chosen data set has no frame with."""
    having = np.flatnonzero(frames.compositions().dense(symbols).any(axis=1))
    return (
        f"{name}: {len(having)} of {len(frames)} frames have {', '.join(symbols)}, which no frame of the set {head} of "
        f"the training has: the references of these elements are those of other sets, and energies of these frames are "
        f"not those of {head}. The first is {frames[int(having[0])].location}; forces and stresses were learnt of "
        f"the other sets"
    )


def _check_device(device: Any) -> None:
    valid = ("auto", "cpu", "gpu", "cuda", "mps")
    if device not in valid:
        raise ValueError(f"device={device}: expected one of {', '.join(valid)}")


def _dtype(name: Any) -> torch.dtype:
    found = {"float32": torch.float32, "float64": torch.float64}.get(str(name))
    if found is None:
        raise ValueError(f"data.dtype is float32 or float64, found {name!r}")
    return found
