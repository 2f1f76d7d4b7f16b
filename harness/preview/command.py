"""Preview of a training's coefficients before it is started: a table and a picture over the epochs.

    python -m harness.preview schedule=two_stage max_epochs=200
    python -m harness.preview schedule=deepmd lr_scheduler=cosine --every 10 --output deepmd.png

The overrides are those of ``harness.train``. Data are only read for the names of the atom types, and not if
``data.type_names`` gives them; no model is made, and nothing is trained.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from harness.config.bad_input import BAD_INPUT
from harness.config.explain import HINT, explain, message
from harness.config.resolvers import config_folder
from harness.data.labels import entries_of
from harness.job import follow_schedule, read_schedule
from harness.job.preflight import check_controllers
from harness.metrics import MetricsManager
from harness.module import ForceFieldModule
from harness.module.horizon import TrainingLength
from harness.module.schedule_following import text_of_unreached
from harness.schedules import NO_SETTINGS, Schedule, unreached
from harness.support.checks import is_whole_number
from harness.support.configs import take_out
from harness.support.figures import new_figure, save_figure

__all__ = ["main"]

_NUM_ROWS = 12
_NUM_POINTS = 1000
_MOST_STEPS = 1_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m harness.preview``; mistakes end it with one message and exit code 1.

    Args:
        arguments: overrides of the configuration and options; those of the process if not given.
    """
    parser = argparse.ArgumentParser(
        prog="python -m harness.preview",
        description="Coefficients of the loss over the epochs, as a table and a picture. Nothing is trained.",
    )
    parser.add_argument("overrides", nargs="*", help="what harness-train takes, such as schedule=cosine max_epochs=50")
    parser.add_argument("--output", type=Path, default=Path("schedule.png"), help="picture; default: %(default)s")
    parser.add_argument("--config-dir", "-cd", type=Path, help="a config directory of your own, as of harness-train")
    parser.add_argument("--every", type=int, metavar="N", help=f"epochs between rows; default: about {_NUM_ROWS} rows")
    try:
        options = parser.parse_intermixed_args(arguments)
    except SystemExit as ended:
        sys.exit(1 if ended.code else 0)
    try:
        _show(_composed(options.overrides, options.config_dir), options.output, options.every)
    except BAD_INPUT as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"\nerror: {message(error)}\n{HINT}", file=sys.stderr)
        sys.exit(1)


