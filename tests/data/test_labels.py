"""Further labels and inputs: read from files, in batches, in losses, and the same on one and on two ranks."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf
from support.lightning_ranks import Ranks
from support.linear import trainer
from support.spawning import spawn
from torch import Tensor, nn

import harness
from harness.calculators import HarnessCalculator
from harness.data import AtomsDataModule, Frame, collate, empty_batch, frame_to_sample
from harness.data.extras import Extras
from harness.data.labels import READY_LABELS
from harness.data.store import BuildSettings, build_store
from harness.fields import PerAtomModifier, field_spec
from harness.job.dry_step import check_first_batch
from harness.module import ForceFieldModule
from harness.trained import TrainedModel
from harness.trained.checkpoint import TrainedCheckpoint

NAMES = ("H2O", "CO2", "NH3", "H2O", "CH4", "CO2", "NH3", "H2O", "CH4", "H2O", "CO2", "NH3")
TYPES = ["H", "C", "N", "O"]


def labelled(index: int) -> Atoms:
    """A rattled molecule with random labels; every third has no dipole, every fourth only its first two components."""
    random = np.random.default_rng(index)
    atoms = molecule(NAMES[index])
    atoms.rattle(0.02, seed=index)
    number = len(atoms)
    labels: dict[str, Any] = {"energy": random.normal(), "forces": random.normal(size=(number, 3))}
    if index % 3:
        labels["dipole"] = random.normal(size=3)
        if index % 4 == 1:
            labels["dipole"][2] = np.nan
    atoms.calc = SinglePointCalculator(atoms, **labels)
    if index % 2:
        atoms.arrays["REF_charges"] = random.normal(size=number)
    atoms.arrays["born"] = random.normal(size=(number, 9))
    atoms.info |= {"polarizability": random.normal(size=(3, 3)), "charge": index % 3 - 1, "field": 0.5 * index}
    return atoms


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "molecules.xyz"
    ase.io.write(path, [labelled(index) for index in range(len(NAMES))], format="extxyz")
    return path


ALL_LABELS = {
    "dipole": {},
    "charges": {"key": "REF_charges"},
    "born_charges": {"key": "born"},
    "polarizability": None,
}


def data_of(path: Path, **options: Any) -> AtomsDataModule:
    settings: dict[str, Any] = {"cutoff": 3.0, "batch_size": 4, "split": {"val": 3}, "dtype": "float64"}
    data = AtomsDataModule(path, **{**settings, **options})
    data.setup()
    return data


# ---- frames and batches


def test_labels_of_a_file_are_those_that_were_written(file: Path) -> None:
    data = data_of(file, labels=OmegaConf.create(ALL_LABELS), split=None)  # as Hydra hands it over
    read = ase.io.read(file, ":")
    for index, frame in enumerate(data.train_set.frames):
        atoms, original = read[index], labelled(index)
        assert ("dipole" in frame.extras) == bool(index % 3)
        assert ("charges" in frame.extras) == bool(index % 2)
        if index % 3:
            np.testing.assert_allclose(frame.extras["dipole"], original.calc.results["dipole"], rtol=1e-12)
        if index % 2:
            np.testing.assert_array_equal(frame.extras["charges"], atoms.arrays["REF_charges"][:, None])
        np.testing.assert_array_equal(frame.extras["born_charges"], atoms.arrays["born"].reshape(-1, 3, 3))
        np.testing.assert_allclose(frame.extras["polarizability"], original.info["polarizability"], rtol=1e-12)
        assert all(value.dtype == np.float64 for value in frame.extras.values())
    known = [f for f in data.train_set.frames if "dipole" in f.extras]
    whole = sum(not np.isnan(frame.extras["dipole"]).any() for frame in known)
    assert data.missing_labels("train")["dipole"] == (12 - whole, 12)
    assert whole < len(known) == 8
    for text in ("dipole 8", "charges 6", "polarizability 12", "born_charges 12"):
        assert text in data.describe().splitlines()[1]


def test_every_batch_has_the_fields_with_nan_and_defaults(file: Path) -> None:
    inputs = {"total_charge": {}, "spin_multiplicity": {"default": 1}, "field": {"level": "graph", "unit": "V/Å"}}
    data = data_of(file, labels=ALL_LABELS, inputs=inputs)
    empty = empty_batch(torch.float64, data.batch_fields)
    for batch in [*data.train_dataloader(), *data.val_dataloader()[0]]:
        assert batch.keys() == empty.keys()
        number, atoms = len(batch["num_atoms"]), len(batch["pos"])
        shapes = {"dipole": (number, 3), "charges": (atoms, 1), "born_charges": (atoms, 3, 3), "field": (number, 1)}
        shapes |= {"polarizability": (number, 3, 3), "total_charge": (number, 1), "spin_multiplicity": (number, 1)}
        for name, shape in shapes.items():
            assert batch[name].shape == shape
            assert empty[name].shape == (0, *shape[1:])
            assert empty[name].dtype == batch[name].dtype
        assert batch["total_charge"].dtype == batch["spin_multiplicity"].dtype == torch.int64
        assert batch["dipole"].dtype == batch["field"].dtype == torch.float64
        assert (batch["spin_multiplicity"] == 1).all()
        whole = collate([batch, empty], torch.float64, data.batch_fields)
        assert all(torch.equal(whole[name].nan_to_num(), batch[name].nan_to_num()) for name in batch)
    samples = [data.train_set[index] for index in range(len(data.train_set))]
    for sample, frame in zip(samples, data.train_set.frames, strict=True):
        assert bool(sample["dipole"].isnan().all()) == ("dipole" not in frame.extras)
        assert bool(sample["charges"].isnan().all()) == ("charges" not in frame.extras)
        assert sample["total_charge"].tolist() == [[frame.atoms.info["charge"]]]


def test_frames_without_extras_make_the_batches_they_made() -> None:
    frame = Frame(molecule("H2O"), energy=0.0)
    assert frame_to_sample(frame, TYPES, 3.0).keys() == empty_batch().keys()


def test_a_label_alone_is_enough(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    atoms.info["mu"] = np.array([0.0, 0.0, 0.4])
    ase.io.write(tmp_path / "dipoles.xyz", [atoms, atoms], format="extxyz")
    data = data_of(tmp_path / "dipoles.xyz", labels={"dipole": "mu"}, split=None, batch_size=1)
    assert next(iter(data.train_dataloader()))["dipole"].tolist() == [[0.0, 0.0, 0.4]]
    ase.io.write(tmp_path / "one.xyz", [atoms, molecule("H2O")], format="extxyz")
    with pytest.raises(ValueError, match=r"one.xyz, frame 1: no energy, forces or stress .* and no dipole"):
        data_of(tmp_path / "one.xyz", labels={"dipole": "mu"})


# ---- mistakes


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"labels": {"dipole": {"key": "REF_dipol"}}}, KeyError, r"no frame of the data has the key 'REF_dipol'"),
    ({"labels": ["charges"]}, KeyError, r"'charges'. Did you mean data.labels.charges.key=REF_charges\?"),
    ({"labels": {"dipole": {"key": "forces"}}}, ValueError, r"frame 0: the label dipole \('forces'\) .* \[3\], found"),
    ({"labels": {"charges": {"key": "born"}}}, ValueError, r"\[num_atoms, 1\], which is \[3, 1\] here, found \[3, 9\]"),
    ({"labels": ["dipol"]}, ValueError, "found none. Did you mean dipole. Ready labels, .*: dipole, charges, magnetic"),
    ({"labels": {"site": {"level": "atom"}}}, ValueError, "level is graph .* or node .*, found 'atom'"),
    ({"labels": {"site": {}}}, ValueError, "level is graph .* or node .*, found none"),
    ({"labels": {"site": {"level": "graph", "key": "text"}}}, ValueError, "must be numbers, found 'some'"),
    ({"labels": {"forces": {}}}, ValueError, "forces is read anyway; its key in the files is data.keys.forces"),
    ({"labels": {"pos": {"level": "node"}}}, ValueError, "a batch has a field pos of its own"),
    ({"labels": {"dipole": {"level": "node"}}}, ValueError, "dipole is a field of level graph, found level=node"),
    ({"labels": {"dipole": {"shape": 2}}}, ValueError, r"dipole has the shape \[3\], found \[2\]"),
    ({"labels": {"dipole": {"shape": ["x"]}}}, TypeError, "shape is a list of whole numbers"),
    ({"labels": {"dipole": {"kye": "x"}}}, ValueError, "no option 'kye'.* Valid options: key, level, shape, unit"),
    ({"labels": "dipole"}, TypeError, "is a mapping such as"),
    ({"labels": ["total_charge"], "inputs": ["total_charge"]}, ValueError, "total_charge is in data.labels and in"),
    ({"inputs": {"total_charge": {"default": 0.5}}}, ValueError, "default must be an integer, found 0.5"),
    ({"inputs": {"total_charge": {"key": "field"}}}, ValueError, r"frame 1: the input total_charge .* integers"),
    ({"inputs": {"spot": {"level": "node", "default": None}}}, ValueError, "frame 0 has no 'spot', the input spot"),
]


@pytest.mark.parametrize(("options", "kind", "message"), MISTAKES, ids=[str(each[0]) for each in MISTAKES])
def test_mistakes_are_told(tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    frames = [labelled(index) for index in range(2)]
    for atoms in frames:
        atoms.info["text"] = "some"
    path = tmp_path / "two.xyz"
    ase.io.write(path, frames, format="extxyz")
    with pytest.raises(kind, match=message):
        data_of(path, split=None, batch_size=2, **options)


def test_all_keys_of_the_right_shape_are_suggested_the_closest_first(tmp_path: Path) -> None:
    """Also where a fifth of the frames has no label, and where the file is read in parts for a store."""
    frames = [labelled(0) for _ in range(10)]
    for index, atoms in enumerate(frames):
        atoms.info |= {"applied": np.ones(3), "text": "some"} | ({"REF_dip": np.ones(3)} if index % 5 else {})
    frames.append(Atoms("H"))  # forces of one atom have the shape of a dipole
    frames[-1].calc = SinglePointCalculator(frames[-1], energy=0.0, forces=np.zeros((1, 3)))
    path = tmp_path / "vectors.xyz"
    ase.io.write(path, frames, format="extxyz")
    message = (
        r"the key 'dipole'. Did you mean data.labels.dipole.key=REF_dip or data.labels.dipole.key=applied\? The frames"
    )
    with pytest.raises(KeyError, match=message):
        data_of(path, labels=["dipole"])
    settings = BuildSettings(extras=Extras.from_config(["dipole"]), check_units=False)
    with pytest.raises(KeyError, match=message):
        build_store(tmp_path / "a.store", [path], settings)
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.xyz"]


def test_infinite_labels_are_refused_and_nan_is_missing(tmp_path: Path) -> None:
    for value, expected in ((np.inf, None), (np.nan, KeyError)):
        atoms = labelled(0)
        atoms.info["alpha"] = np.full((3, 3), value)
        ase.io.write(tmp_path / "one.xyz", atoms, format="extxyz")
        message = "NaN in all frames" if expected else "has infinite values; write NaN where it is unknown"
        with pytest.raises(expected or ValueError, match=message):
            data_of(tmp_path / "one.xyz", labels={"polarizability": "alpha"}, split=None, batch_size=1)


# ---- registration and record


def test_fields_are_registered_with_level_unit_and_shape(file: Path) -> None:
    Extras.from_config(labels={"born": {"level": "node", "shape": [9], "unit": "e"}})
    spec = field_spec("born")
    assert (spec.level, spec.unit, spec.shape, spec.may_be_missing) == ("node", "e", (9,), True)
    for name, entry in READY_LABELS.items():
        spec = field_spec(name)
        assert (spec.level, spec.unit, spec.shape, spec.may_be_missing) == (entry.level, entry.unit, entry.shape, True)


def test_a_record_of_plain_data_makes_the_same_extras(file: Path) -> None:
    weights = {"config_type": {"bulk": 2}}
    extras = Extras.from_config(ALL_LABELS, ["total_charge"], weights, "kind", {"weight": "w", "energy_weight": None})
    plain = extras.plain()
    assert Extras.from_plain(plain) == extras
    assert OmegaConf.to_container(OmegaConf.create(plain)) == plain
    assert Extras.from_plain(None) == Extras()


# ---- losses


DIPOLES = [
    {"name": "energy", "field": PerAtomModifier("total_energy"), "metric": harness.MeanSquaredError(), "coeff": 1},
    {"name": "dipole", "field": "dipole", "metric": harness.MeanSquaredError(), "coeff": 3},
    {"name": "charges", "field": "charges", "metric": harness.MeanAbsoluteError(), "coeff": 2, "per_type": True},
]


def test_missing_labels_are_left_out_by_themselves(file: Path) -> None:
    """Values of a manager, and of NumPy on the numbers in the frames."""
    data = data_of(file, labels=ALL_LABELS, split=None)
    manager = harness.MetricsManager(DIPOLES, type_names=data.type_names)
    assert manager.entries["dipole"].ignore_nan
    assert not manager.entries["energy"].ignore_nan
    random = np.random.default_rng(0)
    errors: dict[str, list[float]] = {"dipole": [], "charges": []}
    by_type: dict[str, list[float]] = {name: [] for name in data.type_names}
    for batch in data.train_dataloader():
        predicted = {name: torch.tensor(random.normal(size=batch[name].shape)) for name in ("dipole", "charges")}
        manager({**predicted, "total_energy": batch["total_energy"]}, batch)
        first = 0
        for position, index in enumerate(batch["frame_index"].tolist()):
            extras, atoms = data.train_set.frames[index].extras, data.train_set.frames[index].atoms
            if "dipole" in extras:
                error = predicted["dipole"][position].numpy() - extras["dipole"]
                errors["dipole"] += (error[~np.isnan(error)] ** 2).tolist()
            if "charges" in extras:
                error = np.abs(predicted["charges"][first : first + len(atoms)].numpy() - extras["charges"])[:, 0]
                for symbol, value in zip(atoms.symbols, error, strict=True):
                    by_type[symbol].append(value)
            first += len(atoms)
    values = {name: float(value) for name, value in manager.compute().items()}
    assert values["dipole"] == pytest.approx(np.mean(errors["dipole"]), rel=1e-12)
    means = [np.mean(of_type) for of_type in by_type.values() if of_type]
    assert values["charges"] == pytest.approx(np.mean(means), rel=1e-12)
    assert values["energy"] == 0


def test_ignore_nan_can_be_switched_off() -> None:
    entry = {"field": "dipole", "metric": harness.MeanSquaredError(), "coeff": 1, "ignore_nan": False}
    manager = harness.MetricsManager([entry])
    missing = torch.full((2, 3), torch.nan)
    assert manager.evaluate(manager.measure({"dipole": torch.zeros(2, 3)}, {"dipole": missing})).weighted_sum.isnan()


class Charges(nn.Module):
    """Charges by type and total charge, their dipole, and an energy; fails where it has no atoms or no total charge."""

    def __init__(self) -> None:
        super().__init__()
        self.of_types = nn.Embedding(len(TYPES), 2, dtype=torch.float64)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if not len(batch["pos"]):
            raise RuntimeError("no atoms")
        charge, energy = self.of_types(batch["atom_types"]).split(1, dim=1)
        charge = charge + (batch["total_charge"] / batch["num_atoms"][:, None])[batch["batch"]]
        graphs = len(batch["num_atoms"])
        return {
            "charges": charge,
            "dipole": charge.new_zeros(graphs, 3).index_add(0, batch["batch"], charge * batch["pos"]),
            "total_energy": charge.new_zeros(graphs, 1).index_add(0, batch["batch"], energy),
        }


def train(rank: int, world_size: int, path: Path, accumulate: int) -> dict[str, Any]:
    """Parameters and values of two epochs; the second rank has no frame of the one of the validation set.

    Frames have weights by their charge, some of 0, and are in groups by it.
    """
    seed_everything(1, verbose=False)
    data = data_of(
        path, labels=ALL_LABELS, inputs=["total_charge"], type_names=TYPES, split={"val": 1}, batch_size=3,
        weights={"charge": {-1: 0, 0: 2.5}}, group_key="charge",
    )  # fmt: skip
    by_group = [{**component, "per_group": True} for component in DIPOLES]
    module = ForceFieldModule(
        Charges(),
        loss=lambda **names: harness.MetricsManager(by_group, **names),
        val_metrics=lambda **names: harness.MetricsManager(by_group, **names),
        type_names=TYPES,
        group_names=data.group_names,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    )
    strategy: dict[str, Any] = {}
    if world_size > 1:
        strategy = {"strategy": DDPStrategy(cluster_environment=Ranks(rank, world_size)), "devices": world_size}
    running = trainer(**strategy, accumulate_grad_batches=accumulate)
    running.fit(module, datamodule=data)
    values = {name: float(value) for name, value in running.callback_metrics.items()}
    return {"weights": module.model.of_types.weight.detach().clone(), "values": values}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_train_as_one(file: Path, accumulate: int) -> None:
    alone = train(0, 1, file, accumulate)
    started = nn.Embedding(len(TYPES), 2)
    assert (alone["weights"] - started.weight).abs().max() > 1e-3
    assert any("dipole@0" in name for name in alone["values"])
    for found in spawn(2, train, file, accumulate):
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-9, atol=1e-11)
        assert found["values"] == pytest.approx(alone["values"], rel=1e-9, abs=1e-11, nan_ok=True)


# ---- models with inputs


def trained_charges(inputs: Any) -> TrainedModel:
    extras = Extras.from_config(inputs=inputs)
    record = {"extras": extras.plain(), "cutoff": 3.0, "dtype": "float64"}
    return TrainedModel(Charges(), TrainedCheckpoint(Path("some.ckpt"), record, {}, False, TYPES, None, 0, 0)).eval()


def test_a_loaded_model_and_its_calculator_get_the_inputs() -> None:
    model = trained_charges({"total_charge": {"key": "q"}})
    atoms = molecule("H2O")
    cation = atoms.copy()
    cation.info["q"] = 1
    batch = model.batch_of([atoms, cation])
    assert batch["total_charge"].tolist() == [[0], [1]]
    charges = model(batch)["charges"].detach().reshape(2, 3)
    torch.testing.assert_close(charges[1] - charges[0], torch.full((3,), 1 / 3, dtype=torch.float64))
    atoms.calc = HarnessCalculator(model)
    np.testing.assert_allclose(atoms.get_charges(), charges[0], rtol=1e-12)
    atoms.info["q"] = 1  # the structure is the same: ASE alone would return what it has
    np.testing.assert_allclose(atoms.get_charges(), charges[1], rtol=1e-12)
    atoms.info["q"] = 0.5
    with pytest.raises(
        ValueError, match=r"H2O, frame 0: the input total_charge \('q'\) must be integers, found \[0.5\]"
    ):
        atoms.get_charges()


def test_an_input_without_a_default_has_to_be_there() -> None:
    with pytest.raises(ValueError, match="structures, frame 0 has no 'q', the input total_charge of the model"):
        trained_charges({"total_charge": {"key": "q", "default": None}}).batch_of(molecule("H2O"))


class Echo(Charges):
    """Hands the label of the dipole on with its batch."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**super().forward(batch), "dipole": batch["dipole"]}


def test_a_label_that_the_model_hands_on_is_no_prediction(file: Path) -> None:
    data = data_of(file, labels=ALL_LABELS, inputs=["total_charge"], type_names=TYPES)
    for model, refused in ((Charges(), False), (Echo(), True)):
        loss = harness.MetricsManager(DIPOLES, type_names=TYPES)
        module = ForceFieldModule(model, loss=loss, val_metrics=loss, type_names=TYPES)
        with pytest.raises(ValueError, match="'dipole' is the label of that name") if refused else nullcontext():
            check_first_batch(module, data, trainer(), train=True)
