"""Frames of a store as an evaluation asks for them: with labels, groups and weights where files have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.extras import Extras, Found
from harness.data.frames import FrameArrays, JoinedFrames
from harness.data.reading import Frame
from harness.data.store import StoredFrames
from harness.data.store.building import found_of
from harness.data.store.information import with_information, with_labels
from harness.data.weights import WEIGHTS

__all__ = ["EvaluatedStore"]


class EvaluatedStore(JoinedFrames):
    """Frames of a store, whose structures have their labels as those of a file do.

    Names of labels, inputs and weights were decided at the build. Weights are left out if none are asked for, groups if
    those of another key are. Structures have everything that their files say of them, as numbers, text and columns.

    Args:
        store: with the frames.
        extras: further labels, inputs, weights and groups of the evaluation.
        named: names of labels that the user has given, by label.

    Raises:
        ValueError: the store was built with other names or weights, or without an input that the model needs.
    """

    def __init__(self, store: StoredFrames, extras: Extras, named: Mapping[str, str]) -> None:
        super().__init__([store])
        self._store = store
        settings = store.manifest["settings"]
        self.found: Found = found_of(store.manifest["found"])
        self._keys: dict[str, str] = dict(settings["keys"])
        self._extras = Extras.from_plain(settings["extras"])
        self._has_groups = extras.group_key is not None and extras.group_key == self._extras.group_key
        asked = asdict(extras.weighting.keys)
        self._has_weights = bool(extras.weighting.factors) or any(asked[name] is not None for name in WEIGHTS)
        for label, key in named.items():
            if key != self._keys[label]:
                raise ValueError(
                    f"data.keys.{label}={key}: {store.path} was built with {self._keys[label]}; build it anew with "
                    f"that name, or evaluate the files that it was built of"
                )
        one, two = extras.weighting.plain(), self._extras.weighting.plain()
        if self._has_weights and one != two:
            raise ValueError(
                f"{store.path} was built with the weights {two}, asked for are {one}; build it anew with those "
                f"(data.weights, data.keys.weight), or add data.unweighted=true"
            )
        known = {entry.field for entry in self._extras.inputs}
        for entry in extras.inputs:
            if entry.field not in known:
                raise ValueError(
                    f"{store.path} was built without {entry.field}, an input of the model; build it anew with "
                    f"data.inputs, or evaluate the files that it was built of"
                )

    def _frame(self, index: int) -> Frame:
        frame = super()._frame(index)
        atoms, further = with_labels(frame, self._keys, self._extras), self._store.information(index)
        if further:
            atoms = with_information(atoms, further)
        group = frame.group if self._has_groups else None
        return replace(frame, atoms=atoms, group=group, weights=frame.weights if self._has_weights else {})

    def arrays(self, index: int) -> FrameArrays:
        """Numbers of one frame."""
        found = super().arrays(index)
        return found if self._has_weights else found._replace(weights={})

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns; see :meth:`~harness.data.frames.FrameSet.column`."""
        if (name == "group" and not self._has_groups) or (name in WEIGHTS and not self._has_weights):
            return np.full(len(self), -1, np.int32) if name == "group" else np.ones(len(self))
        return super().column(name)

    def weight_names(self) -> list[str]:
        """Weights that a frame has; none if none are asked for."""
        return super().weight_names() if self._has_weights else []

    def group_names(self) -> list[str]:
        """Groups, if those of the store's key are asked for."""
        return super().group_names() if self._has_groups else []
