"""How ranks share a training: what each Lightning strategy needs so that results stay exact.

Every strategy here reports the values, and takes the steps, of one process on the whole batch, and writes the same
kind of checkpoint: one file with the whole model and the whole optimizer, which any of them continues on any number of
ranks.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from harness.distributed import (
    ProcessGroup,
    data_parallel_size,
    global_rank,
    join,
    join_shards,
    launched_ranks,
    merge_over_ranks,
    shard_parameters,
    sharded_parts,
    split_like,
)

__all__ = [
    "AccumulatesInWindows",
    "FullyShardedStrategy",
    "ZeroStrategy",
    "auto_strategy",
    "check_strategy",
    "cluster_plugins",
    "connect",
    "data_parallel",
    "data_parallel_group",
    "data_parallel_ranks",
    "deep_speed",
    "fully_sharded",
    "keep_whole",
    "load_weights",
    "refuse_folder",
    "shard_root",
    "single_device",
    "splits_parameters",
]


# --- choices of conf/strategy ---


def auto_strategy(**options: Any) -> Strategy | str:
    """DDP where a launcher has started several ranks, one device otherwise."""
    return data_parallel(**options) if launched_ranks() > 1 else "auto"


def single_device(**options: Any) -> str:
    """One device and no process group.

    Args:
        options: such as ``timeout``, which nothing waits for here.

    Raises:
        ValueError: a launcher has started several ranks: each would train on its own and write the same files.
    """
    if launched_ranks() > 1:
        raise ValueError(
            f"strategy=single is for one process, but {launched_ranks()} ranks have been started: each would train all "
            f"of the data on its own. Start it without torchrun, or choose strategy=ddp."
        )
    return "auto"


def data_parallel(**options: Any) -> Strategy:
    """DDP for force fields: every rank holds the whole model and the whole optimizer.

    Buffers (energy shifts, basis functions) are the same on all ranks and never change, so that sending them before
    every forward pass would only cost time. Gradients live in DDP's buckets.

    Args:
        options: of Lightning's ``DDPStrategy`` and torch's ``DistributedDataParallel``, such as ``static_graph`` and
            ``timeout``.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    # the name of the option from torch 2.13 on, and before
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(**{sync_buffers: False, "gradient_as_bucket_view": True, **options})


def fully_sharded(**options: Any) -> FullyShardedStrategy:
    """FSDP2 for force fields: parameters, gradients and optimizer states are split over the ranks.

    Args:
        options: of Lightning's ``ModelParallelStrategy``, such as ``timeout``, and ``tensor_parallel_size`` for groups
            of ranks that work on the same batch.
    """
    return FullyShardedStrategy(**options)


def deep_speed(stage: int = 2, **options: Any) -> ZeroStrategy:
    """DeepSpeed's ZeRO for force fields.

    Args:
        stage: what is split over the ranks: 1 the optimizer's states, 2 the gradients too, 3 the parameters too.
        options: of Lightning's ``DeepSpeedStrategy``, such as ``timeout``.

    Raises:
        ValueError: DeepSpeed is not installed, or there is no such stage.
    """
    return ZeroStrategy(stage=stage, **options)


def cluster_plugins() -> list[SLURMEnvironment]:
    """What a trainer needs to know of the cluster: where srun has started the ranks, not to requeue the job itself.

    Lightning would, on SIGUSR1, beside a checkpoint of its own that a restart prefers to any other. Here
    :class:`~harness.callbacks.ResumeCheckpoint` saves, and ``launch/slurm.sbatch`` puts the job back into the queue.
    """
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


# --- strategies ---


