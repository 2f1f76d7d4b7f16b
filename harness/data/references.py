r"""Reference energies of the elements by least squares, and which of them the training energies determine.

A fit of one energy for each element to the energies of frames is determined as far as their compositions differ. Frames
of one composition fix one number, however many elements they have; an element without frames is not fixed at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

if TYPE_CHECKING:  # sets of frames have sums of this module
    from harness.data.frames import FrameSet

__all__ = [
    "EnergySums",
    "References",
    "fit_references",
    "neutral_atom_energies",
    "outside_text",
    "refitted_text",
    "undetermined_text",
]

Array = NDArray[np.float64]

_CHUNK = 65_536  # frames whose compositions are made dense at once

_NULL = 1e-12
"""Eigenvalues up to this are zero, of the matrix scaled to a unit diagonal: float64 is exact to 1e-14 for 100 types,
and one frame of 100 atoms that has one atom exchanged, among 10⁵ others, gives 8e-9."""
_OUTSIDE = 1e-8
"""Part of a composition's length along undetermined directions from which on it is outside of the span."""
_RELATIVE_TO_ATOMS = 20.0
"""Mean energies per atom below this, in eV, are relative to atoms of some kind, and above it of all electrons."""


@dataclass(frozen=True, eq=False)
class EnergySums:
    r"""Sums over labelled frames from which reference energies follow; those of two sets of frames add up.

    Attributes:
        products: :math:`\sum_g n_{gs} n_{gt}` of the numbers of atoms, ``[num_types, num_types]``; exact integers.
        energies: :math:`\sum_g n_{gt} E_g` in eV, ``[num_types]``.
        num_frames: number of labelled frames.
    """

    products: Array
    energies: Array
    num_frames: int

    @classmethod
    def of(cls, counts: Array, energies: Array) -> EnergySums:
        """Sums of frames with numbers of atoms ``[num_frames, num_types]`` and energies ``[num_frames]`` in eV."""
        return cls(counts.T @ counts, counts.T @ energies, len(energies))

    @classmethod
    def empty(cls, num_types: int) -> EnergySums:
        """Sums of no frames."""
        return cls(np.zeros((num_types, num_types)), np.zeros(num_types), 0)

    def __add__(self, other: EnergySums) -> EnergySums:
        """Sums of both sets of frames."""
        return EnergySums(
            self.products + other.products, self.energies + other.energies, self.num_frames + other.num_frames
        )


@dataclass(frozen=True, eq=False)
class References:
    """Reference energies of the types, and directions in which the energies leave them open.

    Attributes:
        energies: in eV, ``[num_types]``.
        undetermined: orthonormal columns ``[num_types, num_undetermined]``: along them the references can be changed
            without a change of any fitted energy. A type without labelled frames has a column of its own.
    """

    energies: Array
    undetermined: Array


def neutral_atom_energies(type_names: Sequence[str]) -> Array:
    r"""Total energies in eV of neutral atoms with all electrons, ``[num_types]``, from the statistical theory.

    .. math:: E(Z) = -\left(0.7687\, Z^{7/3} - \tfrac12 Z^2 + 0.2699\, Z^{5/3}\right) \cdot 27.2114\ \mathrm{eV},

    within 8 % of Hartree-Fock for hydrogen and 1 % from carbon on.

    Reference:
        J. Schwinger, Phys. Rev. A 24, 2353 (1981).
    """
    charges = np.array([float(atomic_numbers[name]) for name in type_names])
    return -27.211386 * (0.7687 * charges ** (7 / 3) - 0.5 * charges**2 + 0.2699 * charges ** (5 / 3))


