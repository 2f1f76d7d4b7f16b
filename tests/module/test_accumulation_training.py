"""Gradient accumulation in real trainings: steps of k micro-batches are those of big batches."""

from __future__ import annotations

import csv
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from support import oracle
from support.accumulation_cases import LOSS, TYPES, WATCHED
from support.alloy import build
from support.alloy import trainer as alloy_trainer
from support.commands import BIN, TINY, read_csv, same, train
from support.lightning_ranks import Ranks
from support.linear import Linear, batches, plain, trainer
from support.spawning import spawn

import harness
from harness.data import EmbeddedAlloyDataModule, ResumableDataLoader, TrainingBatchSampler, look_ahead
from harness.fields import UPCOMING_LABELS
from harness.module import ForceFieldModule
from harness.strategies import AccumulatesInWindows

# unequal micro-batches of one epoch; the last steps of two or three of them are shorter
MICRO = [[0, 1], [2], [3, 4, 5], [6], [7, 8, 9, 10], [11, 12], [13, 14]]


def joined(groups: list[list[int]], k: int) -> list[list[int]]:
    """The batches that steps of k micro-batches make up."""
    return [list(itertools.chain(*groups[start : start + k])) for start in range(0, len(groups), k)]


def module(dtype: torch.dtype = torch.float64) -> ForceFieldModule:
    return ForceFieldModule(
        Linear(dtype),
        oracle.manager(LOSS, TYPES),
        train_metrics=oracle.manager(WATCHED, TYPES),
        optimizer=functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    )


def logged(folder: Path) -> list[dict[str, float]]:
    """Rows of the step logger, without the columns of epochs."""
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [
            {key: float(cell) for key, cell in row.items() if cell and "_step/" in key} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row]


def fit(folder: Path, loader: Any, **options: Any) -> tuple[torch.Tensor, list[dict[str, float]], dict[str, float]]:
    """Parameters after a training, what it logged of its steps, and of its last epoch."""
    trained, logger = module(), CSVLogger(folder, name="", version="csv")
    running = trainer(logger=logger, default_root_dir=folder, **options)
    running.fit(
        trained,
        **({"datamodule": loader} if isinstance(loader, LightningDataModule) else {"train_dataloaders": loader}),
    )
    return trained.model.theta.detach(), logged(folder), {k: float(v) for k, v in running.callback_metrics.items()}


def assert_same_training(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    theta, steps, epoch = found
    torch.testing.assert_close(theta, expected[0], rtol=tolerance, atol=tolerance)
    assert [row.keys() for row in steps] == [row.keys() for row in expected[1]]
    assert len(steps) > 3
    for row, other in zip(steps, expected[1], strict=True):
        for key in other:
            assert same(row[key], other[key], tolerance), key
    # sums of an epoch are the same; what is reported of it too
    assert epoch.keys() == expected[2].keys()
    for key in expected[2]:
        assert same(epoch[key], expected[2][key], tolerance), key


@pytest.mark.parametrize("k", [2, 3, 10])
def test_the_steps_are_those_of_big_batches(k: int, tmp_path: Path) -> None:
    """Seven micro-batches: the last step has fewer."""
    found = fit(tmp_path / "micro", look_ahead(batches(MICRO), k), accumulate_grad_batches=k)
    expected = fit(tmp_path / "big", plain(joined(MICRO, k)), max_epochs=2)
    if k < 10:
        assert_same_training(found, expected)
    else:
        torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
        assert len(found[1]) == len(expected[1]) == 2


@pytest.mark.parametrize("limit", [5, 4])
def test_a_limit_cuts_the_last_step_short(limit: int, tmp_path: Path) -> None:
    loader = look_ahead(batches(MICRO), 2)
    found = fit(tmp_path / "micro", loader, accumulate_grad_batches=2, limit_train_batches=limit)
    assert_same_training(found, fit(tmp_path / "big", plain(joined(MICRO[:limit], 2))))


class Endless:
    """Batches without a length, as of an iterable data set."""

    def __iter__(self) -> Iterator[oracle.Batch]:
        return iter(batches(MICRO))


def test_a_loader_without_a_length(tmp_path: Path) -> None:
    found = fit(tmp_path / "micro", look_ahead(Endless(), lambda: 3), accumulate_grad_batches=3)
    assert_same_training(found, fit(tmp_path / "big", plain(joined(MICRO, 3))))


class Reloaded(LightningDataModule):
    """Another batch size in the second epoch."""

    def train_dataloader(self) -> Any:
        return plain(joined(MICRO, 1 if self.trainer.current_epoch == 0 else 2))


def test_a_schedule_of_micro_batches(tmp_path: Path) -> None:
    loader = look_ahead(batches(MICRO), lambda: micro.trainer.accumulate_grad_batches)
    micro = LightningDataModule.from_datasets()
    micro.train_dataloader = lambda: loader
    found = fit(tmp_path / "micro", micro, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})])
    expected = fit(tmp_path / "big", Reloaded(), reload_dataloaders_every_n_epochs=1)
    assert_same_training(found, expected)


