"""Diagnosis of a loss that is NaN or infinite: fields, atom types and frames of a batch, and weights.

Everything here looks at numbers, for which the host waits: it is for when something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from harness.distributed import named
from harness.fields import ATOM_TYPES, Batch, as_modifier, predictions_of, registered_fields
from harness.metrics import ErrorMetric, MetricsManager, Values
from harness.support.text import some

__all__ = [
    "NonFiniteField",
    "RankFindings",
    "explain",
    "find_nonfinite_fields",
    "find_nonfinite_gradients",
    "finite_probe",
    "gradients_of",
    "largest_force",
    "nonfinite_components",
    "weights_of",
]

_SHOWN = 8
"""Largest number of frames, types or parameters that are named; of more, only the number is given."""
_MOST_FRAMES = 256
"""Largest batch, in frames, whose gradient is examined frame by frame."""


@dataclass(frozen=True)
class NonFiniteField:
    """Numbers of one field in one batch that are not finite, in labels or predictions.

    Attributes:
        field: the field, or what a modifier of it is called; of a gradient, the component.
        side: labels, predictions or errors, the last where both others are finite and the metric overflows; or
            gradient.
        kind: NaN, infinite, or NaN and infinite.
        number: how many they are.
        total: how many numbers the field has.
        types: names of the atom types that they belong to; empty where it is not a field of atoms.
        frames: what their frames are called.
        everywhere: whether every frame of the batch is among them.
        micro_batch: which of the step's micro-batches it is; None if there is one batch.
    """

    field: str
    side: str
    kind: str
    number: int
    total: int
    types: list[str]
    frames: list[str]
    everywhere: bool
    micro_batch: int | None = None

    def __str__(self) -> str:
        types = f", of atoms of type {some(self.types, _SHOWN)}" if self.types else ""
        are_all = self.everywhere and len(self.frames) > 1
        frames = f"all {len(self.frames)} frames" if are_all else some(self.frames, _SHOWN)
        micro_batch = "" if self.micro_batch is None else f"micro-batch {self.micro_batch}, "
        return (
            f"{micro_batch}{self.side} of {self.field}: {self.number} of {self.total} numbers {self.kind}{types}, "
            f"in {frames}"
        )


@dataclass(frozen=True)
class RankFindings:
    """Findings of one rank in its part of a step.

    Attributes:
        fields: numbers that are not finite.
        weights: names of parameters that are not.
        gradients: names of parameters whose gradient is not, which is the same on all ranks.
        force: the largest \\|force\\| among the labels, eV/Å, and its frame; None where there are no such labels.
        note: why nothing could be found out.
    """

    fields: list[NonFiniteField] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    force: tuple[float, str] | None = None
    note: str = ""


def nonfinite_components(manager: MetricsManager, values: Values) -> dict[str, dict[str, float]]:
    """Components of the weighted sum that are not finite, with their value and per-type values.

    Args:
        manager: of the components.
        values: of a step.

    Returns:
        ``{component: {name: value}}``, the component's own name first. Empty where it is the coefficients.
    """
    if values.coeffs is None:
        return {}
    known = values.has_data.tolist()
    wrong = {
        name: number
        for name, number, has_data in zip(values.names, values.reported.tolist(), known, strict=True)
        if has_data and not math.isfinite(number)
    }
    coeffs = values.coeffs.tolist()
    names = [values.names[at] for at in values.weighted if coeffs[at] != 0 and values.names[at] in wrong]
    keys = {name: (name, *manager.entries[name].slot_keys(manager.type_names)) for name in names}
    return {name: {key: wrong[key] for key in keys[name] if key in wrong} for name in names}


def find_nonfinite_fields(
    manager: MetricsManager,
    components: Sequence[str],
    preds: Batch,
    batch: Batch,
    place: Callable[[int], str | None] = lambda index: None,
) -> list[NonFiniteField]:
    """Labels and predictions of a batch that make components NaN or infinite.

    Args:
        manager: of the components.
        components: their names.
        preds: predictions by field name.
        batch: labels by field name; the ``frame_index`` of its graphs names their frames.
        place: where a frame of the training set comes from, by its index; None if that is not known.
    """
    found: dict[tuple[str, str], NonFiniteField] = {}
    frames = _Frames(batch, manager.type_names, place)
    for name in components:
        entry = manager.entries[name]
        for label, level, prediction, target in _pairs(entry.field, preds, batch):
            counts = ~target.isnan() if entry.ignore_nan else torch.ones_like(target, dtype=torch.bool)
            rows = None if entry.field is None else manager.counted_rows(name, batch, target)
            if rows is not None:
                counts = counts & rows.reshape(-1, *[1] * (target.dim() - 1))
            sides = {"labels": target, "predictions": prediction}
            if isinstance(entry.metric, ErrorMetric):
                masked = (torch.where(counts, each, 0.0) for each in (prediction, target))
                sides["errors"] = entry.metric.measure(*masked)
            for side, numbers in sides.items():
                wrong = ~numbers.isfinite()
                if bool((wrong & counts).any()):
                    # a prediction without a label does not count in the loss, and shows what is wrong just as well
                    wrong = wrong if side == "predictions" else wrong & counts
                    found.setdefault((label, side), frames.nonfinite_field(label, side, level, numbers, wrong))
                    break  # errors of what is NaN are NaN
    return list(found.values())


def find_nonfinite_gradients(
    manager: MetricsManager,
    model: Callable[[Batch], Batch],
    batch: Batch,
    parameters: Sequence[Tensor],
    place: Callable[[int], str | None] = lambda index: None,
) -> list[NonFiniteField]:
    """Components with a finite value and a gradient that is not, and the frames that cause it, examined one by one.

    Args:
        manager: of the components.
        model: makes predictions of a batch.
        batch: labels, as of :func:`find_nonfinite_fields`.
        parameters: of the model.
        place: as of :func:`find_nonfinite_fields`.

    Raises:
        ValueError: the frames are too many, or cannot be told apart.
    """
    if not {"num_atoms", "batch"} <= batch.keys() or len(batch["num_atoms"]) > _MOST_FRAMES:
        raise ValueError(f"frames are asked one by one, and there are more than {_MOST_FRAMES}, or they are not told")
    frames = _Frames(batch, manager.type_names, place)
    found: dict[str, tuple[Tensor, list[int]]] = {}
    for position, alone in enumerate(_single_frames(batch)):
        values = manager.evaluate(manager.measure(model(alone), alone))
        for name, component in ((values.names[at], values.reported[at]) for at in values.weighted):
            if not component.requires_grad:
                continue
            pieces = torch.autograd.grad(component, parameters, retain_graph=True, allow_unused=True)
            known = [piece.reshape(-1) for piece in pieces if piece is not None]
            numbers = torch.cat(known) if known else component.new_zeros(0)
            if not bool(numbers.isfinite().all()):
                found.setdefault(name, (numbers, []))[1].append(position)
    return [frames.of_gradient(name, numbers, positions) for name, (numbers, positions) in found.items()]


def _single_frames(batch: Batch) -> Iterator[Batch]:
    """Frames of a batch, as batches of one frame."""
    known = registered_fields()
    graph_of = {"node": batch["batch"], "graph": torch.arange(len(batch["num_atoms"]), device=batch["batch"].device)}
    if "edge_index" in batch:
        graph_of["edge"] = batch["batch"][batch["edge_index"][0]]
    levels = {len(graphs): level for level, graphs in reversed(graph_of.items())}  # of fields that nobody registered
    first = 0
    for position, number in enumerate(batch["num_atoms"].reshape(-1).tolist()):
        alone: dict[str, Tensor] = {}
        for name, value in batch.items():
            if not isinstance(value, Tensor) or not value.dim() or name == "edge_index":
                continue
            level = known[name].level if name in known else levels.get(len(value))
            own = value.detach()
            alone[name] = own[graph_of[level] == position] if level in graph_of else own
        alone["batch"] = torch.zeros_like(batch["batch"][:number])
        if "edge_index" in batch:
            alone["edge_index"] = batch["edge_index"][:, graph_of["edge"] == position] - first
        first += number
        yield alone


def _pairs(modifier: object, preds: Batch, batch: Batch) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Name, level, prediction and target of a component's field."""
    if modifier is None:  # the two whole dictionaries
        for name, spec in registered_fields().items():
            if name in preds and name in batch and preds[name].is_floating_point():
                yield name, spec.level, preds[name], batch[name]
        return
    reads, level = as_modifier(modifier)
    prediction, target = reads(preds, batch)
    names = predictions_of(reads)
    yield names[0] if len(names) == 1 else str(reads), level, prediction, target


