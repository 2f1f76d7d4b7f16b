"""Protection of this process from what other packages do to it when they are imported or build a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["guest"]

_VARIABLES = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",)
"""Variables that make ``torch.load`` unpickle anything where ``weights_only`` is not given."""
_TALK = ("The TorchScript type system", ".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", ".*torch.jit.* is deprecated")
"""Begins of the warnings that other packages repeat for every module of a model."""


@contextmanager
def guest(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Context in which another package is imported or called, and after which the process is as before.

    Restored are torch's default dtype, the states of the random generators of Python, NumPy and torch, the settings of
    TF32, the sharing strategy of torch's multiprocessing, and the variables of the environment that make ``torch.load``
    unsafe. Warnings of TorchScript, pages of them for one model, are left out.

    Args:
        dtype: torch's default dtype inside of the context; None keeps the one there is.
    """
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    default_dtype = torch.get_default_dtype()
    matmul_precision = torch.get_float32_matmul_precision()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    sharing = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    try:
        with isolate_rng(), warnings.catch_warnings():
            for message in _TALK:
                warnings.filterwarnings("ignore", message=message)
            if dtype is not None:
                torch.set_default_dtype(dtype)
            yield
    finally:
        torch.set_default_dtype(default_dtype)
        torch.set_float32_matmul_precision(matmul_precision)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.multiprocessing.set_sharing_strategy(sharing)  # type: ignore[no-untyped-call]
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
