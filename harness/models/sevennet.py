"""SevenNet: atomic energies of the layers of ``sevenn``, with forces and stresses derived as for every model."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from ase.data import atomic_numbers
from torch import Tensor, nn

from harness.models.force_field import ForceField
from harness.models.geometry import edge_vectors
from harness.models.packages import missing_package
from harness.models.references import connected_zero
from harness.models.scale_shift import ScaleShift, TypeStatistics, resolve_scales, resolve_shifts
from harness.support.arguments import Count, OneOf, Order, Positive, WeightsDtype
from harness.support.guest import guest

__all__ = ["SevenNetEnergy", "sevennet_force_field"]

_NOT_OF_ATOMS = ("reduce_total_enegy", "force_output")  # spelt so in sevenn


class SevenNetEnergy(nn.Module):
    r"""Interaction energy of each atom in eV by SevenNet, ``[num_atoms, 1]``.

    Runs the layers of sevenn's ``AtomGraphSequential`` up to the atomic energies. Its own forces and stress are left
    out: they wait for the device, and are those of :class:`~harness.models.force_field.ForceField`. The vectors of the
    edges are taken in the dtype of the positions and rounded to that of the weights once.

    Args:
        layers: an ``AtomGraphSequential`` of ``build_E3_equivariant_model``, whose index of an element is that of the
            atom type, and whose shifts are zero.
        config: sevenn's model config that they were built of, in plain data; None where it is not known: the model
            cannot be exported as a checkpoint of SevenNet then.
        modality: index of the modality whose energies are given, of a model that has several.

    Reference:
        Y. Park et al., "Scalable parallel algorithm for graph neural network interatomic potentials in molecular
        dynamics simulations", J. Chem. Theory Comput. 20, 4857 (2024).
    """

    takes_empty_batches = True

    def __init__(self, layers: nn.Module, config: Mapping[str, Any] | None = None, modality: int | None = None) -> None:
        super().__init__()
        self.config = None if config is None else dict(config)
        self.modality = modality
        self.layers = nn.ModuleDict(
            {name: layer for name, layer in layers.named_children() if name not in _NOT_OF_ATOMS}
        )

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Energies of the atoms; differentiable in ``pos`` and ``cell``."""
        weight = next(self.layers.parameters())
        vectors = edge_vectors(batch).to(weight.dtype)
        if batch["pos"].shape[0] == 0:
            return vectors.new_zeros(0, 1) + connected_zero(self.layers, vectors)
        data: dict[str, Any] = {
            "x": batch["atom_types"],
            "edge_index": batch["edge_index"],
            "edge_vec": vectors,
            "batch": batch["batch"],
            "num_atoms": batch["num_atoms"],
            "atomic_numbers": batch["atomic_numbers"],
        }
        if self.modality is not None:
            data["modal_type"] = torch.full_like(batch["num_atoms"], self.modality)
        for name, layer in self.layers.items():
            data = layer(data)
            if name == "onehot_idx_to_onehot":  # sevenn makes them float32 whatever the weights are
                data["x"], data["node_attr"] = data["x"].to(weight.dtype), data["node_attr"].to(weight.dtype)
        energies: Tensor = data["atomic_energy"].reshape(-1, 1)
        return energies


