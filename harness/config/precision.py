"""One name for the floating-point numbers of a training: those of the data and those of the trainer follow from it.

====================  ============  ===================  =====================================================
``precision``         data.dtype    trainer.precision    weights
====================  ============  ===================  =====================================================
``float32``           float32       32-true              float32
``float64``           float64       64-true              float64
``bf16-mixed``        float32       bf16-mixed           float32; layers of the network in bfloat16
``float32-on-float64``  float64     32-true              float32, on float64 positions, as NequIP trains
====================  ============  ===================  =====================================================

Energies of the labels, sums of energies, losses and metrics are float64 in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from harness.support.text import did_you_mean

__all__ = ["DEFAULT", "PRECISIONS", "Places", "disagreement", "places", "weights_dtype"]


@dataclass(frozen=True)
class Places:
    """Settings that a precision stands for.

    Attributes:
        data: ``data.dtype``.
        trainer: ``trainer.precision``, as Lightning names it.
    """

    data: str
    trainer: str

    @property
    def weights(self) -> str:
        """``model.dtype``."""
        return weights_dtype(self.trainer)


DEFAULT = "float32"
PRECISIONS = {
    "float32": Places("float32", "32-true"),
    "float64": Places("float64", "64-true"),
    "bf16-mixed": Places("float32", "bf16-mixed"),
    "float32-on-float64": Places("float64", "32-true"),
}
_LIGHTNING = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Short names of ``trainer.precision``."""


def weights_dtype(trainer: object) -> str:
    """Dtype of a model's weights under a precision of the trainer."""
    return "float64" if str(trainer) in ("64", "64-true") else "float32"


def places(name: object) -> Places:
    """Settings that a precision stands for.

    Raises:
        ValueError: there is no precision of that name.
    """
    found = PRECISIONS.get(str(name))
    if found is None:
        of_trainer = [each for each, settings in PRECISIONS.items() if str(name) in (settings.trainer, each[5:])]
        meant = f"Did you mean {of_trainer[0]}? " if of_trainer else did_you_mean(str(name), PRECISIONS)
        raise ValueError(
            f"precision is one of {', '.join(PRECISIONS)}, found {name!r}. {meant}Others are set by data.dtype and "
            f"trainer.precision."
        )
    return found


def disagreement(config: DictConfig) -> str | None:
    """A sentence about settings that were given otherwise than a precision that is not the default says."""
    name = str(config.get("precision", DEFAULT))
    if name == DEFAULT:
        return None
    meant = places(name)
    expected = {"data.dtype": meant.data, "trainer.precision": meant.trainer, "model.dtype": meant.weights}
    given: dict[str, Any] = {
        key: (config.get(key.partition(".")[0]) or {}).get(key.partition(".")[2]) for key in expected
    }
    found = {key: _LIGHTNING.get(str(value), str(value)) for key, value in given.items() if value is not None}
    other = [f"{key}={value}" for key, value in found.items() if value != expected[key]]
    if not other:
        return None
    return (
        f"precision={name} stands for {', '.join(f'{key}={expected[key]}' for key in found)}, but {', '.join(other)} "
        f"was given, and counts. Leave one of the two out."
    )
