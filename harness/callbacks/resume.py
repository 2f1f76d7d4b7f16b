"""The checkpoint that an interrupted training continues from, and the end of a training that is preempted."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch import Tensor

from harness.checkpoints import COMPLETE, after_writing, newest_valid, writing_at_once
from harness.distributed import gather_to_first, rank_in_group
from harness.fields import Batch
from harness.module import ForceFieldModule, is_nth_step_done
from harness.runs.exits import Preempted
from harness.support.checks import whole_number
from harness.support.device import DelayedScalar
from harness.support.lightning_private import ignore_sigterm_broadcast, is_validated_next

__all__ = ["COMPLETE", "ResumeCheckpoint"]

_RANDOM_STATES = "random_states"
_TRAINED = "current_model_state"
"""Key of callbacks that average weights: the weights that were trained."""


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest two checkpoints of a training, and ends it with one when a signal requests that.

    Saves ``last.ckpt`` when an epoch is complete (validation, schedulers and logs included), optionally every n steps,
    and ``previous.ckpt`` is the one before. A signal sets a flag, nothing more. The flags of all ranks are summed
    within the all-reduce of the loss (:class:`~harness.module.StepSums`), so that all ranks stop after the same step:
    they save, and :class:`Preempted` is raised on each of them. During validation the flag waits for its end; a test is
    finished. Where checkpoints are written in the background (:class:`~harness.checkpoints.AtomicCheckpointIO`), the
    files change places once one is written; that of a stop, and of the end, is written before anything goes on. What is
    resumed is bitwise what would have been trained, on the same number of ranks: batches, accumulated
    metrics, random states, and schedulers included.

    Args:
        dirpath: folder of the two checkpoints.
        every_n_epochs: epochs between checkpoints.
        every_n_steps: optimizer steps between checkpoints within an epoch; None for none.
        signals: names of the signals that request a stop; SLURM sends the one of ``--signal``.
    """

    num_step_sums = 1

    def __init__(
        self,
        dirpath: str | Path,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
    ) -> None:
        super().__init__()
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None:
                whole_number(name, value)
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise ValueError(f"Unknown signals {unknown}; such as SIGTERM, SIGUSR1, SIGUSR2.")
        self.dirpath = Path(dirpath)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.signals = [signal.Signals[name] for name in signals]
        self._request: signal.Signals | None = None
        self._requests = DelayedScalar()  # ranks that are requested to stop
        self._handlers: dict[signal.Signals, Any] = {}
        self._step_before = 0
        self._first_batch = True
        self._random_state: dict[str, Any] | None = None
        self._complete: dict[str, float] | None = None
        self._trained: dict[str, Tensor] | None = None

    @property
    def last(self) -> Path:
        """Path of the newest checkpoint."""
        return self.dirpath / "last.ckpt"

    @property
    def previous(self) -> Path:
        """Path of the checkpoint before the newest."""
        return self.dirpath / "previous.ckpt"

    @property
    def following(self) -> Path:
        """Path of the checkpoint in the making, which is renamed to :attr:`last` once it is whole."""
        return self.dirpath / "next.ckpt"

    def newest(self) -> Path | None:
        """Path of the newest whole checkpoint; damaged ones are put aside, with a warning."""
        chosen = newest_valid([self.following, self.last, self.previous])
        for path in (self.following, self.last, self.previous):
            if path == chosen:
                break
            if path.exists():
                os.replace(path, path.with_suffix(".damaged"))
        if chosen == self.following:
            self._rotate()
            return self.last
        return chosen

    def _rotate(self) -> None:
        if not self.following.exists():  # the disk is full, and nothing changes
            return
        if self.last.exists():
            os.replace(self.last, self.previous)
        os.replace(self.following, self.last)

    def put_aside(self) -> None:
        """Keep another run's checkpoints in this folder from being taken for this one's, or from being written over."""
        for path in (self.following, self.last, self.previous, self.dirpath / "best.ckpt"):
            if path.exists():
                os.replace(path, path.with_suffix(".before"))

    # --- when ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the handlers that the signals had before Lightning."""
        if threading.current_thread() is threading.main_thread():  # Python gives signals to that thread alone
            self._handlers = {number: signal.getsignal(number) for number in self.signals}
        if stage == "fit":
            self._request, self._complete, self._trained = None, None, None
            self._requests.forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals from Lightning, whose handler calls a collective and hangs where one rank has them."""
        self._first_batch = True
        self._listen()
        ignore_sigterm_broadcast(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a test if a signal came, such as in the last epoch; a test that has begun is finished.

        The training is complete then, and its end is saved.
        """
        leave = self._any_request(trainer)
        self._listen()
        if leave:
            raise Preempted(f"preempted before the test: the training is complete, and saved in {self.last}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the completed epoch at the start of the next: in Lightning's hooks for its end it is not complete."""
        epoch = trainer.current_epoch
        if self._first_batch:  # a start, or a restart between two epochs: there is nothing new to save
            trainer.fit_loop.restarting = False
            self._restore_random_state()
            return
        leave = self._any_request(trainer)
        if leave:
            self._leave(trainer)
        if epoch % self.every_n_epochs == 0:
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the step, and end Lightning's state of restarting."""
        # which would last until the end of the epoch, and leave out the turn of ReduceLROnPlateau there; between two
        # epochs, it would count a step that is none
        if self._first_batch:
            trainer.fit_loop.restarting = False
            self._restore_random_state()
            self._first_batch = False
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n steps, and when any rank is requested to stop."""
        if trainer.global_step == self._step_before or trainer.is_last_batch:
            return  # in the middle of an accumulated step; or the end of the epoch, which is saved when it is complete
        # in someone else's module it takes a collective of its own
        leave = self._requests.read() > 0 if isinstance(pl_module, ForceFieldModule) else self._any_request(trainer)
        saves = is_nth_step_done(trainer, self.every_n_steps)
        if not (leave or saves) or is_validated_next(trainer):
            return  # Lightning would leave the validation out; a signal is still there after the next step
        if leave:
            self._leave(trainer)
        self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the weights that were trained, if they are averaged: at the end, the average takes their place."""
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            state = pl_module.state_dict()
            self._trained = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end and mark it as complete, so that early stopping is not decided again."""
        self._complete = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with writing_at_once(trainer):
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the handlers of the signals."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def step_numbers(self, batch: Batch) -> list[float]:
        """1 if this rank is requested to stop, else 0."""
        return [float(self._request is not None)]

    def on_step_sums(self, sums: Tensor) -> None:
        """Start to copy the number of ranks that are requested to stop; on a GPU it is read a step later."""
        self._requests.send(sums)

    def _listen(self) -> None:
        def note(number: int, frame: FrameType | None) -> None:
            self._request = signal.Signals(number)

        for number in self._handlers:
            signal.signal(number, note)

    def _any_request(self, trainer: Trainer) -> bool:
        """True on all ranks if any is requested to stop, by a collective of its own: all ranks must call it."""
        return bool(trainer.strategy.reduce_boolean_decision(self._request is not None, all=False))

    def _message(self, trainer: Trainer) -> str:
        cause = f"{self._request.name} came" if self._request else "another rank was preempted"
        return f"{cause}: saved step {trainer.global_step} of epoch {trainer.current_epoch} to {self.last}"

    # --- what ---

    def _leave(self, trainer: Trainer) -> None:
        with writing_at_once(trainer):
            self._save(trainer)
        raise Preempted(self._message(trainer))

    def _save(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            after_writing(trainer, lambda: self.following.unlink(missing_ok=True))
            for logger in trainer.loggers:
                logger.save()  # what is logged up to here will not be logged again
        trainer.save_checkpoint(self.following, weights_only=False)
        if trainer.is_global_zero:
            after_writing(trainer, self._rotate)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all ranks, on rank 0, which writes; and count a complete epoch as complete."""
        checkpoint[_RANDOM_STATES] = gather_to_first(_random_state())
        if self._complete is not None:
            checkpoint[COMPLETE] = self._complete
            if _TRAINED in checkpoint and self._trained is not None:
                checkpoint[_TRAINED] = {**checkpoint[_TRAINED], **self._trained}
        loops = checkpoint["loops"]["fit_loop"]
        epochs = loops["epoch_progress"]["total"]
        if epochs["processed"] == epochs["completed"] and (epochs["started"] == epochs["processed"]):
            # Between two epochs Lightning keeps the batches of the one before as those of the current one, and would
            # take the next for done.
            for name, progress in loops.items():
                if name.startswith("epoch_loop.") and isinstance(progress, dict) and "current" in progress:
                    progress["current"] = dict.fromkeys(progress["current"], 0)
                    if "is_last_batch" in progress:
                        progress["is_last_batch"] = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember this rank's random state."""
        states = checkpoint.get(_RANDOM_STATES) or []
        # on another number of ranks there is no right one
        self._random_state = states[rank_in_group()] if len(states) == trainer.world_size else None

    def _restore_random_state(self) -> None:
        """Restore it after everything that a start draws, such as the seeds of the data loaders' workers."""
        if self._random_state is not None:
            _set_random_state(self._random_state)
            self._random_state = None


def _random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, as numbers and tensors only."""
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - the one that other people's code draws from
    name, keys, position, has_gauss, cached = legacy
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
