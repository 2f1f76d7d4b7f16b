"""Tables, charts and images of a training, until they are made into objects of W&B's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Media", "copies"]


@dataclass(frozen=True)
class Media:
    """A table, a bar chart or images, as plain values that JSON can hold wherever the user gave such values.

    Args:
        kind: ``table``, ``bar_chart`` or ``images``.
        arguments: of :meth:`make`.
    """

    kind: str
    arguments: dict[str, Any]

    @classmethod
    def table(cls, columns: list[Any] | None, data: list[list[Any]] | None, dataframe: Any) -> Media:
        """Table with its cells copied; numbers that are not finite are empty cells."""
        rows = None if data is None else [[_cell(value) for value in row] for row in data]
        return cls("table", {"columns": columns, "data": rows, "dataframe": dataframe})

    @classmethod
    def bar_chart(
        cls, labels: Sequence[str], values: Sequence[float], label_name: str, value_name: str, title: str
    ) -> Media:
        """Bar chart of one value for each label.

        Raises:
            ValueError: not as many labels as values.
        """
        if len(labels) != len(values):
            raise ValueError(f"A bar chart has a label for each value, found {len(labels)} and {len(values)}.")
        rows = [[str(label), _cell(float(value))] for label, value in zip(labels, values, strict=True)]
        return cls("bar_chart", {"data": rows, "label": label_name, "value": value_name, "title": title})

    @classmethod
    def images(cls, key: str, images: list[Any], options: Mapping[str, Any]) -> Media:
        """Images with their options; the times of files distinguish them from later files of the same name.

        Raises:
            TypeError: not a list.
            ValueError: an option that does not have one for each image.
        """
        copied = copies(key, images, "log_image")
        for name, values in options.items():
            if len(values) != len(images):
                raise ValueError(f"`{name}` has one for each of the {len(images)} images {key!r}, found {len(values)}.")
        times = [_written_at(image) for image in copied]
        places = [image if time is None else os.path.abspath(image) for image, time in zip(copied, times, strict=True)]
        return cls("images", {"images": places, "options": dict(options), "times": times})

    def make(self) -> Any:
        """W&B's object, or a list of them."""
        import wandb

        given = self.arguments
        if self.kind == "table":
            return wandb.Table(**given)
        if self.kind == "bar_chart":
            table = wandb.Table(columns=[given["label"], given["value"]], data=given["data"])
            return wandb.plot.bar(table, given["label"], given["value"], given["title"])
        images, options = given["images"], given["options"]
        return [
            wandb.Image(image, **{name: values[index] for name, values in options.items()})
            for index, image in enumerate(images)
        ]

    def is_unchanged(self) -> bool:
        """True if the files of images are still those that were logged."""
        times = zip(self.arguments.get("images", ()), self.arguments.get("times", ()), strict=True)
        return all(time is None or _written_at(place) == time for place, time in times)


def copies(key: str, items: Any, method: str) -> list[Any]:
    """Copies of arrays and tensors, which the training may change in place; other items are not copied.

    Raises:
        TypeError: not a list.
    """
    if not isinstance(items, list):
        raise TypeError(f"{method} takes a list, found {type(items).__name__}: put {key!r} in [ ].")
    return [_copy(item) for item in items]


def _copy(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.detach().clone()
    return item.copy() if hasattr(item, "__array__") and hasattr(item, "copy") else item


def _cell(value: Any) -> Any:
    """Cell of a W&B table, which is JSON: NaN and infinity are empty."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _written_at(image: Any) -> int | None:
    """Time in ns at which the file of an image was written; None for an image that is not in a file."""
    try:
        return os.stat(image).st_mtime_ns if isinstance(image, str | os.PathLike) else None
    except (OSError, ValueError):
        return None