@pytest.fixture(scope="module")
def alloy() -> EmbeddedAlloyDataModule:
    data = EmbeddedAlloyDataModule(
        num_frames=24, split={"val": 5, "test": 4}, cutoff=4.0, batch_size=2, dtype="float64", seed=1
    )
    data.setup()
    return data


class Steps(Callback):
    """Values of the loss on the steps, and of the epoch at the end."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.values[str(trainer.global_step)] = dict(pl_module.step_log.latest)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.values["end"] = {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("stop_after", [1, 2, 4])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_restart_goes_on_with_the_same_steps(
    alloy: EmbeddedAlloyDataModule, tmp_path: Path, stop_after: int, scheduled: bool
) -> None:
    """15 frames in 8 micro-batches of at most 2; steps of 3, 3 and 2 of them. Bitwise."""

    def run(folder: Path, **options: Any) -> tuple[ForceFieldModule, dict[str, dict[str, float]]]:
        steps = Steps()
        callbacks = [*options.pop("callbacks", []), steps]
        k = {"accumulate_grad_batches": 3}
        if scheduled:
            k = {}
            callbacks.insert(0, GradientAccumulationScheduler({0: 3, 1: 2}))
        path = options.pop("ckpt_path", None)
        trained = build(alloy, train_metrics=harness.EnergyForceMetrics)
        running = alloy_trainer(folder, callbacks=callbacks, log_every_n_steps=1, **k, **options)
        running.fit(trained, datamodule=alloy, ckpt_path=path, weights_only=True)
        return trained, steps.values

    whole, expected = run(tmp_path)
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop_after, save_top_k=-1)
    run(tmp_path, enable_checkpointing=True, callbacks=[saved], max_steps=stop_after, max_epochs=-1)
    path = tmp_path / f"step={stop_after}.ckpt"
    state = torch.load(path, weights_only=True)
    done = state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["num_batches_done"]
    assert done == {1: 3, 2: 6, 4: 2 if scheduled else 3}[stop_after]  # what was looked ahead at is not done
    resumed, found = run(tmp_path, ckpt_path=path)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    later = {key: value for key, value in expected.items() if key == "end" or int(key) > stop_after}
    assert len(later) > 2
    assert {key: found[key] for key in later} == later


def test_a_restart_in_the_middle_of_a_step_makes_a_step_of_the_rest(
    alloy: EmbeddedAlloyDataModule, tmp_path: Path
) -> None:
    class SaveAt(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.current_epoch == 0 and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    with pytest.warns(UserWarning, match="after 2 of its 3 micro-batches"):
        alloy_trainer(tmp_path, callbacks=[SaveAt()], accumulate_grad_batches=3, max_epochs=1).fit(
            build(alloy), datamodule=alloy
        )
    steps = Steps()
    alloy_trainer(tmp_path, callbacks=[steps], accumulate_grad_batches=3, max_epochs=1, log_every_n_steps=1).fit(
        build(alloy), datamodule=alloy, ckpt_path=tmp_path / "middle.ckpt", weights_only=True
    )
    assert [key for key, value in steps.values.items() if value] == ["1", "2", "3", "end"]


def numbers(loader: Any) -> list[tuple[int, list[int] | None]]:
    """Every batch's number, and those announced with it."""

    def number(batch: Any) -> int:
        return int(batch["number"])

    return [
        (number(batch), [number(each) for each in batch[UPCOMING_LABELS]] if UPCOMING_LABELS in batch else None)
        for batch in loader
    ]


