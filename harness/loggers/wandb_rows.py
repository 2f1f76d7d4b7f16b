"""Rows of a run from earlier starts, none of which is to be logged again and none of which is to be missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.loggers.journal import rows_in
from harness.loggers.media import Media
from harness.loggers.wandb_service import stored_names

__all__ = ["STEP", "EarlierRows"]

STEP = "trainer/global_step"
"""Name of the optimizer step among W&B's values, chosen by Lightning."""

_Key = tuple[int, frozenset[str]]
"""Step and names of a row, which identify it."""


class EarlierRows:
    """Rows that a run has from earlier starts.

    A row of this start with the same step and the same names is one of them, which is done again.
    """

    def __init__(self) -> None:
        self._numbered: list[tuple[int, _Key]] = []
        self._left: Counter[_Key] = Counter()

    def add(self, stored: Mapping[str, Any]) -> None:
        """Add a row from a file of W&B's."""
        key = _key(stored_names(stored), stored.get(STEP))
        self._numbered.append((int(stored.get("_step", 0)), key))
        self._left[key] += 1

    @property
    def number(self) -> int:
        """Number of rows in the run, which is that of the next one."""
        return max((number + 1 for number, _ in self._numbered), default=0)

    def keep(self, number: int) -> None:
        """Forget rows from that number on, which the server does not have."""
        self._left = Counter(key for at, key in self._numbered if at < number)

    def use_up(self, row: Mapping[str, Any], step: int | None) -> bool:
        """Use up one stored copy of the row; False if the run has none."""
        key = _key(_logged_names(row), step)
        if self._left[key] <= 0:
            return False
        self._left[key] -= 1
        return True

    def missing(self, lines: Iterable[bytes]) -> Iterator[tuple[dict[str, Any], int | None]]:
        """Rows of a journal that the run does not have, without images whose file has changed since."""
        left = self._left.copy()
        for row, step in rows_in(lines):
            key = _key(_logged_names(row), step)
            left[key] -= 1
            media = (value for value in row.values() if isinstance(value, Media))
            if left[key] < 0 and all(item.is_unchanged() for item in media):
                yield row, step


def _key(names: set[str], step: Any) -> _Key:
    own = {name for name in names if name == STEP or name.startswith("_")}  # W&B's and Lightning's
    return -1 if step is None else int(step), frozenset(names - own)


def _logged_names(row: Mapping[str, Any]) -> set[str]:
    """Names as they are stored: a chart is stored as the table behind it."""
    return {f"{name}_table" if _is_chart(value) else name for name, value in row.items()}


def _is_chart(value: Any) -> bool:
    from wandb.plot import CustomChart

    return isinstance(value, CustomChart) or (isinstance(value, Media) and value.kind == "bar_chart")
