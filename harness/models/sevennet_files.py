"""SevenNet's checkpoints, those that its wheel ships among them, as models of :mod:`harness.models.sevennet`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from harness.models.conversion import Converted, Predictions, Types, load_all
from harness.models.geometry import edge_vectors
from harness.models.packages import missing_package, version_of
from harness.models.sevennet import sevennet_force_field
from harness.support.guest import guest

__all__ = ["read_sevennet", "shipped_checkpoints"]

_TARGET = "harness.models.sevennet.sevennet_force_field"
_SHIFT, _SCALE = "rescale_atomic_energy.shift", "rescale_atomic_energy.scale"
_ARGUMENTS = {
    "channel": "channels",
    "lmax": "lmax",
    "num_convolution_layer": "num_convolution_layer",
    "is_parity": "is_parity",
    "weight_nn_hidden_neurons": "weight_nn_hidden_neurons",
    "self_connection_type": "self_connection_type",
}
_ELSEWHERE = ("cutoff", "conv_denominator", "shift", "scale", "use_flash_tp", "cuequivariance_config", "use_oeq")


def shipped_checkpoints() -> dict[str, Path]:
    """Checkpoints in the installed package by name, such as ``7net-0``; none if it is not installed."""
    with guest():
        try:
            from sevenn import _const
        except ModuleNotFoundError:
            return {}
    names = {
        "7net-0": "SEVENNET_0_11Jul2024",
        "7net-0_22May2024": "SEVENNET_0_22May2024",
        "7net-l3i5": "SEVENNET_l3i5",
        "7net-mf-0": "SEVENNET_MF_0",
    }
    found = {name: Path(getattr(_const, constant, "")) for name, constant in names.items()}
    return {name: path for name, path in found.items() if path.is_file()}


def read_sevennet(path: str | Path, modality: str | None = None) -> Converted:
    """Read a checkpoint, which unpickles it and so runs whatever it says.

    SevenNet's shifts become the references of the adapter, in float64; its own are zero. All elements are kept, as
    SevenNet's own fine-tuning keeps them.

    Args:
        path: of the file.
        modality: whose energies a model of several gives, such as ``PBE``.

    Raises:
        ModuleNotFoundError: sevenn is not installed.
        ValueError: an unknown modality, or none for a model of several.
    """
    with guest(torch.float32):
        try:
            from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
            from sevenn.checkpoint import SevenNetCheckpoint
        except ModuleNotFoundError as error:
            raise missing_package(error, "SevenNet", "sevennet") from error
        defaults = copy.deepcopy(DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG)  # which reading a checkpoint changes
        checkpoint = SevenNetCheckpoint(path)
        config, own = checkpoint.config, checkpoint.build_model()
        stored = checkpoint.model_state_dict
        if any(value.dtype == torch.float64 for value in stored.values()) and stored.keys() == own.state_dict().keys():
            own = own.double()  # sevenn builds in float32, and rounds what it loads
            own.load_state_dict(stored)
    weights: dict[str, Tensor] = {name: value.detach().clone() for name, value in own.state_dict().items()}
    type_map: Mapping[int, int] = config["_type_map"]
    names = tuple(chemical_symbols[number] for number in sorted(type_map, key=lambda number: type_map[number]))
    modalities = _modalities(config)
    chosen = _chosen(modalities, modality)
    shifts, scales = (_of_types(weights[name], chosen, len(names)) for name in (_SHIFT, _SCALE))
    dtype = str(weights["edge_embedding.basis_function.coeffs"].dtype).removeprefix("torch.")
    arguments: dict[str, Any] = {ours: _plain(config[theirs]) for theirs, ours in _ARGUMENTS.items()}
    arguments |= {
        "cutoff": float(config["cutoff"]),
        "conv_denominator": float(weights["0_convolution.denominator"]),
        "energy_shifts": dict(zip(names, shifts, strict=True)),
        "energy_scales": dict(zip(names, scales, strict=True)),
        "stress": True,
        "dtype": dtype,
        "seed": 0,
        **{
            name: _plain(config[name])
            for name, default in defaults.items()
            if name not in {*_ARGUMENTS, *_ELSEWHERE} and config.get(name) is not None and config[name] != default
        },
    }
    if modalities:
        arguments |= {"modalities": modalities, "modality": modalities[chosen or 0]}
    model = sevennet_force_field(Types(names), **arguments).eval()  # type: ignore[arg-type]
    inner: Any = model.energy_model.energy_model
    given = {f"layers.{name}": value for name, value in weights.items()}
    given[f"layers.{_SHIFT}"] = torch.zeros(len(names))
    given[f"layers.{_SCALE}"] = torch.tensor(scales, dtype=torch.float64)
    loaded = load_all(inner, given, {})
    reason = "it is added outside, in float64"
    return Converted(
        package=version_of("sevenn"),
        target=_TARGET,
        arguments=arguments,
        model=model,
        both=_Both(own, model, chosen),
        type_names=names,
        cutoff=float(config["cutoff"]),
        dtype=dtype,
        loaded=tuple(name.removeprefix("layers.") for name in loaded if not name.endswith(_SHIFT)),
        left_out={_SHIFT: f"{reason}, as shifts of energy_model"},
    )


def _modalities(config: Mapping[str, Any]) -> list[str]:
    """Names of the modalities in the order of their indices; none for a model that has no such thing."""
    found: Mapping[str, int] = config.get("_modal_map") or {}
    return sorted(found, key=lambda name: found[name]) if config.get("use_modality") else []


def _chosen(modalities: list[str], modality: str | None) -> int | None:
    if not modalities:
        if modality is not None:
            raise ValueError(f"--head {modality}: the model has no modalities to choose from; leave --head out.")
        return None
    if modality not in modalities:
        found = "none is chosen" if modality is None else f"found {modality!r}"
        raise ValueError(f"the model has the modalities {', '.join(modalities)}, and {found}: choose one by --head.")
    return modalities.index(modality)


def _of_types(values: Tensor, modality: int | None, num_types: int) -> list[float]:
    """Numbers by type of a scale or shift, which may be one number, or one row for each modality."""
    if values.dim() == 2:
        values = values[modality or 0]
    return values.double().expand(num_types).tolist()  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class _Both:
    """Predictions by sevenn's own forward and by the adapter, in float64."""

    def __init__(self, own: nn.Module, model: nn.Module, modality: int | None) -> None:
        self.own = copy.deepcopy(own).double().eval()
        self.model = copy.deepcopy(model).double().eval()
        self.modality = modality

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Predictions, Predictions]:
        """Predictions of a batch of float64."""
        data: Any = {name: value.clone() for name, value in batch.items()}
        cell = data["cell"]
        types = data["atom_types"]
        data |= {
            "x": types,
            "edge_vec": edge_vectors(batch).detach().requires_grad_(),
            "cell_volume": torch.linalg.det(cell).abs(),
        }
        if self.modality is not None:
            data["modal_type"] = torch.full_like(data["num_atoms"], self.modality)
        for name, layer in self.own.named_children():
            data = layer(data)
            if name == "onehot_idx_to_onehot":  # which sevenn makes float32 whatever the weights are
                data["x"], data["node_attr"] = data["x"].double(), data["node_attr"].double()
        found = {"total_energy": data["inferred_total_energy"].reshape(-1, 1), "forces": data["inferred_force"]}
        if "inferred_stress" in data:
            xx, yy, zz, xy, yz, zx = (-data["inferred_stress"]).unbind(-1)  # in sevenn's order and sign
            found["stress"] = torch.stack((xx, xy, zx, xy, yy, yz, zx, yz, zz), dim=-1).reshape(-1, 3, 3)
        return found, self.model(batch)
