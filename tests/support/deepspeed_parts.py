"""DeepSpeed's optimizers on one CPU rank, without each of their undocumented attributes in turn.

    python tests/support/deepspeed_parts.py

Writes a dictionary to stdout: for every stage, the error without any of the attributes, by object and name.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed
import torch
import torch.distributed as dist

from harness.strategies.deepspeed_private import PRIVATE, check_private


class Without:
    """An object that has lost an attribute."""

    def __init__(self, found: Any, name: str) -> None:
        self._found, self._name = found, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._found, name)


def initialized(stage: int) -> tuple[Any, list[Any]]:
    """Optimizer of DeepSpeed's, and its parameters."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    parameters = list(model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine.optimizer, parameters


def error(optimizer: Any, parameters: list[Any], stage: int) -> str | None:
    """Message of the check, or None if it passes."""
    try:
        check_private(optimizer, parameters, stage)
    except RuntimeError as found:
        return str(found)
    return None


def without(what: str, name: str, optimizer: Any, parameters: list[Any]) -> tuple[Any, list[Any]]:
    """Optimizer and parameters, where one kind of object has lost an attribute."""
    if what.startswith("optimizer"):
        return Without(optimizer, name), parameters
    if what.startswith("parameter"):
        return optimizer, [Without(parameter, name) for parameter in parameters]
    mapping = Without(next(filter(None, (parameter._hp_mapping for parameter in parameters))), name)
    return optimizer, [SimpleNamespace(_hp_mapping=mapping)]


def main() -> None:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    seen: dict[int, dict[str, str | None]] = {}
    for stage in (1, 2, 3):
        optimizer, parameters = initialized(stage)
        seen[stage] = {"complete": error(optimizer, parameters, stage)}
        other = "stages 1 and 2" if stage == 3 else "stage 3"
        for what, names in PRIVATE.items():
            if other not in what and not (stage == 3 and what.startswith("mapping")):
                for name in names:
                    seen[stage][f"{name} ({what})"] = error(*without(what, name, optimizer, parameters), stage)
    print(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
