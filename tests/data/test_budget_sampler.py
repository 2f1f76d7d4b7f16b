"""Batches by a budget of atoms or edges: laws, real sizes, and trainings on one and two ranks."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import SHARED, TINY, read_csv, same, train
from support.spawning import spawn
from torch.utils.data import Dataset

from harness.data import (
    AtomsDataModule,
    BudgetBatchSampler,
    EmbeddedAlloyDataModule,
    EvaluationBudgetSampler,
    GlobalBatchSampler,
    ResumableDataLoader,
    TrainingBatchSampler,
    embedded_alloy_file,
    samplers,
    set_loaders,
)
from harness.data.balance import balanced_parts, balanced_shares, deal
from harness.data.dealing import ascending_order, deal_in_rounds

# ---- shares of similar sums


def dealt_slowly(sizes: list[int], num_shares: int) -> list[int]:
    """The same rule without a heap: the smallest sum, of those the fewest items, of those the first."""
    sums, counts, shares = [0] * num_shares, [0] * num_shares, []
    for size in sizes:
        share = min(range(num_shares), key=lambda index: (sums[index], counts[index]))
        sums[share] += size
        counts[share] += 1
        shares.append(share)
    return shares


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 8))
def test_items_go_to_the_smallest_sum(sizes, num_shares):
    shares, largest = deal(sizes, num_shares)
    assert shares == dealt_slowly(sizes, num_shares)
    sums = np.bincount(shares, weights=sizes, minlength=num_shares) if sizes else np.zeros(num_shares)
    assert largest == sums.max()
    assert largest <= sum(sizes) / num_shares + (1 - 1 / num_shares) * max(sizes, default=0) + 1e-9


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 8))
def test_balanced_shares_are_a_partition_without_empty_parts(sizes, num_shares):
    shares = balanced_shares(sizes, num_shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(sizes)))
    assert len(shares) == num_shares
    assert len(sizes) < num_shares or all(len(share) for share in shares)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 9), st.data())
def test_batches_divided_at_once_are_those_divided_one_by_one(sizes, num_shares, seed, data):
    sizes = np.array(sizes)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes)), max_size=8)) - {len(sizes)})
    batches = np.split(np.random.default_rng(seed).permutation(len(sizes)), cuts)
    wanted = np.arange(len(batches)) % num_shares
    parts = balanced_parts(sizes, batches, num_shares, wanted)
    for part, batch, share in zip(parts, batches, wanted, strict=True):
        assert part.tolist() == batch[balanced_shares(sizes[batch], num_shares)[share]].tolist()


def test_few_long_batches_are_divided_one_by_one():
    sizes = np.random.default_rng(0).integers(0, 50, 1000)
    (part,) = balanced_parts(sizes, [np.arange(1000)], 3, np.array([2]))
    assert part.tolist() == balanced_shares(sizes, 3)[2].tolist()


# ---- many items dealt at once


@settings(deadline=None)
@given(st.lists(st.integers(0, 30) | st.integers(0, 300), min_size=1, max_size=80), st.integers(1, 9), st.data())
def test_every_share_is_within_the_bound_or_has_the_fewest_items(sizes, num_shares, data):
    fewest = data.draw(st.integers(0, len(sizes) // num_shares))
    dealt = deal_in_rounds(np.array(sizes), num_shares, fewest)
    counts = np.bincount(dealt.shares, minlength=num_shares)
    assert counts.min() >= fewest
    assert counts.tolist() == dealt.counts.tolist()
    sums = np.bincount(dealt.shares, weights=sizes, minlength=num_shares)
    assert dealt.largest == sums.max()
    bound = sum(sizes) / num_shares + (1 - 1 / num_shares) * max(sizes) + 1e-9
    assert all(total <= bound or count <= fewest for total, count in zip(sums, counts, strict=True))
    wanted = np.random.default_rng(len(sizes)).permutation(num_shares)
    plan = dealt.grouped(np.arange(len(sizes)), wanted)
    found = [np.flatnonzero(dealt.shares == share).tolist() for share in wanted]
    assert [batch.tolist() for batch in plan] == found  # in the order in which they were dealt
    with pytest.raises(ValueError, match=rf"{len(sizes)} items are not enough"):
        deal_in_rounds(np.array(sizes), num_shares, len(sizes) // num_shares + 1)


@pytest.mark.parametrize("num_shares", [2, 7])
@pytest.mark.parametrize("part", [0.0, 0.9, 1.0])
def test_shares_of_thousands_of_items_get_several_at_once(num_shares, part):
    sizes = np.sort(heavy_tail(8000))[::-1].copy()
    fewest = int(part * (len(sizes) // num_shares))
    dealt = deal_in_rounds(sizes, num_shares, fewest)
    plan = dealt.grouped(np.arange(len(sizes)), np.arange(num_shares))
    assert sorted(np.concatenate(list(plan)).tolist()) == list(range(len(sizes)))
    assert min(map(len, plan)) >= fewest
    sums = [sizes[batch].sum() for batch in plan]
    assert max(sums) == dealt.largest
    assert part == 1 or max(sums) < 1.001 * np.mean(sums)


@given(st.lists(st.integers(0, 30) | st.integers(0, 1 << 62), max_size=50))
def test_order_is_that_of_a_stable_sort(values):
    values = np.array(values, dtype=np.int64)
    assert ascending_order(values).tolist() == np.argsort(values, kind="stable").tolist()


# ---- laws of the batches


@st.composite
def budgets(draw):
    """Sizes, some of them large, and a budget that holds the largest."""
    sizes = draw(st.lists(st.integers(0, 12) | st.integers(0, 200), min_size=1, max_size=60).filter(any))
    return sizes, draw(st.integers(max(sizes), 3 * max(sizes) + 20))


def batches_of(sizes, budget, rank=0, num_ranks=1, seed=0, epoch=0) -> list[list[int]]:
    sampler = BudgetBatchSampler(sizes, budget, rank, num_ranks, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@settings(deadline=None)
@given(budgets(), st.integers(0, 5), st.integers(0, 5), st.data())
def test_global_batches_within_the_budget_are_divided_over_the_ranks(case, seed, epoch, data):
    sizes, budget = np.array(case[0]), case[1]
    num_ranks = data.draw(st.integers(1, BudgetBatchSampler(sizes, budget, 0, 1).fewest))
    whole = batches_of(sizes, budget, seed=seed, epoch=epoch)
    ranks = [batches_of(sizes, budget, rank, num_ranks, seed, epoch) for rank in range(num_ranks)]
    assert sorted(index for batch in whole for index in batch) == list(range(len(sizes)))
    for parts, batch in zip(zip(*ranks, strict=True), whole, strict=True):  # as many steps on every rank
        assert all(parts)
        assert sorted(index for part in parts for index in part) == sorted(batch)
        assert sizes[batch].sum() <= budget
        for part in parts:
            assert sizes[part].sum() <= budget / num_ranks + (1 - 1 / num_ranks) * sizes[batch].max() + 1e-9
    assert ranks == [batches_of(sizes, budget, rank, num_ranks, seed, epoch) for rank in range(num_ranks)]


@settings(deadline=None)
@given(budgets())
def test_the_number_of_batches_and_their_fewest_samples(case):
    sizes, budget = case
    sampler = BudgetBatchSampler(sizes, budget, 0, 1)
    total, largest = sum(sizes), max(sizes)
    assert math.ceil(total / budget) <= len(sampler) <= len(sizes)
    if budget > largest:  # as many are enough for any order (Graham)
        assert len(sampler) <= max(math.ceil(total / budget), math.ceil((total - largest) / (budget - largest)))
    assert sampler.fewest >= min(budget // largest, len(sizes) // len(sampler))
    assert sampler.batch_size == len(sizes) // len(sampler)  # DeepSpeed asks for it
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)  # every epoch: Lightning asks for the length once
        assert min(map(len, sampler.global_batches())) >= sampler.fewest
    with pytest.raises(ValueError, match=f"there are {sampler.fewest + 1} ranks"):
        BudgetBatchSampler(sizes, budget, 0, sampler.fewest + 1)


@settings(deadline=None)
@given(budgets(), st.data())
def test_every_position_continues_on_any_number_of_ranks(case, data):
    sizes, budget = case
    whole = BudgetBatchSampler(sizes, budget, 0, 1, seed=3)
    num_ranks = data.draw(st.integers(1, whole.fewest))
    samplers = [BudgetBatchSampler(sizes, budget, rank, num_ranks, seed=3) for rank in range(num_ranks)]
    whole.set_epoch(2)
    expected = [sorted(batch) for batch in whole]
    for done in range(len(whole) + 1):
        state = whole.state_dict(done)
        for sampler in samplers:
            sampler.set_epoch(0)
            sampler.load_state_dict(state)
            sampler.set_epoch(2)
        steps = zip(*samplers, strict=True)
        assert [sorted(index for part in parts for index in part) for parts in steps] == expected[done:]
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)  # the next iteration is whole


def heavy_tail(number: int = 600) -> np.ndarray:
    return np.exp(np.random.default_rng(1).normal(3.5, 0.9, number)).clip(1, 400).astype(int)


@pytest.mark.parametrize("slack", [1.001, 1.02, 1.5])
def test_batches_are_alike_in_an_epoch_and_differ_between_epochs(slack):
    sizes = heavy_tail()
    budget = int(slack * sizes.sum() / 20)
    epochs = [batches_of(sizes, budget, epoch=epoch) for epoch in range(4)]
    assert len(epochs[0]) == math.ceil(sizes.sum() / budget)
    totals = np.array([sizes[batch].sum() for batch in epochs[0]])
    assert totals.min() > 0.5 * totals.mean()  # no batch of what is left over
    assert len({frozenset(batch) for batches in epochs for batch in batches}) == 4 * len(epochs[0])
    assert batches_of(sizes, budget, seed=1) != batches_of(sizes, budget, seed=2)
    # samples meet others from epoch to epoch: a pair shares a batch in about one of 20, also of two large samples
    large = set(np.argsort(sizes)[-100:].tolist())
    met = [{(a, b) for batch in batches for a in batch for b in batch if a < b} for batches in epochs]
    assert len(met[0] & met[1]) < 0.15 * len(met[0])
    among = [{pair for pair in pairs if set(pair) <= large} for pairs in met]
    assert len(among[0] & among[1]) < 0.3 * len(among[0])


def test_samples_that_hardly_go_together_are_packed_without_trying_every_number():
    assert len(BudgetBatchSampler([6] * 2001, 10, 0, 1)) == 2001
    assert len(BudgetBatchSampler([6] * 2000 + [4] * 1000, 10, 0, 1)) == 2000


def test_one_rank_does_not_get_all_the_large_samples():
    sizes = [100] + [1] * 9
    first = [
        [batch for epoch in range(12) for batch in batches_of(sizes * 6, 220, rank, 2, epoch=epoch)] for rank in (0, 1)
    ]
    large = [sum(sizes[index % 10] == 100 for batch in own for index in batch) for own in first]
    assert min(large) > 0.3 * sum(large)


# ---- errors and states


def test_budgets_that_cannot_be():
    with pytest.raises(ValueError, match=r"2 of 3 samples have more than the 10 atoms.*sample 2, has 40 atoms; raise"):
        BudgetBatchSampler([3, 11, 40], 10, 0, 1)
    with pytest.raises(
        ValueError, match=r"have 2 samples in each, but there are 4 ranks.*frame 0, has 5 edges.*20 edges"
    ):
        BudgetBatchSampler([5] * 10, 12, 0, 4, unit="edges", name_of="frame {}".format)
    with pytest.raises(ValueError, match="no sample has any edges"):
        BudgetBatchSampler([0, 0], 12, 0, 1, unit="edges")
    with pytest.raises(ValueError, match="budget must be at least 1, found 0"):
        BudgetBatchSampler([1], 0, 0, 1)
    with pytest.raises(ValueError, match="rank must be in 0 … 1"):
        EvaluationBudgetSampler([1], 1, 2, 2)
    for sizes in ([], [1.5], [-1, 2], [[1]]):
        with pytest.raises(ValueError, match="sizes must be whole numbers, at least 0, one for each sample"):
            BudgetBatchSampler(sizes, 5, 0, 1)


def test_a_position_in_other_batches_is_refused():
    def sampler(sizes=(4, 3, 2, 4), budget=8, seed=0, unit="atoms") -> BudgetBatchSampler:
        return BudgetBatchSampler(sizes, budget, 0, 1, seed, unit)

    state = sampler().state_dict(1)
    sampler().load_state_dict(state)
    fixed = TrainingBatchSampler(4, 2, 0, 1)
    for other in (sampler(budget=9), sampler((4, 3, 4, 2)), sampler(seed=1), sampler(unit="edges"), fixed):
        with pytest.raises(ValueError, match="cannot continue in the middle of an epoch"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"'max_atoms': None.*this run has.*'max_atoms': 8"):
        sampler().load_state_dict(fixed.state_dict(1))


def test_a_position_in_batches_of_an_older_version_is_refused():
    sampler = BudgetBatchSampler([4, 3, 2, 4], 8, 0, 1)
    state = {name: value for name, value in sampler.state_dict(1).items() if name != "dealt"}
    with pytest.raises(ValueError, match=r"'dealt': None.*'dealt': 'in rounds'.*a checkpoint at the end of an epoch"):
        sampler.load_state_dict(state)


def test_the_order_is_that_of_older_checkpoints():
    found = []
    for epoch in (0, 1):
        sampler = BudgetBatchSampler([4, 3, 3, 2, 2, 2, 1, 1, 5, 6], 11, 0, 1, seed=3)
        sampler.set_epoch(epoch)
        found.append([batch.tolist() for batch in sampler.global_batches()])
    assert found == [[[0, 1, 3], [9, 7, 5], [6, 2, 4, 8]], [[1, 0, 7, 3], [2, 5, 9], [4, 8, 6]]]


# ---- the next epoch's plan


@pytest.mark.parametrize("by_budget", [True, False])
def test_the_next_epoch_is_planned_while_this_one_runs(monkeypatch, by_budget):
    sizes = heavy_tail(300)

    def sampler() -> GlobalBatchSampler:
        budget = 3 * int(sizes.max())
        return BudgetBatchSampler(sizes, budget, 1, 2) if by_budget else TrainingBatchSampler(300, 8, 1, 2, sizes=sizes)

    def epochs(of: GlobalBatchSampler) -> list[list[list[int]]]:
        found = []
        for epoch in (0, 1, 5, 2):  # one that was not expected
            of.set_epoch(epoch)
            found.append(list(of))
        return found

    expected = epochs(sampler())
    planned = []
    monkeypatch.setattr(samplers, "_AHEAD_FROM", 300)
    watched = sampler()
    plan = watched.plan
    monkeypatch.setattr(
        watched, "plan", lambda epoch: planned.append((epoch, threading.current_thread())) or plan(epoch)
    )
    assert epochs(watched) == expected
    assert [epoch for epoch, _ in planned] == [0, 1, 2, 5, 6, 2, 3]
    threads = [thread for _, thread in planned if thread is not threading.main_thread()]
    assert [thread.name for thread in threads] == [f"plan of epoch {epoch}" for epoch in (1, 2, 6, 3)]
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    resumed = copy.deepcopy(sampler())
    resumed.load_state_dict(watched.state_dict(2) | {"epoch": 1})
    resumed.set_epoch(1)
    assert list(resumed) == expected[1][2:]


# ---- samplers of a fixed number of samples


def test_the_order_without_sizes_is_that_of_older_checkpoints():
    found = []
    for epoch in (0, 1):
        for rank in (0, 1):
            sampler = TrainingBatchSampler(10, 4, rank, 2, seed=3)
            sampler.set_epoch(epoch)
            found.append(list(sampler))
    assert found == [
        [[9, 0], [1, 7], [5, 8]],
        [[6, 2], [4], [3]],
        [[4, 2], [5, 7], [9, 3]],
        [[1, 8], [0], [6]],
    ]


def test_sizes_change_the_division_alone():
    sizes = heavy_tail(200)
    plain = TrainingBatchSampler(200, 24, 0, 1, seed=2)
    ranks = [TrainingBatchSampler(200, 24, rank, 3, seed=2, sizes=sizes) for rank in range(3)]
    for sampler in (plain, *ranks):
        sampler.load_state_dict(TrainingBatchSampler(200, 24, 0, 5, seed=2).state_dict(4))
    for parts, batch in zip(zip(*ranks, strict=True), plain, strict=True):
        assert all(parts)
        assert sorted(index for part in parts for index in part) == sorted(batch)
    with pytest.raises(ValueError, match="a size for each of 200 samples, found 3"):
        TrainingBatchSampler(200, 24, 0, 3, sizes=[1, 2, 3])


def idle_share(sizes: np.ndarray, steps: list[list[list[int]]]) -> float:
    """Part of the ranks' time in which they wait for the one with most to do."""
    shares = np.array([[sizes[part].sum() for part in parts] for parts in steps])
    return 1 - shares.mean(axis=1).sum() / shares.max(axis=1).sum()


