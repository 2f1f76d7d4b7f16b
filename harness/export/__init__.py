"""Trained models as files of other packages: of MACE, NequIP and SevenNet, and plain tensors."""

from harness.export.command import main

__all__ = ["main"]
