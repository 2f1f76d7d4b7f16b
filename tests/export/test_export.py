"""Files for other packages: their own calculators and commands predict from them what was validated in the training.

Runs for the packages that are installed: `make test` has NequIP and Allegro, `make test-mace` and
`make test-sevennet` the others.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from support.commands import BIN, run
from support.other_models import CUTOFF, INSTALLED, PACKAGES, build
from support.trained import DOUBLE, trained
from torch import Tensor, nn

import harness
from harness.data import DataStatistics, Frame, collate, frame_to_sample
from harness.export import main
from harness.export.command import FORMATS
from harness.export.nequip import NequIPFormat
from harness.export.structure import example_structure
from harness.support.guest import guest

PAIRS = {"mace": "mace", "nequip": "nequip", "allegro": "nequip", "sevennet": "sevennet"}
HERE = pytest.mark.parametrize("name", INSTALLED)
AVERAGED = ("callbacks=[default,ema]", "callbacks.parity=null")
TYPE_NAMES = ("Cu", "H", "O")  # not in the order of atomic numbers
SHIFTS = (-1100.25, -13.6, -2037.8)


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{PACKAGES[name]} is not installed")


@dataclass(frozen=True)
class Run:
    """A training's checkpoint, and what its last validation predicted for which structures."""

    checkpoint: Path
    structures: list[Atoms]
    predictions: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trainings by model and further overrides, each made once."""
    made: dict[tuple[str, ...], Run] = {}

    def run_of(name: str, *overrides: str) -> Run:
        key = (name, *overrides)
        if key not in made:
            made[key] = _trained(tmp_path_factory.mktemp(name), name, *overrides)
        return made[key]

    return run_of


def _trained(folder: Path, name: str, *overrides: str) -> Run:
    checkpoint, kept = trained(folder, *overrides, model=name)
    structures, energies, forces, stresses = [], [], [], []
    for batch, predictions in kept.seen:
        for graph in range(len(batch["num_atoms"])):
            atoms = batch["batch"] == graph
            numbers, positions = batch["atomic_numbers"][atoms].numpy(), batch["pos"][atoms].double().numpy()
            structures.append(Atoms(numbers, positions, cell=batch["cell"][graph].double().numpy(), pbc=True))
            energies.append(float(predictions["total_energy"][graph, 0]))
            forces.append(predictions["forces"][atoms].double().numpy())
            stresses.append(predictions["stress"][graph].double().numpy())
    found = {"energy": np.array(energies), "forces": np.array(forces), "stress": np.array(stresses)}
    return Run(checkpoint, structures, found)


def calculator(name: str, file: Path) -> Calculator:
    """The calculator of the package, made of a file as its users make it."""
    if name == "mace":
        with guest():
            from mace.calculators import MACECalculator

            model = torch.load(file, weights_only=False)
            return MACECalculator(models=model, device="cpu", default_dtype="float64")
    if name == "sevennet":
        with guest(torch.float32):
            from sevenn.calculator import SevenNetCalculator

            return SevenNetCalculator(str(file), device="cpu")
    from nequip.integrations.ase import NequIPCalculator

    return NequIPCalculator._from_saved_model(str(file), device="cpu", chemical_species_to_atom_type_map=True)


def predicted(calculator: Calculator, structures: list[Atoms]) -> dict[str, np.ndarray]:
    found: dict[str, list[Any]] = {"energy": [], "forces": [], "stress": []}
    for structure in structures:
        atoms = structure.copy()
        atoms.calc = calculator
        found["energy"].append(atoms.get_potential_energy())
        found["forces"].append(atoms.get_forces())
        found["stress"].append(atoms.get_stress(voigt=False))
    return {field: np.array(values) for field, values in found.items()}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, np.ndarray], tolerance: float) -> None:
    assert len(expected["energy"]) == 3
    for field, value in expected.items():
        if field in found:
            assert np.abs(value).max() > 1e-4, field
            np.testing.assert_allclose(found[field], value, rtol=tolerance, atol=tolerance, err_msg=field)
    assert {"energy", "forces"} <= set(found)


def exported(run: Run, name: str, folder: Path, *options: str) -> Path:
    output = folder / f"{name}{FORMATS[PAIRS[name]].suffix}"
    main([str(run.checkpoint), "--to", PAIRS[name], "-o", str(output), *options])
    return output


@HERE
def test_the_package_predicts_what_was_validated_in_float64(name: str, runs: Any, tmp_path: Path) -> None:
    run = runs(name, *DOUBLE)
    with guest(torch.float64):
        found = predicted(calculator(name, exported(run, name, tmp_path)), run.structures)
    assert_same(found, run.predictions, 5e-6 if name == "sevennet" else 1e-10)  # sevenn computes in float32


@pytest.mark.parametrize("name", INSTALLED[:1])
def test_the_package_predicts_with_the_averaged_weights_that_were_validated(
    name: str, runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(name, *AVERAGED)
    file = exported(run, name, tmp_path)
    assert "averaged weights" in capsys.readouterr().out
    with guest(torch.float64):
        found = predicted(calculator(name, file), run.structures)
    assert_same(found, run.predictions, 2e-5)


@pytest.mark.slow
@needs("nequip")
def test_nequip_packages_it_without_any_data(runs: Any, tmp_path: Path) -> None:
    run_of_model = runs("nequip", *DOUBLE)
    file = exported(run_of_model, "nequip", tmp_path)
    (run_of_model.checkpoint.parents[1] / "frames.xyz").unlink(missing_ok=True)
    package = tmp_path / "alloy.nequip.zip"
    done = run([str(BIN / "nequip-package"), "build", str(file), str(package)], tmp_path)
    assert done.code == 0, done.err[-2000:]
    with guest(torch.float64):
        found = predicted(calculator("nequip", package), run_of_model.structures)
    assert_same(found, run_of_model.predictions, 1e-10)


@pytest.mark.slow
@needs("nequip")
def test_nequip_compiles_it_for_ase(runs: Any, tmp_path: Path) -> None:
    run_of_model = runs("nequip", *DOUBLE)
    file, compiled = exported(run_of_model, "nequip", tmp_path), tmp_path / "alloy.nequip.pt2"
    options = ["--mode", "aotinductor", "--device", "cpu", "--target", "ase"]
    done = run([str(BIN / "nequip-compile"), str(file), str(compiled), *options], tmp_path, timeout=290)
    assert done.code == 0, done.err[-2000:]
    ase.io.write(tmp_path / "structures.xyz", run_of_model.structures)
    script = """