def sevennet_force_field(
    statistics: TypeStatistics,
    *,
    cutoff: Positive,
    channels: Count = 32,
    lmax: Order = 1,
    num_convolution_layer: Count = 3,
    is_parity: bool = True,
    weight_nn_hidden_neurons: Sequence[Count] = (64, 64),
    num_bessel: Count = 8,
    cutoff_p: Count = 6,
    self_connection_type: Annotated[str, OneOf("nequip", "linear", "none")] = "nequip",
    conv_denominator: Positive | None = None,
    energy_shifts: Mapping[str, float] | str | os.PathLike[str] = "fit",
    energy_scales: Mapping[str, float] | str | float = "force_rms",
    modalities: Sequence[str] = (),
    modality: str | None = None,
    stress: bool = True,
    dtype: WeightsDtype = "float32",
    seed: int | None = None,
    **options: Any,
) -> ForceField:
    """SevenNet with the references and scales of its training set, and forces and stresses derived from its energies.

    Args:
        statistics: ``type_names``, ``energy_shifts``, ``force_rms`` and ``mean_neighbors`` of the training set.
        cutoff: in Å; that of the neighbour lists.
        channels: features of an atom and order.
        lmax: largest order of features and spherical harmonics.
        num_convolution_layer: interaction blocks.
        is_parity: include features of odd mirror parity.
        weight_nn_hidden_neurons: widths of the radial network.
        num_bessel: radial basis functions.
        cutoff_p: power of the cutoff function.
        self_connection_type: ``nequip``, ``linear`` or ``none``.
        conv_denominator: by which sums over neighbours are divided; the mean number of neighbours of the training set
            if None.
        energy_shifts: see :func:`~harness.models.scale_shift.resolve_shifts`.
        energy_scales: see :func:`~harness.models.scale_shift.resolve_scales`.
        modalities: names of the modalities of a model of several, in the order of their indices.
        modality: the one of them whose energies the model gives.
        stress: predict stresses.
        dtype: of the weights, ``float32`` or ``float64``.
        seed: of the initial weights, which then neither depend on the global random state nor change it; None draws
            them from it.
        options: further entries of sevenn's model config, such as ``cuequivariance_config``.

    Raises:
        ModuleNotFoundError: sevenn is not installed.
        ValueError: a type that is no chemical symbol, or an argument that sevenn does not know.
    """
    unknown = [name for name in statistics.type_names if name not in atomic_numbers]
    if unknown:
        raise ValueError(f"SevenNet knows atom types by their elements; no chemical symbol is {unknown}.")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"model.dtype is float32 or float64, found {dtype!r}.")
    if modalities and modality not in modalities:
        raise ValueError(f"model.modality is one of {', '.join(modalities)}, found {modality!r}.")
    numbers = [atomic_numbers[name] for name in statistics.type_names]
    scales, shifts = resolve_scales(energy_scales, statistics), resolve_shifts(energy_shifts, statistics)
    neighbors = conv_denominator if conv_denominator is not None else statistics.mean_neighbors  # type: ignore[attr-defined]
    own_seed = seed if seed is not None else int(torch.randint(2**31, ()).item())
    with guest(torch.float32 if dtype == "float32" else torch.float64):
        try:
            from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
            from sevenn.model_build import build_E3_equivariant_model
        except ModuleNotFoundError as error:
            raise missing_package(error, "SevenNet", "sevennet") from error
        strange = sorted(set(options) - set(DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG))
        if strange:
            raise ValueError(
                f"SevenNet's model config has no {', '.join(strange)}; it has "
                f"{', '.join(sorted(DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG))}."
            )
        torch.manual_seed(own_seed)
        config = {
            **DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG,
            "cutoff": float(cutoff),
            "channel": channels,
            "lmax": lmax,
            "is_parity": is_parity,
            "num_convolution_layer": num_convolution_layer,
            "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": num_bessel},
            "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": cutoff_p},
            "weight_nn_hidden_neurons": list(weight_nn_hidden_neurons),
            "self_connection_type": self_connection_type,
            "conv_denominator": float(neighbors),
            "shift": [0.0] * len(numbers),
            "scale": scales,
            "_type_map": {number: index for index, number in enumerate(numbers)},
            "_number_of_species": len(numbers),
            **_of_modalities(list(modalities)),
            **options,
        }
        layers = build_E3_equivariant_model(copy.deepcopy(config))
    index = list(modalities).index(str(modality)) if modalities else None
    energy = SevenNetEnergy(layers, config, index).to(torch.float32 if dtype == "float32" else torch.float64)
    return ForceField(ScaleShift(energy, [1.0] * len(numbers), shifts), derive_stress=stress)


def _of_modalities(names: list[str]) -> dict[str, Any]:
    """Entries of sevenn's model config for several modalities; their shifts and scales are those of the one chosen."""
    if not names:
        return {}
    return {
        "use_modality": True,
        "_modal_map": {name: index for index, name in enumerate(names)},
        "_number_of_modalities": len(names),
        "use_modal_wise_shift": False,
        "use_modal_wise_scale": False,
    }