def _composed(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    own = []
    if config_dir is not None:
        if not config_dir.is_dir():
            raise FileNotFoundError(f"--config-dir {config_dir}: there is no such directory.")
        own = [f"hydra.searchpath=[file://{config_dir.absolute()}]"]
    try:
        with initialize_config_dir(config_folder(), version_base="1.3"):
            return compose("train", ["output_dir=.", *own, *overrides])  # there is no run, and no directory of its own
    except HydraException as error:
        text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
        raise ValueError(explain(text, overrides, None if config_dir is None else str(config_dir))) from error


def _show(config: DictConfig, output: Path, every: int | None) -> None:
    if every is not None and every < 1:
        raise ValueError(f"--every is a whole number of epochs, at least 1, found {every}.")
    preview = _Preview(config)
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log file has room for every column
    console.print(preview.table(every), *preview.notes, sep="\n", highlight=False)
    preview.draw(output)
    console.print(f"picture  {output}", highlight=False, soft_wrap=True)


class _Preview:
    """The loss of a configuration, moved along its epochs.

    Args:
        config: the whole configuration.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        for entry in entries_of((config.data or {}).get("labels")):  # components may read them
            entry.register()
        self.notes: list[str] = []
        """Remarks under the table."""
        self.module = ForceFieldModule(
            model=torch.nn.Linear(1, 1, bias=False),  # for its one parameter: the optimizer needs any
            loss=config.loss,
            optimizer=take_out(config.optimizer, "groups")[0] if config.optimizer else None,
            lr_scheduler=instantiate(config.lr_scheduler) if config.lr_scheduler else None,
            type_names=self._type_names,
            **self._names_of_frames,
        )
        if config.schedule:
            follow_schedule(self.loss, *read_schedule(config.schedule))
        driving = _driving_callbacks(config)
        self._refuse_several([config.callbacks[name] for name in driving])
        self.schedule: Schedule | None = self.loss.schedule
        self.breakpoints = () if self.schedule is None else self.schedule.breakpoints
        self.by_steps = self.schedule is not None and self.loss.schedule_interval == "step"
        self.end = self._num_epochs()
        self.last = float(self.end if self.by_steps else self.end - 1)
        names = () if self.schedule is None else self.schedule.names
        entries = self.loss.entries.values()
        self.components = [entry.name for entry in entries if entry.name in self.loss.ever_weighted]
        self.weights = [  # those of all types of a component, since they are fractions of one another
            key
            for keys in (entry.type_keys(self.loss.type_names) for entry in entries)
            for key in keys
            if not set(keys).isdisjoint(names)
        ]
        self.relative_learning_rate = self._learning_rates() if self.needs_learning_rate else None
        if self.schedule is None:
            self.notes.append("There is no schedule: the coefficients of the loss hold all along.")
        else:
            self.notes += _settings_of_stages(self.schedule)
        for name in (*(f"callbacks.{name}" for name in driving), *(["adaptive"] if config.get("adaptive") else [])):
            self.notes.append(f"{name} moves the coefficients during the training: that is not shown.")

    def _refuse_several(self, configs: Sequence[DictConfig]) -> None:
        """Refuse several parts that control the coefficients, as a training does."""
        callbacks: list[Callback] = [instantiate(callback) for callback in configs]
        adaptive = instantiate(self.config.adaptive) if self.config.get("adaptive") else None
        if isinstance(adaptive, Callback):
            callbacks.append(adaptive)
        elif adaptive is not None:
            self.loss.weigh_by(adaptive)
        check_controllers(self.module, callbacks)

    @property
    def loss(self) -> MetricsManager:
        return self.module.loss

    @property
    def needs_learning_rate(self) -> bool:
        return self.schedule is not None and self.schedule.needs_learning_rate

    @cached_property
    def _data(self) -> LightningDataModule:
        made = instantiate(self.config.data)
        if not isinstance(made, LightningDataModule):
            raise TypeError(f"data is a config with the `_target_` of a LightningDataModule, found {made!r}.")
        made.setup("fit")
        return made

    @property
    def _type_names(self) -> list[str] | None:
        given = (self.config.data or {}).get("type_names")
        return list(given) if given else getattr(self._data, "type_names", None)

    @property
    def _names_of_frames(self) -> dict[str, Any]:
        """Names of groups and sets, of a loss that asks for them: the data are read for them."""
        keys = ("sets", "per_set", "per_set_coeffs", "per_group")
        entries = [*(self.config.loss.get("extra_metrics") or ()), *(self.config.loss.get("metrics") or ())]
        if not any(entry.get(key) for entry in entries for key in keys):
            return {}
        return {name: getattr(self._data, name, None) for name in ("group_names", "set_names")}

    def _num_epochs(self) -> int:
        number = self.config.max_epochs
        if not is_whole_number(number) or (number < 1 and number != -1):
            raise ValueError(f"max_epochs is a whole number, at least 1, or -1 for no limit, found {number!r}.")
        if number == -1:
            number = max(math.ceil(1.25 * max(self.breakpoints, default=0)), 10)
            self.notes.append(f"max_epochs=-1 has no end: shown are the first {number} epochs.")
        interval = self.loss.schedule_interval
        late = [] if self.schedule is None else unreached(self.schedule, number, interval)
        if late:
            self.notes.append(text_of_unreached(late, number, interval))
        return number

    def _learning_rates(self) -> Callable[[float], float]:
        """Epoch to learning rate, divided by the one that the optimizer was given."""
        made = self.module.configure_optimizers(self._length())
        optimizer, options = (made["optimizer"], made["lr_scheduler"]) if isinstance(made, dict) else (made, None)
        if options is None:
            return lambda epoch: 1.0
        scheduler, frequency = options["scheduler"], int(options.get("frequency", 1))
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.notes.append(
                "ReduceLROnPlateau follows what the training brings, which cannot be foreseen: shown are the "
                "coefficients of an unchanged learning rate."
            )
            return lambda epoch: 1.0
        per_epoch = self._steps_of_an_epoch() if options.get("interval", "epoch") == "step" else 1
        number = per_epoch * self.end
        if number > _MOST_STEPS:
            self.notes.append(
                f"The learning rate changes in each of {number} steps, too many to go through: shown are the "
                f"coefficients of an unchanged learning rate."
            )
            return lambda epoch: 1.0
        group = optimizer.param_groups[0]
        start = float(group.get("initial_lr", group["lr"]))
        ratios = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that moves without its optimizer
            for step in range(1, number + 1):
                ratios.append(float(group["lr"]) / start if start else 1.0)
                if step % frequency == 0:
                    _move(scheduler)
        return lambda epoch: ratios[min(int(epoch * per_epoch + 1e-6), number - 1)]

    def _length(self) -> TrainingLength:
        """Length of the training, as its trainer would know it."""
        trainer = self.config.trainer
        accumulate = trainer.get("accumulate_grad_batches", 1)
        epochs, steps = trainer.get("max_epochs", self.config.max_epochs), trainer.get("max_steps", -1)
        return TrainingLength(epochs, steps, lambda epoch: accumulate, self._num_batches)

    def _steps_of_an_epoch(self) -> int:
        return math.ceil(self._num_batches() / self.config.trainer.get("accumulate_grad_batches", 1))

    def _num_batches(self) -> int:
        limit = self.config.trainer.get("limit_train_batches", 1.0)
        try:
            num_batches = len(self._data.train_dataloader())
        except (AttributeError, TypeError):  # it needs its trainer, or has no length
            raise ValueError(
                "lr_scheduler.interval=step: the number of steps in an epoch cannot be told from the data without a "
                "trainer. Preview with lr_scheduler=none."
            ) from None
        return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)

    def _begins(self) -> list[float]:
        """Epochs at which the coefficients behind a breakpoint first hold."""
        begins = self.breakpoints if self.by_steps else map(math.ceil, self.breakpoints)
        return [float(epoch) for epoch in begins if epoch <= self.last]

    def move_to(self, epoch: float) -> float | None:
        """Move the loss to an epoch; returns the relative learning rate if it matters."""
        rate = None if self.relative_learning_rate is None else self.relative_learning_rate(epoch)
        self.loss.move_to(epoch, rate)
        return rate

    def table(self, every: int | None) -> Table:
        """Given and normalised coefficients, or given ones alone, at the boundaries and at some epochs between."""
        name = "no schedule" if self.schedule is None else type(self.schedule).__name__
        moves = ", which moves on at every step" if self.by_steps else ""
        kind = "given → normalised"
        if self.loss.normalisation == "as_given":
            kind = "coefficients as given" + (f", weights of atom types {kind}" if self.weights else "")
        table = Table(title=f"{name}{moves}: {kind}", title_justify="left")
        table.add_column("epoch", justify="right", no_wrap=True)
        if self.needs_learning_rate:
            table.add_column("relative learning rate", justify="right")
        for column in (*self.components, *self.weights):
            table.add_column(column, justify="right")
        for epoch in self._rows(every):
            rate = self.move_to(epoch)
            rates = [] if rate is None else [f"{rate:.4g}"]
            table.add_row(f"{epoch:g}", *rates, *map(self._cell, self.components), *map(self._weight, self.weights))
        return table

    def _rows(self, every: int | None) -> list[float]:
        last = int(self.last)
        spread: Iterable[float] = range(0, last, every) if every else np.linspace(0, last, _NUM_ROWS).round().tolist()
        return sorted({0.0, *map(float, spread), *self._begins(), self.last})

    def _cell(self, name: str) -> str:
        given, coeff = self.loss.given_coeffs[name], self.loss.coeffs[name]
        if given is None or coeff is None:
            return "-"
        return f"{coeff:.4g}" if self.loss.normalisation == "as_given" else f"{given:.4g} → {coeff:.4g}"

    def _weight(self, key: str) -> str:
        given = {
            name: weight
            for entry in self.loss.entries.values()
            for name, weight in zip(entry.type_keys(self.loss.type_names), entry.per_type_coeffs or (), strict=False)
        }
        return f"{given.get(key, 1):.4g} → {self.loss.type_weights[key]:.4g}"

    def draw(self, path: Path) -> None:
        """Write the coefficients over the epochs as a picture, and the weights of atom types below them."""
        from matplotlib.ticker import MaxNLocator

        epochs = self._points()
        values: dict[str, list[float]] = {name: [] for name in (*self.components, *self.weights)}
        for epoch in epochs:
            self.move_to(epoch)
            moved: dict[str, Any] = {**self.loss.coeffs, **self.loss.type_weights}
            for name, series in values.items():
                value = moved.get(name)
                series.append(math.nan if value is None else value)
        if not self.by_steps:  # the last epoch has a width too
            epochs = [*epochs, float(self.end)]
            values = {name: [*series, series[-1]] for name, series in values.items()}
        normalisation = self.loss.normalisation.replace("_", " ")
        panels = {f"coefficient, {normalisation}": self.components, "weight of atom type, normalised": self.weights}
        shown = {label: names for label, names in panels.items() if names}
        figure = new_figure(9, 3.6 * len(shown), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True))
        for axis, (label, names) in zip(axes, shown.items(), strict=True):
            numbers = np.array([values[name] for name in names])
            if np.nanmin(numbers) > 0 and np.nanmax(numbers) > 100 * np.nanmin(numbers):
                axis.set_yscale("log")
            axis.set_ylabel(label)
            for name, series in zip(names, numbers, strict=True):
                axis.plot(epochs, series, drawstyle="default" if self.by_steps else "steps-post", label=name)
            for boundary in self._begins():
                axis.axvline(boundary, color="grey", linewidth=0.5, linestyle=":")
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        axes[0].set_title("no schedule" if self.schedule is None else type(self.schedule).__name__)
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        save_figure(figure, path, dpi=110)

    def _points(self) -> list[float]:
        """Epochs that a curve is drawn through: jumps are upright."""
        spread = np.linspace(0, self.last, min(int(self.last) + 1, _NUM_POINTS) if not self.by_steps else _NUM_POINTS)
        begins = self._begins()
        if self.by_steps:
            before = [math.nextafter(epoch, 0) for epoch in begins if epoch]
            return sorted({*spread.tolist(), *begins, *before})
        before = [epoch - 1 for epoch in begins if epoch]
        return sorted({*spread.round().tolist(), *begins, *before})


def _settings_of_stages(schedule: Schedule) -> list[str]:
    """A line for each epoch from which on other settings hold beside the coefficients."""
    lines: list[str] = []
    before = NO_SETTINGS
    for epoch in dict.fromkeys((0.0, *schedule.breakpoints)):
        settings = schedule.settings(epoch)
        if settings != before:
            named = {**settings.optimizer, "average_decay": settings.average_decay}
            shown = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
            lines.append(f"From epoch {epoch:g} on: {shown or 'the settings of the optimizer itself'}.")
        before = settings
    return lines


def _move(scheduler: Any) -> None:
    try:
        scheduler.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"lr_scheduler: {type(scheduler).__name__} cannot be moved on: {error}") from error


def _driving_callbacks(config: DictConfig) -> list[str]:
    """Keys of the callbacks that control coefficients."""
    targets = {str(name): callback._target_ for name, callback in (config.callbacks or {}).items() if callback}
    return [
        name
        for name, target in targets.items()
        if getattr(instantiate({"_target_": target, "_partial_": True}).func, "controls_coefficients", False)
    ]
