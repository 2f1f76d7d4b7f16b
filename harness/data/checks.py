"""Checks of frames that give themselves away: atoms on top of each other, and numbers in other units.

Everything is a function of the frames of one file alone, hence the same on every rank. What costs more than a look at
each number is done for frames at equal distances in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import NDArray

from harness.data.facts import MISSING, WHOLE
from harness.data.frames import FrameSet, as_frame_set
from harness.data.neighbors import neighbor_list
from harness.data.reading import Frame

__all__ = ["check_distances", "check_magnitudes", "check_units", "check_work"]

Array = NDArray[np.float64]

# CODATA 2018, https://physics.nist.gov/constants: how many of each make one eV, one Å, one eV/Å³
_ENERGIES = {"kcal/mol": 23.060548, "kJ/mol": 96.485332, "meV": 1000.0, "Hartree": 1 / 27.211386, "Ry": 1 / 13.605693}
_LENGTHS = {"Bohr": 1 / 0.52917721, "nm": 0.1}
_PRESSURES = {
    "GPa": 160.21766,
    "kbar": 1602.1766,
    "Hartree/Bohr³": 0.52917721**3 / 27.211386,
    "Ry/Bohr³": 0.52917721**3 / 13.605693,
}

_LARGEST_FORCE = 1e4  # eV/Å: two protons at 0.04 Å from each other
_LARGEST_STRESS = 10.0  # eV/Å³: 1600 GPa, more than static experiments have reached
_NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)
_DENSE_ATOMS = 64  # up to which all pairs of atoms are looked at, of many frames at once
# of the sum of two covalent radii; the closest atoms of molecules and solids lie between 0.7 and 1.15 of it
_SHORT, _LONG, _LONG_IN_ANY = 0.35, 1.45, 1.25
_LENGTH_FRAMES = 64
_PAIR_FRAMES = 200  # frames of a composition that are compared with each other
_PAIR_COMPOSITIONS = 5
_CLOSEST_PAIRS = 50
_FEWEST_PAIRS = 10
_AGREEMENT = 0.6  # share of the work whose pairs have to give the common factor to a quarter
_TOLERANCE = math.log(1.15)  # of a factor
_FEWEST_FRAMES = 6  # of a regression
_RELATIVE_ERROR = 0.2  # standard error of a slope that is relied upon: five of them from zero
_CORRELATION = 0.5  # of the two sides of it, at least
_FAR_FROM_ONE = 0.1  # slopes that are below this by five standard errors are not 1, whatever they are


def check_units(frames: Sequence[Frame]) -> None:
    """Refuse a file whose lengths, energies, forces or stresses are recognisably in other units than Å and eV.

    Distances are compared with covalent radii, see :func:`check_lengths`; forces and stresses with what is possible at
    all, see :func:`check_magnitudes`; and energies with the work of forces and stresses, see :func:`check_work`.

    Raises:
        ValueError: with the unit that the numbers seem to be in.
    """
    check_lengths(frames)
    check_magnitudes(frames)
    check_work(frames)


def check_distances(frames: Sequence[Frame], min_distance: float) -> None:
    """Refuse frames with two atoms, or an atom and a periodic image, closer than ``min_distance`` in Å.

    Raises:
        ValueError: with the frame, the atoms and their distance.
    """
    sizes: dict[int, list[Frame]] = {}
    for frame in frames:
        sizes.setdefault(len(frame.atoms), []).append(frame)
    suspicious: list[Frame] = []
    for num_atoms, members in sizes.items():
        if num_atoms > _DENSE_ATOMS:
            suspicious += members
            continue
        step = max(1, 50_000 // num_atoms**2)
        for start in range(0, len(members), step):
            suspicious += _may_be_closer(members[start : start + step], min_distance)
    for frame in sorted(suspicious, key=lambda frame: frame.index):
        atoms = frame.atoms
        # A search for neighbours sorts atoms into boxes of the cutoff's size: very small ones would be very many.
        pairs, shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, max(min_distance, 1.0))
        lengths = _lengths(frame, pairs, shifts)
        if not len(lengths) or lengths.min() >= min_distance:
            continue
        first, second = pairs[:, int(lengths.argmin())].tolist()
        symbols = atoms.get_chemical_symbols()
        raise ValueError(
            f"{frame.location}: atoms {first} ({symbols[first]}) and {second} ({symbols[second]}) are "
            f"{lengths.min():.3g} Å apart, closer than data.min_distance={min_distance:g} Å; expected one atom at a "
            f"place. Remove the duplicate atom, or check the units of positions and cell (Å) and pbc; "
            f"data.min_distance=null switches this check off"
        )


def _may_be_closer(frames: list[Frame], min_distance: float) -> list[Frame]:
    """Frames, all of one size, for which the nearest images alone do not rule out a closer pair."""
    positions = np.array([frame.atoms.positions for frame in frames])
    periodic = np.array([frame.atoms.pbc for frame in frames])
    cells = np.array(
        [(frame.atoms.cell if frame.atoms.pbc.all() else frame.atoms.cell.complete()).array for frame in frames]
    )
    inverse = np.linalg.inv(cells)
    heights = 1 / np.linalg.norm(inverse, axis=1)  # of the cell over each of its faces
    flat = (periodic & (heights < 4 * min_distance)).any(axis=1)
    steps = positions[:, :, None] - positions[:, None]
    fractional = steps @ inverse[:, None]
    steps -= (np.round(fractional) * periodic[:, None, None]) @ cells[:, None]
    squares = (steps**2).sum(axis=-1)
    diagonal = np.arange(squares.shape[1])
    squares[:, diagonal, diagonal] = np.inf
    close = squares.min(axis=(1, 2)) < min_distance**2
    return [frame for frame, suspicious in zip(frames, flat | close, strict=True) if suspicious]


def check_lengths(frames: Sequence[Frame]) -> None:
    r"""Refuse positions in other units than Å: nearest neighbours far from the sum of their covalent radii.

    Of up to 64 frames, :math:`\min_j d_{ij} / (R_i + R_j)` of the atoms. Positions are refused if it is below 0.35 for
    the median atom of the median frame (nm, fractional coordinates), or if the closest atoms of the median frame are at
    more than 1.45 and those of no frame at less than 1.25 (Bohr, pm). Frames of one atom, of noble gases and of
    hydrogen alone say nothing here.

    Raises:
        ValueError: with the ratio and the likely unit.

    Reference:
        Radii of B. Cordero et al., Dalton Trans. 2832 (2008), as in ``ase.data``.
    """
    telling = [frame for frame in _spread(frames, _LENGTH_FRAMES) if _has_bonds(frame)]
    if not telling:
        return
    nearest = []
    for frame in telling:
        radii = covalent_radii[frame.atoms.numbers]
        atoms = frame.atoms
        pairs, shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 2 * _SHORT * radii.max())
        nearest.append(float(np.median(_nearest(frame, pairs, shifts))))
    short = float(np.median(nearest))
    if short < _SHORT:
        raise ValueError(
            f"{frames[0].origin}: atoms are at {short:.2g} times the sum of the covalent radii from their nearest "
            f"neighbours in the median of {len(telling)} frames; expected 0.7 to 1.2. Are the positions in nm, or "
            f"fractional? Convert positions and cell to Å in the file. {_SWITCH}"
        )
    closest = []
    for frame in telling:
        radii = covalent_radii[frame.atoms.numbers]
        atoms = frame.atoms
        pairs, shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 4 * _LONG * radii.max())
        closest.append(float(_nearest(frame, pairs, shifts).min()))
        if closest[-1] < _LONG_IN_ANY:
            return
    typical = float(np.median(closest))
    if typical < _LONG:
        return
    found = f"at {typical:.3g} times" if typical < math.inf else f"farther apart than {2 * _LONG:g} times"
    raise ValueError(
        f"{frames[0].origin}: even the closest atoms of a frame are {found} the sum of their covalent radii (median of "
        f"{len(telling)} frames); expected 0.7 to 1.2. Are the positions in {'Bohr' if typical < 2.5 else 'pm'}? "
        f"Convert positions and cell to Å in the file. {_SWITCH}"
    )


def check_magnitudes(frames: Sequence[Frame]) -> None:
    """Refuse forces above 10⁴ eV/Å and stresses above 10 eV/Å³ (1600 GPa), which no units but others explain.

    Raises:
        ValueError: with the frame, the number and the likely units.
    """
    for frame in frames:
        if frame.forces is not None:
            largest = float(np.nanmax(np.abs(frame.forces)))
            if largest > _LARGEST_FORCE:
                raise ValueError(
                    f"{frame.location}: a force component of {largest:.4g} eV/Å; expected less than "
                    f"{_LARGEST_FORCE:g}. Are the forces in meV/Å or kJ/mol/nm, or is the frame not converged? Convert "
                    f"the forces to eV/Å in the file, or remove the frame. {_SWITCH}"
                )
        if frame.stress is not None:
            largest = float(np.abs(frame.stress).max())
            if largest > _LARGEST_STRESS:
                raise ValueError(
                    f"{frame.location}: a stress component of {largest:.4g} eV/Å³, {largest * 160.21766:.4g} GPa; "
                    f"expected less than {_LARGEST_STRESS:g} eV/Å³. Is the stress in kbar or GPa (1 eV/Å³ = 160.2 GPa "
                    f"= 1602 kbar), or is it a virial (data.keys.virial)? Convert it to eV/Å³ in the file. {_SWITCH}"
                )


def check_work(frames: Sequence[Frame]) -> None:
    r"""Refuse energies that do not fit the work of the forces and stresses, where the factor is that of another unit.

    For two frames a, b of the same atoms in the same order, close to each other,

    .. math:: \Delta E \approx -\tfrac12 (F_a + F_b) \cdot \Delta r + \tfrac12 (V_a \sigma_a + V_b \sigma_b) :
              \varepsilon

    with the displacements :math:`\Delta r` by the nearest image, or after the best rotation of a molecule, and the
    strain :math:`\varepsilon` between the cells. The factor between the two sides is the median over the 50 closest
    pairs, weighted by the work. It has to be that of another unit to 15 %, and 60 % of the work has to agree with it to
    a quarter; otherwise nothing is concluded. Labels that are all in the same other unit cannot be told by this.

    Raises:
        ValueError: with the factor and the units that explain it.

    Reference:
        Rotations by W. Kabsch, Acta Cryst. A32, 922 (1976).
    """
    pairs = _Pairs.of(frames)
    by_forces = np.abs(pairs.stress_work) <= 0.1 * np.abs(pairs.force_work)
    factor = _factor(pairs, by_forces, pairs.force_work)
    if factor is not None:
        likely = _explained(
            factor, {**_force_factors(_has_bonds(frames[0])), **_per_atom(pairs, by_forces)}, _GRADIENTS
        )
        if likely:
            raise ValueError(
                f"{frames[0].origin}: energy differences of neighbouring frames (such as {pairs.example(by_forces)}) "
                f"are {factor:.4g} times the work of the forces; expected 1. {likely} Convert the file to eV and eV/Å. "
                f"{_SWITCH}"
            )
    by_stress = np.abs(pairs.force_work) <= 0.1 * np.abs(pairs.stress_work)
    factor = _factor(pairs, by_stress, pairs.stress_work)
    if factor is not None:
        likely = _explained(factor, _stress_factors(pairs, by_stress), _COMPRESSION)
        if likely:
            raise ValueError(
                f"{frames[0].origin}: energy differences of neighbouring frames (such as {pairs.example(by_stress)}) "
                f"are {factor:.4g} times the work of the stresses, volume · stress : strain; expected 1. {likely} "
                f"Convert the file to eV/Å³, positive for tension. {_SWITCH}"
            )
    slope, error, correlation, chosen = stress_slope(pairs)
    likely = ""
    if error <= _RELATIVE_ERROR * abs(slope) and correlation >= _CORRELATION:
        likely = _explained(slope, _stress_factors(pairs, chosen), _COMPRESSION, math.log(2))
    elif abs(slope) + 5 * error < _FAR_FROM_ONE:
        units = [name for name, factor in _stress_factors(pairs, chosen).items() if factor < abs(slope) + 5 * error]
        likely = f"It seems that {' or '.join(units)}." if units else ""
    if likely:
        raise ValueError(
            f"{frames[0].origin}: energy differences of {int(chosen.sum())} pairs of frames (such as "
            f"{pairs.example(chosen)}), less the work of the forces, are {slope:.3g} ± {error:.1g} times the work of "
            f"the stresses, volume · stress : strain; expected 1. {likely} Convert the file to eV/Å³, positive for "
            f"tension. {_SWITCH}"
        )


def stress_slope(pairs: _Pairs) -> tuple[float, float, float, NDArray[np.bool_]]:
    r"""Slope of energy differences, less the work of the forces, against the work of the stresses; 1 in these units.

    Over all pairs of frames with different cells, with the distance :math:`d` between the frames of a pair,

    .. math:: s = \frac{\sum d^{-6} (\Delta E - W_F) W_\sigma}{\sum d^{-6} W_\sigma^2},

    since the error of either work by the trapezoidal rule grows as :math:`d^3`. Pairs share frames and are not
    independent: the standard error is that of the jackknife over frames.

    Returns:
        Slope, its standard error, weighted correlation of the two sides without its sign, and which pairs were used.
        Numbers are NaN and no pairs are used if there are fewer than 10 of them or 6 frames.

    Reference:
        Jackknife by B. Efron, C. Stein, Ann. Stat. 9, 586 (1981).
    """
    chosen = pairs.stress_work != 0
    frames = np.unique(pairs.indices[chosen])
    if chosen.sum() < _FEWEST_PAIRS or len(frames) < _FEWEST_FRAMES:
        return math.nan, math.nan, math.nan, np.zeros_like(chosen)
    energy, work = (pairs.energy - pairs.force_work)[chosen], pairs.stress_work[chosen]
    weights = (pairs.distance[chosen] / pairs.distance[chosen].min()) ** -6
    sums = np.stack((weights * energy * work, weights * work * work))
    of_frames = np.zeros((2, len(frames)))
    for column in pairs.indices[chosen].T:
        for row, values in zip(of_frames, sums, strict=True):
            np.add.at(row, np.searchsorted(frames, column), values)
    total = sums.sum(axis=1)
    left = total[:, None] - of_frames  # without the pairs of one frame each
    if not (left[1] > 1e-9 * total[1]).all():  # one frame alone has all of the work
        return math.nan, math.nan, math.nan, np.zeros_like(chosen)
    correlation = abs(total[0]) / math.sqrt(total[1] * max(float((weights * energy**2).sum()), 1e-300))
    slopes = left[0] / left[1]
    error = math.sqrt((len(frames) - 1) * float(np.var(slopes)))
    return float(total[0] / total[1]), error, correlation, chosen


_GRADIENTS = "the sign is the opposite one: gradients of the energy in the place of forces"
_COMPRESSION = "the sign is the opposite one: compression counted as positive, or a virial in the place of a stress"
_SWITCH = "If the file is right, data.check_units=false switches this check off"


@dataclass(frozen=True)
class _Pairs:
    """Pairs of similar frames: the difference of their energies and the work of the labels along the way, in eV.

    Attributes:
        energy: energy of the second frame minus that of the first.
        force_work: by the displacements inside of the cell.
        stress_work: by the strain of the cell.
        distance: how far the frames are from each other, in Å.
        num_atoms: number of atoms of either frame.
        volume: mean volume in Å³; 0 where a direction is not periodic.
        indices: numbers of the two frames in the file, ``[num_pairs, 2]``.
    """

    energy: Array
    force_work: Array
    stress_work: Array
    distance: Array
    num_atoms: Array
    volume: Array
    indices: NDArray[np.int64]

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> _Pairs:
        """Pairs among the frames of each of the most frequent lists of atoms."""
        known = as_frame_set(frames)
        has_both = (known.column("state_energy") != MISSING) & (known.column("state_forces") != MISSING)
        labelled = np.flatnonzero(has_both & (known.column("num_atoms") > 1))
        species = known.column("species")[labelled]
        _, firsts, numbers, counts = np.unique(species, return_index=True, return_inverse=True, return_counts=True)
        largest = np.lexsort((firsts, -counts))[:_PAIR_COMPOSITIONS]
        rows = [row for each in largest for row in _compared(_neighbouring(known, labelled[numbers == each]))]
        if not rows:
            nothing = np.zeros(0)
            return cls(nothing, nothing, nothing, nothing, nothing, nothing, np.zeros((0, 2), dtype=np.int64))
        energy, force_work, stress_work, distance, num_atoms, volume, indices = map(
            np.concatenate, zip(*rows, strict=True)
        )
        return cls(energy, force_work, stress_work, distance, num_atoms, volume, indices)

    def example(self, chosen: NDArray[np.bool_]) -> str:
        """Two frames that were compared, as text."""
        first, second = self.indices[chosen][int(self.distance[chosen].argmin())].tolist()
        return f"{first} and {second}"


def _neighbouring(frames: FrameSet, members: NDArray[np.int64]) -> list[Frame]:
    """Up to 200 frames in order, fewer of large systems: at equal distances, each with the next one of the file."""
    members = members[frames.column("state_forces")[members] == WHOLE]
    if not len(members):
        return []
    limit = min(_PAIR_FRAMES, max(20, math.isqrt(600_000 // int(frames.column("num_atoms")[members[0]]))))
    if len(members) > limit:
        starts = np.linspace(0, len(members) - 2, limit // 2).round().astype(int)
        members = members[np.unique(np.concatenate((starts, starts + 1)))]
    return [frames[int(index)] for index in members]


def _compared(members: list[Frame]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Columns of :class:`_Pairs`, of each frame with all later ones."""
    if len(members) < 2:
        return
    energies = np.array([frame.energy for frame in members])
    forces = np.array([frame.forces for frame in members])
    positions = np.array([frame.atoms.positions for frame in members])
    indices = np.array([frame.index for frame in members])
    periodic = members[0].atoms.pbc
    cells = np.array([frame.atoms.cell.complete().array for frame in members])
    volumes = np.abs(np.linalg.det(cells)) if periodic.all() else np.zeros(len(members))
    unknown = np.full((3, 3), np.nan)
    stresses = np.array([unknown if frame.stress is None else frame.stress for frame in members])
    fractional = positions @ np.linalg.inv(cells)
    centred = positions - positions.mean(axis=1, keepdims=True)
    for first in range(len(members) - 1):
        others = slice(first + 1, None)
        mean_forces = forces[others]
        strain = np.zeros((len(members) - first - 1, 3, 3))
        if periodic.any():
            strain = np.linalg.solve(cells[first], cells[others]) - np.eye(3)
            steps = fractional[others] - fractional[first]
            steps -= np.round(steps) * periodic
            moved = steps @ (0.5 * (cells[first] + cells[others]))
            moved -= moved.mean(axis=1, keepdims=True)
        else:
            rotations = _rotations(centred[others], centred[first])
            moved = centred[others] @ rotations - centred[first]
            mean_forces = mean_forces @ rotations
        mean_forces = 0.5 * (mean_forces + forces[first])
        mean_stress = 0.5 * (
            volumes[first] * stresses[first] + volumes[others, None, None] * stresses[others]
        )  # NaN without labels: such pairs need equal cells
        stretched = np.abs(strain).max(axis=(1, 2)) > 1e-7
        symmetric = 0.5 * (strain + strain.transpose(0, 2, 1))
        stress_work = np.where(stretched, (mean_stress * symmetric).sum(axis=(1, 2)), 0.0)
        spacing = np.cbrt(volumes[first] / len(members[first].atoms))
        distance = np.sqrt((moved**2).sum(axis=2).max(axis=1)) + spacing * np.sqrt((strain**2).sum(axis=(1, 2)))
        known = np.isfinite(stress_work) & (distance > 1e-3)  # the same frame again says nothing
        yield (
            (energies[others] - energies[first])[known],
            -(mean_forces * moved).sum(axis=(1, 2))[known],
            stress_work[known],
            distance[known],
            np.full(int(known.sum()), len(members[first].atoms), dtype=np.float64),
            0.5 * (volumes[first] + volumes[others])[known],
            np.stack((np.full(int(known.sum()), indices[first]), indices[others][known]), axis=1),
        )