class _Frames:
    """Frames that the rows of a batch's fields belong to."""

    def __init__(self, batch: Batch, type_names: Sequence[str], place: Callable[[int], str | None]) -> None:
        self._batch, self._type_names, self._place = batch, type_names, place

    def nonfinite_field(self, label: str, side: str, level: str, numbers: Tensor, wrong: Tensor) -> NonFiniteField:
        rows = wrong.flatten(1).any(1).nonzero()[:, 0] if wrong.dim() > 1 else wrong.nonzero()[:, 0]
        graphs = self._graphs(level, rows)
        num_graphs = len(self._batch["num_atoms"]) if "num_atoms" in self._batch else None
        frames = ["frames that the batch does not tell"] if graphs is None else self.names(graphs)
        return NonFiniteField(
            label,
            side,
            _kind(numbers[wrong]),
            int(wrong.sum()),
            wrong.numel(),
            self._types(level, rows),
            frames,
            graphs is not None and len(frames) == num_graphs,
        )

    def of_gradient(self, component: str, numbers: Tensor, positions: list[int]) -> NonFiniteField:
        """Finding about a component's gradient with respect to the parameters, and the frames that cause it."""
        wrong = ~numbers.isfinite()
        names, everywhere = self.names(torch.tensor(positions)), len(positions) == len(self._batch["num_atoms"])
        return NonFiniteField(
            component, "gradient", _kind(numbers[wrong]), int(wrong.sum()), wrong.numel(), [], names, everywhere
        )

    def _graphs(self, level: str, rows: Tensor) -> Tensor | None:
        if level == "graph":
            return rows
        if level == "edge":
            if "edge_index" not in self._batch:
                return None
            rows = self._batch["edge_index"][0][rows]
        return self._batch["batch"][rows] if "batch" in self._batch else None

    def _types(self, level: str, rows: Tensor) -> list[str]:
        if level != "node" or ATOM_TYPES not in self._batch:
            return []
        indices = sorted(set(self._batch[ATOM_TYPES].reshape(-1)[rows].tolist()))
        return [self._type_names[i] if i < len(self._type_names) else f"number {i}" for i in indices]

    def names(self, graphs: Tensor) -> list[str]:
        """Names of frames, by the numbers of their graphs in the batch."""
        positions = sorted(set(graphs.tolist()))
        if "frame_index" not in self._batch:
            return [f"number {position} of the batch" for position in positions]
        indices = [int(self._batch["frame_index"].reshape(-1)[position]) for position in positions]
        return [f"training frame {index}{f' ({place})' if (place := self._place(index)) else ''}" for index in indices]


