"""Errors of energies and forces by number formats: the same weights in float32, TF32 and bf16-mixed beside float64."""

from __future__ import annotations

import torch
from common import Batch, Sizes, alloy, make_model, on_device
from torch import Tensor, nn
from training import bare_loss

FORMATS = {
    "float32": ("float32", "highest", False),
    "float32 on float64 positions": ("float64", "highest", False),
    "TF32 (`matmul_precision=high`)": ("float32", "high", False),
    "bf16-mixed": ("float32", "highest", True),
}
"""Precision of the batch and of matrix products, and autocast to bfloat16."""


def predicted(
    model: nn.Module, batch: Batch, device: torch.device, matmul: str, autocast: bool
) -> tuple[Tensor, Tensor]:
    """Energies per atom and forces, float64 on the host."""
    torch.set_float32_matmul_precision(matmul)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            found = model.eval()(on_device(batch, device))
    finally:
        torch.set_float32_matmul_precision("highest")
    energies = found["total_energy"].detach().double().cpu()[:, 0] / batch["num_atoms"].double()
    return energies, found["forces"].detach().double().cpu()


def table(name: str, device: torch.device) -> str:
    """Table of the errors of a model, after a short training of it."""
    data, batches = alloy(device, "float64")
    single = [
        {
            key: value.float() if value.dtype == torch.float64 and key != "total_energy" else value
            for key, value in b.items()
        }
        for b in batches
    ]
    model = make_model(name, data, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for number in range(5 * Sizes.of(device).steps):  # forces of an untrained model are small, and their errors large
        batch = on_device(single[number % 2], device)
        optimizer.zero_grad()
        bare_loss(model.train()(batch), batch).backward()
        optimizer.step()
    exact = make_model(name, data, device, "float64")
    exact.load_state_dict(model.state_dict())
    batch = batches[0]
    reference = predicted(exact, batch, device, "highest", False)
    spread = (reference[0] - reference[0].mean()).square().mean().sqrt()
    force = reference[1].square().mean().sqrt()
    lines = [
        f"Root mean square deviations from the same weights in float64, after {5 * Sizes.of(device).steps} steps of "
        f"training; {len(batch['num_atoms'])} structures, whose energies per atom scatter by {1e3 * spread:.1f} meV, "
        f"and whose forces are {1e3 * force:.1f} meV/Å.",
        "",
        "| | energy (meV/atom) | of the scatter | forces (meV/Å) | of the forces |",
        "| --- | --- | --- | --- | --- |",
    ]
    for label, (dtype, matmul, autocast) in FORMATS.items():
        try:
            found = predicted(model, batch if dtype == "float64" else single[0], device, matmul, autocast)
        except RuntimeError as error:  # as e3nn says under autocast
            lines.append(f"| {label} | does not run: {str(error).splitlines()[0][:100]} | | | |")
            continue
        energy, forces = ((one - other).square().mean().sqrt() for one, other in zip(found, reference, strict=True))
        lines.append(
            f"| {label} | {1e3 * energy:.2g} | {100 * energy / spread:.2g} % | {1e3 * forces:.2g} | "
            f"{100 * forces / force:.2g} % |"
        )
    return "\n".join(lines)
