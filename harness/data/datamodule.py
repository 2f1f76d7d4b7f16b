"""Lightning data modules: files of structures, or the embedded alloy, as batches for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from harness.data.arguments import (
    PathLike,
    batch_limit,
    checked_balance,
    checked_cutoff,
    checked_files,
    checked_min_distance,
    checked_split,
    checked_type_names,
    floating_dtype,
)
from harness.data.budget import BudgetBatchSampler
from harness.data.checks import check_distances, check_units
from harness.data.collate import collate
from harness.data.dataset import AtomsDataset
from harness.data.description import reference_warnings, summary
from harness.data.device_neighbors import EdgesOnDevice
from harness.data.embedded import embedded_alloy_file
from harness.data.evaluation import sizes_of
from harness.data.extras import Extras, Found, split_keys
from harness.data.frames import FrameList, FrameSet
from harness.data.groups import GROUP_KEY, groups_of
from harness.data.hints import label_hint, mixed_family_hint
from harness.data.isolated import isolated_energies
from harness.data.reading import LabelKeys, file_fingerprint, fingerprint_text, read_frames
from harness.data.references import SETTING
from harness.data.repeats import repeated_frames_text
from harness.data.samplers import GlobalBatchSampler, TrainingBatchSampler
from harness.data.set_loaders import SetLoaders
from harness.data.sets import divided
from harness.data.statistics import DataStatistics, training_statistics
from harness.data.store import BuildSettings, StoredFrames, is_store
from harness.data.store.building import found_of
from harness.data.store.cache import cached_store, is_large, num_bytes, tell_of_rank
from harness.data.weights import refuse_weightless
from harness.models import reference_energies
from harness.strategies import launched_data_parallel_ranks
from harness.support.checks import whole_number

__all__ = ["AtomsDataModule", "EmbeddedAlloyDataModule"]

_FIELDS = {"energy": "total_energy"}
"""Fields of labels that are called otherwise."""


class AtomsDataModule(SetLoaders, EdgesOnDevice):
    """Training, validation and test batches from files that ASE reads.

    Batch sizes and budgets are those of all ranks together: a run on more ranks sees the same batches, each rank a part
    of them. One of ``batch_size``, ``max_atoms`` and ``max_edges`` says what a training batch holds.
    Training batches hold every frame once an epoch, evaluation neither pads nor drops. :meth:`setup` may be called
    before there is a trainer or a process group; then ``type_names``, ``statistics``, ``train_set``, ``val_sets`` and
    ``test_sets`` are there. Use it with ``Trainer(use_distributed_sampler=False)``.

    Args:
        train: file of the training frames, or several files that are joined to one set.
        val: file of a validation set, or several, each a set of its own; None takes it from the split, if that has it.
        test: likewise for testing.
        split: how much of the training frames becomes the ``val`` and ``test`` set that no file is given for:
            fractions (0.1) or numbers of frames (50).
        num_train: largest number of training frames.
        cutoff: of the neighbour lists, in Å.
        batch_size: frames in a training step, of all ranks together.
        max_atoms: atoms in a training step, of all ranks together, at most; batches of similar numbers of atoms, ranks
            with similar shares: see :class:`~harness.data.budget.BudgetBatchSampler`.
        max_edges: likewise for edges. Makes the neighbour lists of all frames before the first step.
        balance: with ``batch_size``, what the ranks get similar numbers of, ``atoms`` or ``edges``; if None, they get
            similar numbers of frames. Budgets are balanced by what they limit.
        eval_batch_size: frames in an evaluation step, of all ranks together; if None, ``batch_size``, or the budget.
        seed: of the order of the training frames.
        split_seed: of the split, to keep it while the seed changes; ``seed`` if None.
        keys: names of the labels in the files, see :class:`~harness.data.reading.LabelKeys`, and of the weights, see
            :class:`~harness.data.weights.WeightKeys`.
        labels: further labels by field, or a list of ready ones; see :mod:`harness.data.labels`.
        inputs: further inputs of the model, likewise.
        weights: ``{config_type: {Vacancy: 5}}``: factors of the weight of frames by the value of a key.
        group_key: name in the files whose value is the group of a frame; None for no groups.
        type_names: chemical symbols in the order of the type indices; None for those of all sets by atomic number.
        dtype: of all floating-point fields but ``total_energy``, which is always float64.
        num_workers: processes of each data loader.
        pin_memory: whether batches are made in page-locked memory, from which a GPU copies them without the host
            waiting; None for those of a trainer on a GPU.
        neighbors: place where neighbour lists are made: ``workers`` as samples are drawn, ``device`` of whole batches
            that are on the device, see :mod:`harness.data.device_neighbors`.
        cache_neighbors: whether samples stay in memory with their neighbour lists once they are made.
        min_distance: frames with closer atoms are refused, in Å; None does not look.
        check_units: whether files in other units are refused, where that shows; see :mod:`harness.data.checks`.
        isolated_atoms: what frames of one atom with ``config_type=IsolatedAtom`` are. ``references``: those of the
            training files give the energies of their elements in ``statistics.energy_shifts``, and all of them are left
            out of the sets; ``frames``: frames like any other.

        store_above: size such as ``512 MiB``: files that are larger, all together, are not kept in memory, but put into
            stores in the cache directory, once; None for never.
        store_limit: size such as ``100 GiB`` that these stores may have together: when one is built, those that no
            process uses are removed, the ones that were used longest ago first; None for any size.
        cache_dir: of these stores; ``$HARNESS_CACHE`` or ``~/.cache/harness`` if None.

    Raises:
        KeyError: if ``keys`` or ``split`` has an unknown name.
        ModuleNotFoundError: if ``neighbors`` is ``device`` and its package is not installed.
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        train: PathLike | Sequence[PathLike],
        val: PathLike | Sequence[PathLike] | None = None,
        test: PathLike | Sequence[PathLike] | None = None,
        *,
        cutoff: float,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        balance: str | None = None,
        eval_batch_size: int | None = None,
        split: Mapping[str, int | float] | None = None,
        num_train: int | None = None,
        seed: int = 0,
        split_seed: int | None = None,
        keys: LabelKeys | Mapping[str, str | None] | None = None,
        labels: Mapping[str, Any] | Sequence[str] | None = None,
        inputs: Mapping[str, Any] | Sequence[str] | None = None,
        weights: Mapping[str, Mapping[str, float]] | None = None,
        group_key: str | None = GROUP_KEY,
        type_names: Sequence[str] | None = None,
        dtype: str | torch.dtype = "float32",
        num_workers: int = 0,
        pin_memory: bool | None = None,
        neighbors: str = "workers",
        cache_neighbors: bool = True,
        min_distance: float | None = 0.1,
        check_units: bool = True,
        isolated_atoms: str = "references",
        store_above: str | int | None = "512 MiB",
        store_limit: str | int | None = "100 GiB",
        cache_dir: PathLike | None = None,
    ) -> None:
        super().__init__()
        self._files = checked_files(train, val, test)
        self.split = checked_split(split)
        self.cutoff = checked_cutoff(cutoff)
        self._limited, self._limit = batch_limit(batch_size, max_atoms, max_edges)
        for name, value in {"eval_batch_size": eval_batch_size, "num_train": num_train}.items():
            if value is not None:
                whole_number(name, value)
        self.batch_size = batch_size
        self.max_atoms = max_atoms
        self.max_edges = max_edges
        self.balance = checked_balance(balance, self._limited)
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_train = num_train
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed
        of_labels, of_weights = split_keys(keys)
        self.keys = LabelKeys.from_mapping(of_labels)
        self.extras = Extras.from_config(labels, inputs, weights, group_key, of_weights)
        self._found = Found()
        self.dtype = floating_dtype(dtype)
        self.num_workers = whole_number("num_workers", num_workers, least=0)
        self.pin_memory = pin_memory
        self._set_neighbors(neighbors, self.cutoff)
        self.cache_neighbors = cache_neighbors
        self.min_distance = checked_min_distance(min_distance)
        if not isinstance(check_units, bool):
            raise TypeError(f"check_units is true or false, found {check_units!r}")
        self.check_units = check_units
        if isolated_atoms not in ("references", "frames"):
            raise ValueError(f"isolated_atoms is 'references' or 'frames', found {isolated_atoms!r}")
        self.isolated_atoms = isolated_atoms
        self._store_above, self._store_limit = num_bytes(store_above), num_bytes(store_limit, "store_limit")
        self._cache_dir = cache_dir
        self._asked_type_names = checked_type_names(type_names)
        self._is_set_up = False
        self._stores: dict[Path, StoredFrames] = {}
        self._fingerprint: dict[str, str] | None = None
        self.model_statistics: Any = None
        """Statistics that the model was built of where they are not those of this training set but of a checkpoint."""
        self.reference_setting: str | None = SETTING
        """Setting that the model takes reference energies by, for messages; None if it has no such setting."""

    def setup(self, stage: str | None = None) -> None:
        """Read the files, split them and take the statistics; the first call does everything, later ones nothing.

        Raises:
            FileNotFoundError: if a file is missing.
            KeyError: if a label key is in none of the frames.
            ValueError: if a file or frame is unusable, a symbol is not among the type names, or the split asks for more
                frames than there are.
        """
        if self._is_set_up:
            return
        read = {name: [self._read(path) for path in paths] for name, paths in self._files.items()}
        sets = divided(read, self._files, self.split, self.split_seed, self.num_train, self.isolated_atoms)
        self.sets = sets
        self.extras.check(self._found, "the data")
        refuse_weightless(sets.train)
        every = list(sets.named().values())
        self.group_names: list[str] = groups_of(every, self.extras.group_key)
        """Names of the groups of all sets, in the order of ``group_index``."""
        self.set_names: list[str] = []
        """Names of the sets of a mixture, in the order of ``set_index``."""
        self.batch_fields = self.extras.batch_fields(
            {name for frames in every for name in frames.weight_names()}, self.group_names
        )
        self.type_names: list[str] = self._asked_type_names or sets.type_names()
        self.train_set = self._dataset(sets.train)
        self.val_sets = [self._dataset(frames) for frames in sets.val]
        self.test_sets = [self._dataset(frames) for frames in sets.test]
        references = isolated_energies(sets.isolated["train"])
        self.statistics: DataStatistics = training_statistics(self.train_set, references, self.keys)
        self._is_set_up = True
        mixed = mixed_family_hint(sets.train, self.keys)
        for text in [*filter(None, [mixed]), *repeated_frames_text(sets.train, sets.evaluated())]:
            rank_zero_warn(text)

    def missing_labels(self, name: str, weighted: bool = True) -> dict[str, tuple[int, int]]:
        """Number of frames without a label or with gaps in it, and of all frames, by field.

        Args:
            name: ``train``, or ``val0``, ``test1`` … for the sets in their order.
            weighted: frames are not counted for a label whose weight is 0 in them.
        """
        counts = self._frames_of(name).incomplete_counts([entry.field for entry in self.extras.labels], weighted)
        return {_FIELDS.get(label, label): numbers for label, numbers in counts.items()}

    def missing_hint(self, name: str, field: str) -> str:
        """Sentences on a field that frames of a set lack: what they have in its place, or that it was left out.

        Args:
            name: of the set, as in :meth:`missing_labels`.
            field: ``total_energy``, ``forces``, ``stress``, or one of ``data.labels``.
        """
        if field in {entry.field for entry in self.extras.labels}:
            return self.extras.hint(field, self._frames_of(name))
        label = next((label for label, name_of_field in _FIELDS.items() if name_of_field == field), field)
        return label_hint(self._frames_of(name), label, self.keys)

    def labelled_types(self, name: str) -> dict[str, set[str]]:
        """Atom types that have a label in a set, by field of atoms.

        Args:
            name: as in :meth:`missing_labels`.
        """
        return self._frames_of(name).labelled_types()

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell of energies without a reference, and refuse more ranks than frames in a batch.

        If the model has the fitted ``statistics.energy_shifts``, or does not show what it has, one warning says which
        of them the training energies leave open, and one for each validation and test set how many frames that
        concerns.

        Raises:
            ValueError: with the numbers of frames and ranks; or neighbour lists cannot be made on the device.
        """
        self._tell_of_references(pl_module, stage)
        self._check_device(self.train_set, trainer.strategy.root_device)
        ranks = launched_data_parallel_ranks(trainer.strategy)
        if stage == "fit" and ranks is not None:
            self.training_sampler(*ranks)

    def _frames_of(self, name: str) -> FrameSet:
        self.setup()
        return self.sets.named()[name]

    def _tell_of_references(self, pl_module: LightningModule, stage: str) -> None:
        """Warn of references that the training energies leave open, if the model has them."""
        is_fitted_here = self.model_statistics is None  # otherwise it was told when the checkpoint's training began
        of_model = self.statistics if is_fitted_here else self.model_statistics
        shifts, undetermined = of_model.energy_shifts, of_model.undetermined
        found = reference_energies(pl_module, self.type_names)
        if undetermined is None or (found is not None and not np.allclose(list(found.values()), shifts, 1e-6, 1e-9)):
            return
        directions = np.asarray(undetermined)
        setting = self.reference_setting
        for text in reference_warnings(self.sets, directions, shifts, self.type_names, stage, is_fitted_here, setting):
            if text:
                rank_zero_warn(text)

    def fingerprint(self) -> dict[str, str]:
        """Facts that decide the batches, by name: content of the files, split, weights, types, cutoff.

        The ranks of a job compare them before the first step. Paths of the files are not among them.
        """
        self.setup()
        if self._fingerprint is not None:
            return dict(self._fingerprint)
        files = {
            f"{name} file {number}": path
            for name, paths in self._files.items()
            for number, path in enumerate(paths, start=1)
        }
        found = {name: fact for file, path in files.items() for name, fact in self._facts_of(file, path).items()}
        for part, indices in self.sets.indices.items():
            digest = hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()
            found[f"split, part {part}"] = f"{len(indices)} frames, sha256 of their indices {digest}"
        weights = self.extras.weighting.text()
        found |= {"weights": weights} if weights else {}
        self._fingerprint = found | {"type names": ", ".join(self.type_names), "cutoff": f"{self.cutoff!r} Å"}
        return dict(self._fingerprint)

    def _facts_of(self, name: str, path: Path) -> dict[str, str]:
        """Facts of the content of a file, by name."""
        store = self._stores.get(path)
        if store is None:
            return {name: file_fingerprint(path.expanduser())}
        (source,) = store.manifest["sources"]
        return {name: fingerprint_text(path.name, source["bytes"], source["sha256"])}

    def describe(self) -> str:
        """Summary in a few lines: sizes of the sets, types, neighbours, forces and fitted shifts."""
        self.setup()
        return "\n".join(
            [summary(self.sets, self.statistics, self.cutoff), *self.extras.describe(self.sets.train, self.group_names)]
        )

    def _read(self, path: Path) -> FrameSet:
        """Frames of a file, checked; as a store where the files are large."""
        if path.expanduser().is_dir():
            advice = f"data=store data.train={path}" if is_store(path.expanduser()) else "harness-data build OUT FOLDER"
            raise ValueError(f"{path} is a folder, expected a file that ASE reads; for stores and folders: {advice}")
        if is_large([path for paths in self._files.values() for path in paths], self._store_above):
            return self._read_as_store(path)
        read = read_frames(path, self.keys, require_labels=not self.extras.labels)
        frames = FrameList(self.extras.read(read, require_labels=True))
        self._found |= self.extras.found(frames)
        if self.check_units:  # first: positions in nm are neighbours within any distance
            check_units(frames)
        if self.min_distance is not None:
            check_distances(frames, self.min_distance)
        return frames

    def _read_as_store(self, path: Path) -> FrameSet:
        cutoffs = (self.cutoff,) if "edges" in (self._limited.removeprefix("max_"), self.balance) else ()
        settings = BuildSettings(self.keys, self.extras, self.min_distance, self.check_units, cutoffs)
        store = cached_store(path, settings, self._cache_dir, tell_of_rank, self._store_limit)
        self._stores[path] = store
        self._found |= found_of(store.manifest["found"])
        self.cache_neighbors = False  # they would fill the memory that the store leaves free
        return store

    def _dataset(self, frames: FrameSet) -> AtomsDataset:
        return AtomsDataset(
            frames,
            self.type_names,
            self.cutoff,
            self.dtype,
            self.cache_neighbors,
            self.batch_fields,
            with_edges=self.neighbors == "workers",
        )

    def training_sampler(self, rank: int, num_ranks: int) -> GlobalBatchSampler:
        """Sampler of the training frames in the batches of one rank.

        Raises:
            ValueError: the batches have fewer frames than there are ranks, or a frame is larger than the budget.
        """
        dataset = self.train_set
        if self._limited == "batch_size":
            sizes = None if self.balance is None else sizes_of(dataset, self.balance)
            return TrainingBatchSampler(len(dataset), self._limit, rank, num_ranks, seed=self.seed, sizes=sizes)
        unit = self._limited.removeprefix("max_")
        return BudgetBatchSampler(
            sizes_of(dataset, unit),
            self._limit,
            rank,
            num_ranks,
            seed=self.seed,
            unit=unit,
            name_of=dataset.frames.location,
        )

    def _collate(self) -> Callable[[Sequence[Any]], dict[str, Any]]:
        return partial(collate, dtype=self.dtype, fields=self.batch_fields)


class EmbeddedAlloyDataModule(AtomsDataModule):
    """The embedded Cu-Pd-Ag-Au alloy with EMT labels, made on the first use and kept in a cache directory.

    Args:
        num_frames: number of frames, before the split.
        data_seed: seed of the frames themselves.
        cache_dir: where the file is kept; ``$HARNESS_CACHE`` or ``~/.cache/harness`` if None.
        options: any argument of :class:`AtomsDataModule` but the files and the keys; a tenth of the frames each is for
            validation and testing unless ``split`` says otherwise.

    Raises:
        ValueError: if ``num_frames`` is not positive.
        TypeError: if an option is unknown or names files.
    """

    def __init__(
        self,
        *,
        num_frames: int = 400,
        data_seed: int = 0,
        cache_dir: PathLike | None = None,
        split: Mapping[str, int | float] | None = None,
        **options: Any,
    ) -> None:
        fixed = sorted({"train", "val", "test", "keys"} & set(options))
        if fixed:
            raise TypeError(f"the embedded alloy has its own files and keys, found {fixed}; use AtomsDataModule")
        path = embedded_alloy_file(num_frames, data_seed, cache_dir)
        split = {"val": 0.1, "test": 0.1} if split is None else split
        super().__init__(path, split=split, cache_dir=cache_dir, **options)
