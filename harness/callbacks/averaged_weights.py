"""Exponential moving average of the weights, which is what is validated, tested and kept."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from harness.module import ForceFieldModule
from harness.module.checkpoint_states import adopt_managers
from harness.module.schedule_following import epoch_of
from harness.support.checks import is_number, whole_number
from harness.support.lightning_private import average_model, set_average_model

__all__ = ["ExponentialMovingAverage", "warmed_up_decay"]


def warmed_up_decay(decay: float, num_updates: int) -> float:
    r"""Decay :math:`\min\big(d, \frac{1 + n}{10 + n}\big)` after :math:`n` updates.

    A constant :math:`d` of 0.999 leaves 90 % of the first weights in the average after 100 steps. It is that of
    TensorFlow's ``tf.train.ExponentialMovingAverage`` and of ``torch_ema``, which MACE trains with.
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


class ExponentialMovingAverage(EMAWeightAveraging):
    r"""Validates, tests and keeps an exponential moving average of the weights.

    .. math:: \bar\theta \leftarrow d_n \bar\theta + (1 - d_n)\, \theta, \qquad
              d_n = \min\Big(d, \frac{1 + n}{10 + n}\Big)

    after an optimizer step, with the number :math:`n` of updates before; the first one takes :math:`\theta` as it is.
    A stage of the loss's schedule can have another :math:`d` (:class:`harness.schedules.Stage`, ``average_decay``). All
    parameters of the module are averaged, in their own dtypes. Buffers are copied: tables of atomic numbers are no
    averages, and reference energies are what they are. The host does not wait for the device.

    Under ``accumulate_grad_batches`` it is the step that counts, not its micro-batches. Before the first update, such
    as with ``update_starting_at_step``, the weights themselves are validated. A checkpoint of Lightning's
    ``EMAWeightAveraging`` goes on, and buffers that it has averaged are those of the training again.

    Args:
        decay: :math:`d`, at least 0 and below 1.
        warm_up: let the decay rise to :math:`d` as above; False for :math:`d_n = d`.
        include_initial: let the weights that the training starts from be the first update, as in ``torch_ema``, MACE
            and NequIP.
        average_buffers: patterns, such as ``*.running_mean``, of the names of floating-point buffers that are averaged
            too, as in ``state_dict()``.
        update_every_n_steps: optimizer steps between updates.
        update_starting_at_step: number of the first step, from 0, that is followed by an update; None for all.
        update_starting_at_epoch: number of the first epoch whose end is followed by an update; None for none.
        device: of the average; None for that of the module.

    Raises:
        ValueError: a number out of range, or a pattern that is that of no buffer, or of one of integers.
        TypeError: ``average_buffers`` is no list of patterns.
    """

    follows_stages = True

    def __init__(
        self,
        decay: float = 0.999,
        *,
        warm_up: bool = True,
        include_initial: bool = False,
        average_buffers: Sequence[str] = (),
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        if not is_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"decay is at least 0 and below 1, such as 0.999, found {decay!r}.")
        for name, flag in (("warm_up", warm_up), ("include_initial", include_initial)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is true or false, found {flag!r}.")
        if isinstance(average_buffers, str) or not all(isinstance(each, str) for each in average_buffers):
            raise TypeError(f"average_buffers is a list of names or patterns, found {average_buffers!r}.")
        whole_number("update_every_n_steps", update_every_n_steps)
        starts = {
            "update_starting_at_step": update_starting_at_step,
            "update_starting_at_epoch": update_starting_at_epoch,
        }
        for name, value in starts.items():
            if value is not None:
                whole_number(name, value, least=0)
        super().__init__(device, False, float(decay), update_every_n_steps, **starts)
        self.decay = float(decay)
        self.warm_up = warm_up
        self.include_initial = include_initial
        self.average_buffers = tuple(average_buffers)

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint: that of Lightning's class, whose checkpoints go on."""
        return EMAWeightAveraging.__qualname__

    def check_job(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse patterns of buffers that cannot be averaged.

        Raises:
            ValueError: with the names that there are.
        """
        _averaged_buffers(pl_module, self.average_buffers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the module, which becomes the average."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            copied, buffers = average_model(self).module, _averaged_buffers(pl_module, self.average_buffers)
            set_average_model(self, _Average(copied, self.decay, self.warm_up, buffers))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the average begin with the weights of now, if they count."""
        average = average_model(self)
        if self.include_initial and not average.num_updates:
            average.update_parameters(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average on behind a step, with the decay of the schedule's stage if it has one."""
        average = average_model(self)
        if isinstance(pl_module, ForceFieldModule):
            stage = pl_module.optimizer_settings.stage(epoch_of(trainer, batch_idx, pl_module.loss))
            average.decay = self.decay if stage.average_decay is None else stage.average_decay
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module."""
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the average the checkpoint's weights; those of the training are beside them."""
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the average and the weights of the training, also with other metrics than they were made with."""
        if "current_model_state" in checkpoint:
            adopt_managers(pl_module, checkpoint["current_model_state"])
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        average = average_model(self)
        if average is not None:
            average.copy_buffers(pl_module)

    def _follow(self, module: nn.Module) -> None:
        """Let the average be the weights themselves as long as it has not begun."""
        average = average_model(self)
        if average is not None and not average.num_updates:
            average.copy_all(module)


class _Average(nn.Module):
    """Average of a module, with the names of ``torch.optim.swa_utils.AveragedModel``.

    That one keeps its number of updates on the device, where the host would wait for it in every step.

    Args:
        module: copy of the module, which becomes the average.
        decay: of the average; may be changed.
        warm_up: let the decay rise.
        buffers: names of the buffers that are averaged.
    """

    n_averaged: Tensor

    def __init__(self, module: nn.Module, decay: float, warm_up: bool, buffers: frozenset[str]) -> None:
        super().__init__()
        self.module = module
        self.decay, self._warm_up, self._averaged_buffers = decay, warm_up, buffers
        self.register_buffer("n_averaged", torch.tensor(0))

    @property
    def num_updates(self) -> int:
        """Updates so far."""
        return int(self.n_averaged)  # a number on the host

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average on to the weights of a step."""
        number = self.num_updates
        if number == 0:
            self.copy_all(model)
        else:
            decay = warmed_up_decay(self.decay, number) if self._warm_up else self.decay
            average = get_ema_multi_avg_fn(decay)
            for averaged, current in self._pairs_by_kind(model):
                average(averaged, current, number)
            self.copy_buffers(model)
        self.n_averaged += 1

    def _pairs_by_kind(self, model: nn.Module) -> list[tuple[list[Tensor], list[Tensor]]]:
        """All tensors that are averaged, and those of a step, in groups of the same device and dtype."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self.module.parameters(), model.parameters(), strict=True))
        current = dict(model.named_buffers())
        pairs += [(own, current[name]) for name, own in self.module.named_buffers() if name in self._averaged_buffers]
        for own, other in pairs:
            if own.is_floating_point() or own.is_complex():
                averaged, currents = groups[own.device, own.dtype]
                averaged.append(own.detach())
                currents.append(other.detach().to(own.device))
            else:
                own.copy_(other.detach())
        return list(groups.values())

    @torch.no_grad()
    def copy_all(self, model: nn.Module) -> None:
        """Take the parameters and buffers as they are."""
        own = [*self.module.parameters(), *self.module.buffers()]
        for copied, other in zip(own, [*model.parameters(), *model.buffers()], strict=True):
            copied.copy_(other.detach())

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Take the buffers that are not averaged as they are."""
        for (name, own), other in zip(self.module.named_buffers(), model.buffers(), strict=True):
            if name not in self._averaged_buffers:
                own.copy_(other.detach())


def _averaged_buffers(module: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the buffers that are averaged.

    Raises:
        ValueError: a pattern is that of no buffer, or of one without floating-point numbers.
    """
    buffers, chosen = dict(module.named_buffers()), set()
    floats = sorted(name for name, buffer in buffers.items() if buffer.is_floating_point())
    valid = f"Expected some of {', '.join(floats)}." if floats else "There are no buffers of floating-point numbers."
    for pattern in patterns:
        found = fnmatch.filter(buffers, pattern)
        if not found:
            raise ValueError(f"average_buffers: no buffer is named {pattern!r}. {valid}")
        for name in found:
            if name not in floats:
                dtype = str(buffers[name].dtype).removeprefix("torch.")
                raise ValueError(
                    f"average_buffers: {pattern!r} is the buffer {name} of {dtype}, whose average would be rounded to "
                    f"whole numbers. {valid}"
                )
        chosen.update(found)
    return frozenset(chosen)
