"""Errors and predictions of a trained model on files, on one rank or on many.

    python -m harness.evaluate best.ckpt test.xyz
    harness-eval best.ckpt test.xyz other.xyz data.keys.energy=REF_energy --write predictions.xyz
    torchrun --nproc-per-node 2 -m harness.evaluate best.ckpt test.xyz

``conf/eval.yaml`` has the settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.support.start import run_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``harness-eval``, see :func:`harness.evaluate.command.main`.

    Args:
        arguments: of the command line; those of the process if not given.
    """
    run_command("harness.evaluate.command", arguments)
