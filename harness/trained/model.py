"""A trained model, rebuilt from its checkpoint alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from harness.data import Frame, collate, frame_to_sample
from harness.data.extras import Extras
from harness.fields import Batch
from harness.models import reference_energies, set_reference_energies
from harness.models.heads import heads_of, index_of_head
from harness.trained.checkpoint import TrainedCheckpoint
from harness.trained.targets import Trust

__all__ = ["TrainedModel", "load_model"]


class TrainedModel(nn.Module):
    """A model with what its users need to know about it.

    Maps a batch to predictions, as the model of the training does: ``total_energy`` in eV, ``forces`` in eV/Å, and
    ``stress`` in eV/Å³ (positive in tension, as ASE's) and ``atomic_energy`` where it has them.

    Args:
        model: from a batch dictionary to a dictionary of predictions.
        checkpoint: that it was rebuilt from.

    Attributes:
        model: that of the training.
        type_names: chemical symbols in the order of ``atom_types``; None if the training data had none.
        cutoff: of the neighbour lists in Å; None if the training data had none.
        units: by field, such as ``forces``.
        dtype: of positions and cells in the training; weights have their own.
        energy_shifts: reference energies in eV by type name; None if the model has none.
        heads: names of the model's heads, one for each data set that it was trained on; empty if it has none.
        head: the data set whose energies it predicts; None if that was not chosen.
        extras: further labels that it was trained on, and inputs that it needs beside a structure, such as a total
            charge: a structure has them in its ``info`` or ``arrays``.
        record: everything that the checkpoint says of its training, see
            :class:`~harness.job.made_with.MadeWith`.
        path: of the checkpoint.
    """

    def __init__(self, model: nn.Module, checkpoint: TrainedCheckpoint) -> None:
        super().__init__()
        self.model = model
        self.type_names = checkpoint.type_names
        self.cutoff = checkpoint.cutoff
        self.units: dict[str, str] = dict(checkpoint.record.get("units") or {})
        self.dtype = _dtype(checkpoint, model)
        self.energy_shifts: dict[str, float] | None = checkpoint.record.get("energy_shifts")
        self.heads: tuple[str, ...] = heads_of(model) or ()
        self.head: str | None = None
        self._told_absent: set[str] = set()
        self.extras = Extras.from_plain(checkpoint.record.get("extras"))
        self.record: Mapping[str, Any] = checkpoint.record
        self.path = checkpoint.path

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions of a batch; forces may be a gradient, also in ``torch.no_grad()``."""
        with torch.enable_grad():
            predictions: dict[str, Tensor] = self.model(batch)
        return predictions

    def batch_of(self, structures: Atoms | Sequence[Atoms], head: str | None = None) -> dict[str, Tensor]:
        """A batch of structures, as those of the training, on the device of the model.

        Args:
            structures: one or several.
            head: by which they are predicted, of a model that has several; :attr:`head` if None.

        Raises:
            ValueError: an element or a head that the model does not know, an input that it needs and a structure lacks,
                or the checkpoint has no type names or no cutoff.
        """
        of_head = self.head_index(head)
        frames = [structures] if isinstance(structures, Atoms) else list(structures)
        for index, atoms in enumerate(frames):
            self.check_elements(atoms, "" if isinstance(structures, Atoms) else f"structure {index}: ", head)
        if self.cutoff is None:
            raise ValueError(
                f"{self.path} has no cutoff, so the batches of its model are not known: make them yourself."
            )
        names = self.type_names or []
        own = self.extras.inputs_alone()
        fields = own.batch_fields((), ())
        samples = [
            frame_to_sample(frame, names, self.cutoff, dtype=self.dtype, fields=fields)
            for frame in own.read(Frame(atoms, origin="structures", index=index) for index, atoms in enumerate(frames))
        ]
        batch = collate(samples, self.dtype)
        if of_head is not None:
            batch["set_index"] = torch.full((len(frames),), of_head, dtype=torch.int64)
        return {name: value.to(self.device) for name, value in batch.items()}

    def head_index(self, head: str | None = None) -> int | None:
        """Position of a head, which the field ``set_index`` of a batch has; None for a model without heads.

        Args:
            head: its name; :attr:`head` if None.

        Raises:
            ValueError: the model has several heads and none of them is named, or no such head.
        """
        chosen = self.head if head is None else head
        if not self.heads and chosen == self.head:
            return None
        return index_of_head(self.heads, chosen, f"the model of {self.path}")

    def choose(self, head: str) -> None:
        r"""Predict the energies of one of the data sets that the model was trained on.

        Of a model with heads it is the head of that name. Another one gets the references of the set,
        :math:`\mu_t + \mu_{s,t} - \mu^0_t`, where :math:`\mu^0_t` are those that all energies were moved to in the
        training, see :mod:`harness.data.mixture_references`. Forces and stresses stay.

        Raises:
            ValueError: there is no such head or set, or the model has no references that could be changed.
        """
        if self.heads:
            index_of_head(self.heads, head, f"the model of {self.path}")
        else:
            self._move_to(head)
        self.head = head

    def _move_to(self, name: str) -> None:
        statistics = self.record.get("statistics") or {}
        sets = statistics.get("set_references") or {}
        if name not in sets:
            known = (
                f"expected one of {', '.join(sets)}" if sets else "it was trained on one data set alone; leave it out"
            )
            raise ValueError(f"head={name} is no data set of the training of {self.path}, {known}.")
        if self.head is not None:
            raise ValueError(f"the model of {self.path} predicts energies of {self.head} already: load it again.")
        names, to = self.type_names or [], statistics["mixture_references"]
        found = reference_energies(self.model, names)
        if found is None:
            raise ValueError(f"head={name}: the model of {self.path} has no references of types that could be changed.")
        moved = {each: energy + sets[name].get(each, to[each]) - to[each] for each, energy in found.items()}
        set_reference_energies(self.model, list(moved.values()))
        self.energy_shifts = moved

    def check_elements(self, atoms: Atoms, where: str = "", head: str | None = None) -> None:
        """Refuse elements that the model was not trained on, and warn once of those that the chosen set has not.

        Args:
            atoms: a structure.
            where: beginning of the message.
            head: by which it is predicted; :attr:`head` if None.

        Raises:
            ValueError: with the elements that it knows.
        """
        if self.type_names is None:
            raise ValueError(f"{self.path} has no type names, so the atom types of its model are not known.")
        unknown = sorted(set(atoms.get_chemical_symbols()) - set(self.type_names))
        if unknown:
            raise ValueError(
                f"{where}the model of {self.path} knows {', '.join(self.type_names)}, found {', '.join(unknown)} in "
                f"{atoms.get_chemical_formula()}: an element needs training data that have it."
            )
        chosen = self.head if head is None else head
        absent = set(self.elements_of_others(atoms.get_chemical_symbols(), chosen)) - self._told_absent
        if absent:
            self._told_absent |= absent
            warnings.warn(
                f"{where}the set {chosen} of the training of {self.path} has no frame with "
                f"{', '.join(sorted(absent))}: its reference energy is that of another set, and energies of structures "
                f"with it are not those of {chosen}. Forces and stresses were learnt of the other sets.",
                stacklevel=3,
            )

    def elements_of_others(self, symbols: Iterable[str], head: str | None = None) -> list[str]:
        """Elements that the chosen data set has no frame with: their references are those of other sets.

        Args:
            symbols: chemical symbols.
            head: name of the set; :attr:`head` if None. Without one there are no such elements.
        """
        sets = (self.record.get("statistics") or {}).get("set_references") or {}
        of_set = sets.get(self.head if head is None else head)
        return [] if of_set is None else sorted(set(symbols) - set(of_set))


def load_model(
    path: str | Path,
    map_location: torch.device | str | None = None,
    *,
    trust: Trust = (),
    changes: Mapping[str, Any] | None = None,
    head: str | None = None,
) -> TrainedModel:
    """The model of a checkpoint, in evaluation mode, from the file alone: no config and no data are needed.

    Weights are those that were validated, averaged ones under ``callbacks=[default,ema]``, in the dtypes of the
    training. In float64 predictions are those of the validation bit for bit, for the same batch. Under
    ``bf16-mixed`` they are those of the float32 weights, without autocast. NequIP's and Allegro's models are not
    compiled, also if they were in the training.

    The file is read with ``weights_only=True``. It names the builder of its model: those of ``harness.models`` are
    called, others, such as one of your own package, only if ``trust`` has them.

    Args:
        path: of a checkpoint of this package, whatever strategy has written it.
        map_location: device of the model; the CPU if None.
        trust: names of packages, modules or builders that may be imported and called, such as ``"my_models"``.
        changes: arguments of the builder that replace those of the training, such as ``{"stress": False}``.
        head: one of the data sets of a mixture, whose energies are predicted, see :meth:`TrainedModel.choose`.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: a package that the model needs is not installed; its extra is named.
        ValueError: the file is no checkpoint, is damaged, or lacks what a model is rebuilt from; its builder is not
            trusted; its weights do not fit; or there is no such head.
    """
    checkpoint = TrainedCheckpoint.read(path)
    # NequIP's compilation is one of training steps, of several structures
    eager = {"compile_mode": "eager"} if checkpoint.architecture.get("compile_mode") == "compile" else {}
    model = TrainedModel(checkpoint.build(trust, {**eager, **(changes or {})}), checkpoint).eval()
    if head is not None:
        model.choose(head)
    return model if map_location is None else model.to(map_location)


def _dtype(checkpoint: TrainedCheckpoint, model: nn.Module) -> torch.dtype:
    """Dtype of the data of the training; that of the weights if it is not recorded."""
    named = getattr(torch, str(checkpoint.record.get("dtype")), None)
    if isinstance(named, torch.dtype):
        return named
    return next((each.dtype for each in model.parameters() if each.dtype.is_floating_point), torch.get_default_dtype())
