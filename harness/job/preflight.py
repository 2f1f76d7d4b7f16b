"""Checks before anything is trained or written, for mistakes that would cost an epoch or end in an obscure message.

:func:`check_settings` reads the configuration alone. :func:`check` is for a job that has been built: it looks whether
the parts fit together, then calls :meth:`~harness.job.protocols.ChecksJob.check_job` of every part that has it, and
then tries a small step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, ListConfig, OmegaConf

from harness.checkpoints import OF_A_TRAINING, best_in, read
from harness.config.precision import DEFAULT, disagreement, places
from harness.config.resolvers import config_folder
from harness.distributed import launched_on_node, launched_ranks
from harness.fields import labels_of
from harness.job.build import Job
from harness.job.dry_step import check_first_batch
from harness.job.dtypes import parameter_dtypes, rounded_by_checkpoint, roundings
from harness.job.going_on import check_continuation
from harness.job.match import ACCEPTED, Start, compare
from harness.job.monitors import check_monitors, missing_labels
from harness.job.protocols import ChecksJob
from harness.metrics import MetricsManager
from harness.module import ForceFieldModule
from harness.module.build import try_first_turn
from harness.module.coefficient_control import NORMALISING, controllers_of, refuse_several
from harness.module.continuation import parts_of
from harness.module.horizon import TrainingLength
from harness.module.parameters import parameter_table
from harness.runs import point_number, swept_settings
from harness.strategies import FlatStrategy, is_compiled_nequip, refuse_folder
from harness.support.checks import is_number, is_whole_number, whole_number
from harness.support.text import did_you_mean

__all__ = ["check", "check_controllers", "check_files", "check_settings"]

_MATMUL_PRECISIONS = ("highest", "high", "medium")


def check_settings(config: DictConfig) -> None:
    """Refuse settings that the trainer or a library would refuse much later, or with words of its own.

    Raises:
        ValueError: what was found, what was expected, and the likely fix.
        FileNotFoundError: there is no such checkpoint.
    """
    places(config.get("precision", DEFAULT))
    _check_sections(config)
    _check_interval(config)
    _check_unread(config)
    _check_numbers(config)
    if config.resume not in ("restart", "auto", None):
        raise ValueError(f"resume is restart, auto or null, found {config.resume!r}.")
    if config.matmul_precision not in _MATMUL_PRECISIONS:
        raise ValueError(
            f"matmul_precision is one of {', '.join(_MATMUL_PRECISIONS)}, found {config.matmul_precision!r}."
        )
    accepted = config.get(ACCEPTED)
    if accepted is not None and not isinstance(accepted, ListConfig | list):
        raise ValueError(f"{ACCEPTED} is a list of names of settings, such as [model.kernel], found {accepted!r}.")
    _check_cutoffs(config)
    _check_ranks(config)


def _check_numbers(config: DictConfig) -> None:
    """Refuse numbers that are out of range, or text."""
    for key in ("max_epochs", "seed"):
        if not is_whole_number(config[key]):
            raise ValueError(f"{key} is a whole number, found {config[key]!r}.")
    if config.max_epochs < 1 and config.max_epochs != -1:
        raise ValueError(f"max_epochs is at least 1, or -1 for no limit, found {config.max_epochs}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is at least 0 and below 2^32, found {config.seed}.")
    if not is_number(config.cutoff):
        raise ValueError(f"cutoff is a number of Å, found {config.cutoff!r}.")
    timeout = config.trainer.get("timeout")
    if not is_number(timeout) or not 0 < float(timeout) < 1e6:
        raise ValueError(f"trainer.timeout is a positive number of seconds, found {timeout!r}.")
    whole_number("trainer.accumulate_grad_batches", config.trainer.get("accumulate_grad_batches", 1))


def _check_ranks(config: DictConfig) -> None:
    """Refuse numbers of devices and nodes that are not those of the launcher."""
    started = launched_on_node()
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
    """Refuse anything but a mapping with a ``_target_`` where one is needed."""
    needed = {name: config[name] for name in ("data", "model", "loss", "trainer", "strategy")}
    managers = ("train_metrics", "val_metrics", "test_metrics")
    optional = {name: config.get(name) for name in (*managers, "optimizer", "schedule", "adaptive")}
    if isinstance(config.lr_scheduler, DictConfig) and "scheduler" in config.lr_scheduler:
        optional["lr_scheduler.scheduler"] = config.lr_scheduler.scheduler
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


def _check_interval(config: DictConfig) -> None:
    """Refuse an interval that no schedule is followed at: that of ``schedule`` is in its own section."""
    loss = config.loss if isinstance(config.loss, DictConfig) else {}
    in_vain = {"schedule_interval": True, "loss.schedule_interval": loss.get("schedule") is None}
    for key, is_unused in in_vain.items():
        value = OmegaConf.select(config, key)
        if value is not None and is_unused:
            raise ValueError(
                f"{key}={value} would change nothing: how often a training moves on along `schedule` is "
                f"schedule.interval={value}."
            )


def _check_unread(config: DictConfig) -> None:
    """Refuse a setting of the top level that no part reads, if another one may be meant; warn of others.

    One that an interpolation refers to is read; any is in the logged config, as a note is.
    """
    table: Any = OmegaConf.to_container(OmegaConf.load(Path(config_folder()) / "train.yaml"), resolve=False)
    groups = [choice for entry in table["defaults"] if isinstance(entry, dict) for choice in entry]
    known = {"hydra", *map(str, table), *map(str, groups)} - {"defaults"}
    content: Any = OmegaConf.to_container(config, resolve=False)
    interpolations = re.findall(r"\$\{([^}]*)", str(content))
    referred = {word for each in interpolations for word in re.findall(r"\w+", each)}
    for name in map(str, content):
        if name in known | referred:
            continue
        nested = [
            f"{section}.{name}"
            for section in sorted(known)
            if isinstance(content.get(section), dict) and name in content[section]
        ]
        meant = f"Did you mean {' or '.join(nested)}? " if nested else did_you_mean(name.lower(), sorted(known))
        found = f"{name} is a setting that nothing reads"
        if meant:
            raise ValueError(
                f"{found}. {meant}`harness-train --cfg job` lists all of them; one of your own is for interpolations, "
                f"such as max_epochs=${{{name}}}."
            )
        rank_zero_warn(f"{found}: it changes nothing, and is in the logged config.")


def check_files(config: DictConfig) -> None:
    """Refuse a file that is no checkpoint, or is torn, and a test without one.

    Raises:
        ValueError: with the likely fix.
        FileNotFoundError: there is no such file.
    """
    start = config.get("init_from")
    if not config.train and not config.ckpt_path:
        instead = f" in place of init_from, which a training starts from: ckpt_path={start}" if start else "=..."
        raise ValueError(f"train=false only tests: give it a checkpoint with ckpt_path{instead}")
    if start and config.ckpt_path:
        raise ValueError(
            f"Both ckpt_path={config.ckpt_path} and init_from={start} are given. ckpt_path goes on with a training: "
            f"weights, state of the optimizer, epoch and step; init_from starts a new one from weights alone. Leave "
            f"one of them out."
        )
    for name in ("ckpt_path", "init_from"):
        if config.get(name):
            _check_file(name, config[name])


def _check_file(name: str, path: object) -> None:
    if not isinstance(path, str):
        raise ValueError(f"{name} is the path of a checkpoint or null, found {path!r}.")
    if best_in(path) is None:
        refuse_folder(path)
    read(path, OF_A_TRAINING, checksums=True, setting=name)


def _check_cutoffs(config: DictConfig) -> None:
    """Refuse neighbour lists shorter than the model's cutoff: it would miss edges silently."""
    lengths = [section.get("cutoff") for section in (config.data, config.model) if section]
    if len(lengths) < 2 or not all(map(is_number, lengths)):
        return
    of_data, of_model = map(float, lengths)
    ours = str(config.model.get("_target_")).startswith("harness.models.")  # its filters grow again beyond the cutoff
    if of_data < of_model or (ours and of_data > of_model):
        raise ValueError(
            f"data.cutoff={of_data}, but model.cutoff={of_model}: the model needs the neighbours within its cutoff. "
            f"Set `cutoff`, which both follow."
        )


