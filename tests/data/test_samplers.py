"""Laws of the samplers, and resuming in the middle of an epoch with Lightning itself."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from harness.data import EvaluationBatchSampler, ResumableDataLoader, TrainingBatchSampler


@st.composite
def layouts(draw):
    """Number of samples, batch size and a number of ranks that every global batch can serve."""
    num_samples = draw(st.integers(1, 60))
    batch_size = draw(st.integers(1, 70))
    smallest = num_samples // -(-num_samples // batch_size)
    return num_samples, batch_size, draw(st.integers(1, smallest))


@settings(deadline=None)
@given(layouts(), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_training_batches_partition_the_data(layout, seed, epoch, shuffle):
    num_samples, batch_size, num_ranks = layout
    steps = []
    for rank in range(num_ranks):
        sampler = TrainingBatchSampler(num_samples, batch_size, rank, num_ranks, seed, shuffle)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == -(-num_samples // batch_size)
        assert all(batches)
        steps.append(batches)
    drawn = [index for batches in steps for batch in batches for index in batch]
    assert sorted(drawn) == list(range(num_samples))

    single = TrainingBatchSampler(num_samples, batch_size, 0, 1, seed, shuffle)
    single.set_epoch(epoch)
    for step, global_batch in enumerate(single):
        assert len(global_batch) <= batch_size
        assert sorted(index for batches in steps for index in batches[step]) == sorted(global_batch)
        shares = [len(batches[step]) for batches in steps]
        assert max(shares) - min(shares) <= 1
    sizes = [len(batch) for batch in single]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 12))
def test_evaluation_batches_partition_the_data(num_samples, batch_size, num_ranks):
    drawn = []
    for rank in range(num_ranks):
        sampler = EvaluationBatchSampler(num_samples, batch_size, rank, num_ranks)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(0 < len(batch) <= -(-batch_size // num_ranks) for batch in batches)
        own = [index for batch in batches for index in batch]
        assert own == list(range(rank, num_samples, num_ranks))
        drawn += own
    assert sorted(drawn) == list(range(num_samples))


@settings(deadline=None)
@given(layouts(), st.data())
def test_a_saved_position_continues_on_any_number_of_ranks(layout, data):
    num_samples, batch_size, num_ranks = layout
    whole = TrainingBatchSampler(num_samples, batch_size, 0, 1, seed=3)
    done = data.draw(st.integers(0, len(whole)))
    whole.set_epoch(2)
    state = whole.state_dict(done)
    expected = [sorted(batch) for batch in whole][done:]
    samplers = [TrainingBatchSampler(num_samples, batch_size, rank, num_ranks, seed=3) for rank in range(num_ranks)]
    for sampler in samplers:
        sampler.load_state_dict(state)
        sampler.set_epoch(2)
    steps = zip(*samplers, strict=True)
    assert [sorted(index for part in parts for index in part) for parts in steps] == expected
    for sampler in samplers:  # the epoch after that one is whole
        sampler.set_epoch(3)
        assert len(list(sampler)) == len(sampler)


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = TrainingBatchSampler(50, 8, 0, 1, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_too_many_ranks_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"batches of 2 samples for 3 ranks.*raise batch_size"):
        TrainingBatchSampler(8, 3, 0, 3)
    with pytest.raises(ValueError, match="rank must be in 0 … 1"):
        EvaluationBatchSampler(8, 3, 2, 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        TrainingBatchSampler(8, 0, 0, 1)


def test_a_position_in_another_order_is_refused():
    state = TrainingBatchSampler(20, 4, 0, 1).state_dict(2)
    with pytest.raises(ValueError, match=r"batch_size': 4.*batch_size': 5"):
        TrainingBatchSampler(20, 5, 0, 1).load_state_dict(state)


class Numbers(Dataset):
    """The numbers 0 … 22 as samples."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class Recorder(pl.LightningModule):
    """Remembers the samples of every training step, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch.flatten().int().tolist()))
        return (self.weight * batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(num_workers: int) -> ResumableDataLoader:
    sampler = TrainingBatchSampler(23, 4, 0, 1, seed=1)
    return ResumableDataLoader(Numbers(), sampler, num_workers=num_workers, persistent_workers=num_workers > 0)


def trainer(directory, max_epochs: int, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        logger=False,
        default_root_dir=directory,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_resumes_in_mid_epoch_with_the_batches_not_yet_seen(tmp_path, num_workers):
    # 6 steps an epoch: step 9 lies in the middle of epoch 1, step 6 and 12 at the end of epochs 0 and 1
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    uninterrupted = Recorder()
    trainer(tmp_path, 3, callbacks=[keep]).fit(uninterrupted, loader(num_workers))
    assert len(uninterrupted.seen) == 18
    for epoch in range(3):
        in_epoch = [index for seen_in, batch in uninterrupted.seen for index in batch if seen_in == epoch]
        assert sorted(in_epoch) == list(range(23))
    assert uninterrupted.seen[:6] != uninterrupted.seen[6:12]

    for step in (3, 6, 9, 12) if num_workers == 0 else (9,):
        resumed = Recorder()
        trainer(tmp_path, 3, enable_checkpointing=False).fit(
            resumed, loader(num_workers), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert resumed.seen == uninterrupted.seen[step:], step


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_counts_what_the_consumer_was_given(num_workers):
    first = loader(num_workers)
    batches = iter(first)
    given_out = [next(batches) for _ in range(2)]
    state = first.state_dict()
    assert state["num_batches_done"] == 2
    rest = loader(0)
    rest.load_state_dict(state)
    assert rest.state_dict() == state
    numbers = torch.cat([*given_out, *rest]).flatten().numpy()
    np.testing.assert_array_equal(np.sort(numbers), np.arange(23))
    assert len(list(rest)) == len(rest) == 6
