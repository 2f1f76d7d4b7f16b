"""What the right answer is: NumPy float64 for values, torch autograd for gradients, on the whole data in one process.

Nothing here knows of rows, ranks or masks: elements are selected, concatenated and reduced as a textbook would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import harness

NUM_PARAMETERS = 5

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Component:
    """A component, in words that both the oracle and the package understand."""

    field: str
    error: str
    coeff: float | None = None
    per_type: bool = False
    weights: tuple[float, ...] | None = None
    ignore_nan: bool = False
    per_atom: bool = False

    @property
    def name(self) -> str:
        return f"{'per_atom_' if self.per_atom else ''}{self.field}_{self.error}{'_by_type' if self.per_type else ''}"

    def entry(self, type_names: Sequence[str]) -> dict[str, Any]:
        """The same component as the package takes it."""
        entry: dict[str, Any] = {
            "name": self.name,
            "field": harness.PerAtomModifier(self.field) if self.per_atom else self.field,
            "metric": METRICS[self.error](),
            "coeff": self.coeff,
            "per_type": self.per_type,
            "ignore_nan": self.ignore_nan,
        }
        if self.weights is not None:
            entry["per_type_coeffs"] = dict(zip(type_names, self.weights, strict=True))
        return entry


HUBER_DELTA = 0.7
STRATA = {0.5: 0.4, 1.5: 0.2}

METRICS: dict[str, Callable[[], harness.ErrorMetric]] = {
    "mae": harness.MeanAbsoluteError,
    "mse": harness.MeanSquaredError,
    "rmse": harness.RootMeanSquaredError,
    "max": harness.MaximumAbsoluteError,
    "huber": lambda: harness.HuberLoss(delta=HUBER_DELTA),
    "huber_sum": lambda: harness.HuberLoss(reduction="sum", delta=HUBER_DELTA),
    "stratified": lambda: harness.StratifiedHuberForceLoss(STRATA),
    "stratified_sum": lambda: harness.StratifiedHuberForceLoss(STRATA, reduction="sum"),
}


def manager(components: Sequence[Component], type_names: Sequence[str] | None = None) -> harness.MetricsManager:
    """The package's manager of the components."""
    return harness.MetricsManager([component.entry(type_names or ()) for component in components], type_names)


# --- data: a linear model of random features, so that gradients are of parameters that all ranks share ---


def draw(
    seed: int,
    atoms: Sequence[int],
    types: Sequence[int] = (0, 1, 2),
    unlabelled: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Batch, Batch]:
    """Features and target of ``len(atoms)`` graphs; a share of the labels is NaN."""
    random = np.random.default_rng(seed)
    num_graphs, num_atoms = len(atoms), int(sum(atoms))
    shapes = {"total_energy": (num_graphs, 1), "forces": (num_atoms, 3), "stress": (num_graphs, 3, 3)}
    features, target = {}, {}
    for field, shape in shapes.items():
        features[field] = torch.tensor(random.normal(size=(*shape, NUM_PARAMETERS)), dtype=dtype)
        labels = random.normal(size=shape)
        labels[random.random(shape) < unlabelled] = np.nan
        target[field] = torch.tensor(labels, dtype=dtype)
    target["num_atoms"] = torch.tensor(list(atoms), dtype=torch.int64)
    target["atom_types"] = torch.tensor(random.choice(list(types), num_atoms), dtype=torch.int64)
    return features, target


def parameters(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-0.4, 0.5, NUM_PARAMETERS, dtype=dtype, requires_grad=True)


def predict(features: Batch, theta: torch.Tensor) -> Batch:
    return {field: values @ theta for field, values in features.items()}


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of several."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def split(batch: Batch, target: Batch, cuts: Sequence[int]) -> list[tuple[Batch, Batch]]:
    """Batches of the graphs between the cuts."""
    edges = [0, *sorted(cuts), len(target["num_atoms"])]
    ends = [0, *target["num_atoms"].cumsum(0).tolist()]
    parts = []
    for first, last in pairwise(edges):
        graphs, atoms = slice(first, last), slice(ends[first], ends[last])
        parts.append(
            tuple(
                {key: value[atoms if key in ("forces", "atom_types") else graphs] for key, value in each.items()}
                for each in (batch, target)
            )
        )
    return parts


# --- values ---


