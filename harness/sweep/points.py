"""A sweep and its points, with the last values of their validations and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.support.log_keys import LogKeys

__all__ = ["Sweep", "SweepPoint", "datasets", "log_keys"]


@dataclass(frozen=True)
class SweepPoint:
    """One training of a sweep.

    Attributes:
        name: path of its folder in the sweep's directory; ``-`` for a point that has not been started.
        folder: its output directory; None for a point that has not been started.
        overrides: values of its overrides, by setting.
        state: finished, running, preempted, interrupted, failed, killed, starting, or not started.
        reason: why it is not finished or not ranked, as far as it is known.
        seconds: of wall time.
        ranks: number of processes that trained it.
        values: of its last validation and its test, by log key.
    """

    name: str
    folder: Path | None
    overrides: Mapping[str, str]
    state: str
    reason: str = ""
    seconds: float | None = None
    ranks: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """True if its values are final."""
        return self.state == "finished"


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep's directory.

    Attributes:
        folder: the directory.
        points: in the order of their numbers; those that have not been started are last.
        swept: settings in which points differ.
        monitor: log key of the value by which points are judged.
        project: of the points' W&B runs.
        group: of the points' W&B runs.
        planned: number of points that were asked for, if it is known.
        entity: of the points' W&B runs, if one was given.
    """

    folder: Path
    points: Sequence[SweepPoint]
    swept: Sequence[str]
    monitor: str
    project: str
    group: str
    planned: int | None = None
    entity: str | None = None

    @property
    def title(self) -> str:
        """The last two parts of the directory: name and time."""
        return "/".join(self.folder.parts[-2:])

    @property
    def most_final(self) -> Sequence[SweepPoint]:
        """Points that have finished, or all if none has: the columns of the table are those of their values."""
        return [point for point in self.points if point.finished] or self.points

    def short(self, setting: str) -> str:
        """The last part of a setting's name, or as many parts as no other swept setting ends with."""
        parts = setting.split(".")
        for number in range(1, len(parts)):
            name = ".".join(parts[-number:])
            if sum(f".{other}".endswith(f".{name}") for other in self.swept) == 1:
                return name
        return setting

    def describe(self, point: SweepPoint) -> str:
        """Swept settings of a point, such as ``forces=10, total_energy=1``."""
        given = [f"{self.short(name)}={point.overrides[name]}" for name in self.swept if name in point.overrides]
        return ", ".join(given)


def log_keys(points: Sequence[SweepPoint]) -> list[str]:
    """All log keys that points have values of, those of tests first."""
    keys = {key for point in points for key in point.values}
    return sorted(keys, key=lambda key: (not key.startswith("test"), key))


def datasets(points: Sequence[SweepPoint]) -> list[LogKeys]:
    """Keys of the errors of each set, those of tests first."""
    found = [LogKeys.of_error(key) for key in log_keys(points)]
    return list(dict.fromkeys(each[0] for each in found if each is not None))
