"""Several data sets in one training: a data module made of one for each set, mixed by their shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from harness.data.arguments import checked_files
from harness.data.budget import BudgetBatchSampler
from harness.data.collate import collate, empty_batch
from harness.data.datamodule import AtomsDataModule
from harness.data.device_neighbors import EdgesOnDevice
from harness.data.evaluation import sizes_of
from harness.data.extras import Extras
from harness.data.mixing import Mixing, MixtureBatchSampler, frames_of_shares, shares_of
from harness.data.mixture_references import MixtureStatistics, Moves, References, mixture_statistics
from harness.data.mixture_set import MixtureDataset, MixtureFields
from harness.data.mixture_settings import about_set, checked_sets, data_module, plain, weights_of, with_set
from harness.data.references import outside_text, undetermined_text
from harness.data.samplers import TrainingBatchSampler
from harness.data.set_loaders import SetLoaders
from harness.models import reference_energies
from harness.models.heads import heads_of
from harness.strategies import launched_data_parallel_ranks
from harness.support.checks import is_number, whole_number

__all__ = ["MixtureDataModule"]


class MixtureDataModule(SetLoaders, EdgesOnDevice):
    r"""Training, validation and test batches of several data sets.

    Each set is an :class:`~harness.data.datamodule.AtomsDataModule` of its own, with its files, keys, split and
    reference energies. An epoch has ``epoch_frames`` frames, of which each set gives its share; which ones, and the
    order in which they are mixed, are a function of the seed and the number of the epoch alone, see
    :class:`~harness.data.mixing.Mixing`. Batches have the field ``set_index``, int64 ``[num_graphs]``: the position of
    the set among ``set_names``.

    Args:
        sets: arguments of each set by its name: those of the data module that are not of the whole, such as ``train``,
            ``val``, ``test``, ``keys``, ``split``, ``num_train`` and ``isolated_atoms``, and further ``weight``, its
            share of the epochs relative to the other sets', and ``references``: ``fit``, energies in eV by symbol, or
            the path of a file of isolated atoms.
        cutoff: of the neighbour lists, in Å.
        temperature: :math:`T` of shares that are proportional to :math:`n^{1/T}` with the number of frames :math:`n`.
            Without it and without weights shares are natural, proportional to :math:`n`. If a set has a weight, shares
            are proportional to the weights, and a set without one has 1.
        epoch_frames: frames of an epoch; None for as many as all sets have together.
        references: ``own``: the energies of a set are moved from the references of that set to those of the mixture,
            which are, for each element, those of the first set that has it; energies in eV by symbol, or the path of a
            file of isolated atoms: likewise, to these; ``common``: energies stay as they are, and the references are
            fitted to all sets together. Models with a head for each set get the references of each set, and energies
            stay as they are.
        evaluation: ``joined``: the validation sets of all sets are one, and so are the test sets; ``separate``: each is
            one of its own, in the order of ``val_names`` and ``test_names``.
        batch_size: frames in a training step, of all ranks together.
        max_atoms: instead: atoms in it, at most.
        max_edges: instead: edges in it, at most.
        balance: with ``batch_size``, what the ranks get similar numbers of, ``atoms`` or ``edges``.
        eval_batch_size: frames in an evaluation step, of all ranks together; if None, as in training.
        seed: of the order of the training frames.
        split_seed: of the splits; ``seed`` if None.
        type_names: chemical symbols in the order of the type indices; None for those of all sets by atomic number.
        dtype: of all floating-point fields but ``total_energy``.
        num_workers: processes of each data loader.
        pin_memory: whether batches are made in page-locked memory, from which a GPU copies them without the host
            waiting; None for those of a trainer on a GPU.
        neighbors: place where neighbour lists are made: ``workers`` as samples are drawn, ``device`` of whole batches
            that are on the device, see :mod:`harness.data.device_neighbors`.
        cache_neighbors: whether samples stay in memory with their neighbour lists once they are made; if None, those
            of files, and not those of stores.
        options: any argument of a set, for the sets that do not have it themselves.

    Raises:
        KeyError: if a set or a split has an argument that there is not.
        TypeError: if an argument is of the wrong kind.
        ValueError: if there are no sets, or a number is out of range.
    """

    def __init__(
        self,
        sets: Mapping[str, Mapping[str, Any]],
        *,
        cutoff: float,
        temperature: float | None = None,
        epoch_frames: int | None = None,
        references: str | Mapping[str, float] = "own",
        evaluation: str = "joined",
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        balance: str | None = None,
        eval_batch_size: int | None = None,
        seed: int = 0,
        split_seed: int | None = None,
        type_names: Sequence[str] | None = None,
        dtype: str | torch.dtype = "float32",
        num_workers: int = 0,
        pin_memory: bool | None = None,
        neighbors: str = "workers",
        cache_neighbors: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._set_neighbors(neighbors, cutoff)
        options = plain(options)
        arguments = checked_sets(plain(sets), options)
        self.set_names: list[str] = list(arguments)
        """Names of the sets; ``set_index`` of a batch counts them."""
        self._weights = weights_of(arguments)
        if temperature is not None:
            if not is_number(temperature) or not 0 < temperature < float("inf"):
                raise ValueError(f"data.temperature must be a positive number, found {temperature!r}")
            if self._weights is not None:
                raise ValueError(
                    f"data.temperature={temperature} and weights of sets would both say what the shares are; expected "
                    f"one of them. Leave out data.temperature, or the weights"
                )
        self.temperature = temperature
        self.epoch_frames = None if epoch_frames is None else whole_number("data.epoch_frames", epoch_frames)
        if evaluation not in ("joined", "separate"):
            raise ValueError(f"data.evaluation is 'joined' or 'separate', found {evaluation!r}")
        self.evaluation = evaluation
        own = {name: given.pop("references", None) for name, given in arguments.items()}
        self._references = References(plain(references), own)
        shared: dict[str, Any] = {
            "cutoff": cutoff,
            "batch_size": batch_size,
            "max_atoms": max_atoms,
            "max_edges": max_edges,
            "balance": balance,
            "eval_batch_size": eval_batch_size,
            "seed": seed,
            "split_seed": split_seed,
            "type_names": type_names,
            "dtype": dtype,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "neighbors": neighbors,
        }
        if cache_neighbors is not None:
            shared["cache_neighbors"] = cache_neighbors
        self.modules: dict[str, AtomsDataModule] = {}
        self._files: dict[str, dict[str, list[Path]]] = {}
        for name, given in arguments.items():
            with about_set(name):
                self.modules[name] = data_module(shared, options, given)
                self._files[name] = checked_files(given["train"], given.get("val"), given.get("test"))
        first = next(iter(self.modules.values()))
        self.cutoff, self.dtype, self.seed = first.cutoff, first.dtype, first.seed
        limits = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        ((self._limited, self._limit),) = [(name, value) for name, value in limits.items() if value is not None]
        self.batch_size, self.max_atoms, self.max_edges, self.balance = batch_size, max_atoms, max_edges, balance
        self.eval_batch_size = first.eval_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._asked_type_names = None if type_names is None else list(type_names)
        self._is_set_up = False
        self._fingerprint: dict[str, str] | None = None
        self.model_statistics: Any = None
        """Statistics that the model was built of where they are not those of this training set but of a checkpoint."""
        self._warn_of_shared_files()

    # --- sets ---

    def setup(self, stage: str | None = None) -> None:
        """Set up every set, and mix them; the first call does everything, later ones nothing.

        Raises:
            FileNotFoundError, KeyError: those of the sets.
            ValueError: likewise, or a set gets no frame of an epoch.
        """
        if self._is_set_up:
            return
        for name, module in self.modules.items():
            with about_set(name):
                module.setup(stage)
        modules = list(self.modules.values())
        self.extras = Extras.joined({name: module.extras for name, module in self.modules.items()})
        """Further labels, inputs and weights of all sets."""
        if self._asked_type_names is None:
            symbols = set().union(*(module.type_names for module in modules))
            self.type_names: list[str] = sorted(symbols, key=lambda symbol: atomic_numbers[symbol])
        else:
            self.type_names = self._asked_type_names
        self.mixing = self._mixing([len(module.train_set) for module in modules])
        self.statistics: MixtureStatistics = mixture_statistics(
            self.modules, self.type_names, self._references, self.mixing.passes
        )
        self.moves = Moves(self.statistics)
        self._further = MixtureFields(
            {name: module.batch_fields for name, module in self.modules.items()},
            {name: module.group_names for name, module in self.modules.items()},
        )
        self.group_names: list[str] = self._further.group_names
        """Names of the groups of all sets in the order of ``group_index``."""
        self.batch_fields = self._further.fields
        self.train_set = self._joined(range(len(modules)), [module.train_set for module in modules])
        self._parts: dict[str, list[tuple[str, str]]] = {"train": [(name, "train") for name in self.set_names]}
        self.val_sets, self.val_names = self._evaluation_sets("val")
        self.test_sets, self.test_names = self._evaluation_sets("test")
        self._is_set_up = True

    def _mixing(self, num_frames: list[int]) -> Mixing:
        epoch_frames = self.epoch_frames or sum(num_frames)
        self.shares = shares_of(num_frames, self._weights, self.temperature)
        per_epoch = frames_of_shares(self.shares, epoch_frames)
        for name, number, share, drawn in zip(self.set_names, num_frames, self.shares, per_epoch, strict=True):
            if drawn == 0:
                raise ValueError(
                    f"data.sets.{name}: a share of {share:.3g} of an epoch of {epoch_frames} frames is none of its "
                    f"{number} frames; expected at least one. Raise its weight or data.epoch_frames, or leave it out"
                )
        return Mixing(tuple(num_frames), tuple(per_epoch), self.seed)

    def _joined(self, indices: Sequence[int], datasets: Sequence[Any]) -> MixtureDataset:
        return MixtureDataset(datasets, indices, self.type_names, self.moves, self._further)

    def _evaluation_sets(self, kind: str) -> tuple[list[MixtureDataset], list[str]]:
        """Validation or test sets, and their names; remembers of which sets of the modules they are made."""
        found: list[tuple[int, str, str, Any]] = []
        for index, (name, module) in enumerate(self.modules.items()):
            own = module.val_sets if kind == "val" else module.test_sets
            named = [name] if len(own) == 1 else [f"{name}.{number}" for number in range(len(own))]
            found += [
                (index, full, f"{kind}{number}", each)
                for number, (full, each) in enumerate(zip(named, own, strict=True))
            ]
        joined = [found] if found else []
        groups = [[each] for each in found] if self.evaluation == "separate" else joined
        for number, group in enumerate(groups):
            self._parts[f"{kind}{number}"] = [(self.set_names[index], own) for index, _, own, _ in group]
        sets = [self._joined([each[0] for each in group], [each[3] for each in group]) for group in groups]
        return sets, ["+".join(each[1] for each in group) for group in groups]

    # --- batches ---

    def training_sampler(self, rank: int, num_ranks: int) -> MixtureBatchSampler:
        """Sampler of the training frames in the batches of one rank.

        Raises:
            ValueError: the batches have fewer frames than there are ranks, or a frame is larger than the budget.
        """
        self.setup()
        mixing, dataset = self.mixing, self.train_set
        if self._limited == "batch_size":
            places = TrainingBatchSampler(mixing.epoch_frames, self._limit, rank, num_ranks, seed=self.seed)
            sizes = None if self.balance is None else sizes_of(dataset, self.balance)
            return MixtureBatchSampler(places, mixing, sizes)
        unit = self._limited.removeprefix("max_")
        sizes = sizes_of(dataset, unit)
        largest = mixing.largest_sizes(sizes)
        biggest = int(np.argmax(sizes))
        by_budget = BudgetBatchSampler(
            largest,
            self._limit,
            rank,
            num_ranks,
            seed=self.seed,
            unit=unit,
            name_of=lambda _: dataset.frames.location(biggest),
        )
        return MixtureBatchSampler(by_budget, mixing, sizes, largest)

    def _collate(self) -> Callable[[Sequence[Any]], dict[str, Any]]:
        return partial(_collate, dtype=self.dtype, further=self._further)

    # --- facts ---

    def labelled_sets(self, name: str = "train") -> dict[str, list[str]]:
        """Names of the sets that have a label in any frame, by field: frames of the others are left out of it.

        Args:
            name: as in :meth:`missing_labels`.
        """
        found: dict[str, list[str]] = {}
        for set_name, counts in self.missing_labels_by_set(name, weighted=False).items():
            for field, (missing, total) in counts.items():
                found.setdefault(field, []).extend([set_name] if missing < total else [])
        return found

    def missing_labels(self, name: str, weighted: bool = True) -> dict[str, tuple[int, int]]:
        """Number of frames without a label or with gaps in it, and of all frames, by field.

        Frames of sets that do not have the label in training are left out of what is compared with it, and do not
        count, unless no set has it.

        Args:
            name: ``train``, or ``val0``, ``test1`` … for the sets in their order.
            weighted: frames are not counted for a label whose weight is 0 in them.
        """
        labelled = self.labelled_sets()
        counted: dict[str, tuple[int, int]] = {}
        everything: dict[str, tuple[int, int]] = {}
        for set_name, counts in self.missing_labels_by_set(name, weighted).items():
            for field, pair in counts.items():
                for sums in (everything, counted) if set_name in labelled.get(field, ()) else (everything,):
                    before = sums.get(field, (0, 0))
                    sums[field] = before[0] + pair[0], before[1] + pair[1]
        return everything | counted

    def missing_labels_by_set(self, name: str, weighted: bool = True) -> dict[str, dict[str, tuple[int, int]]]:
        """Likewise for each of the data sets by its name, all frames of it counting.

        Args:
            name: as in :meth:`missing_labels`.
            weighted: likewise.
        """
        self.setup()
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for set_name, own in self._parts[name]:
            counts = found.setdefault(set_name, {})
            for field, (missing, total) in self.modules[set_name].missing_labels(own, weighted).items():
                before = counts.get(field, (0, 0))
                counts[field] = before[0] + missing, before[1] + total
        return found

    def missing_hint(self, name: str, field: str) -> str:
        """Sentences on a field that frames of a set lack: what they have in its place, or that it was left out.

        Args:
            name: of the set, as in :meth:`missing_labels`.
            field: ``total_energy``, ``forces`` or ``stress``.
        """
        hints = []
        by_set = self.missing_labels_by_set(name)
        for set_name, own in dict(self._parts[name]).items():
            missing = by_set[set_name].get(field, (0, 0))[0]
            if missing:
                hint = with_set(self.modules[set_name].missing_hint(own, field), set_name)
                hints.append(f"{set_name}: {missing} frames without. {hint}".strip())
        return " ".join(hints)

    def labelled_types(self, name: str) -> dict[str, set[str]]:
        """Atom types that have a label in a set, by field of atoms.

        Args:
            name: as in :meth:`missing_labels`.
        """
        found: dict[str, set[str]] = {}
        self.setup()
        for set_name, own in self._parts[name]:
            for field, types in self.modules[set_name].labelled_types(own).items():
                found.setdefault(field, set()).update(types)
        return found

    def fingerprint(self) -> dict[str, str]:
        """Facts that decide the batches, by name: those of each set, shares, references, types, cutoff."""
        self.setup()
        if self._fingerprint is None:
            found: dict[str, str] = {}
            for name, module in self.modules.items():
                own = module.fingerprint()
                found |= {f"set {name}, {fact}": own[fact] for fact in own if fact not in ("type names", "cutoff")}
            numbers = ", ".join(map(str, self.mixing.per_epoch))
            found["frames of the sets in an epoch"] = numbers
            found["references"] = self.statistics.references_text()
            self._fingerprint = found | {"type names": ", ".join(self.type_names), "cutoff": f"{self.cutoff!r} Å"}
        return dict(self._fingerprint)

    def describe(self) -> str:
        """Table of the sets with their frames and shares, then types, neighbours, forces and references."""
        self.setup()
        rows = [("set", "frames", "share", "in an epoch", "times each", "val", "test", "labels")]
        labelled = self.labelled_sets()
        for index, (name, module) in enumerate(self.modules.items()):
            labels = [field for field, sets in labelled.items() if name in sets]
            rows.append(
                (
                    name,
                    str(self.mixing.num_frames[index]),
                    f"{100 * self.shares[index]:.3g} %",
                    str(self.mixing.per_epoch[index]),
                    f"{self.mixing.passes[index]:.3g}",
                    str(sum(map(len, module.val_sets))),
                    str(sum(map(len, module.test_sets))),
                    ", ".join(labels),
                )
            )
        statistics = self.statistics
        return "\n".join(
            (
                *_table(rows),
                f"an epoch has {self.mixing.epoch_frames} frames, shares are {self._shares_text()}",
                f"types: {', '.join(self.type_names)}",
                "of the frames as drawn:",
                f"  neighbours within {self.cutoff:g} Å: {statistics.mean_neighbors:.1f} per atom",
                f"  RMS of the force components: {statistics.force_rms:.4f} eV/Å",
                *statistics.describe(self.moves.are_made),
            )
        )

    def _shares_text(self) -> str:
        if self._weights is not None:
            ratio = " : ".join(f"{weight:g}" for weight in self._weights)
            return f"by weight, {ratio}"
        if self.temperature is not None:
            return f"n^(1/{self.temperature:g}), n frames in a set (data.temperature)"
        return "natural, by the numbers of frames"

    # --- checks ---

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave energies as they are for a model with heads; tell of references; refuse more ranks than frames.

        Raises:
            ValueError: with the numbers of frames and ranks; or the heads of the model are not the sets; or neighbour
                lists cannot be made on the device.
        """
        heads = heads_of(pl_module)
        if heads is not None and list(heads) != self.set_names:
            raise ValueError(
                f"the model has the heads {', '.join(heads)}, and the mixture the sets {', '.join(self.set_names)} "
                f"(data.sets); expected a head for each set, in the same order: model.heads=sets makes them so"
            )
        if heads is not None and self._references.are_common:
            raise ValueError(
                "data.references=common is for a model with the same references for all sets, found one with heads "
                f"({', '.join(heads)}), which has those of each set; leave data.references out, or the heads"
            )
        self.moves.are_made = heads is None
        if heads is None:
            self._tell_of_references(pl_module, stage)
        self._check_device(self.train_set, trainer.strategy.root_device)
        ranks = launched_data_parallel_ranks(trainer.strategy)
        if stage == "fit" and ranks is not None:
            self.training_sampler(*ranks)

    def _tell_of_references(self, pl_module: LightningModule, stage: str) -> None:
        """Warn of references that are not those of the targets, or that the training energies leave open."""
        found = reference_energies(pl_module, self.type_names)
        of_data = self.statistics.energy_shifts.tolist()
        of_model = self.statistics if self.model_statistics is None else self.model_statistics
        is_fitted = found is None or np.allclose(list(found.values()), of_model.energy_shifts.tolist(), 1e-6, 1e-9)
        if found is not None and self.moves.are_needed and not np.allclose(list(found.values()), of_data, 1e-6, 1e-9):
            worst = max(self.type_names, key=lambda name: abs(found[name] - of_data[self.type_names.index(name)]))
            rank_zero_warn(
                f"the references of the model are not those that the energies of the sets are moved to: {worst} has "
                f"{found[worst]:.4f} eV in the model and {of_data[self.type_names.index(worst)]:.4f} eV in the data. "
                f"The model has to learn the difference: give its references to the data, data.references={{{worst}: "
                f"{found[worst]:.4f}, ...}}, or leave out model.energy_shifts."
            )
        if not is_fitted or self.model_statistics is not None:
            return
        for name, (directions, shifts, types) in self.statistics.open_directions.items():
            told = [undetermined_text(directions, shifts, types)] if stage == "fit" else []
            for full, frames in self._evaluation_parts(self.modules.get(name)):
                if stage == "fit" or full.startswith("test"):
                    told.append(outside_text(full, frames, directions, types))
            for text in filter(None, told):
                if name in self.modules:
                    text = with_set(text, name).replace("model.energy_shifts", f"data.sets.{name}.references")
                rank_zero_warn(f"{name}, {text}")

    def _evaluation_parts(self, module: AtomsDataModule | None) -> Iterator[tuple[str, Any]]:
        """Frames of the validation and test sets of a module, or of the mixture, by their names in messages."""
        owner: Any = self if module is None else module
        for kind, datasets in (("validation", owner.val_sets), ("test", owner.test_sets)):
            for number, dataset in enumerate(datasets):
                yield f"{kind} set {number}", dataset.frames

    def _warn_of_shared_files(self) -> None:
        """Warn of a file that is in two sets."""
        places: dict[Path, dict[str, list[str]]] = {}
        for name, files in self._files.items():
            for kind, paths in files.items():
                for path in paths:
                    places.setdefault(path.expanduser().resolve(), {}).setdefault(name, []).append(kind)
        for path, by_set in places.items():
            if len(by_set) > 1:
                where = ", ".join(f"data.sets.{name}.{kind}" for name, kinds in by_set.items() for kind in kinds)
                rank_zero_warn(
                    f"{path} is in several sets ({where}): its frames count for each of them, and those that one set "
                    f"trains on may be tested by another. Give each set files of its own, or a weight instead."
                )


def _collate(samples: Sequence[Mapping[str, Tensor]], dtype: torch.dtype, further: MixtureFields) -> dict[str, Tensor]:
    """A batch; one of no graphs has the fields of a mixture, too."""
    if samples:
        return collate(samples, dtype)
    return {**empty_batch(dtype), **further.empty(dtype), "set_index": torch.zeros(0, dtype=torch.int64)}


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first and last column are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if place in (0, last) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
