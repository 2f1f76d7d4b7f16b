"""Whole weights of a model that may be split over the ranks: gather, load."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from harness.distributed import (
    join_shards,
    split_like,
)

__all__ = ["load_weights", "refuse_folder"]


def _whole(value: Any, keep: bool) -> Any:
    """What may be split over the ranks, joined, on the CPU; None where it is not kept. All ranks must call it."""
    joined = join_shards(value) if isinstance(value, Tensor) else value
    return _copy(joined) if keep else None


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def load_weights(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Load whole weights into a module that may be sharded; every rank calls it with all of them."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):  # ZeRO stage 3
        with _gathered(module, modifier_rank=0):
            module.load_state_dict(state_dict, strict=strict)
        return
    own = dict(module.named_parameters(remove_duplicate=False))  # a parameter may have several names
    sharded = {key: _like(value, own.get(key), key) for key, value in state_dict.items()}
    module.load_state_dict(sharded, strict=strict)


def _gathered(module: nn.Module, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Context in which parameters that ZeRO stage 3 has split are whole."""
    from deepspeed.runtime.zero import GatheredParameters

    return cast(AbstractContextManager[Any], GatheredParameters(list(module.parameters()), modifier_rank=modifier_rank))


def _like(value: Any, parameter: Tensor | None, key: str) -> Any:
    """A whole tensor, split over the ranks as a parameter is; anything else, such as a number of steps, as it is."""
    return (
        value if parameter is None or not isinstance(value, Tensor) or key == "step" else split_like(value, parameter)
    )


def refuse_folder(path: Any) -> None:
    """Refuse a checkpoint that is a folder, such as DeepSpeed and Lightning's sharded strategies write.

    Raises:
        ValueError: with what makes one file of it.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder of shards, expected a checkpoint in one file, as every strategy here writes. The "
            f"weights of a folder become a file with `python {path}/zero_to_fp32.py` (DeepSpeed) or `python -m "
            f"lightning.pytorch.utilities.consolidate_checkpoint {path}` (FSDP). Only do so with folders that you "
            f"trust: DeepSpeed's are unpickled."
        )
