"""Whole weights of a model that may be split over the ranks, and checkpoints in one file: gather, read, load."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from harness.distributed import join_shards, split_like
from harness.strategies.deepspeed_private import is_split

__all__ = ["WholeCheckpoints", "load_weights", "refuse_folder"]


class WholeCheckpoints:
    """Mixin for strategies that split parameters: reads checkpoints in one file, as every other strategy does.

    Lightning's own strategies load weights and optimizer before the module has seen the checkpoint, which may have
    other metrics. Here a checkpoint is read, shown to the module and then loaded.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning restores the optimizer from the checkpoint that it has read."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: weights and optimizer are taken from it later."""
        refuse_folder(checkpoint_path)
        read = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)  # type: ignore[attr-defined]
        return cast(dict[str, Any], read)


def join_whole(value: Any, keep: bool) -> Any:
    """Whole of a value that may be split over the ranks, on the CPU; None without ``keep``. All ranks must call it."""
    joined = join_shards(value) if isinstance(value, Tensor) else value
    return copy_to_cpu(joined) if keep else None


def copy_to_cpu(value: Any) -> Any:
    """Copy of a tensor on the CPU; any other value as it is."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def load_weights(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Load whole weights into a module that may be sharded; every rank calls it with all of them."""
    if any(is_split(parameter) for parameter in module.parameters()):
        with gathered(module, modifier_rank=0):
            module.load_state_dict(state_dict, strict=strict)
        return
    own = dict(module.named_parameters(remove_duplicate=False))  # a parameter may have several names
    sharded = {key: split_as(value, own.get(key), key) for key, value in state_dict.items()}
    module.load_state_dict(sharded, strict=strict)


def gathered(module: nn.Module, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Context in which parameters that ZeRO stage 3 has split are whole."""
    from deepspeed.runtime.zero import GatheredParameters

    return cast(AbstractContextManager[Any], GatheredParameters(list(module.parameters()), modifier_rank=modifier_rank))


def split_as(value: Any, parameter: Tensor | None, key: str) -> Any:
    """A whole tensor, split over the ranks as a parameter is; anything else, such as a number of steps, as it is."""
    return (
        value if parameter is None or not isinstance(value, Tensor) or key == "step" else split_like(value, parameter)
    )


def refuse_folder(path: Any) -> None:
    """Refuse a checkpoint that is a folder, such as DeepSpeed and Lightning's sharded strategies write.

    Raises:
        ValueError: with the commands that make one file of it.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder of shards, expected a checkpoint in one file, as every strategy here writes. The "
            f"weights of a folder become a file with `python {path}/zero_to_fp32.py` (DeepSpeed) or `python -m "
            f"lightning.pytorch.utilities.consolidate_checkpoint {path}` (FSDP). Only do so with folders that you "
            f"trust: DeepSpeed's are unpickled."
        )
