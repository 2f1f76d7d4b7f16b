"""The Lightning module of a force field: a model, a loss, and metrics of training, validation and test.

Keys of what it logs: ``train_loss_step/…``, ``train_loss_epoch/…``, ``train_metric_step/…``, ``train_metric_epoch/…``,
``val{i}_epoch/…``, ``test{i}_epoch/…`` with every component, every per-type value and ``weighted_sum``;
``loss_coeff_step/…`` and ``loss_coeff/…`` (of the epoch) with the normalised coefficients, and weights of atom types
where there are any; ``loss_contribution_step/…``, ``loss_contribution_epoch/…``, ``val{i}_contribution/…`` and
``test{i}_contribution/…`` with coefficient × value, which add up to the ``weighted_sum`` of the same step or epoch.
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
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from harness.distributed import ProcessGroup, gradient_scale
from harness.fields import NUM_ATOMS, UPCOMING_LABELS, Batch
from harness.metrics import (
    WEIGHTED_SUM,
    MetricsManager,
    Report,
    Values,
    Window,
    compute_together,
    merge_accumulated,
    step_together,
)
from harness.module.step import AxesLogger, LearntWeighting, Step, StepObserver
from harness.schedules import unreached
from harness.strategies import (
    ZeroStrategy,
    check_strategy,
    data_parallel_group,
    keep_whole,
    shard_root,
    splits_parameters,
)
from harness.support.configs import take_out
from harness.support.device import DelayedScalar, to_device

__all__ = ["ForceFieldModule", "ManagerSource"]

ManagerSource = MetricsManager | Callable[..., MetricsManager] | Mapping[str, Any]
"""A manager, a callable that makes one from ``type_names=``, or a config with the ``_target_`` of such a callable."""

_EXTRA_STATE = "_extra_state"
_POSITION = "schedule_position"
"""Key in a checkpoint of the epoch and the relative learning rate that its weights were made at."""
_WEIGHTING = "loss.weighting."


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
        weighting: learns the coefficients of the loss, see :class:`harness.adaptive.UncertaintyWeighting`.

    Attributes:
        reports: values, coefficients, contributions and counts of the last epoch on the host, by ``train_loss``,
            ``train_metric``, ``val0``, ``val1``, …, ``test0``, …; the same on all ranks.

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
        if weighting is not None:
            self.loss.weigh_by(weighting)
        self.train_metrics = None if train_metrics is None else self._build(train_metrics, "train_metrics")
        self.val_metrics = self._build_several(val_metrics, num_val_sets, "val_metrics")
        self.test_metrics = self._build_several(
            val_metrics if test_metrics is None else test_metrics, num_test_sets, "test_metrics"
        )
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self.reports: dict[str, Report] = {}
        self.latest: dict[str, float] = {}
        """Loss values of the last step that was logged, for progress bars."""
        self.preempt_requested = False
        """Set where this process has been told to stop; the next step tells the other ranks, see :attr:`preempted`."""
        self._preempt_requests = DelayedScalar()
        self._warned_of_rate = False
        self._position: tuple[float, float | None] = (0.0, None)  # epoch and learning rate that the weights are of
        self._window: Window | None = None  # of the step in progress, if it has several micro-batches
        self._observers: list[StepObserver] = []
        self._work: Tensor | None = None  # structures, atoms and edges of all ranks so far

    def _build(self, source: ManagerSource, what: str) -> MetricsManager:
        if isinstance(source, MetricsManager):
            return source
        if isinstance(source, Mapping):
            manager = _manager_of(source, self.type_names)
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
        self._observers = [each for each in self._callbacks if isinstance(each, StepObserver)]
        if stage == "fit":
            self._check_schedules()
            if self._largest_window > 1:
                self._check_accumulation()

    @property
    def _callbacks(self) -> list[Any]:
        return list(self.trainer.callbacks)  # type: ignore[attr-defined]

    def _check_schedules(self) -> None:
        """Warn of a schedule that the training ends before, and of a monitored value that changes its meaning."""
        number = self.trainer.max_epochs
        for manager in self._train_managers:
            if manager.schedule is not None and number is not None and number > 0:
                late = unreached(manager.schedule, number, manager.schedule_interval)
                if late:
                    rank_zero_warn(
                        f"The training ends at epoch {number} (max_epochs), before what the schedule has at epoch "
                        f"{', '.join(f'{each:g}' for each in late)}."
                    )
        monitors = {getattr(each, "monitor", None) for each in self._callbacks}
        if isinstance(self._lr_scheduler, Mapping):
            monitors.add(self._lr_scheduler.get("monitor"))
        for stage, manager in self._scheduled_monitors.items():
            names = {
                f"{stage}/{name}" for name in (WEIGHTED_SUM, *(n.rpartition("_")[0] for n in manager.type_weights))
            }
            for monitored in sorted(names & {name for name in monitors if name}):
                rank_zero_warn(
                    f"{monitored} is monitored, and the schedule of its components changes its meaning in training: "
                    f"the best checkpoint, early stopping or learning rate would follow the coefficients as much as "
                    f"the errors. Monitor a component such as {stage}/{next(iter(manager))}, or leave the schedule out."
                )

    @property
    def _scheduled_monitors(self) -> dict[str, MetricsManager]:
        managers = {f"val{index}_epoch": manager for index, manager in enumerate(self.val_metrics)}
        managers |= {"train_loss_epoch": self.loss}
        if self.train_metrics is not None:
            managers |= {"train_metric_epoch": self.train_metrics}
        return {stage: each for stage, each in managers.items() if each.schedule is not None}  # type: ignore[misc]

    def _check_accumulation(self) -> None:
        self.loss.check_accumulation()
        if self.trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} counts micro-batches by itself: the last step of an epoch "
                f"would go on in the next, and losses be divided twice. Use a strategy with "
                f"harness.strategies.deepspeed.AccumulatesInWindows, such as class Mine(AccumulatesInWindows, "
                f"{type(self.trainer.strategy).__name__}), or accumulate_grad_batches=1."
            )

    @property
    def _largest_window(self) -> int:
        """Largest number of micro-batches in a step, in all epochs."""
        schedules = [each.scheduling for each in self._accumulation_schedules]
        return max(self.trainer.accumulate_grad_batches, *(k for schedule in schedules for k in schedule.values()), 1)

    @property
    def _accumulation_schedules(self) -> list[GradientAccumulationScheduler]:
        return [each for each in self._callbacks if isinstance(each, GradientAccumulationScheduler)]

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
        check_strategy(strategy, strategy.root_device.type, self.trainer.precision, self._callbacks)
        self.check_weighting(strategy)

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
            predictions: dict[str, Tensor] = self.model(batch)
        return predictions

    # --- training ---

    def on_train_start(self) -> None:
        """Take up a schedule of ``accumulate_grad_batches``; after a restart in mid-epoch Lightning does not."""
        for schedule in self._accumulation_schedules:
            k = schedule.get_accumulate_grad_batches(self.trainer.current_epoch)
            self.trainer.accumulate_grad_batches = k
        by_step = any(each.schedule is not None and each.schedule_interval == "step" for each in self._train_managers)
        if by_step and not math.isfinite(self.trainer.num_training_batches):
            raise ValueError(
                "A schedule with `interval: step` needs to know how many batches an epoch has, and the training data "
                "has no length. Use `interval: epoch`, or limit_train_batches with a whole number."
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, scaled so that the average of gradients over ranks is the gradient of the whole batch.

        Under ``Trainer(accumulate_grad_batches=k)`` the batch is one of k micro-batches, whose gradients add up to that
        of the one batch that they make up; see :mod:`harness.metrics.accumulation`. What is logged is that batch's,
        too.
        """
        if batch_idx == 0:
            self._position = self._position_of_training()
            # The first batch, and not a hook, starts an epoch's statistics: after a restart Lightning leaves out hooks
            # of the epoch that a checkpoint has ended, but its batches are counted on.
            for manager in self._train_managers:
                manager.reset()
        self._follow_schedules(batch_idx)
        batch, window = self._place_in_step(batch, batch_idx)
        predictions = self(batch)
        signals = to_device([float(self.preempt_requested), *_work_of(batch)], self.device)
        values = step_together(*self._train_managers, preds=predictions, target=batch, window=window, signals=signals)
        self._preempt_requests.send(signals[:1])
        self._work = signals[1:] if self._work is None else self._work + signals[1:]
        if values[0].weighted_sum is None:
            raise ValueError("The loss has no coefficients any more: `set_coeffs` took every component out of the sum.")
        is_whole = window.is_complete
        for observer in self._observers:
            observer.on_train_values(
                self.trainer, self, Step(batch, predictions, values[0], batch_idx, is_whole, window)
            )
        if self._logs_step and is_whole:
            self._log_step(values)
        return self.objective(values[0], is_whole)

    def objective(self, values: Values, is_whole: bool = True) -> Tensor:
        """What backward is called on: the weighted sum, scaled, and what teaches learnt coefficients.

        Args:
            values: of the loss.
            is_whole: whether a whole step is in them, or micro-batches are still to come.
        """
        if values.weighted_sum is None:
            raise ValueError("No component of the loss has a coefficient: there is nothing to minimise.")
        num_micro_batches = self.trainer.accumulate_grad_batches if self._trainer is not None else 1
        objective = values.weighted_sum * gradient_scale(self.process_group, num_micro_batches)
        weighting = self.loss.weighting
        if isinstance(weighting, LearntWeighting) and is_whole:
            # From merged values, every rank has the whole gradient already: their average needs no factor.
            objective = objective + num_micro_batches * weighting.objective(values)
        return objective

    def _follow_schedules(self, batch_idx: int) -> None:
        """Move on with the epoch, or with the step; never within the micro-batches of one."""
        for manager in self._train_managers:
            schedule = manager.schedule
            if schedule is None or batch_idx % self.trainer.accumulate_grad_batches:
                continue
            epoch = float(self.trainer.current_epoch)
            if manager.schedule_interval == "step":
                epoch += batch_idx / self.trainer.num_training_batches
            # a checkpoint in mid-epoch has the learning rate that the epoch began with
            if batch_idx == 0 or manager.position[0] != epoch:
                manager.move_to(epoch, self._relative_learning_rate() if schedule.needs_learning_rate else None)

    def _relative_learning_rate(self) -> float:
        """The learning rate of the first group of parameters, divided by that of the start."""
        optimizer = self.trainer.optimizers[0]
        group = optimizer.param_groups[0]
        start = group.get("initial_lr") or getattr(optimizer, "defaults", {}).get("lr")
        ratio = float(group["lr"]) / float(start) if start and "lr" in group else 1.0
        if (
            ratio > 1 + 1e-6
            and not self._warned_of_rate
            and any(each.schedule is not None and each.schedule.needs_learning_rate for each in self._train_managers)
        ):
            self._warned_of_rate = True
            rank_zero_warn(
                f"The learning rate is {ratio:g} times that which the schedule of the coefficients starts with "
                f"({start:g}): coefficients that follow it leave the range from `start` to `limit`, and are cut off at "
                f"0. Use a learning rate that does not rise above its beginning, or a schedule of epochs."
            )
        return ratio

    def _position_of_training(self) -> tuple[float, float]:
        return float(self.trainer.current_epoch), self._relative_learning_rate()

    def read_work(self) -> dict[str, float]:
        """Numbers of structures, atoms and edges that all ranks have trained on so far; makes the host wait."""
        numbers = [0.0] * len(_WORK) if self._work is None else self._work.tolist()
        return dict(zip(_WORK, numbers, strict=True))

    @property
    def preempted(self) -> bool:
        """Whether any rank wanted to leave when it took the last step: the same on all ranks, after each step.

        On a GPU it is the step before the last, for which the host need not wait.
        """
        return self._preempt_requests.read() > 0

    def _place_in_step(self, batch: Batch, batch_idx: int) -> tuple[Batch, Window]:
        """The batch without the labels of upcoming ones, and the accumulation window that it is in."""
        following = batch.get(UPCOMING_LABELS) if isinstance(batch, Mapping) else None
        if following is not None:
            batch = {name: value for name, value in batch.items() if name != UPCOMING_LABELS}
        k = self.trainer.accumulate_grad_batches
        if k == 1:
            self._window = None
            return batch, self.loss.window()
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
        if window is None or not as_expected or (following is not None and in_progress):
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
        report = values[0].to_report()
        self.latest = report.values
        logged = _prefixed("train_loss_step/", report.values)
        logged |= _prefixed("loss_coeff_step/", report.coeffs | self.loss.type_weights)
        logged |= _prefixed("loss_contribution_step/", report.contributions)
        if len(values) > 1:
            logged |= values[1].to_host("train_metric_step/")
        logged |= {"epoch": self.trainer.current_epoch}
        for logger in self.trainer.loggers:
            logger.log_metrics(logged, step=self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's loss, coefficients, contributions and train metrics."""
        self._position = self._position_of_training()
        for manager, values, what in zip(
            self._train_managers, compute_together(self._train_managers), ("train_loss", "train_metric"), strict=False
        ):
            report = self.reports[what] = values.to_report()
            self._log_epoch(_prefixed(f"{what}_epoch/", report.values))
            if manager is self.loss:
                self._log_epoch(_prefixed("loss_coeff/", report.coeffs | manager.type_weights))
                self._log_epoch(_prefixed("loss_contribution_epoch/", report.contributions))
            manager.reset()

    def training_so_far(self) -> dict[str, Report]:
        """Reports of ``train_loss`` and ``train_metric`` over the steps of the epoch so far; makes the host wait.

        Nothing is sent. In a validation at the end of an epoch they are those of the epoch.
        """
        managers = zip(("train_loss", "train_metric"), self._train_managers, strict=False)
        return {what: manager.so_far().to_report() for what, manager in managers}

    def _log_epoch(self, values: dict[str, float]) -> None:
        """Hand values to Lightning as float64 tensors; it would round Python numbers to float32."""
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})

    def _define_axes(self) -> None:
        """Tell the loggers what belongs to epochs and what to steps, before they see any of it."""
        weighted, types = self.loss.ever_weighted, list(self.loss.type_weights)
        stages = {"train_loss_epoch/": self.loss, "train_metric_epoch/": self.train_metrics}
        for stage, managers in (("val", self.val_metrics), ("test", self.test_metrics)):
            stages |= {f"{stage}{index}_epoch/": manager for index, manager in enumerate(managers)}  # type: ignore[misc]
        errors = [f"{stage}{name}" for stage, each in stages.items() if each for name in each.value_names]
        steps = [name.replace("_epoch/", "_step/") for name in errors if name.startswith("train_")]
        others = [f"loss_contribution_epoch/{name}" for name in weighted]
        others += [f"loss_coeff/{name}" for name in (*weighted, *types)]
        for stage, manager in stages.items():
            if manager and not stage.startswith("train_"):
                others += [f"{stage.replace('_epoch/', '_contribution/')}{name}" for name in manager.ever_weighted]
                if manager.schedule is not None:
                    names = (*manager.ever_weighted, *manager.type_weights)
                    others += [f"{stage.replace('_epoch/', '_coeff/')}{name}" for name in names]
        steps += [f"loss_contribution_step/{name}" for name in weighted]
        steps += [f"loss_coeff_step/{name}" for name in (*weighted, *types)]
        rising = {
            f"{stage}{name}"
            for stage, each in stages.items()
            if each is not None
            for entry in each.entries.values()
            if entry.metric.higher_is_better
            for name in (entry.name, *entry.type_keys(each.type_names))
        }
        callbacks = getattr(self.trainer, "callbacks", [])
        driven = any(getattr(each, "controls_coefficients", False) for each in callbacks)
        incomparable = {  # sums of coefficients that move: the least of them says nothing
            f"{stage}{WEIGHTED_SUM}"
            for stage, each in stages.items()
            if each and (each.schedule is not None or each.weighting is not None or (driven and each is self.loss))
        }
        minimised = sorted(set(errors) - rising - incomparable)
        for logger in self.trainer.loggers:
            if isinstance(logger, AxesLogger):
                logger.define_axes(epoch=sorted([*errors, *others]), step=sorted(steps), minimised=minimised)

    def on_fit_start(self) -> None:
        """Tell the loggers what is to come."""
        self._define_axes()

    def on_test_start(self) -> None:
        """Tell the loggers what is to come."""
        self._define_axes()

    # --- validation and test ---

    def on_validation_epoch_start(self) -> None:
        """Move scheduled metrics on."""
        self._follow_epoch(self.val_metrics)

    def on_test_epoch_start(self) -> None:
        """Move scheduled metrics on."""
        self._follow_epoch(self.test_metrics)

    def _follow_epoch(self, managers: nn.ModuleList) -> None:
        for manager in managers:
            if isinstance(manager, MetricsManager) and manager.schedule is not None:
                if self.trainer.state.fn == TrainerFn.FITTING:
                    self._position = self._position_of_training()
                manager.move_to(*self._position)  # of the weights: a test may load those of any epoch

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
            report = self.reports[f"{stage}{index}"] = values.to_report()
            self._log_epoch(_prefixed(f"{stage}{index}_epoch/", report.values))
            self._log_epoch(_prefixed(f"{stage}{index}_contribution/", report.contributions))
            manager = managers[index]
            if isinstance(manager, MetricsManager) and manager.schedule is not None:
                self._log_epoch(_prefixed(f"{stage}{index}_coeff/", report.coeffs | manager.type_weights))
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
        checkpoint[_POSITION] = list(self._position)  # not that of now: the next epoch may have begun
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
        epoch, rate = checkpoint.get(_POSITION, (0.0, None))
        self._position = epoch, rate
        managers = self._managers_by_key
        rooms = ("loss.", "train_metrics.", "val_metrics.", "test_metrics.")
        states = checkpoint.get("state_dict", {})
        self._take_weighting(states)
        for key in [key for key in states if key.startswith(rooms) and key.endswith(_EXTRA_STATE)]:
            if key not in managers:
                del states[key]
        for key, manager in managers.items():
            states.setdefault(key, manager.get_extra_state())

    def _take_weighting(self, states: dict[str, Any]) -> None:
        """Let a checkpoint be tested with another adaptive weighting than it was trained with.

        Raises:
            ValueError: a training is to go on from it, whose optimizer would have other parameters.
        """
        weighting = self.loss.weighting
        own: dict[str, Any] = {}
        if isinstance(weighting, nn.Module):
            own = weighting.state_dict(prefix=_WEIGHTING)
        found = [key for key in states if key.startswith(_WEIGHTING)]
        if not states or set(own) == set(found):
            return
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                f"The checkpoint has {', '.join(found) or 'no learnt coefficients'}, this training "
                f"{', '.join(own) or 'no learnt coefficients'}: its optimizer cannot go on. Continue with the same "
                f"adaptive weighting, or start anew."
            )
        for key in found:
            del states[key]
        states.update(own)

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


_WORK = ("structures", "atoms", "edges")


def _manager_of(source: Mapping[str, Any], type_names: list[str] | None) -> Any:
    """The manager of a config; ``interval``, in the section of its schedule, is an argument of the manager's own."""
    rest, schedule = take_out(source, "schedule")
    if not isinstance(schedule, Mapping) or "interval" not in schedule:
        return instantiate(source, type_names=type_names)
    schedule, interval = take_out(schedule, "interval")
    return instantiate(rest, type_names=type_names, schedule=schedule, schedule_interval=interval)


def _work_of(batch: Batch) -> list[float]:
    """Numbers of structures, atoms and edges of a batch, from shapes alone: the host does not wait."""
    lengths = {name: value.shape for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    nodes = next((lengths[name][0] for name in ("pos", "atom_types", "forces") if name in lengths), 0)
    edges = lengths["edge_index"][-1] if "edge_index" in lengths else 0
    return [float(lengths[NUM_ATOMS][0] if NUM_ATOMS in lengths else 0), float(nodes), float(edges)]


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in values.items()}


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
