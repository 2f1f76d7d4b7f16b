"""Jobs that go on from a checkpoint or test it: a difference is refused, named, or none, by the table of settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from support.bad_input import BASE, composed, frames, relabelled
from support.commands import NO_FIGURES
from torch import Tensor, nn

from harness.checkpoints import read
from harness.job import prepare, train
from harness.job.made_with import MADE_WITH, RecordedStatistics, energy_level
from harness.job.match import Start, compare, rule_of
from harness.models import schnet_force_field

QUIET = ("dry_step=false", *NO_FIGURES, "callbacks.table=null", "trainer.enable_progress_bar=false")


class Folder:
    """Files of frames, and a run that was trained on one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        made = frames(40)
        self.write("a", made[:16])
        self.write("b", made[10:36])
        self.write("test", made[36:])
        self.write("shifted", [changed(atoms, energy=-2000.0 * len(atoms)) for atoms in made[:16]])
        self.write("slightly", [changed(atoms, energy=0.5 * len(atoms)) for atoms in made[:16]])
        self.write("copper", [changed(atoms, symbols="Cu4") for atoms in made[:16]])
        self.write("gold", [changed(atoms, symbols="AuCu3") for atoms in made[:16]])

    def write(self, name: str, made: list[Any]) -> None:
        ase.io.write(self.path / f"{name}.xyz", made, format="extxyz")

    def overrides(self, data: str, *more: str) -> list[str]:
        files = [f"data.train={self.path}/{data}.xyz", "data.split={val: 3}", f"data.test={self.path}/test.xyz"]
        return [*BASE, *files, *QUIET, f"output_dir={self.path}/again", *more]

    @property
    def checkpoint(self) -> Path:
        return self.path / "run" / "checkpoints" / "best.ckpt"

    def notes(self, data: str, *more: str, trains: bool) -> list[str]:
        """Lines about the checkpoint; the job itself is not executed."""
        stage = "max_epochs=3" if trains else "train=false"
        job = prepare(composed(self.overrides(data, stage, f"ckpt_path={self.checkpoint}", *more)))
        return [line for line in job.notes if not line.startswith("reference energies")]


def changed(atoms: Any, energy: float = 0.0, symbols: str | None = None) -> Any:
    results = dict(atoms.calc.results)
    results["energy"] += energy
    made = relabelled(atoms, **{name: results[name] for name in ("energy", "forces", "stress")})
    if symbols is not None:
        made.symbols = symbols
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = Folder(tmp_path_factory.mktemp("match"))
    train(composed(made.overrides("a", f"output_dir={made.path}/run", "max_epochs=2", "test=false")))
    return made


# setting, whether it is refused in a test and in a training that goes on, or what is named (None: nothing)
REFUSED = "refused"
SETTINGS: list[tuple[tuple[str, ...], str | None, str | None]] = [
    ((), None, None),
    (("cutoff=3.9",), REFUSED, REFUSED),
    (("cutoff=3.0",), REFUSED, REFUSED),
    (("model.hidden_channels=8",), REFUSED, REFUSED),
    (("model.num_interactions=2",), REFUSED, REFUSED),
    (("model.num_gaussians=5",), REFUSED, REFUSED),
    (("model.seed=3",), None, None),
    (("model.stress=false", "loss=energy_force"), "model.stress: True → False", "model.stress: True → False"),
    (("model.energy_scales=2.0",), "model.energy_scales: force_rms → 2.0", REFUSED),
    (("model.trainable_scales=true",), "model.trainable_scales: False → True", REFUSED),
    (("data.dtype=float64",), "data.dtype: float32 → float64", "data.dtype: float32 → float64"),
    (("trainer.precision=64-true",), "trainer.precision: 32-true → 64-true", "trainer.precision: 32-true → 64-true"),
    (("matmul_precision=high",), "matmul_precision: highest → high", "matmul_precision: highest → high"),
    (("data.type_names=[Cu, Ag]",), None, None),
    (("data.type_names=[Ag, Cu]",), REFUSED, REFUSED),
    (("data.type_names=[Cu, Ag, Au]",), REFUSED, REFUSED),
    (("seed=1",), "split, part val (3 frames, others", "split, part val (3 frames, others"),
    (("data.num_train=8",), "split, part train (13 frames → 8", "split, part train (13 frames → 8"),
    (("optimizer.lr=1e-4", "max_epochs=7", "lr_scheduler=none", "data.batch_size=5"), None, None),
    (("logger=csv", "name=another", "data.num_workers=0"), None, None),
]


