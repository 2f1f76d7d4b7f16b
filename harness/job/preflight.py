"""What is checked before anything is trained or written: mistakes that would cost an epoch, or be told in riddles."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from omegaconf import DictConfig
from torch.nn.parallel import DistributedDataParallel

from harness.adaptive import GradientBalance
from harness.callbacks import GradientShare, LossProgressBar
from harness.data import AtomsDataModule
from harness.distributed import known_backends, launched_rank, launched_ranks
from harness.metrics import MetricsManager
from harness.module import ForceFieldModule
from harness.module.coefficient_control import controllers_of, refuse_several
from harness.strategies import refuse_folder
from harness.support.lightning_private import ddp_options, parallel_sizes

__all__ = [
    "check_accumulation",
    "check_adaptive",
    "check_controllers",
    "check_labels",
    "check_monitors",
    "check_settings",
    "check_shares",
    "check_trainer",
]

_MATMUL_PRECISIONS = ("highest", "high", "medium")


def check_settings(config: DictConfig) -> None:
    """Refuse what the trainer or a library would answer much later, or with words of its own."""
    _check_sections(config)
    for key in ("max_epochs", "seed"):
        if isinstance(config[key], bool) or not isinstance(config[key], int):
            raise ValueError(f"{key} is a whole number, found {config[key]!r}.")
    if config.max_epochs < 1 and config.max_epochs != -1:
        raise ValueError(f"max_epochs is at least 1, or -1 for no limit, found {config.max_epochs}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is at least 0 and below 2^32, found {config.seed}.")
    if isinstance(config.cutoff, bool) or not isinstance(config.cutoff, int | float):
        raise ValueError(f"cutoff is a number of Å, found {config.cutoff!r}.")
    if config.resume not in ("restart", "auto", None):
        raise ValueError(f"resume is restart, auto or null, found {config.resume!r}.")
    if config.ckpt_path and Path(config.ckpt_path).is_dir():
        refuse_folder(config.ckpt_path)
    _check_cutoffs(config)
    if config.matmul_precision not in _MATMUL_PRECISIONS:
        raise ValueError(
            f"matmul_precision is one of {', '.join(_MATMUL_PRECISIONS)}, found {config.matmul_precision!r}."
        )
    timeout = config.trainer.get("timeout")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < 1e6:
        raise ValueError(f"trainer.timeout is a positive number of seconds, found {timeout!r}.")
    if config.ckpt_path and not isinstance(config.ckpt_path, str):
        raise ValueError(f"ckpt_path is the path of a checkpoint or null, found {config.ckpt_path!r}.")
    if config.ckpt_path and not Path(config.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={config.ckpt_path}: there is no such file.")
    if config.ckpt_path:
        _check_checkpoint(config.ckpt_path)
    if not config.train and not config.ckpt_path:
        raise ValueError("train=false only tests: give it a checkpoint with ckpt_path=...")
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked = config.trainer.get("devices")
    if isinstance(asked, int) and asked != started:
        raise ValueError(
            f"trainer.devices={asked}, but {started} rank(s) have been started on this node. Use a launcher: "
            f"torchrun --nproc-per-node {asked} -m harness.train ..."
        )
    nodes, asked_nodes = launched_ranks() // started, config.trainer.get("num_nodes", 1)
    if asked_nodes != nodes:
        raise ValueError(
            f"trainer.num_nodes={asked_nodes}, but ranks have been started on {nodes} node(s). Use a launcher: "
            f"torchrun --nnodes {asked_nodes} ... on each of them, or leave trainer.num_nodes as it is."
        )


def _check_sections(config: DictConfig) -> None:
    """Refuse what stands where a mapping with a ``_target_`` is needed."""
    needed = {name: config[name] for name in ("data", "model", "loss", "trainer", "strategy")}
    managers = ("train_metrics", "val_metrics", "test_metrics")
    optional = {name: config.get(name) for name in (*managers, "optimizer", "schedule", "adaptive")}
    if isinstance(config.lr_scheduler, DictConfig) and "scheduler" in config.lr_scheduler:
        needed["lr_scheduler.scheduler"] = config.lr_scheduler.scheduler
    else:
        optional["lr_scheduler"] = config.lr_scheduler
    for group in ("callbacks", "logger"):
        members = config.get(group)
        if members is not None and not isinstance(members, DictConfig):
            raise ValueError(f"{group} is a mapping of names to configs with a `_target_`, found {members!r}.")
        optional |= {f"{group}.{name!s}": member for name, member in (members or {}).items()}
    sections: dict[str, object] = {**needed, **optional}
    for name, section in sections.items():
        if not section and name in optional:
            continue
        target = section.get("_target_") if isinstance(section, DictConfig) else None
        if not isinstance(target, str) or not target:
            raise ValueError(
                f"{name} is a config with a `_target_`, the name of what is called, found {section!r}. Choose one of "
                f"the files of its folder in conf/, such as {name.partition('.')[0]}=..., or give it a `_target_`."
            )


def _check_checkpoint(path: str) -> None:
    """Refuse a file that is no checkpoint, or is torn."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # of pickle, zip and torch, each in its own words
        raise ValueError(
            f"ckpt_path={path} cannot be read as a checkpoint ({type(error).__name__}). Is the file complete, and "
            f"written by this command?"
        ) from error
    missing = {"state_dict", "epoch", "loops"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise ValueError(
            f"ckpt_path={path} is no checkpoint of a training: it lacks {', '.join(sorted(missing))}. Give one of the "
            f"files in the folder checkpoints/ of a run."
        )


def _check_cutoffs(config: DictConfig) -> None:
    """Refuse neighbour lists that are not those that the model is made for: it would miss edges without a word."""
    lengths = [section.get("cutoff") for section in (config.data, config.model) if section]
    if len(lengths) < 2 or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in lengths):
        return
    of_data, of_model = map(float, lengths)
    ours = str(config.model.get("_target_")).startswith("harness.models.")  # its filters grow again beyond the cutoff
    if of_data < of_model or (ours and of_data > of_model):
        raise ValueError(
            f"data.cutoff={of_data}, but model.cutoff={of_model}: the model needs the neighbours within its cutoff. "
            f"Set `cutoff`, which both follow."
        )


