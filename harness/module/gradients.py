r"""Gradients of the single components of a loss: their lengths, their shares in a step, and the angles between them.

For a component with the value :math:`v_k`, the coefficient :math:`c_k` and the model's parameters :math:`\theta`

.. math:: g_k = \frac{\partial v_k}{\partial \theta}, \qquad
    \text{share}_k = \frac{c_k \lVert g_k \rVert}{\sum_j c_j \lVert g_j \rVert}, \qquad
    \cos_{kl} = \frac{g_k \cdot g_l}{\lVert g_k \rVert\, \lVert g_l \rVert}

of the values of all ranks, so that the numbers are those of one process on their data: backward ends at each rank's own
row, and the sum of these parts over the ranks (one all-reduce) is the gradient. The parts of the micro-batches of a
step add up in the same way.

They come from ``torch.autograd.grad``, so ``.grad`` of the parameters is untouched, and the training with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from harness.distributed import sum_over_ranks
from harness.metrics import Values
from harness.module.lightning import ForceFieldModule
from harness.module.step import Step, is_nth_step
from harness.strategies import splits_parameters
from harness.support.checks import whole_number
from harness.support.torch_private import donates_buffers, is_compiled

__all__ = ["GradientMeter", "Gradients", "chosen_parameters", "compare", "local_gradients"]

_COLUMNS = 1 << 20  # that are turned into float64 at a time


@dataclass(frozen=True)
class Gradients:
    """Lengths of the components' gradients in a step, and angles between them; on the host.

    A component without data in the step, or with the coefficient 0, has no gradient: its norm and share are 0, and its
    cosines NaN.

    Attributes:
        names: components in the weighted sum, in the user's order.
        coeffs: float64 ``[num_components]``: coefficients that the step was made with.
        norms: float64 ``[num_components]``: Euclidean norm of each gradient, without its coefficient.
        cosines: float64 ``[num_components, num_components]``: cosines of the angles between them.
    """

    names: tuple[str, ...]
    coeffs: Tensor
    norms: Tensor
    cosines: Tensor

    @property
    def weighted_norms(self) -> Tensor:
        """Coefficient × norm: float64 ``[num_components]``."""
        return self.coeffs * self.norms

    @property
    def shares(self) -> Tensor:
        """Part of each component in the sum of the weighted norms: float64 ``[num_components]``; NaN if all are 0."""
        return self.weighted_norms / self.weighted_norms.sum()

    def to_log(self) -> dict[str, float]:
        """Shares, norms with coefficients, and cosines of pairs, by the names that they are logged under."""
        logged: dict[str, float] = {}
        for what, numbers in (("share", self.shares), ("norm", self.weighted_norms)):
            logged |= {
                f"gradient_{what}/{name}": value for name, value in zip(self.names, numbers.tolist(), strict=True)
            }
        for first, second in combinations(range(len(self.names)), 2):
            pair = f"{self.names[first]}:{self.names[second]}"
            logged[f"gradient_cosine/{pair}"] = float(self.cosines[first, second])
        return logged


class GradientMeter:
    """Measures the components' gradients on every n-th step, for a callback that is shown the steps.

    A measurement costs one further backward pass for each component, memory for as many gradients, and one all-reduce
    of them; the host waits for the result. Steps in between cost nothing.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
        parameters: prefixes of names of the model's parameters, such as ``[layers.3, readout]``; None for all that are
            trained.

    Attributes:
        every_n_steps: as given; may be changed before :meth:`begin`, also to 0 for no measurement.

    Raises:
        ValueError, TypeError: no whole number above 0, or no list of names.
    """

    def __init__(self, every_n_steps: int, parameters: Sequence[str] | None = None) -> None:
        whole_number("every_n_steps", every_n_steps)
        names = None if parameters is None else parameters
        if isinstance(names, str) or not (names is None or all(isinstance(name, str) for name in names)):
            raise TypeError(f"`parameters` is a list of prefixes of names such as [readout], found {parameters!r}.")
        self.every_n_steps = every_n_steps
        self.prefixes = None if names is None else tuple(names)
        self._parts: Tensor | None = None  # of the micro-batches so far

    def begin(self, trainer: Trainer) -> None:
        """Warn of a training that ends before the first measurement."""
        if 0 < trainer.estimated_stepping_batches < self.every_n_steps:  # it is -1 where nobody knows
            rank_zero_warn(
                f"Gradients are measured on every {self.every_n_steps}th step, and the training has "
                f"{trainer.estimated_stepping_batches:.0f}: it ends before the first measurement. Lower every_n_steps."
            )

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a training whose gradients cannot be measured, before it begins.

        Raises:
            TypeError: the module does not show its steps.
            ValueError: the strategy splits parameters over the ranks, there are no parameters of that name, or a part
                of the model is compiled so that it can be differentiated only once.
        """
        if not isinstance(pl_module, ForceFieldModule):
            raise TypeError(
                f"Gradients of components are measured in harness.ForceFieldModule, which shows its steps before their "
                f"backward pass; found {type(pl_module).__name__}. Train with it, or leave this callback out."
            )
        if splits_parameters(trainer.strategy):
            raise ValueError(
                f"{type(trainer.strategy).__name__} splits the parameters over the ranks, and gives up their gradients "
                f"within the backward pass: those of single components cannot be had beside the training. Choose "
                f"strategy=ddp or deepspeed_zero2, or leave out what measures gradients."
            )
        chosen_parameters(pl_module.model, self.prefixes)
        compiled = [name or "the model" for name, part in pl_module.model.named_modules() if is_compiled(part)]
        if compiled and donates_buffers():
            raise ValueError(
                f"torch.compile lets the backward pass of {compiled[0]} use up its buffers, so that gradients of "
                f"single components cannot be had before it. Set torch._functorch.config.donated_buffer = False where "
                f"the model is made, or leave out what measures gradients."
            )

    def measure(self, trainer: Trainer, pl_module: ForceFieldModule, step: Step) -> Gradients | None:
        """The components' gradients if the step is an n-th one and whole, else None; all ranks must call it."""
        if not is_nth_step(trainer, self.every_n_steps):
            return None
        if step.window.num_done == 1:
            self._parts = None
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)  # of float16, whose gradients would vanish
        parts = local_gradients(
            step.own,
            list(chosen_parameters(pl_module.model, self.prefixes).values()),
            1.0 if scaler is None else scaler.get_scale(),
        )
        self._parts = parts if self._parts is None else self._parts + parts
        if not step.is_whole:
            return None
        total, self._parts = sum_over_ranks(self._parts, pl_module.process_group), None
        return compare(step.own, total)


