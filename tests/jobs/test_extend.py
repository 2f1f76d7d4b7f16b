"""The examples of the pages on adding a part: alone and together on two ranks, each shows what its page says."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from support.commands import NO_FIGURES, ROOT, Finished, read_csv, run, train

pytestmark = pytest.mark.timeout(300)

EXAMPLES = ROOT / "examples" / "extend"
PATHS = f"{ROOT}:{EXAMPLES}"

PARTS = (
    "--config-dir",
    str(EXAMPLES / "conf"),
    "model=morse",
    "loss=cauchy",
    "+callbacks.force_scale={_target_: force_scale.ForceScale, every_n_steps: 2}",
    "+callbacks.weights={_target_: weights_of_ranks.WeightsOfRanks}",
    "trainer=cpu",
    "logger=csv",
    *NO_FIGURES,
    "data.num_frames=24",
    "data.split={val:4,test:4}",
    "data.batch_size=4",
    "trainer.log_every_n_steps=1",
    "max_epochs=6",
    "optimizer.lr=0.02",
)

# what every rank has in the end, and whether the hook of its strategy was called
WEIGHTS_OF_RANKS = """
import torch
from lightning.pytorch import Callback


class WeightsOfRanks(Callback):
    def on_train_end(self, trainer, pl_module):
        state = {name: value.detach().clone() for name, value in pl_module.model.named_parameters()}
        torch.save((type(trainer.strategy).__name__, state), f"weights-{trainer.global_rank}.pt")