def check(job: Job) -> None:
    """Refuse a job whose parts cannot work together; nothing is written or sent.

    Raises:
        ValueError, TypeError, KeyError: what was found, what was expected, and the likely fix.
    """
    config, module = job.config, job.module
    warned = roundings(
        getattr(job.datamodule, "dtype", None),
        job.trainer.precision,
        parameter_dtypes(module.model),
        str(config.get("precision")),
    )
    warned += filter(None, [disagreement(config)])
    start = Start.of(config)
    if start is not None:
        job.notes, of_checkpoint = compare(start, config, job.datamodule, module, job.references == "keep")
        states = read(start.path)["state_dict"]
        warned += [*of_checkpoint, *filter(None, [rounded_by_checkpoint(states, module.model, job.trainer.precision)])]
    for text in warned:
        rank_zero_warn(text)
    _check_compiled(module, job.trainer)
    _check_labels(module, job.datamodule)
    check_controllers(module, job.callbacks)
    _warn_of_swept(module)
    check_monitors(job)
    # the trainer makes them anew; here for the mistakes in their sections
    made = module.configure_optimizers(TrainingLength.of(job.trainer) if config.train else None)
    if config.train:
        optimizer, scheduler = parts_of(made)
        job.parameters = parameter_table(module.model, optimizer)
        if scheduler is not None:
            try_first_turn(scheduler)
    if config.train:
        if config.ckpt_path:
            check_continuation(config.ckpt_path, module, job.trainer)
        _check_accumulation(config, job.callbacks, module)
        module.check_weighting(job.trainer.strategy)
    for part in _parts(job):
        if hasattr(type(part), "check_job"):  # of its own: torch.compile's wrapper has the attributes of the model, too
            cast(ChecksJob, part).check_job(job.trainer, module, "fit" if config.train else "test")
    if config.dry_step:
        check_first_batch(module, job.datamodule, job.trainer, train=config.train)


