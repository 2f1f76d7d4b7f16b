"""Throughput of a training: structures, atoms and edges a second, and time spent waiting for data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from harness.distributed import any_over_ranks, max_over_ranks, rank_in_group
from harness.fields import NUM_ATOMS, Batch
from harness.module import ForceFieldModule, is_nth_step_done, log_to_all
from harness.support.checks import whole_number
from harness.support.lightning_private import unwatch_fetches, watch_fetches

__all__ = ["CountsWork", "ThroughputMonitor"]

_OF_ANY_RANK = ("data_wait_share", "gpu_memory_GiB")
"""Values of which the largest of all ranks is logged."""
_WORK = ("structures", "atoms", "edges")


@runtime_checkable
class CountsWork(Protocol):
    """A module that counts its work by itself; that of :class:`~harness.module.ForceFieldModule` is counted here."""

    def read_work(self) -> dict[str, float]:
        """Number of ``structures``, ``atoms`` and ``edges`` over all ranks since the training started.

        May make the host wait for the device; no collective, since rank 0 alone calls it.
        """


class ThroughputMonitor(Callback):
    """Logs rates of the training since the last logged step.

    - ``throughput/structures_per_second``, ``…/atoms_per_second``, ``…/edges_per_second``: over all ranks, of
      :class:`~harness.module.ForceFieldModule` and of modules with :meth:`CountsWork.read_work`.
    - ``throughput/step_seconds``: mean time of an optimizer step.
    - ``throughput/data_wait_share``: part of the time in which the data loader was waited for, of the rank that waited
      most. More than a few hundredths call for more ``num_workers``.
    - ``throughput/gpu_memory_GiB``: most memory that has been allocated on a GPU, of the rank with most.

    Validation does not count as time of the training; checkpoints do. The first step, in which kernels are compiled and
    memory is found, is left out. At the steps that are logged, the host waits for the device, and ranks share two
    numbers in one all-reduce; at the others nothing is sent. Every rank has the callback, loggers or none.

    Args:
        every_n_steps: optimizer steps between logged ones; the trainer's ``log_every_n_steps`` if not given.

    Raises:
        ValueError: a number of steps that is none.
    """

    num_step_sums = len(_WORK)

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            whole_number("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self._logs = False  # on all ranks alike
        self._before: _Reading | None = None  # at the step that was logged last
        self._step = 0
        self._waiting = _Stopwatch()
        self._validating = _Stopwatch()
        self._batch_ended = 0.0
        self._work: Tensor | None = None  # structures, atoms and edges of all ranks since the training started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counters, and start to measure the data loader."""
        self._before, self._step, self._work = None, trainer.global_step, None
        self._waiting, self._validating = _Stopwatch(), _Stopwatch()
        self._logs = any_over_ranks(trainer.is_global_zero and bool(trainer.loggers))
        if not self._logs:
            return
        if not isinstance(pl_module, ForceFieldModule | CountsWork):
            rank_zero_warn(
                f"{type(pl_module).__name__} has no method read_work(), so ThroughputMonitor cannot say how many "
                f"structures, atoms and edges a second it is trained on; ForceFieldModule needs none."
            )
        # where Lightning's profilers measure it: hooks of callbacks have checkpoints and transfers between them
        watch_fetches(trainer, self._waiting.start, self._waiting.stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the end of a step that is logged."""
        step = trainer.global_step
        if self._logs and step != self._step:  # and not in the middle of an accumulated one
            self._step = step
            every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
            if self._before is None:
                self._before = self._read(step, pl_module)
            elif is_nth_step_done(trainer, every):
                now = self._read(step, pl_module)
                self._log(trainer, now.since(self._before))
                self._before = now
        self._batch_ended = time.perf_counter()

    @staticmethod
    def _log(trainer: Trainer, values: dict[str, float]) -> None:
        """Log the rates; all ranks call it, since some are maxima over the ranks."""
        of_any_rank = [name for name in _OF_ANY_RANK if name in values]
        largest = max_over_ranks(torch.tensor([values[name] for name in of_any_rank], dtype=torch.float64))
        values |= dict(zip(of_any_rank, largest.tolist(), strict=True))
        log_to_all(trainer, {f"throughput/{name}": value for name, value in values.items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, as of the last batch: workers of the validation set have been started since."""
        self._validating.start(self._batch_ended)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._validating.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the trainer's own hooks of the data loader."""
        unwatch_fetches(trainer)

    def step_numbers(self, batch: Batch) -> list[float]:
        """Numbers of structures, atoms and edges of a batch, from shapes alone: the host does not wait."""
        shapes = {name: value.shape for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
        num_structures = shapes[NUM_ATOMS][0] if NUM_ATOMS in shapes else 0
        num_atoms = next((shapes[name][0] for name in ("pos", "atom_types", "forces") if name in shapes), 0)
        num_edges = shapes["edge_index"][-1] if "edge_index" in shapes else 0
        return [float(num_structures), float(num_atoms), float(num_edges)]

    def on_step_sums(self, sums: Tensor) -> None:
        """Add the numbers of all ranks, on the device."""
        self._work = sums if self._work is None else self._work + sums

    def _read_work(self, module: LightningModule) -> dict[str, float]:
        """Numbers since the training started; makes the host wait."""
        if isinstance(module, CountsWork):
            return module.read_work()
        if self._work is None:
            return {}
        return dict(zip(_WORK, self._work.tolist(), strict=True))

    def _read(self, step: int, module: LightningModule) -> _Reading:
        memory = None
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
            memory = torch.cuda.max_memory_allocated(module.device) / 2**30
        work = self._read_work(module) if rank_in_group() == 0 else {}
        now = time.perf_counter()
        return _Reading(step, now - self._validating.total, self._waiting.total, work, memory)


@dataclass(frozen=True)
class _Reading:
    """Reading of the counters: optimizer steps, seconds and work.

    Attributes:
        step: number of optimizer steps.
        seconds: of training.
        waited: seconds of them in which the data loader was waited for.
        work: structures, atoms and edges, if known.
        memory: most memory of the GPU so far, GiB; None without one.
    """

    step: int
    seconds: float
    waited: float
    work: dict[str, float]
    memory: float | None

    def since(self, before: _Reading) -> dict[str, float]:
        seconds = self.seconds - before.seconds
        rates = {f"{name}_per_second": (number - before.work[name]) / seconds for name, number in self.work.items()}
        return {
            **rates,
            "step_seconds": seconds / (self.step - before.step),
            "data_wait_share": (self.waited - before.waited) / seconds,
            **({} if self.memory is None else {"gpu_memory_GiB": self.memory}),
        }


class _Stopwatch:
    """Seconds between starts and stops, all together."""

    def __init__(self) -> None:
        self.total = 0.0
        self._started: float | None = None

    def start(self, moment: float | None = None) -> None:
        self._started = time.perf_counter() if moment is None else moment

    def stop(self) -> None:
        if self._started is not None:
            self.total += time.perf_counter() - self._started
        self._started = None
