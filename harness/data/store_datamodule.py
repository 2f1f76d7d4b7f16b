"""Lightning data module of stores: nothing is read as a whole, and memory does not grow with the number of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from harness.data.arguments import PathLike
from harness.data.datamodule import AtomsDataModule
from harness.data.extras import Extras
from harness.data.frames import FrameSet
from harness.data.reading import LabelKeys, fingerprint_text
from harness.data.store import StoredFrames, is_store
from harness.data.store.building import found_of
from harness.data.store.changes import changed_text

__all__ = ["OF_THE_BUILD", "StoreDataModule"]

_DECIDED = ("keys", "labels", "inputs", "weights", "group_key", "min_distance", "check_units")
OF_THE_BUILD = (*_DECIDED, "store_above", "store_limit", "cache_dir")
"""Arguments of data from files that a store's build decides, or that it has no use for."""
_MOST_SOURCES = 20  # that are facts of the data by themselves


class StoreDataModule(AtomsDataModule):
    """Training, validation and test batches from stores that ``harness-data build`` has written.

    What was read and checked is decided by the build: names of labels, weights, groups, units and distances.

    Args:
        train: store of the training frames, or several that are joined to one set.
        val: store of a validation set, or several, each a set of its own; None takes it from the split.
        test: likewise for testing.
        cache_neighbors: whether samples stay in memory with their neighbour lists.
        options: any argument of :class:`AtomsDataModule` but those of reading and checking files.

    Raises:
        TypeError: if an option is unknown or one of the build.
        FileNotFoundError: from :meth:`setup`, if there is no such store.
        ValueError: from :meth:`setup`, if a store is damaged or of another version, or two have different labels.
    """

    settings_elsewhere: ClassVar[Mapping[str, str]] = {
        name: f"data.{name} is decided when a store is built, and `harness-data info STORE` shows it. To change it, "
        f"build another store: harness-data build STORE FILES..., with the same setting"
        for name in _DECIDED
    }
    """Sentences on settings of other data modules that this one does not take, by their names."""

    def __init__(
        self,
        train: PathLike | Sequence[PathLike],
        val: PathLike | Sequence[PathLike] | None = None,
        test: PathLike | Sequence[PathLike] | None = None,
        *,
        cache_neighbors: bool = False,
        **options: Any,
    ) -> None:
        fixed = sorted(set(OF_THE_BUILD) & set(options))
        if fixed:
            raise TypeError(
                f"{', '.join(fixed)} is decided when a store is built: harness-data build OUT FILES... data.{fixed[0]}="
            )
        super().__init__(train, val, test, cache_neighbors=cache_neighbors, **options)

    def setup(self, stage: str | None = None) -> None:
        """Open the stores, split the frames and take the statistics; the first call does everything.

        Raises:
            FileNotFoundError: there is no such store.
            ValueError: a store is damaged or of another version, two of them have different labels, or what
                :meth:`AtomsDataModule.setup` raises.
        """
        if self._is_set_up:
            return
        self._stores = {path: _opened(path) for paths in self._files.values() for path in paths}
        first = self._stores[self._files["train"][0]]
        settings = first.manifest["settings"]
        for store in self._stores.values():
            _refuse_other_labels(first, store)
        self.keys = LabelKeys(**settings["keys"])
        self.extras = Extras.from_plain(settings["extras"])
        super().setup(stage)
        for text in filter(None, map(changed_text, self._stores.values())):
            rank_zero_warn(text)

    def _read(self, path: Path) -> FrameSet:
        store = self._stores[path]
        self._found |= found_of(store.manifest["found"])
        return store

    def _facts_of(self, name: str, path: Path) -> dict[str, str]:
        store = self._stores[path]
        found = {name: f"store of {len(store)} frames, sha256 {store.digest}"}
        sources: list[Mapping[str, Any]] = store.manifest["sources"]
        if len(sources) <= _MOST_SOURCES:  # an evaluation looks whether a model was trained on a file
            for number, source in enumerate(sources, start=1):
                text = fingerprint_text(Path(source["path"]).name, source["bytes"], source["sha256"])
                found[f"{name}, source {number}"] = text
        return found


def _opened(path: Path) -> StoredFrames:
    folder = path.expanduser()
    if folder.is_file() and not is_store(folder):
        raise ValueError(
            f"{path} is a file and no store; train from it by data=file data.train={path}, or build a store of it: "
            f"harness-data build {path.stem}.store {path}"
        )
    return StoredFrames(path)


def _refuse_other_labels(first: StoredFrames, other: StoredFrames) -> None:
    """Refuse two stores whose further labels, inputs or groups are not the same."""
    one, two = (store.manifest["settings"]["extras"] for store in (first, other))
    for name in ("labels", "inputs", "group_key"):
        if one[name] != two[name]:
            raise ValueError(
                f"{other.path} was built with data.{name}={two[name]}, {first.path} with {one[name]}; expected the "
                f"same in all stores of a training. Build one of them anew: harness-data build OUT FILES... "
                f"data.{name}=..."
            )
