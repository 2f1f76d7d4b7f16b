"""The embedded alloy with groups, sets and weights of its frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.data import EmbeddedAlloyDataModule

__all__ = ["GroupedAlloyDataModule"]


class GroupedAlloyDataModule(EmbeddedAlloyDataModule):
    """Frames are in groups and sets by their number, and every third counts twice."""

    def setup(self, stage: str | None = None) -> None:
        """Read the frames, and give their groups and sets names."""
        super().setup(stage)
        self.group_names, self.set_names = ["even", "odd", "none"], ["first", "second"]

    @staticmethod
    def labelled_sets(name: str) -> dict[str, list[str]]:
        """All sets have all labels but the stress, which the first has."""
        return {"total_energy": ["first", "second"], "forces": ["first", "second"], "stress": ["first"]}

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Any]:
        """Add what files would say."""
        number = batch["frame_index"]
        return batch | {
            "group_index": number % 2,
            "set_index": (number >= 2).to(torch.int64),
            "weight": 1.0 + (number % 3 == 0).to(torch.float64),
        }