def test_the_first_of_a_step_announces_the_others() -> None:
    plain = [{"number": torch.tensor(index), "edge_index": torch.zeros(2, 3)} for index in range(7)]
    assert numbers(look_ahead(plain, 3)) == [
        (0, [1, 2]), (1, None), (2, None), (3, [4, 5]), (4, None), (5, None), (6, []),
    ]  # fmt: skip
    assert numbers(look_ahead(plain, 1)) == [(index, None) for index in range(7)]
    announced = next(iter(look_ahead(plain, 2)))[UPCOMING_LABELS]
    assert [set(each) for each in announced] == [{"number"}]  # neighbour lists travel once
    assert len(look_ahead(plain, 2)) == 7
    with pytest.raises(ValueError, match="at least 1"):
        look_ahead(plain, 0)
    with pytest.raises(ValueError, match="whole number"):
        look_ahead(plain, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dictionaries, found Tensor"):
        list(look_ahead([torch.zeros(2)], 2))


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index)


def resumable(k: int, **options: Any) -> ResumableDataLoader:
    sampler = TrainingBatchSampler(14, 2, 0, 1, shuffle=False)
    return ResumableDataLoader(Numbers(), sampler, k, collate_fn=lambda batch: {"number": batch[0] // 2}, **options)


@pytest.mark.parametrize("done", range(8))
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_position_counts_what_was_handed_out(done: int, wrapped: bool) -> None:
    def make() -> Any:
        return look_ahead(resumable(1), 3) if wrapped else resumable(3)

    first = make()
    before = list(itertools.islice(first, done))
    assert len(before) == done
    state = first.state_dict()
    assert state.get("num_batches_done", state.get("loader", {}).get("num_batches_done")) == done
    second = make()
    second.load_state_dict(state)
    rest = numbers(second)
    if done == 7:
        assert len(rest) in (0, 7)
        return
    assert [number for number, _ in rest] == list(range(done, 7))
    end = min(done - done % 3 + 3, 7)
    assert rest[0][1] == list(range(done + 1, end))  # steps end where they would have ended


def test_lightning_finds_the_sampler_behind_the_wrapper() -> None:
    loader = look_ahead(resumable(1), 3)
    assert loader.batch_sampler is loader.loader.batch_sampler
    with pytest.raises(AttributeError, match="the loader itself"):
        loader.worker_init_fn  # noqa: B018


def test_no_look_ahead_without_accumulation(alloy: EmbeddedAlloyDataModule, tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            assert UPCOMING_LABELS not in batch

    alloy_trainer(tmp_path, callbacks=[Watch()], max_epochs=1).fit(build(alloy), datamodule=alloy)


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (lambda: plain(MICRO), "announced nothing"),
        (lambda: look_ahead(batches(MICRO), 2), "announced a step of 2 micro-batches"),
        (lambda: look_ahead(batches(MICRO), 8), "announced nothing"),
        (lambda: look_ahead(Endless(), 2), "announced a step of 2 micro-batches"),
    ],
)
def test_loaders_that_do_not_look_ahead_as_far_are_refused(loader: Callable[[], Any], found: str) -> None:
    with pytest.raises(ValueError, match=rf"{found}.*harness.data.look_ahead\(loader, 4\)"):
        trainer(accumulate_grad_batches=4).fit(module(), loader())


ROOT_LOSS = functools.partial(
    harness.MetricsManager, [{"field": "forces", "metric": harness.RootMeanSquaredError(), "coeff": 1}]
)


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({1: 2})]}]
)
def test_a_loss_that_does_not_add_up_is_refused_before_training(options: dict[str, Any]) -> None:
    refused = ForceFieldModule(Linear(), ROOT_LOSS)
    with pytest.raises(ValueError, match="RootMeanSquaredError is not known to be a multiple"):
        trainer(**options).fit(refused, look_ahead(batches(MICRO), 2))
    trainer().fit(ForceFieldModule(Linear(), ROOT_LOSS), plain([[0, 1]]))


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """DeepSpeed without its insistence on CUDA."""

    def setup_environment(self) -> None:
        self.accelerator.setup_device(torch.device("cpu"))
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


