"""Floating-point numbers in three places: the data, the trainer's precision, and the model; what rounds what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["parameter_dtypes", "rounded_by_checkpoint", "roundings"]

_LOW = ("bfloat16", "float16")


def parameter_dtypes(model: nn.Module) -> list[str]:
    """Names of the floating-point dtypes of a model's parameters, sorted."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    return sorted(_name(dtype) for dtype in found)


def roundings(data: torch.dtype | None, precision: str, parameters: list[str], name: str = "") -> list[str]:
    """Sentences about numbers that a combination rounds more than one of its places says.

    ==========  ==========  ============  =================================================
    data        precision   parameters    rounded
    ==========  ==========  ============  =================================================
    float32     32-true     float32       nothing more than all three say
    float64     64-true     any           nothing
    float32     64-true     any           positions and labels, by the data
    float64     32-true     float32       positions, by the model
    float64     bf16-mixed  float32       positions, by the model
    float32     32-true     float64       positions and labels, by the data
    any         32-true     bfloat16      weights, in every step
    any         bf16-mixed  bfloat16      weights, in every step
    any         bf16-mixed  float64       nothing: autocast leaves layers in float64 alone
    ==========  ==========  ============  =================================================

    Args:
        data: dtype of the batches; None if it is not known.
        precision: of the trainer, as Lightning names it.
        parameters: see :func:`parameter_dtypes`, before the trainer's precision converts them.
        name: of the precision that was asked for: ``float32-on-float64`` means float32 weights on float64 positions.
    """
    of_data = None if data is None else _name(data)
    found = []
    if precision == "64-true":
        parameters = ["float64"]
    if "float64" in parameters and of_data == "float32":
        whose = "trainer.precision=64-true" if precision == "64-true" else "the model's parameters are float64"
        found.append(
            f"data.dtype=float32 rounds positions to 7 digits, and forces and stresses of the labels too, although "
            f"{whose}. Choose precision=float64, which is data.dtype=float64 too, or float32 in all places."
        )
    if of_data == "float64" and parameters == ["float32"] and name != "float32-on-float64":
        found.append(
            f"data.dtype=float64, but the model is in float32 (trainer.precision={precision}): it rounds what it "
            f"computes of the positions. Losses and metrics are in float64. For all of it: precision=float64; where it "
            f"is meant: precision=float32-on-float64."
        )
    low = [dtype for dtype in parameters if dtype in _LOW]
    if low:
        found.append(
            f"parameters of the model are in {' and '.join(low)}, which rounds each step of the optimizer: most are "
            f"smaller than the distance of such numbers. Keep them in float32, and choose precision=bf16-mixed."
        )
    if precision.endswith("-mixed") and "float64" in parameters:
        found.append(
            f"trainer.precision={precision} leaves layers with float64 parameters as they are: keep those in float32."
        )
    return found


def rounded_by_checkpoint(states: Mapping[str, Any], model: nn.Module, precision: str) -> str | None:
    """A sentence about weights of a checkpoint that have more digits than those of the model."""
    wide = {
        name
        for name, value in states.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and name.startswith("model.")
    }
    own = {f"model.{name}": parameter.dtype for name, parameter in model.named_parameters()}
    rounded = [name for name in wide if own.get(name) == torch.float32]
    if not rounded or precision == "64-true":
        return None
    return (
        f"{len(rounded)} weights of the checkpoint are in float64 and rounded to float32 here "
        f"(trainer.precision={precision}). For their digits: precision=float64"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
