"""A ``.model`` file of MACE: the module that its calculator and its tools unpickle."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor, nn

from harness.export.format import Format, parts_of
from harness.models.heads import heads_of
from harness.models.mace import MACEEnergy
from harness.models.packages import missing_package
from harness.support.guest import guest

__all__ = ["MACEFormat", "mace_module", "mace_predictions"]


class MACEFormat(Format):
    """A pickled ``ScaleShiftMACE``, for ``MACECalculator``, ``mace_eval_configs`` and ``mace_create_lammps_model``."""

    name = "mace"
    models = ("mace",)
    suffix = ".model"
    has_dtype = True

    def takes(self, model: nn.Module) -> bool:
        """True for a force field whose atomic energies are those of MACE."""
        return parts_of(model, MACEEnergy) is not None

    def content(self, model: nn.Module, example: Atoms, dtype: torch.dtype | None) -> nn.Module:
        """The module."""
        return mace_module(model, dtype)

    def predictions(
        self, path: Path, example: Atoms, batch: Mapping[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """By ``MACECalculator``, with the head that the batch names."""
        return mace_predictions(path, example, int(batch["set_index"]) if "set_index" in batch else None)

    def uses(self, file: Path, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """ASE, MACE's own evaluation, LAMMPS."""
        name = str(dtype).removeprefix("torch.")
        heads = heads_of(model)
        of_python, of_shell = (f', head="{heads[0]}"', f" --head {heads[0]}") if heads else ("", "")
        return [
            f'MACECalculator(model_paths="{file}", device="cpu", default_dtype="float64"{of_python})',
            f"mace_eval_configs --model {file} --configs structures.xyz --output predicted.xyz --default_dtype {name}"
            f"{of_shell}",
            f"mace_create_lammps_model {file}{of_shell}",
        ]

    def remarks(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Rounding of the references, if it is more than 1e-6 eV."""
        parts = parts_of(model, MACEEnergy)
        exact = parts[0].shifts.detach().double() if parts else torch.zeros(1)
        rounding = float((exact - exact.to(dtype).double()).abs().max())
        if rounding < 1e-6:
            return []
        name = str(dtype).removeprefix("torch.")
        return [f"reference energies are rounded to {name}, by up to {rounding:.1g} eV; --dtype float64 keeps them"]


def mace_module(force_field: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    r"""The ``ScaleShiftMACE`` of a force field on the CPU, with the references of the training as its atomic energies.

    Atomic energies are ``[num_heads, num_elements]``, scale and shift ``[num_heads]``, as ``mace_run_train`` writes
    them, also for one head. Weights for fused kernels (cuEquivariance, OpenEquivariance) become those of e3nn by
    MACE's own converters.

    Args:
        force_field: of MACE, see :meth:`MACEFormat.takes`.
        dtype: of the weights and atomic energies; None for that of the training. MACE has all in one dtype: float32
            rounds atomic energies of -1000 eV by up to 3e-5 eV.

    Returns:
        A copy, in evaluation mode.

    Raises:
        TypeError: a force field of another kind.
        ValueError: an energy scale for each type, which MACE does not have.
    """
    parts = parts_of(force_field, MACEEnergy)
    if parts is None:
        raise TypeError(f"a force field of MACE was expected, found {type(force_field).__name__} of another model")
    outer, energy = parts
    scales = outer.scales.detach().cpu().double()
    if not torch.equal(scales, scales[:1].expand_as(scales)):
        raise ValueError(f"MACE has one energy scale for all elements; this model has {scales.tolist()}.")
    model: Any = _for_e3nn(copy.deepcopy(energy.mace).cpu())
    model = model.to(dtype) if dtype is not None else model
    elements = energy.elements.cpu()
    with torch.no_grad():
        own = model.atomic_energies_fn.atomic_energies
        references = torch.empty(outer.shifts.shape, dtype=torch.float64)
        references[..., elements] = outer.shifts.detach().cpu()
        model.atomic_energies_fn.atomic_energies = (torch.atleast_2d(own.double()) + references).to(own.dtype)
        scale_shift = model.scale_shift
        scale_shift.scale = torch.atleast_1d(scale_shift.scale.double() * scales[0]).to(own.dtype)
        scale_shift.shift = torch.atleast_1d(scale_shift.shift.double() * scales[0]).to(own.dtype)
    return model.eval()


def mace_predictions(path: Path, atoms: Atoms, head: int | None = None) -> dict[str, Tensor]:
    """Predictions of a ``.model`` file by MACE's calculator in float64, with the shapes of this package.

    Args:
        path: of a file that is trusted: it is unpickled.
        atoms: one structure.
        head: position of the head among those of a model with several.

    Raises:
        ModuleNotFoundError: mace-torch is not installed.
    """
    with guest():
        try:
            with redirect_stdout(None):  # where fused kernels are not installed, it prints so
                from mace.calculators import MACECalculator
        except ModuleNotFoundError as error:
            raise missing_package(error, "MACE", "mace") from error
        # loaded here: the calculator relies on a variable that is only set where mace is imported for the first time
        model = torch.load(path, map_location="cpu", weights_only=False).double()
        chosen = {} if head is None else {"head": model.heads[head]}
        calculator = MACECalculator(models=model, device="cpu", default_dtype="float64", **chosen)
        calculator.calculate(atoms)
    found = calculator.results
    return {
        "total_energy": torch.tensor([[float(found["energy"])]], dtype=torch.float64),
        "forces": torch.as_tensor(found["forces"], dtype=torch.float64),
        "stress": torch.as_tensor(voigt_6_to_full_3x3_stress(found["stress"]), dtype=torch.float64)[None],
    }


def _for_e3nn(model: nn.Module) -> nn.Module:
    """The same model without the layers of fused kernels, which need a package and mostly a GPU."""
    packages = {type(part).__module__.partition(".")[0] for part in model.modules()}
    with guest(next(model.parameters()).dtype):
        if "cuequivariance_torch" in packages:
            from mace.cli.convert_cueq_e3nn import run as from_cuequivariance

            return from_cuequivariance(model, device="cpu")  # type: ignore[no-any-return]
        if "openequivariance" in packages:
            from mace.cli.convert_oeq_e3nn import run as from_openequivariance

            return from_openequivariance(model, device="cpu")  # type: ignore[no-any-return]
    return model