def real_modules(directory: Path) -> dict[str, AtomsDataModule]:
    modules: dict[str, AtomsDataModule] = {
        "alloy": EmbeddedAlloyDataModule(num_frames=200, cache_dir=directory, split={}, cutoff=4.0, batch_size=1)
    }
    mixed = SHARED / "ethanol_methanol" / "train_eth_meth.xyz"
    if mixed.exists():
        modules["molecules"] = AtomsDataModule(mixed, cutoff=4.0, batch_size=1)
    return modules


@pytest.mark.parametrize("unit", ["atoms", "edges"])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_ranks_wait_less_than_with_frames_dealt_in_turn(tmp_path, num_ranks, unit):
    for name, module in real_modules(tmp_path).items():
        module.setup()
        sizes = getattr(module.train_set, f"num_{unit}")()
        batch_size = 6 * num_ranks
        budget = int(1.03 * batch_size * sizes.mean())

        def steps(kind, *arguments, **options):
            return list(zip(*(kind(*arguments, rank, num_ranks, **options) for rank in range(num_ranks)), strict=True))

        in_turn = idle_share(sizes, steps(TrainingBatchSampler, len(sizes), batch_size))
        balanced = idle_share(sizes, steps(TrainingBatchSampler, len(sizes), batch_size, sizes=sizes))
        by_budget = idle_share(sizes, steps(BudgetBatchSampler, sizes, budget))
        assert balanced < 0.75 * in_turn, name
        assert by_budget < 0.75 * in_turn, name