def check_labels(module: ForceFieldModule, datamodule: LightningDataModule) -> None:
    """Refuse a loss or monitored metric of labels that the data does not have, before any training."""
    if not hasattr(datamodule, "missing_labels"):
        return
    managers: list[tuple[str, MetricsManager, str]] = [("loss", module.loss, "train")]
    managers += [("val_metrics", manager, f"val{index}") for index, manager in enumerate(module.val_metrics)]  # type: ignore[misc]
    for what, manager, data_set in managers:
        for name, (missing, total) in datamodule.missing_labels(data_set).items():
            for entry in manager.entries.values():
                reads = {getattr(entry.field, "field", None), getattr(entry.field, "target_field", None)}
                if name not in reads or entry.name not in manager.ever_weighted or not missing:
                    continue
                if missing == total:
                    raise ValueError(
                        f"{what}: component {entry.name!r} has a coefficient ({manager.given_coeffs[entry.name]}), but "
                        f"none of the {total} frames of {data_set} has {name}. Are the label keys right (data.keys)? "
                        f"Otherwise set its coefficient to null, or choose a loss and metrics without it, such as "
                        f"loss=energy_force metrics=energy_force."
                    )
                if not entry.ignore_nan:
                    raise ValueError(
                        f"{what}: {missing} of the {total} frames of {data_set} have no {name}, which component "
                        f"{entry.name!r} would turn into NaN. Leave them out with "
                        f"{'loss' if what == 'loss' else 'metrics'}.ignore_nan.{name}=true."
                    )


def check_accumulation(config: DictConfig, callbacks: list[Callback], module: ForceFieldModule) -> None:
    """Refuse a loss whose gradient the micro-batches of a step do not make up, if they are to."""
    k = config.trainer.get("accumulate_grad_batches", 1)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"trainer.accumulate_grad_batches is a whole number, at least 1, found {k!r}.")
    scheduled = (each for each in callbacks if isinstance(each, GradientAccumulationScheduler))
    if config.train and (k > 1 or any(each.going_to_accumulate_grad_batches() for each in scheduled)):
        module.loss.check_accumulation()
        if (config.strategy or {}).get("static_graph"):
            raise ValueError(
                "strategy=ddp_static_graph cannot accumulate gradients: torch's DDP fails where its static graph has "
                "steps without communication. Use strategy=ddp, or trainer.accumulate_grad_batches=1."
            )


def check_controllers(module: ForceFieldModule, callbacks: list[Callback]) -> None:
    """Refuse two things that both move the coefficients of the loss: the later one would undo the other, silently.

    Raises:
        ValueError: with the names of both.
    """
    refuse_several(controllers_of(module.loss, callbacks))


def check_adaptive(module: ForceFieldModule, callbacks: list[Callback], trainer: Trainer) -> None:
    """Refuse adaptive weighting, and measurements of gradients, that the strategy or the loss cannot have.

    Args:
        module: what is trained.
        callbacks: of the training.
        trainer: one as configured that is only to be asked.
    """
    module.check_weighting(trainer.strategy)
    for each in callbacks:
        if isinstance(each, GradientShare | GradientBalance):
            each.check(trainer, module)


