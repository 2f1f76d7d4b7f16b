r"""References of the energies in a mixture: those of each set, and those of the mixture that all energies are moved to.

Sets come from calculations whose total energies have nothing in common: other functionals, pseudopotentials or codes.
With the references :math:`\mu_{s,t}` of set :math:`s` and :math:`\mu_t` of the mixture, a frame of :math:`n_t` atoms of
type :math:`t` is trained on and evaluated with

.. math:: E' = E - \sum_t n_t\, (\mu_{s,t} - \mu_t),

so that what is left for the model, :math:`E' - \sum_t n_t \mu_t`, is what the references of the set leave. A model's
:math:`\hat E'` is on the level of set :math:`s` with :math:`\sum_t n_t (\mu_{s,t} - \mu_t)` added. Errors, forces and
stresses are the same on every level.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols as _SYMBOLS
from numpy.typing import NDArray
from torch import Tensor

from harness.data.datamodule import AtomsDataModule
from harness.data.frames import FrameSet
from harness.data.references import EnergySums, fit_references
from harness.data.references import References as FittedReferences
from harness.data.statistics import DataStatistics
from harness.models.scale_shift import resolve_shifts

__all__ = ["MixtureStatistics", "Moves", "References", "mixture_statistics"]

_DENSE_NUMBERS = 4_000_000  # numbers of atoms of all frames up to which they are kept for the fit: 32 MB
_ALL = "all sets"

Array = NDArray[np.float64]
Given = str | os.PathLike[str] | Mapping[str, float]


class References:
    """References as they are asked for, of the mixture and of each set.

    Args:
        of_mixture: ``own``, ``common``, energies in eV by symbol, or the path of a file of isolated atoms.
        of_sets: by the name of the set: None or ``fit``, energies, or a path.

    Raises:
        TypeError: something else.
        ValueError: references of a set, where they are common.
    """

    def __init__(self, of_mixture: Any, of_sets: Mapping[str, Any]) -> None:
        self.are_common = of_mixture == "common"
        self.to: Given | None = None if of_mixture in ("own", "common") else of_mixture
        self.of_sets: dict[str, Given] = {name: "fit" if each is None else each for name, each in of_sets.items()}
        for argument, given in {"references": self.to, **self._arguments()}.items():
            if given is not None and not isinstance(given, str | os.PathLike | Mapping):
                raise TypeError(
                    f"data.{argument} is {'own, common' if argument == 'references' else 'fit'}, energies in eV by "
                    f"symbol, or the path of a file of isolated atoms, found {given!r}"
                )
        named = [argument for argument, given in self._arguments().items() if given != "fit"]
        if self.are_common and named:
            raise ValueError(
                f"data.references=common fits one reference for each element to all sets together, and "
                f"data.{named[0]} gives a set one of its own; leave one of them out"
            )

    def _arguments(self) -> dict[str, Given]:
        return {f"sets.{name}.references": given for name, given in self.of_sets.items()}


@dataclass(frozen=True, eq=False)
class MixtureStatistics(DataStatistics):
    """Statistics of the training frames of a mixture.

    ``force_rms`` and ``mean_neighbors`` are of the frames as they are drawn: a set counts as often as its frames come
    in an epoch. ``num_frames`` and ``num_atoms`` count every frame once. ``energy_shifts`` are the references of the
    mixture.

    Attributes:
        set_references: energies in eV by symbol of each set, by its name, of the elements that it has.
        levels: of each type, the name of the set whose reference is that of the mixture; empty where they are fitted to
            all sets, or given.
        origins: of each set, how its references were found, in words.
        open_directions: by set, references that its energies leave open: directions ``[num_types_of_set, number]``,
            the references and the types of the set.
    """

    set_references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    levels: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    open_directions: Mapping[str, tuple[Array, list[float], tuple[str, ...]]] = field(default_factory=dict)

    @property
    def mixture_references(self) -> dict[str, float]:
        """References in eV by symbol that the energies of all sets are moved to."""
        return dict(zip(self.type_names, self.energy_shifts.tolist(), strict=True))

    @property
    def set_undetermined(self) -> dict[str, dict[str, list[float]]] | None:
        """By set, directions that its energies leave its references open in: components by symbol.

        Empty for a set without such directions, or whose references were given. None where references are common.
        """
        if _ALL in self.origins:
            return None
        found: dict[str, dict[str, list[float]]] = {name: {} for name in self.set_references}
        for name, (directions, _, types) in self.open_directions.items():
            if directions.shape[1]:
                found[name] = dict(zip(types, directions.tolist(), strict=True))
        return found

    @property
    def set_shifts(self) -> Tensor:
        """References of the sets, float64 ``[num_sets, num_types]``; the mixture's where a set does not have a type."""
        shifts = self.energy_shifts.tolist()
        rows = [
            [energies.get(name, shift) for name, shift in zip(self.type_names, shifts, strict=True)]
            for energies in self.set_references.values()
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def describe(self, moved: bool = True) -> list[str]:
        """Lines about the references of each set and of the mixture.

        Args:
            moved: False where the heads of a model have the references of the sets.
        """
        values = dict(zip(self.type_names, self.energy_shifts.tolist(), strict=True))
        present = [name for name in self.type_names if any(name in each for each in self.set_references.values())]
        of_mixture = _listed({name: values[name] for name in present})
        if _ALL in self.origins:
            return [f"energies of the types in eV {self.origins[_ALL]}, common to all sets: {of_mixture}"]
        levels = ", ".join(f"{each} of {name}" for each, name in self.levels.items()) or "as given"
        to = f"energies are moved to the references of the mixture ({levels}), for energy_shifts=fit: {of_mixture}"
        return [
            "references of the sets in eV:",
            *(f"  {name}: {_listed(each)}; {self.origins[name]}" for name, each in self.set_references.items()),
            to if moved else "energies stay as they are: each head of the model has the references of its set",
        ]

    def references_text(self) -> str:
        """All references in a line that two ranks can compare."""
        rows = [*self.set_shifts.tolist(), self.energy_shifts.tolist()]
        return "; ".join(", ".join(f"{value:.9g}" for value in row) for row in rows)


class Moves:
    """Energies by which frames of each set are moved to the references of the mixture.

    Attributes:
        are_made: False for a model that has the references of each set itself.
        are_needed: False where all sets have the same references.
    """

    def __init__(self, statistics: MixtureStatistics) -> None:
        self._of_types = statistics.set_shifts - statistics.energy_shifts
        numbers = np.zeros((len(statistics.set_references), len(_SYMBOLS)))
        numbers[:, [_SYMBOLS.index(name) for name in statistics.type_names]] = self._of_types.numpy()
        self._of_elements = numbers
        self.are_needed = bool((self._of_types != 0).any())
        self.are_made = True

    def of_types(self, set_index: int, atom_types: Tensor) -> float:
        r"""Sum :math:`\sum_t n_t (\mu_{s,t} - \mu_t)` in eV, by the types of the atoms in the mixture."""
        if not (self.are_made and self.are_needed):
            return 0.0
        return float(self._of_types[set_index].index_select(0, atom_types).sum())

    def of_elements(self, set_index: int, atomic_numbers: NDArray[np.integer[Any]]) -> float:
        """Likewise, by atomic numbers."""
        if not (self.are_made and self.are_needed):
            return 0.0
        return float(self._of_elements[set_index, atomic_numbers].sum())

    def of_frames(self, set_index: int, frames: FrameSet) -> Array:
        """Likewise for each of many frames of a set, ``[num_frames]``."""
        if not (self.are_made and self.are_needed) or not len(frames):
            return np.zeros(len(frames))
        compositions = frames.compositions()
        of_entries = compositions.counts * self._of_elements[set_index, compositions.numbers]
        return np.add.reduceat(of_entries, compositions.offsets[:-1])  # type: ignore[no-any-return]


def mixture_statistics(
    modules: Mapping[str, AtomsDataModule],
    type_names: Sequence[str],
    references: References,
    passes: Sequence[float],
) -> MixtureStatistics:
    r"""Statistics of the training frames of several sets.

    With :math:`c_s` times that a frame of set :math:`s` comes in an epoch,

    .. math:: F_\mathrm{rms}^2 = \frac{\sum_s c_s \sum_{i \in s} F_i^2}{\sum_s c_s N^F_s}, \qquad
              \bar\nu = \frac{\sum_s c_s N_s \bar\nu_s}{\sum_s c_s N_s}

    with :math:`N^F_s` labelled force components, :math:`N_s` atoms and :math:`\bar\nu_s` mean neighbours of a set.

    Args:
        modules: set up, by the name of the set.
        type_names: chemical symbols in the order of the type indices.
        references: as they were asked for.
        passes: :math:`c_s`.

    Raises:
        KeyError: references that lack an element.
        ValueError: two energies of an isolated atom, where references are common.
    """
    names, types = tuple(modules), tuple(type_names)
    own = {name: module.statistics for name, module in modules.items()}
    present = {name: _present(module, types) for name, module in modules.items()}
    isolated = _isolated(own, references)
    sets = [module.train_set.frames for module in modules.values()]
    fitted = _fitted(sets, types, isolated if references.are_common else None)
    level, levels = torch.from_numpy(fitted.energies).clone(), {}
    origins: dict[str, str] = {}
    directions: dict[str, tuple[Array, list[float], tuple[str, ...]]] = {}
    values: dict[str, dict[str, float]] = {}
    if references.are_common:
        origins[_ALL] = "of isolated atoms, and by least squares" if isolated else "by least squares"
        directions[_ALL] = (fitted.undetermined, level.tolist(), types)
        of_types = dict(zip(types, level.tolist(), strict=True))
        values = {name: {each: of_types[each] for each in present[name]} for name in names}
    else:
        for name, statistics in own.items():
            given = references.of_sets[name]
            values[name], origins[name] = _of_set(name, given, statistics, present[name])
            if given == "fit" and statistics.undetermined is not None:
                fit = statistics.energy_shifts.tolist()
                directions[name] = (np.asarray(statistics.undetermined), fit, tuple(statistics.type_names))
        for index, each in enumerate(types):
            first = next((name for name in names if each in present[name]), None)
            if first is not None:
                level[index], levels[each] = values[first][each], first
        if references.to is not None:
            to = _resolved("data.references", references.to, _Named(types, own[names[0]].energy_key))
            level, levels = torch.tensor(to, dtype=torch.float64), {}
    forces = np.array([frames.force_squares() for frames in sets])  # [num_sets, 2]
    squares, components = np.asarray(passes) @ forces
    atoms = np.array([drawn * own[name].num_atoms for drawn, name in zip(passes, names, strict=True)])
    neighbors = np.array([own[name].mean_neighbors for name in names])
    lacking = set.intersection(*(set(each.hints) for each in own.values()))
    return MixtureStatistics(
        type_names=types,
        energy_shifts=level,
        force_rms=float(np.sqrt(squares / components)) if components else float("nan"),
        mean_neighbors=float((atoms * neighbors).sum() / atoms.sum()),
        num_frames=sum(each.num_frames for each in own.values()),
        num_atoms=sum(each.num_atoms for each in own.values()),
        undetermined=torch.from_numpy(fitted.undetermined),
        isolated_atoms=isolated,
        energy_key=own[names[0]].energy_key,
        hints={label: " ".join(f"{name}: {own[name].hints[label]}" for name in names) for label in sorted(lacking)},
        set_references=values,
        levels=levels,
        origins=origins,
        open_directions=directions,
    )


@dataclass(frozen=True)
class _Named:
    """Types and the name of the energies, which a file of isolated atoms is read with."""

    type_names: Sequence[str]
    energy_key: str
    force_rms: float = float("nan")

    @property
    def energy_shifts(self) -> Tensor:
        raise AttributeError("references that are given are not fitted")


def _resolved(argument: str, given: Given, statistics: Any) -> list[float]:
    try:
        return resolve_shifts(given, statistics)
    except (KeyError, FileNotFoundError) as error:
        text = str(error.args[0]).replace("energy_shifts", argument)
        raise type(error)(text) from error


def _of_set(
    name: str, given: Given, statistics: DataStatistics, present: Sequence[str]
) -> tuple[dict[str, float], str]:
    """References of a set by type, and how they were found."""
    if given != "fit":
        found = _resolved(f"data.sets.{name}.references", given, _Named(present, statistics.energy_key))
        return dict(zip(present, found, strict=True)), "as given"
    of_types = dict(zip(statistics.type_names, statistics.energy_shifts.tolist(), strict=True))
    values = {each: of_types[each] for each in present}
    fitted = [each for each in present if each not in statistics.isolated_atoms]
    if len(fitted) == len(present):
        return values, "by least squares"
    return values, "of isolated atoms" + (f", {', '.join(fitted)} by least squares" if fitted else "")


def _present(module: AtomsDataModule, type_names: Sequence[str]) -> tuple[str, ...]:
    """Types that frames of a set have, in the order of the type indices."""
    symbols = set().union(*(each.frames.symbols() for each in (module.train_set, *module.val_sets, *module.test_sets)))
    return tuple(name for name in type_names if name in symbols)


def _isolated(own: Mapping[str, DataStatistics], references: References) -> dict[str, float]:
    """Energies of isolated atoms that are references of the mixture.

    Raises:
        ValueError: two sets have different ones, and references are common.
    """
    found: dict[str, float] = {}
    origin: dict[str, str] = {}
    for name, statistics in own.items():
        for symbol, energy in statistics.isolated_atoms.items():
            if symbol not in found:
                found[symbol], origin[symbol] = energy, name
            elif references.are_common and abs(found[symbol] - energy) > 1e-6:
                raise ValueError(
                    f"the isolated atom {symbol} has {found[symbol]} eV in {origin[symbol]} and {energy} eV in {name}, "
                    f"and data.references=common; expected one energy. Use data.references=own, with which each set "
                    f"has references of its own"
                )
    return found


def _fitted(sets: Sequence[FrameSet], type_names: Sequence[str], fixed: Mapping[str, float] | None) -> FittedReferences:
    """Fit to the energies of all sets."""
    sums = EnergySums.empty(len(type_names))
    for frames in sets:
        sums += frames.energy_sums(type_names)
    rows = None
    if sum(map(len, sets)) * len(type_names) <= _DENSE_NUMBERS:
        columns = zip(*(frames.energy_rows(type_names) for frames in sets), strict=True)
        rows = tuple(np.concatenate(column) for column in columns)
    return fit_references(sums, type_names, fixed, rows)  # type: ignore[arg-type]


def _listed(energies: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {energy:.4f}" for name, energy in energies.items())
