"""Exceptions that are a user's to mend."""

from __future__ import annotations

from hydra.errors import InstantiationException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

__all__ = ["BAD_INPUT"]

BAD_INPUT = (
    ValueError,
    TypeError,
    KeyError,
    OSError,
    InstantiationException,
    OmegaConfBaseException,
    MisconfigurationException,
)
"""Exceptions that a mistake of a user is raised as."""
