"""Errors and predictions of a trained model on files, on one rank or on many.

    python -m harness.evaluate best.ckpt test.xyz
    harness-eval best.ckpt test.xyz other.xyz data.keys.energy=REF_energy --write predictions.xyz
    torchrun --nproc-per-node 2 -m harness.evaluate best.ckpt test.xyz

``conf/eval.yaml`` has the settings.
"""

from harness.evaluate.command import main

__all__ = ["main"]