def _rotations(moving: Array, fixed: Array) -> Array:
    """Matrices R ``[num, 3, 3]`` for which ``moving @ R`` comes closest to ``fixed``, both centred at the origin."""
    left, _, right = np.linalg.svd(np.einsum("pni,nj->pij", moving, fixed))
    handedness = np.ones((len(moving), 3))
    handedness[:, 2] = np.sign(np.linalg.det(left @ right))
    return (left * handedness[:, None, :]) @ right


def _factor(pairs: _Pairs, chosen: NDArray[np.bool_], work: Array, energy: Array | None = None) -> float | None:
    """Energy difference over work of the closest pairs, if they agree on it; None if there are too few."""
    energy = pairs.energy if energy is None else energy
    usable = np.flatnonzero(chosen & (work != 0))
    usable = usable[np.argsort(pairs.distance[usable], kind="stable")[:_CLOSEST_PAIRS]]
    if len(usable) < _FEWEST_PAIRS:
        return None
    ratios, weights = energy[usable] / work[usable], np.abs(work[usable])
    order = np.argsort(ratios, kind="stable")
    cumulated = np.cumsum(weights[order])
    median = float(ratios[order][np.searchsorted(cumulated, 0.5 * cumulated[-1])])
    if median == 0:
        return None
    agreeing = weights[np.abs(ratios / median - 1) < 0.25].sum() / cumulated[-1]
    return median if agreeing >= _AGREEMENT else None