def check_shares(datamodule: LightningDataModule, strategy: Strategy) -> None:
    """Refuse more ranks than frames in a batch, before a process group is made to find out.

    Raises:
        ValueError: with the numbers of frames and ranks.
    """
    if isinstance(datamodule, AtomsDataModule):
        # ranks that work on the same part of a batch
        alike = parallel_sizes(strategy)[1] if isinstance(strategy, ModelParallelStrategy) else 1
        if isinstance(alike, int) and launched_ranks() % alike == 0:
            datamodule.training_sampler(launched_rank() // alike, launched_ranks() // alike)


def check_monitors(config: DictConfig, callbacks: list[Callback], module: ForceFieldModule) -> None:
    """Refuse to monitor or show a value that nothing logs, before the first epoch has been trained in vain."""
    for each in callbacks:
        if isinstance(each, LossProgressBar):
            each.check(module.loss)
    managers = [("train_loss_epoch", module.loss), ("train_metric_epoch", module.train_metrics)]
    managers += [(f"val{index}_epoch", manager) for index, manager in enumerate(module.val_metrics)]  # type: ignore[misc]
    valid = [f"{stage}/{name}" for stage, manager in managers if manager is not None for name in manager.value_names]
    monitors = {"monitor": config.monitor, "lr_scheduler.monitor": (config.lr_scheduler or {}).get("monitor")}
    monitors |= {f"objectives[{number}]": key for number, key in enumerate(config.get("objectives") or [])}
    monitors |= {f"the monitor of {type(each).__name__}": getattr(each, "monitor", None) for each in callbacks}
    for where, monitor in monitors.items():
        if monitor and "_epoch/" in monitor and monitor not in valid:
            close = difflib.get_close_matches(monitor, valid, n=3, cutoff=0.3)
            raise ValueError(
                f"{where} is {monitor}, which is not among the values of an epoch. Did you mean {' or '.join(close)}? "
                f"They begin with {', '.join(dict.fromkeys(name.partition('/')[0] + '/' for name in valid))}."
            )


def check_trainer(config: DictConfig, strategy: Strategy | str) -> Trainer:
    """A trainer as configured that is only to be asked, for its precision, device and strategy.

    Args:
        config: the whole configuration.
        strategy: one that no other trainer gets.

    Raises:
        ValueError: what the trainer cannot be made of.
    """
    settings = {key: value for key, value in config.trainer.items() if key != "timeout"}
    settings |= {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    try:
        with _silent("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
            trainer: Trainer = instantiate(settings, strategy=strategy, callbacks=None, logger=False)
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, Exception):  # of Hydra itself, such as a target that it refuses
            raise
        hint = ""
        if any(word in str(cause).lower() for word in ("accelerator", "backend", "gpu", "cuda", "precision")):
            named = {key: settings[key] for key in ("accelerator", "devices", "precision") if key in settings}
            found = ", ".join(f"trainer.{key}={value}" for key, value in named.items())
            hint = f" Found {found}; without GPUs use trainer.accelerator=cpu and trainer.precision=32-true."
        raise ValueError(f"The trainer cannot be made: {cause}{hint}") from error
    backend = (config.strategy or {}).get("process_group_backend")
    if backend and backend not in known_backends():
        raise ValueError(
            f"strategy.process_group_backend={backend} is unknown to torch; expected one of "
            f"{', '.join(known_backends())}."
        )
    if backend == "nccl" and trainer.strategy.root_device.type != "cuda":
        raise ValueError(
            f"strategy.process_group_backend=nccl, but this rank trains on the {trainer.strategy.root_device.type} "
            f"(trainer.accelerator={config.trainer.get('accelerator')}); NCCL only moves data of GPUs. Use gloo, or "
            f"leave it out: strategy.process_group_backend=gloo."
        )
    if isinstance(trainer.strategy, DDPStrategy):
        valid = set(inspect.signature(DistributedDataParallel).parameters)
        unknown = sorted(set(ddp_options(trainer.strategy)) - valid)
        if unknown:  # it would hand them on when the process group has been made
            raise ValueError(
                f"strategy has the unknown option {unknown[0]!r}; DDPStrategy and DistributedDataParallel take "
                f"{', '.join(sorted(valid - {'module'}))}."
            )
    return trainer


@contextmanager
def _silent(*loggers: str) -> Iterator[None]:
    """Nothing but errors from some loggers."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
