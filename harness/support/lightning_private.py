"""Private parts of Lightning that this package uses, all of them, behind functions with public names.

Lightning may rename any of them in any release. ``tests/module/test_lightning_private.py`` takes each away in turn, and
tries each on the installed release; no other file of the package names one of :data:`NAMES`, but for the overrides of
:data:`OVERRIDDEN`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import timedelta

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

__all__ = [
    "INHERITED",
    "NAMES",
    "OVERRIDDEN",
    "average_model",
    "counts_versions",
    "ddp_options",
    "ignore_sigterm_broadcast",
    "is_mid_accumulation",
    "is_validated_next",
    "last_step_of_epoch",
    "leave_out_empty_hooks",
    "logged_step",
    "parallel_sizes",
    "process_group_settings",
    "saves_at_end_of_epoch",
    "set_average_model",
    "set_data_parallel_size",
    "stops_at_end_of_epoch",
    "trainer_of",
    "training_loader",
    "unwatch_fetches",
    "watch_fetches",
]

NAMES = (
    "_average_model",
    "_batches_that_stepped",
    "_broadcast_sigterm_tensor",
    "_check_on_train_epoch_end",
    "_data_fetcher",
    "_data_parallel_size",
    "_data_source",
    "_ddp_kwargs",
    "_enable_version_counter",
    "_every_n_train_steps",
    "_get_process_group_backend",
    "_on_after_fetch",
    "_on_before_fetch",
    "_save_on_train_epoch_end",
    "_should_accumulate",
    "_should_check_val_fx",
    "_tensor_parallel_size",
    "_timeout",
    "_trainer",
)
"""Attributes of Lightning's objects that the functions below read, call or replace."""
OVERRIDDEN = ("_setup_model_and_optimizer",)
"""Methods that a subclass in :mod:`harness.strategies` overrides: Lightning must still call them."""

INHERITED = {
    "CSVLogger": ("_experiment",),
    "WandbLogger": ("_experiment", "_id", "_log_model", "_offline", "_prefix", "_wandb_init"),
}
"""Attributes that Lightning's loggers keep their settings in, which the subclasses in :mod:`harness.loggers` read and
change; by the class of Lightning's."""
ON_THE_STACK = ("_call_setup_hook",)
"""Functions by which :mod:`harness.job.failures` knows from a traceback where a rank waits; without, it says less."""


def _private(owner: Any, name: str) -> Any:
    """Attribute of an object of Lightning's.

    Raises:
        RuntimeError: the installed release has no attribute of that name.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise RuntimeError(_gone(owner, name)) from error


def _gone(owner: Any, name: str) -> str:
    import lightning

    return (
        f"Lightning {lightning.__version__} has no {type(owner).__name__}.{name}, which this package needs; expected a "
        f"release of the range in pyproject.toml. Install one, or mend harness/support/lightning_private.py."
    )


# --- the trainer and its loops ---


def logged_step(trainer: Trainer) -> int:
    """Number of the optimizer step that values belong to, from 0: the ``step`` of every row for a logger.

    Within a step it is the number of that step, and still in ``on_train_batch_end`` and in a validation after it, where
    ``trainer.global_step`` is one ahead. From ``on_train_epoch_end`` on, and in a test, it is the number of steps that
    were made; values of a training epoch belong to the one before, see :func:`last_step_of_epoch`.
    """
    return int(_private(trainer.fit_loop.epoch_loop, "_batches_that_stepped"))


def last_step_of_epoch(trainer: Trainer) -> int:
    """Number of an epoch's last step in ``on_train_epoch_end``, which Lightning logs values of the epoch at."""
    return logged_step(trainer) - 1


def is_mid_accumulation(trainer: Trainer) -> bool:
    """True if gradients of the current micro-batch are kept for a later one, and no optimizer step follows it."""
    return bool(_private(trainer.fit_loop, "_should_accumulate")())


def is_validated_next(trainer: Trainer) -> bool:
    """True if a validation follows the current batch, also one within the epoch (``val_check_interval``)."""
    loop = trainer.fit_loop
    return bool(_private(loop.epoch_loop, "_should_check_val_fx")(_private(loop, "_data_fetcher")))


def ignore_sigterm_broadcast(trainer: Trainer) -> None:
    """Stop Lightning from broadcasting a flag in every step, which the host waits for.

    The flag says that Lightning's own handler of SIGTERM was called on rank 0: call this where that handler has been
    replaced. A release that broadcasts nothing is right as it is.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


HOOKS_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""Hooks of callbacks and modules that Lightning calls in every step."""


