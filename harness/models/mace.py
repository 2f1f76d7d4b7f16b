"""MACE: atomic energies of a ``ScaleShiftMACE`` of mace-torch, with forces and stresses derived as for every model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor, nn

from harness.models.force_field import ForceField
from harness.models.geometry import edge_vectors
from harness.models.heads import head_of_graphs, resolve_heads, shifts_of_heads
from harness.models.packages import missing_package
from harness.models.references import connected_zero
from harness.models.scale_shift import ScaleShift, TypeStatistics, resolve_scales, resolve_shifts
from harness.support.arguments import Count, Order, Positive, WeightsDtype
from harness.support.guest import guest

__all__ = ["MACEEnergy", "mace_force_field"]


class MACEEnergy(nn.Module):
    r"""Interaction energy of each atom in eV by MACE, float64 ``[num_atoms, 1]``.

    Calls ``ScaleShiftMACE`` with the vectors of the batch's edges, which are taken in the dtype of the positions and
    rounded to that of the weights once. MACE's own references are zero: those of the training are added outside, in
    float64. A batch without atoms gives no energies, which still depend on every parameter.

    Args:
        mace: a ``mace.modules.ScaleShiftMACE`` whose atomic energies are zero.
        elements: position of each atom type among the model's ``atomic_numbers``, which MACE wants in order.
        heads: names of its heads, one for each data set: the batch's ``set_index`` says which a graph has.

    Reference:
        I. Batatia et al., "MACE: Higher order equivariant message passing neural networks for fast and accurate force
        fields", NeurIPS 2022.
    """

    takes_empty_batches = True
    elements: Tensor

    def __init__(self, mace: nn.Module, elements: Sequence[int], heads: Sequence[str] = ()) -> None:
        super().__init__()
        self.mace = mace
        self.set_heads = tuple(heads)
        self.register_buffer("elements", torch.tensor(list(elements), dtype=torch.int64))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Energies of the atoms; differentiable in ``pos`` and ``cell``."""
        weight = next(self.mace.parameters())
        vectors = edge_vectors(batch).to(weight.dtype)
        types = self.elements.index_select(0, batch["atom_types"])
        num_atoms, num_elements = types.shape[0], self.elements.shape[0]
        if num_atoms == 0:
            return torch.zeros(0, 1, dtype=torch.float64, device=weight.device) + connected_zero(self.mace, vectors)
        counts = batch["num_atoms"]
        # the vectors travel as shifts between atoms at the origin: nothing is rounded by adding positions to them
        inputs = {
            "positions": vectors.new_zeros(num_atoms, 3),
            "shifts": vectors,
            "node_attrs": nn.functional.one_hot(types, num_elements).to(weight.dtype),
            "edge_index": batch["edge_index"],
            "cell": batch["cell"].to(weight.dtype),
            "batch": batch["batch"],
            "ptr": torch.cat((counts.new_zeros(1), counts.cumsum(0))),
        }
        if self.set_heads:
            inputs["head"] = head_of_graphs(batch, self.set_heads)
        outputs = self.mace(inputs, training=self.training, compute_force=False)
        energies: Tensor = outputs["node_energy"].reshape(-1, 1)
        return energies


