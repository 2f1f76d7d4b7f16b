"""One small step on copies before a training, for mistakes that would end it in the first batch.

A few frames go through the model, the loss, the metrics and the backward pass, on the CPU, on every rank for itself.
Nothing is written or sent, and the training is the same without it: model and managers are copied, samplers are not
used, and random states are put back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from harness.data import AtomsDataset, collate
from harness.data.batch_fields import ExtraField
from harness.data.device_neighbors import with_edges
from harness.data.facts import LABELS, MISSING
from harness.distributed import launched_ranks
from harness.fields import ATOM_TYPES, NUM_ATOMS, Batch, registered_fields
from harness.metrics import MetricsManager, Values, step_together
from harness.module import ForceFieldModule
from harness.module.empty_batches import empty_like, fields_read, takes_empty_batches
from harness.strategies import FlatStrategy
from harness.support.lightning_private import ddp_options
from harness.support.text import reason, some

__all__ = ["check_batch", "check_first_batch"]

_NUM_FRAMES = 2  # more than one, so that the dimension of graphs differs from one of size 1
_MISTAKES = (ValueError, TypeError, KeyError)


def check_first_batch(module: ForceFieldModule, datamodule: LightningDataModule, trainer: Trainer, train: bool) -> None:
    """Refuse a model, loss or metrics that cannot work on the batches of the data.

    Of the training set, and of the first validation set, the two smallest frames with all labels are taken (the first
    two of a data set that is not :class:`~harness.data.AtomsDataset`; data without a length are not looked at). On
    several ranks, a batch without graphs is tried as well, as a rank without frames has.

    Args:
        module: of the training; it stays as it is, but learns the shapes of the model's predictions.
        datamodule: its data, set up.
        trainer: for its precision, and its strategy: DDP needs a gradient of every parameter.
        train: try a training step, too, and not an evaluation alone.

    Raises:
        ValueError: with the set, what was found, what was expected, and the likely fix.
    """
    # what is compiled for these small batches on the CPU would be of no use to the training
    with isolate_rng(include_cuda=False), torch.compiler.set_stance("force_eager"):
        try:
            tried = copy.deepcopy(module)
        except (RuntimeError, TypeError, NotImplementedError):  # of a model that cannot be copied
            return
        tried.zero_grad(set_to_none=True)
        tried = trainer.precision_plugin.convert_module(tried)  # type: ignore[assignment]
        if train:
            batch = _small_batch(datamodule, "train")
            if batch is not None:
                _try_training(tried, _converted(batch, trainer), trainer)
                _try_without_graphs(tried, _converted(batch, trainer), "train", trainer)
        batch = _small_batch(datamodule, "val")
        if batch is not None and len(tried.val_metrics):
            _try_evaluation(tried, _converted(batch, trainer), trainer)
            _try_without_graphs(tried, _converted(batch, trainer), "val", trainer)
        module.predicted_rows = tried.predicted_rows


def check_batch(batch: object, type_names: Sequence[str] | None) -> Batch:
    """Return a batch that is a dictionary of tensors that fit each other.

    Raises:
        ValueError, TypeError: the field, what was found and what was expected.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch is a dictionary of tensors by field name, found {type(batch).__name__}.")
    tensors = {str(name): value for name, value in batch.items() if isinstance(value, Tensor)}
    if not tensors:
        raise TypeError(
            f"a batch is a dictionary of tensors by field name; found no tensor in {sorted(map(str, batch))}."
        )
    _check_rows(tensors)
    for name in ("pos", "cell", "forces", "total_energy", "stress"):
        if name in tensors and not tensors[name].is_floating_point():
            raise TypeError(f"{name!r} has dtype {tensors[name].dtype}; expected a floating-point one.")
    for name in ("pos", "cell"):
        if name in tensors and not tensors[name].isfinite().all():
            raise ValueError(f"{name!r} has {_not_finite(tensors[name])}; expected finite numbers of Å.")
    num_types = math.inf if type_names is None else len(type_names)
    known = "" if type_names is None else f" of the type names {list(type_names)}"
    num_nodes = next((len(tensors[name]) for name in ("pos", ATOM_TYPES) if name in tensors), math.inf)
    num_graphs = len(tensors[NUM_ATOMS]) if NUM_ATOMS in tensors else math.inf
    for name, limit, of_what in (
        (ATOM_TYPES, num_types, f"index{known}"),
        ("batch", num_graphs, "number of a graph"),
        ("edge_index", num_nodes, "number of an atom"),
    ):
        if name in tensors:
            _check_indices(name, tensors[name], limit, of_what)
    if "edge_index" in tensors and (tensors["edge_index"].dim() != 2 or len(tensors["edge_index"]) != 2):
        raise ValueError(f"'edge_index' has shape {list(tensors['edge_index'].shape)}; expected [2, num_edges].")
    return batch


