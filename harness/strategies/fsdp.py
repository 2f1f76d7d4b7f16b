"""FSDP2 for force fields: the model is one unit, and checkpoints are whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from harness.distributed import shard_parameters, sharded_parts
from harness.strategies.weights import WholeCheckpoints, join_whole, load_weights, split_as
from harness.support.lightning_private import parallel_sizes, set_data_parallel_size

__all__ = ["FullyShardedStrategy", "shard_root"]


class FullyShardedStrategy(WholeCheckpoints, ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with all ranks in the data-parallel group, and checkpoints in one file.

    :class:`~harness.module.ForceFieldModule` shards its model at the root in ``configure_model``.

    Args:
        data_parallel_size: number of ranks that share a batch; ``auto`` for all, divided by ``tensor_parallel_size``.
        tensor_parallel_size: number of ranks that work on the same part of a batch.
        options: any other argument of ``ModelParallelStrategy``.

    Raises:
        ValueError: checkpoints in several files are asked for.
    """

    def __init__(self, data_parallel_size: int | str = "auto", tensor_parallel_size: int = 1, **options: Any) -> None:
        if options.pop("save_distributed_checkpoint", False):
            raise ValueError(
                "save_distributed_checkpoint=true would write a folder of shards, which only this strategy reads; "
                "expected false: one file, gathered on rank 0, that every strategy continues."
            )
        super().__init__(
            data_parallel_size=data_parallel_size,  # type: ignore[arg-type]
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=False,
            **options,
        )

    def setup_environment(self) -> None:
        """Make the process group and the mesh of devices."""
        given, together = parallel_sizes(self)
        if given == "auto":
            # Lightning would make it the number of nodes, and let all ranks of a node work on the same batch
            ranks, together = self.num_nodes * self.num_processes, cast(int, together)
            if ranks % together:
                raise ValueError(
                    f"tensor_parallel_size={together} does not divide the {ranks} ranks: all groups are of that size."
                )
            set_data_parallel_size(self, ranks // together)
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0; empty elsewhere."""
        state = {
            key: join_whole(value, self.is_global_zero)
            for key, value in cast(nn.Module, self.lightning_module).state_dict().items()
        }
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole state of the optimizer in the form of torch's ``Optimizer.state_dict``, on rank 0; empty elsewhere."""
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        whole = {
            number: {key: join_whole(value, self.is_global_zero) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        return {"state": whole, "param_groups": state["param_groups"]} if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, each rank its shard."""
        load_weights(cast(nn.Module, self.lightning_module), checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state, each rank its shard."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                number: {key: split_as(value, parameters[number], key) for key, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({"state": sharded, "param_groups": state["param_groups"]})


def shard_root(model: nn.Module, strategy: ModelParallelStrategy) -> None:
    """Split the parameters of a model over the data-parallel ranks, as one unit; once only.

    Forces are a derivative that is taken inside of the model, and their loss runs backward through that derivative a
    second time. A unit's parameters must be there through all of it, so the whole model is one unit.

    Raises:
        ValueError: a part of the model has been sharded on its own.
    """
    parts = sharded_parts(model)
    if parts:
        raise ValueError(
            f"{', '.join(parts[:3])} of the model has been sharded on its own with fully_shard; its parameters are "
            f"freed before the second backward pass of a loss of forces. Expected an unsharded model: it is sharded as "
            f"a whole by ForceFieldModule.configure_model."
        )
    shard_parameters(model, strategy.device_mesh["data_parallel"])
