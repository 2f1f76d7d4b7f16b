"""How fast a training is: structures, atoms and edges a second, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from harness.distributed import gather_objects, max_over_ranks, rank_in_group

__all__ = ["CountsWork", "ThroughputMonitor"]

_OF_ANY_RANK = ("data_wait_share", "gpu_memory_GiB")
"""Values of which the largest of all ranks is told."""


@runtime_checkable
class CountsWork(Protocol):
    """A module that knows how much it has trained on."""

    def read_work(self) -> dict[str, float]:
        """Number of ``structures``, ``atoms`` and ``edges`` over all ranks since the training started.

        May make the host wait for the device; no collective, since rank 0 alone calls it.
        """


class ThroughputMonitor(Callback):
    """Logs rates of the training since the step that was logged before.

    - ``throughput/structures_per_second``, ``…/atoms_per_second``, ``…/edges_per_second``: over all ranks, of modules
      with :meth:`CountsWork.read_work`.
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

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and (
            isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1
        ):
            raise ValueError(f"every_n_steps is a whole number, at least 1, found {every_n_steps!r}.")
        self.every_n_steps = every_n_steps
        self._logs = False  # on all ranks alike
        self._before: _Reading | None = None  # at the step that was logged last
        self._step = 0
        self._waiting = _Stopwatch()
        self._validating = _Stopwatch()
        self._batch_ended = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, and measure how long the data loader takes."""
        self._before, self._step = None, trainer.global_step
        self._waiting, self._validating = _Stopwatch(), _Stopwatch()
        self._logs = any(gather_objects(trainer.is_global_zero and bool(trainer.loggers)))
        if not self._logs:
            return
        if not isinstance(pl_module, CountsWork):
            rank_zero_warn(
                f"{type(pl_module).__name__} has no method read_work(), so ThroughputMonitor cannot say how many "
                f"structures, atoms and edges a second it is trained on; ForceFieldModule has one."
            )
        # where Lightning's profilers measure it: hooks of callbacks have checkpoints and transfers between them
        loop: Any = trainer.fit_loop.epoch_loop
        loop._on_before_fetch = _both(loop._on_before_fetch, self._waiting.start)
        loop._on_after_fetch = _both(self._waiting.stop, loop._on_after_fetch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, at the end of a step that is one to log."""
        step = trainer.global_step
        if self._logs and step != self._step:  # and not in the middle of an accumulated one
            self._step = step
            every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
            if self._before is None:
                self._before = self._read(step, pl_module)
            elif every and step % every == 0:
                now = self._read(step, pl_module)
                self._log(trainer, now.since(self._before))
                self._before = now
        self._batch_ended = time.perf_counter()

    @staticmethod
    def _log(trainer: Trainer, values: dict[str, float]) -> None:
        """All ranks come here; rank 0 has loggers."""
        of_any_rank = [name for name in _OF_ANY_RANK if name in values]
        largest = max_over_ranks(torch.tensor([values[name] for name in of_any_rank], dtype=torch.float64))
        values |= dict(zip(of_any_rank, largest.tolist(), strict=True))
        row = {f"throughput/{name}": value for name, value in values.items()}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                step = trainer.global_step - 1  # as of the losses
                logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, as of the last batch: workers of the validation set have been started since."""
        self._validating.start(self._batch_ended)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        self._validating.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        for name in ("_on_before_fetch", "_on_after_fetch"):
            vars(trainer.fit_loop.epoch_loop).pop(name, None)

    def _read(self, step: int, module: LightningModule) -> _Reading:
        memory = None
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
            memory = torch.cuda.max_memory_allocated(module.device) / 2**30
        work = module.read_work() if isinstance(module, CountsWork) and rank_in_group() == 0 else {}
        now = time.perf_counter()
        return _Reading(step, now - self._validating.total, self._waiting.total, work, memory)


@dataclass(frozen=True)
class _Reading:
    """Where a training is: optimizer steps, and seconds and work since some moment.

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


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call
