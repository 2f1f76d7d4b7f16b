"""MACE's ``.model`` files, which are pickled modules, as models of :mod:`harness.models.mace`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from harness.models.conversion import Converted, Predictions, Types, load_all
from harness.models.geometry import edge_vectors
from harness.models.mace import mace_force_field
from harness.models.packages import missing_package, version_of
from harness.support.guest import guest

__all__ = ["read_mace"]

_TARGET = "harness.models.mace.mace_force_field"
_REFERENCES = "atomic_energies_fn.atomic_energies"
_OPTIONS = (
    "radial_type",
    "distance_transform",
    "pair_repulsion",
    "apply_cutoff",
    "use_reduced_cg",
    "use_so3",
    "use_agnostic_product",
    "use_last_readout_only",
    "use_edge_irreps_first",
)
"""Entries of MACE's own description of an architecture that the adapter passes on as they are."""


def read_mace(path: str | Path, head: str | None = None, elements: Sequence[str] | None = None) -> Converted:
    """Read a ``.model`` file, which unpickles it and so runs whatever it says.

    MACE's atomic energies become the references of the adapter, in float64; its own are zero.

    Args:
        path: of the file.
        head: the head to keep of a model that has several, as mace-torch's ``mace_select_head`` keeps it.
        elements: chemical symbols to keep; all if None. The others are taken out as mace-torch does it for its own
            fine-tuning (``load_foundations_elements``), which leaves the energies of the rest as they are.

    Raises:
        ModuleNotFoundError: mace-torch is not installed.
        ValueError: no ``ScaleShiftMACE``, one with inputs that batches do not have, an unknown head or element.
    """
    with guest():
        try:
            import mace.modules as modules  # before e3nn, whose import needs what this one sets
            from mace.tools.scripts_utils import extract_config_mace_model
        except ModuleNotFoundError as error:
            raise missing_package(error, "MACE", "mace") from error
        own = torch.load(path, map_location="cpu", weights_only=False)
        _check(own, path)
        weight = next(own.parameters())
        torch.set_default_dtype(weight.dtype)
        left_out = {_REFERENCES: "they are added outside, in float64, as shifts of energy_model"}
        own, of_head = _with_head(own, head)
        own, of_elements = _with_elements(own, elements)
        try:
            described = extract_config_mace_model(own)
        except AttributeError as error:
            raise ValueError(f"{path}: mace-torch cannot describe this model: {error}.") from error
        arguments = _arguments(modules, described, own)
    numbers: list[int] = own.atomic_numbers.tolist()
    names = tuple(chemical_symbols[number] for number in numbers)
    energies = torch.atleast_2d(own.atomic_energies_fn.atomic_energies)[0].double().tolist()
    arguments |= {
        "energy_shifts": dict(zip(names, energies, strict=True)),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    model = mace_force_field(Types(names), **arguments).eval()  # type: ignore[arg-type]
    adapter: Any = model.energy_model.energy_model
    inner = adapter.mace
    weights = {name: value.detach().clone() for name, value in own.state_dict().items()}
    weights[_REFERENCES] = torch.zeros_like(weights[_REFERENCES])
    parameters = {name for name, _ in inner.named_parameters()}
    constants = {name for name in inner.state_dict() if name not in parameters and name not in weights}
    loaded = load_all(inner, weights, dict.fromkeys(constants, "a constant of mace-torch"))
    return Converted(
        package=version_of("mace-torch"),
        target=_TARGET,
        arguments=arguments,
        model=model,
        both=_Both(own, model),
        type_names=names,
        cutoff=float(arguments["cutoff"]),
        dtype=str(arguments["dtype"]),
        loaded=tuple(name for name in loaded if name != _REFERENCES),
        left_out=left_out | of_head | of_elements,
        made_anew=dict.fromkeys(sorted(constants), "a constant of mace-torch"),
    )


def _check(own: Any, path: str | Path) -> None:
    """Refuse anything but a model whose inputs are structures alone."""
    kind = type(own).__name__
    if kind != "ScaleShiftMACE":
        raise ValueError(f"{path} holds a {kind}; a model of MACE's kind ScaleShiftMACE is expected.")
    if getattr(own, "embedding_specs", None):
        raise ValueError(
            f"{path} asks for {', '.join(own.embedding_specs)} beside the structure, such as charge or spin, which "
            f"batches here do not have."
        )
    if getattr(getattr(own, "cueq_config", None), "enabled", False):
        raise ValueError(
            f"{path} has the layers of cuEquivariance: convert them to e3nn's first, with "
            f"`python -m mace.cli.convert_cueq_e3nn {path}`."
        )


def _with_head(own: Any, head: str | None) -> tuple[Any, dict[str, str]]:
    """The model with one head, and what was left out for it."""
    heads = [str(name) for name in getattr(own, "heads", None) or ["Default"]]
    if head is not None and head not in heads:
        raise ValueError(f"--head {head}: the model has {', '.join(heads)}.")
    if len(heads) == 1:
        return own, {}
    if head is None:
        raise ValueError(f"the model has the heads {', '.join(heads)}: choose one by --head.")
    from mace.tools.scripts_utils import remove_pt_head

    others = ", ".join(name for name in heads if name != head)
    return remove_pt_head(own, head), {f"readouts and references of {others}": f"the head is {head}"}


def _with_elements(own: Any, elements: Sequence[str] | None) -> tuple[Any, dict[str, str]]:
    """The model with some of its elements, and what was left out for them."""
    if elements is None:
        return own, {}
    from mace.tools import AtomicNumberTable
    from mace.tools.finetuning_utils import load_foundations_elements
    from mace.tools.scripts_utils import extract_config_mace_model

    numbers: list[int] = own.atomic_numbers.tolist()
    unknown = [name for name in elements if atomic_numbers.get(name) not in numbers]
    if unknown or not elements:
        known = ", ".join(chemical_symbols[number] for number in numbers)
        raise ValueError(f"--elements {' '.join(elements)}: the model has no {', '.join(unknown)}; it has {known}.")
    kept = sorted({atomic_numbers[name] for name in elements})
    rows = [numbers.index(number) for number in kept]
    described = extract_config_mace_model(own)
    energies = torch.atleast_2d(own.atomic_energies_fn.atomic_energies)[:, rows]
    smaller = type(own)(
        **described | {"num_elements": len(kept), "atomic_numbers": kept, "atomic_energies": energies.cpu().numpy()}
    )
    selected = load_foundations_elements(
        smaller, own, AtomicNumberTable(kept), load_readout=True, max_L=described["hidden_irreps"].lmax
    )
    others = ", ".join(chemical_symbols[number] for number in numbers if number not in kept)
    return selected, {f"rows of {others}": "of elements that were not asked for"} if others else {}


def _arguments(modules: Any, described: Mapping[str, Any], own: Any) -> dict[str, Any]:
    """Arguments of the adapter, by MACE's own description of a model."""
    from e3nn import o3

    hidden = described["hidden_irreps"]
    channels, max_L = hidden.count(o3.Irrep(0, 1)), hidden.lmax
    regular = o3.Irreps([(channels, (order, (-1) ** order)) for order in range(max_L + 1)])
    if hidden != regular:
        raise ValueError(f"hidden irreps {hidden} cannot be converted; of MACE's usual form are {regular}.")
    scale = float(own.scale_shift.scale)
    arguments: dict[str, Any] = {
        "cutoff": float(described["r_max"]),
        "channels": channels,
        "max_L": max_L,
        "max_ell": int(described["max_ell"]),
        "num_interactions": int(described["num_interactions"]),
        "correlation": int(described["correlation"]),
        "num_bessel": int(described["num_bessel"]),
        "num_polynomial_cutoff": int(described["num_polynomial_cutoff"]),
        "radial_mlp": [int(width) for width in described["radial_MLP"]],
        "mlp_irreps": str(described["MLP_irreps"]),
        "gate": _name(modules.gate_dict, described["gate"], "nonlinearity"),
        "interaction_first": _name(modules.interaction_classes, described["interaction_cls_first"], "interaction"),
        "interaction": _name(modules.interaction_classes, described["interaction_cls"], "interaction"),
        "avg_num_neighbors": float(described["avg_num_neighbors"]),
        "energy_scales": scale,
        "stress": True,
        "seed": 0,
        "readout_cls": _name(modules.readout_classes, described["readout_cls"], "readout"),
        **{name: described[name] for name in _OPTIONS if described.get(name) is not None},
    }
    if described.get("edge_irreps") is not None:
        arguments["edge_irreps"] = str(described["edge_irreps"])
    return arguments


def _name(known: Mapping[str, Any], value: Any, kind: str) -> str:
    """Name under which mace-torch has a class or function."""
    found = next((name for name, each in known.items() if each is value), None)
    if found is None:
        raise ValueError(f"the {kind} {getattr(value, '__name__', value)} is none of mace-torch's: {', '.join(known)}.")
    return found


class _Both:
    """Predictions by MACE's own forward and by the adapter, in float64."""

    def __init__(self, own: nn.Module, model: nn.Module) -> None:
        self.own: Any = copy.deepcopy(own).double().eval()
        self.model: Any = copy.deepcopy(model).double().eval()

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Predictions, Predictions]:
        """Predictions of a batch of float64."""
        counts, elements = batch["num_atoms"], self.model.energy_model.energy_model.elements
        center, neighbor = batch["edge_index"]
        position = batch["pos"].clone()
        found = self.own(
            {
                "positions": position,
                "node_attrs": nn.functional.one_hot(elements[batch["atom_types"]], len(elements)).double(),
                "edge_index": batch["edge_index"],
                "unit_shifts": batch["edge_cell_shift"].double(),
                "shifts": edge_vectors(batch) - position[neighbor] + position[center],
                "cell": batch["cell"].reshape(-1, 3).clone(),
                "batch": batch["batch"],
                "ptr": torch.cat((counts.new_zeros(1), counts.cumsum(0))),
            },
            training=False,
            compute_force=True,
            compute_stress=True,
        )
        theirs = {"total_energy": found["energy"].reshape(-1, 1), "forces": found["forces"], "stress": found["stress"]}
        return {name: value.detach() for name, value in theirs.items()}, self.model(batch)
