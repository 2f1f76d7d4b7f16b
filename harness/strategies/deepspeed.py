"""DeepSpeed's ZeRO for force fields: whole checkpoints, float64 labels, steps that end where Lightning's end."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.distributed import sum_over_ranks
from harness.strategies.deepspeed_private import Shard, check_private, optimizer_state_of, refresh_weights, relink
from harness.strategies.extensions import remove_abandoned_locks
from harness.strategies.weights import WholeCheckpoints, copy_to_cpu, gathered, load_weights
from harness.support.lightning_private import is_mid_accumulation

__all__ = ["AccumulatesInWindows", "ZeroStrategy", "keep_whole"]


class AccumulatesInWindows:
    """Mixin before ``DeepSpeedStrategy``: steps of several micro-batches that end where Lightning's end.

    DeepSpeed counts micro-batches across epochs and steps at every k-th, so that the last step of an epoch would go on
    in the next one while Lightning counts anew, and it divides the loss by k once more, after Lightning. Here a step
    ends where Lightning ends it, also a shorter last one, and the loss is divided once.

    Example:
        >>> from lightning.pytorch.strategies import DeepSpeedStrategy
        >>> class WindowedDeepSpeed(AccumulatesInWindows, DeepSpeedStrategy): ...
    """

    handles_gradient_accumulation = False
    """Lightning steps at the end of a window, as without DeepSpeed."""

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """A context that does nothing: ``training_step`` sets the end of a step, and ``no_sync`` refuses ZeRO 2."""
        return nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass, whose gradients DeepSpeed keeps for itself until the last micro-batch of the step."""
        engine, trainer = self.model, self.lightning_module.trainer  # type: ignore[attr-defined]
        engine.set_gradient_accumulation_boundary(not is_mid_accumulation(trainer))
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Backward pass of a loss that is not divided again."""
        done = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)  # type: ignore[misc]
        return cast(Tensor, done)


class ZeroStrategy(AccumulatesInWindows, WholeCheckpoints, DeepSpeedStrategy):  # type: ignore[misc]
    """Lightning's ``DeepSpeedStrategy`` with whole checkpoints in one file, and labels in the dtype that they have.

    DeepSpeed's own checkpoints are folders that only the same number of ranks continues, and that are unpickled without
    restrictions. Here the shards of weights and optimizer are gathered; a checkpoint is like those of other strategies.

    Args:
        stage: parts that are split over the ranks: 1 the optimizer's states, 2 the gradients too, 3 the parameters too.
        options: any other argument of ``DeepSpeedStrategy``.

    Raises:
        ValueError: DeepSpeed is not installed, or there is no such stage.
    """

    needs_cuda = True

    def __init__(self, stage: int = 2, **options: Any) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "A DeepSpeed strategy was chosen, but the package deepspeed is not installed; expected version 0.16 or "
                "newer. Install it with: pip install 'potential-harness[deepspeed]'"
            )
        if stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, found {stage!r}; without ZeRO choose strategy=ddp.")
        super().__init__(stage=stage, **options)
        self._parameters: list[list[nn.Parameter]] = []
        """Parameters of the optimizer, by group, before DeepSpeed puts flat shards into their place."""

    def setup_environment(self) -> None:
        """Join the ranks; DeepSpeed compiles an extension in doing so, and would wait for a lock that was left."""
        if self.cluster_environment is None or self.cluster_environment.local_rank() == 0:
            remove_abandoned_locks()
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Hand model and optimizer to DeepSpeed."""
        self.precision_plugin = _Unrounded(self.precision_plugin.precision)  # type: ignore[arg-type]
        super().setup(trainer)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        if optimizer is not None:
            self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        engine, sharded = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if optimizer is not None:
            every = [parameter for parameters in self._parameters for parameter in parameters]
            check_private(engine.optimizer, every, 3 if self.zero_stage_3 else 2)
        return engine, sharded

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights; with stage 3 on rank 0 only, empty elsewhere."""
        if not self.zero_stage_3:
            return super().lightning_module_state_dict()
        with gathered(cast(nn.Module, self.lightning_module)):
            if not self.is_global_zero:
                return {}
            state = super().lightning_module_state_dict()
            # the gathered parameters are given up at the end of this block
            return {key: copy_to_cpu(value) for key, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole state of the optimizer in the form of torch's ``Optimizer.state_dict``, on rank 0; empty elsewhere."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        number = 0
        for index, (parameters, group) in enumerate(zip(self._parameters, optimizer.param_groups, strict=True)):
            shards = [Shard.of(optimizer, parameter, index) for parameter in parameters]
            of_flat = optimizer_state_of(optimizer, shards[0]) if shards else {}
            for key, value in of_flat.items():
                if key == "step" or not isinstance(value, Tensor) or value.shape != shards[0].flat.shape:
                    wholes = [copy_to_cpu(value) for _ in parameters]
                else:
                    wholes = _gather(shards, [optimizer_state_of(optimizer, shard)[key] for shard in shards])
                for offset, whole in enumerate(wholes):
                    state.setdefault(number + offset, {})[key] = whole
            others = {key: value for key, value in group.items() if key != "params"}
            groups.append({**others, "params": list(range(number, number + len(parameters)))})
            number += len(parameters)
        return {"state": state, "param_groups": groups} if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint from rank 0, in one file."""
        super(DeepSpeedStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, and DeepSpeed's shards of them."""
        load_weights(cast(nn.Module, self.lightning_module), checkpoint["state_dict"], strict)
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:  # type: ignore[union-attr]
            refresh_weights(self.deepspeed_engine.optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state, each rank its shard.

        Raises:
            ValueError: the checkpoint's optimizer has other parameters.
        """
        (saved,) = checkpoint["optimizer_states"]
        found = [len(group["params"]) for group in saved["param_groups"]]
        expected = [len(parameters) for parameters in self._parameters]
        if found != expected:
            raise ValueError(
                f"The checkpoint's optimizer has {found} parameters in its groups, this one has {expected}. Is it the "
                f"same model?"
            )
        optimizer: Any = self.deepspeed_engine.optimizer
        for index, (parameters, group, of_group) in enumerate(
            zip(self._parameters, optimizer.param_groups, saved["param_groups"], strict=True)
        ):
            group.update({key: value for key, value in of_group.items() if key != "params"})
            for number, parameter in zip(of_group["params"], parameters, strict=True):
                shard = Shard.of(optimizer, parameter, index)
                for key, value in saved["state"].get(number, {}).items():
                    state = optimizer_state_of(optimizer, shard)
                    if key == "step" or not isinstance(value, Tensor) or value.shape != shard.shape:
                        state[key] = copy_to_cpu(value)
                    else:
                        if key not in state:
                            state[key] = torch.zeros_like(shard.flat)
                        part = value.flatten()[shard.first : shard.first + shard.length]
                        state[key].detach()[shard.start : shard.start + shard.length].copy_(part)
        if not self.zero_stage_3:
            relink(optimizer)


class _Unrounded(DeepSpeedPrecision):
    """Leaves batches as they are: Lightning's would round float64 energies to the dtype of the model."""

    def convert_input(self, data: Any) -> Any:
        return data


@torch.no_grad()
def _gather(shards: list[Shard], states: list[Tensor]) -> list[Tensor]:
    """Whole states from the shards of all ranks over one sum: an element is with one rank, and 0 with the others."""
    sizes = [shard.shape.numel() for shard in shards]
    wholes = states[0].new_zeros(sum(sizes))
    for shard, state, whole in zip(shards, states, torch.split(wholes, sizes), strict=True):
        part = state[shard.start : shard.start + shard.length]
        whole[shard.first : shard.first + shard.length].copy_(part)
    parts = torch.split(sum_over_ranks(wholes).cpu(), sizes)
    return [part.reshape(shard.shape).clone() for shard, part in zip(shards, parts, strict=True)]


def keep_whole(module: nn.Module, model: nn.Module) -> None:
    """Make a model one unit for ZeRO stage 3, which gathers its parameters before it and gives them up behind it.

    DeepSpeed notices the backward pass of a unit by tensors that go into it and come out of it. So positions, which
    must require gradients there, become an argument of their own, and predictions a tuple; callers see no difference.

    Args:
        module: the one that is handed to DeepSpeed.
        model: the part of it that derives forces.
    """
    from deepspeed.utils import set_z3_leaf_modules

    if not isinstance(model, _Whole):
        kind = type(model)
        model.__class__ = type(f"Whole{kind.__name__}", (_Whole, kind), {})
        set_z3_leaf_modules(module, [type(model)])


class _Whole(nn.Module):
    """Mixed into a model by :func:`keep_whole`."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Predictions of the batch."""
        with torch.inference_mode(False), torch.enable_grad():
            given = batch["pos"]
            position = given.clone() if given.is_inference() else given.detach()
            values = super().__call__(position.requires_grad_(), dict(batch))
        return dict(zip(self._names, values, strict=True))

    def forward(self, position: Tensor, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        predictions = super().forward({**batch, "pos": position})
        self._names = tuple(predictions)
        return tuple(predictions.values())
