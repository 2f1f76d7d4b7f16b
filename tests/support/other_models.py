"""Small models of other packages, and the call of each package's own forward for comparison."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.scale_shift import TypeStatistics

CUTOFF = 4.0
PACKAGES = {"mace": "mace", "nequip": "nequip", "allegro": "allegro", "sevennet": "sevenn"}
INSTALLED = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def build(name: str, statistics: TypeStatistics, dtype: str = "float64", **options: Any) -> nn.Module:
    """A small model of the package."""
    return _BUILDERS[name](statistics, dtype=dtype, cutoff=CUTOFF, seed=3, **options)


def _mace(statistics: TypeStatistics, **options: Any) -> nn.Module:
    from harness.models.mace import mace_force_field

    sizes = {"channels": 4, "max_ell": 2, "correlation": 2, "num_bessel": 4, "radial_mlp": [8], "mlp_irreps": "4x0e"}
    return mace_force_field(statistics, **{**sizes, **options})


def _nequip(statistics: TypeStatistics, **options: Any) -> nn.Module:
    from harness.models.nequip import nequip_force_field

    return nequip_force_field(statistics, **{"num_layers": 2, "num_features": 4, "radial_mlp_width": 8, **options})


def _allegro(statistics: TypeStatistics, **options: Any) -> nn.Module:
    from harness.models.nequip import allegro_force_field

    sizes = {
        "num_layers": 1,
        "num_scalar_features": 8,
        "num_tensor_features": 4,
        "allegro_mlp_hidden_layers_width": 8,
        "scalar_embed_mlp_hidden_layers_width": 8,
        "readout_mlp_hidden_layers_width": 8,
    }
    return allegro_force_field(statistics, **{**sizes, **options})


def _sevennet(statistics: TypeStatistics, **options: Any) -> nn.Module:
    from harness.models.sevennet import sevennet_force_field

    sizes = {"channels": 4, "num_convolution_layer": 2, "weight_nn_hidden_neurons": [8]}
    return sevennet_force_field(statistics, **{**sizes, **options})


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mace": _mace,
    "nequip": _nequip,
    "allegro": _allegro,
    "sevennet": _sevennet,
}


def own_forward(name: str, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Predictions by the forward of the package itself, with the same weights and references."""
    return _OWN[name](model.train(), {key: value.clone() for key, value in batch.items()})


def _own_mace(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    inner, shifts = model.energy_model.energy_model, model.energy_model.shifts
    mace, counts = inner.mace, batch["num_atoms"]
    mace.atomic_energies_fn.atomic_energies[inner.elements] = shifts.to(mace.atomic_energies_fn.atomic_energies.dtype)
    center = batch["edge_index"][0]
    outputs = mace(
        {
            "positions": batch["pos"],
            "node_attrs": nn.functional.one_hot(inner.elements[batch["atom_types"]], len(shifts)).to(
                batch["pos"].dtype
            ),
            "edge_index": batch["edge_index"],
            "unit_shifts": batch["edge_cell_shift"],
            "shifts": torch.einsum("ea,eab->eb", batch["edge_cell_shift"], batch["cell"][batch["batch"][center]]),
            "cell": batch["cell"].reshape(-1, 3),
            "batch": batch["batch"],
            "ptr": torch.cat((counts.new_zeros(1), counts.cumsum(0))),
        },
        training=True,
        compute_force=True,
        compute_stress=True,
    )
    mace.atomic_energies_fn.atomic_energies.zero_()
    return {
        "total_energy": outputs["energy"].reshape(-1, 1),
        "forces": outputs["forces"],
        "stress": outputs["stress"],
    }


def _own_nequip(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    from nequip.nn import PerTypeScaleShift

    (shift,) = [part for part in model.model.modules() if isinstance(part, PerTypeScaleShift)]
    before = shift.shifts.clone()
    shift.shifts.copy_(model.references.shifts.reshape(shift.shifts.shape))
    outputs = model.model(batch)
    shift.shifts.copy_(before)
    return {name: outputs[name] for name in ("total_energy", "forces", "stress")}


def _own_sevennet(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two layers that the adapter leaves out, after those that it runs."""
    from sevenn.nn.force_output import ForceStressOutputFromEdge
    from sevenn.nn.linear import AtomReduce
    from sevenn.nn.sequential import AtomGraphSequential

    from harness.models.geometry import edge_vectors

    inner, shifts = model.energy_model.energy_model, model.energy_model.shifts

    class Exact(nn.Module):
        """sevenn's one-hot vectors are float32."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
            data = self.layer(data)
            return {**data, "x": data["x"].to(shifts.dtype), "node_attr": data["node_attr"].to(shifts.dtype)}

    layers = dict(inner.layers.items())
    layers["onehot_idx_to_onehot"] = Exact(layers["onehot_idx_to_onehot"])
    layers["reduce_total_enegy"] = AtomReduce(data_key_in="atomic_energy", data_key_out="inferred_total_energy")
    layers["force_output"] = ForceStressOutputFromEdge()
    whole = AtomGraphSequential(
        layers,
        cutoff=CUTOFF,
        type_map={int(z): int(t) for z, t in zip(batch["atomic_numbers"], batch["atom_types"], strict=True)},
        data_key_grad="edge_vec",
    ).train()
    scale_shift = whole.rescale_atomic_energy
    scale_shift.shift.data.copy_(shifts)
    outputs = whole(
        {**batch, "edge_vec": edge_vectors(batch).detach(), "cell_volume": torch.linalg.det(batch["cell"]).abs()}
    )
    scale_shift.shift.data.zero_()
    xx, yy, zz, xy, yz, zx = (-outputs["inferred_stress"]).unbind(-1)  # in sevenn's order and sign
    stress = torch.stack((xx, xy, zx, xy, yy, yz, zx, yz, zz), dim=-1).reshape(-1, 3, 3)
    return {
        "total_energy": outputs["inferred_total_energy"].reshape(-1, 1),
        "forces": outputs["inferred_force"],
        "stress": stress,
    }


_OWN: dict[str, Callable[..., dict[str, Tensor]]] = {
    "mace": _own_mace,
    "nequip": _own_nequip,
    "allegro": _own_nequip,
    "sevennet": _own_sevennet,
}
