"""Gradient balancing: coefficients that give each component its share in the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from harness.adaptive.set_point import SetPoint
from harness.module import ForceFieldModule, Step, log_to_all
from harness.module.coefficient_control import loss_of, refuse_other_controllers
from harness.module.gradients import GradientMeter
from harness.support.checks import is_number

__all__ = ["GradientBalance", "balanced_factors"]


class GradientBalance(Callback):
    r"""Moves coefficients until every component has its target share in the gradient.

    On every n-th step the gradients :math:`g_k` of the components are measured (see :mod:`harness.module.gradients`),
    and

    .. math::
        \text{share}_k = \frac{c_k \lVert g_k \rVert}{\sum_j c_j \lVert g_j \rVert}, \qquad
        c_k \leftarrow c_k \left( \frac{\text{target}_k}{\text{share}_k} \right)^{\text{rate}}

    from the next step on, scaled so that their sum stays. With the rate 1 this step would have had the target shares; a
    smaller rate averages over the noise of some 1/rate measurements. As GradNorm balances the norms of gradients, but
    by a factor in the place of a gradient step of the coefficients, and without its term for the pace of each task.

    A coefficient stays within ``limit`` times and a ``limit``-th of what the user gave it, so that none
    dies or explodes. A component whose gradient is 0 or not finite in a step (no data, say) keeps its coefficient
    then, and the others share out what they have together. Components outside of the weighted sum, and those with the
    coefficient 0, take no part.

    All ranks compute the same from the whole gradients. A measurement costs one further backward pass for each
    component, memory for as many gradients and one all-reduce of them; the host waits for it. The callback works with
    :class:`harness.module.ForceFieldModule`, under every strategy that leaves parameters whole, and with gradient
    accumulation.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
        target: ``{component: share}`` for all components with a coefficient above 0, in any scale; equal ones if None.
        rate: how much of the way to the target is made at once, above 0 and at most 1.
        parameters: prefixes of names of the parameters that gradients are taken of, such as those of the last layers,
            which GradNorm takes; None for all.
        limit: bound of the factor between a coefficient and the one that was given, at least 1.

    Raises:
        ValueError, TypeError: an argument out of its range.

    References:
        Chen, Badrinarayanan, Lee and Rabinovich, GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
        Multitask Networks, ICML 2018 (arXiv:1711.02257).
    """

    controls_coefficients = True

    def __init__(
        self,
        every_n_steps: int = 100,
        target: Mapping[str, float] | None = None,
        rate: float = 0.3,
        parameters: Sequence[str] | None = None,
        limit: float = 1000.0,
    ) -> None:
        if not is_number(rate) or not 0 < rate <= 1:
            raise ValueError(f"rate is a number above 0 and at most 1, found {rate!r}.")
        if not is_number(limit) or not 1 <= limit < math.inf:
            raise ValueError(f"limit is a number of at least 1, found {limit!r}.")
        if not (target is None or isinstance(target, Mapping)):
            raise TypeError(f"`target` is {{component: share}} or null, found {target!r}.")
        for name, share in (target or {}).items():
            if not is_number(share) or not 0 < share < math.inf:
                raise ValueError(
                    f"The target share of {name!r} is a number above 0, found {share!r}. A component without a share "
                    f"has the coefficient null."
                )
        self.target = None if target is None else {str(name): float(share) for name, share in target.items()}
        self.rate = float(rate)
        self.limit = float(limit)
        self._meter = GradientMeter(every_n_steps, parameters)
        self._set_point = SetPoint()
        self._next: dict[str, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a training whose gradients cannot be measured, or whose coefficients another part moves."""
        self.check_job(trainer, pl_module, stage)

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a training whose gradients cannot be measured, or whose coefficients another part moves.

        Raises:
            TypeError, ValueError: with the valid choices; target shares of components that do not exist, too.
        """
        if stage != "fit":
            return
        refuse_other_controllers(self, trainer, pl_module)
        self._meter.check(trainer, pl_module)
        names = [name for name, coeff in loss_of(pl_module).coeffs.items() if coeff]
        if self.target is not None and set(self.target) != set(names):
            raise ValueError(
                f"`target` gives shares to {', '.join(self.target)}; expected one for each component with a "
                f"coefficient: {', '.join(names)}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the coefficients; warn of a training that ends before the first measurement."""
        self._set_point.begin(loss_of(pl_module))
        self._meter.begin(trainer)

    def on_train_values(self, trainer: Trainer, pl_module: ForceFieldModule, step: Step) -> None:
        """Measure on an n-th step, and log what was found."""
        measured = self._meter.measure(trainer, pl_module, step)
        if measured is None:
            return
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(getattr(callback, "logs_gradients", False) for callback in others):
            log_to_all(trainer, measured.to_log())
        norms = dict(zip(measured.names, measured.norms.tolist(), strict=True))
        point = self._set_point
        moved = balanced_factors(point.coeffs, point.factors, norms, self.target, self.rate, self.limit)
        self._next = moved or None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change the coefficients after a measurement, before the first micro-batch of the next step."""
        if self._next is not None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._set_point.move(loss_of(pl_module), self._next)
            self._next = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that coefficients depend on; numbers and strings only."""
        return {"set_point": self._set_point.state(), "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; the arguments are those of this run."""
        self._set_point.restore(state_dict["set_point"])
        self._next = state_dict["next"]


def balanced_factors(
    coeffs: Mapping[str, float],
    factors: Mapping[str, float],
    norms: Mapping[str, float],
    target: Mapping[str, float] | None = None,
    rate: float = 1.0,
    limit: float = math.inf,
) -> dict[str, float]:
    """Factors on coefficients that bring each component nearer to its share in the gradient.

    Args:
        coeffs: what the user gave.
        factors: what they are multiplied by now.
        norms: of the components' gradients, without coefficients. Components with 0, or no finite number, are left out.
        target: shares, in any scale; equal ones if None.
        rate: 1 for the whole way.
        limit: factors stay within ``[1/limit, limit]``.

    Returns:
        New factors of the components that are not left out; the sum of their coefficients times factors stays.

    Example:
        >>> balanced_factors({"energy": 0.5, "forces": 0.5}, {"energy": 1, "forces": 1}, {"energy": 3, "forces": 1})
        {'energy': 0.5, 'forces': 1.5}
    """
    active = [name for name in factors if 0 < norms[name] < math.inf]
    if len(active) < 2:
        return {}
    weights = {name: coeffs[name] * factors[name] for name in active}
    total = math.fsum(weights.values())
    strengths = {name: weights[name] * norms[name] for name in active}
    wanted = {name: 1.0 if target is None else target[name] for name in active}
    all_strengths, all_wanted = math.fsum(strengths.values()), math.fsum(wanted.values())
    moved = {
        name: factors[name] * ((wanted[name] / all_wanted) / (strengths[name] / all_strengths)) ** rate
        for name in active
    }

    def scaled(scale: float) -> dict[str, float]:
        return {name: min(max(scale * factor, 1 / limit), limit) for name, factor in moved.items()}

    def sum_of(each: Mapping[str, float]) -> float:
        return math.fsum(coeffs[name] * factor for name, factor in each.items())

    scale = total / sum_of(moved)
    if all(1 / limit <= scale * factor <= limit for factor in moved.values()):
        return scaled(scale)
    low, high = 1 / limit / max(moved.values()), limit / min(moved.values())
    for _ in range(200):  # the sum of what is cut off at the limits grows with the scale
        middle = math.sqrt(low * high)
        low, high = (middle, high) if sum_of(scaled(middle)) < total else (low, middle)
    return scaled(high)
