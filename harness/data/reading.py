"""Structures and their labels from any file that ASE reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

__all__ = [
    "Frame",
    "LabelKeys",
    "available_keys",
    "available_labels",
    "chemical_symbols",
    "file_fingerprint",
    "fingerprint_text",
    "frames_of",
    "has_key",
    "information",
    "read_frames",
    "structures_of",
    "suggested_keys",
]

# Results and information that are no labels; left out where the keys of a file are listed.
_NOT_LABELS = frozenset({"numbers", "positions", "key_value_pairs", "data", "unique_id"})


@dataclass(frozen=True)
class LabelKeys:
    """Names under which a file keeps its labels.

    A name is looked up in the results of the attached calculator, where ASE puts the names it knows (``energy``,
    ``forces``, ``stress`` …), then in ``atoms.arrays``, then in ``atoms.info``, including the key-value pairs and data
    of an ASE database.

    Attributes:
        energy: total energy in eV.
        forces: forces in eV/Å, ``[num_atoms, 3]``.
        stress: stress in eV/Å³, as ``[3, 3]``, 9 numbers, or 6 in Voigt order xx yy zz yz xz xy; tension is positive.
        virial: virial in eV in the same forms, read if there is no stress: stress = -virial / volume. Where its name is
            not the default and that of the stress is, it is the virial that was asked for, and it comes first.
    """

    energy: str = "energy"
    forces: str = "forces"
    stress: str = "stress"
    virial: str = "virial"

    @classmethod
    def from_mapping(cls, keys: LabelKeys | Mapping[str, str] | None) -> LabelKeys:
        """Keys from a mapping that names some of them; the others keep their defaults.

        Raises:
            KeyError: if the mapping names something that is not a label.
            TypeError: if it is no mapping, or a name is not a string.
        """
        if keys is None:
            return cls()
        if isinstance(keys, LabelKeys):
            return keys
        if not isinstance(keys, Mapping):
            raise TypeError(f"label keys must be a mapping such as {{'energy': 'dft_energy'}}, found {keys!r}")
        valid = [field.name for field in fields(cls)]
        unknown = [name for name in keys if name not in valid]
        if unknown:
            raise KeyError(f"unknown labels {unknown} among the label keys; valid are {valid}")
        for name, key in keys.items():
            if not isinstance(key, str):
                raise TypeError(f"the label key of {name!r} must be a string, found {key!r}")
        return cls(**keys)

    def changed(self) -> dict[str, str]:
        """Labels whose key is not the default, and the key."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    @property
    def virial_first(self) -> bool:
        """True where the virial was named and the stress was not."""
        return "virial" in self.changed() and "stress" not in self.changed()


@dataclass(frozen=True)
class Frame:
    """One structure, its labels, and its file and index. A missing label is None.

    Attributes:
        atoms: species, positions in Å, cell in Å and periodic boundary conditions.
        energy: total energy in eV.
        forces: ``[num_atoms, 3]`` in eV/Å; NaN where a component is unknown.
        stress: symmetric ``[3, 3]`` in eV/Å³, positive for tension.
        origin: the file, or a description.
        index: number of the frame in the file.
        stress_left_out: True if the file has a stress, which is no label since the frame has no volume.
        extras: further labels and inputs by the name of their field: ``[*shape]`` of a graph, ``[num_atoms, *shape]``
            of its atoms; float64 with NaN where a label is unknown, or int64.
        weights: in sums and counts, by the name of the field (``weight``, ``energy_weight``, ``forces_weight`` or
            ``stress_weight``), finite and at least 0; 1 where absent.
        group: that the frame belongs to, such as its ``config_type``; None without one.
    """

    atoms: Atoms
    energy: float | None = None
    forces: NDArray[np.float64] | None = None
    stress: NDArray[np.float64] | None = None
    origin: str = "memory"
    index: int = 0
    stress_left_out: bool = False
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    group: str | None = None

    @property
    def location(self) -> str:
        """File and index of the frame, for messages."""
        return f"{self.origin}, frame {self.index}"

    @property
    def is_labelled(self) -> bool:
        """True if the frame has any label."""
        return not (self.energy is None and self.forces is None and self.stress is None)


