"""Data of an evaluation: files with their frames, and loaders that bring each frame to one rank, once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from harness.data.batch_fields import BatchField
from harness.data.budget import EvaluationBudgetSampler
from harness.data.checks import check_distances, check_units
from harness.data.collate import collate
from harness.data.dataset import AtomsDataset
from harness.data.evaluated_store import EvaluatedStore
from harness.data.extras import Extras, Found
from harness.data.frames import FrameList, FrameSet, as_frame_set
from harness.data.groups import groups_of
from harness.data.hints import label_hint, mixed_family_hint
from harness.data.isolated import without_isolated_atoms
from harness.data.reading import Frame, LabelKeys, available_keys, file_fingerprint, has_key, read_frames
from harness.data.samplers import EvaluationBatchSampler
from harness.data.store import StoredFrames, is_store
from harness.strategies import data_parallel_ranks, is_on_gpu
from harness.support.checks import whole_number
from harness.support.text import did_you_mean

__all__ = [
    "EvaluatedFile",
    "EvaluationDataModule",
    "content_digests",
    "evaluation_loader",
    "label_notes",
    "read_evaluated",
    "refuse_unknown_elements",
]


@dataclass(frozen=True)
class EvaluatedFile:
    """A file of an evaluation, or a store.

    Attributes:
        path: as it was given.
        frames: all of them, in the order of the file or store.
        counted: positions in ``frames`` of those that errors are of: all but isolated atoms.
        fields: further labels that are looked for.
    """

    path: Path
    frames: FrameSet
    counted: list[int]
    fields: tuple[str, ...] = ()

    @property
    def structures(self) -> FrameSet:
        """Frames that errors are of."""
        return self.frames.subset(self.counted)

    def labels(self) -> dict[str, int]:
        """Number of frames that errors are of with an energy, forces, a stress, and with each further label."""
        found = self.structures.label_counts()
        return {name: found.get(name, 0) for name in ("energy", "forces", "stress", *self.fields)}


def read_evaluated(
    paths: Sequence[Path],
    keys: LabelKeys,
    named: Mapping[str, str] | None = None,
    min_distance: float | None = 0.1,
    units: bool = True,
    isolated_atoms: str = "references",
    extras: Extras | None = None,
    asked: Collection[str] = (),
) -> list[EvaluatedFile]:
    """Files and stores of an evaluation, checked as those of a training; frames may lack any label.

    Stores were read and checked when they were built.

    Args:
        paths: of the files, or of stores.
        keys: names of the labels.
        named: those of them that the user has named: a file must have each of them.
        min_distance: frames with closer atoms are refused, in Å; None does not look.
        units: whether files in other units are refused, where that shows.
        isolated_atoms: ``references`` leaves frames with ``config_type=IsolatedAtom`` out of the errors, ``frames``
            does not.
        extras: further labels, inputs and weights of the frames.
        asked: further labels that one of the files must have.

    Raises:
        FileNotFoundError: if a file is missing.
        KeyError: if none of the files has a label that was named.
        ValueError: if a file or frame is unusable.
    """
    if isolated_atoms not in ("references", "frames"):
        raise ValueError(f"isolated_atoms is 'references' or 'frames', found {isolated_atoms!r}")
    files, extras, found = [], extras or Extras(), Found()
    fields = tuple(entry.field for entry in extras.labels)
    for path in paths:
        frames: FrameSet
        if is_store(path):
            frames = EvaluatedStore(StoredFrames(path), extras, named or {})
            found |= frames.found
        else:
            frames = FrameList(extras.read(read_frames(path, keys, require_labels=False, require_keys=False)))
            found |= extras.found(frames)
            if units:
                check_units(frames)
            if min_distance is not None:
                check_distances(frames, min_distance)
        counted = np.arange(len(frames))
        if isolated_atoms == "references":
            without_isolated_atoms(frames, require_energies=False)  # refuses those of several atoms
            counted = np.flatnonzero(~frames.column("isolated").astype(bool))
        files.append(EvaluatedFile(path, frames, counted.tolist(), fields))
    extras.check_labels(found, "the files", asked)
    everything = [frame.atoms for file in files if isinstance(file.frames, FrameList) for frame in file.frames]
    for label, key in (named or {}).items() if everything else ():
        if not has_key(everything, key):
            available = available_keys(everything)
            meant = did_you_mean(key, available)
            raise KeyError(
                f"data.keys.{label}={key}: no frame of {', '.join(map(str, paths))} has it. {meant}The frames have "
                f"{available}"
            )
    return files


def content_digests(path: Path) -> set[str]:
    """SHA-256 of the content of a file; of a store that of its frames and of the files that it was built of."""
    if is_store(path):
        store = StoredFrames(path)
        return {store.digest, *(source["sha256"] for source in store.manifest["sources"])}
    return {file_fingerprint(path).rpartition("sha256 ")[2]}


def label_notes(file: EvaluatedFile, keys: LabelKeys) -> list[str]:
    """Sentences on labels that all frames of a file lack, and on labels that may be of two calculations."""
    frames, labels = file.structures, file.labels()
    if not len(frames):
        return [f"{file.path}: isolated atoms alone, which no errors are of (data.isolated_atoms=frames counts them)"]
    if not any(labels.values()):
        return [f"{file.path}: no labels, predictions only. {label_hint(frames, 'energy', keys)}"]
    notes = [text for text in [mixed_family_hint(frames, keys)] if text]
    for name in ("energy", "forces"):
        if not labels[name]:
            notes.append(f"{file.path}: no {name}, and no errors of them. {label_hint(frames, name, keys)}")
    return notes


def refuse_unknown_elements(files: Sequence[EvaluatedFile], type_names: Sequence[str], model: str) -> None:
    """Refuse frames with elements that a model does not have.

    Args:
        files: of the evaluation.
        type_names: chemical symbols that the model knows.
        model: name of the model in the message.

    Raises:
        ValueError: with the first of the frames, the elements and the number of such frames.
    """
    known = set(type_names)
    found: list[tuple[Frame, set[str]]] = []
    for file in files:
        for frame in () if file.frames.symbols() <= known else file.frames:
            unknown = set(frame.atoms.get_chemical_symbols()) - known
            if unknown:
                found.append((frame, unknown))
    if found:
        first, unknown = found[0]
        number, total = len(found), sum(len(file.frames) for file in files)
        everywhere = sorted(set().union(*(each for _, each in found)))
        raise ValueError(
            f"{first.location}: {', '.join(sorted(unknown))} is no element of {model}, which knows "
            f"{', '.join(type_names)}. {number} of {total} frames have such elements ({', '.join(everywhere)}): remove "
            f"them, or evaluate a model that was trained on them"
        )


class EvaluationDataModule(LightningDataModule):
    """Batches of the sets of an evaluation: every frame on one rank, once, in order.

    Samples are made when they are needed and not kept.

    Args:
        sets: frames of each set.
        type_names: chemical symbols in the order of the model's type indices.
        cutoff: of the neighbour lists, in Å.
        dtype: of all floating-point fields but ``total_energy``.
        batch_size: frames in a batch of all ranks together.
        max_atoms: instead: atoms in it, at most.
        max_edges: instead: edges in it, at most; makes all neighbour lists beforehand.
        num_workers: processes of each loader.
        pin_memory: whether batches are made in page-locked memory, from which a GPU copies them without the host
            waiting; None for those of a trainer on a GPU.
        head: position of the head that predicts all frames, in the field ``set_index``; None for a model without.
        extras: further labels, inputs and weights that the frames were read with.

    Raises:
        TypeError, ValueError: a number is out of range, or not exactly one limit is given.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[Frame] | FrameSet],
        type_names: Sequence[str],
        cutoff: float,
        dtype: torch.dtype = torch.float32,
        *,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        head: int | None = None,
        extras: Extras | None = None,
    ) -> None:
        super().__init__()
        limits = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        given = {name: whole_number(name, value) for name, value in limits.items() if value is not None}
        if len(given) != 1:
            found = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise ValueError(f"exactly one of {', '.join(limits)} must limit a batch of all ranks, found {found}")
        whole_number("num_workers", num_workers, least=0)
        ((self._limited, self._limit),) = given.items()
        self.type_names, self.cutoff, self.dtype = list(type_names), cutoff, dtype
        extras, used = extras or Extras(), [as_frame_set(frames) for frames in sets]
        self.group_names = groups_of(used, extras.group_key)
        weights = {name for frames in used for name in frames.weight_names()}
        self.batch_fields = extras.batch_fields(weights, self.group_names)
        self.test_sets = [
            AtomsDataset(frames, type_names, cutoff, dtype, cache_neighbors=False, fields=self.batch_fields)
            for frames in used
        ]
        self.pin_memory = pin_memory
        self._options: dict[str, Any] = {
            "num_workers": num_workers,
            "collate_fn": partial(_collate, dtype=dtype, fields=self.batch_fields, head=head),
        }

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """This rank's part of each set."""
        ranks = data_parallel_ranks(self.trainer)
        options = self._options | {
            "pin_memory": is_on_gpu(self.trainer) if self.pin_memory is None else self.pin_memory
        }
        return [evaluation_loader(each, self._limited, self._limit, *ranks, **options) for each in self.test_sets]