def _explained(factor: float, known: Mapping[str, float], if_opposite: str, tolerance: float = _TOLERANCE) -> str:
    """Sentence with the units that explain a factor; empty if it is about 1 or no unit explains it."""
    off = {text: abs(math.log(abs(factor) / expected)) for text, expected in known.items()}
    likely = sorted((text for text in off if off[text] < tolerance), key=lambda text: off[text])[:3]
    about_one = abs(math.log(abs(factor))) < max(tolerance, math.log(1.35))
    reasons = [] if not likely or about_one else [" or ".join(likely)]
    if factor < 0 and (reasons or about_one):
        reasons.append(if_opposite)
    return f"It seems that {', and '.join(reasons)}." if reasons else ""


def _force_factors(lengths_are_known: bool) -> dict[str, float]:
    """Energy difference over work of the forces where one of them is in another unit.

    Positions in Bohr would be a factor of 0.53, which anharmonic forces of frames far from each other give as well:
    they are left to :func:`check_lengths` where it can judge.
    """
    factors = {f"the energies are in {unit}": per_ev for unit, per_ev in _ENERGIES.items()}
    for unit, per_ev in _ENERGIES.items():
        factors[f"the forces are in {unit}/Å"] = 1 / per_ev
    for unit, length in (("Hartree", "Bohr"), ("Ry", "Bohr"), ("kJ/mol", "nm")):
        factors[f"the forces are in {unit}/{length}"] = _LENGTHS[length] / _ENERGIES[unit]
    for length, per_angstrom in _LENGTHS.items():
        factors[f"the forces are per {length} (such as Hartree and Hartree/Bohr for energies and forces)"] = (
            per_angstrom
        )
        if not lengths_are_known or per_angstrom < 1:
            factors[f"the positions are in {length}"] = 1 / per_angstrom
    return factors


