"""Trained models as calculators of ASE: molecular dynamics, relaxations, phonons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray
from torch import Tensor

from harness.calculators.skin import SkinNeighbors
from harness.data import Frame
from harness.data.batch_fields import fields_of_frame
from harness.trained import TrainedModel, load_model
from harness.trained.targets import Trust

__all__ = ["HarnessCalculator"]


class HarnessCalculator(Calculator):
    r"""ASE calculator of a trained model.

    Properties, in eV and Å:

    * ``energy``, and ``free_energy``, which is the same;
    * ``forces`` ``[num_atoms, 3]``;
    * ``stress`` ``[6]`` in ASE's order xx, yy, zz, yz, xz, xy and sign, :math:`\sigma = \frac{1}{V} \partial E /
      \partial \varepsilon`, for structures that are periodic in all three directions;
    * ``energies`` ``[num_atoms]``, reference energies included, which add up to ``energy``, of models that predict
      ``atomic_energy``, as those of this package do;
    * ``dipole`` ``[3]`` in e·Å, ``charges`` ``[num_atoms]`` in e and ``magmoms`` ``[num_atoms]`` in μB, of models that
      predict the fields ``dipole``, ``charges`` and ``magnetic_moments``.

    Inputs that a model was trained with beside the structure, such as a total charge, are looked for in ``info`` and
    ``arrays`` of the structure, under the keys of the training.

    One call of the model gives all of them. The neighbour list has a skin, see
    :class:`~harness.calculators.skin.SkinNeighbors`. Positions go into the model in the dtype of its training: dynamics
    and relaxations to small forces are better off with a model that was trained with positions in float64.

    Args:
        model: a checkpoint, see :func:`harness.load_model`, or a model that was loaded.
        device: of the model, such as ``cuda``; a GPU if there is one, for a path, and where it is, for a model.
        skin: of the neighbour list in Å. A larger one is made anew less often and has more pairs to look at.
        trust: names of packages whose builders a checkpoint may call, see :func:`harness.load_model`.
        head: one of the data sets of a mixture, whose energies are predicted, see
            :meth:`~harness.trained.TrainedModel.choose`. One that was loaded has it from there, unless it has heads.

    Attributes:
        model: the model, whose weights need no gradients.
        neighbors: the neighbour list; ``neighbors.num_lists`` counts how often it was made.

    Raises:
        ValueError: the model has no cutoff, no type names, or no such head, besides the errors of
            :func:`harness.load_model`.
    """

    implemented_properties: ClassVar[list[str]] = [  # type: ignore[misc]
        *("energy", "free_energy", "forces", "stress", "energies"),
        *("dipole", "charges", "magmoms"),
    ]

    def __init__(
        self,
        model: str | Path | TrainedModel,
        device: torch.device | str | None = None,
        *,
        skin: float = 0.5,
        trust: Trust = (),
        head: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, TrainedModel):
            self.model = model if device is None else model.to(device)
        else:
            where = device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.model = load_model(model, where, trust=trust, head=head)
        self.model.eval().requires_grad_(False)
        if self.model.cutoff is None or self.model.type_names is None:
            lacks = "cutoff" if self.model.cutoff is None else "type names"
            raise ValueError(f"{self.model.path} has no {lacks}, so the inputs of its model are not known.")
        self._head = self.model.head_index(head)
        self._inputs = self.model.extras.inputs_alone()
        self.neighbors = SkinNeighbors(self.model.cutoff, skin)
        self._index_of = {name: index for index, name in enumerate(self.model.type_names)}
        self._numbers: NDArray[np.int64] | None = None
        self._of_elements: dict[str, Tensor] = {}

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] | None = None,
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute all properties of a structure that the model predicts.

        Raises:
            ValueError: an element that the model does not know.
            PropertyNotImplementedError: a property that is asked for is not predicted, or has no meaning here.
        """
        super().calculate(atoms, properties, system_changes)
        structure: Atoms = self.atoms  # type: ignore[assignment]
        self.results = _results(self.model(self._batch(structure)), structure)
        for name in properties or ():
            if name not in self.results:
                raise PropertyNotImplementedError(self._reason(name, structure))

    def _batch(self, atoms: Atoms) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        index, shifts = self.neighbors.edges(atoms, device)
        return {
            **self._inputs_of_elements(atoms),
            **self._further_inputs(atoms),
            "pos": torch.from_numpy(atoms.positions).to(device, dtype, copy=True),
            "cell": torch.from_numpy(atoms.cell.array).to(device, dtype, copy=True).unsqueeze(0),
            "pbc": torch.from_numpy(atoms.pbc).to(device, copy=True).unsqueeze(0),
            "edge_index": index,
            "edge_cell_shift": shifts.to(dtype),
        }

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Changes of a structure since the last calculation, those of further inputs of the model included."""
        changes: list[str] = super().check_state(atoms, tol)
        known = None if self.atoms is None else self._further_inputs(self.atoms)
        if known:
            now = self._further_inputs(atoms)
            changes += [name for name, value in now.items() if not torch.equal(value, known[name])]
        return changes

    def _further_inputs(self, atoms: Atoms) -> dict[str, Tensor]:
        """Inputs such as the total charge, which the structure has in its ``info`` or ``arrays``."""
        if not self._inputs.entries:
            return {}
        # a copy: the results of a calculator, such as this one, are no inputs
        (frame,) = self._inputs.read([Frame(atoms.copy(), origin=atoms.get_chemical_formula())])
        found = fields_of_frame(frame, self._inputs.batch_fields((), ()), self.model.dtype)
        return {name: value.to(self.model.device) for name, value in found.items()}

    def _inputs_of_elements(self, atoms: Atoms) -> Mapping[str, Tensor]:
        """Inputs that depend on the elements alone, kept from step to step."""
        if self._numbers is None or not np.array_equal(atoms.numbers, self._numbers):
            self.model.check_elements(atoms, head=None if self._head is None else self.model.heads[self._head])
            types = [self._index_of[symbol] for symbol in atoms.get_chemical_symbols()]
            made = {
                "atom_types": torch.tensor(types, dtype=torch.int64),
                "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.int64),
                "batch": torch.zeros(len(atoms), dtype=torch.int64),
                "num_atoms": torch.tensor([len(atoms)], dtype=torch.int64),
            }
            if self._head is not None:
                made["set_index"] = torch.tensor([self._head], dtype=torch.int64)
            self._of_elements = made
            self._numbers = atoms.numbers.copy()
        self._of_elements = {name: value.to(self.model.device) for name, value in self._of_elements.items()}
        return self._of_elements

    def _reason(self, name: str, atoms: Atoms) -> str:
        """Sentence on a property that is not among the results."""
        model = f"the model of {self.model.path}"
        if name == "stress" and not _is_bulk(atoms):
            return (
                f"{atoms.get_chemical_formula()} has no stress, which needs a cell that is periodic in all three "
                f"directions, found pbc={atoms.pbc.tolist()} and a volume of {abs(atoms.cell.volume):.3g} Å³"
            )
        if name == "stress":
            return f"{model} predicts no stress: it was trained with model.stress=false"
        if name == "energies":
            return f"{model} predicts no energies of atoms, {type(self.model.model).__name__} gives those of structures"
        return f"{model} does not predict {name}"


def _is_bulk(atoms: Atoms) -> bool:
    return bool(atoms.pbc.all()) and abs(atoms.cell.volume) > 0


def _results(predictions: Mapping[str, Tensor], atoms: Atoms) -> dict[str, Any]:
    """Predictions by ASE's names."""
    found = {name: value.detach().double().cpu().numpy() for name, value in predictions.items()}
    results: dict[str, Any] = {}
    if "total_energy" in found:
        results["energy"] = results["free_energy"] = float(found["total_energy"].reshape(()))
    if "forces" in found:
        results["forces"] = found["forces"]
    if "stress" in found and _is_bulk(atoms):
        results["stress"] = full_3x3_to_voigt_6_stress(found["stress"].reshape(3, 3))
    if "atomic_energy" in found:
        results["energies"] = found["atomic_energy"].reshape(len(atoms))
    if "dipole" in found:
        results["dipole"] = found["dipole"].reshape(3)
    for field, name in (("charges", "charges"), ("magnetic_moments", "magmoms")):
        if field in found:
            results[name] = found[field].reshape(len(atoms))
    return results
