"""What is checked before anything is trained or written: mistakes that would cost an epoch, or be told in riddles."""

from __future__ import annotations

import difflib
import json
import os
import socket
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from omegaconf import DictConfig

from harness.agreement import Facts, difference
from harness.distributed import START_LIMIT, decide, launched_rank, share
from harness.manager import MetricsManager
from harness.module import ForceFieldModule
from harness.strategies import refuse_folder

__all__ = ["check_accumulation", "check_labels", "check_monitors", "check_settings", "refusal"]


def check_settings(config: DictConfig) -> None:
    """Refuse what the trainer or a library would answer much later, or with words of its own."""
    for key in ("max_epochs", "seed"):
        if isinstance(config[key], bool) or not isinstance(config[key], int):
            raise ValueError(f"{key} is a whole number, found {config[key]!r}.")
    if isinstance(config.cutoff, bool) or not isinstance(config.cutoff, int | float):
        raise ValueError(f"cutoff is a number of Å, found {config.cutoff!r}.")
    if config.resume not in ("restart", "auto", None):
        raise ValueError(f"resume is restart, auto or null, found {config.resume!r}.")
    if config.ckpt_path and Path(config.ckpt_path).is_dir():
        refuse_folder(config.ckpt_path)
    if config.ckpt_path and not Path(config.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={config.ckpt_path}: there is no such file.")
    if not config.train and not config.ckpt_path:
        raise ValueError("train=false only tests: give it a checkpoint with ckpt_path=...")
    timeout = config.trainer.timeout
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        raise ValueError(f"trainer.timeout is a positive number of seconds, found {timeout!r}.")
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked = config.trainer.get("devices")
    if isinstance(asked, int) and asked != started:
        raise ValueError(
            f"trainer.devices={asked}, but {started} rank(s) have been started on this node. Use a launcher: "
            f"torchrun --nproc-per-node {asked} -m harness.train ..."
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
                if name not in reads or entry.coeff is None or not missing:
                    continue
                if missing == total:
                    raise ValueError(
                        f"{what}: component {entry.name!r} has the coefficient {entry.given_coeff}, but none of the "
                        f"{total} frames of {data_set} has {name}. Are the label keys right (data.keys)? Otherwise set "
                        f"its coefficient to null, or choose a loss and metrics without it, such as loss=energy_force "
                        f"metrics=energy_force."
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


def check_monitors(config: DictConfig, callbacks: list[Callback], module: ForceFieldModule) -> None:
    """Refuse to monitor an epoch value that nothing logs, before the first epoch has been trained in vain."""
    managers = [("train_loss_epoch", module.loss), ("train_metric_epoch", module.train_metrics)]
    managers += [(f"val{index}_epoch", manager) for index, manager in enumerate(module.val_metrics)]  # type: ignore[misc]
    valid = [f"{stage}/{name}" for stage, manager in managers if manager is not None for name in manager.value_names]
    monitors = {"monitor": config.monitor, "lr_scheduler.monitor": (config.lr_scheduler or {}).get("monitor")}
    monitors |= {f"the monitor of {type(each).__name__}": getattr(each, "monitor", None) for each in callbacks}
    for where, monitor in monitors.items():
        if monitor and "_epoch/" in monitor and monitor not in valid:
            close = difflib.get_close_matches(monitor, valid, n=3, cutoff=0.3)
            raise ValueError(
                f"{where} is {monitor}, which is not among the values of an epoch. Did you mean {' or '.join(close)}? "
                f"They begin with {', '.join(dict.fromkeys(name.partition('/')[0] + '/' for name in valid))}."
            )


def refusal(
    error: str | None, facts: Facts | None = None, timeout: timedelta = START_LIMIT, stage: str = "start"
) -> str | None:
    """Why the job cannot start, the same text on all ranks, or None if it can on each of them.

    Each rank compares itself with rank 0, and tells rank 0 what is wrong, which makes one verdict of it.

    Args:
        error: what is wrong on this rank.
        facts: what this rank must have in common with the others.
        timeout: how long ranks wait for each other.
        stage: name of the moment, used once in a process.

    Raises:
        RankAbsentError: some ranks did not come; they are named.
    """
    host = socket.gethostname()
    first_host, first_facts = json.loads(share(f"{stage}/facts", json.dumps([host, facts or {}]), timeout))
    differs = difference(first_facts, facts or {})
    told = None
    if differs:
        what, name, first, own = differs
        told = (
            f"the ranks disagree on the {what} {name}:\n  {first} on rank 0 (host {first_host})\n"
            f"  {own} on rank {launched_rank()} (host {host})\n{_AGREE[what]}"
        )
    return decide(stage, json.dumps([host, told, error]), _verdict, timeout) or None


def _verdict(answers: list[str]) -> str:
    """What rank 0 makes of ``[host, disagreement, error]`` of every rank: the disagreement may explain the error."""
    found = [json.loads(each) for each in answers]
    differing = [told for _, told, _ in found if told]
    if differing:
        count = len(differing)
        return differing[0] + (f"\n{count} of {len(found)} ranks disagree with rank 0." if count > 1 else "")
    wrong = [(rank, host, text) for rank, (host, _, text) in enumerate(found) if text]
    if not wrong:
        return ""
    rank, host, text = wrong[0]
    everywhere = len({text for _, _, text in wrong}) == 1 and len(wrong) == len(found)
    return text if everywhere else f"on rank {rank} (host {host}): {text}"


_AGREE = {
    "version": "Install the same environment on all nodes, or start from one checkout that all nodes see.",
    "setting": "Start all nodes with the same command line and config directory.",
    "data": "Give all nodes the same files: a shared file system, or fresh copies.",
}