import json, sys, ase.io
from nequip.integrations.ase import NequIPCalculator
calculator = NequIPCalculator.from_compiled_model(sys.argv[1], device="cpu", chemical_species_to_atom_type_map=True)
found = {"energy": [], "forces": []}
for atoms in ase.io.read("structures.xyz", index=":"):
    atoms.calc = calculator
    found["energy"].append(float(atoms.get_potential_energy()))
    found["forces"].append(atoms.get_forces().tolist())
print("found", json.dumps(found))
"""
    done = run([sys.executable, "-c", script, str(compiled)], tmp_path)
    assert done.code == 0, done.err[-2000:]
    found = json.loads(next(line for line in done.out.splitlines() if line.startswith("found")).removeprefix("found"))
    assert_same(found, run_of_model.predictions, 1e-7)  # eight digits of the positions are in the file of structures


@needs("mace")
def test_mace_evaluates_it_and_makes_a_model_for_lammps(runs: Any, tmp_path: Path) -> None:
    run_of_model = runs("mace", *DOUBLE)
    file = exported(run_of_model, "mace", tmp_path)
    ase.io.write(tmp_path / "structures.xyz", run_of_model.structures)
    arguments = ["--model", str(file), "--configs", "structures.xyz", "--output", "predicted.xyz", "--compute_stress"]
    done = run([str(BIN / "mace_eval_configs"), *arguments], tmp_path)
    assert done.code == 0, done.err[-2000:]
    evaluated = ase.io.read(tmp_path / "predicted.xyz", index=":")
    found = {
        "energy": [atoms.info["MACE_energy"] for atoms in evaluated],
        "forces": [atoms.arrays["MACE_forces"] for atoms in evaluated],
        "stress": [np.array(atoms.info["MACE_stress"]).reshape(3, 3) for atoms in evaluated],
    }
    assert_same(found, run_of_model.predictions, 1e-7)  # eight digits of the positions are in the file of structures

    done = run([str(BIN / "mace_create_lammps_model"), str(file)], tmp_path)
    assert done.code == 0, done.err[-2000:]
    for_lammps = torch.jit.load(f"{file}-lammps.pt")
    found = {"energy": [], "forces": []}
    for atoms in run_of_model.structures:
        outputs = for_lammps(*_as_lammps_calls(atoms, for_lammps))
        found["energy"].append(float(outputs["total_energy_local"].detach()))
        found["forces"].append(outputs["forces"].numpy())
    assert_same(found, run_of_model.predictions, 1e-10)


def _as_lammps_calls(atoms: Atoms, model: Any) -> tuple[dict[str, Tensor], Tensor, bool]:
    batch = collate([frame_to_sample(Frame(atoms), ("Cu", "Ag"), float(model.r_max), dtype=torch.float64)])
    numbers = model.atomic_numbers.tolist()
    elements = torch.tensor([numbers.index(number) for number in atoms.numbers])
    center = batch["edge_index"][0]
    return (
        {
            "positions": batch["pos"].requires_grad_(),
            "node_attrs": nn.functional.one_hot(elements, len(numbers)).double(),
            "edge_index": batch["edge_index"],
            "unit_shifts": batch["edge_cell_shift"],
            "shifts": torch.einsum("ea,eab->eb", batch["edge_cell_shift"], batch["cell"][batch["batch"][center]]),
            "cell": batch["cell"].reshape(-1, 3),
            "batch": batch["batch"],
            "ptr": torch.tensor([0, len(atoms)]),
        },
        torch.ones(len(atoms), dtype=torch.float64),
        False,
    )


@needs("sevennet")
def test_sevennet_infers_from_it_and_makes_a_model_for_lammps(runs: Any, tmp_path: Path) -> None:
    run_of_model = runs("sevennet", *DOUBLE)
    file = exported(run_of_model, "sevennet", tmp_path)
    ase.io.write(tmp_path / "structures.xyz", run_of_model.structures)
    command = [str(BIN / "sevenn"), "inference", str(file), "structures.xyz", "--output", "found", "--allow_unlabeled"]
    done = run(command, tmp_path)
    assert done.code == 0, done.err[-2000:]
    with (tmp_path / "found" / "per_graph.csv").open() as graphs, (tmp_path / "found" / "per_atom.csv").open() as atoms:
        energies = [float(row["inferred_total_energy"]) for row in csv.DictReader(graphs)]
        forces = [[float(row[f"inferred_force_{axis}"]) for axis in "xyz"] for row in csv.DictReader(atoms)]
    found = {"energy": energies, "forces": np.array(forces).reshape(run_of_model.predictions["forces"].shape)}
    assert_same(found, run_of_model.predictions, 5e-6)
    done = run([str(BIN / "sevenn"), "get_model", str(file)], tmp_path)
    assert done.code == 0, done.err[-2000:]
    assert torch.jit.load(tmp_path / "deployed_serial.pt") is not None


def statistics() -> DataStatistics:
    return DataStatistics(TYPE_NAMES, torch.tensor(SHIFTS, dtype=torch.float64), 1.7, 12.0, 5, 20)


@HERE
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_references_of_elements_in_any_order_go_into_the_file(name: str, dtype: str, tmp_path: Path) -> None:
    model, fmt = build(name, statistics(), dtype=dtype).eval(), FORMATS[PAIRS[name]]
    example = example_structure(TYPE_NAMES, CUTOFF)
    batch = collate([frame_to_sample(Frame(example), TYPE_NAMES, CUTOFF, dtype=torch.float64)])
    torch.save(fmt.content(model, example, None), tmp_path / "model")
    expected, found = model(batch), fmt.predictions(tmp_path / "model", example, batch, model)
    assert float(expected["total_energy"].abs()) > 7000
    rounded = 2e-3 if name == "sevennet" else {"float32": 2e-4, "float64": 1e-9}[dtype] if name == "mace" else 1e-9
    torch.testing.assert_close(found["total_energy"], expected["total_energy"], rtol=0, atol=rounded)
    remarks = fmt.remarks(model, getattr(torch, dtype))
    assert any("float32" in remark for remark in remarks) == (rounded > 1e-6)
    rounding = 1e-10 if dtype == "float64" and name != "sevennet" else 1e-5
    for field in ("forces", "stress"):
        torch.testing.assert_close(found[field], expected[field].double(), rtol=rounding, atol=rounding)
    assert not expected["forces"].abs().max() < 1e-3


@needs("mace")
def test_a_mace_model_is_like_those_that_mace_run_train_writes(tmp_path: Path) -> None:
    from mace.modules import ScaleShiftMACE
    from mace.tools.scripts_utils import extract_config_mace_model

    from harness.export.mace import mace_module

    model = mace_module(build("mace", statistics()))
    assert model.heads == ["Default"]
    assert model.use_reduced_cg is False  # so they are: MACE converts weights for fused kernels by it
    assert model.atomic_numbers.tolist() == [1, 8, 29]
    assert model.atomic_energies_fn.atomic_energies.tolist() == [[-13.6, -2037.8, -1100.25]]
    assert (model.scale_shift.scale.shape, model.scale_shift.shift.shape) == ((1,), (1,))
    with guest(torch.float64):
        again = ScaleShiftMACE(**extract_config_mace_model(model))
        again.load_state_dict(model.state_dict())
    single = mace_module(build("mace", statistics()), torch.float32)
    assert {value.dtype for value in single.state_dict().values() if value.is_floating_point()} == {torch.float32}


@needs("mace")
def test_the_dtype_of_a_mace_model_can_be_chosen(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of_model = runs("mace", *AVERAGED)
    file = exported(run_of_model, "mace", tmp_path, "--dtype", "float64")
    assert "--default_dtype float64" in capsys.readouterr().out
    with guest():
        model = torch.load(file, weights_only=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    with guest(torch.float64):
        assert_same(predicted(calculator("mace", file), run_of_model.structures), run_of_model.predictions, 2e-5)


def test_a_state_dict_is_plain_and_has_what_the_model_is_rebuilt_from(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = runs("schnet", *AVERAGED).checkpoint
    main([str(checkpoint), "--to", "state-dict", "-o", str(tmp_path / "weights.pt")])
    assert "averaged weights of step 6" in capsys.readouterr().out
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    model, metadata = harness.load_model(checkpoint).model, found["metadata"]
    own = model.state_dict()
    assert found["state_dict"].keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in found["state_dict"].items())
    json.dumps(metadata, allow_nan=False)
    assert metadata["model"]["_target_"].startswith("harness.models.")
    assert (metadata["type_names"], metadata["atomic_numbers"], metadata["cutoff"]) == (["Cu", "Ag"], [29, 47], 3.5)
    assert metadata["energy_shifts"].keys() == {"Cu", "Ag"}
    assert metadata["units"]["forces"] == "eV/Å"
    assert metadata["averaged"] is True
    assert "torch" in metadata["versions"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of an export that ends with exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_model_of_another_kind_is_refused(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = runs("schnet", *AVERAGED).checkpoint
    for name in FORMATS:
        line = refused(capsys, checkpoint, "--to", name, "-o", tmp_path / "out")
        assert f"--to {name} is for model=" in line
        assert "is of model=schnet: --to state-dict, which takes any model" in line
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_replaced_by_force_alone(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = runs("schnet", *AVERAGED).checkpoint, tmp_path / "weights.pt"
    output.write_text("precious")
    line = refused(capsys, checkpoint, "--to", "state-dict", "-o", output)
    assert f"{output} is there already: --force replaces it, or -o gives another name" in line
    assert output.read_text() == "precious"
    main([str(checkpoint), "--to", "state-dict", "-o", str(output), "--force"])
    assert "state_dict" in torch.load(output, weights_only=True)
    line = refused(capsys, checkpoint, "--to", "state-dict", "-o", checkpoint, "--force")
    assert "is the checkpoint itself" in line
    assert "is a folder" in refused(capsys, checkpoint, "--to", "state-dict", "-o", tmp_path)


def test_the_name_is_made_of_that_of_the_checkpoint(runs: Any) -> None:
    checkpoint = runs("schnet", *AVERAGED).checkpoint
    main([str(checkpoint), "--to", "state-dict"])
    assert checkpoint.with_name("last-state-dict.pt").is_file()


def test_what_is_no_checkpoint_or_lacks_what_is_needed_is_told(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none.ckpt: there is no such file" in refused(capsys, tmp_path / "none.ckpt", "--to", "state-dict")
    (tmp_path / "text.ckpt").write_text("no archive")
    assert "is no checkpoint" in refused(capsys, tmp_path / "text.ckpt", "--to", "mace")
    old = torch.load(runs("schnet", *AVERAGED).checkpoint, weights_only=True)
    del old["made_with"]
    torch.save(old, tmp_path / "old.ckpt")
    for name in (*FORMATS, "state-dict"):
        line = refused(capsys, tmp_path / "old.ckpt", "--to", name)
        assert "as checkpoints of version 0.1.0 do" in line
    line = refused(capsys, runs("schnet", *AVERAGED).checkpoint, "--to", "state-dict", "--dtype", "float64")
    assert "--dtype is of --to mace alone" in line
    assert not list(tmp_path.glob("*.model"))


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = next(name for name in PACKAGES if name not in INSTALLED)
    content = torch.load(runs("schnet", *AVERAGED).checkpoint, weights_only=True)
    content["made_with"]["architecture"] = {
        "_target_": f"harness.models.{'nequip' if missing == 'allegro' else missing}.{missing}_force_field",
        "cutoff": 3.5,
    }
    torch.save(content, tmp_path / "of_another.ckpt")
    line = refused(capsys, tmp_path / "of_another.ckpt", "--to", PAIRS[missing])
    assert f"pip install 'potential-harness[{missing}]'" in line


@needs("nequip")
def test_a_file_that_predicts_something_else_is_not_kept(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(NequIPFormat):
        def content(self, *arguments: Any) -> dict[str, Any]:
            content = super().content(*arguments)
            (name,) = [name for name in content["state_dict"] if name.endswith(".scales")]
            content["state_dict"][name] = content["state_dict"][name] * 1.001
            return content

    monkeypatch.setitem(FORMATS, "nequip", Wrong())
    line = refused(capsys, runs("nequip", *DOUBLE).checkpoint, "--to", "nequip", "-o", tmp_path / "wrong.ckpt")
    assert "the file was not kept" in line
    assert "forces by" in line
    assert not list(tmp_path.iterdir())


@needs("nequip")
def test_references_that_are_slightly_wrong_are_found_beside_large_ones(
    runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single precision, whose rounding of -10 000 eV is 1 meV."""

    class Wrong(NequIPFormat):
        def content(self, *arguments: Any) -> dict[str, Any]:
            content = super().content(*arguments)
            (name,) = [name for name in content["state_dict"] if name.endswith(".shifts")]
            content["state_dict"][name] = content["state_dict"][name] + 0.1
            return content

    run = runs("nequip", "model.energy_shifts={Cu: -1000.0, Ag: -2000.0}")
    monkeypatch.setitem(FORMATS, "nequip", Wrong())
    line = refused(capsys, run.checkpoint, "--to", "nequip", "-o", tmp_path / "wrong.ckpt")
    assert "predicts other values" in line
    assert "total_energy by" in line


def test_a_made_up_structure_has_every_element_and_neighbours() -> None:
    names = [str(symbol) for symbol in ase.data.chemical_symbols[1:90]]
    for type_names, cutoff in ((["H"], 2.0), (["Cu", "Ag"], 3.5), (names, 5.0)):
        atoms = example_structure(type_names, cutoff)
        assert set(atoms.get_chemical_symbols()) == set(type_names)
        batch = collate([frame_to_sample(Frame(atoms), type_names, cutoff)])
        assert len(atoms) >= 8
        assert int(torch.bincount(batch["edge_index"][0], minlength=len(atoms)).min()) >= 6
        assert np.array_equal(atoms.positions, example_structure(type_names, cutoff).positions)