def _collate(
    samples: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, fields: Sequence[BatchField], head: int | None
) -> dict[str, Tensor]:
    """A batch, with the head of its graphs if there is one."""
    batch = collate(samples, dtype, fields)
    if head is not None:
        batch["set_index"] = torch.full_like(batch["num_atoms"], head)
    return batch


def evaluation_loader(
    dataset: AtomsDataset, limited: str, limit: int, rank: int, num_ranks: int, **options: Any
) -> DataLoader[Any]:
    """Loader of one rank's part of a set: in order, nothing padded or dropped, each frame on one rank.

    Args:
        dataset: the set.
        limited: ``batch_size``, ``max_atoms`` or ``max_edges``.
        limit: frames, atoms or edges in a batch of all ranks together, at most.
        rank: this rank.
        num_ranks: number of ranks that share the set.
        options: of the ``DataLoader``.
    """
    sampler: EvaluationBatchSampler | EvaluationBudgetSampler
    if limited == "batch_size":
        sampler = EvaluationBatchSampler(len(dataset), limit, rank, num_ranks)
    else:
        sampler = EvaluationBudgetSampler(sizes_of(dataset, limited.removeprefix("max_")), limit, rank, num_ranks)
    # A rank without frames gets one batch of no graphs: Lightning skips a loop that has no batches, and with it the end
    # of the epoch, where the other ranks wait for this one.
    batches: Any = sampler if len(sampler) else [[]]
    return DataLoader(dataset, batch_sampler=batches, **options)


def sizes_of(dataset: AtomsDataset, unit: str) -> NDArray[np.int64]:
    """Number of ``atoms`` or ``edges`` of each frame of a set."""
    return dataset.num_atoms() if unit == "atoms" else dataset.num_edges()