def mace_force_field(
    statistics: TypeStatistics,
    *,
    cutoff: Positive,
    channels: Count = 64,
    max_L: Order = 1,
    max_ell: Order = 3,
    num_interactions: Count = 2,
    correlation: Count | Sequence[Count] = 3,
    num_bessel: Count = 8,
    num_polynomial_cutoff: Count = 5,
    radial_mlp: Sequence[Count] = (64, 64, 64),
    mlp_irreps: str = "16x0e",
    gate: str | None = "silu",
    interaction_first: str = "RealAgnosticResidualInteractionBlock",
    interaction: str = "RealAgnosticResidualInteractionBlock",
    avg_num_neighbors: Positive | None = None,
    energy_shifts: Mapping[str, float] | str | os.PathLike[str] = "fit",
    energy_scales: float | str = "force_rms",
    stress: bool = True,
    dtype: WeightsDtype = "float32",
    seed: int | None = None,
    heads: Sequence[str] | str | None = None,
    **options: Any,
) -> ForceField:
    """MACE with the references and the scale of its training set, and forces and stresses derived from its energies.

    Args:
        statistics: ``type_names``, ``energy_shifts``, ``force_rms`` and ``mean_neighbors`` of the training set.
        cutoff: in Å; that of the neighbour lists.
        channels: features of an atom and order.
        max_L: largest order of the messages.
        max_ell: largest order of the spherical harmonics.
        num_interactions: number of interaction blocks.
        correlation: body order of the products, minus 1.
        num_bessel: radial basis functions.
        num_polynomial_cutoff: power of the cutoff function.
        radial_mlp: widths of the radial network.
        mlp_irreps: hidden irreps of the last readout.
        gate: its nonlinearity, one of ``mace.modules.gate_dict``.
        interaction_first: class of the first interaction, one of ``mace.modules.interaction_classes``.
        interaction: class of the others.
        avg_num_neighbors: by which sums over neighbours are divided; that of the training set if None.
        energy_shifts: see :func:`~harness.models.scale_shift.resolve_shifts`.
        energy_scales: a number of eV, or ``force_rms``: MACE has one scale for all types.
        stress: predict stresses.
        dtype: of the weights, ``float32`` or ``float64``; a model is built in it, not converted.
        seed: of the initial weights, which then neither depend on the global random state nor change it; None draws
            them from it.
        heads: ``sets`` for a head for each data set of a mixture: readouts of its own, and the references of that set
            in place of ``energy_shifts``; or the names of the sets.
        options: further arguments of ``ScaleShiftMACE``, such as ``pair_repulsion``, ``distance_transform``,
            ``cueq_config`` or ``oeq_config``; ``readout_cls`` and ``edge_irreps`` by their names.

    Raises:
        ModuleNotFoundError: mace-torch is not installed.
        ValueError: a name or a type that MACE does not know, or sizes that do not fit each other.
    """
    if isinstance(energy_scales, Mapping):
        raise ValueError("MACE has one energy scale for all types: give energy_scales a number of eV, or force_rms.")
    if max_L and not max_ell:
        raise ValueError(
            f"model.max_L={max_L} with model.max_ell=0: messages of orders above 0 are made of spherical harmonics of "
            f"orders above 0. Expected max_ell of at least 1, or max_L=0."
        )
    if not isinstance(correlation, int) and len(correlation) != num_interactions:
        raise ValueError(
            f"model.correlation={list(correlation)} has {len(correlation)} entries, but model.num_interactions is "
            f"{num_interactions}: expected one number for all interactions, or one for each."
        )
    numbers = [_atomic_number(name) for name in statistics.type_names]
    ordered = sorted(numbers)
    scale = resolve_scales(energy_scales, statistics)[0]
    shifts = resolve_shifts(energy_shifts, statistics)
    names = resolve_heads(heads, statistics)
    if names and energy_shifts != "fit":
        raise ValueError(
            "model.heads takes the references of each head from its set: give them as data.sets.NAME.references in "
            "place of model.energy_shifts."
        )
    neighbors = avg_num_neighbors if avg_num_neighbors is not None else statistics.mean_neighbors  # type: ignore[attr-defined]
    own_seed = seed if seed is not None else int(torch.randint(2**31, ()).item())
    with guest(_dtype(dtype)):
        try:
            import mace.modules as modules  # before e3nn, whose import needs what this one sets
            from e3nn import o3
        except ModuleNotFoundError as error:
            raise missing_package(error, "MACE", "mace") from error
        import numpy as np

        if isinstance(options.get("readout_cls"), str):
            options["readout_cls"] = _named(modules.readout_classes, options["readout_cls"], "readout_cls")
        if isinstance(options.get("edge_irreps"), str):
            options["edge_irreps"] = o3.Irreps(options["edge_irreps"])
        torch.manual_seed(own_seed)
        model = modules.ScaleShiftMACE(
            r_max=float(cutoff),
            num_bessel=num_bessel,
            num_polynomial_cutoff=num_polynomial_cutoff,
            max_ell=max_ell,
            interaction_cls=_named(modules.interaction_classes, interaction, "interaction"),
            interaction_cls_first=_named(modules.interaction_classes, interaction_first, "interaction_first"),
            num_interactions=num_interactions,
            num_elements=len(ordered),
            hidden_irreps=o3.Irreps([(channels, (order, (-1) ** order)) for order in range(max_L + 1)]),
            MLP_irreps=o3.Irreps(mlp_irreps),
            atomic_energies=np.zeros((len(names), len(ordered)) if names else len(ordered)),
            avg_num_neighbors=float(neighbors),
            atomic_numbers=ordered,
            correlation=correlation,
            gate=_named(modules.gate_dict, str(gate), "gate"),  # "None" is a name there
            radial_MLP=list(radial_mlp),
            atomic_inter_scale=[scale] * len(names) if names else scale,
            atomic_inter_shift=[0.0] * len(names) if names else 0.0,
            # its own default, True, is another model where cuEquivariance is installed, and has no effect elsewhere
            **{"use_reduced_cg": False, **({"heads": list(names)} if names else {}), **options},
        )
    energy = MACEEnergy(model, [ordered.index(number) for number in numbers], names)
    scales = [1.0] * len(numbers)
    if not names:
        return ForceField(ScaleShift(energy, scales, shifts), derive_stress=stress)
    of_heads = shifts_of_heads(shifts, names, statistics)
    return ForceField(ScaleShift(energy, scales, of_heads, heads=names), derive_stress=stress)


def _atomic_number(name: str) -> int:
    if name not in atomic_numbers or atomic_numbers[name] < 1:
        raise ValueError(f"MACE knows atom types by their elements; {name!r} is no chemical symbol.")
    return atomic_numbers[name]


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "float64"):
        raise ValueError(f"model.dtype is float32 or float64, found {name!r}.")
    return torch.float32 if name == "float32" else torch.float64


def _named(valid: Mapping[str, Any], name: str, argument: str) -> Any:
    if name not in valid:
        raise ValueError(f"model.{argument}={name} is unknown to MACE; it has {', '.join(valid)}.")
    return valid[name]
