"""Lightning data modules: files of structures, or the embedded alloy, as batches for any number of ranks."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from harness.data.budget import BudgetBatchSampler
from harness.data.checks import check_distances, check_units
from harness.data.collate import collate
from harness.data.dataset import AtomsDataset
from harness.data.embedded import embedded_alloy_file
from harness.data.evaluation import evaluation_loader, sizes_of
from harness.data.isolated import isolated_energies, without_isolated_atoms
from harness.data.loader import ResumableDataLoader
from harness.data.reading import (
    Frame,
    LabelKeys,
    chemical_symbols,
    file_fingerprint,
    label_hint,
    mixed_family_hint,
    read_frames,
)
from harness.data.references import SETTING, outside_text, undetermined_text
from harness.data.repeats import refuse_repeated_files, repeated_frames_text
from harness.data.samplers import GlobalBatchSampler, TrainingBatchSampler
from harness.data.splitting import split_indices
from harness.data.statistics import DataStatistics, training_statistics
from harness.models import reference_energies
from harness.strategies import data_parallel_ranks, launched_data_parallel_ranks
from harness.support.checks import is_number, whole_number

__all__ = ["AtomsDataModule", "EmbeddedAlloyDataModule"]

PathLike = str | os.PathLike[str]


class AtomsDataModule(LightningDataModule):
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
        keys: names of the labels in the files; see :class:`~harness.data.reading.LabelKeys`.
        type_names: chemical symbols in the order of the type indices; None for those of all sets by atomic number.
        dtype: of all floating-point fields but ``total_energy``, which is always float64.
        num_workers: processes of each data loader.
        pin_memory: whether batches are made in page-locked memory.
        cache_neighbors: whether samples stay in memory with their neighbour lists once they are made.
        min_distance: frames with closer atoms are refused, in Å; None does not look.
        check_units: whether files in other units are refused, where that shows; see :mod:`harness.data.checks`.
        isolated_atoms: what frames of one atom with ``config_type=IsolatedAtom`` are. ``references``: those of the
            training files give the energies of their elements in ``statistics.energy_shifts``, and all of them are left
            out of the sets; ``frames``: frames like any other.

    Raises:
        KeyError: if ``keys`` or ``split`` has an unknown name.
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
        keys: LabelKeys | Mapping[str, str] | None = None,
        type_names: Sequence[str] | None = None,
        dtype: str | torch.dtype = "float32",
        num_workers: int = 0,
        pin_memory: bool = False,
        cache_neighbors: bool = True,
        min_distance: float | None = 0.1,
        check_units: bool = True,
        isolated_atoms: str = "references",
    ) -> None:
        super().__init__()
        self.train_files = _paths(train)
        self.val_files = _paths(val)
        self.test_files = _paths(test)
        if not self.train_files:
            raise ValueError("train must name at least one file")
        for name, paths in (("train", self.train_files), ("val", self.val_files), ("test", self.test_files)):
            refuse_repeated_files(f"data.{name}", paths)
        if split is not None and not isinstance(split, Mapping):
            raise TypeError(f"split is a mapping such as {{val: 0.1, test: 50}}, found {split!r}")
        self.split = dict(split or {})
        unknown = sorted(set(self.split) - {"val", "test"})
        if unknown:
            raise KeyError(f"unknown sets {unknown} in the split; valid are ['val', 'test'], the rest is for training")
        if not is_number(cutoff) or not 0 < cutoff < float("inf"):
            raise ValueError(f"cutoff must be a positive number of Å, found {cutoff!r}")
        limits = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        for name, value in {**limits, "eval_batch_size": eval_batch_size, "num_train": num_train}.items():
            if value is not None:
                whole_number(name, value)
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            found = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise ValueError(
                f"exactly one of {', '.join(limits)} must say what a training batch of all ranks holds, found {found}; "
                "for a budget of atoms or edges set batch_size to None (data.batch_size=null), otherwise leave them out"
            )
        if balance is not None and balance not in ("atoms", "edges"):
            raise ValueError(f"balance must be 'atoms', 'edges' or None, found {balance!r}")
        if balance is not None and batch_size is None:
            raise ValueError(
                f"balance={balance!r} is for batches of batch_size frames, found {next(iter(given))}, by which "
                "ranks are balanced already; leave balance out, or give batch_size"
            )
        whole_number("num_workers", num_workers, least=0)
        self.cutoff = float(cutoff)
        ((self._limited, self._limit),) = given.items()
        self.batch_size = batch_size
        self.max_atoms = max_atoms
        self.max_edges = max_edges
        self.balance = balance
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_train = num_train
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed
        self.keys = LabelKeys.from_mapping(keys)
        self.dtype = _floating_dtype(dtype)
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.cache_neighbors = cache_neighbors
        if min_distance is not None and not is_number(min_distance):
            raise TypeError(f"min_distance is a number of Å or null, found {min_distance!r}")
        if min_distance is not None and not 0 < min_distance < float("inf"):
            raise ValueError(f"min_distance must be a positive number of Å, found {min_distance}; null does not look")
        if not isinstance(check_units, bool):
            raise TypeError(f"check_units is true or false, found {check_units!r}")
        if isolated_atoms not in ("references", "frames"):
            raise ValueError(f"isolated_atoms is 'references' or 'frames', found {isolated_atoms!r}")
        self.isolated_atoms = isolated_atoms
        self.min_distance = min_distance
        self.check_units = check_units
        self._asked_type_names = _checked_type_names(type_names)
        self._is_set_up = False
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
        read, self._isolated = self._without_isolated_atoms(read)
        frames = [frame for of_file in read["train"] for frame in of_file]
        parts = {
            name: amount
            for name, amount in self.split.items()
            if amount and not (self.val_files if name == "val" else self.test_files)
        }
        indices = split_indices(len(frames), parts, self.split_seed, self.num_train)
        chosen = {name: [frames[index] for index in of_part] for name, of_part in indices.items()}
        val = read["val"] or [chosen[name] for name in ("val",) if name in chosen]
        test = read["test"] or [chosen[name] for name in ("test",) if name in chosen]

        type_names = self._asked_type_names
        if type_names is None:
            symbols = set().union(*(chemical_symbols(part) for part in (chosen["train"], *val, *test)))
            type_names = sorted(symbols, key=lambda symbol: atomic_numbers[symbol])
        self._indices = indices
        self.type_names: list[str] = type_names
        self.train_set = self._dataset(chosen["train"])
        self.val_sets = [self._dataset(part) for part in val]
        self.test_sets = [self._dataset(part) for part in test]
        references = isolated_energies(self._isolated["train"])
        self.statistics: DataStatistics = training_statistics(self.train_set, references, self.keys)
        self._is_set_up = True
        mixed = mixed_family_hint(self.train_set.frames, self.keys)
        for text in [*filter(None, [mixed]), *repeated_frames_text(self.train_set.frames, self._evaluation_frames())]:
            rank_zero_warn(text)

    def _without_isolated_atoms(
        self, read: Mapping[str, list[list[Frame]]]
    ) -> tuple[dict[str, list[list[Frame]]], dict[str, list[Frame]]]:
        """Frames of each file that are no isolated atoms, and the isolated atoms, by the argument with the files."""
        isolated: dict[str, list[Frame]] = {name: [] for name in read}
        if self.isolated_atoms == "frames":
            return dict(read), isolated
        structures: dict[str, list[list[Frame]]] = {name: [] for name in read}
        for name, files in read.items():
            for frames in files:
                left, found = without_isolated_atoms(frames)
                structures[name].append(left)
                isolated[name] += found
                if not left and name != "train":
                    raise ValueError(
                        f"{frames[0].origin} has isolated atoms alone (config_type=IsolatedAtom), which are references "
                        f"and no {name} set; expected structures. Leave the file out, add it to data.train, or set "
                        f"data.isolated_atoms=frames"
                    )
        if not any(structures["train"]):
            raise ValueError(
                f"{', '.join(map(str, self.train_files))} has isolated atoms alone (config_type=IsolatedAtom), which "
                f"are references and no structures to train on; expected structures. Add a file to data.train, or set "
                f"data.isolated_atoms=frames"
            )
        isolated_energies([frame for found in isolated.values() for frame in found])  # one energy in all sets
        return structures, isolated

    def train_dataloader(self) -> ResumableDataLoader:
        """This rank's part of the training batches, shuffled by seed and epoch; can be continued in mid-epoch.

        Under ``Trainer(accumulate_grad_batches=k)`` the first batch of each step brings the labels of the others, see
        :func:`~harness.data.loader.look_ahead`.
        """
        self.setup()
        return ResumableDataLoader(
            self.train_set,
            self.training_sampler(*data_parallel_ranks(self.trainer)),
            self._accumulate_grad_batches,
            **self._loader_options(),
        )

    def _accumulate_grad_batches(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """This rank's part of each validation set, every frame on exactly one rank."""
        self.setup()
        return [self._evaluation_loader(dataset) for dataset in self.val_sets]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """This rank's part of each test set, every frame on exactly one rank."""
        self.setup()
        return [self._evaluation_loader(dataset) for dataset in self.test_sets]

    def missing_labels(self, name: str) -> dict[str, tuple[int, int]]:
        """Number of frames without a label or with gaps in it, and of all frames, by field.

        Args:
            name: ``train``, or ``val0``, ``test1`` … for the sets in their order.
        """
        frames = self._frames_of(name)
        labels: dict[str, list[Any]] = {
            "total_energy": [frame.energy for frame in frames],
            "forces": [frame.forces for frame in frames],
            "stress": [frame.stress for frame in frames],
        }
        return {
            field: (sum(value is None or bool(np.isnan(value).any()) for value in values), len(frames))
            for field, values in labels.items()
        }

    def missing_hint(self, name: str, field: str) -> str:
        """Sentences on a field that frames of a set lack: what they have in its place, or that it was left out.

        Args:
            name: of the set, as in :meth:`missing_labels`.
            field: ``total_energy``, ``forces`` or ``stress``.
        """
        return label_hint(self._frames_of(name), {"total_energy": "energy"}.get(field, field), self.keys)

    def labelled_types(self, name: str) -> dict[str, set[str]]:
        """Atom types that have a label in a set, by field of atoms.

        Args:
            name: as in :meth:`missing_labels`.
        """
        forces: set[str] = set()
        for frame in self._frames_of(name):
            if frame.forces is not None:
                known = ~np.isnan(frame.forces).all(axis=1)
                forces.update(str(symbol) for symbol in np.array(frame.atoms.get_chemical_symbols())[known])
        return {"forces": forces}

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell of energies without a reference, and refuse more ranks than frames in a batch.

        If the model has the fitted ``statistics.energy_shifts``, or does not show what it has, one warning says which
        of them the training energies leave open, and one for each validation and test set how many frames that
        concerns.

        Raises:
            ValueError: with the numbers of frames and ranks.
        """
        self._tell_of_references(pl_module, stage)
        ranks = launched_data_parallel_ranks(trainer.strategy)
        if stage == "fit" and ranks is not None:
            self.training_sampler(*ranks)

    def _frames_of(self, name: str) -> list[Frame]:
        self.setup()
        sets = {"train": self.train_set}
        sets |= {f"val{index}": dataset for index, dataset in enumerate(self.val_sets)}
        sets |= {f"test{index}": dataset for index, dataset in enumerate(self.test_sets)}
        return sets[name].frames

    def _evaluation_frames(self) -> dict[str, list[Frame]]:
        """Frames of each validation and test set, by its name in messages."""
        named = {f"validation set {index}": dataset.frames for index, dataset in enumerate(self.val_sets)}
        return named | {f"test set {index}": dataset.frames for index, dataset in enumerate(self.test_sets)}

    def _tell_of_references(self, pl_module: LightningModule, stage: str) -> None:
        """Warn of references that the training energies leave open, if the model has them."""
        of_model = self.statistics if self.model_statistics is None else self.model_statistics
        shifts, undetermined = of_model.energy_shifts, of_model.undetermined
        found = reference_energies(pl_module, self.type_names)
        if undetermined is None or (found is not None and not np.allclose(list(found.values()), shifts, 1e-6, 1e-9)):
            return
        directions = np.asarray(undetermined)
        is_fitted_here = self.model_statistics is None  # otherwise it was told when the checkpoint's training began
        if stage == "fit" and is_fitted_here and any(frame.energy is not None for frame in self.train_set.frames):
            text = undetermined_text(directions, shifts.tolist(), self.type_names, self.reference_setting)
            if text:
                rank_zero_warn(text)
        for name, frames in self._evaluation_frames().items():
            text = outside_text(name, frames, directions, self.type_names, self.reference_setting)
            if text and (stage == "fit" or name.startswith("test")):
                rank_zero_warn(text)

    def fingerprint(self) -> dict[str, str]:
        """Facts that decide the batches, by name: content of the files, split, types, cutoff.

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
        found = {name: file_fingerprint(path.expanduser()) for name, path in files.items()}
        for part, indices in self._indices.items():
            digest = hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()
            found[f"split, part {part}"] = f"{len(indices)} frames, sha256 of their indices {digest}"
        self._fingerprint = found | {"type names": ", ".join(self.type_names), "cutoff": f"{self.cutoff!r} Å"}
        return dict(self._fingerprint)

    def describe(self) -> str:
        """Summary in a few lines: sizes of the sets, types, neighbours, forces and fitted shifts."""
        self.setup()
        atoms = Counter(len(frame.atoms) for frame in self.train_set.frames)
        sizes = f"{min(atoms)}" if len(atoms) == 1 else f"{min(atoms)} to {max(atoms)}"
        statistics, present = self.statistics, chemical_symbols(self.train_set.frames)
        shifts = ", ".join(
            f"{name} {shift:.4f}"
            for name, shift in zip(self.type_names, statistics.energy_shifts.tolist(), strict=True)
            if name in present
        )
        labels = {
            name: sum(getattr(frame, name) is not None for frame in self.train_set.frames)
            for name in ("energy", "forces", "stress")
        }
        left_out = sum(frame.stress_left_out for frame in self.train_set.frames)
        fitted = [name for name in self.type_names if name not in statistics.isolated_atoms]
        origin = "by least squares" if len(fitted) == len(self.type_names) else "of isolated atoms"
        if fitted and origin == "of isolated atoms":
            origin += f", and {', '.join(fitted)} by least squares"
        return "\n".join(
            (
                f"frames: {len(self.train_set)} train, {_sizes(self.val_sets)} val, {_sizes(self.test_sets)} test",
                f"training frames: {sizes} atoms, {statistics.num_atoms} in all; labelled with "
                + ", ".join(f"{name} {count}" for name, count in labels.items())
                + (f"; stress of {left_out} left out, not periodic in all directions" if left_out else ""),
                f"types: {', '.join(self.type_names)}",
                f"neighbours within {self.cutoff:g} Å: {statistics.mean_neighbors:.1f} per atom",
                f"RMS of the force components: {statistics.force_rms:.4f} eV/Å",
                *self._describe_isolated_atoms(),
                f"energies of the types in eV {origin}, for energy_shifts=fit: {shifts}",
            )
        )

    def _describe_isolated_atoms(self) -> list[str]:
        numbers = {name: len(frames) for name, frames in self._isolated.items() if frames}
        if not numbers:
            return []
        found = ", ".join(f"{number} {name}" for name, number in numbers.items())
        return [
            f"isolated atoms: {found}; left out of the sets, references of the energies are those of train "
            f"(data.isolated_atoms)"
        ]

    @property
    def _files(self) -> dict[str, list[Path]]:
        return {"train": self.train_files, "val": self.val_files, "test": self.test_files}

    def _read(self, path: Path) -> list[Frame]:
        frames = read_frames(path, self.keys)
        if self.check_units:  # first: positions in nm are neighbours within any distance
            check_units(frames)
        if self.min_distance is not None:
            check_distances(frames, self.min_distance)
        return frames

    def _dataset(self, frames: Sequence[Frame]) -> AtomsDataset:
        return AtomsDataset(frames, self.type_names, self.cutoff, self.dtype, self.cache_neighbors)

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
            name_of=lambda index: dataset.frames[index].location,
        )

    def _evaluation_loader(self, dataset: AtomsDataset) -> DataLoader[Any]:
        limited, limit = ("batch_size", self.eval_batch_size) if self.eval_batch_size else (self._limited, self._limit)
        return evaluation_loader(dataset, limited, limit, *data_parallel_ranks(self.trainer), **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
            "persistent_workers": self.num_workers > 0,  # they hold the samples that they have made
            "collate_fn": partial(collate, dtype=self.dtype),
        }


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
        super().__init__(path, split={"val": 0.1, "test": 0.1} if split is None else split, **options)