# ---- evaluation


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 120), st.integers(1, 6))
def test_evaluation_neither_pads_nor_drops(sizes, budget, num_ranks):
    drawn = []
    for rank in range(num_ranks):
        sampler = EvaluationBudgetSampler(sizes, budget, rank, num_ranks)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert [index for batch in batches for index in batch] == list(range(rank, len(sizes), num_ranks))
        for batch in batches:
            assert len(batch) == 1 or sum(sizes[index] for index in batch) <= budget / num_ranks
        drawn += batches
    assert all(drawn)


# ---- loader and data module


class Numbers(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index])


def test_the_loader_continues_after_what_the_consumer_was_given():
    sizes = heavy_tail(40)
    budget = 3 * int(sizes.max())

    def loader(rank: int, num_ranks: int) -> ResumableDataLoader:
        return ResumableDataLoader(Numbers(), BudgetBatchSampler(sizes, budget, rank, num_ranks))

    first = loader(0, 1)
    batches = iter(first)
    seen = [next(batches) for _ in range(2)]
    rest = [loader(rank, 2) for rank in (0, 1)]
    for each in rest:
        each.load_state_dict(first.state_dict())
        seen += list(each)
    assert sorted(torch.cat(seen).flatten().tolist()) == list(range(40))
    assert len(seen) == 2 + 2 * (len(first) - 2)


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory) -> Path:
    """Water, ethanol, and one cell of 32 atoms."""
    frames = [molecule(name) for name in ["H2O"] * 12 + ["CH3CH2OH"] * 8] + [bulk("Cu", cubic=True) * (2, 2, 2)]
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    path = tmp_path_factory.mktemp("data") / "mixed.xyz"
    ase.io.write(path, frames, format="extxyz")
    return path


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("unit", ["atoms", "edges"])
def test_the_module_makes_batches_by_a_budget(mixed_file, unit, cache):
    largest = {"atoms": 32, "edges": 32 * 12}[unit]
    options = {f"max_{unit}": 2 * largest}
    module = AtomsDataModule(mixed_file, val=mixed_file, cutoff=3.0, cache_neighbors=cache, **options)
    field = {"atoms": "pos", "edges": "edge_index"}[unit]
    for loader in (module.train_dataloader(), *module.val_dataloader()):
        batches = list(loader)
        assert sorted(torch.cat([batch["frame_index"] for batch in batches]).tolist()) == list(range(21))
        sizes = [batch[field].shape[-1 if unit == "edges" else 0] for batch in batches]
        assert len(sizes) > 1
        assert max(sizes) <= 2 * largest
    counts = module.train_set.num_edges()
    assert counts.tolist() == [module.train_set[index]["edge_index"].shape[1] for index in range(21)]
    assert module.train_set.num_edges() is counts
    assert (module.train_set[0] is module.train_set[0]) == cache


