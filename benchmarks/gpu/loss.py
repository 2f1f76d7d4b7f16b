"""The loss step of ``benchmarks/step.py`` on one device: beside the hand-packed minimum, compiled, as a CUDA graph."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Sizes, Timing, benchmark, counted_waits, listed, synchronize, time_round
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

step = benchmark("step")
TYPES = (1, 20, 89)


def num_kernels(run: Callable[[], Any], device: torch.device) -> int:
    """Kernels and copies of a step on a GPU; operators on a CPU."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        synchronize(device)
    if on_gpu:
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
    return sum(event.name.startswith("aten::") for event in profiler.events())


def steps(device: torch.device) -> str:
    """Table of the loss step at 1, 20 and 89 atom types."""
    sizes = Sizes.of(device)
    found: dict[tuple[int, str], tuple[Callable[[], Tensor], Timing]] = {}
    for num_types in TYPES:
        preds, target = step.make_batch(num_types, sizes.graphs, 32, 0, device)
        contestants = {
            "minimum": step.MinimumStep(num_types, device),
            "harness": step.harness_step(num_types, device),
        }
        for name, contestant in contestants.items():
            found[num_types, name] = partial(step.run_step, contestant, preds, target), Timing.empty()
        losses = {name: [found[num_types, name][0]() for _ in range(3)][-1].item() for name in contestants}
        if abs(losses["harness"] - losses["minimum"]) > 1e-5 * abs(losses["minimum"]):
            raise RuntimeError(f"not the same loss: {losses}")
    for _ in range(5 * sizes.rounds):
        for run, timing in found.values():
            time_round(run, timing, 5 * sizes.steps, device)
    what = "kernels" if device.type == "cuda" else "operators"
    lines = [
        f"The loss alone, forward and backward, of {sizes.graphs} structures of about 32 atoms, on one rank. `host`: "
        "the time in which the host is busy with a step; `step`: from one step to the next.",
        "",
        f"| types | | {what} | waits | host | step | / minimum |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    places = ""
    for (num_types, name), (run, timing) in found.items():
        with counted_waits(device) as waits:
            run()
        places += listed(waits)
        (host, whole), (_, least) = timing.medians, found[num_types, "minimum"][1].medians
        lines.append(
            f"| {num_types} | {name} | {num_kernels(run, device)} | {waits.total()} | {host * 1e6:.0f} µs | "
            f"{whole * 1e6:.0f} µs | {whole / least:.2f} |"
        )
    return "\n".join([*lines, *(["", f"Waits: {places}"] if places else [])])


def compiled(device: torch.device) -> str:
    """Table of the loss step at 89 types: as it is, by torch.compile, and replayed as a CUDA graph."""
    sizes, num_types = Sizes.of(device), TYPES[-1]
    preds, target = step.make_batch(num_types, sizes.graphs, 32, 0, device)
    eager = partial(step.run_step, step.harness_step(num_types, device), preds, target)
    expected = [eager() for _ in range(3)][-1].item()
    lines = ["| 89 types | host | step |", "| --- | --- | --- |"]
    errors = []
    for name, make in (("eager", lambda: eager), ("torch.compile", _compiled), ("CUDA graph", _graph)):
        try:
            run = make() if name == "eager" else make(step.harness_step(num_types, device), preds, target, device)
            loss = [run() for _ in range(3)][-1].item()
            if abs(loss - expected) > 1e-9 * abs(expected):
                raise RuntimeError(f"the loss is {loss}, expected {expected}")
            timing = Timing.empty()
            for _ in range(5 * sizes.rounds):
                time_round(run, timing, 5 * sizes.steps, device)
            host, whole = timing.medians
            lines.append(f"| {name} | {host * 1e6:.0f} µs | {whole * 1e6:.0f} µs |")
        except NotImplementedError as reason:
            lines.append(f"| {name} | {reason} | |")
        except Exception:
            lines.append(f"| {name} | failed, see below | |")
            errors.append(f"{name}:\n\n```text\n" + "\n".join(traceback.format_exc().splitlines()[-12:]) + "\n```")
    return "\n".join(lines) + "".join(f"\n\n{error}" for error in errors)


def _compiled(loss: Any, preds: Any, target: Any, device: torch.device) -> Callable[[], Tensor]:
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # which needs no C++ compiler
    return partial(step.run_step, torch.compile(loss, backend=backend), preds, target)


def _graph(loss: Any, preds: Any, target: Any, device: torch.device) -> Callable[[], Tensor]:
    if device.type != "cuda":
        raise NotImplementedError("GPUs only")
    run = partial(step.run_step, loss, preds, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first step makes is made outside of the graph
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
