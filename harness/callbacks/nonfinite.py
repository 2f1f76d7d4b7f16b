"""A loss or gradient that is NaN or infinite ends the training with an explanation, or its step is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from harness.callbacks.nonfinite_diagnosis import (
    NonFiniteField,
    RankFindings,
    explain,
    find_nonfinite_fields,
    find_nonfinite_gradients,
    finite_probe,
    gradients_of,
    largest_force,
    nonfinite_components,
    weights_of,
)
from harness.checkpoints import writing_at_once
from harness.distributed import any_over_ranks, gather_objects, rank_in_group
from harness.fields import Batch
from harness.loggers import wandb_loggers
from harness.metrics import RunningStep, Values
from harness.module import ForceFieldModule, Step, define_axes, log_to_all, logged_step
from harness.strategies import splits_parameters
from harness.support.checks import whole_number
from harness.support.device import DelayedScalar
from harness.support.warn import warn

__all__ = ["NonFiniteError", "NonFiniteGuard"]

SKIPPED = "nonfinite/skipped"
"""Log key of the number of skipped steps."""
_MOST_FILES = 8  # ranks that write their batch, where all have the cause, or none is found


class NonFiniteError(ValueError):
    """The loss, its gradient or the weights are NaN or infinite; raised on all ranks alike, with the same message."""

    on_all_ranks = True


@dataclass
class _Seen:
    """Batches and predictions of a step's micro-batches, and the last of these once it has come."""

    epoch: int
    step: int
    batch_idx: int
    batches: list[tuple[Batch, dict[str, Tensor]]] = field(default_factory=list)
    running: RunningStep | None = None

    @property
    def values(self) -> Values:
        """Values of the step, over all ranks and micro-batches; waits for them."""
        return cast(RunningStep, self.running).value().detach()


