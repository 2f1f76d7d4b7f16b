"""Log keys as values: the stage, the level and the section that a value belongs to, and its name.

| section | step | epoch |
| --- | --- | --- |
| error | ``train_loss_step/…``, ``train_metric_step/…`` | ``train_loss_epoch/…``, ``val0_epoch/…``, ``test0_epoch/…`` |
| coefficient | ``loss_coeff_step/…`` | ``loss_coeff/…``, ``val0_coeff/…``, ``test0_coeff/…`` |
| contribution | ``loss_contribution_step/…`` | ``loss_contribution_epoch/…``, ``val0_contribution/…``, … |
| report | | ``train_report/…``, ``val0_report/…``, ``test0_report/…`` |

Here alone are they text: whoever logs or reads a value makes its key, or takes it apart, with :class:`LogKeys`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "TRAIN",
    "TRAINING_STAGES",
    "TRAIN_LOSS",
    "TRAIN_METRIC",
    "Level",
    "LogKeys",
    "Section",
    "is_of_evaluation",
    "stage_of_set",
]

Level = Literal["step", "epoch"]
Section = Literal["error", "coefficient", "contribution", "report"]

TRAIN = "train"
"""Stage of what a whole training reports, such as the picture of its coefficients."""
TRAIN_LOSS = "train_loss"
TRAIN_METRIC = "train_metric"
TRAINING_STAGES = (TRAIN_LOSS, TRAIN_METRIC)

_SUFFIX: dict[Section, str] = {"coefficient": "coeff", "contribution": "contribution", "report": "report"}


def is_of_evaluation(key: str) -> bool:
    """True for a key of a validation or test set, of any section."""
    return key.startswith(("val", "test"))


def stage_of_set(kind: Literal["val", "test"], index: int) -> str:
    """Stage of a validation or test set, such as ``val0``."""
    return f"{kind}{index}"


@dataclass(frozen=True)
class LogKeys:
    """Keys of the values of one section, one stage and one level.

    Attributes:
        stage: :data:`TRAIN_LOSS`, :data:`TRAIN_METRIC`, ``val0``, ``test0``, …
        level: ``step`` in a training, ``epoch`` for values of an epoch.
        section: errors (the values of components, per-type values, ``weighted_sum``), coefficients, contributions
            (coefficient × value), or pictures and tables of a report.

    Example:
        >>> LogKeys("train_loss", "step").key("forces_mse")
        'train_loss_step/forces_mse'
        >>> LogKeys("val0", section="contribution").row({"forces_mse": 0.5})
        {'val0_contribution/forces_mse': 0.5}
    """

    stage: str
    level: Level = "epoch"
    section: Section = "error"

    @property
    def prefix(self) -> str:
        """Common beginning of the keys, the slash included."""
        if self.section == "error":
            return f"{self.stage}_{self.level}/"
        if self.section == "report" or self.stage != TRAIN_LOSS:
            return f"{self.stage}_{_SUFFIX[self.section]}/"
        if self.section == "coefficient" and self.level == "epoch":
            return "loss_coeff/"
        return f"loss_{_SUFFIX[self.section]}_{self.level}/"

    def key(self, name: str) -> str:
        """Key of a value."""
        return f"{self.prefix}{name}"

    def keys(self, names: Iterable[str]) -> list[str]:
        """Keys of several values."""
        return [self.key(name) for name in names]

    def name_in(self, key: str) -> str | None:
        """Name of the value that a key is of; None for a key that is none of these."""
        return key.removeprefix(self.prefix) if key.startswith(self.prefix) else None

    def row(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values by key, from values by name."""
        return {self.key(name): value for name, value in values.items()}

    @classmethod
    def of_error(cls, key: str) -> tuple[LogKeys, str] | None:
        """The keys that a key of an epoch's error is one of, and its name; None for another key.

        Example:
            >>> LogKeys.of_error("val0_epoch/forces_mae")
            (LogKeys(stage='val0', level='epoch', section='error'), 'forces_mae')
        """
        stage, separator, name = key.partition("_epoch/")
        return (cls(stage), name) if separator and stage != "loss_contribution" else None
