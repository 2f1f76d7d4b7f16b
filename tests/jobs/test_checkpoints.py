"""Checkpoints: where a training may be cut, what a torn or hostile file does, and what a step costs beside them."""

from __future__ import annotations

import functools
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from support.commands import ROOT, TINY, train
from support.failure_callbacks import Ballast, Noise, SignalAt
from support.spawning import spawn

import harness
from harness.callbacks import REQUEUE_EXIT_CODE, ExponentialMovingAverage, Preempted, ResumeCheckpoint
from harness.checkpoints import AtomicCheckpointIO, CheckpointError, newest_valid, read, step_of, why_invalid
from harness.data import EmbeddedAlloyDataModule
from harness.loggers import CSVLogger
from harness.models import schnet_force_field
from harness.module import ForceFieldModule
from harness.trained import TrainedCheckpoint

NUM_SAVES = 12
"""4 steps in each of 3 epochs: 3 within each, and one when it is complete."""


class StopError(Exception):
    """Ends a training where it has saved, as a kill would."""


class StopAfter(ResumeCheckpoint):
    """Saves after every step and stops after one of them."""

    def __init__(self, folder: Path, num_saves: int | None = None) -> None:
        super().__init__(folder, every_n_steps=1)
        self.num_saves = num_saves
        self.done = 0

    def _save(self, trainer: Trainer) -> None:
        super()._save(trainer)
        self.done += 1
        if self.done == self.num_saves:
            raise StopError


@pytest.fixture(scope="module")
def data() -> EmbeddedAlloyDataModule:
    module = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=4, dtype="float64", seed=1
    )
    module.setup()
    return module


def build(data: EmbeddedAlloyDataModule) -> ForceFieldModule:
    seed_everything(3, verbose=False)
    model = schnet_force_field(
        data.statistics, cutoff=4.0, hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=8, seed=3
    )
    plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9)
    return ForceFieldModule(
        model.double(),
        loss=functools.partial(harness.EnergyForceLoss, coeffs={"total_energy": 10, "forces": 1}),
        val_metrics=functools.partial(harness.EnergyForceMetrics, coeffs={"forces_rmse": 1}),
        train_metrics=harness.EnergyForceMetrics,
        type_names=data.type_names,
        optimizer=functools.partial(torch.optim.Adam, lr=5e-3),
        lr_scheduler={"scheduler": plateau, "monitor": "val0_epoch/weighted_sum", "interval": "epoch"},
    )


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": CSVLogger(folder, name="", version="csv"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "log_every_n_steps": 1,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [ExponentialMovingAverage(decay=0.7), Noise(), *callbacks],
    }
    return Trainer(**{**settings, **options})