def _check_rows(tensors: Mapping[str, Tensor]) -> None:
    """Refuse fields of one level that differ in their number of rows, and a batch without atoms."""
    levels: dict[str, tuple[str, int]] = {}
    first = {NUM_ATOMS: 0, "pos": 0, ATOM_TYPES: 1}  # the fields that the others are compared with
    for name in sorted(tensors, key=lambda name: first.get(name, 2)):
        spec, value = registered_fields().get(name), tensors[name]
        if spec is None:
            continue
        if not value.dim():
            raise ValueError(f"{name!r} is a scalar; expected one row for each {spec.level}.")
        reference, rows = levels.setdefault(spec.level, (name, len(value)))
        if len(value) != rows:
            raise ValueError(
                f"{name!r} has shape {list(value.shape)}, but {reference!r} has {rows} rows; both are {spec.level} "
                f"fields: expected one row for each {spec.level}."
            )
        if spec.shape is not None and name in ("pos", "forces", "cell", "stress") and value.shape[1:] != spec.shape:
            expected = ", ".join(map(str, spec.shape))
            raise ValueError(f"{name!r} has shape {list(value.shape)}; expected [num_{spec.level}s, {expected}].")
    if levels.get("node", ("", 1))[1] == 0:
        raise ValueError(f"the batch has no atoms: {levels['node'][0]!r} has no rows; expected at least one atom.")
    if "node" in levels and NUM_ATOMS in tensors and int(tensors[NUM_ATOMS].sum()) != levels["node"][1]:
        raise ValueError(
            f"{NUM_ATOMS!r} counts {int(tensors[NUM_ATOMS].sum())} atoms, but {levels['node'][0]!r} has "
            f"{levels['node'][1]} rows."
        )
    if NUM_ATOMS in tensors and bool((tensors[NUM_ATOMS] < 1).any()):
        raise ValueError(f"{NUM_ATOMS!r} is {tensors[NUM_ATOMS].tolist()}; expected at least one atom in each graph.")


def _check_indices(name: str, value: Tensor, limit: float, of_what: str) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name!r} has dtype {value.dtype}; expected integers, such as torch.int64.")
    if value.numel() and (int(value.min()) < 0 or int(value.max()) >= limit):
        highest = "" if limit == math.inf else f" to {int(limit) - 1}"
        raise ValueError(
            f"{name!r} has values from {int(value.min())} to {int(value.max())}; expected the {of_what}, 0{highest}. "
            f"Do data, model and metrics use the same type_names and the same batches?"
        )


def _small_batch(datamodule: LightningDataModule, name: str) -> Batch | None:
    """Collated first samples of a set; None if only its loader can make them."""
    own = [getattr(datamodule, "train_set", None)] if name == "train" else list(getattr(datamodule, "val_sets", []))
    dataset = own[0] if own else None
    try:
        if isinstance(dataset, AtomsDataset):
            samples = [dataset[index] for index in _smallest(dataset)]
            return with_edges(collate(samples, dtype=dataset.dtype), datamodule)
        loader = _loader_of(datamodule, name)
        if loader is None:
            return None
        if loader.batch_sampler is None:  # the data set makes the batches
            return loader.collate_fn(loader.dataset[0])
        number = min(_NUM_FRAMES, len(loader.dataset))  # type: ignore[arg-type]
        return loader.collate_fn([loader.dataset[index] for index in range(number)]) if number else None
    except _MISTAKES as error:
        raise ValueError(f"The first samples of the {_SETS[name]} data cannot be made: {reason(error)}") from error


def _loader_of(datamodule: LightningDataModule, name: str) -> DataLoader[Any] | None:
    try:
        loader = datamodule.train_dataloader() if name == "train" else datamodule.val_dataloader()
    except Exception:  # it may need the trainer, to which the data module is not attached yet
        return None
    loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
    mapped = isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__") and len(loader.dataset)
    return loader if mapped and hasattr(loader.dataset, "__getitem__") else None


