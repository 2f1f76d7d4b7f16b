"""Files of other packages' models, written as these packages write them: small, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.support.guest import guest

REFERENCES = {"H": -13.6, "C": -1027.25, "O": -2040.5, "Cu": -45000.125}
NAMES = tuple(REFERENCES)
SUFFIX = {"mace": "model", "nequip": "ckpt", "allegro": "ckpt", "sevennet": "pth"}


def write(name: str, path: Path, dtype: str = "float64", **changes: Any) -> Any:
    """A model of the package for H, C, O and Cu in a file of its own; what the package made is returned."""
    return _WRITERS[name](path, dtype, changes)


def _mace(path: Path, dtype: str, changes: dict[str, Any]) -> nn.Module:
    with guest(getattr(torch, dtype)):
        import mace.modules as modules
        from e3nn import o3

        torch.manual_seed(1)
        heads = changes.get("heads", ["Default"])
        arguments: dict[str, Any] = {
            "r_max": 4.0,
            "num_bessel": 5,
            "num_polynomial_cutoff": 5,
            "max_ell": 2,
            "interaction_cls": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            "interaction_cls_first": modules.interaction_classes["RealAgnosticInteractionBlock"],
            "num_interactions": 2,
            "num_elements": len(NAMES),
            "hidden_irreps": o3.Irreps("4x0e+4x1o"),
            "MLP_irreps": o3.Irreps("4x0e"),
            "atomic_energies": np.array([list(REFERENCES.values())] * len(heads)),
            "avg_num_neighbors": 9.3,
            "atomic_numbers": [1, 6, 8, 29],
            "correlation": 2,
            "gate": torch.nn.functional.silu,
            "radial_MLP": [8],
            "atomic_inter_scale": [1.7] * len(heads),
            "atomic_inter_shift": [0.13] * len(heads),
            "heads": heads,
        }
        model = modules.ScaleShiftMACE(**arguments | changes)
        torch.save(model, path)
    return model


def _nequip(path: Path, dtype: str, changes: dict[str, Any], **arguments: Any) -> nn.Module:
    """A checkpoint with the entries that ``nequip-train`` writes and its own loaders read."""
    section = {
        "seed": 4,
        "model_dtype": dtype,
        "type_names": list(NAMES),
        "r_max": 4.0,
        "avg_num_neighbors": 11.5,
        "per_type_energy_scales": 1.7,
        "per_type_energy_shifts": REFERENCES,
        **arguments,
        **changes,
    }
    with guest():
        from nequip.train import NequIPLightningModule
        from nequip.utils import get_current_code_versions
        from nequip.utils.global_state import get_latest_global_state, set_global_state

        set_global_state()
        info = {
            "versions": get_current_code_versions(),
            "training_module": {"_target_": "nequip.train.NequIPLightningModule", "model": section},
            "data": {},
            "trainer": {},
            "global_options": get_latest_global_state(),
            "runs": ["train"],
        }
        options = {"model": section, "num_datasets": {"train": 1, "val": 0, "test": 0, "predict": 0}, "info_dict": info}
        module = NequIPLightningModule(**options)
    checkpoint = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.6", "loops": {}}
    torch.save({**checkpoint, "state_dict": module.state_dict(), "hyper_parameters": options}, path)
    return module.model["sole_model"]  # type: ignore[no-any-return, index]


def _gnn(path: Path, dtype: str, changes: dict[str, Any]) -> nn.Module:
    sizes = {"num_layers": 2, "num_features": 4, "radial_mlp_width": 8}
    return _nequip(path, dtype, changes, _target_="nequip.model.NequIPGNNModel", **sizes)


def _allegro(path: Path, dtype: str, changes: dict[str, Any]) -> nn.Module:
    sizes = {
        "num_layers": 1,
        "l_max": 1,
        "num_scalar_features": 8,
        "num_tensor_features": 4,
        "allegro_mlp_hidden_layers_width": 8,
        "scalar_embed_mlp_hidden_layers_width": 8,
        "readout_mlp_hidden_layers_width": 8,
        "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8},
    }
    return _nequip(path, dtype, changes, _target_="allegro.model.AllegroModel", **sizes)


def _sevennet(path: Path, dtype: str, changes: dict[str, Any]) -> nn.Module:
    with guest(torch.float32):
        import sevenn
        from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
        from sevenn.model_build import build_E3_equivariant_model

        torch.manual_seed(1)
        config = {
            **DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG,
            "version": sevenn.__version__,
            "cutoff": 4.0,
            "channel": 4,
            "num_convolution_layer": 2,
            "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 6},
            "cutoff_function": {"cutoff_function_name": "XPLOR", "cutoff_on": 3.5},
            "weight_nn_hidden_neurons": [8],
            "conv_denominator": 7.5,
            "shift": list(REFERENCES.values()),
            "scale": [1.7, 1.1, 2.3, 0.9],
            "_type_map": {1: 0, 6: 1, 8: 2, 29: 3},
            "_number_of_species": 4,
            "chemical_species": list(NAMES),
            **changes,
        }
        model = build_E3_equivariant_model(config).to(getattr(torch, dtype))
    torch.save({"config": config, "model_state_dict": model.state_dict(), "epoch": 1, "time": "", "hash": ""}, path)
    return model  # type: ignore[no-any-return]


_WRITERS = {"mace": _mace, "nequip": _gnn, "allegro": _allegro, "sevennet": _sevennet}