def _check_compiled(module: ForceFieldModule, trainer: Trainer) -> None:
    """Refuse DDP around a model that is differentiated within a compiled graph."""
    strategy = trainer.strategy
    is_ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, FlatStrategy)
    if is_ddp and any(map(is_compiled_nequip, module.model.modules())):
        raise ValueError(
            f"model.compile_mode=compile does not work with the hooks of DDP in its backward pass, found "
            f"{type(strategy).__name__}. Expected gradients that are sent behind it: strategy=flat, which "
            f"strategy=auto takes by itself, or model.compile_mode=eager."
        )


def _parts(job: Job) -> Iterator[Any]:
    """All that may have a ``check_job``, each object once."""
    trainer: Any = job.trainer
    plugins = (trainer.accelerator, trainer.precision_plugin, trainer.strategy.checkpoint_io)
    parts = (
        job.datamodule,
        *job.module.modules(),  # with the model, what is in it, and weightings with parameters
        job.module.loss.schedule,
        job.module.loss.weighting,
        *job.callbacks,
        *trainer.callbacks,
        *job.loggers,
        trainer.strategy,
        *plugins,
    )
    yield from {id(part): part for part in parts}.values()


def _check_labels(module: ForceFieldModule, datamodule: LightningDataModule) -> None:
    """Refuse a loss or monitored metric of labels that the data does not have, before any training."""
    if not hasattr(datamodule, "missing_labels"):
        return
    managers: list[tuple[str, MetricsManager, str]] = [("loss", module.loss, "train")]
    managers += [("val_metrics", manager, f"val{index}") for index, manager in enumerate(module.val_metrics)]  # type: ignore[misc]
    for what, manager, data_set in managers:
        known: dict[object, Mapping[str, tuple[int, int]]] = {}  # large sets are not asked twice
        for entry in manager.entries.values():
            counted = entry.sets, entry.weights
            if counted not in known:
                known[counted] = missing_labels(datamodule, data_set, manager, entry)
            for name, (missing, total) in known[counted].items():
                if name not in labels_of(entry.field) or entry.name not in manager.ever_weighted or not missing:
                    continue
                hint = datamodule.missing_hint(data_set, name) if hasattr(datamodule, "missing_hint") else ""
                if missing == total:
                    raise ValueError(
                        f"{what}: component {entry.name!r} has a coefficient ({entry.given_coeff}), but none of the "
                        f"{total} frames of {data_set} has {name}. {hint or 'Are the label keys right (data.keys)?'} "
                        f"Otherwise set its coefficient to null, or choose a loss and metrics without it, such as "
                        f"loss=energy_force metrics=energy_force."
                    )
                if not entry.ignore_nan:
                    raise ValueError(
                        f"{what}: {missing} of the {total} frames of {data_set} have no {name}, which component "
                        f"{entry.name!r} would turn into NaN. {hint + ' ' if hint else ''}{_leave_out(what, name)}"
                    )