@pytest.mark.filterwarnings("ignore:data.dtype")
@pytest.mark.parametrize("trains", [False, True], ids=["test", "go on"])
@pytest.mark.parametrize(("settings", "tests", "goes_on"), SETTINGS, ids=lambda value: str(value)[:40])
def test_settings(
    settings: Sequence[str], tests: str | None, goes_on: str | None, trains: bool, folder: Folder
) -> None:
    expected = goes_on if trains else tests
    if expected == REFUSED:
        with pytest.raises(ValueError, match="ckpt_path=") as error:
            folder.notes("a", *settings, trains=trains)
        name, _, value = settings[0].partition("=")
        assert name in str(error.value)
        assert value.partition(",")[0].strip("[]").lower() in str(error.value).lower()
        return
    notes = folder.notes("a", *settings, trains=trains)
    assert len(notes) == (expected is not None), notes
    assert expected is None or expected in notes[0]


def test_the_remedy_is_what_to_type(folder: Folder) -> None:
    with pytest.raises(ValueError, match="before → now") as error:
        folder.notes("a", "cutoff=3.9", "model.hidden_channels=8", trains=False)
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["  cutoff: 3.5 → 3.9", "  model.hidden_channels: 4 → 8"]
    assert "those of the checkpoint: cutoff=3.5 model.hidden_channels=4." in lines[3]
    assert folder.notes("a", "cutoff=3.5", "model.hidden_channels=4", trains=False) == []


def test_a_refused_difference_can_be_accepted(folder: Folder) -> None:
    assert folder.notes("a", "cutoff=3.9", "accept_changes=[cutoff]", trains=False) == []
    with pytest.raises(ValueError, match="has the weights of another model") as error:
        folder.notes("a", "model.hidden_channels=8", "accept_changes=['model.*']", trains=False)
    assert "[100, 4] in the checkpoint and [100, 8] in this model" in str(error.value)
    with pytest.raises(ValueError, match="accept_changes is a list"):
        folder.notes("a", "accept_changes=cutoff", trains=False)


def test_rules_are_found_by_the_first_pattern() -> None:
    assert rule_of("model.seed").goes_on == "same"  # type: ignore[union-attr]
    assert rule_of("model.own.part").tests == "refused"  # type: ignore[union-attr]
    assert rule_of("data.keys.energy").tests == "named"  # type: ignore[union-attr]
    assert rule_of("optimizer.lr") is None


@pytest.mark.parametrize("trains", [False, True])
def test_other_data_are_named(trains: bool, folder: Folder) -> None:
    (line,) = folder.notes("b", trains=trains)
    assert line.startswith("data differ from those of the checkpoint: train file 1 (a.xyz, ")
    assert "→ b.xyz, " in line
    assert "may have been trained on" not in line
    (line,) = folder.notes("a", "seed=1", trains=trains)
    assert "The files are the same: what is validated and tested now may have been trained on" in line


# --- types ---


def test_data_with_fewer_elements_take_the_types_of_the_checkpoint(folder: Folder) -> None:
    """Copper alone would be type 0 of one; a model of Cu and Ag has two."""
    job = prepare(composed(folder.overrides("copper", "train=false", f"ckpt_path={folder.checkpoint}")))
    assert job.datamodule.type_names == ["Cu", "Ag"]  # type: ignore[attr-defined]


