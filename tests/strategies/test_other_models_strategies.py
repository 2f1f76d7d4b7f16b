"""Models of other packages under every strategy, beside one process: real ranks, the real DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from strategies.test_strategies import PARAMETERS, VALUES, Seen, launch, same_training, write_frames
from support.other_models import INSTALLED

MODELS = [name for name in ("mace", "nequip") if name in INSTALLED]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not INSTALLED, reason="none of these packages is installed"),
]

ALONE = {
    "exact": "single,adam,64-true",
    "float32": "single,adam,32-true",
    "accumulate": "single,adam,64-true,accumulate",
    "ema": "single,adam,64-true,ema",
}
# every one with the training of one process that it is to equal
TWO = {
    "ddp": ("ddp,adam,64-true", "exact"),
    "ddp_accumulate": ("ddp,adam,64-true,accumulate", "accumulate"),
    "ddp_ema": ("ddp,adam,64-true,ema", "ema"),
    "ddp_rank_without_frames": ("ddp,adam,64-true,eval=1", "exact"),
    "fsdp": ("fsdp,adam,32-true", "float32"),
    "fsdp_rank_without_frames": ("fsdp,adam,32-true,eval=1", "float32"),
    "zero2": ("zero2,adam,32-true", "float32"),
    "zero3": ("zero3,adam,32-true", "float32"),
}
MOVED = 4e-3  # of a parameter in the 4 to 8 steps


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    model, folder = request.param, tmp_path_factory.mktemp(request.param)
    frames = write_frames(folder / "frames.xyz")
    two = [f"{case},model={model},name={name}" for name, (case, _) in TWO.items()]
    alone = [f"{case},model={model},name={name}" for name, case in ALONE.items()]
    alone.append(f"single,adam,64-true,from={folder}/ddp-0.ckpt,model={model},name=continued")
    return launch(folder, 2, frames, *two) | launch(folder, 1, frames, *alone)


@pytest.mark.parametrize("name", list(TWO))
def test_two_ranks_train_other_models_as_one_process(trained: dict[str, list[Seen]], name: str) -> None:
    expected = TWO[name][1]
    limits = (10 * VALUES, 10 * PARAMETERS) if expected == "float32" else (1e-8, 1e-8)
    same_training(trained[expected][0], trained[name], *limits, moved=MOVED)


def write_mixed(path: Path) -> Path:
    """Crystals, and beside them clusters, a slab, and atoms without neighbours, which have no stress."""
    random, frames = np.random.default_rng(0), []
    for number in range(16):
        kind = number % 4
        if kind == 0:
            atoms = bulk("Cu", a=3.7, cubic=True) * (1, 1, 1 + number // 8)
        elif kind == 1:
            atoms = Atoms("Cu3", [[0, 0, 0], [2.5, 0, 0], [0, 2.6, 0.4]])  # without a cell
        elif kind == 2:
            atoms = bulk("Cu", a=3.7, cubic=True)
            atoms.pbc = (True, True, False)
        else:
            atoms = Atoms("Cu", cell=[9.0] * 3, pbc=number == 3)
        atoms.symbols = random.choice(["Cu", "Ag", "Au"], len(atoms))
        atoms.rattle(0.1, rng=random)
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_forces()
        if atoms.pbc.all():
            atoms.get_stress()
        frames.append(atoms)
    write(path, frames)
    return path


@pytest.mark.parametrize("name", INSTALLED)
def test_molecules_slabs_and_lone_atoms_under_a_loss_of_stress_on_two_ranks(name: str, tmp_path: Path) -> None:
    frames = write_mixed(tmp_path / "mixed.xyz")
    common = f"adam,64-true,masked,eval=1,model={name}"  # one frame in an evaluation: a rank has none
    found = launch(tmp_path, 2, frames, f"ddp,{common},name=two") | launch(
        tmp_path, 1, frames, f"single,{common},name=one"
    )
    (one,) = found["one"]
    assert min(step["loss/stress_mse"] for step in one["steps"]) >= 0  # not NaN: each step has a crystal
    assert all(bool(value.isfinite().all()) for value in one["parameters"].values())
    same_training(one, found["two"], 1e-8, 1e-8, moved=MOVED)


def test_a_checkpoint_of_another_model_goes_on(trained: dict[str, list[Seen]]) -> None:
    (found,) = trained["continued"]
    assert 0 < len(found["steps"]) < len(trained["exact"][0]["steps"])
    same_training(trained["exact"][0], [found], 1e-8, 1e-8, moved=MOVED)