def _leave_out(what: str, label: str) -> str:
    """Sentence on how a loss or metrics leave out a label that is missing."""
    if label in ("total_energy", "forces", "stress"):
        return f"Leave them out with {'loss' if what == 'loss' else 'metrics'}.ignore_nan.{label}=true."
    return "Leave ignore_nan: false out of the component: labels of data.labels are left out where they are missing."


def _check_accumulation(config: DictConfig, callbacks: list[Callback], module: ForceFieldModule) -> None:
    """Refuse a loss whose gradient the micro-batches of a step do not make up, and a strategy that cannot have them."""
    scheduled = (callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler))
    num_batches = config.trainer.get("accumulate_grad_batches", 1)
    if num_batches == 1 and not any(callback.going_to_accumulate_grad_batches() for callback in scheduled):
        return
    module.loss.check_accumulation()
    if (config.strategy or {}).get("static_graph"):
        raise ValueError(
            "strategy=ddp_static_graph cannot accumulate gradients: torch's DDP fails where its static graph has "
            "steps without communication. Use strategy=ddp, or trainer.accumulate_grad_batches=1."
        )


def _warn_of_swept(module: ForceFieldModule) -> None:
    """Warn, in the first point of a sweep, of swept coefficients that a schedule overwrites in every point."""
    schedule = module.loss.schedule
    if schedule is None or point_number() != 0:
        return
    for setting in swept_settings():
        if not setting.startswith("loss.coeffs."):
            continue
        swept = setting.removeprefix("loss.coeffs.")
        energy = swept in ("total_energy", "per_atom_energy")
        driven = [
            name
            for name in schedule.names
            if name == swept or name.startswith(f"{swept}_") or (energy and "energy" in name.split("_"))
        ]
        if driven:
            rank_zero_warn(
                f"{setting} is swept, and the schedule ({type(schedule).__name__}) says the coefficient of "
                f"{', '.join(driven)} in every point: they differ in nothing by it. Sweep what is in `schedule`, or "
                f"leave the schedule out: schedule=constant."
            )


def check_controllers(module: ForceFieldModule, callbacks: list[Callback]) -> None:
    """Refuse two things that both move the coefficients of the loss: the later one would undo the other, silently.

    Raises:
        ValueError: with the names of both; or a callback that normalises coefficients that the loss takes as given.
    """
    controllers = controllers_of(module.loss, callbacks)
    refuse_several(controllers)
    normalising = [name for name in controllers if name in NORMALISING]
    if normalising and module.loss.normalisation == "as_given":
        raise ValueError(
            f"The loss takes its coefficients as given (loss.coefficients=as_given), and {normalising[0]} makes them "
            f"sum to another number. Use the one of harness.callbacks or harness.adaptive with the same arguments, or "
            f"loss.coefficients=normalised."
        )
