"""A step with announced counts: its own part needs no other rank, and everything else is as if all had waited."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import oracle
from support.accumulation_cases import LOSS, TYPES, WATCHED
from support.oracle import Component
from support.spawning import close_all, spawn
from support.step_cost import counted_collectives

import harness
from harness.distributed import Merging, gradient_scale, merge_over_ranks
from harness.metrics import begin_step

GROUPS = ["bulk", "surface"]
SETS = ["crystals", "molecules"]


def frames(rank: int, step: int) -> tuple[oracle.Batch, oracle.Batch]:
    """Frames of a rank: the second has no carbon, and the last one none at all in its second step."""
    atoms = [[2, 5], [3], [1, 1, 4]][rank] if step != 1 or rank != 2 else []
    features, target = oracle.draw(10 * rank + step, atoms, (0, 2) if rank == 1 else (0, 1, 2), unlabelled=0.3)
    number = len(atoms)
    extra = {
        "weight": torch.arange(number, dtype=torch.float64) + 0.5 * rank,
        "forces_weight": torch.linspace(0, 2, number, dtype=torch.float64),
        "group_index": torch.arange(number) % 2,
        "set_index": (torch.arange(number) + rank) % 2,
    }
    return features, target | extra


def managers() -> list[harness.MetricsManager]:
    """A loss with everything that counts may depend on, and metrics that only watch."""
    entries = [component.entry(TYPES) for component in LOSS]
    entries[0]["weights"] = "in_sums"
    entries[3]["per_group"] = True
    entries[4]["per_set"] = True
    entries[6] |= {"per_set_coeffs": {"crystals": 1.0, "molecules": 2.0}}
    names = {"group_names": GROUPS, "set_names": SETS}
    loss = harness.MetricsManager(entries, TYPES, **names)
    watched = harness.MetricsManager([component.entry(TYPES) for component in WATCHED], TYPES, **names)
    for manager in (loss, watched):
        manager.keep_by_group()
    return [loss, watched]


def steps_on_rank(rank: int, world_size: int, announced: bool) -> tuple[list[Any], list[Any], list[Any]]:
    """Gradient (averaged), values of three steps, values and state of the epoch; numbers in hexadecimal."""
    both, gradients, seen = managers(), [], []
    for step in range(3):
        features, target = frames(rank, step)
        window = both[0].window([target] if announced else None)
        theta = oracle.parameters()
        running = begin_step(*both, preds=oracle.predict(features, theta), target=target, window=window)
        (running.own.weighted_sum * gradient_scale()).backward()
        running.release()
        if world_size > 1:
            dist.all_reduce(theta.grad)
        gradients.append([number.hex() for number in (theta.grad / world_size).tolist()])
        if step != 1:  # nobody reads those of the second
            seen.append([{name: x.hex() for name, x in each.to_host().items()} for each in running.values()])
    state = [manager.get_extra_state()["additive"].tolist() for manager in both]
    epoch = [{name: x.hex() for name, x in each.to_host().items()} for each in harness.compute_together(both)]
    return gradients, seen, [epoch, state]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_and_gradients_are_those_of_a_step_that_waits(world_size: int) -> None:
    """Bitwise: frames are weighted, types, groups and sets told apart, labels missing, one rank without frames."""
    announced, waited = (spawn(world_size, steps_on_rank, each) for each in (True, False))
    for mine, other in zip(announced, waited, strict=True):
        assert mine[1:] == other[1:]
        assert mine[1:] == announced[0][1:]
        for left, right in zip(mine[0], other[0], strict=True):
            found, expected = ([float.fromhex(number) for number in each] for each in (left, right))
            # weights of frames add up to counts in another order
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-14, atol=1e-15)


def gradients_on_rank(rank: int, world_size: int, components: list[Component]) -> list[Any]:
    parts = [oracle.draw(7 + each, [2, 3, 1][: each + 1], unlabelled=0.3) for each in range(world_size)]
    features, target = parts[rank]
    loss, theta = oracle.manager(components, TYPES), oracle.parameters()
    window = loss.window([target] if loss.announces(target) else None)
    running = begin_step(loss, preds=oracle.predict(features, theta), target=target, window=window)
    (running.own.weighted_sum * gradient_scale()).backward()
    dist.all_reduce(theta.grad)
    whole = [oracle.join([part[side] for part in parts]) for side in (0, 1)]
    torch.testing.assert_close(
        theta.grad / world_size, torch.tensor(oracle.gradient(components, *whole, TYPES)), rtol=1e-10, atol=1e-12
    )
    right = oracle.values(components, oracle.predict(whole[0], oracle.parameters()), whole[1], TYPES)
    torch.testing.assert_close(
        torch.tensor(list(running.value().to_host().values())),
        torch.tensor([right[name] for name in loss.value_names]),
        rtol=1e-10,
        atol=1e-12,
        equal_nan=True,
    )
    return [window.is_announced]


ROOT = [*LOSS, Component("forces", "rmse", 1.0, ignore_nan=True)]
MAXIMUM = [*LOSS, Component("stress", "max", 1.0, ignore_nan=True)]


@pytest.mark.parametrize(("components", "announced"), [(LOSS, True), (ROOT, False), (MAXIMUM, False)])
def test_gradients_and_values_are_those_of_the_oracle(components: list[Component], announced: bool) -> None:
    """Also of a loss that is not linear, which is merged before its backward pass."""
    assert spawn(3, gradients_on_rank, components) == [[announced]] * 3


def late_in_its_forward_pass(rank: int, world_size: int, folder: Path) -> str:
    """Rank 1 makes its predictions only when rank 0 has been through its backward pass."""
    loss, watched = oracle.manager(LOSS, TYPES), oracle.manager(WATCHED, TYPES)
    features, target = oracle.draw(rank, [2, 3], unlabelled=0.3)
    theta, weighted_sum = oracle.parameters(), ""
    for step in range(3):
        done = folder / f"backward{step}"
        window = loss.window([target])
        if rank == 1 and step:  # the first step compares the elements with those announced, and waits
            deadline = time.monotonic() + 15
            while not done.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError("rank 0 waits for the sums of rank 1 before its backward pass")
                time.sleep(0.01)
        running = begin_step(loss, watched, preds=oracle.predict(features, theta), target=target, window=window)
        (running.own.weighted_sum * gradient_scale()).backward()
        if rank == 0:
            done.touch()
        weighted_sum = running.value().to_host()["weighted_sum"].hex()
    return weighted_sum


def test_a_backward_pass_waits_for_no_other_forward_pass(tmp_path: Path) -> None:
    first, second = spawn(2, late_in_its_forward_pass, tmp_path)
    assert first == second


def order_on_rank(rank: int, world_size: int) -> list[str]:
    """Collectives begun and waited for in a step, and its two passes, in their order."""
    seen: list[str] = []
    begun = dist.all_reduce

    class Watched:
        def __init__(self, work: Any, name: str) -> None:
            self.work, self.name = work, name

        def wait(self) -> None:
            seen.append(f"wait for the {self.name}")
            self.work.wait()

    def all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        name = "counts" if tensor.numel() == num_slots else "row"
        if not options.get("async_op"):
            seen.append(f"wait for the {name}")
            return begun(tensor, *args, **options)
        seen.append(f"send the {name}")
        return Watched(begun(tensor, *args, **options), name)

    loss = oracle.manager(LOSS, TYPES)
    features, target = oracle.draw(rank, [2, 3], unlabelled=0.3)
    num_slots = loss.count(target).numel()
    patch = pytest.MonkeyPatch()
    for _ in range(2):  # the first step compares the elements with those announced, and waits
        patch.setattr(dist, "all_reduce", all_reduce)
        seen.clear()
        window = loss.window([target] if loss.announces(target) else None)
        seen.append("forward")
        preds = oracle.predict(features, oracle.parameters())
        running = begin_step(loss, preds=preds, target=target, window=window)
        seen.append("backward")
        running.own.weighted_sum.backward()
        seen.append("read")
        running.values()
        patch.undo()
    return seen


def test_counts_travel_during_the_forward_pass_and_sums_during_the_backward_pass() -> None:
    order = [
        "send the counts",
        "forward",
        "send the row",
        "wait for the counts",
        "backward",
        "read",
        "wait for the row",
    ]
    assert spawn(2, order_on_rank) == [order, order]


def reads_on_rank(rank: int, world_size: int) -> list[Any]:
    """States of an epoch with steps on their way, by whatever reads it first."""
    results = []
    for read in ("state", "so far", "undo", "compute", "last step", "reset"):
        loss, watched = oracle.manager(LOSS, TYPES), oracle.manager(WATCHED, TYPES)
        for step in range(3):
            features, target = oracle.draw(10 * rank + step, [2, 3], unlabelled=0.3)
            window = loss.window([target])
            preds = oracle.predict(features, oracle.parameters())
            begin_step(loss, watched, preds=preds, target=target, window=window)
        with counted_collectives() as counted:
            if read == "state":
                found = watched.get_extra_state()["additive"].tolist()
            elif read == "so far":
                found = loss.so_far().to_host() if rank == 0 else {}  # by one rank alone
                loss.reset()
            elif read == "undo":
                loss.undo_step()
                found = loss.so_far().counts.tolist()
            elif read == "last step":
                found = watched.metrics_values_step
            elif read == "reset":
                loss.reset()
                found = loss.epoch_row.is_empty
        if read == "compute":
            found = {name: value.item() for name, value in loss.compute().items()}
        assert not counted
        results.append(found)
    return results


def test_whatever_reads_an_epoch_has_the_steps_on_their_way() -> None:
    first, second = spawn(2, reads_on_rank)
    everything = [oracle.draw(10 * rank + step, [2, 3], unlabelled=0.3) for step in range(3) for rank in range(2)]
    features, target = (oracle.join([part[side] for part in everything]) for side in (0, 1))
    right = oracle.values(LOSS, oracle.predict(features, oracle.parameters()), target, TYPES)
    for found in (first[1], first[3], second[3]):
        torch.testing.assert_close([found[name] for name in right], list(right.values()), equal_nan=True)
    loss = oracle.manager(LOSS, TYPES)
    two = [loss.measure(target, target) for _, target in everything[:4]]
    assert first[2] == second[2] == sum(loss.layout.counts(row) for row in two).tolist()
    assert first[0] == second[0]
    assert first[4] == second[4]
    assert first[5]
    assert second[5]


def fails_on_one_rank(rank: int, world_size: int) -> str:
    """Rank 1 ends between its counts and its row; returns what rank 0 hears of it."""
    loss = oracle.manager(LOSS, TYPES)
    features, target = oracle.draw(rank, [2, 3], unlabelled=0.3)
    window = loss.window([target])
    if rank == 1:
        time.sleep(0.5)  # the counts of all ranks have come
        dist.destroy_process_group()
        return ""
    loss.checked_window = True  # the first step would wait for the row at once
    theta = oracle.parameters()
    running = begin_step(loss, preds=oracle.predict(features, theta), target=target, window=window)
    running.own.weighted_sum.backward()
    heard, start = [], time.monotonic()
    for read in (lambda: running.value(), lambda: loss.so_far(), lambda: loss.window([target])):
        with pytest.raises(RuntimeError) as failed:
            read()
        assert "_await_merge" in [entry.name for entry in failed.traceback]  # by which a job knows what it waited for
        heard.append(str(failed.value))
    assert time.monotonic() - start < 20  # and not the time limit of collectives
    return heard[0]


def test_a_rank_that_fails_between_its_counts_and_its_row() -> None:
    """The backward pass of the other goes through; whatever reads its sums is told, and nothing waits for ever."""
    try:
        first, _ = spawn(2, fails_on_one_rank)
    finally:
        close_all()  # one of the ranks has left its group
    assert "closed by peer" in first or "Connection" in first


def observed_gradients(rank: int, world_size: int) -> list[list[float]]:
    """Gradients of components and of the sum, of values that something has read without a graph before."""
    loss = oracle.manager(LOSS, TYPES)
    features, target = oracle.draw(rank, [2, 3], unlabelled=0.3)
    window = loss.window([target] if world_size > 1 else None)
    theta = oracle.parameters()
    running = begin_step(loss, preds=oracle.predict(features, theta), target=target, window=window)
    found = []
    for values in (running.own, running.value()):
        with torch.no_grad():
            values.to_host()
        for value in (values.reported[values.weighted[0]], values.weighted_sum):
            found += torch.autograd.grad(value, theta, retain_graph=True)
    return [gradient.tolist() for gradient in found]


@pytest.mark.parametrize("world_size", [1, 2])
def test_values_that_are_read_without_a_graph_keep_theirs(world_size: int) -> None:
    for of_part, part, of_whole, whole in spawn(world_size, observed_gradients):
        assert of_part == of_whole
        assert part == whole
        assert any(part)
        assert any(of_part)


def announced_on_rank(rank: int, world_size: int, lacking: str | None) -> bool:
    loss = oracle.manager(LOSS, TYPES)
    _, target = oracle.draw(rank, [2, 3])
    if rank == 1:
        target = {name: value for name, value in target.items() if name != lacking}
    return loss.announces(target)


@pytest.mark.parametrize("lacking", [None, "atom_types", "stress", "num_atoms"])
def test_all_ranks_announce_counts_or_none(lacking: str | None) -> None:
    """A field that counts depend on, and that one rank's labels lack, as where it comes with the predictions."""
    assert spawn(2, announced_on_rank, lacking) == [lacking is None] * 2


def test_one_rank_has_nothing_to_announce() -> None:
    assert not oracle.manager(LOSS, TYPES).announces(oracle.draw(0, [2, 3])[1])


def merged_on_rank(rank: int, world_size: int) -> list[Any]:
    random = torch.Generator().manual_seed(rank)
    additive = torch.randn(7, generator=random, dtype=torch.float64)
    maxima = torch.randn(5, generator=random, dtype=torch.float64)
    maxima[0] = -torch.inf
    maxima[1] = torch.inf if rank else 0.0
    maxima[2] = torch.nan
    maxima[3] = torch.nan if rank == 1 else torch.inf
    merging = Merging(additive, maxima)
    expected = merge_over_ranks(additive, maxima)
    return [[repr(each.tolist()) for each in pair] for pair in (merging.wait(), expected)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_merge_under_way_is_the_merge(world_size: int) -> None:
    results = spawn(world_size, merged_on_rank)
    for found, expected in results:
        assert found == expected == results[0][0]
        assert "nan, " in found[1]