def test_data_with_another_element_are_refused(folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"Au is not among the type names.*the types of ckpt_path.*has no others"):
        folder.notes("gold", trains=True)


# --- the statistics that a model is built of ---


class Scaled(nn.Module):
    """A model with a number of the statistics that is no buffer, as the mean number of neighbours often is."""

    def __init__(self, inner: nn.Module, statistics: Any) -> None:
        super().__init__()
        self.inner, self.neighbors = inner, float(statistics.mean_neighbors)
        self.frames, self.force_rms = statistics.num_frames, statistics.force_rms

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.inner(batch)
        return {**out, "forces": out["forces"] * (12.0 / self.neighbors)}


def scaled_force_field(statistics: Any, **options: Any) -> Scaled:
    return Scaled(schnet_force_field(statistics, **options), statistics)


OWN = ("model._target_=test_match.scaled_force_field",)


def test_a_model_is_built_of_the_statistics_of_its_checkpoint(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested beside other training data, it is the same model: its errors on a test set are the same to the bit."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run = [*OWN, "max_epochs=1", f"output_dir={folder.path}/own"]
    trained = train(composed(folder.overrides("a", *run)))
    checkpoint = folder.path / "own" / "checkpoints" / "best.ckpt"
    made = read(checkpoint)[MADE_WITH]["statistics"]
    alone = [*OWN, "train=false", f"ckpt_path={checkpoint}"]
    job = prepare(composed(folder.overrides("b", *alone)))
    model: Any = job.module.model
    assert job.datamodule.statistics.force_rms != made["force_rms"]  # type: ignore[attr-defined]
    assert (model.neighbors, model.force_rms, model.frames) == (
        made["mean_neighbors"],
        made["force_rms"],
        made["num_frames"],
    )
    tested = train(composed(folder.overrides("b", *alone)))
    for name in ("test0_epoch/forces_rmse", "test0_epoch/total_energy_rmse"):
        assert tested[name] == trained[name], name

    goes_on = [*OWN, "max_epochs=2", f"ckpt_path={checkpoint}", "test=false"]
    train(composed(folder.overrides("b", *goes_on)))
    record = read(folder.path / "again" / "checkpoints" / "last.ckpt")[MADE_WITH]
    assert record["statistics"] == made  # of the model, still
    assert "b.xyz" in record["data"]["train file 1"]


def test_recorded_statistics_have_the_attributes_of_those_of_a_training_set() -> None:
    class Now:
        force_rms, extra = 2.0, "of now"

    found = RecordedStatistics({"type_names": ["H"], "energy_shifts": [-1.5], "force_rms": 1.0}, Now())
    assert (found.type_names, found.force_rms, found.extra) == (("H",), 1.0, "of now")
    assert found.energy_shifts.dtype == torch.float64
    with pytest.raises(AttributeError):
        _ = found.no_such


# --- reference energies ---


def test_the_summary_has_the_reference_energies_of_the_model(folder: Folder) -> None:
    shifts = read(folder.checkpoint)[MADE_WITH]["energy_shifts"]
    job = prepare(composed(folder.overrides("b", f"ckpt_path={folder.checkpoint}", "max_epochs=3")))
    line = job.notes[-1]
    assert line == (
        f"reference energies of the model in eV, from the checkpoint: Cu {shifts['Cu']:.4f}, Ag {shifts['Ag']:.4f}"
    )
    states = read(folder.checkpoint)["state_dict"]
    assert torch.equal(states["model.energy_model.shifts"], job.module.model.energy_model.shifts)


def test_other_reference_energies_are_refused_or_told(folder: Folder) -> None:
    asked = "model.energy_shifts={Cu: 5, Ag: 3}"
    with pytest.raises(ValueError, match="other reference energies") as error:
        folder.notes("a", asked, trains=True)
    shifts = read(folder.checkpoint)[MADE_WITH]["energy_shifts"]
    assert f"Cu {shifts['Cu']:.6g} → 5, Ag {shifts['Ag']:.6g} → 3" in str(error.value)
    as_typed = f"model.energy_shifts={{Cu: {shifts['Cu']!r}, Ag: {shifts['Ag']!r}}}"
    assert f"'{as_typed}'" in str(error.value)
    assert folder.notes("a", as_typed, trains=True) == []
    job = prepare(composed(folder.overrides("a", asked, "train=false", f"ckpt_path={folder.checkpoint}")))
    assert "→ 5" in job.notes[-1]


def test_data_of_another_reference_level(folder: Folder) -> None:
    """Refused where a training goes on, told where it is tested; another split of the same data is nothing to tell."""
    with pytest.raises(ValueError, match="another reference level") as error:
        folder.notes("shifted", trains=True)
    assert "are -2000 eV per atom" in str(error.value)
    shifts = read(folder.checkpoint)[MADE_WITH]["energy_shifts"]
    assert f"Cu {shifts['Cu']:.6g} → -2" in str(error.value)
    with pytest.warns(UserWarning, match=r"errors of energies will be about 2e\+03 eV/atom; forces"):
        folder.notes("a", f"data.test={folder.path}/shifted.xyz", trains=False)
    with pytest.warns(UserWarning, match=r"are 0\.5\d* eV per atom .*Is the reference level the same"):
        folder.notes("slightly", trains=True)


@pytest.mark.filterwarnings("error::UserWarning")
def test_another_split_or_other_frames_of_the_same_level_are_nothing_to_tell(folder: Folder) -> None:
    for seed in (1, 2):
        folder.notes("a", f"seed={seed}", trains=True)
    folder.notes("b", trains=True)


def test_the_level_of_energies_is_that_of_numpy() -> None:
    made = frames(6)

    class Frame:
        def __init__(self, atoms: Any, energy: float | None) -> None:
            self.atoms, self.energy = atoms, energy

    labelled = [Frame(atoms, atoms.get_potential_energy()) for atoms in made]
    level = energy_level([*labelled, Frame(made[0], None)], {"Cu": -1.0, "Ag": 3.0})
    left = [(atoms.get_potential_energy() - (-3.0 + 3.0)) / 4 for atoms in made]
    mean = sum(left) / 6
    assert level is not None
    assert level["mean"] == pytest.approx(mean)
    assert level["std"] == pytest.approx((sum((each - mean) ** 2 for each in left) / 6) ** 0.5)
    assert level["num_frames"] == 6
    assert energy_level(labelled, {"Cu": -1.0}) is None
    assert energy_level([], {"Cu": -1.0}) is None


# --- checkpoints without a record ---


def test_a_checkpoint_without_a_record_is_said_not_to_compare(folder: Folder, tmp_path: Path) -> None:
    checkpoint = torch.load(folder.checkpoint, weights_only=True)
    del checkpoint[MADE_WITH]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for stage in ("train=false", "max_epochs=3"):
        job = prepare(composed(folder.overrides("a", stage, f"ckpt_path={tmp_path}/old.ckpt")))
        assert "has no record of what it was made with" in job.notes[0]
        assert "reference energies of the model" in job.notes[1]
        assert len(job.notes) == 2
    with pytest.raises(ValueError, match="has the weights of another model"):
        prepare(composed(folder.overrides("a", "model.hidden_channels=8", f"ckpt_path={tmp_path}/old.ckpt")))


def test_data_modules_without_fingerprint_or_statistics_are_compared_by_paths(folder: Folder) -> None:
    config = composed(folder.overrides("b"))
    job = prepare(config)
    plain: Any = nn.Module()
    lines, warned = compare(Start("ckpt_path", str(folder.checkpoint), True), config, plain, job.module)
    assert not warned
    assert "data.train" in lines[0]
    assert json.dumps(lines)