def fit_references(
    sums: EnergySums,
    type_names: Sequence[str],
    fixed: Mapping[str, float] | None = None,
    rows: tuple[Array, Array] | None = None,
    prior: Mapping[str, float] | None = None,
) -> References:
    r"""Reference energies :math:`\mu_t` that minimise :math:`\sum_g \big(E_g - \sum_t n_{gt}\, \mu_t\big)^2`.

    Those of ``fixed`` are held. Of the others, directions that the compositions leave open (eigenvalues of
    :math:`\sum_g n_g n_g^T`, scaled to a unit diagonal, up to 1e-12) are chosen by the least relative change,
    :math:`\sum_t (\mu_t / \mu^0_t - 1)^2`, from a guess :math:`\mu^0`:

    * energies that ``prior`` leaves less than 20 eV per atom of have references of its kind, and it is the guess;
    * mean energies per atom of less than 20 eV are relative to atoms: all elements get the mean energy;
    * others are of electrons, and grow steeply with the nuclear charge: :math:`\mu^0_t = f E(Z_t)` with
      :func:`neutral_atom_energies` and the one factor :math:`f` that fits best.

    The solution of least norm would give each element a share in proportion to its number of atoms: -808 eV to the
    hydrogen of acetylacetone, where an atom has -13.6 eV. The guess gives -14.8 eV.

    Args:
        sums: of the labelled frames.
        type_names: chemical symbols in the order of the types.
        fixed: energies in eV by symbol that are known, as of isolated atoms.
        rows: numbers of atoms ``[num_frames, num_types]`` and energies ``[num_frames]`` of the frames. With them a
            determined fit is made by a singular value decomposition, whose error does not grow as the square of the
            matrix's condition.
        prior: energies in eV of all types by symbol that references are near to, such as those of a model before.
    """
    num_types = len(type_names)
    energies = np.array([float((fixed or {}).get(name, np.nan)) for name in type_names])
    held = ~np.isnan(energies)
    free = np.flatnonzero(~held)
    undetermined = np.zeros((num_types, 0))
    if not len(free):
        return References(energies, undetermined)
    products = sums.products[np.ix_(free, free)]
    right = sums.energies[free] - sums.products[np.ix_(free, np.flatnonzero(held))] @ energies[held]
    free_names = [type_names[index] for index in free.tolist()]
    before = None if prior is None else np.array([float(prior[name]) for name in free_names])
    guess = _guess(products, right, neutral_atom_energies(free_names), before)
    energies[free] = guess

    present = np.flatnonzero(products.diagonal() > 0)
    absent = np.flatnonzero(products.diagonal() == 0)
    null = np.zeros((len(free), 0))
    if len(present):
        scale = 1 / np.sqrt(products.diagonal()[present])
        values, vectors = np.linalg.eigh(products[np.ix_(present, present)] * np.outer(scale, scale))
        open_ones = values <= _NULL
        if rows is not None and not open_ones.any():
            counts, total = rows
            known = total - counts[:, held] @ energies[held]
            solution = np.linalg.lstsq(counts[:, free[present]], known, rcond=None)[0]
            energies[free[present]] = solution
        else:
            rest = (right - products @ guess)[present]
            kept = vectors[:, ~open_ones] * scale[:, None]
            change = kept @ ((kept.T @ rest) / values[~open_ones])
            if open_ones.any():
                basis = np.linalg.qr(vectors[:, open_ones] * scale[:, None])[0]
                weights = 1 / np.maximum(np.abs(guess[present]), 1.0)
                change -= basis @ np.linalg.lstsq(basis * weights[:, None], change * weights, rcond=None)[0]
                null = np.zeros((len(free), basis.shape[1]))
                null[present] = basis
            energies[free[present]] = (guess[present]) + change
    undetermined = np.zeros((num_types, null.shape[1] + len(absent)))
    undetermined[free, : null.shape[1]] = null
    undetermined[free[absent], null.shape[1] + np.arange(len(absent))] = 1.0
    return References(energies, undetermined)


def _guess(products: Array, right: Array, atoms: Array, prior: Array | None = None) -> Array:
    """Energies of the types that are plausible by themselves: ``prior`` if it is, and zeros without any energy."""
    ones = np.ones_like(atoms)
    num_atoms = float(ones @ products @ ones)
    if prior is not None and (not num_atoms or abs(ones @ (right - products @ prior)) < _RELATIVE_TO_ATOMS * num_atoms):
        return prior
    if not num_atoms:
        return np.zeros_like(atoms)
    mean = float(ones @ right) / num_atoms
    factor = float(atoms @ right) / float(atoms @ products @ atoms)
    return factor * atoms if abs(mean) >= _RELATIVE_TO_ATOMS and factor > 0 else mean * ones


def outside_of(counts: Array, undetermined: Array) -> NDArray[np.bool_]:
    """True for compositions ``[num_frames, num_types]`` whose energy changes along an undetermined direction."""
    found: NDArray[np.bool_] = np.linalg.norm(counts @ undetermined, axis=1) > _OUTSIDE * np.linalg.norm(counts, axis=1)
    return found