def test_the_module_balances_batches_of_a_fixed_number(mixed_file, monkeypatch):
    def frames(rank: int, num_ranks: int, **options) -> list[list[int]]:
        monkeypatch.setattr(set_loaders, "data_parallel_ranks", lambda trainer: (rank, num_ranks))
        module = AtomsDataModule(mixed_file, cutoff=3.0, batch_size=8, **options)
        return [batch["frame_index"].tolist() for batch in module.train_dataloader()]

    whole = frames(0, 1)
    for options in ({}, {"balance": "atoms"}, {"balance": "edges"}):
        parts = zip(frames(0, 2, **options), frames(1, 2, **options), strict=True)
        assert [sorted(one + other) for one, other in parts] == [sorted(batch) for batch in whole]
    assert frames(0, 2, balance="atoms") != frames(0, 2)


def test_errors_of_the_module(mixed_file, monkeypatch):
    def module(**options) -> AtomsDataModule:
        return AtomsDataModule(mixed_file, cutoff=3.0, **options)

    for options, found in (
        ({}, "none of them"),
        ({"batch_size": 4, "max_atoms": 50}, "batch_size=4, max_atoms=50"),
        ({"max_edges": 4, "max_atoms": 50}, "max_atoms=50, max_edges=4"),
    ):
        with pytest.raises(ValueError, match=f"exactly one of batch_size, max_atoms, max_edges must.*found {found}; "):
            module(**options)
    with pytest.raises(ValueError, match=r"max_atoms is a whole number, at least 1, found 2\.5"):
        module(max_atoms=2.5)
    with pytest.raises(ValueError, match="balance must be 'atoms', 'edges' or None, found 'bonds'"):
        module(batch_size=4, balance="bonds")
    with pytest.raises(ValueError, match="balance='atoms' is for batches of batch_size frames, found max_edges"):
        module(max_edges=4, balance="atoms")
    with pytest.raises(
        ValueError, match=r"1 of 21 samples.*31 atoms.*the largest, .*mixed.xyz, frame 20, has 32 atoms"
    ):
        module(max_atoms=31).train_dataloader()
    monkeypatch.setattr(set_loaders, "data_parallel_ranks", lambda trainer: (0, 8))
    with pytest.raises(ValueError, match=r"there are 8 ranks.*mixed.xyz, frame 20, has 32 atoms; .*256 atoms"):
        module(max_atoms=40).train_dataloader()