def read_frames(
    path: str | os.PathLike[str],
    keys: LabelKeys | Mapping[str, str] | None = None,
    require_labels: bool = True,
    require_keys: bool = True,
) -> list[Frame]:
    r"""All frames of a file with their labels: extended XYZ, an ASE database, a trajectory, or what else ASE reads.

    A stress label is taken as it is; without one, a virial label :math:`W` gives the stress :math:`-W / V`; the virial
    is the first to be looked for where ``keys`` has a name for it and none for the stress. The antisymmetric part of
    either, which no strain can predict, is dropped. NaN energies and stresses count as missing, and so does the stress
    of a frame that is not periodic in all three directions, which has no volume to refer to.

    Args:
        path: the file.
        keys: names of the labels in the file.
        require_labels: whether a frame without any label is an error.
        require_keys: whether a key other than the default that no frame has is an error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read or has no frames; if a frame has no atoms, a position or cell vector
            that is not finite, a periodic cell without volume, no label at all, or a label of the wrong shape or with
            infinite values; if a virial belongs to a frame without a volume; or if ``keys`` has names for both stress
            and virial, and a frame has both.
        KeyError: if ``keys`` names a label that no frame has.
    """
    names = LabelKeys.from_mapping(keys)
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(
            f"{file} is a folder, expected a file of structures. Stores are for trainings, by data=store, and are "
            f"built of files and folders by harness-data build"
        )
    if not file.is_file():
        raise FileNotFoundError(f"no file of structures at {file}; relative paths start at {Path.cwd()}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty; expected structures, such as extended XYZ. Was it copied completely?")
    try:
        structures = structures_of(file)
    except Exception as error:  # every format of ASE fails in its own way
        raise ValueError(
            f"ASE cannot read {file} as a file of structures ({type(error).__name__}: {error}); is it an extended XYZ, "
            "database or trajectory file, complete, and with the usual suffix?"
        ) from error
    if not structures:
        raise ValueError(f"{file} has no frames")

    for label, key in names.changed().items():
        if require_keys and not has_key(structures, key):
            available = available_keys(structures)
            raise KeyError(f"no frame of {file} has the {label} key {key!r}; the frames have {available}")

    return frames_of(structures, names, str(file), require_labels=require_labels)


def frames_of(
    structures: Sequence[Atoms], keys: LabelKeys, origin: str, first: int = 0, require_labels: bool = True
) -> list[Frame]:
    """Frames of structures that ASE has read from a file.

    Args:
        structures: in their order.
        keys: names of the labels.
        origin: the file, for messages.
        first: number of the first structure in the file.
        require_labels: whether a frame without any label is an error.

    Raises:
        ValueError: as :func:`read_frames`.
    """
    frames = [_frame(atoms, keys, origin, index) for index, atoms in enumerate(structures, first)]
    for frame in frames:
        if require_labels and not frame.is_labelled:
            under = available_labels([frame])
            sought = ", ".join(f"{label}={key}" for label, key in asdict(keys).items())
            raise ValueError(
                f"{frame.location}: no label under the keys {sought}; the frame has {', '.join(sorted(under))}. "
                f"{suggested_keys(under, keys)}Give the keys that the file uses, or remove the frame"
            )
    return frames


# Parts of names by which a label goes elsewhere; those of arrays are told from those of the whole frame by their shape.
_NAMES = {"energy": ("energy",), "forces": ("force",), "stress": ("stress",), "virial": ("virial",)}


def suggested_keys(available: Mapping[str, frozenset[str]], keys: LabelKeys, *labels: str) -> str:
    """Question whether a key of the frames is that of a label; no text where none looks like it.

    Args:
        available: names of the frames and the labels that they might be, as :func:`available_labels` gives them.
        keys: that the frames were read with.
        labels: that are wanted; energy, forces and stress if none is named.
    """
    wanted = list(labels or ("energy", "forces", "stress"))
    if "stress" in wanted:
        wanted.append("virial")
    found = [
        f"data.keys.{label}={key}"
        for label in wanted
        for key in sorted(available)
        if label in available[key] and key != getattr(keys, label)
    ]
    return f"Did you mean {' or '.join(found)}? " if found else ""


def _may_be(value: Any, label: str, num_atoms: int) -> bool:
    """True for numbers of the shape of a label."""
    try:
        shape = np.array(value, dtype=np.float64).shape
    except (TypeError, ValueError):
        return False
    if label == "energy":
        return shape in ((), (1,))
    return shape == (num_atoms, 3) if label == "forces" else shape in ((6,), (9,), (3, 3), (1, 9), (1, 3, 3))


