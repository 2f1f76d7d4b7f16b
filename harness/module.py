"""The Lightning module of a force field: a model, a loss, and metrics of training, validation and test.

Keys of what it logs: ``train_loss_step/…``, ``train_loss_epoch/…``, ``train_metric_step/…``, ``train_metric_epoch/…``,
``val{i}_epoch/…``, ``test{i}_epoch/…`` with every component, every per-type value and ``weighted_sum``, and
``loss_coeff/…`` with the normalised coefficients.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from harness.distributed import ProcessGroup, gradient_scale
from harness.fields import FOLLOWING, Batch
from harness.manager import MetricsManager, Values, Window, compute_together, merge_accumulated, step_together
from harness.strategies import ZeroStrategy, check_strategy, data_parallel_group, keep_whole, shard_root

__all__ = ["ForceFieldModule", "ManagerSource"]

ManagerSource = MetricsManager | Callable[..., MetricsManager] | Mapping[str, Any]
"""A manager, a callable that makes one from ``type_names=``, or a config with the ``_target_`` of such a callable."""

_EXTRA_STATE = "_extra_state"


class ForceFieldModule(LightningModule):
    """Trains, validates and tests a force field.

    The model maps a batch, a dictionary of tensors, to a dictionary of predictions; the batch is also the target. Loss
    and train metrics share one all-reduce a step. Values of a step go straight to the loggers, on the steps that the
    trainer logs (``log_every_n_steps``), and cost nothing on others; values of an epoch go through Lightning, so that
    ``ModelCheckpoint``, ``EarlyStopping`` and ``ReduceLROnPlateau`` can monitor them.

    Args:
        model: any ``nn.Module`` from a batch dictionary to a dictionary of predictions.
        loss: the loss: its ``weighted_sum`` is minimised. A manager, or what makes one, see :data:`ManagerSource`.
        val_metrics: metrics of each validation set.
        test_metrics: metrics of each test set; those of validation if not given.
        train_metrics: metrics watched on the training batches.
        optimizer: callable from parameters to an optimizer, or a config of one; Adam with 1e-3 if not given.
        lr_scheduler: dictionary as Lightning takes it, whose ``scheduler`` is a callable from an optimizer to a
            scheduler or a config of one, beside ``monitor``, ``interval``, ``frequency``; or that callable alone.
        type_names: names of the atom types, handed to losses and metrics; the model's ``type_names`` if not given.
        num_val_sets: number of validation sets.
        num_test_sets: number of test sets.

    Raises:
        ValueError: no component of the loss has a coefficient.
        TypeError: something that makes no manager, optimizer or scheduler.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ManagerSource,
        val_metrics: ManagerSource | None = None,
        test_metrics: ManagerSource | None = None,
        train_metrics: ManagerSource | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | Mapping[str, Any] | None = None,
        lr_scheduler: Callable[..., Any] | Mapping[str, Any] | None = None,
        type_names: list[str] | None = None,
        num_val_sets: int = 1,
        num_test_sets: int = 1,
    ) -> None:
        super().__init__()
        # of a model that makes its layers in configure_model; this one only shards them there
        warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides.*")
        self.model = model
        names = type_names if type_names is not None else getattr(model, "type_names", None)
        self.type_names = None if names is None else list(names)
        self.loss = self._build(loss, "loss")
        if not self.loss.do_weighted_sum:
            raise ValueError(
                f"No component of the loss has a coefficient, so there is nothing to minimise. Give at least one of "
                f"{', '.join(self.loss.keys())} a `coeff`."
            )
        self.train_metrics = None if train_metrics is None else self._build(train_metrics, "train_metrics")
        self.val_metrics = self._build_several(val_metrics, num_val_sets, "val_metrics")
        self.test_metrics = self._build_several(
            val_metrics if test_metrics is None else test_metrics, num_test_sets, "test_metrics"
        )
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.latest: dict[str, float] = {}
        """Loss values of the last step that was logged, for progress bars."""
        self.wants_to_leave = False
        """Set where this process has been told to stop; the next step tells the other ranks, see :attr:`leaving`."""
        self._leaving = _LateNumber()
        self._window: Window | None = None  # the micro-batches of the step in progress, if it has several

    def _build(self, source: ManagerSource, what: str) -> MetricsManager:
        if isinstance(source, MetricsManager):
            return source
        if isinstance(source, Mapping):
            manager = instantiate(source, type_names=self.type_names)
        elif callable(source):
            manager = source(type_names=self.type_names)
        else:
            manager = source
        if not isinstance(manager, MetricsManager):
            raise TypeError(
                f"`{what}` is a MetricsManager, a callable that makes one from `type_names=`, or a config with a "
                f"`_target_`; found {source!r}."
            )
        return manager

    def _build_several(self, source: ManagerSource | None, number: int, what: str) -> nn.ModuleList:
        """One manager for each data set, since each accumulates on its own."""
        if source is None:
            return nn.ModuleList()
        if isinstance(source, MetricsManager):
            return nn.ModuleList(copy.deepcopy(source) for _ in range(number))
        return nn.ModuleList(self._build(source, what) for _ in range(number))

    @property
    def _train_managers(self) -> list[MetricsManager]:
        return [self.loss] if self.train_metrics is None else [self.loss, self.train_metrics]

    @property
    def process_group(self) -> ProcessGroup | None:
        """The data-parallel ranks that share a batch; None for all."""
        return self.loss.process_group

    def setup(self, stage: str) -> None:
        """Take up the ranks that share a batch; refuse a strategy, or a loss, that cannot do what the trainer is to.

        Raises:
            ValueError: the strategy cannot train forces, or the two cannot accumulate gradients exactly.
        """
        # epoch values are the same on all ranks before they are logged
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*when logging on epoch level.*")
        self._check_strategy()
        group = data_parallel_group(self.trainer.strategy)
        for manager in self._managers_by_key.values():
            manager.process_group = group
        self._window = None
        if stage == "fit" and self._largest_window > 1:
            self._check_accumulation()

    def _check_accumulation(self) -> None:
        self.loss.check_accumulation()
        if self.trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} counts micro-batches by itself: the last step of an epoch "
                f"would go on in the next, and losses be divided twice. Use a strategy with "
                f"harness.strategies.AccumulatesInWindows, such as class Mine(AccumulatesInWindows, "
                f"{type(self.trainer.strategy).__name__}), or accumulate_grad_batches=1."
            )

    @property
    def _largest_window(self) -> int:
        """Largest number of micro-batches in a step, in all epochs."""
        schedules = [each.scheduling for each in self._accumulation_schedules]
        return max(self.trainer.accumulate_grad_batches, *(k for schedule in schedules for k in schedule.values()), 1)

    @property
    def _accumulation_schedules(self) -> list[GradientAccumulationScheduler]:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return [each for each in callbacks if isinstance(each, GradientAccumulationScheduler)]

    def configure_model(self) -> None:
        """Prepare the model for a strategy that splits its parameters; once only."""
        if self._trainer is None:
            return
        self._check_strategy()
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            shard_root(self.model, strategy)
        elif isinstance(strategy, ZeroStrategy) and strategy.zero_stage_3:
            keep_whole(self, self.model)

    def _check_strategy(self) -> None:
        strategy = self.trainer.strategy
        check_strategy(strategy, strategy.root_device.type, self.trainer.precision, self.trainer.callbacks)  # type: ignore[attr-defined]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions of the model, with gradients available to it in validation too (forces are a gradient)."""
        with torch.enable_grad():
            predictions: dict[str, Tensor] = self.model(batch)
        return predictions

    # --- training ---

    def on_train_start(self) -> None:
        """Take up a schedule of ``accumulate_grad_batches``; after a restart in mid-epoch Lightning does not."""
        for schedule in self._accumulation_schedules:
            k = schedule.get_accumulate_grad_batches(self.trainer.current_epoch)
            self.trainer.accumulate_grad_batches = k

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, scaled so that the average of gradients over ranks is the gradient of the whole batch.

        Under ``Trainer(accumulate_grad_batches=k)`` the batch is one of k micro-batches, whose gradients add up to that
        of the one batch that they make up; see :mod:`harness.window`. What is logged is that batch's, too.
        """
        if batch_idx == 0:
            # The first batch, and not a hook, starts an epoch's statistics: after a restart Lightning leaves out hooks
            # of the epoch that a checkpoint has ended, but its batches are counted on.
            for manager in self._train_managers:
                manager.reset()
        batch, window = self._place_in_step(batch, batch_idx)
        leaving = torch.full((1,), float(self.wants_to_leave), dtype=torch.float64, device=self.device)
        values = step_together(*self._train_managers, preds=self(batch), target=batch, window=window, signals=leaving)
        self._leaving.send(leaving)
        weighted_sum = values[0].weighted_sum
        if weighted_sum is None:
            raise ValueError("The loss has no coefficients any more: `set_coeffs` took every component out of the sum.")
        if self._logs_step and (window is None or window.is_complete):
            self._log_step(values)
        return weighted_sum * gradient_scale(self.process_group, self.trainer.accumulate_grad_batches)

    @property
    def leaving(self) -> bool:
        """Whether any rank wanted to leave when it took the last step: the same on all ranks, after each step.

        On a GPU it is the step before the last, for which the host need not wait.
        """
        return self._leaving.read() > 0

    def _place_in_step(self, batch: Batch, batch_idx: int) -> tuple[Batch, Window | None]:
        """The batch as its model is to see it, and the micro-batches of its step; None if it is the only one."""
        following = batch.get(FOLLOWING) if isinstance(batch, Mapping) else None
        if following is not None:
            batch = {name: value for name, value in batch.items() if name != FOLLOWING}
        k = self.trainer.accumulate_grad_batches
        if k == 1:
            self._window = None
            return batch, None
        # The trainer's steps end at multiples of k and with the epoch, wherever this training began.
        num_left = int(min(k - batch_idx % k, self.trainer.num_training_batches - batch_idx))
        in_progress = self._window is not None and batch_idx % k != 0
        if following is not None and not in_progress:
            self._window = self.loss.window([batch, *following][:num_left])
        window = self._window
        num_announced = 0 if window is None else window.num_micro_batches - window.num_done
        if math.isfinite(self.trainer.num_training_batches):
            as_expected = num_announced == num_left
        else:  # it is the loader that knows where the last step ends
            as_expected = 0 < num_announced <= num_left
        if not as_expected or (following is not None and in_progress):
            found = "nothing" if following is None else f"a step of {len(following) + 1} micro-batches"
            raise ValueError(
                f"Batch {batch_idx} is one of accumulate_grad_batches={k} micro-batches, with {num_left} to come in "
                f"its step, but the data loader has announced {found}. The gradient needs the number of labels of a "
                f"step before its first backward pass. Give the trainer a loader that looks ahead: "
                f"harness.data.look_ahead(loader, {k}). The data modules of harness.data do so by themselves, given "
                f"as `datamodule=` rather than as their loaders."
            )
        return batch, window

    @property
    def _logs_step(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.trainer.global_step + 1) % every == 0

    def _log_step(self, values: tuple[Values, ...]) -> None:
        if not self.trainer.is_global_zero:
            return
        logged = values[0].to_host("train_loss_step/")
        self.latest = {name.partition("/")[2]: value for name, value in logged.items()}
        if len(values) > 1:
            logged |= values[1].to_host("train_metric_step/")
        logged |= {"epoch": self.trainer.current_epoch}
        for logger in self.trainer.loggers:
            logger.log_metrics(logged, step=self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's loss, coefficients and train metrics."""
        for manager, values, stage in zip(
            self._train_managers,
            compute_together(self._train_managers),
            ("train_loss_epoch/", "train_metric_epoch/"),
            strict=False,
        ):
            self._log_epoch(values.to_host(stage))
            manager.reset()
        coefficients = {name: coeff for name, coeff in self.loss.coeffs.items() if coeff is not None}
        self._log_epoch({f"loss_coeff/{name}": coeff for name, coeff in coefficients.items()})

    def _log_epoch(self, values: dict[str, float]) -> None:
        """Hand values to Lightning as float64 tensors; it would round Python numbers to float32."""
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})

    # --- validation and test ---

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add a batch to the metrics of its validation set; nothing is sent."""
        return self._evaluation_step(self.val_metrics, batch, dataloader_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add a batch to the metrics of its test set; nothing is sent."""
        return self._evaluation_step(self.test_metrics, batch, dataloader_idx, "test")

    def _evaluation_step(self, managers: nn.ModuleList, batch: Batch, index: int, what: str) -> dict[str, Tensor]:
        if index >= len(managers):
            raise ValueError(
                f"The data has a {what} set number {index}, but there are metrics for {len(managers)} sets. Give "
                f"ForceFieldModule `{what}_metrics` and `num_{what}_sets`."
            )
        predictions = {name: value.detach() for name, value in self(batch).items()}
        with torch.no_grad():
            managers[index](predictions, batch)
        return predictions

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of every validation set."""
        self._log_evaluation(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every test set."""
        self._log_evaluation(self.test_metrics, "test")

    def _log_evaluation(self, managers: nn.ModuleList, stage: str) -> None:
        for index, values in enumerate(compute_together(list(managers))):  # type: ignore[arg-type]
            self._log_epoch(values.to_host(f"{stage}{index}_epoch/"))
        for manager in managers:
            manager.reset()  # type: ignore[operator]

    # --- checkpoints and optimizers ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the managers' states: ranks have accumulated different data since the last merge."""
        if self._window is not None and not self._window.is_complete:
            rank_zero_warn(
                f"A checkpoint is made in the middle of a step, after {self._window.num_done} of its "
                f"{self._window.num_micro_batches} micro-batches: a run that continues from it makes a step of the "
                f"others alone. Save at the end of a step."
            )
        managers = self._managers_by_key
        merge_accumulated(list(managers.values()))
        checkpoint["type_names"] = self.type_names
        states = checkpoint.get("state_dict", {})
        states.update({key: manager.get_extra_state() for key, manager in managers.items() if key in states})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load a checkpoint with other metrics than it was made with: the old ones are dropped, new ones start anew."""
        if self._trainer is not None:
            # Lightning would do so after it has loaded the weights, which parameters of lower precision round
            self.trainer.precision_plugin.convert_module(self)
        trained = checkpoint.get("type_names")
        if trained is not None and self.type_names is not None and trained != self.type_names:
            raise ValueError(
                f"The checkpoint was trained with the atom types {trained}, these are {self.type_names}: an index "
                f"would mean another element. Give the data the checkpoint's type_names."
            )
        managers = self._managers_by_key
        rooms = ("loss.", "train_metrics.", "val_metrics.", "test_metrics.")
        states = checkpoint.get("state_dict", {})
        for key in [key for key in states if key.startswith(rooms) and key.endswith(_EXTRA_STATE)]:
            if key not in managers:
                del states[key]
        for key, manager in managers.items():
            states.setdefault(key, manager.get_extra_state())

    @property
    def _managers_by_key(self) -> dict[str, MetricsManager]:
        """All managers by the key of their state in a checkpoint."""
        return {
            f"{name}.{_EXTRA_STATE}": module
            for name, module in self.named_modules()
            if isinstance(module, MetricsManager)
        }

    def configure_optimizers(self) -> Any:
        """Optimizer, and learning-rate scheduler if there is one, from their callables or configs."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("The model has no parameters that require a gradient: there is nothing to train.")
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=1e-3)
            if self._optimizer is None
            else _call(self._optimizer, "optimizer", parameters)
        )
        if self._lr_scheduler is None:
            return optimizer
        if isinstance(self._lr_scheduler, Mapping) and "scheduler" in self._lr_scheduler:
            options: dict[str, Any] = {str(key): value for key, value in self._lr_scheduler.items()}
        else:
            options = {"scheduler": self._lr_scheduler}
        options["scheduler"] = _call(options["scheduler"], "lr_scheduler", optimizer)
        return {"optimizer": optimizer, "lr_scheduler": options}