class FullyShardedStrategy(ModelParallelStrategy):
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
        if self._data_parallel_size == "auto":
            # Lightning would make it the number of nodes, and let all ranks of a node work on the same batch
            ranks, together = self.num_nodes * self.num_processes, cast(int, self._tensor_parallel_size)
            if ranks % together:
                raise ValueError(
                    f"tensor_parallel_size={together} does not divide the {ranks} ranks: all groups are of that size."
                )
            self._data_parallel_size = ranks // together
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0; empty elsewhere."""
        state = {
            key: _whole(value, self.is_global_zero)
            for key, value in cast(nn.Module, self.lightning_module).state_dict().items()
        }
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole state of the optimizer in the form of torch's ``Optimizer.state_dict``, on rank 0; empty elsewhere."""
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        whole = {
            number: {key: _whole(value, self.is_global_zero) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        return {"state": whole, "param_groups": state["param_groups"]} if self.is_global_zero else {}

    # Lightning loads weights and optimizer before the module has seen the checkpoint, which may have other metrics.
    # Here a checkpoint is read, shown to the module and then loaded, as with every other strategy.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the optimizer's state comes from the checkpoint that the trainer has read."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: weights and optimizer are taken from it later."""
        refuse_folder(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, each rank its shard."""
        load_weights(cast(nn.Module, self.lightning_module), checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state, each rank its shard."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                number: {key: _like(value, parameters[number], key) for key, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({"state": sharded, "param_groups": state["param_groups"]})


class AccumulatesInWindows:
    """To be put before ``DeepSpeedStrategy``: steps of several micro-batches that end where Lightning's end.

    DeepSpeed counts micro-batches across epochs and steps at every k-th, so that the last step of an epoch would go on
    in the next one while Lightning counts anew, and it divides the loss by k once more, after Lightning. Here Lightning
    says where a step ends, also a shorter last one, and the loss is divided once.

    Example:
        >>> from lightning.pytorch.strategies import DeepSpeedStrategy
        >>> class WindowedDeepSpeed(AccumulatesInWindows, DeepSpeedStrategy): ...
    """

    handles_gradient_accumulation = False
    """Lightning steps at the end of a window, as without DeepSpeed."""

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """Nothing: DeepSpeed is told the end of a step, and its ``no_sync`` refuses ZeRO 2."""
        return nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass, whose gradients DeepSpeed keeps for itself until the last micro-batch of the step."""
        engine, trainer = self.model, self.lightning_module.trainer  # type: ignore[attr-defined]
        engine.set_gradient_accumulation_boundary(not trainer.fit_loop._should_accumulate())
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Backward pass of a loss that is not divided again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)  # type: ignore[misc]


class ZeroStrategy(AccumulatesInWindows, DeepSpeedStrategy):  # type: ignore[misc]
    """Lightning's ``DeepSpeedStrategy`` with whole checkpoints in one file, and labels in the dtype that they have.

    DeepSpeed's own checkpoints are folders that only the same number of ranks continues, and that are unpickled without
    restrictions. Here the shards of weights and optimizer are gathered; a checkpoint is what other strategies write.

    Args:
        stage: what is split over the ranks: 1 the optimizer's states, 2 the gradients too, 3 the parameters too.
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

    def setup(self, trainer: Trainer) -> None:
        """Hand model and optimizer to DeepSpeed."""
        self.precision_plugin = _Unrounded(self.precision_plugin.precision)  # type: ignore[arg-type]
        super().setup(trainer)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        if optimizer is not None:
            self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights; with stage 3 on rank 0 only, empty elsewhere."""
        if not self.zero_stage_3:
            return super().lightning_module_state_dict()
        with _gathered(cast(nn.Module, self.lightning_module)):
            if not self.is_global_zero:
                return {}
            state = super().lightning_module_state_dict()
            # the gathered parameters are given up at the end of this block
            return {key: _copy(value) for key, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole state of the optimizer in the form of torch's ``Optimizer.state_dict``, on rank 0; empty elsewhere."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        number = 0
        for index, (parameters, group) in enumerate(zip(self._parameters, optimizer.param_groups, strict=True)):
            shards = [_Shard.of(optimizer, parameter, index) for parameter in parameters]
            of_flat = optimizer.optimizer.state.get(shards[0].flat, {}) if shards else {}
            for key, value in of_flat.items():
                if key == "step" or not isinstance(value, Tensor) or value.shape != shards[0].flat.shape:
                    wholes = [_copy(value) for _ in parameters]
                else:
                    wholes = _gather(shards, [optimizer.optimizer.state[shard.flat][key] for shard in shards])
                for offset, whole in enumerate(wholes):
                    state.setdefault(number + offset, {})[key] = whole
            others = {key: value for key, value in group.items() if key != "params"}
            groups.append({**others, "params": list(range(number, number + len(parameters)))})
            number += len(parameters)
        return {"state": state, "param_groups": groups} if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint from rank 0, in one file."""
        super(DeepSpeedStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the optimizer's state comes from the checkpoint that the trainer has read."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: weights and optimizer are taken from it later."""
        refuse_folder(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, and DeepSpeed's shards of them."""
        load_weights(cast(nn.Module, self.lightning_module), checkpoint["state_dict"], strict)
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:  # type: ignore[union-attr]
            self.deepspeed_engine.optimizer.refresh_fp32_params()

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
                shard = _Shard.of(optimizer, parameter, index)
                for key, value in saved["state"].get(number, {}).items():
                    state = optimizer.optimizer.state[shard.flat]
                    if key == "step" or not isinstance(value, Tensor) or value.shape != shard.shape:
                        state[key] = _copy(value)
                    else:
                        if key not in state:
                            state[key] = torch.zeros_like(shard.flat)
                        part = value.flatten()[shard.first : shard.first + shard.length]
                        state[key].detach()[shard.start : shard.start + shard.length].copy_(part)
        if not self.zero_stage_3:  # DeepSpeed's own views of the states are made anew after the next step
            optimizer._hp_optimizer_states_linked = False


class _Unrounded(DeepSpeedPrecision):
    """Leaves batches as they are: Lightning's would round float64 energies to the dtype of the model."""

    def convert_input(self, data: Any) -> Any:
        return data


@dataclass(frozen=True)
class _Shard:
    """Which elements of a parameter are with this rank, and where in a flat tensor of several parameters."""

    flat: Tensor
    start: int
    first: int
    length: int
    shape: torch.Size

    @classmethod
    def of(cls, optimizer: Any, parameter: Any, group: int) -> _Shard:
        """Shard of a parameter in the optimizer of DeepSpeed's that has it, in the group of that number."""
        if hasattr(parameter, "ds_id"):  # stage 3
            part, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = length * optimizer._get_param_partition_rank(parameter)
            rest = max(parameter.ds_numel - first, 0)  # the last shard is padded
            return cls(
                optimizer.fp32_partitioned_groups_flat[part], start, first, min(length, rest), parameter.ds_shape
            )
        flat, mapping = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:  # all of it is with other ranks
            return cls(flat, 0, 0, 0, parameter.shape)
        place, source = mapping.hp_fragment_address, mapping.lp_fragment_address
        return cls(flat, place.start, source.start, place.numel, parameter.shape)


@torch.no_grad()
def _gather(shards: list[_Shard], states: list[Tensor]) -> list[Tensor]:
    """Whole states from the shards of all ranks over one sum: an element is with one rank, and 0 with the others."""
    sizes = [shard.shape.numel() for shard in shards]
    wholes = states[0].new_zeros(sum(sizes))
    for shard, state, whole in zip(shards, states, torch.split(wholes, sizes), strict=True):
        part = state[shard.start : shard.start + shard.length]
        whole[shard.first : shard.first + shard.length].copy_(part)
    merged, _ = merge_over_ranks(wholes, wholes.new_empty(0))
    parts = torch.split(merged.cpu(), sizes)
    return [part.reshape(shard.shape).clone() for shard, part in zip(shards, parts, strict=True)]


def _whole(value: Any, keep: bool) -> Any:
    """What may be split over the ranks, joined, on the CPU; None where it is not kept. All ranks must call it."""
    joined = join_shards(value) if isinstance(value, Tensor) else value
    return _copy(joined) if keep else None


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


# --- what others ask of a strategy ---


def connect(trainer: Trainer) -> None:
    """Make the process group that the trainer's strategy would make, in a way that restarts of the ranks do not upset.

    See :func:`harness.distributed.join`. Strategies take a group that is there as it is.
    """
    strategy: Any = trainer.strategy
    if launched_ranks() == 1 or not hasattr(strategy, "_get_process_group_backend"):
        return
    device = strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join(strategy._get_process_group_backend(), strategy._timeout, device)


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


def keep_whole(module: nn.Module, model: nn.Module) -> None:
    """Make a model one unit for ZeRO stage 3, which gathers its parameters before it and gives them up behind it.

    DeepSpeed notices the backward pass of a unit by tensors that go into it and come out of it. So positions, which
    must require gradients there, become an argument of their own, and predictions a tuple; callers see no difference.

    Args:
        module: what is handed to DeepSpeed.
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


def splits_parameters(strategy: Strategy) -> bool:
    """Whether a rank holds only a part of each parameter."""
    if isinstance(strategy, DeepSpeedStrategy):
        return bool(strategy.zero_stage_3)
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def data_parallel_group(strategy: Strategy) -> ProcessGroup | None:
    """The ranks that share a batch with this one, if the strategy splits the world; None for all of them."""
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    mesh = strategy.device_mesh["data_parallel"]
    return None if mesh.size() == strategy.world_size else mesh.get_group()


def data_parallel_ranks(trainer: Trainer | None) -> tuple[int, int]:
    """Number of this rank among those that share a batch, and how many they are.

    Args:
        trainer: what trains; without one, all ranks of the process group share a batch.
    """
    ranks = None if trainer is None else getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return (ranks["rank"], ranks["num_replicas"]) if ranks else (global_rank(), data_parallel_size())


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


def check_strategy(
    strategy: Strategy | str, accelerator: str, precision: str, callbacks: Iterable[Callback] = ()
) -> None:
    """Refuse what cannot train forces, or not exactly, before any training.

    Args:
        strategy: what trains.
        accelerator: ``cpu``, ``cuda``, ``gpu`` or ``auto``.
        precision: of the trainer.
        callbacks: of the trainer.

    Raises:
        ValueError: with the reason and an alternative.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "Lightning's FSDPStrategy (FSDP1) is not for force fields: it flattens parameters into buffers that it "
            "frees behind the forward pass, in which forces are derived and which their loss goes through once more. "
            "Expected FSDP2: strategy=fsdp, or harness.strategies.fully_sharded()."
        )
    if type(strategy) is DeepSpeedStrategy:  # what others derive from it is theirs to answer for
        raise ValueError(
            "Lightning's DeepSpeedStrategy rounds energies to float32, does not shard models that derive forces (stage "
            "3), and writes folders that are unpickled without restrictions. Expected strategy=deepspeed_zero2, or "
            "harness.strategies.deep_speed(stage=2)."
        )
    if isinstance(strategy, ZeroStrategy) and strategy.needs_cuda and on_cpu:
        raise ValueError(
            "DeepSpeed's strategies need CUDA GPUs, found accelerator=cpu. Choose strategy=ddp or strategy=fsdp there."
        )
    _check_precision(strategy, on_cpu, precision)
    if isinstance(strategy, ModelParallelStrategy | ZeroStrategy):
        averaging = [type(each).__name__ for each in callbacks if isinstance(each, WeightAveraging)]
        if averaging:
            raise ValueError(
                f"{averaging[0]} copies the whole model, but {type(strategy).__name__} splits it, or its master "
                f"weights, over the ranks. Leave the callback out, or choose strategy=ddp."
            )


def _check_precision(strategy: Strategy | str, on_cpu: bool, precision: str) -> None:
    if precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
        raise ValueError(
            f"precision={precision} would round positions and labels too. Expected 32-true, 64-true, or bf16-mixed, "
            f"which rounds within the layers of the network only."
        )
    if precision in ("16-mixed", "16") and on_cpu:
        raise ValueError(
            "precision=16-mixed needs a GPU: on CPUs Lightning would use bf16-mixed instead. Expected bf16-mixed, "
            "32-true or 64-true there."
        )
    if isinstance(strategy, ZeroStrategy) and precision not in ("32-true", "32"):
        raise ValueError(
            f"precision={precision} with DeepSpeed: it keeps its weights in float32, and in lower precision casts the "
            f"whole model, positions included. Expected 32-true; for {precision} choose strategy=ddp."
        )
    if isinstance(strategy, ModelParallelStrategy) and precision not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise ValueError(
            f"precision={precision} with FSDP: Lightning's ModelParallelStrategy does not have it. Expected 32-true or "
            f"bf16-mixed; for {precision} choose strategy=ddp."
        )
