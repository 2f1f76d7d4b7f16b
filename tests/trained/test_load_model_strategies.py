"""Checkpoints that several ranks have written come back with the predictions of their validation: slow, real ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.commands import BIN, TINY, train
from support.trained import KeepValidation, same_bits

import harness

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CASES = {
    "ddp_ema": ("strategy=ddp", "callbacks=[default,ema]", "trainer.precision=64-true", "data.dtype=float64"),
    "fsdp": ("strategy=fsdp",),
    "zero3": ("strategy=deepspeed_zero3", "strategy._target_=support.cpu_deepspeed.CpuZero"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_two_ranks_is_that_of_their_validation(name: str, tmp_path: Path) -> None:
    keep = ("+callbacks.keep._target_=support.trained.KeepValidation", f"+callbacks.keep.folder={tmp_path}")
    arguments = ("experiment=alloy", *TINY, *CASES[name], *keep, "trainer.accelerator=cpu", "logger=csv", "test=false")
    # deepspeed finds the program that compiles its small operation beside the interpreter
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    done = train(*arguments, folder=tmp_path, ranks=2, timeout=300, PATH=path)
    assert done.code == 0, done.err[-3000:]
    model = harness.load_model(done.runs[0] / "checkpoints" / "last.ckpt")
    for rank in range(2):
        kept = KeepValidation()
        kept.seen = torch.load(tmp_path / f"validation-{rank}.pt", weights_only=True)
        same_bits(model, kept)
