"""The Lightning module of a force field: a model, a loss, and metrics of training, validation and test.

Log keys (:mod:`harness.support.log_keys`): ``train_loss_step/…``, ``train_loss_epoch/…``, ``train_metric_step/…``,
``train_metric_epoch/…``, ``val{i}_epoch/…``, ``test{i}_epoch/…`` with every component, every per-type value and
``weighted_sum``; ``loss_coeff_step/…`` and ``loss_coeff/…`` (of the epoch) with its coefficients, and weights of
atom types where there are any; ``loss_contribution_step/…``, ``loss_contribution_epoch/…``,
``val{i}_contribution/…`` and ``test{i}_contribution/…`` with coefficient × value, which add up to the ``weighted_sum``
of the same step or epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from harness.distributed import ProcessGroup, gradient_scale
from harness.fields import Batch
from harness.metrics import (
    MetricsManager,
    Report,
    RunningStep,
    Values,
    begin_step,
    compute_together,
    merge_accumulated,
)
from harness.module.accumulation import Accumulation
from harness.module.build import (
    ManagerSource,
    asked_for,
    build_manager,
    build_managers,
    build_optimizer,
    warm_up_of,
)
from harness.module.checkpoint_states import adopt_managers, adopt_weighting, managers_by_key
from harness.module.coefficient_control import controllers_of
from harness.module.continuation import RECORD, Continuation, describe, parts_of
from harness.module.empty_batches import (
    PredictedRows,
    fields_read,
    has_graphs,
    skip_empty_batches,
    takes_empty_batches,
)
from harness.module.horizon import Pace, Progress, TrainingLength, batches_of_epoch
from harness.module.optimizer_settings import OptimizerSettings, check_averaging, ignores_loss
from harness.module.reporting import define_axes_of_stages, epoch_row, leave_out
from harness.module.schedule_following import (
    ScheduleFollower,
    check_length,
    epoch_of,
    warn_of_long_warm_up,
    warn_of_monitors,
    warn_of_unreached,
)
from harness.module.step import LearntWeighting, Step, StepObserver, StepSumsOfAll, is_nth_step
from harness.module.step_log import StepLog
from harness.strategies import (
    ZeroStrategy,
    check_strategy,
    data_parallel_group,
    keep_whole,
    shard_root,
    splits_parameters,
)
from harness.support.lightning_private import leave_out_empty_hooks, trainer_of
from harness.support.log_keys import TRAIN_LOSS, TRAIN_METRIC, TRAINING_STAGES, LogKeys, stage_of_set

__all__ = ["ForceFieldModule", "ManagerSource"]

_POSITION = "schedule_position"
"""Key in a checkpoint of the epoch and the relative learning rate that its weights were made at."""


class ForceFieldModule(LightningModule):
    """Trains, validates and tests a force field.

    The model maps a batch, a dictionary of tensors, to a dictionary of predictions; the batch is also the target. It is
    not called for a batch without graphs, unless it says by ``takes_empty_batches = True`` that it can be.

    Loss and train metrics share one all-reduce a step, which the backward pass does not wait for if the loss is linear
    in its sums (:meth:`harness.metrics.MetricsManager.announces`). Values of a step go straight to the loggers, on the
    steps that the trainer logs (``log_every_n_steps``), and cost nothing on others; those of an epoch go through
    Lightning, for ``ModelCheckpoint``, ``EarlyStopping`` and ``ReduceLROnPlateau`` to monitor.

    Args:
        model: any ``nn.Module`` from a batch dictionary to a dictionary of predictions.
        loss: the loss: its ``weighted_sum`` is minimised. A manager, or a source of one, see :data:`ManagerSource`.
        val_metrics: metrics of each validation set.
        test_metrics: metrics of each test set; those of validation if not given.
        train_metrics: metrics watched on the training batches.
        optimizer: callable from parameters to an optimizer, or a config of one, which may have ``groups`` of parameters
            (:class:`harness.module.parameters.ParameterGroup`); Adam with 1e-3 if not given.
        lr_scheduler: dictionary as Lightning takes it, whose ``scheduler`` is a callable from an optimizer to a
            scheduler or a config of one, beside ``monitor``, ``interval``, ``frequency``; or that callable alone. An
            argument ``horizon`` of it, such as ``T_max: horizon``, is the length of the training in its intervals. Its
            key ``warm_up`` has the arguments of a :class:`~harness.module.learning_rates.WarmUp`.
        type_names: names of the atom types, handed to losses and metrics; the model's ``type_names`` if not given.
        group_names: names of the groups of frames, in the order of ``group_index``, handed to losses and metrics.
        set_names: names of the data sets, in the order of ``set_index``, likewise.
        labelled_sets: names of the sets that have a label, by its field, likewise.
        num_val_sets: number of validation sets.
        num_test_sets: number of test sets.
        weighting: learns the coefficients of the loss, see :class:`harness.adaptive.UncertaintyWeighting`.

    Attributes:
        reports: values, coefficients, contributions and counts of the last epoch on the host, by ``train_loss``,
            ``train_metric``, ``val0``, ``val1``, …, ``test0``, …; the same on all ranks.
        predicted_rows: shapes of the model's predictions, for batches without graphs.
        step_log: values of logged steps on their way to the loggers, and those of the last one.
        optimizer_settings: of the warm-up, and of the stages of the loss's schedule.

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
        weighting: LearntWeighting | None = None,
        group_names: Sequence[str] | None = None,
        set_names: Sequence[str] | None = None,
        labelled_sets: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        super().__init__()
        # of a model that makes its layers in configure_model; this one only shards them there
        warnings.filterwarnings("ignore", message=".*WeightAveraging callback with a model that overrides.*")
        self.model = model
        names = type_names if type_names is not None else getattr(model, "type_names", None)
        self.type_names = None if names is None else list(names)
        self.group_names, self.set_names = list(group_names or ()), list(set_names or ())
        frames = {"group_names": self.group_names, "set_names": self.set_names, "labelled_sets": labelled_sets}
        self.loss = build_manager(loss, "loss", self.type_names, frames)
        if not self.loss.do_weighted_sum:
            raise ValueError(
                f"No component of the loss has a coefficient, so there is nothing to minimise. Give at least one of "
                f"{', '.join(self.loss.keys())} a `coeff`."
            )
        if weighting is not None:
            self.loss.weigh_by(weighting)
        self.train_metrics = (
            None if train_metrics is None else build_manager(train_metrics, "train_metrics", self.type_names, frames)
        )
        self.val_metrics = build_managers(val_metrics, num_val_sets, "val_metrics", self.type_names, frames)
        tested = val_metrics if test_metrics is None else test_metrics
        self.test_metrics = build_managers(tested, num_test_sets, "test_metrics", self.type_names, frames)
        self.predicted_rows = PredictedRows(set().union(*map(fields_read, self.managers.values())))
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.reports: dict[str, Report] = {}
        self.step_log = StepLog(self.loss)
        self.optimizer_settings = OptimizerSettings()
        self._follower = ScheduleFollower()
        self._optimization: dict[str, Any] | None = None
        self._batches_done: int | None = None  # of the epoch of the last step
        self._horizons: dict[Pace, int] = {}  # of a training that goes on from a checkpoint
        # of the trainer's callbacks, from setup on
        self._accumulation = Accumulation()
        self._step_sums = StepSumsOfAll()
        self._observers: list[StepObserver] = []
        self._running: list[RunningStep] = []  # of the step in progress, one for each micro-batch

    @property
    def managers(self) -> dict[str, MetricsManager]:
        """Managers by the stage of their log keys: ``train_loss``, ``train_metric``, ``val0``, …, ``test0``, …"""
        managers: dict[str, Any] = {TRAIN_LOSS: self.loss}
        if self.train_metrics is not None:
            managers[TRAIN_METRIC] = self.train_metrics
        managers |= {stage_of_set("val", index): manager for index, manager in enumerate(self.val_metrics)}
        return managers | {stage_of_set("test", index): manager for index, manager in enumerate(self.test_metrics)}

    @property
    def _train_managers(self) -> list[MetricsManager]:
        return [self.loss] if self.train_metrics is None else [self.loss, self.train_metrics]

    @property
    def process_group(self) -> ProcessGroup | None:
        """The data-parallel ranks that share a batch; None for all."""
        return self.loss.process_group

    def setup(self, stage: str) -> None:
        """Take up the ranks that share a batch, and the callbacks; refuse a loss that the strategy cannot train.

        Raises:
            ValueError: the strategy cannot train forces, or the two cannot accumulate gradients exactly.
        """
        # epoch values are the same on all ranks before they are logged
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*when logging on epoch level.*")
        _check_strategy(self)
        group = data_parallel_group(self.trainer.strategy)
        for manager in managers_by_key(self).values():
            manager.process_group = group
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._accumulation = Accumulation(callbacks)
        self._step_sums = StepSumsOfAll(callbacks)
        self._observers = [callback for callback in callbacks if isinstance(callback, StepObserver)]
        if stage == "fit":
            self._horizons = {}
            warn_of_unreached(self.trainer, self._train_managers)
            warn_of_long_warm_up(self.trainer, warm_up_of(self._lr_scheduler))
            monitors = [getattr(callback, "monitor", None) for callback in callbacks]
            if isinstance(self._lr_scheduler, Mapping):
                monitors.append(self._lr_scheduler.get("monitor"))
            trained = {name: manager for name, manager in self.managers.items() if not name.startswith("test")}
            warn_of_monitors(trained, monitors)
            self._accumulation.check(self.trainer, self.loss)
            check_averaging(self.loss.schedule, callbacks)

    def configure_model(self) -> None:
        """Prepare the model for a strategy that splits its parameters; once only."""
        if trainer_of(self) is None:
            return
        _check_strategy(self)
        strategy = self.trainer.strategy
        if splits_parameters(strategy) and not takes_empty_batches(self.model):
            skip_empty_batches(self.model, self.predicted_rows)
        if isinstance(strategy, ModelParallelStrategy):
            shard_root(self.model, strategy)
        elif isinstance(strategy, ZeroStrategy) and strategy.zero_stage_3:
            keep_whole(self, self.model)

    def check_weighting(self, strategy: Strategy) -> None:
        """Refuse learnt coefficients under a strategy that cannot learn them.

        Raises:
            ValueError: the strategy splits parameters over the ranks.
        """
        if isinstance(self.loss.weighting, LearntWeighting) and splits_parameters(strategy):
            raise ValueError(
                f"{type(self.loss.weighting).__name__} learns coefficients, which every rank needs whole in every "
                f"step, but {type(strategy).__name__} splits parameters over the ranks, and the optimizer and the "
                f"clipping of gradients take no whole ones beside split ones. Choose strategy=ddp or deepspeed_zero2, "
                f"or adaptive weighting without parameters, such as adaptive=softadapt."
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Predictions of the model, with gradients available to it in validation too (forces are a gradient)."""
        with torch.enable_grad():
            if has_graphs(batch):
                predictions: dict[str, Tensor] = self.model(batch)
                self.predicted_rows.remember(predictions)
                return predictions
            if takes_empty_batches(self.model):
                return dict(self.model(batch))
            return self.predicted_rows.of_no_graphs(self.model, batch)

    # --- training ---

    def on_train_start(self) -> None:
        """Take up a schedule of ``accumulate_grad_batches``, and refuse a schedule by step without a length."""
        leave_out_empty_hooks(self.trainer)
        self._accumulation.apply_schedule(self.trainer)
        check_length(self.trainer, self._train_managers)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, scaled so that the average of gradients over ranks is the gradient of the whole batch.

        Under ``Trainer(accumulate_grad_batches=k)`` the batch is one of k micro-batches, whose gradients add up to that
        of the one batch that they make up; see :mod:`harness.metrics.accumulation`. Logged values are of that batch,
        too.

        On several ranks, a loss that is linear in its sums is returned without a wait for the other ranks: its value is
        then the part of this rank's batch.
        """
        self._batches_done = batch_idx + 1
        if batch_idx == 0:
            self._follower.mark(self.trainer, self._train_managers)
            # The first batch, and not a hook, starts an epoch's statistics: after a restart Lightning leaves out hooks
            # of the epoch that a checkpoint has ended, but its batches are counted on.
            for manager in self._train_managers:
                manager.reset()
        self._follower.follow_training(self.trainer, self._train_managers, batch_idx)
        batch, window = self._accumulation.place(self.trainer, self.loss, batch, batch_idx)
        predictions = self(batch)
        signals = self._step_sums.collect(batch, self.device)
        running = begin_step(*self._train_managers, preds=predictions, target=batch, window=window, signals=signals)
        if running.own.weighted_sum is None:
            raise ValueError("The loss has no coefficients any more: `set_coeffs` took every component out of the sum.")
        is_whole = window.is_complete
        self._running = [*(self._running if window.num_done > 1 else []), running]
        for observer in self._observers:
            observer.on_train_values(self.trainer, self, Step(batch, predictions, running, batch_idx, is_whole, window))
        learns = isinstance(self.loss.weighting, LearntWeighting) and is_whole
        return self.objective(running.value() if learns else running.own, is_whole)

    def on_after_backward(self) -> None:
        """Take up the sums of all ranks behind the last backward pass of a step, and log it."""
        if not self._running:  # of a training step that is not this one
            return
        *_, last = self._running
        last.release()
        if not last.is_whole:
            return
        for running in self._running:
            self._step_sums.deliver(running.signals())
        self._running = []
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if is_nth_step(self.trainer, every) and self.trainer.is_global_zero:
            self.step_log.send(self.trainer, last.values())

    def objective(self, values: Values, is_whole: bool = True) -> Tensor:
        """Scalar for ``backward``: the scaled weighted sum, and the objective of learnt coefficients.

        Args:
            values: of the loss.
            is_whole: True if a whole step is in them, False if micro-batches are still to come.
        """
        if values.weighted_sum is None:
            raise ValueError("No component of the loss has a coefficient: there is nothing to minimise.")
        num_micro_batches = self.trainer.accumulate_grad_batches if trainer_of(self) is not None else 1
        scale = gradient_scale(self.process_group, num_micro_batches)
        objective = values.weighted_sum if scale == 1 else values.weighted_sum * scale
        weighting = self.loss.weighting
        if isinstance(weighting, LearntWeighting) and is_whole:
            # From merged values, every rank has the whole gradient already: their average needs no factor.
            objective = objective + num_micro_batches * weighting.objective(values)
        return objective

    def on_train_epoch_end(self) -> None:
        """Log the epoch's loss, coefficients, contributions and train metrics."""
        self._follower.mark(self.trainer, self._train_managers)
        _finish_epoch(self, dict(zip(TRAINING_STAGES, self._train_managers, strict=False)))

    def training_so_far(self) -> dict[str, Report]:
        """Reports of ``train_loss`` and ``train_metric`` over the steps of the epoch so far; makes the host wait.

        Nothing is sent. In a validation at the end of an epoch they are those of the epoch.
        """
        managers = zip(TRAINING_STAGES, self._train_managers, strict=False)
        return {stage: manager.so_far().to_report() for stage, manager in managers}

    def on_fit_start(self) -> None:
        """Define the axes of all values, before the loggers get any."""
        define_axes_of_stages(self.trainer, self.managers, getattr(self.trainer, "callbacks", []))

    on_test_start = on_fit_start

    # --- validation and test ---

    def on_validation_epoch_start(self) -> None:
        """Move scheduled metrics on."""
        self._follower.follow_evaluation(self.trainer, self.val_metrics, self._train_managers)

    def on_test_epoch_start(self) -> None:
        """Move scheduled metrics on."""
        self._follower.follow_evaluation(self.trainer, self.test_metrics, self._train_managers)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add a batch to the metrics of its validation set; nothing is sent."""
        return _evaluate(self, self.val_metrics, batch, dataloader_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Add a batch to the metrics of its test set; nothing is sent."""
        return _evaluate(self, self.test_metrics, batch, dataloader_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of every validation set."""
        _finish_epoch(self, {stage_of_set("val", index): manager for index, manager in enumerate(self.val_metrics)})

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every test set."""
        _finish_epoch(self, {stage_of_set("test", index): manager for index, manager in enumerate(self.test_metrics)})

    # --- checkpoints and optimizers ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the managers' states: ranks have accumulated different data since the last merge."""
        self._accumulation.warn_of_unfinished_step()
        managers = managers_by_key(self)
        merge_accumulated(list(managers.values()))
        checkpoint["type_names"] = self.type_names
        checkpoint["group_names"], checkpoint["set_names"] = self.group_names, self.set_names
        checkpoint[_POSITION] = list(self._follower.position)  # not that of now: the next epoch may have begun
        if self._optimization is not None:
            checkpoint[RECORD] = {
                **self._optimization,
                "controllers": controllers_of(self.loss, self.trainer.callbacks),  # type: ignore[attr-defined]
                "num_batches": batches_of_epoch(self.trainer),
                "batches": self._batches_done,
                "accumulate": self.trainer.accumulate_grad_batches,
            }
        states = checkpoint.get("state_dict", {})
        states.update({key: manager.get_extra_state() for key, manager in managers.items() if key in states})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load a checkpoint with other metrics than it was made with: the old ones are dropped, new ones start anew."""
        trainer = trainer_of(self)
        if trainer is not None:
            # Lightning would do so after it has loaded the weights, which parameters of lower precision round
            trainer.precision_plugin.convert_module(self)
        trained = checkpoint.get("type_names")
        if trained is not None and self.type_names is not None and trained != self.type_names:
            raise ValueError(
                f"The checkpoint was trained with the atom types {trained}, these are {self.type_names}: an index "
                f"would mean another element. Give the data the checkpoint's type_names."
            )
        epoch, rate = checkpoint.get(_POSITION, (0.0, None))
        self._follower.position = epoch, rate
        state = None if trainer is None else trainer.state
        trains = state is not None and (state.fn, state.status) == (TrainerFn.FITTING, TrainerStatus.RUNNING)
        for states in (checkpoint.get("state_dict", {}), checkpoint.get("current_model_state")):
            if states is not None:  # of the weights that were trained, beside their average
                adopt_weighting(self.loss.weighting, states, trains)
                adopt_managers(self, states)
        if trainer is not None and trains:
            self._batches_done = (checkpoint.get(RECORD) or {}).get("batches")
            for line in self.go_on_from(checkpoint, trainer):
                rank_zero_info(f"differs from the checkpoint: {line}")

    def go_on_from(self, checkpoint: dict[str, Any], trainer: Trainer) -> list[str]:
        """Change the states of a checkpoint to those that a training goes on with under the settings of now.

        Lightning's ``fit(ckpt_path=...)`` calls it by :meth:`on_load_checkpoint`.

        Args:
            checkpoint: changed in place, unless nothing differs.
            trainer: of the training that goes on, not necessarily attached.

        Returns:
            A line for each difference.

        Raises:
            ValueError: it cannot go on with these settings.
        """
        continuation = Continuation(checkpoint, trainer)
        continuation.apply(self, lambda horizon: build_optimizer(self, self._optimizer, self._lr_scheduler, horizon))
        self._horizons = continuation.horizons
        return continuation.lines

    def configure_optimizers(self, length: TrainingLength | None = None) -> Any:
        """Optimizer, and learning-rate scheduler if there is one, from their callables or configs.

        Args:
            length: of the training, the ``horizon`` of a scheduler; None for that of the module's trainer.
        """
        trainer = trainer_of(self)
        reckoned = length if length is not None or trainer is None else TrainingLength.of(trainer)

        def horizon(pace: Pace) -> int:
            return self._horizons.get(pace) or cast(TrainingLength, reckoned).turns_left(pace, Progress())

        made = build_optimizer(self, self._optimizer, self._lr_scheduler, horizon if reckoned else None)
        optimizer, options = parts_of(made)
        self._optimization = describe(optimizer, options, self)
        self.optimizer_settings = OptimizerSettings(
            warm_up_of(self._lr_scheduler),
            self.loss.schedule,
            asked_for(optimizer)["settings"],
            optimizer.defaults,
        )
        return made

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step with the settings of the warm-up and of the schedule's stage, which hold from the backward pass on.

        An optimizer that looks at the loss, as LBFGS does, gets the value of all ranks, which its gradients belong to.
        The values of a logged step are read behind it on a GPU, which is busy with the backward pass.
        """
        settings, trainer = self.optimizer_settings, self.trainer

        def closure() -> Any:
            result = optimizer_closure()
            settings.apply(trainer.optimizers[0], epoch_of(trainer, batch_idx, self.loss), trainer.global_step)
            return result if result is None or ignores_loss(trainer.optimizers[0]) else _merged_objective(self)

        try:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        finally:
            settings.take_back()
            self.step_log.write(trainer)


def _merged_objective(module: ForceFieldModule) -> Tensor:
    """Objective of the last step over all ranks, unscaled: its gradient is the average that the optimizer sees."""
    running, position = cast(tuple[RunningStep, int], module.loss.epoch_row.last_step)
    values, weighting = running.value(position).detach(), module.loss.weighting
    objective = cast(Tensor, values.weighted_sum)
    return objective + weighting.objective(values).detach() if isinstance(weighting, LearntWeighting) else objective


def _check_strategy(module: ForceFieldModule) -> None:
    trainer: Any = module.trainer
    check_strategy(trainer.strategy, trainer.strategy.root_device.type, trainer.precision, list(trainer.callbacks))
    module.check_weighting(trainer.strategy)


def _finish_epoch(module: ForceFieldModule, managers: Mapping[str, Any]) -> None:
    """Report and log the values of the stages, merged over the ranks together, and start their sums anew."""
    for stage, values in zip(managers, compute_together(list(managers.values())), strict=True):
        report = module.reports[stage] = values.to_report()
        row = epoch_row(stage, report, managers[stage])
        leave_out(module.trainer, LogKeys(stage), report, managers[stage])
        # as float64 tensors: Lightning would round Python numbers to float32
        module.log_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in row.items()})
        managers[stage].reset()


def _evaluate(
    module: ForceFieldModule, managers: nn.ModuleList, batch: Batch, index: int, kind: str
) -> dict[str, Tensor]:
    """Predictions of a batch, without a graph, which is added to the metrics of its data set."""
    if index >= len(managers):
        raise ValueError(
            f"The data has a {kind} set number {index}, but there are metrics for {len(managers)} sets. Give "
            f"ForceFieldModule `{kind}_metrics` and `num_{kind}_sets`."
        )
    predictions = {name: value.detach() for name, value in module(batch).items()}
    with torch.no_grad():
        managers[index](predictions, batch)
    return predictions
