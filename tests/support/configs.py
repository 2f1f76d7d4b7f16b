"""Composed configurations."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from support.commands import ROOT

CONF = ROOT / "conf"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides, "output_dir=somewhere"])