def fit(
    folder: Path, data: EmbeddedAlloyDataModule, saving: StopAfter, resumed: Path | None = None, **options: Any
) -> Any:
    """Weights of a training, or of a part of it; its log is in the folder."""
    module, trainer = build(data), make_trainer(folder, saving, **options)
    if resumed is not None:
        trainer.logger.resume_from(step_of(resumed))  # type: ignore[union-attr]
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    except StopError:
        trainer.logger.finalize("failed")  # type: ignore[union-attr]
    return {name: value.clone() for name, value in module.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(data: EmbeddedAlloyDataModule, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    folder = tmp_path_factory.mktemp("whole")
    weights = fit(folder, data, StopAfter(folder / "checkpoints"))
    return weights, (folder / "csv" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("num_saves", "in_background"),
    [*((number, False) for number in range(1, NUM_SAVES + 1)), *((number, True) for number in (2, 4, 7, 12))],
)
def test_a_training_may_be_cut_after_every_step(
    num_saves: int, in_background: bool, data: EmbeddedAlloyDataModule, whole: tuple[Any, str], tmp_path: Path
) -> None:
    """Within an epoch, between two, and at the end: the weights and the log are those of one piece, to the last bit."""
    first, options = StopAfter(tmp_path / "checkpoints", num_saves), {"plugins": [AtomicCheckpointIO(in_background)]}
    fit(tmp_path, data, first, **options)
    assert [step_of(path) for path in (first.last, first.previous) if path.exists()] == [num_saves, num_saves - 1][
        :num_saves
    ]
    weights = fit(tmp_path, data, StopAfter(tmp_path / "checkpoints"), resumed=first.last, **options)
    assert weights.keys() == whole[0].keys()
    for name, value in weights.items():
        assert torch.equal(value, whole[0][name]), name
    assert (tmp_path / "csv" / "metrics.csv").read_text() == whole[1]


class NewestAtEnd(Callback):
    """Step of the newest checkpoint when an exception ends the training."""

    def __init__(self, path: Path) -> None:
        self.path, self.step = path, 0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.step = step_of(self.path)


def test_a_stop_does_not_leave_its_checkpoint_to_the_background(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """Other ranks, and a launcher, go by the end of the processes: the file is there before."""
    saving, told = ResumeCheckpoint(tmp_path / "run"), SignalAt(5, "SIGTERM", str(tmp_path / "done"))
    newest, writer = NewestAtEnd(saving.last), AtomicCheckpointIO(background=True)
    trainer = make_trainer(tmp_path, saving, told, Ballast(megabytes=40), newest, plugins=[writer])
    with pytest.raises(Preempted, match="saved step 6 of epoch 1"):
        trainer.fit(build(data), datamodule=data)
    assert newest.step == 6
    assert step_of(saving.previous) == 4


def test_the_two_newest_are_kept(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    saving = StopAfter(tmp_path, 3)
    fit(tmp_path / "log", data, saving)
    assert [step_of(saving.previous), step_of(saving.last)] == [2, 3]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "previous.ckpt"]


OTHERS = {
    "validation within epochs": {"val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 3},
    "fewer batches": {"limit_train_batches": 3},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_training_of_another_rhythm_may_be_cut(name: str, data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    options = OTHERS[name]
    expected = fit(tmp_path / "whole", data, StopAfter(tmp_path / "whole"), **options)
    for num_saves in (1, 2, 3):
        folder = tmp_path / str(num_saves)
        first = StopAfter(folder, num_saves)
        fit(folder, data, first, **options)
        weights = fit(folder, data, StopAfter(folder), resumed=first.last, **options)
        assert all(torch.equal(weights[key], value) for key, value in expected.items()), num_saves
        logs = [(each / "csv" / "metrics.csv").read_text() for each in (folder, tmp_path / "whole")]
        assert logs[0] == logs[1], num_saves


# --- files ---


def save(path: Path, step: int = 1) -> None:
    AtomicCheckpointIO().save_checkpoint(
        {"state_dict": {"weight": torch.arange(1000.0)}, "loops": {}, "epoch": 0, "global_step": step}, path
    )


def test_a_damaged_one_never_pushes_out_a_whole_one(data: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    """The newest is damaged, the one before goes on, and the next one cannot be written: it is still there."""
    saving = StopAfter(tmp_path / "run", 3)
    fit(tmp_path / "log", data, saving)
    os.truncate(saving.last, 1000)
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged"):
        assert saving.newest() == saving.previous
    again = StopAfter(tmp_path / "run", 1)
    fit(tmp_path / "log", data, again, resumed=saving.previous)
    assert [step_of(path) for path in (again.previous, again.last) if path.exists()] == [2, 3]
    assert (tmp_path / "run" / "last.damaged").exists()


@pytest.mark.parametrize("moved", [False, True])
def test_a_kill_between_writing_and_naming_loses_nothing(moved: bool, tmp_path: Path) -> None:
    saving = ResumeCheckpoint(tmp_path)
    save(saving.previous, 1)
    save(saving.last, 2)
    save(saving.following, 3)
    if moved:
        os.replace(saving.last, saving.previous)
    assert saving.newest() == saving.last
    assert [step_of(saving.previous), step_of(saving.last)] == [2, 3]
    assert not saving.following.exists()


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert newest_valid([last, previous]) is None
    save(previous, 1)
    assert newest_valid([last, previous]) == previous
    save(last, 2)
    assert newest_valid([last, previous]) == last
    os.truncate(last, 1000)
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged.*The one before is used: .*previous\.ckpt"):
        assert newest_valid([last, previous]) == previous
    os.truncate(previous, 10)
    with pytest.warns(UserWarning, match="starts anew"):
        assert newest_valid([last, previous]) is None


@pytest.mark.parametrize("position", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_a_flipped_bit_is_found(position: float, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path)
    with zipfile.ZipFile(path) as archive:
        (data,) = [each for each in archive.infolist() if each.filename.endswith("data/0")]
    content = bytearray(path.read_bytes())
    content[data.header_offset + 200 + int(position * (data.file_size - 400))] ^= 4
    path.write_bytes(content)
    assert why_invalid(path) is not None


def test_weights_alone_are_not_enough_to_go_on(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    assert why_invalid(tmp_path / "weights.ckpt") == "it has no loops, epoch, global_step; it has state_dict"


def test_a_write_that_fails_leaves_the_old_one_and_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "last.ckpt"
    (tmp_path / "folder").write_text("a file in the place of the folder")
    io = AtomicCheckpointIO()
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be written") as caught:  # noqa: PT031
        for step in (1, 2):
            io.save_checkpoint({"global_step": step}, path)
    assert len(caught) == 1


class Anything:
    """An object that only arbitrary unpickling could bring back."""


def test_what_could_not_be_loaded_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights_only=True.*Anything"):
        AtomicCheckpointIO().save_checkpoint({"hyper_parameters": Anything()}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def hostile(path: Path, trace: Path) -> None:
    """A checkpoint that leaves a trace if it is unpickled without restrictions, as is shown here."""
    torch.save({"state_dict": {}, "loops": {}, "epoch": 0, "global_step": 1, "x": Hostile(f"touch {trace}")}, path)
    torch.load(path, weights_only=False)
    assert trace.exists()
    trace.unlink()


def test_a_checkpoint_from_elsewhere_runs_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    hostile(path, trace)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert "it holds posix.system, which only unpickling could load" in str(why_invalid(path))
    for reader in (read, TrainedCheckpoint.read):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt is no checkpoint .*posix\.system"):
            reader(path)
    done = train(*TINY, "logger=none", f"ckpt_path={path}", folder=tmp_path)
    assert done.code == 1
    assert "evil.ckpt" in done.err
    assert "Traceback" not in done.err
    tested = train(*TINY, "logger=none", "train=false", f"ckpt_path={path}", folder=tmp_path)
    assert tested.code == 1
    assert "evil.ckpt" in tested.err
    assert not trace.exists()


# --- leaving ---


def test_leaving_has_an_exit_code_of_its_own() -> None:
    with pytest.raises(SystemExit) as ended:
        raise Preempted("told")
    assert ended.value.code == REQUEUE_EXIT_CODE == 75
    assert str(ended.value) == "told"


@pytest.mark.parametrize(("options", "word"), [({"signals": ["SIGFOO"]}, "SIGFOO"), ({"every_n_epochs": 0}, "found 0")])
def test_mistakes(options: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word):
        ResumeCheckpoint(tmp_path, **options)


class CountCalls(Callback):
    """Calls of torch.distributed from Python, from the end of one training step to the end of the next, by name."""

    def __init__(self) -> None:
        self.calls: list[Counter[str]] = []
        self._current: Counter[str] | None = None
        self._originals: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in ("all_reduce", "broadcast", "all_gather_object", "all_gather", "barrier", "reduce_scatter_tensor"):
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, functools.partial(self._count, name))
        self._current = Counter()

    def _count(self, name: str, *arguments: Any, **options: Any) -> Any:
        if self._current is not None:
            self._current[name] += 1
        return self._originals[name](*arguments, **options)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if self._current is not None:
            self.calls.append(self._current)
        self._current = None if trainer.is_last_batch else Counter()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


def group_timeouts(rank: int, world_size: int, folder: Path) -> list[float]:
    """Seconds that the groups of a job wait which are made through its own process group."""
    script = (
        "from datetime import timedelta\n"
        "import torch, torch.distributed as dist\n"
        "from harness.distributed import join\n"
        "join('gloo', timedelta(seconds=20))\n"
        "mesh = dist.init_device_mesh('cpu', (1, 2), mesh_dim_names=('a', 'b'))\n"
        "groups = [None, mesh['a'].get_group(), mesh['b'].get_group(), dist.new_group([0, 1])]\n"
        "groups = [group or dist.group.WORLD for group in groups]\n"
        "print(*(g._get_backend(torch.device('cpu')).options._timeout.total_seconds() for g in groups))\n"
    )
    port = int((folder / "port").read_text())
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=50, check=True
    )
    return [float(number) for number in done.stdout.split()]


def test_the_time_limit_is_that_of_every_group(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    assert spawn(2, group_timeouts, tmp_path) == [[20.0] * 4] * 2


def count_calls(rank: int, world_size: int, folder: Path) -> list[dict[str, int]]:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE="2")
    os.environ.update(TORCHELASTIC_RUN_ID="here", GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    counting = CountCalls()
    try:
        data = EmbeddedAlloyDataModule(num_frames=24, split={"val": 5}, cutoff=4.0, batch_size=4, dtype="float64")
        data.setup()
        trainer = make_trainer(
            folder,
            ResumeCheckpoint(folder / "checkpoints"),
            counting,
            devices=2,
            strategy="ddp",
            max_epochs=1,
        )
        trainer.fit(build(data), datamodule=data)
    finally:
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
            os.environ.pop(name, None)
    return [dict(each) for each in counting.calls]


def test_a_training_step_sends_counts_and_sums(tmp_path: Path) -> None:
    """The request to stop is one more number among the sums; Lightning's own question is not asked."""
    for calls in spawn(2, count_calls, tmp_path):
        # of the loss and the metrics of training: counts, sums, and maxima since there are maxima among them
        # in the first step the ranks agree that counts can be announced
        assert calls == [{"all_reduce": 4}, *[{"all_reduce": 3}] * 4]