def leave_out_empty_hooks(trainer: Trainer) -> None:
    """Keep Lightning from calling those hooks of a step of which a callback or the module has none of its own.

    It calls what is callable, and most of a dozen callbacks have one or two of six: the others become None on the
    object. A release that calls them all the same would raise in the first step.
    """
    from lightning.pytorch import Callback, LightningModule

    parts: list[Any] = [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]
    for part in parts:
        base = LightningModule if isinstance(part, LightningModule) else Callback
        for name in HOOKS_OF_A_STEP:
            if getattr(type(part), name) is getattr(base, name):
                vars(part).setdefault(name, None)


def watch_fetches(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call functions before and after each fetch of a training batch, at the place of Lightning's profilers."""
    loop: Any = trainer.fit_loop.epoch_loop
    start, stop = _private(loop, "_on_before_fetch"), _private(loop, "_on_after_fetch")

    def on_before_fetch() -> None:
        start()
        before()

    def on_after_fetch() -> None:
        after()
        stop()

    loop._on_before_fetch, loop._on_after_fetch = on_before_fetch, on_after_fetch


def unwatch_fetches(trainer: Trainer) -> None:
    """Undo :func:`watch_fetches`; nothing happens if there was none."""
    for name in ("_on_before_fetch", "_on_after_fetch"):
        trainer.fit_loop.epoch_loop.__dict__.pop(name, None)


def trainer_of(module: LightningModule) -> Trainer | None:
    """Trainer of a module; None if it has none, where ``module.trainer`` would raise."""
    trainer: Trainer | None = _private(module, "_trainer")
    return trainer


def training_loader(trainer: Trainer) -> Any:
    """A loader of the training batches: that which ``fit`` was given, or a new one of the data or Lightning module.

    Raises:
        AttributeError: there is none yet.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        return datamodule.train_dataloader()
    source = _private(trainer.fit_loop, "_data_source").instance
    return source.train_dataloader() if hasattr(source, "train_dataloader") else source


# --- callbacks ---


def stops_at_end_of_epoch(callback: EarlyStopping) -> bool | None:
    """True for the end of a training epoch, False for that of a validation, None if the trainer's settings decide."""
    at_end: bool | None = _private(callback, "_check_on_train_epoch_end")
    return at_end


def saves_at_end_of_epoch(callback: ModelCheckpoint) -> bool | None:
    """As :func:`stops_at_end_of_epoch`; true also if checkpoints are saved by step."""
    by_step = bool(_private(callback, "_every_n_train_steps"))
    at_end: bool | None = _private(callback, "_save_on_train_epoch_end")
    return by_step or at_end


def counts_versions(callback: ModelCheckpoint) -> bool:
    """True if a checkpoint whose file is there gets a name with ``-v1``, ``-v2`` and so on."""
    return bool(_private(callback, "_enable_version_counter"))


# --- strategies ---


def process_group_settings(strategy: Strategy) -> tuple[str, timedelta] | None:
    """Backend and timeout of the process group that a strategy would make; None for a strategy that makes none."""
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

    makes_group = isinstance(strategy, DDPStrategy | FSDPStrategy | ModelParallelStrategy)
    if not makes_group and not hasattr(strategy, "_get_process_group_backend"):
        return None
    return _private(strategy, "_get_process_group_backend")(), _private(strategy, "_timeout")


def ddp_options(strategy: DDPStrategy) -> dict[str, Any]:
    """Options that a strategy hands to ``DistributedDataParallel``."""
    options: dict[str, Any] = _private(strategy, "_ddp_kwargs")
    return options


def parallel_sizes(strategy: ModelParallelStrategy) -> tuple[int | str, int | str]:
    """Sizes of the data-parallel and the tensor-parallel groups as given: ``auto`` until they are known."""
    return _private(strategy, "_data_parallel_size"), _private(strategy, "_tensor_parallel_size")


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Give a strategy the size of its data-parallel groups, before it makes its mesh of devices."""
    _private(strategy, "_data_parallel_size")
    strategy._data_parallel_size = size


# --- callbacks ---


def average_model(callback: WeightAveraging) -> Any:
    """Average of a callback, with the copy of the module as ``module``; None outside of a training."""
    return _private(callback, "_average_model")


def set_average_model(callback: WeightAveraging, average: Any) -> None:
    """Let a callback keep another average than the one that it has made."""
    _private(callback, "_average_model")
    callback._average_model = average