class WindowedDeepSpeed(AccumulatesInWindows, DeepSpeedOnCPU):
    pass


def deep_speed(
    stage: int, environment: ClusterEnvironment, kind: type[DeepSpeedStrategy] = WindowedDeepSpeed
) -> DeepSpeedStrategy:
    config = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": 1,
    }
    return kind(config=config, cluster_environment=environment, process_group_backend="gloo")


def fit_on_rank(
    rank: int, world_size: int, folder: Path, stage: int | None, groups: list[list[int]], options: dict[str, Any]
) -> Any:
    """Parameters after a training on several ranks, each with its own part of every micro-batch."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    dtype = torch.float64 if stage is None else torch.float32
    environment = Ranks(rank, world_size)
    strategy = DDPStrategy(cluster_environment=environment) if stage is None else deep_speed(stage, environment)
    mine = [group[rank::world_size] for group in groups]
    loader = look_ahead(batches(mine, dtype), options.get("accumulate_grad_batches", 1))
    trained, logger = module(dtype), CSVLogger(folder, name="", version="csv") if rank == 0 else False
    running = trainer(strategy=strategy, devices=world_size, logger=logger, default_root_dir=folder, **options)
    running.fit(trained, loader)
    epoch = {key: float(value) for key, value in running.callback_metrics.items()}
    return trained.model.theta.detach().double().numpy(), running.global_step, epoch


# every rank has a part of every micro-batch, and parts are unequal; five micro-batches, so that the last step has one
SHARED = [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


def test_ddp_takes_the_steps_of_big_batches(tmp_path: Path) -> None:
    results = spawn(2, fit_on_rank, tmp_path / "ranks", None, SHARED, {"accumulate_grad_batches": 2}, timeout=120)
    expected = fit(tmp_path / "big", plain(joined(SHARED, 2)))
    for theta, steps, epoch in results:
        assert steps == 6
        assert_same_training((torch.tensor(theta), logged(tmp_path / "ranks"), epoch), expected)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_deep_speed_takes_the_steps_of_big_batches(stage: int, tmp_path: Path) -> None:
    """Model and labels in float32: the momentum shows a wrong factor or a step too many, Adam would not."""
    results = spawn(2, fit_on_rank, tmp_path / "ranks", stage, SHARED, {"accumulate_grad_batches": 2}, timeout=200)
    expected = fit(tmp_path / "big", plain(joined(SHARED, 2)))
    for theta, steps, epoch in results:
        assert steps == 6
        assert_same_training((torch.tensor(theta), logged(tmp_path / "ranks"), epoch), expected, tolerance=2e-5)


def test_deep_speed_that_counts_by_itself_is_refused() -> None:
    strategy = deep_speed(2, Ranks(0, 1), DeepSpeedOnCPU)
    assert strategy.handles_gradient_accumulation
    assert not deep_speed(2, Ranks(0, 1)).handles_gradient_accumulation
    refused = module()
    refused.trainer = trainer(accumulate_grad_batches=2, strategy=strategy)
    with pytest.raises(ValueError, match=r"DeepSpeedOnCPU counts micro-batches by itself.*AccumulatesInWindows"):
        refused.setup("fit")


@pytest.mark.slow
def test_two_ranks_on_the_command_line(tmp_path: Path) -> None:
    """16 frames: 4 micro-batches of 4 on two ranks are 2 batches of 8 on one."""
    double = (
        "trainer.precision=64-true",
        "data.dtype=float64",
        "trainer.log_every_n_steps=1",
        "logger=csv",
        "test=false",
    )
    found = train(*TINY, *double, "trainer.accumulate_grad_batches=2", folder=tmp_path / "micro", ranks=2)
    expected = train(*TINY, *double, "data.batch_size=8", folder=tmp_path / "big")
    assert (found.code, expected.code) == (0, 0), found.err + expected.err
    rows, others = read_csv(found.runs[0]), read_csv(expected.runs[0])
    assert sum("train_loss_step/weighted_sum" in row for row in others) == 4
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            assert same(row[key], other[key], 1e-8), key
