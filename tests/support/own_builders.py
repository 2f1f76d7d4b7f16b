"""Builders of users, named by configs in ``tests/config/test_builders.py``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.models import schnet_force_field


@dataclass
class Embedding:
    """A part that a config makes by itself."""

    width: int
    names: list[str] = field(default_factory=list)


class OfTypes:
    """A part that needs what its builder alone knows."""

    def __init__(self, type_names: list[str], width: int = 1) -> None:
        self.type_names, self.width = type_names, width


class Built(nn.Module):
    """Keeps what its builder was given."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given


def takes_anything(**given: Any) -> Built:
    return Built(**given)


def by_signature(statistics: Any, type_names: Any, width: int = 1) -> Built:
    return Built(statistics=statistics, type_names=type_names, width=width)


def makes_its_parts(embed: Mapping[str, Any], heads: dict[str, Any] | None = None, other: Any = None) -> Built:
    return Built(embed=embed, heads=heads, other=other)


def asserts(size: list[int]) -> Built:
    assert len(size) == 2
    return Built()


def asserts_with_words(size: list[int]) -> Built:
    assert len(size) == 2, "two sizes are needed"
    return Built()


def changes_the_process(**given: Any) -> Built:
    torch.set_default_dtype(torch.float64)
    return Built(**given)


def fails_deep_inside(size: int, names: list[str], width: int = 1) -> Built:
    return Built(chosen=names[size + 1 :][0])


def warns() -> Built:
    warnings.warn("The TorchScript type system doesn't support instance-level annotations", UserWarning, stacklevel=2)
    warnings.warn("mine: look at the units", UserWarning, stacklevel=2)
    return Built()


class ForcesOnly(nn.Module):
    """A model that predicts no energy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"forces": self.model(batch)["forces"]}


def forces_only(statistics: Any, references: Any = None) -> nn.Module:
    sizes = {"hidden_channels": 4, "num_filters": 4, "num_interactions": 1, "num_gaussians": 4}
    return ForcesOnly(schnet_force_field(statistics, cutoff=4.5, **sizes))


def schnet_by_keywords(**given: Any) -> nn.Module:
    """SchNet, whose sizes are in lists and dictionaries, and whose statistics come under another name."""
    layers, statistics = given.pop("layers"), given.pop("of_the_data")
    assert isinstance(layers, list), type(layers)
    assert isinstance(given["sizes"], dict)
    return schnet_force_field(statistics, num_interactions=len(layers), **given.pop("sizes"), **given)