# ---- real ranks


def own_batches(rank: int, world_size: int, directory: str) -> list[list[int]]:
    module = EmbeddedAlloyDataModule(num_frames=30, cache_dir=directory, cutoff=3.5, max_edges=6000, max_atoms=None)
    return [batch["frame_index"].tolist() for batch in module.train_dataloader()]


def test_ranks_share_the_batches_of_one(tmp_path):
    embedded_alloy_file(30, cache_dir=tmp_path)
    ranks = spawn(2, own_batches, str(tmp_path))
    whole = own_batches(0, 1, str(tmp_path))
    assert len(whole) > 1
    for parts, batch in zip(zip(*ranks, strict=True), whole, strict=True):
        assert all(parts)
        assert sorted(parts[0] + parts[1]) == sorted(batch)


BY_BUDGET = (
    *TINY,
    "data.batch_size=null",
    "data.max_atoms=100",
    "data.eval_batch_size=null",
    "data.dtype=float64",
    "trainer.precision=64-true",
    "trainer.log_every_n_steps=1",
    "max_epochs=2",
    "test=false",
    "logger=csv",
    "lr_scheduler=none",
)
KEEP_STEPS = (
    "+callbacks.steps={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: steps, filename: '{step}', "
    "auto_insert_metric_name: false, every_n_train_steps: 1, save_top_k: -1}"
)


