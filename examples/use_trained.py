"""Predict with a trained model: `python examples/use_trained.py outputs/alloy/<date>`.

The config of a run makes the model, its checkpoint has the weights and the statistics of the training set that the
model was made with. The data are needed too, for the type names.
"""

from __future__ import annotations

import sys

import torch
from ase.build import bulk
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.data import Frame, collate, frame_to_sample
from harness.job import build_module
from harness.job.made_with import RecordedStatistics


def main(run: str) -> None:
    """Energy and forces of a rattled copper crystal."""
    config = OmegaConf.load(f"{run}/.hydra/config.yaml")
    data = instantiate(config.data)
    data.setup()
    checkpoint = torch.load(f"{run}/checkpoints/best.ckpt", weights_only=True)
    statistics = RecordedStatistics(checkpoint["made_with"]["statistics"])  # also where the run went on from another
    model = build_module(config, data, statistics).model.eval()
    state, prefix = checkpoint["state_dict"], "model."
    model.load_state_dict({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})

    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    batch = collate([frame_to_sample(Frame(atoms), data.type_names, config.cutoff)])
    predictions = model(batch)
    print(f"energy {predictions['total_energy'].item():.4f} eV")
    for symbol, force in zip(atoms.symbols, predictions["forces"].tolist(), strict=True):
        print(symbol, "force", " ".join(f"{component:8.4f}" for component in force), "eV/Å")


if __name__ == "__main__":
    main(sys.argv[1])
