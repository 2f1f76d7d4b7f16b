"""Mistakes are answered where they are made: with the offender, what was found, and what is valid."""

from __future__ import annotations

import math

import pytest
import torch
import torchmetrics
from omegaconf import OmegaConf
from support import oracle
from support.oracle import Component

import harness

TYPES = ["H", "C", "O"]
KEYS = "metric, field, coeff, name, per_type, per_type_coeffs, ignore_nan"
MSE = harness.MeanSquaredError


def entry(**changes):
    """A good component, with changes; a key set to ``...`` is left out."""
    given = {"field": "forces", "metric": MSE(), "coeff": 1.0, **changes}
    return {key: value for key, value in given.items() if value is not ...}


class NoLevel:
    def __call__(self, preds, target):
        return preds["forces"], target["forces"]


class BadLevel(NoLevel):
    level = "atom"


def per_type(**changes):
    return entry(per_type=True, **changes)


CONSTRUCTION = {
    # the list
    "a dictionary": (entry(), TypeError, r"list of dictionaries.*dict"),
    "a string": ("forces", TypeError, r"list of dictionaries.*str"),
    "an empty list": ([], ValueError, r"empty.*'metric'"),
    "no dictionary in the list": ([MSE()], TypeError, r"metrics\[0\].*dictionary.*MeanSquaredError"),
    # metric
    "missing metric": ([entry(), entry(metric=..., name="a")], ValueError, r"metrics\[1\].*`metric`"),
    "no metric": ([entry(metric=None)], ValueError, r"metrics\[0\].*`metric`"),
    "a function as metric": (
        [entry(metric=torch.nn.MSELoss())],
        TypeError,
        r"metrics\[0\].*torchmetrics.Metric.*MSELoss",
    ),
    "a name as metric": ([entry(metric="mse")], TypeError, r"torchmetrics.Metric.*'mse'"),
    "a config as metric": ([entry(metric={"path": "x"})], TypeError, r"_target_"),
    "a class that needs arguments": (
        [entry(metric=harness.StratifiedHuberForceLoss)],
        TypeError,
        r"StratifiedHuberForceLoss needs arguments.*delta_dict.*instance",
    ),
    # keys and names
    "unknown key": ([entry(coef=1)], ValueError, rf"metrics\[0\].*'coef'.*{KEYS}"),
    "repeated name": ([entry(name="a"), entry(name="a", field="stress")], ValueError, r"'a'.*unique"),
    "repeated automatic name": ([entry(), entry(coeff=2)], ValueError, r"'F_mse'.*unique"),
    "a pattern as a name": ([entry(name="F*")], ValueError, r"'F\*' has a \* in it"),
    "reserved name": ([entry(name="weighted_sum")], ValueError, r"'weighted_sum' is reserved"),
    "name of a type's value": ([per_type(name="a"), entry(name="a_C")], ValueError, r"a_C.*component 'a'"),
    "types of two components": (
        [per_type(name="a"), per_type(name="a_H")],
        ValueError,
        r"a_H",
    ),
    "name is no string": ([entry(name=3)], TypeError, r"`name`.*string.*3"),
    "empty name": ([entry(name="")], TypeError, r"`name`.*string"),
    # field
    "unknown field": ([entry(field="force")], KeyError, r"'force'.*forces.*total_energy.*register_field"),
    "field of a wrong type": ([entry(field=3)], TypeError, r"3 of type int.*modifier.*level"),
    "modifier without a level": ([entry(field=NoLevel())], TypeError, r"NoLevel.*level.*graph, node or edge"),
    "modifier's class": ([entry(field=BadLevel)], TypeError, r"BadLevel"),
    "modifier with a bad level": ([entry(field=BadLevel())], ValueError, r"'atom'.*graph, node, edge"),
    "our metric without a field": ([entry(field=None)], ValueError, r"MeanSquaredError.*`field`"),
    "our metric, field left out": ([entry(field=...)], ValueError, r"MeanSquaredError.*`field`"),
    # flags
    "per_type is no flag": ([entry(per_type="yes")], TypeError, r"'F_mse'.*`per_type`.*true or false.*'yes'"),
    "ignore_nan is no flag": ([entry(ignore_nan=1)], TypeError, r"'F_mse'.*`ignore_nan`.*true or false.*1"),
    "per_type of a graph field": (
        [per_type(field="stress")],
        ValueError,
        r"'stress_mse'.*`per_type`.*level node.*graph",
    ),
    "per_type of a modifier": (
        [per_type(field=harness.PerAtomModifier("total_energy"))],
        ValueError,
        r"'per_atom_E_mse'.*`per_type`.*graph",
    ),
    "per_type of an edge field": ([per_type(field="edge_lengths")], ValueError, r"`per_type`.*level node.*edge"),
    "per_type without a field": (
        [per_type(field=None, metric=torchmetrics.MeanMetric(), name="a")],
        ValueError,
        r"'a'.*`per_type` needs a `field`",
    ),
    "ignore_nan without a field": (
        [entry(field=None, metric=torchmetrics.MeanMetric(), name="a", ignore_nan=True)],
        ValueError,
        r"'a'.*`ignore_nan` needs a `field`",
    ),
    # coefficients
    "negative coefficient": ([entry(coeff=-0.5)], ValueError, r"'F_mse'.*not negative.*-0.5"),
    "infinite coefficient": ([entry(coeff=math.inf)], ValueError, r"'F_mse'.*finite.*inf"),
    "NaN coefficient": ([entry(coeff=math.nan)], ValueError, r"'F_mse'.*finite.*nan"),
    "all coefficients zero": ([entry(coeff=0), entry(coeff=0.0, name="a")], ValueError, r"F_mse.*above 0.*null"),
    "coefficient is a string": ([entry(coeff="1")], TypeError, r"'F_mse'.*number.*'1'"),
    "coefficient is a flag": ([entry(coeff=True)], TypeError, r"'F_mse'.*number.*True"),
    "coefficient is a tensor": ([entry(coeff=torch.ones(2))], TypeError, r"'F_mse'.*number.*Tensor"),
    # coefficients of types
    "weights without per_type": ([entry(per_type_coeffs={"H": 1})], ValueError, r"'F_mse'.*`per_type: true`"),
    "weights of an unknown type": (
        [per_type(per_type_coeffs={"H": 1, "C": 1, "O": 1, "N": 1})],
        ValueError,
        r"'F_mse'.*'H', 'C', 'O'.*unknown: \['N'\].*missing: none",
    ),
    "weights miss a type": (
        [per_type(per_type_coeffs={"H": 1, "C": 1})],
        ValueError,
        r"'F_mse'.*unknown: none.*missing: \['O'\]",
    ),
    "zero weight": ([per_type(per_type_coeffs={"H": 1, "C": 0, "O": 1})], ValueError, r"type C.*above 0.*0"),
    "negative weight": ([per_type(per_type_coeffs={"H": -1, "C": 1, "O": 1})], ValueError, r"type H.*above 0.*-1"),
    "infinite weight": ([per_type(per_type_coeffs={"H": 1, "C": math.inf, "O": 1})], ValueError, r"type C.*finite"),
    "NaN weight": ([per_type(per_type_coeffs={"H": 1, "C": math.nan, "O": 1})], ValueError, r"type C.*nan"),
    "weight is a string": ([per_type(per_type_coeffs={"H": 1, "C": "1", "O": 1})], TypeError, r"type C.*number.*'1'"),
    "weights are a list": ([per_type(per_type_coeffs=[1, 2, 3])], TypeError, r"'F_mse'.*maps type names.*list"),
}