def values(folder: Path) -> dict[tuple[int, str], float]:
    """Every logged value by step and key."""
    return {
        (int(row["step"]), key): value
        for row in read_csv(folder)
        for key, value in row.items()
        if key.startswith(("train_loss", "val0"))
    }


@pytest.mark.slow
@pytest.mark.timeout(600)  # three trainings
def test_a_training_by_budget_on_two_ranks_and_its_continuation_on_one(tmp_path):
    together = train(*BY_BUDGET, KEEP_STEPS, "hydra.run.dir=two", ranks=2, folder=tmp_path)
    assert together.code == 0, together.err[-4000:]
    alone = train(*BY_BUDGET, "hydra.run.dir=one", folder=tmp_path)
    assert alone.code == 0, alone.err[-4000:]
    expected, found = values(tmp_path / "one"), values(tmp_path / "two")
    assert expected.keys() == found.keys()
    assert len(expected) > 50
    for key, value in expected.items():
        assert same(found[key], value, 1e-8), (key, found[key], value)

    num_steps = len(list((tmp_path / "steps").glob("*.ckpt")))
    done = num_steps // 2 + 2  # in the middle of the second epoch
    assert num_steps % 2 == 0
    assert done < num_steps
    checkpoint = tmp_path / "steps" / f"{done}.ckpt"
    resumed = train(*BY_BUDGET, f"ckpt_path={checkpoint}", "hydra.run.dir=rest", folder=tmp_path)
    assert resumed.code == 0, resumed.err[-4000:]
    rest = values(tmp_path / "rest")
    assert rest.keys() >= {key for key in expected if key[0] > done}
    for key, value in rest.items():
        # 1e-6: Lightning loads weights before it makes the model one of float64, and so rounds them to float32
        assert same(value, expected[key], 1e-6), (key, value, expected[key])