def _loose(undetermined: Array, type_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Types that are determined in sums with others only, and those that no labelled frame has."""
    parts = (undetermined**2).sum(axis=1)
    entangled = [name for name, part in zip(type_names, parts, strict=True) if 1e-9 < part < 1 - 1e-9]
    return entangled, [name for name, part in zip(type_names, parts, strict=True) if part >= 1 - 1e-9]


SETTING = "model.energy_shifts"
"""Setting of the reference energies of this package's models: ``fit``, numbers, or a file of isolated atoms."""


def _remedy(names: Sequence[str], setting: str | None) -> str:
    wanted = ", ".join(f"{name}: eV" for name in names)
    ways = ["as frames with config_type=IsolatedAtom in data.train"]
    if setting == SETTING:
        ways.append(f"as a file of them ({setting}=FILE)")
    ways.append(
        "or as references of the model itself, for which its section of the config has no setting"
        if setting is None
        else f"or as numbers for all types ({setting}={{{wanted}, ...}})"
    )
    return f"Give the energies of isolated atoms: {', '.join(ways)}"


def undetermined_text(
    undetermined: Array, energies: Sequence[float], type_names: Sequence[str], setting: str | None = SETTING
) -> str:
    """Sentences on references that training energies leave open, with what was chosen; no text if there are none.

    Args:
        undetermined: ``[num_types, num_undetermined]``, see :class:`References`.
        energies: references in eV in the order of the types.
        type_names: chemical symbols in that order.
        setting: that the model takes reference energies by; None if it has no such setting.
    """
    entangled, absent = _loose(undetermined, type_names)
    if not entangled and not absent:
        return ""
    chosen = dict(zip(type_names, energies, strict=True))
    reasons = []
    if entangled:
        fixed = len(entangled) - (undetermined.shape[1] - len(absent))
        reasons.append(
            f"the compositions of the training frames fix {fixed} of {len(entangled)} combinations of "
            f"{', '.join(entangled)}"
        )
    if absent:
        reasons.append(f"no training frame with an energy has {', '.join(absent)}")
    names = [*entangled, *absent]
    return (
        f"the training energies do not determine the reference energies of {', '.join(names)} (energy_shifts=fit): "
        f"{'; '.join(reasons)}. Chosen are {', '.join(f'{name} {chosen[name]:.4f}' for name in names)} eV, the nearest "
        f"to a rough guess; energies of frames of other compositions will be off. {_remedy(names, setting)}."
    )


def refitted_text(undetermined: Array, type_names: Sequence[str], present: Sequence[str], origin: str) -> str:
    """Sentence on references that a refit leaves open, with the rank of the fit; no text if there are none.

    Args:
        undetermined: ``[num_types, num_undetermined]``, see :class:`References`.
        type_names: chemical symbols in the order of the types.
        present: those that the frames of the fit have.
        origin: what the references stay as near to as the fit allows, in words.
    """
    entangled = [name for name in _loose(undetermined, type_names)[0] if name in present]
    if not entangled:
        return ""
    absent = len(type_names) - len(present)
    return (
        f"the fit of {len(present)} references has rank {len(present) - (undetermined.shape[1] - absent)}: the "
        f"compositions of the frames do not determine those of {', '.join(entangled)} one by one. Of all that fit "
        f"equally well, those nearest to {origin} were taken (least relative change); energies of other compositions "
        f"depend on it"
    )


def outside_text(
    name: str,
    frames: FrameSet,
    undetermined: Array,
    type_names: Sequence[str],
    setting: str | None = SETTING,
    fitted: bool = True,
) -> str:
    """Sentences on frames of a set whose energies the training energies say nothing of; no text if there are none.

    Args:
        name: of the set, such as ``test set 0``.
        frames: of the set; those without an energy are not looked at.
        undetermined: ``[num_types, num_undetermined]``, see :class:`References`.
        type_names: chemical symbols in the order of the types.
        setting: that the model takes reference energies by; None if it has no such setting.
        fitted: whether the references are fitted to this training's frames, and not to those of a checkpoint.
    """
    if not undetermined.shape[1]:
        return ""
    frames_of_fit, in_none, origin, remedy = (
        ("the training frames", "in no training frame", "energy_shifts=fit", "Train on such frames")
        if fitted
        else (
            "the frames of the checkpoint's training",
            "in no frame of the checkpoint's training",
            "of the checkpoint",
            f"Fit the references to frames of this training ({setting or SETTING}=fit)",
        )
    )
    labelled, concerned, contained = frames.labelled("energy"), [], np.zeros(len(type_names))
    for part, of_part in frames.compositions().chunks(labelled, _CHUNK):
        counts = of_part.dense(type_names)
        outside = outside_of(counts, undetermined)
        concerned.append(part[outside])
        contained += counts[outside].sum(axis=0)
    outside_frames = np.concatenate(concerned) if concerned else labelled
    if not len(outside_frames):
        return ""
    entangled, absent = _loose(undetermined, type_names)
    present = {name for name, number in zip(type_names, contained, strict=True) if number}
    reasons = []
    if present & set(entangled):
        found = [each for each in entangled if each in present]
        reasons.append(f"{', '.join(found)} in other proportions than in {frames_of_fit}")
    if present & set(absent):
        found = [each for each in absent if each in present]
        reasons.append(f"{', '.join(found)} {in_none} with an energy")
    first = frames[int(outside_frames[0])]
    return (
        f"{name}: the energies of {len(outside_frames)} of {len(labelled)} frames have an arbitrary reference "
        f"({origin}), and errors of them mean nothing: {'; '.join(reasons)}. The first is {first.location}, "
        f"{first.atoms.get_chemical_formula()}; forces and stresses are not concerned. {remedy}, or give the "
        f"energies of isolated atoms (in data.train with config_type=IsolatedAtom"
        f"{f', or by {setting}' if setting else ''})."
    )