def _paths(files: PathLike | Sequence[PathLike] | None) -> list[Path]:
    if files is None:
        return []
    if isinstance(files, (str, os.PathLike)):
        return [Path(files)]
    if not isinstance(files, Sequence) or not all(isinstance(file, (str, os.PathLike)) for file in files):
        raise TypeError(f"expected the path of a file or a list of paths, found {files!r}")
    return [Path(file) for file in files]


def _floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    valid = {"float32": torch.float32, "float64": torch.float64}
    found = valid.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in valid.values():
        raise ValueError(f"dtype must be one of {list(valid)}, found {dtype!r}")
    return found


def _checked_type_names(type_names: Sequence[str] | None) -> list[str] | None:
    if type_names is None:
        return None
    if not isinstance(type_names, str | Sequence):
        raise TypeError(f"type_names is a list of chemical symbols such as [H, C, O], found {type_names!r}")
    names = [type_names] if isinstance(type_names, str) else list(type_names)
    unknown = [name for name in names if name not in atomic_numbers]
    if unknown or not names:
        raise ValueError(f"type_names must be chemical symbols such as ['H', 'C', 'O'], found {names}")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"type_names must be different, {repeated} is repeated in {names}")
    return names


def _sizes(datasets: Sequence[AtomsDataset]) -> str:
    return " + ".join(str(len(dataset)) for dataset in datasets) or "0"
