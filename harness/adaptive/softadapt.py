"""SoftAdapt: more weight to the components that fall more slowly than the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from harness.adaptive.set_point import SetPoint
from harness.metrics import MetricsManager, RunningStep
from harness.module import ForceFieldModule, Step
from harness.module.coefficient_control import loss_of, refuse_other_controllers
from harness.support.checks import is_number, is_whole_number

__all__ = ["SoftAdapt", "soft_factors"]


class SoftAdapt(Callback):
    r"""Multiplies the user's coefficients by a softmax of how each component has changed.

    With the values :math:`v_k(n)` of the components after the n-th batch or epoch, and the user's coefficients
    :math:`w_k`

    .. math::
        f_k(n) = K \operatorname{softmax}_k\left(\beta\, \frac{\Delta_k(n)}{\max(\lVert \Delta(n) \rVert, \epsilon)}
        \right), \qquad \Delta_k(n) = v_k(n) - v_k(n - 1), \qquad c_k \propto w_k \overline{f_k}

    where the mean is over the changes of the last ``frequency`` intervals, and K the number of components that have
    changed. The sum of the coefficients stays that of the user's. A component that rises, or falls less than others,
    gains weight (:math:`\beta > 0`); where all change alike the coefficients are the user's. NequIP's ``SoftAdapt``
    multiplies the coefficients that it has set before, so that they drift away from the user's; here these stay the
    point of departure: while all components have data, the ratio of two coefficients stays within a factor
    :math:`e^{\sqrt 2 \beta}` of theirs.

    Components outside of the weighted sum, and those with the coefficient 0, take no part. One without data (NaN) keeps
    its factor; when it has data again, its change is that since it had some last.

    The values are the merged ones of the loss, so that all ranks compute the same. With ``interval=batch`` the host
    waits for the device once every ``frequency`` steps; with ``epoch`` there is one more all-reduce an epoch. Under
    gradient accumulation a step of the optimizer counts as a batch, and coefficients change between steps only.

    Works with :class:`harness.module.ForceFieldModule`, and with any module that has a manager as ``loss``, such as
    NequIP's (where the host waits in every step).

    Args:
        beta: how strongly to weigh changes; 0 changes nothing, a negative one favours what falls fastest.
        interval: what the values are of: every ``batch`` or every ``epoch``.
        frequency: number of intervals from one change of the coefficients to the next.
        eps: lower bound of the norm that changes are divided by.

    Raises:
        ValueError, TypeError: an argument out of its range.

    References:
        Heydari, Thompson and Mehmood, SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
        Multi-Part Loss Functions, arXiv:1912.12355 (2019); Ocampo et al., Adaptive loss weighting for machine learning
        interatomic potentials, Comput. Mater. Sci. (2024).
    """

    controls_coefficients = True

    def __init__(
        self, beta: float, interval: Literal["batch", "epoch"] = "epoch", frequency: int = 1, eps: float = 1e-8
    ) -> None:
        if not is_number(beta) or not math.isfinite(beta):
            raise ValueError(f"beta is a finite number, found {beta!r}.")
        if interval not in ("batch", "epoch"):
            raise ValueError(f"interval is batch or epoch, found {interval!r}.")
        if not is_whole_number(frequency) or frequency < 1:
            raise ValueError(f"frequency is a whole number of intervals, at least 1, found {frequency!r}.")
        if not is_number(eps) or not 0 < eps < math.inf:
            raise ValueError(f"eps is a number above 0, found {eps!r}.")
        self.beta = float(beta)
        self.interval = interval
        self.frequency = frequency
        self.eps = float(eps)
        self._set_point = SetPoint()
        self._before: dict[str, float] = {}  # last values of the intervals that have been taken up
        self._new: list[dict[str, float]] = []  # values of the intervals since
        self._on_device: list[Tensor] = []  # further ones, which the host has not waited for
        self._names: tuple[str, ...] = ()  # of the numbers in them
        self._num_epochs = 0  # whose values have been seen
        self._step_before = 0
        self._shown: RunningStep | None = None  # of the step in progress

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a loss whose coefficients have another controller."""
        if stage == "fit":
            refuse_other_controllers(self, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the coefficients; warn of a training that ends before they change."""
        self._set_point.begin(loss_of(pl_module))
        number = trainer.max_epochs
        if self.interval == "epoch" and number is not None and 0 < number <= max(self.frequency, 2):
            rank_zero_warn(
                f"SoftAdapt changes coefficients after every {self.frequency} epochs, and the training ends with epoch "
                f"{number} (max_epochs): they stay as they are. Lower its frequency, or use interval=batch."
            )

    # --- values ---

    def on_train_values(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        """Take note of a step, whose values are kept behind its backward pass."""
        if self.interval == "batch" and step.is_whole:
            self._shown = step.running

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the values of a step, without waiting for them; of a module that does not show its steps, wait."""
        loss = loss_of(pl_module)
        shown = isinstance(pl_module, ForceFieldModule)
        self._keep_shown()
        if self.interval == "batch" and not shown and trainer.global_step != self._step_before:
            self._keep(trainer, loss, loss.metrics_values_step)

    def _keep_shown(self) -> None:
        if self._shown is None:
            return
        values, self._shown = self._shown.value().detach(), None
        self._names = values.names
        # a loss that is not finite is not trained on: the components that are tell nothing either
        is_finite = cast(Tensor, values.weighted_sum).isfinite()
        self._on_device.append(torch.where(is_finite, values.reported, torch.nan))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the values of an epoch; they take effect in the next one, since this one is still to be reported."""
        if self.interval == "epoch":
            self._keep_epoch(trainer, loss_of(pl_module))
        self._num_epochs = trainer.current_epoch + 1

    def _keep_epoch(self, trainer: Trainer, loss: Any) -> None:
        loss.compute()
        self._keep(trainer, loss, loss.metrics_values_epoch)

    def _keep(self, trainer: Trainer, loss: Any, values: Mapping[str, float | None]) -> None:
        found = {name: values.get(name) for name in self._set_point.factors}
        known = {name: math.nan if value is None else float(value) for name, value in found.items()}
        if not isinstance(loss, MetricsManager):  # ranks may hold different ones
            known = trainer.strategy.broadcast(known)
        self._new.append(known)

    def _read(self) -> None:
        """Copy values to the host, which waits for them."""
        self._keep_shown()
        if self._on_device:
            for row in torch.stack(self._on_device).tolist():
                values = dict(zip(self._names, row, strict=True))
                self._new.append({name: values[name] for name in self._set_point.factors})
            self._on_device = []

    # --- coefficients ---

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change the coefficients when it is time, before the first micro-batch of a step."""
        self._step_before = trainer.global_step
        if batch_idx == 0 and trainer.current_epoch > self._num_epochs:
            # After a restart from a checkpoint that was made behind its last batch, Lightning does not end an epoch;
            # the loss still has it.
            if self.interval == "epoch" and isinstance(loss_of(pl_module), MetricsManager):
                self._keep_epoch(trainer, loss_of(pl_module))
            self._num_epochs = trainer.current_epoch
        is_due = len(self._new) + len(self._on_device) >= self.frequency
        if is_due and batch_idx % trainer.accumulate_grad_batches == 0:
            self._change(loss_of(pl_module))

    def _change(self, loss: Any) -> None:
        self._read()
        found: dict[str, list[float]] = {}
        for values in self._new:
            known = self._set_point.factors.keys() & values.keys()
            now = {name: values[name] for name in sorted(known) if math.isfinite(values[name])}
            changes = {name: value - self._before[name] for name, value in now.items() if name in self._before}
            self._before |= now
            for name, factor in soft_factors(changes, self.beta, self.eps).items():
                found.setdefault(name, []).append(factor)
        self._new = []
        if found:
            self._set_point.move(loss, {name: math.fsum(each) / len(each) for name, each in found.items()})

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that coefficients depend on; numbers and strings only."""
        self._read()
        return {
            "set_point": self._set_point.state(),
            "before": dict(self._before),
            "new": [dict(values) for values in self._new],
            "num_epochs": self._num_epochs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; ``beta`` and the other arguments are those of this run."""
        self._set_point.restore(state_dict["set_point"])
        self._before = dict(state_dict["before"])
        self._new = [dict(values) for values in state_dict["new"]]
        self._on_device, self._shown = [], None
        self._num_epochs = state_dict["num_epochs"]


def soft_factors(changes: Mapping[str, float], beta: float, eps: float = 1e-8) -> dict[str, float]:
    """Factors with the mean 1 from changes of values, see :class:`SoftAdapt`.

    Example:
        >>> soft_factors({"energy": -1.0, "forces": -1.0}, beta=1.1)
        {'energy': 1.0, 'forces': 1.0}
    """
    norm = max(math.sqrt(math.fsum(change**2 for change in changes.values())), eps)
    exponents = {name: beta * change / norm for name, change in changes.items()}
    highest = max(exponents.values(), default=0.0)
    powers = {name: math.exp(exponent - highest) for name, exponent in exponents.items()}
    mean = math.fsum(powers.values()) / len(powers) if powers else 1.0
    return {name: power / mean for name, power in powers.items()}
