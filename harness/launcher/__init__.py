"""Sweeps whose points are jobs of several ranks: ``hydra/launcher=torchrun``."""

from harness.launcher.settings import Settings, SettingsError

__all__ = ["Settings", "SettingsError"]
