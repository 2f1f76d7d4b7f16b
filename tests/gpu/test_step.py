"""A loss step on a GPU, and as far as it shows anything on a CPU: no wait, the same numbers, graphs, compilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accumulation_cases import TYPES
from support.devices import DEVICES, moved, nothing_is_waited_for
from support.many_measures import everything, frames
from support.step_cost import Operators
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from harness.support.device import DelayedScalar, SentNumbers, to_device

ATOMS = [2, 3, 1, 4, 2, 3, 1, 2]


def step(managers: list[harness.MetricsManager], preds: Any, target: Any, **options: Any) -> tuple[Any, ...]:
    values = harness.step_together(*managers, preds=preds, target=target, **options)
    values[0].weighted_sum.backward()
    return values


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_everything_waits_for_nothing_and_is_right(device: str) -> None:
    managers, expected = everything(), everything()
    for seed in range(3):  # the first looks at types, weights and indices
        preds, target = frames(seed, ATOMS)
        on_device, labels = moved(preds, device), moved(target, device)
        if seed == 0:
            values = step(managers, on_device, labels)
        else:
            with nothing_is_waited_for(device):
                values = step(managers, on_device, labels)
        for found, right in zip(values, step(expected, preds, target), strict=True):
            found, right = found.to_host(), right.to_host()
            assert found == pytest.approx(right, rel=1e-12, abs=1e-12, nan_ok=True)
        torch.testing.assert_close(on_device["forces"].grad.cpu(), preds["forces"].grad, rtol=1e-12, atol=1e-14)
    for found, right in zip(*map(harness.compute_together, (managers, expected)), strict=True):
        assert found.to_host() == pytest.approx(right.to_host(), rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_micro_batches_and_of_evaluation_wait_for_nothing(device: str) -> None:
    names = list(TYPES)
    missing = {"total_energy": True, "forces": True}
    loss = harness.EnergyForceLoss(
        per_type_forces_coeffs=dict.fromkeys(names, 1.0), type_names=names, ignore_nan=missing
    )
    loss.check_accumulation()
    batches = [tuple(moved(part, device) for part in frames(seed, ATOMS)) for seed in range(4)]
    for first in (True, False):
        window = loss.window([target for _, target in batches[:2]])
        for preds, target in batches[:2]:
            if first:  # its end compares what came with what was announced
                step([loss], preds, target, window=window)
            else:
                with nothing_is_waited_for(device):
                    step([loss], preds, target, window=window)
    with torch.no_grad(), nothing_is_waited_for(device):
        for preds, target in batches[2:]:
            loss({name: value.detach() for name, value in preds.items()}, target)
    assert loss.compute()["weighted_sum"].isfinite()


class Copies(TorchDispatchMode):
    """Copies between the host and another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[name == "aten::copy_"]
            if source.device.type != result.device.type:
                self.found.append(f"{name}: {source.device.type} → {result.device.type}")
        return result


def test_the_counters_see_copies() -> None:
    there = torch.zeros(2, device="meta")
    with Copies() as copies:
        torch.zeros(2).to("meta")
        there.copy_(torch.ones(2))
        torch.where(there > 0, there, 1.0)  # the number is a kernel's
    assert copies.found == ["aten::_to_copy: cpu → meta", "aten::copy_: cpu → meta"]
    with Operators() as operators:
        torch.tensor([True])
        torch.arange(2).repeat_interleave(torch.tensor([1, 2]), output_size=3)
    assert operators.names["aten::lift_fresh"] == 2
    assert operators.waits == []
    with Operators() as operators:
        torch.arange(2).repeat_interleave(torch.tensor([1, 2]))
    assert operators.waits == ["aten::repeat_interleave"]


def test_a_step_makes_no_tensor_of_numbers_of_the_host() -> None:
    """Which would have to be copied to the device in every step."""
    managers = everything()
    for first in (True, False):
        preds, target = frames(0, ATOMS)
        with Operators() as operators:
            step(managers, preds, target)
        assert first or operators.names["aten::lift_fresh"] == 0


def test_a_step_looks_at_no_number_of_the_device_and_copies_none() -> None:
    """On the meta device, which has shapes and no numbers: whatever asks for one is an error there."""
    managers = everything()
    preds, target = frames(0, ATOMS)
    step(managers, preds, target)  # the first looks at types, weights and indices
    for manager in managers:
        manager.reset()
    predicted, there = moved(preds, "meta"), moved(target, "meta")
    step(managers, predicted, there)  # constants are copied once
    with Copies() as copies:
        values = step(managers, predicted, there)
    assert copies.found == []
    assert {each.reported.device.type for each in values} == {"meta"}
    assert predicted["forces"].grad.shape == target["forces"].shape


@pytest.mark.parametrize("device", DEVICES)
def test_losses_are_not_rounded_under_autocast(device: str) -> None:
    preds, target = (moved(part, device) for part in frames(0, ATOMS))
    plain = step(everything(), preds, target)
    with torch.autocast(device, torch.bfloat16):
        values = harness.step_together(*everything(), preds=preds, target=target)
    for found, right in zip(values, plain, strict=True):
        assert found.reported.dtype == torch.float64
        assert found.to_host() == pytest.approx(right.to_host(), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_travel_without_a_wait(device: str) -> None:
    to_device([0.0], torch.device(device))  # the first makes the context
    number, late = torch.arange(3, dtype=torch.float64, device=device), DelayedScalar()
    with nothing_is_waited_for(device):
        sent = to_device([1.0, 2.0], torch.device(device))
        copy = SentNumbers(number)
        late.send(number[1:2] * 5)
        late.send(number[2:3] * 5)
    assert sent.dtype == torch.float64
    assert sent.tolist() == [1.0, 2.0]
    assert copy.read() == [0.0, 1.0, 2.0]
    assert late.is_delayed == copy.is_late == (device == "cuda")
    assert late.read() == (5.0 if late.is_delayed else 10.0)
    assert late.wait() == 10.0


@pytest.mark.gpu
def test_a_loss_step_in_a_cuda_graph() -> None:
    manager, eager = (everything()[0] for _ in range(2))
    preds, target = (moved(part, "cuda") for part in frames(0, ATOMS))

    def run(loss: harness.MetricsManager) -> Tensor:
        for value in preds.values():
            value.grad = None
        (values,) = step([loss], preds, target)
        return values.weighted_sum.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(manager)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run(manager)
    gradient = preds["forces"].grad
    with torch.no_grad():
        preds["forces"] += 0.25
    graph.replay()
    torch.cuda.synchronize()
    found, slope = loss.item(), gradient.clone()
    assert found == pytest.approx(run(eager).item(), rel=1e-12)
    torch.testing.assert_close(slope, preds["forces"].grad, rtol=1e-12, atol=1e-14)


@pytest.mark.gpu
def test_a_loss_step_compiles_on_a_gpu() -> None:
    """Its twin on the CPU is in tests/metrics/test_manager_gradients.py."""
    names = list(TYPES)
    missing = {"total_energy": True, "forces": True}
    loss = harness.EnergyForceLoss(
        per_type_forces_coeffs=dict.fromkeys(names, 1.0), type_names=names, ignore_nan=missing
    )
    preds, target = (moved(part, "cuda") for part in frames(0, ATOMS))

    def value(predictions: Any) -> Tensor:
        return loss.evaluate(loss.measure(predictions, target)).weighted_sum

    expected = value(preds)
    torch.testing.assert_close(torch.compile(value)(preds), expected, rtol=1e-10, atol=0)
