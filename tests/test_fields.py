"""Fields: the registry, and what modifiers read from two batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import harness
from harness import fields
from harness.fields import MappedFieldModifier, PerAtomModifier, PlainField, as_modifier


@pytest.fixture
def registry(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(fields, "_REGISTRY", dict(fields._REGISTRY))


# --- registry ---


@pytest.mark.parametrize(
    ("name", "level", "unit"),
    [
        ("total_energy", "graph", "eV"),
        ("stress", "graph", "eV/Å³"),
        ("virial", "graph", "eV"),
        ("forces", "node", "eV/Å"),
        ("pos", "node", "Å"),
        ("edge_lengths", "edge", "Å"),
    ],
)
def test_known_fields(name, level, unit):
    spec = harness.field_spec(name)
    assert (spec.name, spec.level, spec.unit) == (name, level, unit)


def test_an_unknown_field_lists_the_valid_ones():
    with pytest.raises(KeyError, match=r"'force'.*dipole.*forces.*total_energy.*register_field"):
        harness.field_spec("force")


def test_a_registered_field_works_in_a_manager(registry):
    harness.register_field("spin", "node", "ħ", "S")
    manager = harness.MetricsManager(
        [{"field": "spin", "metric": harness.MeanAbsoluteError, "per_type": True}], ["H", "C"]
    )
    batch = {"spin": torch.tensor([1.0, 3.0]), "atom_types": torch.tensor([0, 1])}
    values = manager(batch, {**batch, "spin": torch.zeros(2)})
    assert {name: value.item() for name, value in values.items()} == {"S_mae_H": 1, "S_mae_C": 3, "S_mae": 2}
    assert harness.registered_fields()["spin"].unit == "ħ"


def test_the_registry_is_handed_out_as_a_copy():
    harness.registered_fields().clear()
    assert "forces" in harness.registered_fields()


def test_a_field_keeps_its_level(registry):
    with pytest.raises(ValueError, match=r"'forces'.*node.*graph"):
        harness.register_field("forces", "graph")
    assert harness.register_field("forces", "node", "Ha/Bohr").unit == "Ha/Bohr"


@pytest.mark.parametrize(
    ("name", "level", "error", "message"),
    [
        ("a", "atom", ValueError, r"'atom'.*'a'.*graph, node, edge"),
        ("", "node", TypeError, "non-empty string"),
        (3, "node", TypeError, "3"),
    ],
)
def test_bad_registrations(registry, name, level, error, message):
    with pytest.raises(error, match=message):
        harness.register_field(name, level)


# --- energy per atom ---


def energies(dtype):
    """Total energies near -9000 eV with an error of 1e-7 eV, and an integer number of atoms."""
    num_atoms = torch.tensor([3, 7, 49, 1000])
    target = torch.tensor([[-9000.123456789], [-8999.9], [-9123.4], [-9001.5]], dtype=dtype)
    return {"total_energy": target + 1e-7}, {"total_energy": target, "num_atoms": num_atoms}


def test_energies_per_atom_keep_float64():
    preds, target = energies(torch.float64)
    pair = PerAtomModifier("total_energy")(preds, target)
    for value, total in zip(pair, (preds, target), strict=True):
        exact = total["total_energy"].numpy() / target["num_atoms"].numpy()[:, None].astype(np.float64)
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 1000])
def test_energies_per_atom_keep_lower_precisions(dtype, factor):
    assert all(value.dtype == dtype for value in PerAtomModifier("total_energy", factor)(*energies(dtype)))


def test_factor():
    preds, target = energies(torch.float64)
    in_ev, in_mev = (PerAtomModifier("total_energy", factor)(preds, target)[0] for factor in (None, 1000))
    torch.testing.assert_close(in_mev, 1000 * in_ev, rtol=1e-15, atol=0)


def test_tensors_of_graphs_are_divided_row_by_row():
    stress = torch.ones(2, 3, 3)
    batch = {"stress": stress, "num_atoms": torch.tensor([2, 4])}
    predicted, _ = PerAtomModifier("stress")({"stress": stress}, batch)
    assert predicted[:, 0, 0].tolist() == [0.5, 0.25]
    assert predicted.shape == stress.shape
    assert (
        PerAtomModifier("stress")({"stress": stress}, {**batch, "num_atoms": torch.tensor([[2], [4]])})[0][1, 2, 2]
        == 0.25
    )


def test_num_atoms_may_come_with_the_predictions():
    preds, target = energies(torch.float64)
    moved = {**preds, "num_atoms": target.pop("num_atoms")}
    assert PerAtomModifier("total_energy")(moved, target)[0].shape == (4, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("forces",), ValueError, r"graph fields only; 'forces' is a node field"),
        (("edge_lengths",), ValueError, r"'edge_lengths' is a edge field|'edge_lengths' is an edge field"),
        (("energy",), KeyError, r"'energy'.*total_energy"),
        (("total_energy", 0), ValueError, r"factor.*not 0"),
        (("total_energy", math.inf), ValueError, r"factor.*finite.*inf"),
        (("total_energy", math.nan), ValueError, r"factor.*finite.*nan"),
        (("total_energy", "2"), TypeError, r"factor.*number.*'2'"),
        (("total_energy", True), TypeError, r"factor.*number.*True"),
    ],
)
def test_bad_per_atom_modifiers(arguments, error, message):
    with pytest.raises(error, match=message):
        PerAtomModifier(*arguments)


# --- other modifiers ---


def test_mapped_fields():
    modifier = MappedFieldModifier("charge", "magmom")
    preds, target = {"charge": torch.ones(2)}, {"magmom": torch.zeros(2)}
    assert modifier(preds, target) == (preds["charge"], target["magmom"])
    assert modifier.level == "node"
    with pytest.raises(ValueError, match=r"'forces' \(node\).*'stress' \(graph\)"):
        MappedFieldModifier("forces", "stress")
    with pytest.raises(KeyError, match="'magmoms'"):
        MappedFieldModifier("charge", "magmoms")


class Norm:
    """A user's modifier, in the package's words."""

    level = "node"

    def __call__(self, preds, target):
        return preds["forces"].norm(dim=-1), target["forces"].norm(dim=-1)

    def __str__(self):
        return "F_norm"


class NequipStyle:
    """A modifier as NequIP writes them: the level is called ``type``."""

    type = "node"

    def __call__(self, preds, target):
        return 2 * preds["forces"], 2 * target["forces"]

    def __str__(self):
        return "doubled"


@pytest.mark.parametrize(("modifier", "expected"), [(Norm(), (5, 13)), (NequipStyle(), (14 / 3, 34 / 3))])
def test_modifiers_of_users(modifier, expected):
    manager = harness.MetricsManager(
        [{"field": modifier, "metric": harness.MeanAbsoluteError(), "per_type": True}], ["H", "C"]
    )
    preds = {"forces": torch.tensor([[3.0, 4.0, 0.0], [5.0, 0.0, 12.0]])}
    target = {"forces": torch.zeros(2, 3), "atom_types": torch.tensor([0, 1])}
    values = manager(preds, target)
    assert list(values) == [f"{modifier}_mae_H", f"{modifier}_mae_C", f"{modifier}_mae"]
    assert [value.item() for value in values.values()][:2] == pytest.approx(expected)


def test_names():
    assert [str(as_modifier(name)[0]) for name in ("total_energy", "forces", "stress")] == ["E", "F", "stress"]
    assert str(PerAtomModifier("total_energy")) == "per_atom_E"
    assert str(MappedFieldModifier("stress", "virial")) == "pred_stress_label_virial"


def test_equal_modifiers_are_one_key():
    assert PerAtomModifier("total_energy") == PerAtomModifier("total_energy")
    assert len({PerAtomModifier("total_energy"), PerAtomModifier("total_energy"), PerAtomModifier("stress")}) == 2
    assert len({PerAtomModifier("total_energy"), PerAtomModifier("total_energy", 1000)}) == 2
    assert len({PlainField("forces"), PlainField("forces"), MappedFieldModifier("forces", "forces")}) == 2


def test_a_missing_field_names_what_there_is():
    with pytest.raises(KeyError, match=r"'forces'.*predictions.*pos, stress"):
        PlainField("forces")({"stress": torch.ones(1), "pos": torch.ones(1)}, {})
    with pytest.raises(KeyError, match=r"'num_atoms'.*total_energy"):
        PerAtomModifier("total_energy")({"total_energy": torch.ones(1, 1)}, {"total_energy": torch.ones(1, 1)})
