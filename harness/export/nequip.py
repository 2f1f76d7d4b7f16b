"""Checkpoint of NequIP's own from a NequIP or Allegro model: what its training would have written."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ase.io
import lightning
import torch
from ase import Atoms
from omegaconf import OmegaConf
from torch import Tensor, nn

from harness.export.format import Format
from harness.models.nequip import NequIPForceField
from harness.models.packages import missing_package
from harness.support.guest import guest

__all__ = ["NequIPFormat", "nequip_checkpoint", "nequip_predictions"]


class NequIPFormat(Format):
    """A checkpoint of NequIP's training, for ``nequip-package``, ``nequip-compile`` and ``ModelFromCheckpoint``."""

    name = "nequip"
    models = ("nequip", "allegro")
    suffix = "-nequip.ckpt"

    def takes(self, model: nn.Module) -> bool:
        """True for a force field around a model of NequIP's kind."""
        return isinstance(model, NequIPForceField)

    def content(self, model: nn.Module, example: Atoms, dtype: torch.dtype | None) -> dict[str, Any]:
        """The checkpoint."""
        return nequip_checkpoint(cast(NequIPForceField, model), example)

    def predictions(
        self, path: Path, example: Atoms, batch: Mapping[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """By the model of ``ModelFromCheckpoint``."""
        return nequip_predictions(path, batch)

    def uses(self, file: Path, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """NequIP's archive, its compiled models for ASE and for LAMMPS."""
        stem = file.with_name(file.name.removesuffix(self.suffix).removesuffix(file.suffix))
        config = cast(NequIPForceField, model).config or {}
        pair = "pair_allegro" if config.get("_target_") == "allegro.model.AllegroModel" else "pair_nequip"
        return [
            f"nequip-package build {file} {stem}.nequip.zip",
            f"nequip-compile {file} {stem}.nequip.pt2 --mode aotinductor --device cpu --target ase",
            f'NequIPCalculator.from_compiled_model("{stem}.nequip.pt2", device="cpu")',
            f"nequip-compile {file} {stem}-lammps.nequip.pt2 --mode aotinductor --device cuda --target {pair}",
        ]


def nequip_checkpoint(force_field: NequIPForceField, example: Atoms) -> dict[str, Any]:
    """Checkpoint that ``nequip.model.ModelFromCheckpoint``, ``nequip-package`` and ``nequip-compile`` take.

    It has the weights, the references of the training as NequIP's own energy shifts, and in ``hyper_parameters`` the
    config of the model. ``nequip-package`` and ``nequip-compile`` want an example of the data: it is ``example``, whose
    text is part of the config. The checkpoint holds tensors, numbers, strings, lists and dictionaries alone.

    Args:
        force_field: that was trained.
        example: a structure of elements that the model knows.

    Raises:
        ModuleNotFoundError: nequip, or the package of the model, is not installed.
        ValueError: the model was not built from a config.
    """
    if force_field.config is None:
        raise ValueError(
            "The model was not built by nequip_force_field or allegro_force_field: there is no config that NequIP "
            "could build it from."
        )
    with guest():
        try:
            from nequip.nn import PerTypeScaleShift
            from nequip.train import NequIPLightningModule
            from nequip.utils import get_current_code_versions
            from nequip.utils.global_state import get_latest_global_state, set_global_state
        except ModuleNotFoundError as error:
            raise missing_package(error, "NequIP", "nequip") from error
        set_global_state()
        config: Any = OmegaConf.to_container(OmegaConf.create(dict(force_field.config)), resolve=True)
        config["compile_mode"] = "eager"
        references = force_field.references.shifts.detach().cpu()
        weights, shifts = _with_references(force_field.model, references, PerTypeScaleShift)
        config["per_type_energy_shifts"] = dict(zip(config["type_names"], shifts.tolist(), strict=True))
        arguments: dict[str, Any] = {
            "model": config,
            "num_datasets": {"train": 1, "val": 1, "test": 0, "predict": 0},
            "optimizer": None,
            "lr_scheduler": None,
            "loss": None,
            "train_metrics": None,
            "val_metrics": None,
            "test_metrics": None,
            "info_dict": {
                "versions": get_current_code_versions(verbose=False),
                "data": _data_config(example, config["type_names"], config["r_max"]),
                "trainer": {},
                "global_options": dict(get_latest_global_state()),
                "runs": ["train"],
                "training_module": {"_target_": "nequip.train.NequIPLightningModule", "model": config},
            },
        }
        module = NequIPLightningModule(**arguments)
        (built,) = module.model.values()
        built.load_state_dict(weights)
        state = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": state,
        "hparams_name": "kwargs",
        "hyper_parameters": arguments,
    }


def nequip_predictions(path: Path, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Predictions of the model in a checkpoint of NequIP, as NequIP loads it.

    Args:
        path: of a file that is trusted: NequIP unpickles it.
        batch: with the names of NequIP, which are those of this package.
    """
    with guest():
        from nequip.model import ModelFromCheckpoint
        from nequip.utils.global_state import set_global_state

        set_global_state()
        (model,) = ModelFromCheckpoint(str(path)).values()
        model.eval()
        predictions: dict[str, Tensor] = model({name: value.clone() for name, value in batch.items()})
    return {name: predictions[name].detach() for name in ("total_energy", "forces", "stress")}


def _with_references(model: nn.Module, references: Tensor, layer: type[nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
    """Weights of the model with the references in its layer of scales and shifts; its shifts then, in eV, float64."""
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    (name,) = [name for name, part in model.named_modules() if isinstance(part, layer)]
    own = weights[f"{name}.shifts"].double()
    shifts = own + references.reshape(own.shape)
    weights[f"{name}.shifts"] = shifts
    return weights, shifts.flatten()


def _data_config(example: Atoms, type_names: list[str], cutoff: float) -> dict[str, Any]:
    """Config of a data module of NequIP with one structure, which is in the config itself."""
    text = io.StringIO()
    ase.io.write(text, example, format="extxyz")
    dataset = {
        "_target_": "nequip.data.dataset.ASEDataset",
        "file_path": {"_target_": "io.StringIO", "initial_value": text.getvalue()},  # as good as an open file
        "ase_args": {"format": "extxyz"},
        "transforms": [
            {
                "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                "model_type_names": list(type_names),
                "chemical_species_to_atom_type_map": {name: name for name in type_names},
            },
            {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": cutoff},
        ],
    }
    return {
        "_target_": "nequip.data.datamodule.NequIPDataModule",
        "seed": 0,
        "train_dataset": dataset,
        "val_dataset": dataset,
    }