"""


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "extend").glob("*.md")), ids=lambda path: path.stem)
def test_page_is_short_and_shows_one_whole_example(page: Path) -> None:
    text = page.read_text()
    included = re.findall(r'--8<-- "(examples/extend/\w+\.py)"', text)
    assert len(included) == 1
    assert (ROOT / included[0]).is_file()
    assert len(text.splitlines()) < 80
    assert f"extend/{page.name}" in (ROOT / "mkdocs.yml").read_text()
    assert f"docs/extend/{page.name}" in (ROOT / "README.md").read_text()
    assert f"docs/extend/{page.name}" in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_example_is_on_a_page() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "extend").glob("*.md"))
    files = [path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".yaml")]
    assert len(files) == 6
    for path in files:
        assert f'--8<-- "{path.relative_to(ROOT)}"' in pages


def test_metric_is_checked_by_its_script(tmp_path: Path) -> None:
    done = run([sys.executable, str(EXAMPLES / "cauchy_loss.py")], tmp_path)
    assert done.code == 0, done.err
    laws = done.out.partition("These laws hold: ")[2].strip().split(", ")
    assert {"merge", "missing labels", "atom types", "checkpoint", "gradient", "ranks"} < set(laws)


def trained(folder: Path, *overrides: str, ranks: int) -> Finished:
    folder.mkdir(parents=True)
    (folder / "weights_of_ranks.py").write_text(WEIGHTS_OF_RANKS)
    done = train(*PARTS, *overrides, folder=folder, ranks=ranks, PYTHONPATH=f"{PATHS}:{folder}")
    assert done.code == 0, done.err[-4000:]
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return trained(tmp_path_factory.mktemp("alone") / "run", ranks=1)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    strategy = "strategy._target_=rounded_gradients.RoundedGradients"
    return trained(tmp_path_factory.mktemp("rounded") / "run", strategy, ranks=2)


def column(done: Finished, name: str) -> list[float]:
    return [row[name] for row in read_csv(done.runs[0]) if name in row]


def test_metric_and_model_learn(alone: Finished) -> None:
    losses, errors = column(alone, "train_loss_epoch/weighted_sum"), column(alone, "val0_epoch/forces_rmse")
    assert losses[-1] < 0.3 * losses[0]
    assert errors[-1] < 0.4 * errors[0]
    by_type = [column(alone, f"train_loss_epoch/forces_{name}")[-1] for name in ("Cu", "Pd", "Ag", "Au")]
    assert column(alone, "train_loss_epoch/forces")[-1] == pytest.approx(sum(by_type) / 4)


@pytest.mark.slow
def test_callback_logs_every_second_step_once(alone: Finished, rounded: Finished) -> None:
    for done in (alone, rounded):
        with (done.runs[0] / "csv" / "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["force_scale/ratio"]]
        assert steps == list(range(1, 24, 2))
    ratios = column(alone, "force_scale/ratio")
    assert ratios[0] < 0.5
    assert ratios[-1] == pytest.approx(1, abs=0.1)
    # labels and predictions of both ranks: before the first rounding has come far, those of one process
    assert column(rounded, "force_scale/ratio")[0] == pytest.approx(ratios[0], rel=1e-5)


def test_callback_refuses_a_loss_without_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from force_scale import ForceScale

    callback, loss = ForceScale(), SimpleNamespace(value_names=["forces_mse"])
    callback.check_job(None, SimpleNamespace(loss=loss), "fit")
    loss.value_names = ["total_energy_mse"]
    with pytest.raises(ValueError, match=r"its values are total_energy_mse.*Choose loss=energy_force"):
        callback.check_job(None, SimpleNamespace(loss=loss), "fit")
    callback.check_job(None, SimpleNamespace(loss=loss), "test")
    with pytest.raises(ValueError, match="at least 1, found 0"):
        ForceScale(every_n_steps=0)


def test_callback_is_asked_before_the_training(tmp_path: Path) -> None:
    parts = ("loss=energy", "metrics=energy", "+callbacks.force_scale._target_=force_scale.ForceScale", "logger=csv")
    done = train(*parts, "data.num_frames=24", "data.split={val:4,test:4}", folder=tmp_path, PYTHONPATH=PATHS)
    assert done.code != 0
    assert "error: ForceScale compares predicted forces with labels, but the loss has none" in done.err
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.slow
def test_strategy_on_two_ranks_is_one_process_to_its_rounding(alone: Finished, rounded: Finished) -> None:
    (_, expected), (first, one), (second, other) = (
        torch.load(done.folder / f"weights-{rank}.pt", weights_only=True)
        for done, rank in ((alone, 0), (rounded, 0), (rounded, 1))
    )
    assert first == second == "RoundedGradients"
    assert one.keys() == other.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(one[name], other[name]), f"{name} differs between the ranks"
        torch.testing.assert_close(one[name], value, rtol=1e-2, atol=1e-2)
        assert (one[name] - value).abs().max() > 1e-6, "nothing was rounded: was the hook called?"
    for name in ("train_loss_epoch/weighted_sum", "val0_epoch/forces_rmse"):
        assert column(rounded, name) == pytest.approx(column(alone, name), rel=1e-3)
    # values are no gradients: before the first step they are those of one process
    assert column(rounded, "train_loss_step/weighted_sum")[:1] == pytest.approx(
        column(alone, "train_loss_step/weighted_sum")[:1], rel=1e-6
    )


def test_model_forces_and_stress_are_derivatives_of_its_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from morse import MorseEnergy

    from harness.models import ForceField

    torch.manual_seed(1)
    energy = MorseEnergy(2, cutoff=5.0).double()
    torch.nn.init.normal_(energy.logarithms, std=0.3)
    model = ForceField(energy).eval()
    positions = np.random.default_rng(2).uniform(0, 6, (5, 3))

    def predict(moved: np.ndarray) -> dict[str, torch.Tensor]:
        return model(batch_of(Atoms("H5", moved, cell=[6, 6.5, 7], pbc=True)))

    found, step = predict(positions), 1e-4
    for atom, axis in ((0, 0), (3, 2)):
        energies = []
        for sign in (1, -1):
            moved = positions.copy()
            moved[atom, axis] += sign * step
            energies.append(predict(moved)["total_energy"].item())
        assert found["forces"][atom, axis].item() == pytest.approx(-(energies[0] - energies[1]) / (2 * step), rel=1e-5)
    torch.testing.assert_close(found["forces"].sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(found["stress"], found["stress"].transpose(1, 2))
    assert model(batch_of(Atoms(cell=[6, 6, 6], pbc=True)))["forces"].shape == (0, 3)


def batch_of(atoms: Atoms) -> dict[str, torch.Tensor]:
    from vesin import NeighborList

    center, neighbor, shifts = (
        NeighborList(cutoff=5.0, full_list=True).compute(atoms.positions, atoms.cell[:], True, "ijS")
        if len(atoms)
        else (np.zeros(0), np.zeros(0), np.zeros((0, 3)))
    )
    number = len(atoms)
    return {
        "pos": torch.tensor(atoms.positions, dtype=torch.float64),
        "cell": torch.tensor(atoms.cell[:], dtype=torch.float64)[None],
        "pbc": torch.ones(1, 3, dtype=torch.bool),
        "batch": torch.zeros(number, dtype=torch.int64),
        "num_atoms": torch.tensor([number]),
        "atom_types": torch.arange(number) % 2,
        "edge_index": torch.tensor(np.stack((center, neighbor)).astype(np.int64)),
        "edge_cell_shift": torch.tensor(shifts, dtype=torch.float64),
    }