def values(
    components: Sequence[Component], preds: Batch, target: Batch, type_names: Sequence[str] = ()
) -> dict[str, float]:
    """Every value that is reported, ``weighted_sum`` included."""
    reported: dict[str, float] = {}
    weighted_sum, total = 0.0, math.fsum(component.coeff or 0.0 for component in components)
    for component in components:
        groups = _groups(component, preds, target, len(type_names))
        found = [_numpy_error(component, *group) for group in groups]
        if component.per_type:
            reported |= {f"{component.name}_{name}": _nan(v) for name, v in zip(type_names, found, strict=True)}
        weights = component.weights or [1.0] * len(found)
        known = [(weight, v) for weight, v in zip(weights, found, strict=True) if v is not None]
        value = math.fsum(w * v for w, v in known) / math.fsum(w for w, _ in known) if known else None
        reported[component.name] = _nan(value)
        if component.coeff and value is not None:
            weighted_sum += component.coeff / total * value
    if any(component.coeff is not None for component in components):
        reported["weighted_sum"] = weighted_sum
    return reported


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _pair(component: Component, preds: Batch, target: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    prediction, label = preds[component.field], target[component.field]
    if component.per_atom:
        num_atoms = target["num_atoms"].to(prediction.dtype).reshape(-1, *[1] * (prediction.dim() - 1))
        prediction, label = prediction / num_atoms, label / num_atoms
    return prediction, label


def _groups(component: Component, preds: Batch, target: Batch, num_types: int) -> list[tuple[Any, Any]]:
    prediction, label = (value.detach().double().numpy() for value in _pair(component, preds, target))
    if not component.per_type:
        return [(prediction, label)]
    types = target["atom_types"].numpy()
    return [(prediction[types == kind], label[types == kind]) for kind in range(num_types)]


def _numpy_error(component: Component, prediction: np.ndarray, label: np.ndarray) -> float | None:
    counts = ~np.isnan(label) if component.ignore_nan else np.ones(label.shape, bool)
    if not counts.any():
        return None
    residual = (prediction - label)[counts]
    match component.error:
        case "mae":
            return np.abs(residual).mean()
        case "mse":
            return (residual**2).mean()
        case "rmse":
            return math.sqrt((residual**2).mean())
        case "max":
            return np.abs(residual).max()
        case "huber" | "huber_sum":
            errors = [huber(r, HUBER_DELTA) for r in residual]
        case "stratified" | "stratified_sum":
            errors = stratified(prediction, np.where(counts, label, 0.0), STRATA)[counts]
    return np.sum(errors) if component.error.endswith("_sum") else np.mean(errors)


def huber(residual: float, delta: float) -> float:
    return 0.5 * residual**2 if abs(residual) <= delta else delta * (abs(residual) - 0.5 * delta)


def stratified(prediction: np.ndarray, label: np.ndarray, strata: dict[float, float]) -> np.ndarray:
    """Huber errors of every component of every vector."""
    errors = np.empty_like(label)
    for row in np.ndindex(label.shape[:-1]):
        magnitude = math.sqrt(math.fsum(x * x for x in label[row]))
        below = [bound for bound in strata if bound <= magnitude]
        delta = strata[max(below)] if below else math.inf
        errors[row] = [huber(r, delta) for r in prediction[row] - label[row]]
    return errors


# --- gradients ---


def gradient(components: Sequence[Component], features: Batch, target: Batch, type_names: Sequence[str] = ()) -> Any:
    """Gradient of ``weighted_sum`` with respect to the linear model's parameters."""
    theta = parameters(features["forces"].dtype)
    preds = predict(features, theta)
    total = math.fsum(component.coeff or 0.0 for component in components)
    loss = 0.0 * theta.sum()
    for component in components:
        if not component.coeff:
            continue
        prediction, label = _pair(component, preds, target)
        kinds = range(len(type_names)) if component.per_type else [None]
        terms, weights = [], []
        for kind in kinds:
            rows = slice(None) if kind is None else target["atom_types"] == kind
            term = _torch_error(component, prediction[rows], label[rows])
            if term is not None:
                terms.append(term)
                weights.append(1.0 if component.weights is None else component.weights[kind])
        if terms:
            value = sum(weight * term for weight, term in zip(weights, terms, strict=True)) / sum(weights)
            loss = loss + component.coeff / total * value
    loss.backward()
    return theta.grad.numpy()


def _torch_error(component: Component, prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor | None:
    counts = ~label.isnan() if component.ignore_nan else torch.ones_like(label, dtype=torch.bool)
    if not counts.any():
        return None
    residual = (prediction - label)[counts]
    match component.error:
        case "mae":
            return residual.abs().mean()
        case "mse":
            return residual.pow(2).mean()
        case "rmse":
            return residual.pow(2).mean().sqrt()
        case "max":
            return residual.abs().max()
        case "huber" | "huber_sum":
            delta: Any = torch.full_like(residual, HUBER_DELTA)
        case "stratified" | "stratified_sum":
            magnitude = torch.where(counts, label, 0.0).pow(2).sum(-1, keepdim=True).sqrt().expand_as(label)
            delta = torch.full_like(label, 1e6)
            for bound in sorted(STRATA):
                delta[magnitude >= bound] = STRATA[bound]
            delta = delta[counts]
    small = residual.abs() <= delta
    errors = torch.cat([residual[small].pow(2) / 2, (delta * (residual.abs() - delta / 2))[~small]])
    return errors.sum() if component.error.endswith("_sum") else errors.mean()
