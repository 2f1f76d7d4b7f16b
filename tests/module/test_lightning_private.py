"""Private parts of Lightning: each is in the installed release, and one that is gone is named in an error."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from support.commands import ROOT

from harness.support import lightning_private as private


class Without:
    """An object of Lightning's in a release that has no attribute of some name."""

    def __init__(self, whole: Any, name: str) -> None:
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


class Nested:
    """A trainer whose loops lack an attribute."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.fit_loop = Without(trainer.fit_loop, name)
        self.fit_loop.epoch_loop = Without(trainer.fit_loop.epoch_loop, name)


class Small(LightningModule):
    """Notes the numbers of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, int, int]] = []

    def note(self, where: str) -> None:
        self.seen.append((where, private.logged_step(self.trainer), self.trainer.global_step))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.note("mid" if private.is_mid_accumulation(self.trainer) else "step")
        return self.parameter * batch.sum()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.note("validation")

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append((f"validated next: {private.is_validated_next(self.trainer)}", 0, 0))

    def on_train_epoch_end(self) -> None:
        self.note("epoch")
        assert private.last_step_of_epoch(self.trainer) == self.trainer.global_step - 1

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        self.note("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet, **options)


READS: dict[str, Callable[[str], Any]] = {
    "_average_model": lambda name: private.average_model(Without(EMAWeightAveraging(), name)),  # type: ignore[arg-type]
    "_batches_that_stepped": lambda name: private.logged_step(Nested(trainer(), name)),  # type: ignore[arg-type]
    "_should_accumulate": lambda name: private.is_mid_accumulation(Nested(trainer(), name)),  # type: ignore[arg-type]
    "_should_check_val_fx": lambda name: private.is_validated_next(Nested(trainer(), name)),  # type: ignore[arg-type]
    "_data_fetcher": lambda name: private.is_validated_next(Nested(trainer(), name)),  # type: ignore[arg-type]
    "_on_before_fetch": lambda name: private.watch_fetches(Nested(trainer(), name), int, int),  # type: ignore[arg-type]
    "_on_after_fetch": lambda name: private.watch_fetches(Nested(trainer(), name), int, int),  # type: ignore[arg-type]
    "_check_on_train_epoch_end": lambda name: private.stops_at_end_of_epoch(Without(EarlyStopping("a"), name)),  # type: ignore[arg-type]
    "_every_n_train_steps": lambda name: private.saves_at_end_of_epoch(Without(ModelCheckpoint(), name)),  # type: ignore[arg-type]
    "_enable_version_counter": lambda name: private.counts_versions(Without(ModelCheckpoint(), name)),  # type: ignore[arg-type]
    "_save_on_train_epoch_end": lambda name: private.saves_at_end_of_epoch(Without(ModelCheckpoint(), name)),  # type: ignore[arg-type]
    "_data_source": lambda name: private.training_loader(Nested(trainer(), name)),  # type: ignore[arg-type]
    "_trainer": lambda name: private.trainer_of(Without(Small(), name)),  # type: ignore[arg-type]
    "_ddp_kwargs": lambda name: private.ddp_options(Without(DDPStrategy(), name)),  # type: ignore[arg-type]
    "_data_parallel_size": lambda name: private.parallel_sizes(Without(ModelParallelStrategy(), name)),  # type: ignore[arg-type]
    "_tensor_parallel_size": lambda name: private.parallel_sizes(Without(ModelParallelStrategy(), name)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", READS)
def test_a_part_that_is_gone_is_named(name: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"Lightning {lightning.__version__} has no \w+\.{name}, which this package"
    ):
        READS[name](name)


@pytest.mark.parametrize("name", ["_get_process_group_backend", "_timeout"])
def test_a_part_of_a_process_group_that_is_gone_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = DDPStrategy(process_group_backend="gloo")
    if name in vars(strategy):
        monkeypatch.delattr(strategy, name)
    else:
        monkeypatch.delattr(DDPStrategy, name)
    with pytest.raises(RuntimeError, match=rf"has no DDPStrategy\.{name}, which this package needs"):
        private.process_group_settings(strategy)


def test_every_part_has_a_test() -> None:
    assert sorted([*READS, "_broadcast_sigterm_tensor", "_get_process_group_backend", "_timeout"]) == sorted(
        private.NAMES
    )


def test_no_other_file_reaches_for_them() -> None:
    """Attributes of anything but ``self``, of which some have the same names for their own."""
    reached = []
    for path in sorted((ROOT / "harness").rglob("*.py")):
        if path == Path(private.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            if isinstance(node, ast.Attribute) and node.attr in private.NAMES and not own:
                reached.append(f"{path}:{node.lineno}: {node.attr}")
            if isinstance(node, ast.Constant) and node.value in private.NAMES:
                reached.append(f"{path}:{node.lineno}: {node.value!r}")
    assert not reached


def test_the_number_of_a_step_and_what_follows_it() -> None:
    """Two optimizer steps an epoch, of two and one micro-batches; a validation after the first, and at the end."""
    module = Small()
    data = torch.utils.data.DataLoader(torch.ones(3, 1))  # type: ignore[arg-type]
    running = trainer(max_epochs=2, accumulate_grad_batches=2, val_check_interval=2, limit_val_batches=1)
    running.fit(module, data, data)
    running.test(module, data, verbose=False)
    no, yes = ("validated next: False", 0, 0), ("validated next: True", 0, 0)
    expected = []
    for first in (0, 2):
        expected += [("mid", first, first), no, ("step", first, first), yes, ("validation", first, first + 1)]
        expected += [("step", first + 1, first + 1), no, ("epoch", first + 2, first + 2)]
    assert module.seen[: len(expected)] == expected
    assert module.seen[len(expected) :] == [("test", 4, 4)] * 3


def test_fetches_are_watched_and_left_alone_again() -> None:
    calls: list[str] = []

    class Watched(Small):
        def on_train_start(self) -> None:
            private.watch_fetches(self.trainer, lambda: calls.append("before"), lambda: calls.append("after"))
            private.ignore_sigterm_broadcast(self.trainer)

    running = trainer(max_epochs=1)
    running.fit(Watched(), torch.utils.data.DataLoader(torch.ones(3, 1)))  # type: ignore[arg-type]
    assert calls[:6] == ["before", "after"] * 3
    private.unwatch_fetches(running)
    assert not {"_on_before_fetch", "_on_after_fetch"} & vars(running.fit_loop.epoch_loop).keys()


def test_hooks_that_do_nothing_are_not_called() -> None:
    """In a training with them as None; those that are somebody's own are called as before."""
    calls: list[str] = []

    class Own(Callback):
        def on_after_backward(self, *_: Any) -> None:
            calls.append("callback")

    class Lean(Small):
        def on_train_start(self) -> None:
            private.leave_out_empty_hooks(self.trainer)

        def on_before_zero_grad(self, *_: Any) -> None:
            calls.append("module")

    module, own = Lean(), Own()
    running = trainer(max_epochs=1, callbacks=[own])
    running.fit(module, torch.utils.data.DataLoader(torch.ones(2, 1)))  # type: ignore[arg-type]
    assert calls == ["module", "callback"] * 2
    left = [[name for name in private.HOOKS_OF_A_STEP if getattr(part, name) is not None] for part in (own, module)]
    assert left == [["on_after_backward"], ["on_before_zero_grad", "on_train_batch_end"]]


def test_lightning_broadcasts_a_flag_of_sigterm_in_every_step_and_can_be_kept_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A release without the method needs no replacement, but then this one can go."""
    loop = trainer().fit_loop.epoch_loop
    called: list[bool] = []
    monkeypatch.setattr(type(loop), "_broadcast_sigterm_tensor", lambda self: called.append(True))
    running = trainer()
    running.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    private.ignore_sigterm_broadcast(running)
    running.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert called == [True]


def test_the_loader_of_a_training() -> None:
    running, loader = trainer(max_epochs=1), torch.utils.data.DataLoader(torch.ones(3, 1))  # type: ignore[arg-type]
    running.fit(Small(), loader)
    assert private.training_loader(running) is loader


def test_the_trainer_of_a_module() -> None:
    module = Small()
    assert private.trainer_of(module) is None
    running = trainer(max_epochs=1)
    running.fit(module, torch.utils.data.DataLoader(torch.ones(1, 1)))  # type: ignore[arg-type]
    assert private.trainer_of(module) is running


def test_the_average_of_a_callback() -> None:
    averaging, module = EMAWeightAveraging(), Small()
    assert private.average_model(averaging) is None
    averaging.setup(trainer(), module, "fit")
    assert isinstance(private.average_model(averaging).module, Small)
    private.set_average_model(averaging, module)
    assert private.average_model(averaging) is module


def test_settings_of_strategies() -> None:
    backend, timeout = private.process_group_settings(DDPStrategy(process_group_backend="gloo")) or ("", None)
    assert backend == "gloo"
    assert timeout is not None
    assert timeout.total_seconds() > 0
    assert private.process_group_settings(SingleDeviceStrategy("cpu")) is None
    assert private.ddp_options(DDPStrategy(static_graph=True))["static_graph"] is True
    sharded = ModelParallelStrategy(data_parallel_size="auto", tensor_parallel_size=2)
    assert private.parallel_sizes(sharded) == ("auto", 2)
    private.set_data_parallel_size(sharded, 3)
    assert private.parallel_sizes(sharded) == (3, 2)


def test_methods_that_are_overridden_are_lightnings() -> None:
    for name in private.OVERRIDDEN:
        assert callable(getattr(DeepSpeedStrategy, name))