class _LateNumber:
    """A number of a step on the host, without making it wait: on a GPU it is read one step later."""

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def send(self, number: Tensor) -> None:
        """Start to copy a step's number, ``[1]``."""
        if number.is_cuda:
            host = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._sent = [*self._sent[-1:], (host, arrived)]
        else:
            self._sent = [(number, None)]

    def read(self) -> float:
        """The newest number that need not be waited for; 0 before there is one."""
        if not self._sent or (self._sent[0][1] is not None and len(self._sent) < 2):
            return 0.0
        number, arrived = self._sent[0]
        if arrived is not None:
            arrived.synchronize()  # of the step before: long past, unless the host runs ahead of the device
        return float(number.numpy()[0])


def _call(source: Callable[..., Any] | Mapping[str, Any], what: str, argument: Any) -> Any:
    """Result of a callable, or of a config's target, on one argument."""
    if isinstance(source, Mapping):
        source = instantiate(source, _partial_=True)
    if not callable(source):
        raise TypeError(f"`{what}` is a callable or a config with a `_target_`, found {source!r}.")
    try:
        return source(argument)
    except (TypeError, ValueError) as error:
        target = getattr(source, "func", source)
        options = getattr(source, "keywords", {})
        name = getattr(getattr(target, "target", target), "__name__", repr(target))
        raise ValueError(f"The {what}, {name} with {dict(options)}, cannot be made: {error}") from error
