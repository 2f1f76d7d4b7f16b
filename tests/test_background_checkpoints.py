"""Checkpoints that a thread writes from a copy: the files, their order, and errors, as if the training had waited."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from support.commands import ROOT
from support.configs import composed
from torch import nn

from harness import strategies
from harness.checkpoints import AtomicCheckpointIO, after_writing, step_of, wait_for_checkpoints, writing_at_once
from harness.job.trainer import make_trainer
from harness.loggers import WandbLogger
from harness.support.host_copy import HostCopy

# --- copies ---


def test_a_copy_is_that_of_its_moment() -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    table = {"epochs": [1, 2], "pair": (weight.detach(), "text"), "none": None}
    copied = HostCopy(table).arrived()
    with torch.no_grad():
        weight.fill_(7)
    table["epochs"].append(3)  # type: ignore[union-attr]
    assert copied["epochs"] == [1, 2]
    assert copied["pair"][1] == "text"
    assert torch.equal(copied["pair"][0], torch.arange(6.0).reshape(2, 3))


def test_a_file_of_a_copy_is_as_large_as_one_of_the_state(tmp_path: Path) -> None:
    """Weights that are tied, views of one memory, and what a state's dictionary has beside its entries."""
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 50)).sum().backward()
    optimizer.step()
    flat = torch.arange(1000.0)
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "views": [flat[:10], flat[5:]]}
    copied = HostCopy(state).arrived()
    assert type(copied["state_dict"]) is OrderedDict
    assert copied["state_dict"]._metadata == state["state_dict"]._metadata
    for name, saved in (("state", state), ("copy", copied)):
        torch.save(saved, tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("copy", "state")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    found, expected = (torch.load(tmp_path / name, weights_only=True) for name in ("copy", "state"))
    assert str(found) == str(expected)
    assert found["views"][0].untyped_storage().data_ptr() == found["views"][1].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3),
        torch.zeros(0, 3),
        torch.ones(2, 3).to_sparse(),
        torch.tensor([1 + 2j]).conj(),
        torch.ones(3, dtype=torch.bfloat16),
        torch.get_rng_state(),
    ],
    ids=lambda value: f"{value.dtype}-{value.layout}-{tuple(value.shape)}",
)
def test_any_tensor_is_copied(value: torch.Tensor) -> None:
    copied = HostCopy([value]).arrived()[0]
    assert copied.dtype == value.dtype
    assert torch.equal(copied.to_dense(), value.to_dense()) if value.is_sparse else torch.equal(copied, value)


def test_a_copy_within_a_validation() -> None:
    with torch.inference_mode():
        copied = HostCopy({"a": torch.ones(2)}).arrived()
    assert not copied["a"].is_inference()


# --- files ---


