"""NequIP's checkpoints and packages, Allegro's among them, as models of :mod:`harness.models.nequip`."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from ase.data import atomic_numbers
from torch import Tensor, nn

from harness.models.conversion import Converted, Predictions, Types, load_all
from harness.models.nequip import NequIPForceField, allegro_force_field, nequip_force_field
from harness.models.packages import missing_package, version_of
from harness.support.guest import guest

__all__ = ["read_nequip"]

_BUILDERS: dict[str, tuple[str, Callable[..., NequIPForceField]]] = {
    "NequIPGNNModel": ("NequIP", nequip_force_field),
    "PresetNequIPGNNModel": ("NequIP", nequip_force_field),
    "AllegroModel": ("Allegro", allegro_force_field),
}
"""Names of NequIP's builders, with the package and our own builder."""
_OWN = (
    "_target_",
    "preset",
    "r_max",
    "model_dtype",
    "type_names",
    "seed",
    "compile_mode",
    "do_derivatives",
    "avg_num_neighbors",
    "per_type_energy_scales",
    "per_type_energy_shifts",
    "per_type_energy_shifts_trainable",
)
"""Arguments of NequIP's builders that ours do not pass on as they are."""


def read_nequip(path: str | Path, is_package: bool) -> Converted:
    """Read a checkpoint or a package, both of which run whatever code they hold.

    NequIP's energy shifts become the references of the adapter; its own are zero. All types are kept, as in NequIP's
    own fine-tuning. Of a checkpoint with averaged weights these are taken.

    Args:
        path: of the file.
        is_package: a file of ``nequip-package`` rather than a checkpoint.

    Raises:
        ModuleNotFoundError: nequip, or nequip-allegro, is not installed.
        ValueError: a model that is made by another builder than those of NequIP and Allegro, or type names that are no
            chemical symbols.
    """
    with guest():
        try:
            from nequip.model import ModelFromCheckpoint, ModelFromPackage
            from nequip.utils.global_state import set_global_state
        except ModuleNotFoundError as error:
            raise missing_package(error, "NequIP", "nequip") from error
        set_global_state()
        try:
            section = _section_of_package(path) if is_package else _section_of_checkpoint(path)
            name, ours, section = _builder(section, path)
            loaded_model = (ModelFromPackage if is_package else ModelFromCheckpoint)(str(path))
        except ModuleNotFoundError as error:
            raise missing_package(error, "Allegro", "allegro") from error
        models = dict(loaded_model.items()) if isinstance(loaded_model, nn.ModuleDict) else {"": loaded_model}
        if len(models) != 1:
            raise ValueError(f"{path} holds {len(models)} models, {', '.join(models)}; one is expected.")
        (own,) = models.values()
    names = tuple(str(type_name) for type_name in section["type_names"])
    strange = [type_name for type_name in names if type_name not in atomic_numbers]
    if strange:
        raise ValueError(f"{path} has the types {', '.join(strange)}; types here are chemical symbols.")
    weights: dict[str, Tensor] = {key: value.detach().clone() for key, value in own.state_dict().items()}
    arguments = _arguments(section, names)
    model = ours(Types(names), **arguments).eval()
    place = _place_of_scales(model.model)
    scales, shifts = (_of_types(weights.get(f"{place}.{kind}"), kind, len(names)) for kind in ("scales", "shifts"))
    arguments |= {
        "energy_scales": dict(zip(names, scales.flatten().tolist(), strict=True)),
        "energy_shifts": dict(zip(names, shifts.flatten().tolist(), strict=True)),
    }
    model.references.shifts.copy_(shifts.flatten())
    loaded = load_all(
        model.model, {**weights, f"{place}.scales": scales, f"{place}.shifts": torch.zeros_like(shifts)}, {}
    )
    return Converted(
        package=version_of("nequip-allegro" if name == "Allegro" else "nequip"),
        target=f"{ours.__module__}.{ours.__name__}",
        arguments=arguments,
        model=model,
        both=_Both(own, model),
        type_names=names,
        cutoff=float(section["r_max"]),
        dtype=str(section["model_dtype"]),
        loaded=tuple(key for key in loaded if key != f"{place}.shifts"),
        left_out={f"{place}.shifts": "they are added outside, as shifts of references"},
    )


def _section_of_checkpoint(path: str | Path) -> dict[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=False)
    return dict(found["hyper_parameters"]["model"])


def _section_of_package(path: str | Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("model/config.yaml")]
        return dict(yaml.safe_load(archive.read(name))["training_module"]["model"])


def _builder(section: dict[str, Any], path: str | Path) -> tuple[str, Callable[..., NequIPForceField], dict[str, Any]]:
    """Name of the package, builder of ours, and the config of the model itself."""
    target = str(section.get("_target_"))
    if target.rpartition(".")[2] == "modify":  # which changes how a model computes
        return _builder(dict(section["model"]), path)
    if target.rpartition(".")[2] not in _BUILDERS:
        raise ValueError(
            f"{path}: its model is made by {target}; models of {', '.join(_BUILDERS)} can be converted. One that was "
            f"fine-tuned from another file has the architecture in that file alone."
        )
    name, ours = _BUILDERS[target.rpartition(".")[2]]
    if "preset" in section:
        from nequip.model import nequip_models

        tables = vars(nequip_models)  # which has no public names for them
        presets, standard = tables["_NEQUIP_GNN_PRESETS"], tables["_NEQUIP_GNN_STANDARD_PRESET"]
        section = {**standard, **presets[str(section["preset"]).upper()], **section}
    return name, ours, section


def _arguments(section: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of our builder; scales and shifts are those of the weights."""
    neighbors = section.get("avg_num_neighbors")
    return {
        "cutoff": float(section["r_max"]),
        "avg_num_neighbors": 1.0 if neighbors is None else neighbors,
        "energy_scales": 1.0,
        "energy_shifts": dict.fromkeys(names, 0.0),
        "stress": True,
        "dtype": str(section["model_dtype"]),
        "seed": int(section.get("seed", 0)),
        **{name: value for name, value in section.items() if name not in _OWN},
    }


def _place_of_scales(model: nn.Module) -> str:
    from nequip.nn import PerTypeScaleShift

    (place,) = [name for name, part in model.named_modules() if isinstance(part, PerTypeScaleShift)]
    return place


def _of_types(values: Tensor | None, kind: str, num_types: int) -> Tensor:
    """Scales or shifts ``[num_types, 1]`` of a file that may have one number for all types, or none."""
    if values is None or not values.numel():
        values = torch.full((1, 1), 1.0 if kind == "scales" else 0.0, dtype=torch.float64)
    return values.reshape(-1, 1).expand(num_types, 1).clone()


class _Both:
    """Predictions by NequIP's own model and by the adapter, in the dtypes that NequIP trains in."""

    def __init__(self, own: nn.Module, model: NequIPForceField) -> None:
        self.own = copy.deepcopy(own).eval()
        self.model = copy.deepcopy(model).eval()

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Predictions, Predictions]:
        """Predictions of a batch of float64."""
        read = ("pos", "edge_index", "edge_cell_shift", "cell", "batch", "num_atoms", "atom_types")
        found = self.own({name: batch[name].clone() for name in read})
        names = [name for name in ("total_energy", "forces", "stress") if name in found]
        return {name: found[name].detach() for name in names}, self.model(batch)
