"""Parity plots: errors of all data of all ranks, panels, samples, and where the pictures go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from matplotlib.figure import Figure
from PIL import Image
from support.commands import read_wandb
from support.lightning_ranks import Ranks
from support.spawning import spawn
from torch.utils.data import DataLoader

from harness.callbacks import ParityPlot, parity
from harness.loggers import WandbLogger

Batch = dict[str, torch.Tensor]
NAMES = ["H", "C", "O", "N", "F", "S", "Cl", "Br", "P", "Si", "Na", "K"]


class Predicted(LightningModule):
    """A model whose predictions are in its batches."""

    def __init__(self, type_names: list[str] | None = None) -> None:
        super().__init__()
        self.type_names = type_names
        self.parameter = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        return self.parameter * 1.0

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> Batch:
        return {name.removeprefix("predicted_"): batch[name] for name in batch if name.startswith("predicted_")}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def batch_of(seed: int, num_atoms: list[int], types: list[int], error: float = 0.1) -> Batch:
    """Random labels and predictions of a few structures; some have no label."""
    random = np.random.default_rng(seed)
    number = sum(num_atoms)
    shapes = {"total_energy": (len(num_atoms), 1), "forces": (number, 3), "stress": (len(num_atoms), 3, 3)}
    batch = {"num_atoms": torch.tensor(num_atoms), "atom_types": torch.tensor(random.choice(types, number))}
    for name, shape in shapes.items():
        reference = random.normal(size=shape)
        batch[f"predicted_{name}"] = torch.tensor(reference + error * random.normal(size=shape))
        reference[0] = np.nan if seed % 2 else reference[0]
        batch[name] = torch.tensor(reference)
    return batch


def expected(batches: list[Batch], name: str, kind: int | None = None) -> tuple[int, float, float]:
    """Number of labels, MAE and RMSE of all batches in NumPy."""
    errors = []
    for batch in batches:
        error = (batch[f"predicted_{name}"] - batch[name]).numpy()
        if name == "total_energy":
            error = error / batch["num_atoms"].numpy()[:, None]
        errors.append(error[batch["atom_types"].numpy() == kind].ravel() if kind is not None else error.ravel())
    error = np.concatenate(errors)
    error = error[~np.isnan(error)]
    return len(error), float(np.abs(error).mean()), float(np.sqrt((error**2).mean()))


def pairs(batches: list[Batch], name: str) -> set[tuple[float, float]]:
    return {
        pair
        for batch in batches
        for pair in zip(batch[name].ravel().tolist(), batch[f"predicted_{name}"].ravel().tolist(), strict=True)
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return watch(monkeypatch)


def watch(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is drawn from now on: file, panels, and the texts of each panel."""
    seen: list[dict[str, Any]] = []
    draw, save = parity._draw, Figure.savefig

    def watched_draw(path: Path, panels: list[parity._Panel], type_names: list[str]) -> None:
        seen.append({"path": path, "panels": panels})
        draw(path, panels, type_names)

    def watched_save(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        seen[-1]["texts"] = [
            [axis.get_title(loc="left"), *(line for text in axis.texts for line in text.get_text().split("\n"))]
            for axis in figure.axes
            if axis.texts  # no insets
        ]

    patch.setattr(parity, "_draw", watched_draw)
    patch.setattr(Figure, "savefig", watched_save)
    return seen


def trainer(folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**settings, **options})


def loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def plotted(folder: Path, batches: list[Batch], names: list[str] | None = None, **options: Any) -> ParityPlot:
    plot = ParityPlot(folder, **options)
    trainer(folder, callbacks=[plot]).test(Predicted(names), loader(batches), verbose=False)
    return plot


# --- several ranks ---


def batches_of(rank: int) -> list[Batch]:
    """Unequal numbers of batches, a type that only one rank has, and stresses that the other one lacks in one."""
    if rank == 0:
        own = [batch_of(seed, [9, 4, 7], [0, 1]) for seed in range(9)]
        del own[0]["stress"]
        return own
    return [batch_of(seed, [3, 30], [1, 2], error=0.01) for seed in (100, 101, 102)]