class Gate:
    """Part of a checkpoint that keeps its file from being written until it is open; its copy is itself."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def __deepcopy__(self, memo: Any) -> Gate:
        return self

    def __reduce__(self) -> Any:
        self.reached.set()
        if not self.opened.wait(timeout=60):
            raise TimeoutError("nobody has opened the gate")
        return OrderedDict, ()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[AtomicCheckpointIO]:
    """A writer in the background whose first checkpoint, of step 1, is written."""
    made = AtomicCheckpointIO(background=True)
    made.save_checkpoint(state(1), tmp_path / "last.ckpt")
    assert step_of(tmp_path / "last.ckpt") == 1  # it was not waited for
    yield made
    made.teardown()


def state(step: int, **beside: Any) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((4,), float(step))}, "global_step": step, **beside}


def test_a_training_goes_on_while_a_file_is_written(writer: AtomicCheckpointIO, gate: Gate, tmp_path: Path) -> None:
    """What changes then is not in the file, and the one before is there until the new one is whole."""
    saved = state(2, gate=gate)
    writer.save_checkpoint(saved, tmp_path / "last.ckpt")
    assert gate.reached.wait(timeout=60)
    saved["state_dict"]["weight"].fill_(9)
    saved["global_step"] = 9
    assert step_of(tmp_path / "last.ckpt") == 1
    gate.opened.set()
    writer.wait()
    assert step_of(tmp_path / "last.ckpt") == 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["weight"].tolist() == [2.0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_files_are_removed_and_renamed_after_those_saved_before(
    writer: AtomicCheckpointIO, gate: Gate, tmp_path: Path
) -> None:
    writer.save_checkpoint(state(2, gate=gate), tmp_path / "new.ckpt")
    writer.remove_checkpoint(tmp_path / "last.ckpt")
    writer.after(lambda: (tmp_path / "new.ckpt").rename(tmp_path / "named.ckpt") and None)
    assert gate.reached.wait(timeout=60)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    gate.opened.set()
    assert writer.load_checkpoint(tmp_path / "named.ckpt", weights_only=True)["global_step"] == 2  # waits
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["named.ckpt"]


def test_a_third_copy_waits_for_the_first(writer: AtomicCheckpointIO, gate: Gate, tmp_path: Path) -> None:
    for number in (2, 3):
        writer.save_checkpoint(state(number, gate=gate), tmp_path / f"{number}.ckpt")
    third = threading.Thread(target=writer.save_checkpoint, args=(state(4), tmp_path / "4.ckpt"))
    third.start()
    third.join(timeout=0.5)
    assert third.is_alive()
    gate.opened.set()
    third.join(timeout=60)
    assert not third.is_alive()
    writer.wait()
    assert [step_of(tmp_path / f"{number}.ckpt") for number in (2, 3, 4)] == [2, 3, 4]


class Unsaveable:
    """Part of a checkpoint that nobody can pickle."""

    def __deepcopy__(self, memo: Any) -> Unsaveable:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def test_an_error_is_raised_where_the_training_comes_by_next(writer: AtomicCheckpointIO, tmp_path: Path) -> None:
    for raising in (writer.wait, writer.teardown):
        writer.save_checkpoint(state(2, bad=Unsaveable()), tmp_path / "last.ckpt")
        with pytest.raises(TypeError, match="not to be pickled"):
            raising()
    for number in range(2):
        writer.save_checkpoint(state(2, bad=Unsaveable()), tmp_path / f"{number}.ckpt")
    with pytest.raises(TypeError, match="not to be pickled"):
        writer.save_checkpoint(state(3), tmp_path / "last.ckpt")
    with pytest.raises(TypeError, match="not to be pickled"):
        writer.wait()
    writer.save_checkpoint(state(4, bad=Unsaveable()), tmp_path / "last.ckpt")
    try:
        raise KeyError("of the training")
    except KeyError:
        with pytest.warns(UserWarning, match="could not be written: TypeError: not to be pickled"):
            writer.teardown()
    assert step_of(tmp_path / "last.ckpt") == 1
    assert not list(tmp_path.glob(".*"))


def test_an_error_is_raised_by_the_next_save(writer: AtomicCheckpointIO, tmp_path: Path) -> None:
    for saving in (lambda: writer.save_checkpoint(state(3), tmp_path / "3.ckpt"), lambda: writer.after(list)):
        writer.save_checkpoint(state(2, bad=Unsaveable()), tmp_path / "2.ckpt")
        written(writer)
        with pytest.raises(TypeError, match="not to be pickled"):
            saving()
    writer.save_checkpoint(state(4), tmp_path / "4.ckpt")
    writer.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["4.ckpt", "last.ckpt"]


def written(writer: AtomicCheckpointIO) -> None:
    """Return once the thread has nothing to do, without asking for what has failed."""
    deadline = time.monotonic() + 60
    while writer.is_writing:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("in_background", [False, True])
def test_what_could_not_be_replaced_stays(in_background: bool, writer: AtomicCheckpointIO, tmp_path: Path) -> None:
    """``save_top_k`` of checkpoints named by step removes the one before whatever has become of the new one."""
    writer.background = in_background
    (tmp_path / "full").write_text("a file in the place of the folder")
    with pytest.warns(UserWarning, match="the one before is kept"):  # noqa: PT031
        writer.save_checkpoint(state(2), tmp_path / "full" / "2.ckpt")
        writer.remove_checkpoint(tmp_path / "last.ckpt")
        writer.wait()
    assert step_of(tmp_path / "last.ckpt") == 1
    writer.save_checkpoint(state(3), tmp_path / "3.ckpt")
    writer.remove_checkpoint(tmp_path / "last.ckpt")
    writer.wait()
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["3.ckpt"]


def test_a_program_that_ends_by_itself_waits_for_its_files(tmp_path: Path) -> None:
    program = """
