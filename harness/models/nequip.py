"""NequIP and Allegro: models of the ``nequip`` package, which predict forces and stress by themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from harness.models.packages import missing_package
from harness.models.references import ReferenceEnergies, connected_zero
from harness.models.scale_shift import TypeStatistics, resolve_scales, resolve_shifts
from harness.support.arguments import Count, OneOf, Order, Positive, WeightsDtype
from harness.support.guest import guest
from harness.support.text import reason

__all__ = ["NequIPForceField", "allegro_force_field", "nequip_force_field"]

_READ = ("pos", "edge_index", "edge_cell_shift", "cell", "batch", "num_atoms", "atom_types")


class NequIPForceField(nn.Module):
    r"""Energy, forces and stress of a batch by a model of NequIP's kind, with its references added in float64.

    NequIP's field names, signs and edges are those of this package. Added here is what its own training does around the
    model: predictions within ``no_grad`` and ``inference_mode``, batches without graphs, and a stress of zero for
    graphs that are not periodic in all three directions.

    Args:
        model: a ``nequip.nn.GraphModel`` with derivatives, whose energy shifts are zero.
        shifts: reference energies in eV, one per type.
        stress: predict ``stress``.
        config: ``_target_`` of the package's own function that has built the model, and its arguments, in plain data.
            None where the model was not built so: it cannot be exported as a checkpoint of NequIP then.

    Reference:
        S. Batzner et al., "E(3)-equivariant graph neural networks for data-efficient and accurate interatomic
        potentials", Nat. Commun. 13, 2453 (2022); A. Musaelian et al., "Learning local equivariant representations for
        large-scale atomistic dynamics", Nat. Commun. 14, 579 (2023).
    """

    takes_empty_batches = True

    def __init__(
        self,
        model: nn.Module,
        shifts: Sequence[float],
        stress: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.references = ReferenceEnergies(shifts)  # before the model, whose own shifts are zero
        self.model = model
        self.derive_stress = bool(stress)
        self.config = None if config is None else dict(config)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predictions of the batch.

        Returns:
            ``total_energy`` ``[num_graphs, 1]`` and ``atomic_energy`` ``[num_atoms, 1]`` in eV, float64; ``forces``
            ``[num_atoms, 3]`` in eV/Å; and, if it is asked for, ``stress`` ``[num_graphs, 3, 3]`` in eV/Å³.
        """
        # Validation loops run in inference mode, whose tensors autograd refuses; copies of them are ordinary tensors.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = {name: batch[name].clone() for name in _READ}
            if inputs["pos"].shape[0] == 0:
                outputs = self._of_no_atoms(inputs)
            else:
                periodic = batch["pbc"].all(dim=-1) if "pbc" in batch else torch.ones_like(inputs["num_atoms"]).bool()
                outputs = self._predict(inputs, periodic)
        return outputs if self.training else {name: value.detach() for name, value in outputs.items()}

    def _predict(self, inputs: dict[str, Tensor], periodic: Tensor) -> dict[str, Tensor]:
        found = self.model(inputs)
        energy = found["total_energy"].double()
        # a loss of forces alone does not reach every parameter, but DDP waits for a gradient of each
        zero = 0.0 * energy.sum()
        outputs = {
            "total_energy": energy + self.references(inputs),
            "atomic_energy": found["atomic_energy"].double() + self.references.of_atoms(inputs),
            "forces": found["forces"] + zero.to(found["forces"].dtype),
        }
        if self.derive_stress:
            # NaN without a volume; where() keeps it out of the values, and NequIP keeps it out of the gradients
            stress = torch.where(periodic[:, None, None], found["stress"], 0.0)
            outputs["stress"] = stress + zero.to(stress.dtype)
        return outputs

    def _of_no_atoms(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions of no graphs, which depend on every parameter; NequIP cannot be called without atoms."""
        position = inputs["pos"]
        zero = connected_zero(self.model, position)
        energy = position.new_zeros(0, 1).double() + zero.double()
        outputs = {"total_energy": energy, "atomic_energy": energy, "forces": position + zero}
        if self.derive_stress:
            outputs["stress"] = inputs["cell"] + zero.to(inputs["cell"].dtype)
        return outputs


def nequip_force_field(
    statistics: TypeStatistics,
    *,
    cutoff: Positive,
    num_layers: Count = 4,
    l_max: Order = 1,
    parity: bool = True,
    num_features: Count | Sequence[Order] = 32,
    radial_mlp_depth: Order = 1,
    radial_mlp_width: Count = 128,
    avg_num_neighbors: Positive | Mapping[str, Positive] | None = None,
    energy_shifts: Mapping[str, float] | str | os.PathLike[str] = "fit",
    energy_scales: Mapping[str, float] | str | float = "force_rms",
    stress: bool = True,
    dtype: WeightsDtype = "float32",
    compile_mode: Annotated[str, OneOf("eager", "compile")] = "eager",
    seed: int = 0,
    **options: Any,
) -> NequIPForceField:
    """NequIP with the references, scales and mean number of neighbours of its training set.

    Args:
        statistics: ``type_names``, ``energy_shifts``, ``force_rms`` and ``mean_neighbors`` of the training set.
        cutoff: in Å; that of the neighbour lists.
        num_layers: interaction blocks.
        l_max: largest order of the features.
        parity: include features of odd mirror parity.
        num_features: of every order, or a number for each order.
        radial_mlp_depth: hidden layers of the radial network.
        radial_mlp_width: neurons of a hidden layer.
        avg_num_neighbors: by whose root sums over neighbours are divided; that of the training set if None.
        energy_shifts: see :func:`~harness.models.scale_shift.resolve_shifts`.
        energy_scales: see :func:`~harness.models.scale_shift.resolve_scales`.
        stress: predict stresses.
        dtype: of the weights, ``float32`` or ``float64``. NequIP's own practice is float32 weights on float64
            positions: ``precision=float32-on-float64``.
        compile_mode: ``eager`` or ``compile``, as NequIP takes it.
        seed: of the initial weights.
        options: further arguments of ``nequip.model.NequIPGNNModel``.

    Raises:
        ModuleNotFoundError: nequip is not installed.
        ValueError: arguments that NequIP refuses.
    """
    return _build(
        "NequIP",
        "nequip.model.NequIPGNNModel",
        statistics,
        stress=stress,
        energy_shifts=energy_shifts,
        energy_scales=energy_scales,
        seed=seed,
        model_dtype=dtype,
        compile_mode=compile_mode,
        r_max=float(cutoff),
        num_layers=num_layers,
        l_max=l_max,
        parity=parity,
        num_features=num_features if isinstance(num_features, int) else list(num_features),
        radial_mlp_depth=radial_mlp_depth,
        radial_mlp_width=radial_mlp_width,
        avg_num_neighbors=avg_num_neighbors,
        **options,
    )


def allegro_force_field(
    statistics: TypeStatistics,
    *,
    cutoff: Positive,
    num_layers: Count = 2,
    l_max: Order = 1,
    parity: bool = True,
    num_scalar_features: Count = 64,
    num_tensor_features: Count = 16,
    radial_chemical_embed: Mapping[str, Any] | None = None,
    avg_num_neighbors: Positive | Mapping[str, Positive] | None = None,
    energy_shifts: Mapping[str, float] | str | os.PathLike[str] = "fit",
    energy_scales: Mapping[str, float] | str | float = "force_rms",
    stress: bool = True,
    dtype: WeightsDtype = "float32",
    compile_mode: Annotated[str, OneOf("eager", "compile")] = "eager",
    seed: int = 0,
    **options: Any,
) -> NequIPForceField:
    """Allegro with the references, scales and mean number of neighbours of its training set.

    Args:
        statistics: see :func:`nequip_force_field`, as for all arguments that are not listed here.
        cutoff: in Å.
        num_layers: Allegro layers.
        l_max: largest order of the spherical harmonics.
        parity: include features of odd mirror parity.
        num_scalar_features: scalar features of an edge.
        num_tensor_features: tensor features of an edge.
        radial_chemical_embed: config with the ``_target_`` of the embedding of distance and types; Bessel functions
            with 8 terms if None.
        avg_num_neighbors: by whose root sums over neighbours are divided.
        energy_shifts: in eV.
        energy_scales: in eV.
        stress: predict stresses.
        dtype: of the weights.
        compile_mode: ``eager`` or ``compile``.
        seed: of the initial weights.
        options: further arguments of ``allegro.model.AllegroModel``.

    Raises:
        ModuleNotFoundError: nequip-allegro is not installed.
        ValueError: arguments that Allegro refuses.
    """
    embed = radial_chemical_embed or {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8}
    return _build(
        "Allegro",
        "allegro.model.AllegroModel",
        statistics,
        stress=stress,
        energy_shifts=energy_shifts,
        energy_scales=energy_scales,
        seed=seed,
        model_dtype=dtype,
        compile_mode=compile_mode,
        r_max=float(cutoff),
        num_layers=num_layers,
        l_max=l_max,
        parity=parity,
        num_scalar_features=num_scalar_features,
        num_tensor_features=num_tensor_features,
        radial_chemical_embed=dict(embed),
        avg_num_neighbors=avg_num_neighbors,
        **options,
    )


def _build(
    name: str,
    target: str,
    statistics: TypeStatistics,
    *,
    stress: bool,
    energy_shifts: Any,
    energy_scales: Any,
    **arguments: Any,
) -> NequIPForceField:
    """The force field of a function that builds models of the ``nequip`` package, by its dotted path."""
    names = list(statistics.type_names)
    unfit = [type_name for type_name in names if not type_name.isalnum()]
    if unfit:
        raise ValueError(f"{name} takes type names of letters and digits only, found {unfit}.")
    if arguments["avg_num_neighbors"] is None:
        arguments["avg_num_neighbors"] = float(statistics.mean_neighbors)  # type: ignore[attr-defined]
    scales = dict(zip(names, resolve_scales(energy_scales, statistics), strict=True))
    with guest():
        try:
            from nequip.utils.global_state import set_global_state

            module, _, function = target.rpartition(".")
            build = getattr(import_module(module), function)
        except ModuleNotFoundError as error:
            raise missing_package(error, name, name.lower()) from error
        set_global_state()
        arguments = dict(  # rather than a display: an argument that is given twice is an error
            type_names=names,
            per_type_energy_scales=scales,
            per_type_energy_shifts=dict.fromkeys(names, 0.0),
            do_derivatives=True,
            **arguments,
        )
        try:
            model = build(**arguments)
        except AssertionError as error:
            raise ValueError(f"{name} refuses its arguments: {reason(error)}") from error
    shifts = resolve_shifts(energy_shifts, statistics)
    return NequIPForceField(model, shifts, stress, config={"_target_": target, **arguments})
