"""A training step beside a bare loop: the managers in that loop, ``ForceFieldModule``, and the default callbacks."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Batch,
    Sizes,
    Timing,
    alloy,
    counted_waits,
    listed,
    make_model,
    memory,
    on_device,
    reset_memory,
    synchronize,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from harness import EnergyForceLoss, EnergyForceMetrics, ForceFieldModule, step_together
from harness.callbacks import NonFiniteGuard, ResumeCheckpoint, ThroughputMonitor, UsedLearningRates

LOGGED = 10
"""Steps in which waits are counted: one of them is logged."""
BARE = "bare loop"


class Batches:
    """The same batches again and again, as a data loader of a trainer."""

    def __init__(self, batches: list[Batch], number: int) -> None:
        self.batches, self.number = batches, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.number):
            yield dict(self.batches[number % len(self.batches)])


@dataclass
class Seen:
    """Times, memory, waits and first loss of a contestant."""

    timing: Timing = field(default_factory=Timing.empty)
    memory: str = ""
    waits: Counter[str] = field(default_factory=Counter)
    loss: float = float("nan")


class Watch:
    """Looks at the steps of a round: warm-up, timed steps, and those whose waits are counted.

    Args:
        seen: what is found goes there.
        device: of the training.
    """

    def __init__(self, seen: Seen, device: torch.device) -> None:
        import time

        self.clock, self.seen, self.device, self.sizes = time.perf_counter, seen, device, Sizes.of(device)
        self.stack, self.start = ExitStack(), 0.0

    @property
    def num_steps(self) -> int:
        """Steps of a round."""
        return self.sizes.warm_up + self.sizes.steps + LOGGED

    def before(self, number: int) -> None:
        """Called before a step."""
        if number == 0:
            reset_memory(self.device)
        if number == self.sizes.warm_up:
            synchronize(self.device)
            self.start = self.clock()
        if number == self.sizes.warm_up + self.sizes.steps:
            self.seen.timing.host.append((self.clock() - self.start) / self.sizes.steps)
            synchronize(self.device)
            self.seen.timing.whole.append((self.clock() - self.start) / self.sizes.steps)
            self.seen.waits = self.stack.enter_context(counted_waits(self.device))

    def after(self, number: int, loss: Tensor | None = None) -> None:
        """Called behind a step."""
        if number == 0 and loss is not None:
            self.seen.loss = float(loss)
        if number == self.num_steps - 1:
            self.stack.close()
            self.seen.memory = memory(self.device)


class WatchSteps(Callback):
    """:class:`Watch` in a trainer."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before a step, behind the transfer of its batch."""
        self.watch.before(batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Behind a step."""
        self.watch.after(batch_idx, outputs["loss"])


def bare_loss(predictions: Batch, batch: Batch) -> Tensor:
    """The loss of the others written out: mean squared errors of the energy per atom and of the forces, half each."""
    num_atoms = batch["num_atoms"].unsqueeze(-1)
    energy = ((predictions["total_energy"] - batch["total_energy"]) / num_atoms).square().mean()
    return 0.5 * energy + 0.5 * (predictions["forces"] - batch["forces"]).square().mean().double()


def loop(make: Any, batches: list[Batch], seen: Seen, device: torch.device, with_managers: bool) -> None:
    """A round of a loop by hand, with the loss written out or by the managers."""
    model: nn.Module = make()
    optimizer, watch = torch.optim.Adam(model.parameters(), lr=1e-3), Watch(seen, device)
    managers = [EnergyForceLoss(), EnergyForceMetrics()]
    for number, batch in enumerate(Batches(batches, watch.num_steps)):
        moved = on_device(batch, device)
        watch.before(number)
        predictions = model(moved)
        if with_managers:
            values = step_together(*managers, preds=predictions, target=moved)
            loss = values[0].weighted_sum
        else:
            loss = bare_loss(predictions, moved)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.after(number, loss)


def lightning(
    make: Any, batches: list[Batch], seen: Seen, device: torch.device, everything: bool, type_names: list[str]
) -> None:
    """A round of Lightning's loop, with the module alone or with the default callbacks, which log every tenth step."""
    watch = Watch(seen, device)
    module = ForceFieldModule(
        make(), EnergyForceLoss, train_metrics=EnergyForceMetrics, optimizer=partial(torch.optim.Adam, lr=1e-3),
        type_names=type_names,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        callbacks = [
            NonFiniteGuard(output_dir=folder),
            ResumeCheckpoint(folder),
            UsedLearningRates(),
            ThroughputMonitor(),
        ]
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=CSVLogger(folder) if everything else False,
            callbacks=[*(callbacks if everything else []), WatchSteps(watch)],
            log_every_n_steps=LOGGED if everything else 10**9,
            enable_checkpointing=everything,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,
            default_root_dir=folder,
        )
        trainer.fit(module, Batches(batches, watch.num_steps))


def table(model: str, device: torch.device) -> str:
    """Table of the training step of a model."""
    data, batches = alloy(device)
    make = partial(make_model, model, data, device)
    number = sum(parameter.numel() for parameter in make().parameters())
    atoms, edges = len(batches[0]["pos"]), batches[0]["edge_index"].shape[1]
    names = list(data.type_names)
    contestants = {
        BARE: partial(loop, with_managers=False),
        "managers in it": partial(loop, with_managers=True),
        "module": partial(lightning, everything=False, type_names=names),
        "module, default callbacks": partial(lightning, everything=True, type_names=names),
    }
    seen = {name: Seen() for name in contestants}
    for _ in range(Sizes.of(device).rounds):
        for name, run in contestants.items():
            run(make, batches, seen[name], device)
    losses = {name: each.loss for name, each in seen.items()}
    if any(abs(loss - losses[BARE]) > 1e-4 * abs(losses[BARE]) for loss in losses.values()):
        raise RuntimeError(f"not the same loss in the first step: {losses}")
    lines = [
        f"{number} parameters; {Sizes.of(device).graphs} structures, {atoms} atoms and {edges} edges a step, float32, "
        f"Adam; energies, forces and stress are predicted. Waits are those of {LOGGED} steps, of which the last row "
        "logs one.",
        "",
        "| | host | step | / bare loop | memory (GiB) | waits |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in seen.items():
        (host, whole), (_, bare) = each.timing.medians, seen[BARE].timing.medians
        waits = str(each.waits.total()) if device.type == "cuda" else ""
        lines.append(
            f"| {name} | {host * 1e3:.2f} ms | {whole * 1e3:.2f} ms | {whole / bare:.3f} | {each.memory} | {waits} |"
        )
    places = [f"- {name}: {listed(each.waits)}" for name, each in seen.items() if each.waits]
    return "\n".join([*lines, *(["", "Places of the waits:", "", *places] if places else [])])
