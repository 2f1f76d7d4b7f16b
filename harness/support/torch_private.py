"""Private parts of torch outside of :mod:`torch.distributed`, behind functions with public names.

Those of :mod:`torch.distributed` are in :mod:`harness.distributed.torch_private`.
"""

from __future__ import annotations

import torch._functorch.config as functorch_config
from torch import nn

__all__ = ["NAMES", "OVERRIDDEN", "donates_buffers", "is_compiled"]

NAMES = ("_orig_mod", "_compiled_call_impl", "donated_buffer")
"""Attributes of a compiled module, and a setting of ``torch._functorch.config``."""
OVERRIDDEN = ("_apply",)
"""Methods of modules that a subclass in :mod:`harness.models` overrides: ``.float()`` and its like must call them."""


def is_compiled(module: nn.Module) -> bool:
    """True after ``torch.compile(module)`` or ``module.compile()``."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def donates_buffers() -> bool:
    """True if compiled backward passes free the buffers of their forward pass, so that a second one fails."""
    return bool(getattr(functorch_config, "donated_buffer", False))