@pytest.mark.parametrize("mistake", CONSTRUCTION)
def test_a_mistake_in_the_list(mistake):
    metrics, error, message = CONSTRUCTION[mistake]
    with pytest.raises(error, match=f"(?s){message}"):
        harness.MetricsManager(metrics, TYPES)


@pytest.mark.parametrize("mistake", ["unknown key", "negative coefficient", "weights miss a type", "repeated name"])
def test_the_same_mistake_in_an_omegaconf_list(mistake):
    metrics, error, message = CONSTRUCTION[mistake]
    with pytest.raises(error, match=f"(?s){message}"):
        harness.MetricsManager(OmegaConf.create(metrics, flags={"allow_objects": True}), TYPES)


@pytest.mark.parametrize(
    ("type_names", "error", "message"),
    [
        (None, ValueError, r"'F_mse'.*`per_type` needs `type_names`"),
        ([], ValueError, r"'F_mse'.*`per_type` needs `type_names`"),
        ("HCO", TypeError, r"list of names.*'HCO'"),
        (["H", "C", "H"], ValueError, r"repeats.*'H', 'C', 'H'"),
        (["H", False], TypeError, r"strings.*False.*quote"),
        (["H", 6], TypeError, r"strings.*6"),
        (["H", ""], TypeError, r"strings.*''"),
    ],
)
def test_a_mistake_in_the_type_names(type_names, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        harness.MetricsManager([per_type()], type_names)


def test_a_value_of_a_type_cannot_be_called_as_the_weighted_sum():
    with pytest.raises(ValueError, match="weighted_sum"):
        harness.MetricsManager([per_type(name="weighted")], ["sum", "other"])


# --- the first step ---


def batch():
    features, target = oracle.draw(0, [2, 3])
    return oracle.predict(features, oracle.parameters()), target


EVERYTHING = [
    Component("total_energy", "mse", 1.0),
    Component("total_energy", "mae", per_atom=True),
    Component("forces", "mse", 1.0, per_type=True),
]


@pytest.mark.parametrize(
    ("where", "changes", "error", "message"),
    [
        ("preds", {"forces": None}, KeyError, r"'forces'.*predictions.*stress, total_energy"),
        ("target", {"forces": None}, KeyError, r"'forces'.*target.*num_atoms, stress, total_energy"),
        ("target", {"num_atoms": None}, KeyError, r"'num_atoms'.*missing"),
        ("target", {"atom_types": None}, KeyError, r"'atom_types'.*missing"),
        ("target", {"total_energy": torch.zeros(2)}, ValueError, r"'E'.*\[2, 1\].*\[2\].*\[num_graphs, 1\]"),
        ("preds", {"total_energy": torch.zeros(2)}, ValueError, r"'E'.*\[2\].*\[2, 1\]"),
        ("preds", {"total_energy": torch.zeros(5, 1)}, ValueError, r"\[5, 1\].*\[2, 1\]"),
        ("preds", {"forces": torch.zeros(4, 3)}, ValueError, r"'F'.*\[4, 3\].*\[5, 3\]"),
        ("target", {"num_atoms": torch.tensor([5])}, ValueError, r"'total_energy'.*\[2, 1\].*1 graphs"),
        ("target", {"atom_types": torch.tensor([0, 1, 2, -1, 0])}, ValueError, r"-1 to 2.*'H', 'C', 'O'.*0 to 2"),
        ("target", {"atom_types": torch.tensor([0, 1, 3, 1, 0])}, ValueError, r"0 to 3.*3 type_names.*0 to 2"),
        ("target", {"atom_types": torch.tensor([0, 1, 2])}, ValueError, r"'F'.*\[5, 3\].*'atom_types'.*\[3\]"),
        ("target", {"atom_types": torch.zeros(5)}, TypeError, r"'atom_types'.*float32.*integers"),
        ("target", {"atom_types": torch.zeros(5, dtype=torch.bool)}, TypeError, r"'atom_types'.*bool.*integers"),
        ("target", {"forces": [[0.0] * 3] * 5}, TypeError, r"'forces'.*target.*list.*tensor"),
    ],
)
def test_a_mistake_in_the_first_batch(where, changes, error, message):
    preds, target = batch()
    changed = preds if where == "preds" else target
    for key, value in changes.items():
        if value is None:
            del changed[key]
        else:
            changed[key] = value
    with pytest.raises(error, match=f"(?s){message}"):
        oracle.manager(EVERYTHING, TYPES)(preds, target)


def test_a_failed_step_accumulates_nothing():
    manager = oracle.manager(EVERYTHING, TYPES)
    preds, target = batch()
    with pytest.raises(KeyError):
        manager({"forces": preds["forces"]}, target)
    expected = {name: value.item() for name, value in manager(preds, target).items()}
    assert {name: value.item() for name, value in manager.compute().items()} == expected


def test_types_are_checked_in_the_first_batch_that_has_atoms():
    manager = oracle.manager([Component("forces", "mse", 1.0, per_type=True)], TYPES)
    empty = torch.zeros(0, 3)
    manager({"forces": empty}, {"forces": empty, "atom_types": torch.zeros(0, dtype=torch.int64)})
    ones = torch.ones(1, 3)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        manager({"forces": ones}, {"forces": ones, "atom_types": torch.tensor([3])})


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_bad_type_in_a_later_batch_is_no_silent_value(bad):
    manager = oracle.manager([Component("forces", "mse", 1.0, per_type=True)], TYPES)
    preds, target = batch()
    manager(preds, target)
    target["atom_types"] = target["atom_types"].clone()
    target["atom_types"][0] = bad
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        manager(preds, target)


def test_predictions_without_a_tensor():
    with pytest.raises((ValueError, KeyError), match=r"forces|no tensor"):
        oracle.manager([Component("forces", "mse")])({}, batch()[1])