def has_key(structures: Sequence[Atoms], key: str) -> bool:
    """True if a file has a value under a name for any of its structures."""
    return any(_find(atoms, key) is not None for atoms in structures)


def available_keys(structures: Sequence[Atoms]) -> list[str]:
    """Names of all results, arrays and information that structures of a file have, sorted."""
    return sorted(set().union(*(_available(atoms) for atoms in structures)))


def available_labels(frames: Sequence[Frame]) -> dict[str, frozenset[str]]:
    """Names that the first 1000 frames have values under, sorted, and the labels that each of the values might be.

    A label is found by a part of its name and the shape of its value.
    """
    found: dict[str, set[str]] = {}
    for frame in frames[:1000]:  # a file is like its beginning
        for key in _available(frame.atoms):
            labels = found.setdefault(key, set())
            for label, names in _NAMES.items():
                alike = label not in labels and any(name in key.lower() for name in names)
                if alike and _may_be(_find(frame.atoms, key), label, len(frame.atoms)):
                    labels.add(label)
    return {key: frozenset(found[key]) for key in sorted(found)}


def information(atoms: Atoms, key: str) -> Any:
    """Value that a file has for a structure under a name; None without one."""
    return _find(atoms, key)


def structures_of(file: Path) -> list[Atoms]:
    """All structures of a file, as ASE reads it."""
    if file.suffix in (".db", ".json"):  # ase.io.read leaves out the key-value pairs and data of a database
        with ase.db.connect(file) as database:
            return [row.toatoms(add_additional_information=True) for row in database.select()]
    structures = ase.io.read(file, index=":")
    return structures if isinstance(structures, list) else [structures]


def _sources(atoms: Atoms) -> list[Mapping[str, Any]]:
    """Places of labels, in the order in which they are looked up."""
    sources: list[Mapping[str, Any]] = [] if atoms.calc is None else [getattr(atoms.calc, "results", {})]
    sources += [atoms.arrays, atoms.info]
    nested = (atoms.info.get(name) for name in ("key_value_pairs", "data"))
    return sources + [values for values in nested if isinstance(values, Mapping)]


def _find(atoms: Atoms, key: str) -> Any:
    return next((source[key] for source in _sources(atoms) if source.get(key) is not None), None)


def _available(atoms: Atoms) -> set[str]:
    return {str(key) for source in _sources(atoms) for key in source} - _NOT_LABELS


def _frame(atoms: Atoms, names: LabelKeys, origin: str, index: int) -> Frame:
    location = f"{origin}, frame {index}"
    if len(atoms) == 0:
        raise ValueError(f"{location}: a frame needs at least one atom, found none")
    if (atoms.numbers < 1).any():
        unknown = int(np.argmin(atoms.numbers))
        raise ValueError(
            f"{location}: atom {unknown} is {atoms.symbols[unknown]} (atomic number {atoms.numbers[unknown]}), which "
            f"is no element; expected a chemical symbol. Correct or remove the atom"
        )
    unknown = ~np.isfinite(atoms.positions)
    if unknown.any():
        raise ValueError(
            f"{location}: positions must be finite, found {int(unknown.sum())} NaN or infinite components, the first "
            f"of atom {int(unknown.any(axis=1).argmax())}; correct or remove the frame"
        )
    if not np.isfinite(atoms.cell.array).all():
        raise ValueError(f"{location}: cell vectors must be finite, found {atoms.cell.array.tolist()}")
    if atoms.pbc.any() and not _spans_its_periodic_directions(atoms):
        raise ValueError(
            f"{location}: the periodic directions of pbc={atoms.pbc.tolist()} need cell vectors that are independent, "
            f"found the cell {atoms.cell.array.tolist()}; set pbc to F for a structure that is not periodic"
        )

    energy = _numbers(atoms, names.energy, "energy", location)
    if energy is not None and energy.size != 1:
        raise ValueError(f"{location}: the energy {names.energy!r} must be one number, found shape {energy.shape}")
    forces = _numbers(atoms, names.forces, "forces", location)
    if forces is not None and forces.shape != (len(atoms), 3):
        raise ValueError(
            f"{location}: the forces {names.forces!r} must have shape {(len(atoms), 3)}, found {forces.shape}"
        )
    stress, left_out = _stress(atoms, names, location)
    return Frame(
        atoms=atoms,
        energy=None if energy is None or np.isnan(energy).any() else float(energy.reshape(())),
        forces=None if forces is None or np.isnan(forces).all() else forces,
        stress=stress,
        origin=origin,
        index=index,
        stress_left_out=left_out,
    )


