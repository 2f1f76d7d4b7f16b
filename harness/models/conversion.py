"""Models from the files of other packages: what a reader of such a file finds, and how its kind is told without it.

A reader unpickles, and so runs whatever its file says. :func:`kind_of` looks at a file without running anything of it.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["KINDS", "Converted", "Types", "kind_of", "load_all", "patterns"]

KINDS = {
    "mace": "MACE model",
    "nequip": "NequIP checkpoint",
    "nequip package": "NequIP package",
    "sevennet": "SevenNet checkpoint",
}
"""Kinds of files that can be converted, with their names."""

_SIGNS = {
    "mace": (rb"mace\.modules",),
    "nequip": (rb"hyper_parameters", rb"nequip"),
    "sevennet": (rb"model_state_dict", rb"num_convolution_layer"),
}
"""Expressions that the pickle of a file of each kind has."""
_LONGEST_PICKLE = 50_000_000  # bytes; tensors are beside it


Predictions = Mapping[str, Tensor]


@dataclass(frozen=True)
class Types:
    """Type names in the place of the statistics of a training set, of which a whole architecture needs no more."""

    type_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Converted:
    """A model of another package, as a builder of this package makes it.

    Attributes:
        package: name and version of the package that has read the file.
        target: dotted path of the builder.
        arguments: of the builder, plain data: the whole architecture, nothing is left to the statistics of data.
        model: made by it, with the weights of the file, in evaluation mode.
        both: predictions of a batch by the package itself and by ``model``, ``total_energy`` ``[num_graphs, 1]``,
            ``forces``, and ``stress`` ``[num_graphs, 3, 3]`` where it has it; in float64 where the package can.
        type_names: chemical symbols in the order of the types.
        cutoff: in Å.
        dtype: of the weights, ``float32`` or ``float64``.
        loaded: names of the weights that were taken from the file.
        left_out: names in the file that were not, with the reason.
        made_anew: names in the model that are not in the file, with the reason.
    """

    package: str
    target: str
    arguments: dict[str, Any]
    model: nn.Module
    both: Callable[[Mapping[str, Tensor]], tuple[Predictions, Predictions]]
    type_names: tuple[str, ...]
    cutoff: float
    dtype: str
    loaded: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    made_anew: Mapping[str, str] = field(default_factory=dict)


def kind_of(path: str | Path) -> str | None:
    """Kind of a file, one of :data:`KINDS`; None for any other. Nothing of the file is run."""
    file = Path(path)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if any(name.endswith("model/package_metadata.txt") for name in names):
                    return "nequip package"
                pickles = [name for name in names if name.endswith("data.pkl") and name.count("/") <= 1]
                content = archive.read(pickles[0]) if pickles else b""
        else:
            with file.open("rb") as opened:
                content = opened.read(_LONGEST_PICKLE)
    except (OSError, zipfile.BadZipFile):
        return None
    return next((kind for kind, signs in _SIGNS.items() if all(re.search(sign, content) for sign in signs)), None)


def patterns(names: Sequence[str]) -> str:
    """Names in few words: numbers are ``*``, and each pattern has the number of names that it stands for.

    A beginning that all of them have in common is there once: ``model.layers. … a.weight, b.weight``.
    """
    parts = [name.split(".")[:-1] for name in names]
    common = [first for first, *others in zip(*parts, strict=False) if all(each == first for each in others)]
    prefix = "".join(f"{part}." for part in common) if len(names) > 1 and len(common) > 1 else ""
    counts = Counter(re.sub(r"\d+", "*", name.removeprefix(prefix)) for name in names)
    listed = ", ".join(f"{pattern} ({count})" if count > 1 else pattern for pattern, count in counts.items())
    return f"{prefix} … {listed}" if prefix else listed or "none"


def load_all(module: nn.Module, weights: Mapping[str, Tensor], constants: Mapping[str, str]) -> tuple[str, ...]:
    """Load the weights of a file into a module that was built for them: all of them, or none.

    Args:
        module: of the same architecture.
        weights: by name; a tensor of another shape with as many numbers is reshaped.
        constants: names in the module that need not be in the file, with the reason.

    Returns:
        Names that were loaded.

    Raises:
        ValueError: names that only one of the two has, or that differ in shape: the module would be another model.
    """
    own = module.state_dict()
    given = {
        name: value.reshape(own[name].shape) if name in own and value.numel() == own[name].numel() else value
        for name, value in weights.items()
    }
    wrong = [f"{name} is not in the file" for name in own if name not in given and name not in constants]
    wrong += [f"{name} is in the file alone" for name in given if name not in own]
    wrong += [
        f"{name} is {list(value.shape)} in the file and {list(own[name].shape)} in the model"
        for name, value in given.items()
        if name in own and value.shape != own[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the architecture that the file describes is not that of its weights: {'; '.join(wrong[:3])}{more}. Was "
            f"it written by another version of its package?"
        )
    module.load_state_dict(given, strict=False)
    return tuple(given)