def train_and_test_on_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    patch = pytest.MonkeyPatch()
    seen = watch(patch)
    plot = ParityPlot(folder, max_points=120, validation_every_n_epochs=2)
    logger = WandbLogger(folder, offline=True, project="test", settings={"quiet": True}) if rank == 0 else None
    try:
        running = trainer(
            folder,
            callbacks=[plot],
            devices=world_size,
            strategy=DDPStrategy(cluster_environment=Ranks(rank, world_size)),
            logger=logger or False,
        )
        mine, module = batches_of(rank), Predicted(NAMES[:4])
        running.fit(module, loader(mine[:2]), [loader(mine), loader(mine[:1])])
        running.test(module, loader(mine), verbose=False)
        place = logger.finish() if logger else None
    finally:
        patch.undo()
    return {"seen": seen, "files": [path.name for path in plot.files], "place": place, "sample": plot._sets}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("parity")
    return folder, spawn(2, train_and_test_on_rank, folder, timeout=120)


def test_errors_are_those_of_all_data_of_all_ranks(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = two_ranks
    assert second["seen"] == second["files"] == []  # one rank draws
    assert first["files"] == ["parity_test0.png"]
    last = first["seen"][-1]
    everything = batches_of(0) + batches_of(1)
    with_stress = [batch for batch in everything if "stress" in batch]
    want = {
        "energy": (expected(everything, "total_energy"), "meV/atom", 1e3),
        "forces on H": (expected(everything, "forces", 0), "meV/Å", 1e3),
        "forces on C": (expected(everything, "forces", 1), "meV/Å", 1e3),
        "forces on O": (expected(everything, "forces", 2), "meV/Å", 1e3),
        "stress": (expected(with_stress, "stress"), "meV/Å³", 1e3),
    }
    assert [text[0] for text in last["texts"]] == list(want)
    for panel, (title, errors, points), ((number, mean, root), unit, factor) in zip(
        last["panels"], last["texts"], want.values(), strict=True
    ):
        np.testing.assert_allclose(panel.sums, [number, number * mean, number * root**2], rtol=1e-12)
        assert errors == f"MAE {factor * mean:#.3g}, RMSE {factor * root:#.3g} {unit}".replace(". ", " "), title
        shown = min(number, 120)
        assert points == (f"{number} points" if number <= 120 else f"sample of 120 of {number} points"), title
        assert len(panel.points) == shown
    assert sum(len(panel.points) < panel.sums[0] for panel in last["panels"]) >= 2  # there are samples among them


def test_points_are_a_sample_of_those_of_all_ranks(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, _) = two_ranks
    panels = {(panel.name, panel.kind): panel.points for panel in first["seen"][-1]["panels"]}
    points = [(reference, prediction) for _, reference, prediction, _ in panels["forces", 1].tolist()]
    own = [pairs(batches_of(rank), "forces") for rank in range(2)]
    assert len(set(points)) == 120
    assert set(points) <= own[0] | own[1]
    share = len(set(points) & own[0]) / 120
    numbers = [expected(batches_of(rank), "forces", 1)[0] for rank in range(2)]
    proportion = numbers[0] / sum(numbers)
    assert abs(share - proportion) < 4 * np.sqrt(proportion * (1 - proportion) / 120)


def test_validations_are_drawn_every_n_epochs(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = two_ranks
    files = [f"parity_val{index}_epoch{epoch}.png" for epoch in (1, 3) for index in (0, 1)]  # not the sanity check
    assert [each["path"].name for each in first["seen"]] == [*files, "parity_test0.png"]
    assert {path.name for path in folder.glob("*.p*")} == {*files, "parity_test0.png"}
    batches = [batches_of(rank) for rank in range(2)]
    whole, part = batches[0] + batches[1], batches[0][:1] + batches[1][:1]
    numbers = [expected(each, "forces", 1)[0] for each in (whole, part)]
    found = [panel.sums[0] for each in first["seen"][:-1] for panel in each["panels"] if panel.kind == 1]
    assert found == numbers * 2  # anew each time
    assert first["sample"] == second["sample"] == {}  # nothing is kept


def test_pictures_are_in_the_run(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, _) = two_ranks
    assert first["place"] is not None
    _, history = read_wandb(folder)
    rows = [record["item"] for record in history]
    found = {
        key: [(row["epoch"], row["trainer/global_step"]) for row in rows if f"{key}._type" in row]
        for key in ("val0_report/parity", "val1_report/parity", "test0_report/parity")
    }
    assert found == {
        "val0_report/parity": [(1, 3), (3, 7)],
        "val1_report/parity": [(1, 3), (3, 7)],
        "test0_report/parity": [(4, 8)],
    }
    (row,) = [row for row in rows if "test0_report/parity._type" in row]
    (stored,) = folder.rglob(Path(row["test0_report/parity.filenames"][0]).name)
    assert stored.read_bytes() == (folder / "parity_test0.png").read_bytes()


# --- panels ---


@pytest.mark.parametrize(("types", "columns", "rows"), [(4, 3, 2), (6, 4, 2), (10, 4, 3)])
def test_types_have_panels(tmp_path: Path, drawn: list[dict[str, Any]], types: int, columns: int, rows: int) -> None:
    batches = [batch_of(seed, [40, 60], list(range(types))) for seed in range(4)]
    (path,) = plotted(tmp_path, batches, NAMES, max_points=50).files
    (picture,) = drawn
    assert [text[0] for text in picture["texts"]] == ["energy", *(f"forces on {n}" for n in NAMES[:types]), "stress"]
    for kind, panel in enumerate(picture["panels"][1:-1]):
        number, mean, root = expected(batches, "forces", kind)
        np.testing.assert_allclose(panel.sums, [number, number * mean, number * root**2], rtol=1e-12)
        assert len(panel.points) == 50
    with Image.open(path) as image:
        assert image.size == (pytest.approx(611 * columns, abs=2), pytest.approx(604 * rows, abs=2))


def test_many_types_share_a_panel(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    batches = [batch_of(seed, [40, 60], list(range(11))) for seed in range(4)]
    plotted(tmp_path, batches, NAMES, max_points=500)
    (picture,) = drawn
    assert [text[0] for text in picture["texts"]] == ["energy", "forces", "stress"]
    _, forces, _ = picture["panels"]
    assert len(forces.points) == 500
    number, mean, root = expected(batches, "forces")
    np.testing.assert_allclose(forces.sums, [number, number * mean, number * root**2], rtol=1e-12)
    assert "sample of 500 of 1,194 points" in picture["texts"][1]


def test_pictures_are_small_whatever_is_in_them(tmp_path: Path) -> None:
    """Few points, many points, all in one place, and an energy alone."""
    few = [batch_of(0, [2], [0])]
    many = [batch_of(seed, [3000, 3000, 3000], [0, 1, 2, 3], error=0.02) for seed in range(3)]
    same = [{name: torch.ones_like(value) for name, value in few[0].items()}]
    alone = [{name: value for name, value in few[0].items() if "energy" in name or name == "num_atoms"}]
    for number, (batches, columns) in enumerate(((few, 3), (many, 3), (same, 3), (alone, 1))):
        (path,) = plotted(tmp_path / str(number), batches).files
        assert 8_000 < path.stat().st_size < 150_000
        with Image.open(path) as image:
            assert image.size[0] == pytest.approx(611 * columns, abs=2)
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_predictions_that_are_not_finite_are_no_good_errors(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    batch = batch_of(0, [5, 6], [0])
    batch["predicted_forces"][0] = torch.nan
    batch["predicted_stress"][:] = torch.inf
    plotted(tmp_path, [batch])
    _, forces, stress = drawn[0]["texts"]
    assert forces == ["forces on type 0", "MAE nan, RMSE nan eV/Å", "sample of 30 of 33 points"]
    assert stress == [
        "stress", "MAE inf, RMSE inf eV/Å³", "sample of 0 of 18 points", "no prediction is finite"
    ]  # fmt: skip


def test_without_labels_there_is_no_picture(tmp_path: Path) -> None:
    batch = {name: value for name, value in batch_of(0, [5, 6], [0]).items() if name not in ("forces", "stress")}
    batch["total_energy"][:] = torch.nan
    assert plotted(tmp_path, [batch]).files == []
    assert not list(tmp_path.glob("*.png"))


def test_a_sample_does_not_grow() -> None:
    quantity = parity._Quantity()
    random = np.random.default_rng(0)

    def tables(types: int) -> Iterator[np.ndarray]:
        for _ in range(50):
            kinds = random.integers(0, types, 400)
            yield np.column_stack([random.random(400), random.normal(size=(400, 2)), kinds])

    for table in tables(3):
        quantity.add(table, 100)
    assert [int((quantity.points[:, 3] == kind).sum()) for kind in range(3)] == [100] * 3
    for table in tables(30):
        quantity.add(table, 100)
    assert len(quantity.points) == 100
    assert sum(sums[0] for sums in quantity.sums.values()) == 40_000


def forces_of(first: int, num_atoms: int) -> Batch:
    """One structure whose force components are the numbers from ``first`` on, and predicted as they are."""
    forces = torch.arange(first, first + 3 * num_atoms, dtype=torch.float64).reshape(-1, 3)
    types = torch.zeros(num_atoms, dtype=torch.int64)
    return {"num_atoms": torch.tensor([num_atoms]), "atom_types": types, "forces": forces, "predicted_forces": forces}


def test_every_point_is_as_likely_to_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many samples of 30 of a set of 312 points in very unequal batches, in all of the places in a batch alike."""
    sizes, num_drawn, num_samples = [1, 40, 3, 25, 2, 9, 24], 30, 400
    starts = np.cumsum([0, *(3 * size for size in sizes)])
    number = int(starts[-1])
    batches = [forces_of(int(start), size) for start, size in zip(starts, sizes, strict=False)]
    seen: list[np.ndarray] = []
    monkeypatch.setattr(parity, "_draw", lambda path, panels, type_names: seen.append(panels[0].points[:, 1]))
    running, module = trainer(tmp_path), Predicted(NAMES)
    for seed in range(num_samples):
        plot = ParityPlot(tmp_path, max_points=num_drawn, seed=seed)
        plot.on_test_start(running, module)
        for position, batch in enumerate(batches):
            plot.on_test_batch_end(running, module, module.test_step(batch, position), batch, position)
        plot.on_test_end(running, module)
    drawn = np.array(seen).astype(int)
    assert drawn.shape == (num_samples, num_drawn)
    assert all(len(set(points)) == num_drawn for points in drawn.tolist())  # none twice

    def is_fair(values: np.ndarray, what: str) -> None:
        """The mean over a sample, of something known of each point, is right within 4 standard errors."""
        left_out = (number - num_drawn) / (number - 1)  # drawn without putting back
        error = values.std() * np.sqrt(left_out / (num_drawn * num_samples))
        assert abs(values[drawn].mean() - values.mean()) < 4 * error, what

    points = np.arange(number)
    batch_of_point = np.repeat(np.arange(len(sizes)), np.diff(starts))
    place = points - starts[batch_of_point]
    is_fair(points, "index")
    is_fair(place / np.diff(starts)[batch_of_point], "place in its batch")
    for batch in range(len(sizes)):
        is_fair((batch_of_point == batch).astype(float), f"share of batch {batch}")
    # points come independently of each other: the share of the largest batch differs from sample to sample as it should
    share = float(np.mean(batch_of_point == 1))
    variance = share * (1 - share) / num_drawn * (number - num_drawn) / (number - 1)
    spread = (batch_of_point[drawn] == 1).mean(axis=1).var() / variance
    assert abs(spread - 1) < 4 * np.sqrt(2 / num_samples)
    times = np.bincount(drawn.ravel(), minlength=number)
    chance = num_drawn / number
    deviations = (times - num_samples * chance) / np.sqrt(num_samples * chance * (1 - chance))
    assert np.abs(deviations).max() < 5
    assert deviations.std() == pytest.approx(1, abs=4 / np.sqrt(2 * number))


@pytest.mark.parametrize("option", [{"max_points": 0}, {"validation_every_n_epochs": 0}, {"max_points": 2.5}])
def test_numbers_that_are_none(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is a whole number, at least 1, found"):
        ParityPlot(**option)