class NonFiniteGuard(Callback):
    """Checks in every step that loss and gradient are finite; otherwise explains why, and stops or skips the step.

    The loss that is looked at is merged over the ranks, and the gradient averaged, the same bits on all of them, so
    that all decide alike without a collective. It is looked at behind the backward pass, which waits for nothing. On a
    CPU both are known before the optimizer steps. On a GPU they are
    read one step later, for which the host need not wait: the optimizer has stepped with them by then, but no
    checkpoint has been made of that. Only once something is wrong do ranks talk to each other.

    A gradient can be NaN where the loss is finite, as that of the root or norm of a zero. It is not looked at where
    ranks have only parts of it (FSDP, DeepSpeed), nor under ``16-mixed``, whose scaler skips such steps by itself.
    In any case weights that are not finite are never saved: the training ends, and the checkpoints of before stay. Only
    checkpoints of weights alone (``save_weights_only``) are not checked, since Lightning calls no callback for them.

    The message names the components, the atom types, the ranks and the frames, whether it is labels or predictions,
    and what helps; it is the message of a :class:`NonFiniteError`, an alert in W&B, and a file. In the folder
    ``nonfinite`` are, for a step s of epoch e as they are logged: ``epoch{e}_step{s}.txt``, that message;
    ``epoch{e}_step{s}_rank{r}.pt`` of each rank at fault, with ``batch`` and ``predictions``; and, with the end of the
    training, ``epoch{e}_step{s}.ckpt``, all of its state: on a CPU that before the step, from which a training goes on
    with the next batch. Both load with ``weights_only=True``.

    With ``action="skip"`` such a step changes nothing: no weight, nothing in the optimizer, nothing in the averages of
    the epoch. What counts steps goes on: learning-rate schedules, coefficients that move by step, and averages of the
    weights, which come a step nearer to the weights of before. The number of such steps is logged as
    ``nonfinite/skipped``; the first is explained in a warning. Since weights cannot be taken back, loss and gradient of
    this very step are waited for before the optimizer steps. Weights that are not finite themselves end the training
    at once. If a step has several micro-batches, one that is not finite makes the whole step so.

    The batch and the predictions of the last step, on a GPU of the last two, are kept in memory.

    Args:
        action: ``stop`` or ``skip``.
        output_dir: where the folder ``nonfinite`` is made.
        max_skipped: steps in a row that are skipped; one more ends the training.

    Raises:
        ValueError: another action; or ``skip`` with an optimizer that does not leave alone what has no gradient.
        TypeError: the module is not a :class:`~harness.module.ForceFieldModule`.
    """

    def __init__(self, action: str = "stop", output_dir: str | Path = ".", max_skipped: int = 10) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"action is stop or skip, found {action!r}.")
        whole_number("max_skipped", max_skipped, least=0)
        self.action = action
        self.output_dir = Path(output_dir)
        self.max_skipped = max_skipped
        self.num_skipped = 0
        """Number of skipped steps so far."""
        self.loss = DelayedScalar()
        """Weighted sum of each step."""
        self.gradient = DelayedScalar()
        """Number that is finite if the gradient of the step is; see
        :func:`~harness.callbacks.nonfinite_diagnosis.finite_probe`."""
        self._in_a_row = 0
        self._seen: list[_Seen] = []
        self._trained: list[nn.Parameter] = []  # to look for them in every step takes longer than to look at them
        self._ending = False

    @property
    def folder(self) -> Path:
        """Folder of the batches and the explanation."""
        return self.output_dir / "nonfinite"

    # --- before ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that does not name the components of its loss."""
        _check_module(pl_module)
        self._seen, self._in_a_row, self._ending = [], 0, False
        self._forget()

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that does not name the components of its loss, and to skip steps that cannot be skipped.

        Raises:
            TypeError: the module is no :class:`~harness.module.ForceFieldModule`.
            ValueError: see :meth:`check`.
        """
        _check_module(pl_module)
        if stage == "fit" and self.action == "skip":
            made: Any = pl_module.configure_optimizers()
            self.check(trainer.strategy, [made["optimizer"] if isinstance(made, dict) else made])

    def check(self, strategy: Strategy | str, optimizers: list[Optimizer]) -> None:
        """Refuse to skip steps that cannot be skipped.

        Raises:
            ValueError: DeepSpeed, which steps by itself, or an optimizer that may change what has no gradient.
        """
        if self.action != "skip":
            return
        instead = "Use action=stop, callbacks.nonfinite.action=stop on the command line"
        if isinstance(strategy, DeepSpeedStrategy):
            raise ValueError(
                f"NonFiniteGuard cannot skip steps under DeepSpeed, whose engine keeps the gradients and steps by "
                f"itself. {instead}, or another strategy."
            )
        for optimizer in optimizers:
            if not type(optimizer).__module__.startswith("torch.optim.") or isinstance(optimizer, LBFGS):
                raise ValueError(
                    f"NonFiniteGuard skips a step by taking the gradients away, and {type(optimizer).__name__} is not "
                    f"known to change nothing then; expected an optimizer of torch.optim, other than LBFGS. {instead}."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse steps that cannot be skipped; define the axis of the number of skipped steps."""
        self.check(trainer.strategy, trainer.optimizers)
        if self.action == "skip":
            define_axes(trainer, step=[SKIPPED])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the trained parameters, if their gradients are those of the optimizer, the same on all ranks."""
        strategy, scaler = trainer.strategy, getattr(trainer.precision_plugin, "scaler", None)
        has_parts = isinstance(strategy, DeepSpeedStrategy) or splits_parameters(strategy)
        self._trained = [] if has_parts or scaler is not None else list(pl_module.parameters())

    # --- in a step ---

    def on_train_values(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> None:
        """Keep batch and predictions of the step, and its values, which nobody waits for here."""
        if step.window.num_done == 1 or not self._seen:
            kept = self._seen[-1:] if self.loss.is_delayed or step.window.num_micro_batches > 1 else []
            self._seen = [*kept, _Seen(trainer.current_epoch, logged_step(trainer), step.batch_idx)]
        seen = self._seen[-1]
        seen.batches.append((step.batch, {name: value.detach() for name, value in step.predictions.items()}))
        if step.is_whole:  # then it is the loss of all micro-batches
            seen.running = step.running
            if not self.loss.is_delayed:
                self._seen = [seen]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop or skip if the loss, which all ranks have by now, or its gradient is not finite."""
        module = cast(ForceFieldModule, pl_module)
        if self._seen[-1].running is not None:
            self.loss.send(cast(Tensor, self._seen[-1].values.weighted_sum).reshape(1))
        number = finite_probe([grad for each in self._trained if (grad := each.grad) is not None])
        if number is not None:
            self.gradient.send(number)
        if self.action == "skip":
            if self._is_finite():
                self._in_a_row = 0
            else:
                self._skip(trainer, module)
        elif not (math.isfinite(self.loss.read()) and math.isfinite(self.gradient.read())):
            self._stop(trainer, module, self._seen[0], trained=self.loss.is_delayed)

    def _is_finite(self) -> bool:
        """True if loss and gradient of the last step are finite; the host waits for them."""
        return math.isfinite(self.loss.wait()) and math.isfinite(self.gradient.wait())

    def _forget(self) -> None:
        self.loss.forget()
        self.gradient.forget()

    # On a GPU the loss of the last step has not been read yet.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation of weights that a loss that is not finite has changed."""
        self._look_at_last(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the next epoch if the last step is not finite."""
        self._look_at_last(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite in place of good ones."""
        self._look_at_last(trainer, pl_module)
        whole = self._last_whole
        if self._ending or whole is None:
            return
        number = finite_probe(pl_module.parameters())
        if any_over_ranks(number is not None and not math.isfinite(float(number))):
            self._stop(trainer, cast(ForceFieldModule, pl_module), whole, trained=True)

    def _look_at_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole = self._last_whole
        if self._ending or trainer.sanity_checking or whole is None or self._is_finite():
            return
        self._stop(trainer, cast(ForceFieldModule, pl_module), whole, trained=True)

    @property
    def _last_whole(self) -> _Seen | None:
        """Last step with all its micro-batches; a validation can come between those of the next one."""
        return next((seen for seen in reversed(self._seen) if seen.running is not None), None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the batches of the last steps."""
        self._seen, self._trained = [], []
        self._forget()

    # --- once something is wrong: all ranks are here, in the same step ---

    def _skip(self, trainer: Trainer, module: ForceFieldModule) -> None:
        seen = self._seen[-1]
        spoilt = any_over_ranks(bool(weights_of(module)))
        if spoilt or self._in_a_row == self.max_skipped:
            self._stop(trainer, module, seen, trained=False)
        for parameter in module.parameters():
            parameter.grad = None
        for manager in filter(None, (module.loss, module.train_metrics)):
            manager.undo_step()
        self._forget()
        self._in_a_row += 1
        self.num_skipped += 1
        if self.num_skipped == 1:
            message = self._explain(trainer, module, seen, trained=False)
            rank_zero_warn(
                f"{message}\nThe step is skipped. Later ones are counted as {SKIPPED}, without a message; more than "
                f"{self.max_skipped} in a row end the training."
            )
            self._publish(trainer, seen, "A step is skipped", message)
        log_to_all(trainer, {SKIPPED: self.num_skipped}, seen.step, seen.epoch)

    def _stop(self, trainer: Trainer, module: ForceFieldModule, seen: _Seen, trained: bool) -> None:
        self._ending = True
        if not trained:
            for manager in filter(None, (module.loss, module.train_metrics)):
                manager.undo_step()
        message = self._explain(trainer, module, seen, trained)
        checkpoint = self._file(seen, ".ckpt")
        with writing_at_once(trainer):
            trainer.save_checkpoint(checkpoint, weights_only=False)
        rate = trainer.optimizers[0].param_groups[0].get("initial_lr")
        lower = "" if rate is None else f" optimizer.lr={float(rate) / 10:g}"
        message += f"\nThe state of the training is in {checkpoint}"
        if trained:  # whose weights are of no use
            message += "."
        else:
            message += f", which goes on with the next batch, also with a lower rate: ckpt_path={checkpoint}{lower}"
        if self._in_a_row:
            message += f"\n{self._in_a_row} steps in a row were skipped before it (max_skipped={self.max_skipped})."
        self._publish(trainer, seen, "Loss or weights are not finite", message)
        raise NonFiniteError(message)

    def _explain(self, trainer: Trainer, module: ForceFieldModule, seen: _Seen, trained: bool) -> str:
        """Explanation of the cause, the same text on all ranks; ranks with the cause write their batches."""
        values = seen.values
        components = nonfinite_components(module.loss, values)
        findings = gather_objects(self._gather(trainer, module, seen, list(components), trained))
        at_fault = [rank for rank, each in enumerate(findings) if each.fields] or list(range(len(findings)))
        at_fault = at_fault[:_MOST_FILES]
        if rank_in_group() in at_fault:
            self._write_batch(seen, findings[rank_in_group()])
        several = f", in {len(seen.batches)} micro-batches" if len(seen.batches) > 1 else ""
        message = explain(
            f"step {seen.step} of epoch {seen.epoch} (batch {seen.batch_idx} of it{several}; all counted from 0)",
            float(cast(Tensor, values.weighted_sum)),
            components,
            findings,
            trained=trained,
            settings={
                "the learning rate": f"{trainer.optimizers[0].param_groups[0]['lr']:g}",
                "trainer.gradient_clip_val": trainer.gradient_clip_val,
                "trainer.precision": trainer.precision,
            },
        )
        ranks = "*" if len(at_fault) > 1 else at_fault[0]
        return f"{message}\nIts batch is in {self._file(seen, f'_rank{ranks}.pt')}."

    def _gather(
        self, trainer: Trainer, module: ForceFieldModule, seen: _Seen, components: list[str], trained: bool
    ) -> RankFindings:
        """Findings of this rank in its part of the step."""
        loss = float(cast(Tensor, seen.values.weighted_sum))
        of_gradient = math.isfinite(loss) and not trained
        frames = getattr(getattr(getattr(trainer, "datamodule", None), "train_set", None), "frames", [])

        def place(index: int) -> str | None:
            return getattr(frames[index], "location", None) if 0 <= index < len(frames) else None

        weights, gradients = weights_of(module), gradients_of(module) if of_gradient else []
        try:
            fields, forces = [], []
            for number, (batch, predictions) in enumerate(seen.batches):
                found = find_nonfinite_fields(module.loss, components, predictions, batch, place)
                if of_gradient:
                    found = _find_in_gradient(trainer, module, batch, place)
                fields += [_in_micro_batch(nonfinite_field, number, len(seen.batches)) for nonfinite_field in found]
                forces.append(largest_force(batch, place))
            largest = max(filter(None, forces), default=None)
            return RankFindings(fields, weights, gradients, largest)
        except Exception as error:  # the other ranks wait for an answer, whatever it is
            note = f"its batch cannot be looked into: {type(error).__name__}: {error}"
            return RankFindings(weights=weights, gradients=gradients, note=note)

    def _write_batch(self, seen: _Seen, findings: RankFindings) -> None:
        at_fault = next((each.micro_batch or 0 for each in findings.fields), 0)
        batch, predictions = seen.batches[at_fault]
        content = {
            "batch": _on_cpu(batch),
            "predictions": _on_cpu(predictions),
            "epoch": seen.epoch,
            "step": seen.step,
            "micro_batch": at_fault,
            "found": [str(each) for each in findings.fields],
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(content, self._file(seen, f"_rank{rank_in_group()}.pt"))
        except (OSError, RuntimeError) as error:
            warn(f"the batch that is not finite cannot be written: {error}")

    def _publish(self, trainer: Trainer, seen: _Seen, title: str, message: str) -> None:
        if not trainer.is_global_zero:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file(seen, ".txt").write_text(f"{message}\n")
        except OSError as error:
            warn(f"{self._file(seen, '.txt')} cannot be written: {error}")
        for logger in wandb_loggers(trainer):
            logger.alert(title, message)

    def _file(self, seen: _Seen, ending: str) -> Path:
        return self.folder / f"epoch{seen.epoch}_step{seen.step}{ending}"

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Number of skipped steps, in all and in a row."""
        return {"num_skipped": self.num_skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from the numbers of a checkpoint."""
        self.num_skipped, self._in_a_row = state_dict["num_skipped"], state_dict["in_a_row"]


def _check_module(pl_module: LightningModule) -> None:
    if not isinstance(pl_module, ForceFieldModule):
        raise TypeError(
            f"NonFiniteGuard watches the loss of a ForceFieldModule, found {type(pl_module).__name__}. Leave it "
            f"out of the callbacks: callbacks.nonfinite=null."
        )


def _find_in_gradient(
    trainer: Trainer, module: ForceFieldModule, batch: Batch, place: Callable[[int], str | None]
) -> list[NonFiniteField]:
    """Frames whose gradient is not finite, each from a forward pass of its own: the graph of the step is freed."""
    devices = [module.device] if module.device.type == "cuda" else []
    parameters = [each for each in module.model.parameters() if each.requires_grad]
    buffers = [(each, each.clone()) for each in module.model.buffers()]
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), trainer.precision_plugin.forward_context():
            return find_nonfinite_gradients(module.loss, module, batch, parameters, place)
    finally:
        for buffer, before in buffers:  # the step may be skipped, and changes nothing then
            buffer.copy_(before)


def _in_micro_batch(nonfinite_field: NonFiniteField, number: int, total: int) -> NonFiniteField:
    return replace(nonfinite_field, micro_batch=number) if total > 1 else nonfinite_field


def _on_cpu(tensors: Batch) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items() if isinstance(value, Tensor)}