import time, torch
from collections import OrderedDict
from harness.checkpoints import AtomicCheckpointIO
class Slow:
    def __deepcopy__(self, memo):
        return self
    def __reduce__(self):
        time.sleep(0.5)
        return OrderedDict, ()
writer, state = AtomicCheckpointIO(background=True), {"state_dict": {"weight": torch.ones(4)}, "slow": Slow()}
for step in (1, 2, 3):
    writer.save_checkpoint({**state, "global_step": step}, "last.ckpt")
print(writer.is_writing)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert step_of(tmp_path / "last.ckpt") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fails_is_warned_about_once(writer: AtomicCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file in the place of the folder")
    with pytest.warns(UserWarning, match=r"2\.ckpt cannot be written.*the one before is kept") as caught:  # noqa: PT031
        for number in (2, 3):
            writer.save_checkpoint(state(number), tmp_path / "folder" / f"{number}.ckpt")
        writer.wait()
    assert len(caught) == 1


# --- trainers ---


def plain(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet, **options)


def test_what_has_to_be_there_at_once(writer: AtomicCheckpointIO, gate: Gate, tmp_path: Path) -> None:
    trainer, seen = plain(plugins=[writer]), []
    writer.save_checkpoint(state(2, gate=gate), tmp_path / "last.ckpt")
    after_writing(trainer, lambda: seen.append(step_of(tmp_path / "last.ckpt")))
    assert seen == []
    gate.opened.set()
    with writing_at_once(trainer):
        writer.save_checkpoint(state(3), tmp_path / "last.ckpt")
        assert step_of(tmp_path / "last.ckpt") == 3
    assert seen == [2]
    assert writer.background
    writer.save_checkpoint(state(4), tmp_path / "last.ckpt")
    wait_for_checkpoints(trainer)
    assert step_of(tmp_path / "last.ckpt") == 4


def test_other_writers_are_left_alone(tmp_path: Path) -> None:
    trainer, seen = plain(), []
    with writing_at_once(trainer):
        after_writing(trainer, lambda: seen.append(1))
    wait_for_checkpoints(trainer)
    assert seen == [1]


class Uploads(CSVLogger):
    """A logger that takes the files of checkpoints."""

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Take it."""


def numbered(**options: Any) -> ModelCheckpoint:
    return ModelCheckpoint("checkpoints", **options)


@pytest.mark.parametrize(
    ("setting", "callbacks", "loggers", "expected"),
    [
        (True, [], [], True),
        (False, [], [], False),
        (True, [numbered(), numbered(monitor="loss", filename="best", enable_version_counter=False)], [], True),
        (True, [numbered(filename="{step}-of-{epoch}")], [], True),
        (True, [numbered(filename="best")], [], False),
        (True, [numbered(save_last="link")], [], False),
        (True, [], [CSVLogger], True),
        (True, [], [Uploads], False),
        (True, [], [lambda folder: WandbLogger(save_dir=folder, offline=True)], True),
        (True, [], [lambda folder: WandbLogger(save_dir=folder, offline=False, log_model="all")], False),
    ],
)
def test_files_that_are_looked_at_once_saved_are_waited_for(
    setting: bool, callbacks: list[Callback], loggers: list[Any], expected: bool, tmp_path: Path
) -> None:
    config = composed("trainer.accelerator=cpu", f"background_checkpoints={str(setting).lower()}")
    made: list[Logger] = [kind(tmp_path) for kind in loggers]
    writer = make_trainer(config, "auto", callbacks, made).strategy.checkpoint_io
    assert isinstance(writer, AtomicCheckpointIO)
    assert writer.background is expected


def test_the_setting_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="background_checkpoints is true or false, found 'often'"):
        make_trainer(composed("trainer.accelerator=cpu", "background_checkpoints=often"), "auto")


def test_a_state_that_is_gathered_is_waited_for() -> None:
    writer = make_trainer(composed("trainer.accelerator=cpu"), strategies.fully_sharded()).strategy.checkpoint_io
    assert isinstance(writer, AtomicCheckpointIO)
    assert not writer.background