def _spans_its_periodic_directions(atoms: Atoms) -> bool:
    vectors = atoms.cell.array[atoms.pbc]
    lengths = np.linalg.norm(vectors, axis=1)
    if not (lengths > 0).all():
        return False
    # of the unit vectors, so that the smallest singular value measures the angles between them alone
    return bool(np.linalg.svd(vectors / lengths[:, None], compute_uv=False)[-1] > 1e-6)


def _numbers(atoms: Atoms, key: str, label: str, location: str) -> NDArray[np.float64] | None:
    value = _find(atoms, key)
    if value is None:
        return None
    try:
        numbers = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{location}: the {label} {key!r} must be numbers, found {value!r}") from None
    if np.isinf(numbers).any():
        raise ValueError(f"{location}: the {label} {key!r} has infinite values; write NaN where it is unknown")
    return numbers


def _stress(atoms: Atoms, names: LabelKeys, location: str) -> tuple[NDArray[np.float64] | None, bool]:
    """The stress in eV/Å³ ``[3, 3]``, and whether there is one that was left out for want of a volume."""
    both_named = {"stress", "virial"} <= set(names.changed())
    virial = _matrix(atoms, names.virial, "virial", location) if names.virial_first or both_named else None
    stress = None if names.virial_first and virial is not None else _matrix(atoms, names.stress, "stress", location)
    if both_named and stress is not None and virial is not None:
        raise ValueError(
            f"{location}: both the stress {names.stress!r} and the virial {names.virial!r} are named, and the frame "
            f"has both; expected one of them to read. Leave out data.keys.stress or data.keys.virial"
        )
    if stress is not None:
        return (stress, False) if atoms.pbc.all() else (None, True)
    if virial is None:
        virial = _matrix(atoms, names.virial, "virial", location)
    if virial is None:
        return None, False
    if not atoms.pbc.all():
        raise ValueError(
            f"{location}: the virial {names.virial!r} needs a volume to become a stress, but the frame is not periodic "
            f"in all three directions (pbc={atoms.pbc.tolist()}); remove the virial or correct pbc"
        )
    volume: float = atoms.get_volume()
    return -virial / volume, False


def _matrix(atoms: Atoms, key: str, label: str, location: str) -> NDArray[np.float64] | None:
    numbers = _numbers(atoms, key, label, location)
    return None if numbers is None else _symmetric_matrix(numbers, key, label, location)


def _symmetric_matrix(numbers: NDArray[np.float64], key: str, label: str, location: str) -> NDArray[np.float64] | None:
    """Symmetric part ``[3, 3]`` of 3 × 3, 9 or 6 numbers in Voigt order; None if any of them is NaN."""
    if numbers.shape == (6,):
        xx, yy, zz, yz, xz, xy = numbers
        numbers = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    elif numbers.shape in ((3, 3), (9,), (1, 9), (1, 3, 3)):
        numbers = numbers.reshape(3, 3)
    else:
        raise ValueError(
            f"{location}: the {label} {key!r} must be 3 x 3 numbers, 9, or 6 in Voigt order, found shape "
            f"{numbers.shape}"
        )
    return None if np.isnan(numbers).any() else 0.5 * (numbers + numbers.T)


def chemical_symbols(frames: Sequence[Frame]) -> set[str]:
    """Symbols of all elements in ``frames``."""
    return set().union(*(frame.atoms.get_chemical_symbols() for frame in frames))


def file_fingerprint(path: Path) -> str:
    """Name, size and SHA-256 of the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return fingerprint_text(path.name, path.stat().st_size, digest.hexdigest())


def fingerprint_text(name: str, num_bytes: int, digest: str) -> str:
    """Fingerprint of a file from its name, size and the SHA-256 of its content."""
    return f"{name}, {num_bytes} bytes, sha256 {digest}"
