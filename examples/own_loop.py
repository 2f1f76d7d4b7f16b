"""A training loop of your own: a loss and metrics in plain PyTorch, on one rank or several.

    python examples/own_loop.py
    torchrun --nproc-per-node 2 examples/own_loop.py

Both print the same losses: the step values are those of the whole batch on every rank, and so are the gradients. The
model here is a toy whose forces are a linear function of three features of each atom; ranks have unequal numbers of
atoms, and one type of atom may be on one rank only.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness import MeanAbsoluteError, MeanSquaredError, MetricsManager, RootMeanSquaredError, step_together
from harness.distributed import gradient_scale

TYPE_NAMES = ["H", "O"]


def make_batch(step: int, rank: int, num_ranks: int) -> dict[str, Tensor]:
    """This rank's part of 12 small molecules; the molecules depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    molecules = []
    for size in torch.randint(2, 7, (12,), generator=generator).tolist():
        features = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        types = torch.randint(2, (size,), generator=generator)
        forces = features * (1.0 + types.unsqueeze(-1)) + 0.1 * torch.randn(features.shape, generator=generator)
        molecules.append({"features": features, "atom_types": types, "forces": forces})
    mine = molecules[rank::num_ranks]
    return {name: torch.cat([molecule[name] for molecule in mine]) for name in mine[0]}


class LinearForces(nn.Module):
    """Forces ``[num_atoms, 3]`` as one matrix times the features."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions by field name."""
        return {"forces": batch["features"] @ self.matrix}


def main() -> None:
    """Train for 5 steps and print the loss, its gradient and the errors of the epoch."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if num_ranks > 1 else 0
    model = LinearForces()
    wrapped = DistributedDataParallel(model) if num_ranks > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3)

    forces_mse = {"field": "forces", "metric": MeanSquaredError(), "coeff": 1, "per_type": True, "name": "forces_mse"}
    loss = MetricsManager([forces_mse], type_names=TYPE_NAMES)
    metrics = MetricsManager(
        [{"field": "forces", "metric": RootMeanSquaredError()}, {"field": "forces", "metric": MeanAbsoluteError()}]
    )
    for step in range(5):
        batch = make_batch(step, rank, num_ranks)
        # loss and metrics share one all-reduce; with a loss alone: values = loss(wrapped(batch), batch)
        values, _ = step_together(loss, metrics, preds=wrapped(batch), target=batch)
        optimizer.zero_grad()
        # DDP averages gradients over the ranks; this factor makes the average the gradient of the whole batch
        (values.weighted_sum * gradient_scale()).backward()
        if rank == 0:
            numbers = values.to_host()  # the only place where the host waits for the device
            shown = " ".join(f"{name} {number:.10f}" for name, number in numbers.items())
            print(f"step {step} {shown} gradient {model.matrix.grad.norm().item():.10f}")
        optimizer.step()

    epoch = {**loss.compute(prefix="loss/"), **metrics.compute(prefix="metric/")}  # on all ranks
    if rank == 0:
        for name, value in epoch.items():
            print(f"epoch {name} {value.item():.10f}")
    if num_ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