def chosen_parameters(model: nn.Module, prefixes: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Trained parameters of a model by name.

    Args:
        model: the model.
        prefixes: names of parameters, or of parts of the model that have some; None for all.

    Raises:
        ValueError: a prefix that no trained parameter has; the names at its place are listed.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for prefix in prefixes or ():
        if not any(_is_part(name, prefix) for name in trained):
            raise ValueError(
                f"The model has no trained parameter whose name begins with {prefix!r}. "
                f"Valid: {', '.join(_valid_names(list(trained), prefix)) or 'none, all parameters are frozen'}."
            )
    chosen = (
        trained
        if prefixes is None
        else {name: weight for name, weight in trained.items() if any(_is_part(name, prefix) for prefix in prefixes)}
    )
    if not chosen:
        raise ValueError(
            "There are no gradients to measure: expected some prefixes in `parameters`, or null for all, and a model "
            "that trains some."
        )
    return chosen


def _is_part(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _valid_names(names: Sequence[str], prefix: str) -> list[str]:
    """Names of the parts beside the first one of the prefix that does not exist."""
    known = ""
    for word in prefix.split("."):
        longer = f"{known}{word}."
        if not any(name.startswith(longer) for name in names):
            break
        known = longer
    inside = (name.removeprefix(known) for name in names if name.startswith(known))
    return list(dict.fromkeys(f"{known}{name.partition('.')[0]}" for name in inside))


def local_gradients(values: Values, parameters: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """This rank's part of the gradient of each component in the weighted sum, in the user's order.

    Args:
        values: of a step of the loss, with their graph, which stays.
        parameters: that gradients are taken with respect to.
        scale: factor on the values in the backward pass, such as that of mixed precision in float16; gradients are
            divided by it, so that a power of two changes nothing but underflow.

    Returns:
        ``[num_components, num_parameters]`` in the parameters' dtype: their elements, one parameter after the other.
    """
    rows = []
    # as in the backward pass of the training, which runs outside of autocast too
    with torch.autocast(values.reported.device.type, enabled=False):
        for position in _positions(values):
            pieces: Sequence[Tensor | None] = [None] * len(parameters)
            if values.reported.requires_grad:
                value = values.reported[position] * scale
                pieces = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            elements = [
                torch.zeros_like(parameter) if piece is None else piece
                for parameter, piece in zip(parameters, pieces, strict=True)
            ]
            rows.append(torch.cat([gradient.reshape(-1) for gradient in elements]))
    return torch.stack(rows).div_(scale)


def compare(values: Values, gradients: Tensor) -> Gradients:
    """Norms and cosines of whole gradients; makes the host wait.

    Args:
        values: of the same step.
        gradients: ``[num_components, num_parameters]``, summed over the ranks.
    """
    if values.coeffs is None:
        raise ValueError("No component of the loss has a coefficient.")
    number, order = len(gradients), _positions(values)
    products = torch.zeros(number, number, dtype=torch.float64, device=gradients.device)
    for block in gradients.split(_COLUMNS, dim=1):
        precise = block.to(torch.float64)
        products += precise @ precise.T
    numbers = torch.cat((products.reshape(-1), values.coeffs)).cpu()
    products, coeffs = numbers[: number**2].reshape(number, number), numbers[number**2 :]
    norms = products.diagonal().sqrt()
    return Gradients(
        tuple(values.names[position] for position in order), coeffs[order], norms, products / torch.outer(norms, norms)
    )


def _positions(values: Values) -> list[int]:
    """Positions of the components in the weighted sum, as users see them."""
    return [position for position in values.order if position in values.weighted]
