"""Models and data modules of users who made a mistake, for the table of bad inputs; named there by `_target_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ase.build import bulk
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness.data import Frame, collate, frame_to_sample
from harness.metrics import MeanAbsoluteError

Predictions = dict[str, Tensor]


class Pairs(nn.Module):
    """A model without a mistake, in a few lines: energies of pairs by a polynomial, forces by autograd."""

    def __init__(self, change: Callable[[Predictions], Any] | None = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.1, -0.2]))
        self.change = change

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        with torch.enable_grad():
            position = batch["pos"].detach().requires_grad_()
            center, neighbor = batch["edge_index"]
            cell = batch["cell"][batch["batch"][center]]
            vectors = position[neighbor] - position[center] + torch.einsum("ea,eab->eb", batch["edge_cell_shift"], cell)
            squares = 1 / (1 + vectors.square().sum(dim=1))
            of_edges = self.weights[0] * squares + self.weights[1] * squares.square()
            energy = torch.zeros(len(batch["num_atoms"])).index_add(0, batch["batch"][center], of_edges)[:, None]
            (gradient,) = torch.autograd.grad(energy.sum(), position, create_graph=True)
        predictions = {"total_energy": energy, "forces": -gradient}
        return predictions if self.change is None else self.change(predictions)


def fine() -> nn.Module:
    return Pairs()


def no_dictionary() -> nn.Module:
    return Pairs(lambda predictions: predictions["total_energy"])


def without_forces() -> nn.Module:
    return Pairs(lambda predictions: {"total_energy": predictions["total_energy"]})


def flat_energy() -> nn.Module:
    return Pairs(lambda predictions: {**predictions, "total_energy": predictions["total_energy"].squeeze(1)})


def forces_of_one_column() -> nn.Module:
    return Pairs(lambda predictions: {**predictions, "forces": predictions["forces"][:, :1]})


def whole_numbers() -> nn.Module:
    return Pairs(lambda predictions: {**predictions, "forces": predictions["forces"].long()})


def detached() -> nn.Module:
    return Pairs(lambda predictions: {name: value.detach() for name, value in predictions.items()})


def not_a_number() -> nn.Module:
    return Pairs(lambda predictions: {**predictions, "forces": predictions["forces"] / 0.0})


def infinite_slope() -> nn.Module:
    def change(predictions: Predictions) -> Predictions:
        return {**predictions, "forces": predictions["forces"] + (predictions["total_energy"].sum() * 0).sqrt()}

    return Pairs(change)


def raising() -> nn.Module:
    def change(predictions: Predictions) -> Predictions:
        raise RuntimeError("my own mistake")

    return Pairs(change)


def with_other_dtype() -> nn.Module:
    model = Pairs()
    model.extra = nn.Linear(3, 3).double()
    model.change = lambda predictions: {**predictions, "forces": model.extra(predictions["forces"])}
    return model


def frozen() -> nn.Module:
    return Pairs().requires_grad_(False)


def with_unused_parameter() -> nn.Module:
    model = Pairs()
    model.never_used = nn.Parameter(torch.ones(2))
    return model


def raising_constructor() -> nn.Module:
    raise RuntimeError("cannot be made")


class _CompiledAsByNequIP(Pairs):
    is_compile_graph_model = True


def compiled_as_by_nequip() -> nn.Module:
    return _CompiledAsByNequIP()


class _Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        self.change = change

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.rattle(0.05, seed=index)
        frame = Frame(atoms, energy=-1.0, forces=atoms.positions * 0.1, index=index)
        return frame_to_sample(frame, ["Cu"], 3.5, index)


class Changed(LightningDataModule):
    """Batches of copper that a function has changed."""

    type_names = ("Cu",)

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = _CHANGES[change]
        self.dataset = _Samples(self.change)

    def setup(self, stage: str | None = None) -> None:
        pass

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=2, collate_fn=lambda samples: self.change(collate(samples)))

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader()


def _set(**values: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, function in values.items():
            if function is None:
                del batch[name]
            else:
                batch[name] = function(batch[name])
        return batch

    return change


_CHANGES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "none": lambda batch: batch,
    "list": lambda batch: list(batch.values()),
    "no_forces": _set(forces=None),
    "no_num_atoms": _set(num_atoms=None),
    "short_forces": _set(forces=lambda value: value[:-1]),
    "flat_forces": _set(forces=lambda value: value[:, 0]),
    "integer_positions": _set(pos=lambda value: value.long()),
    "type_7": _set(atom_types=lambda value: value + 7),
    "float_types": _set(atom_types=lambda value: value.float()),
    "nan_positions": _set(pos=lambda value: value * float("nan")),
    "edge_out_of_range": _set(edge_index=lambda value: value + 5),
    "graph_out_of_range": _set(batch=lambda value: value + 1),
    "wrong_count": _set(num_atoms=lambda value: value + 1),
    "nan_labels": _set(forces=lambda value: value * float("nan")),
    "no_atoms": lambda batch: {
        name: value[..., :0] if name == "edge_index" else value[:0] for name, value in batch.items()
    },
}


class NaNAt(MeanAbsoluteError):
    """A metric that is NaN in some of the batches that it measures, counted from 0."""

    def __init__(self, at: Sequence[int]) -> None:
        super().__init__()
        self.at, self.measured = list(at), 0

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        errors = super().measure(prediction, target)
        self.measured += 1
        return errors * float("nan") if self.measured - 1 in self.at else errors

    def __str__(self) -> str:
        return "nan_at"
