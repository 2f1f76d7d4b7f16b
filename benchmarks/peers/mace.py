"""``mace_run_train`` with its defaults, and the training here that is the same."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.common import CLOCK, COLUMNS, CUTOFF, Clock, InOrder, Marked, adopt, run

COMMAND, PREFIX = "mace_run_train", "energy_model.energy_model.mace."
RADIAL = "[16,16]"
SIZES = {"channels": 8, "max_L": 1, "max_ell": 2, "correlation": 2, "num_bessel": 6, "mlp_irreps": "8x0e"}
FLAGS = {
    "channels": "num_channels",
    "num_bessel": "num_radial_basis",
    "mlp_irreps": "MLP_irreps",
    "max_L": "max_L",
    "max_ell": "max_ell",
    "correlation": "correlation",
}
KEYS = dict(zip(COLUMNS, ("rmse_e_per_atom", "rmse_f", "mae_f"), strict=True))


def overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of the training here."""
    found = ["experiment=mace_recipe", "precision=float64", f"model.radial_mlp={RADIAL}"]
    found += [f"model.{name}={value}" for name, value in SIZES.items()]
    found += ["trainer.gradient_clip_val=null"] * ("clip" in options.without)
    found += ["optimizer.groups.0.weight_decay=0"] * ("decay" in options.without)
    if options.stage_two is not None:
        found += ["schedule=two_stage", f"schedule.boundaries=[{options.stage_two}]"]
    return found


def flags(options: argparse.Namespace) -> list[str]:
    """Flags of ``mace_run_train``; all others have their defaults, which are those of the recipe."""
    from ase.data import atomic_numbers

    energies = {atomic_numbers[symbol]: energy for symbol, energy in options.energies.items()}
    found = ["--name=peer", f"--seed={options.seed}", "--device=cpu", f"--E0s={energies}", f"--r_max={CUTOFF}"]
    found += [f"--train_file={options.output / 'train.xyz'}", f"--valid_file={options.output / 'val.xyz'}"]
    found += [f"--{FLAGS[name]}={value}" for name, value in SIZES.items()] + [f"--radial_MLP={RADIAL}"]
    found += ["--energy_key=energy", "--forces_key=forces", f"--max_num_epochs={options.epochs}", "--plot=False"]
    found += ["--ema"] * ("average" not in options.without)
    found += ["--clip_grad=None"] * ("clip" in options.without)
    found += ["--weight_decay=0"] * ("decay" in options.without)
    if options.stage_two is not None:
        found += ["--stage_two", f"--start_stage_two={options.stage_two}"]
    return found


def train(options: argparse.Namespace, command: list[str], folder: Path) -> dict[str, Any]:
    """Losses of steps and errors of epochs of ``mace_run_train``."""
    arguments = flags(options)
    print(COMMAND, " ".join(arguments), flush=True)
    seconds = run([*command, "--peer", json.dumps(arguments)], folder)
    (path,) = (folder / "results").glob("*_train.txt")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [float(row["loss"]) for row in rows if row["mode"] == "opt"]
    epochs = [
        {name: float(row[theirs]) for name, theirs in KEYS.items()}
        for row in rows
        if row["mode"] == "eval" and row["epoch"] is not None
    ]
    return {"steps": steps, "epochs": epochs, "seconds": seconds}


def be(start: Path | None, arguments: list[str]) -> None:
    """Be ``mace_run_train``, from other weights and with other batches if they are given."""
    import mace  # noqa: F401  # before e3nn
    import torch
    from mace import tools
    from mace.cli import run_train
    from mace.tools import torch_geometric

    clock, own_train = Clock(CLOCK), tools.train
    given = torch.load(start, weights_only=True) if start is not None else None

    def marked_train(*, train_loader: Any, **options: Any) -> Any:
        if given is not None:
            train_loader = torch_geometric.dataloader.DataLoader(
                train_loader.dataset, batch_sampler=InOrder(given["order"], itertools.count().__next__)
            )
        trained = own_train(train_loader=Marked(train_loader, clock.mark), **options)
        clock.mark()
        return trained

    tools.train = marked_train
    if given is not None:
        groups = run_train.get_params_options

        def params_options(args: Any, model: Any) -> Any:
            adopt(model, given["weights"])  # before the average copies them
            return groups(args, model)

        run_train.get_params_options = params_options
    sys.argv = [COMMAND, *arguments]
    run_train.main()
