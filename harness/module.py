"""The Lightning module of a force field: a model, a loss, and metrics of training, validation and test.

Keys of what it logs: ``train_loss_step/…``, ``train_loss_epoch/…``, ``train_metric_step/…``, ``train_metric_epoch/…``,
``val{i}_epoch/…``, ``test{i}_epoch/…`` with every component, every per-type value and ``weighted_sum``, and
``loss_coeff/…`` with the normalised coefficients.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from harness.distributed import ProcessGroup, gradient_scale
from harness.fields import Batch
from harness.manager import MetricsManager, Values, compute_together, merge_accumulated, step_together

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
        """Quiet one warning of Lightning's: epoch values are the same on all ranks before they are logged."""
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*when logging on epoch level.*")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions of the model, with gradients available to it in validation too (forces are a gradient)."""
        with torch.enable_grad():
            predictions: dict[str, Tensor] = self.model(batch)
        return predictions

    # --- training ---

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, scaled so that the average of gradients over ranks is the gradient of the whole batch."""
        if batch_idx == 0:
            # The first batch, and not a hook, starts an epoch's statistics: after a restart Lightning leaves out hooks
            # of the epoch that a checkpoint has ended, but its batches are counted on.
            for manager in self._train_managers:
                manager.reset()
        values = step_together(*self._train_managers, preds=self(batch), target=batch)
        weighted_sum = values[0].weighted_sum
        if weighted_sum is None:
            raise ValueError("The loss has no coefficients any more: `set_coeffs` took every component out of the sum.")
        if self._logs_step_of(batch_idx):
            self._log_step(values)
        return weighted_sum * gradient_scale(self.process_group)

    def _logs_step_of(self, batch_idx: int) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (self.trainer.global_step + 1) % every:
            return False
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0  # the last micro-batch of the step

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
        managers = self._managers_by_key
        merge_accumulated(list(managers.values()))
        checkpoint["type_names"] = self.type_names
        states = checkpoint.get("state_dict", {})
        states.update({key: manager.get_extra_state() for key, manager in managers.items() if key in states})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load a checkpoint with other metrics than it was made with: the old ones are dropped, new ones start anew."""
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