def _smallest(dataset: AtomsDataset) -> list[int]:
    """Indices of the smallest frames, those with all labels and with more than one atom first."""
    frames = dataset.frames
    sizes = frames.column("num_atoms")
    labels = [*LABELS, *(each.name for each in dataset.fields if isinstance(each, ExtraField))]
    missing = sum((frames.column(f"state_{label}") == MISSING).astype(np.int64) for label in labels)
    order = np.lexsort((sizes, missing, sizes < 2))
    return sorted(order[:_NUM_FRAMES].tolist())


def _converted(batch: Batch, trainer: Trainer) -> Batch:
    converted: Batch = trainer.precision_plugin.convert_input(batch)
    return converted


def _try_training(module: ForceFieldModule, batch: Batch, trainer: Trainer) -> None:
    """Try a training step without its communication; refuse gradients that are absent or not finite."""
    module.train()
    managers = [module.loss] if module.train_metrics is None else [module.loss, module.train_metrics]
    predictions, values = _forward(module, batch, "train", managers, trainer)
    weighted_sum = values[0].weighted_sum
    if weighted_sum is None:
        return
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    grown = sorted(name for name, value in predictions.items() if isinstance(value, Tensor) and value.requires_grad)
    read = sorted(fields_read(module.loss, weighted=True) & predictions.keys())
    nothing = (
        f"No gradient reaches a parameter of the model from the loss, which reads {', '.join(read) or 'no field'}; "
        f"predictions with a gradient: {', '.join(grown) or 'none'}. In training mode the model must not detach its "
        f"predictions, nor make them under torch.no_grad(); forces need autograd.grad(..., create_graph=True)."
    )
    if not weighted_sum.requires_grad:
        raise ValueError(nothing)
    _guarded(module.objective(values[0]).backward, f"The backward pass of a first {_SETS['train']} batch")
    unused = [name for name, parameter in parameters.items() if parameter.grad is None]
    if not [name for name in parameters if name not in unused and not name.startswith("loss.")]:
        raise ValueError(nothing)  # learnt coefficients have one all the same
    broken = [
        name
        for name, parameter in parameters.items()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    if broken:
        raise ValueError(
            f"The gradient of {some(broken)} is NaN or infinite in a first {_SETS['train']} batch, although the "
            f"predictions are finite. The usual cause is the root or norm of a zero: mask it with where() before and "
            f"after."
        )
    if unused and launched_ranks() > 1 and _waits_for_all_gradients(trainer):
        raise ValueError(
            f"No gradient reaches {some(unused)}, and DDP waits for one of every parameter. Freeze what is not used "
            f"(requires_grad=False), or set strategy=ddp +strategy.find_unused_parameters=true."
        )


def _try_evaluation(module: ForceFieldModule, batch: Batch, trainer: Trainer) -> None:
    module.eval()
    with torch.no_grad():
        _forward(module, batch, "val", [module.val_metrics[0]], trainer)  # type: ignore[list-item]


def _try_without_graphs(module: ForceFieldModule, batch: Batch, name: str, trainer: Trainer) -> None:
    """Try a batch without graphs where a rank may have one; refuse one that does not take part in the backward pass."""
    if launched_ranks() == 1:
        return
    empty, what = empty_like(batch), f"a {_SETS[name]} batch without graphs, which a rank without frames has,"
    managers = [module.loss] if name == "train" else [module.val_metrics[0]]
    hint = " although its takes_empty_batches is true" if takes_empty_batches(module.model) else ""
    context = trainer.precision_plugin.forward_context() if _on_cpu(trainer) else nullcontext()
    with context, torch.set_grad_enabled(name == "train"):
        predictions = _guarded(lambda: module(empty), f"The model fails on {what}{hint}: it")
        (values,) = _guarded(
            lambda: step_together(*managers, preds=predictions, target=empty),  # type: ignore[arg-type]
            f"The {'loss' if name == 'train' else 'metric'} of {what}",
        )
    if name == "val" or values.weighted_sum is None:
        return
    module.zero_grad(set_to_none=True)
    _guarded(module.objective(values).backward, f"The backward pass of {what}")
    lacking = [name for name, weight in module.model.named_parameters() if weight.requires_grad and weight.grad is None]
    if lacking and _waits_for_all_gradients(trainer):
        raise ValueError(
            f"No gradient reaches {some(lacking)} from {what} and DDP waits for one of every parameter. A model whose "
            f"takes_empty_batches is true adds 0 times each parameter there; without that attribute it is not called."
        )


def _forward(
    module: ForceFieldModule, batch: Batch, name: str, managers: Sequence[MetricsManager], trainer: Trainer
) -> tuple[Mapping[str, Tensor], tuple[Values, ...]]:
    """Predictions and values of a batch, all of them checked."""
    what = f"a first {_SETS[name]} batch"
    try:
        check_batch(batch, module.type_names)
    except _MISTAKES as error:
        raise ValueError(f"In {what}: {reason(error)}") from error
    context = trainer.precision_plugin.forward_context() if _on_cpu(trainer) else nullcontext()
    with context:
        predictions = _predictions(module, batch, what, trainer)
        if not isinstance(predictions, Mapping):
            raise TypeError(
                f"The model returned {type(predictions).__name__} for {what}; expected a dictionary of tensors by "
                f"field name, such as total_energy and forces."
            )
        for field in sorted(set().union(*map(fields_read, managers)) & predictions.keys()):
            value = predictions[field]
            if isinstance(value, Tensor) and value is batch.get(field):
                raise ValueError(
                    f"The prediction {field!r} is the label of that name, which the model hands on with the batch; "
                    f"expected a prediction of its own: its errors would be 0. Take the loss and metrics of it out, or "
                    f"choose a model that predicts it."
                )
            if isinstance(value, Tensor) and not value.is_floating_point():
                raise TypeError(f"The prediction {field!r} has dtype {value.dtype}; expected a floating-point one.")
            if isinstance(value, Tensor) and not value.isfinite().all():
                raise ValueError(
                    f"The prediction {field!r} for {what} has {_not_finite(value)} before any training; expected "
                    f"finite numbers. Look at the model's initial weights, its scales and shifts, and distances of 0."
                )
        if name != "train":
            predictions = {field: value.detach() for field, value in predictions.items()}
        try:
            values = step_together(*managers, preds=predictions, target=batch)
        except (*_MISTAKES, RuntimeError, IndexError) as error:
            raise ValueError(f"In {what}: {reason(error)}") from error
    for manager, of_manager in zip(managers, values, strict=True):
        _check_finite(manager, of_manager, what)
    return predictions, values


def _predictions(module: ForceFieldModule, batch: Batch, what: str, trainer: Trainer) -> Any:
    """Output of the model; refused with the remedy if it fails under mixed precision alone."""
    try:
        return _guarded(lambda: module(batch), f"The model fails on {what}: it")
    except ValueError as error:
        precision = str(trainer.precision_plugin.precision)
        if not precision.endswith("mixed") or not _works_without_autocast(module, batch):
            raise
        raise ValueError(
            f"{error}. It does not fail without mixed precision: the model is not made for {precision}. Give "
            f"precision=float32, and matmul_precision=high for faster products on GPUs."
        ) from error


def _works_without_autocast(module: ForceFieldModule, batch: Batch) -> bool:
    try:
        with torch.autocast("cpu", enabled=False):  # the whole of this step is on it
            module(batch)
    except Exception:
        return False
    return True


def _check_finite(manager: MetricsManager, values: Values, what: str) -> None:
    """Refuse a weighted sum that is NaN or infinite, with the components that make it so."""
    if values.weighted_sum is None or bool(values.weighted_sum.isfinite()):
        return
    numbers = values.to_host()
    wrong = [name for name in manager if manager.coeffs[name] and not math.isfinite(numbers[name])]
    raise ValueError(
        f"In {what} the weighted sum is {float(values.weighted_sum.detach())} because of {', '.join(wrong)}; the "
        f"predictions are finite. Labels that are NaN are left out with `ignore_nan: true`; otherwise the predictions "
        f"are too far off for the metric."
    )


def _guarded(function: Any, what: str) -> Any:
    """Result of a user's code; any exception of it becomes a ValueError that names it."""
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{what} raises {type(error).__name__}: {reason(error)}") from error


def _waits_for_all_gradients(trainer: Trainer) -> bool:
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, FlatStrategy):
        return False
    return not any(ddp_options(strategy).get(option) for option in ("find_unused_parameters", "static_graph"))


def _on_cpu(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cpu"


def _not_finite(value: Tensor) -> str:
    return f"{int((~value.isfinite()).sum())} NaN or infinite numbers of {value.numel()}"


_SETS = {"train": "training", "val": "validation"}