def _per_atom(pairs: _Pairs, chosen: NDArray[np.bool_]) -> dict[str, float]:
    """The factor of energies per atom, where that of the total energies is 1."""
    total = _factor(pairs, chosen, pairs.force_work, pairs.energy * pairs.num_atoms)
    if total is None or abs(math.log(abs(total))) > _TOLERANCE:
        return {}
    num_atoms = float(np.median(pairs.num_atoms[chosen]))
    return {"the energies are per atom, where those of whole frames are expected": abs(total) / num_atoms}


def _stress_factors(pairs: _Pairs, chosen: NDArray[np.bool_]) -> dict[str, float]:
    """Energy difference over work of the stresses where one of them is in another unit."""
    factors = {f"the stresses are in {unit}": 1 / per_unit for unit, per_unit in _PRESSURES.items()}
    factors |= {f"the energies are in {unit}": per_ev for unit, per_ev in _ENERGIES.items()}
    volume = float(np.median(pairs.volume[chosen]))
    return {**factors, "the stresses are virials, not divided by the volume (data.keys.virial)": 1 / volume}


def _spread(frames: Sequence[Frame], number: int) -> list[Frame]:
    """Up to ``number`` of the frames, at equal distances."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), number)).round().astype(int))
    return [frames[int(index)] for index in chosen]


def _has_bonds(frame: Frame) -> bool:
    """True where distances in the frame can be compared with covalent radii."""
    numbers = frame.atoms.numbers
    alone = len(numbers) == 1 and not frame.atoms.pbc.any()
    known = np.isin(numbers, np.arange(1, len(chemical_symbols))).all()
    return bool(known) and not alone and not np.isin(numbers, _NOBLE_GASES).any() and not (numbers == 1).all()


def _lengths(frame: Frame, pairs: NDArray[np.int64], shifts: Array) -> Array:
    positions = frame.atoms.positions
    moved: Array = positions[pairs[1]] - positions[pairs[0]] + shifts @ frame.atoms.cell.array
    return np.linalg.norm(moved, axis=1)


def _nearest(frame: Frame, pairs: NDArray[np.int64], shifts: Array) -> Array:
    """Distance of each atom to its nearest neighbour over the sum of their radii; infinite without one in ``pairs``."""
    radii = covalent_radii[frame.atoms.numbers]
    nearest = np.full(len(radii), np.inf)
    np.minimum.at(nearest, pairs[0], _lengths(frame, pairs, shifts) / (radii[pairs[0]] + radii[pairs[1]]))
    return nearest