def largest_force(batch: Batch, place: Callable[[int], str | None] = lambda index: None) -> tuple[float, str] | None:
    """The largest \\|force\\| among the labels of a batch, in eV/Å, and its frame; None without such labels."""
    if "forces" not in batch or not batch["forces"].numel():
        return None
    x, y, z = batch["forces"].double().unbind(-1)
    lengths = torch.hypot(torch.hypot(x, y), z).nan_to_num(-1.0, -1.0)  # whose squares may overflow
    atom = int(lengths.argmax())
    if lengths[atom] < 0:
        return None
    frame = "a frame that the batch does not tell"
    if "batch" in batch:
        (frame,) = _Frames(batch, (), place).names(batch["batch"][atom].reshape(1))
    return float(lengths[atom]), frame


def weights_of(module: nn.Module) -> list[str]:
    """Names of the parameters that are not finite; of those that are split over ranks, in this rank's part."""
    return [name for name, parameter in module.named_parameters() if not bool(_local(parameter).isfinite().all())]


def gradients_of(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient, as it is now, is not finite."""
    named_gradients = ((name, parameter.grad) for name, parameter in module.named_parameters())
    return [name for name, grad in named_gradients if grad is not None and not bool(grad.isfinite().all())]


@torch.no_grad()
def finite_probe(tensors: Iterable[Tensor]) -> Tensor | None:
    """Number that is finite if all elements of all tensors are: float64 ``[1]`` on their device; None without tensors.

    The host does not wait for it. On a CPU it is their sum, the cheapest there is, so that elements whose sum
    overflows, from 1e30 or so, count as infinite.
    """
    parts = [part for part in map(_local, tensors) if part.numel()]
    if not parts:
        return None
    if parts[0].is_cuda:
        return get_total_norm(parts, math.inf).to(torch.float64).reshape(1)  # a few kernels for all of them
    return torch.stack([part.sum() for part in parts]).sum().to(torch.float64).reshape(1)


def _kind(numbers: Tensor) -> str:
    kinds = [kind for kind, test in (("NaN", torch.isnan), ("infinite", torch.isinf)) if bool(test(numbers).any())]
    return " and ".join(kinds)


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter: of FSDP2's, of ZeRO's, or all of it."""
    if type(parameter) is Tensor:  # a gradient; to ask a tensor for what it does not have takes longer than its sum
        return parameter
    own: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
    return own


# --- words ---


def explain(
    where: str,
    weighted_sum: float,
    components: Mapping[str, Mapping[str, float]],
    findings: Sequence[RankFindings],
    *,
    trained: bool,
    settings: Mapping[str, object],
) -> str:
    """Explanation: the value that is not finite, its cause, and the likely fix.

    Args:
        where: the step.
        weighted_sum: the loss.
        components: see :func:`nonfinite_components`.
        findings: of every rank, in their order.
        trained: whether the optimizer has stepped with it, so that weights may be its victims.
        settings: what may be changed, by name on the command line, with what it is now.
    """
    causes = [f"{name} = {own[name]:g}{_by_type(name, own)}" for name, own in components.items()]
    is_finite = math.isfinite(weighted_sum)
    gradients = list(dict.fromkeys(name for each in findings for name in each.gradients))
    weights = list(dict.fromkeys(name for each in findings for name in each.weights))
    if is_finite and trained and weights:
        lines = [f"The weights are NaN or infinite after {where}, whose loss is {weighted_sum:g}."]
    elif is_finite:
        whose = f", of the parameters {some(gradients, _SHOWN)}" if gradients else ""
        lines = [f"The gradient of the loss is NaN or infinite in {where}{whose}. The loss is {weighted_sum:g}."]
    else:
        loss = "of coefficients that are not finite" if not causes else f"of {'; '.join(causes)}"
        lines = [f"The loss is {weighted_sum:g} in {where} because {loss}."]
    wrong = {rank: each for rank, each in enumerate(findings) if each.fields or each.note}
    for rank, each in list(wrong.items())[:_SHOWN]:
        lines += [f"  rank {rank}: {nonfinite_field}" for nonfinite_field in each.fields]
        lines += [f"  rank {rank}: {each.note}"] if each.note else []
    if len(wrong) > _SHOWN:
        lines.append(f"  and {named(list(wrong)[_SHOWN:])}")
    if not wrong and causes:
        lines.append("  No label, prediction or error that it reads is NaN or infinite: it is the metric's own value.")
    if not wrong and is_finite and not trained:
        lines.append("  Asked again, no rank's part of it is NaN or infinite: it comes from their sum, or by chance.")
    if weights:
        since = "are now, after the optimizer has stepped with it" if trained else "were so before this step"
        lines.append(f"  weights that are NaN or infinite {since}: {some(weights, _SHOWN, 'more parameters')}")
    elif trained:
        lines.append("  The optimizer has stepped with it; the weights are finite.")
    of_gradient = is_finite or (bool(weights) and not trained)
    return "\n".join([*lines, f"Likely fix: {_fix(components, findings, of_gradient, settings)}"])


def _by_type(name: str, own: Mapping[str, float]) -> str:
    keys = [key for key in own if key != name]
    return f" ({some((f'{key} = {own[key]:g}' for key in keys), _SHOWN, 'more types')})" if keys else ""


def _fix(
    components: Mapping[str, object],
    findings: Sequence[RankFindings],
    of_gradient: bool,
    settings: Mapping[str, object],
) -> str:
    found = [nonfinite_field for each in findings for nonfinite_field in each.fields]
    labels = [each for each in found if each.side == "labels"]
    if labels:
        names = list(dict.fromkeys(each.field for each in labels))
        return (
            f"missing labels are NaN, and are left out with `ignore_nan` "
            f"({' '.join(f'loss.ignore_nan.{name}=true' for name in names)}); labels that are broken belong out of "
            f"the data: see these frames."
        )
    if not components and not of_gradient:
        return "fixed coefficients, or a lower learning rate for those that are learnt."
    forces = [(*each.force, rank) for rank, each in enumerate(findings) if each.force]
    outlier = ""
    if forces:
        force, frame, rank = max(forces)
        outlier = f" The largest |force| label there is {force:.3g} eV/Å ({frame}, rank {rank}): is it an outlier?"
    now = ", ".join(f"{name} is {value}" for name, value in settings.items())
    remedy = (
        f"a lower learning rate, clipped gradients (trainer.gradient_clip_val=1), a higher trainer.precision, data "
        f"without outliers; now {now}.{outlier}"
    )
    if of_gradient:
        return (
            f"a gradient that is not finite where the loss is comes from the root or norm of a zero in the model (mask "
            f"it with where() before and after), or from an overflow: {remedy}"
        )
    return remedy
