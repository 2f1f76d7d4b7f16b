"""The ready-made managers: their components, defaults and errors, and that they are what their names say."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from support import oracle
from support.oracle import Component

import harness

TYPES = ["H", "C", "O"]
ERRORS = ["rmse", "mae", "maxabserr"]


def names(*prefixes):
    return [f"{prefix}_{error}" for prefix in prefixes for error in ERRORS]


ENERGY = names("total_energy", "per_atom_energy")
DEFAULTS = {
    "EnergyForceLoss": {"per_atom_energy_mse": 1, "forces_mse": 1},
    "EnergyForceStressLoss": {"per_atom_energy_mse": 1, "forces_mse": 1, "stress_mse": 1},
    "EnergyOnlyLoss": {"per_atom_energy_mse": 1},
    "EnergyForceMetrics": {**dict.fromkeys(ENERGY + names("forces")), "total_energy_rmse": 1, "forces_rmse": 1},
    "EnergyForceStressMetrics": {
        **dict.fromkeys(ENERGY + names("forces", "stress")),
        **dict.fromkeys(["total_energy_rmse", "forces_rmse", "stress_rmse"], 1),
    },
    "EnergyOnlyMetrics": {**dict.fromkeys(ENERGY), "total_energy_rmse": 1},
}
PRESETS = list(DEFAULTS)
LOSSES = [name for name in PRESETS if name.endswith("Loss")]


def batch(**options):
    features, target = oracle.draw(0, [2, 3, 1], **options)
    return oracle.predict(features, oracle.parameters()), target


@pytest.mark.parametrize("preset", PRESETS)
def test_components_and_coefficients(preset):
    manager = getattr(harness, preset)()
    assert isinstance(manager, harness.MetricsManager)
    assert manager.given_coeffs == DEFAULTS[preset]
    assert list(manager.entries) == list(DEFAULTS[preset])


@pytest.mark.parametrize("preset", LOSSES)
def test_total_energies(preset):
    manager = getattr(harness, preset)(per_atom_energy=False)
    assert list(manager.entries) == [name.replace("per_atom", "total") for name in DEFAULTS[preset]]


@pytest.mark.parametrize("preset", PRESETS)
def test_values(preset):
    preds, target = batch()
    manager = getattr(harness, preset)()
    values = manager(preds, target)
    error_of = {"maxabserr": "max"}
    parts = []
    for name, coeff in DEFAULTS[preset].items():
        field, error = name.rsplit("_", 1)
        per_atom = field == "per_atom_energy"
        parts.append(
            Component("total_energy" if per_atom else field, error_of.get(error, error), coeff, per_atom=per_atom)
        )
    expected = oracle.values(parts, preds, target)
    for name, part in zip(DEFAULTS[preset], parts, strict=True):
        np.testing.assert_allclose(values[name].item(), expected[part.name], rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(values["weighted_sum"].item(), expected["weighted_sum"], rtol=1e-12)


def test_coefficients_of_losses_are_named_by_field():
    manager = harness.EnergyForceStressLoss(coeffs={"forces": 10, "stress": None})
    assert manager.given_coeffs == {"per_atom_energy_mse": 1, "forces_mse": 10, "stress_mse": None}


def test_coefficients_of_metrics_are_named_by_component():
    manager = harness.EnergyForceMetrics(coeffs={"forces_mae": 2, "per_atom_energy_mae": None})
    assert {name: coeff for name, coeff in manager.given_coeffs.items() if coeff is not None} == {"forces_mae": 2}


def test_force_coefficients_by_type():
    manager = harness.EnergyForceLoss(per_type_forces_coeffs={"H": 1, "C": 3, "O": 0.5}, type_names=TYPES)
    preds, target = batch()
    values = manager(preds, target)
    parts = [
        Component("total_energy", "mse", 1.0, per_atom=True),
        Component("forces", "mse", 1.0, True, weights=(1, 3, 0.5)),
    ]
    expected = oracle.values(parts, preds, target, TYPES)
    assert [name for name in values if name.startswith("forces_mse_")] == [f"forces_mse_{kind}" for kind in TYPES]
    np.testing.assert_allclose(values["weighted_sum"].item(), expected["weighted_sum"], rtol=1e-12)
    with pytest.raises(ValueError, match="type_names"):
        harness.EnergyForceLoss(per_type_forces_coeffs={"H": 1})


@pytest.mark.parametrize("preset", PRESETS)
def test_missing_labels(preset):
    fields = [field for field in ("total_energy", "forces", "stress") if any(field in n for n in DEFAULTS[preset])]
    fields = ["total_energy", *(field for field in fields if field != "total_energy")]
    preds, target = batch(unlabelled=0.3)
    masked = getattr(harness, preset)(ignore_nan=dict.fromkeys(fields, True))(preds, target)
    assert all(torch.isfinite(value) for value in masked.values())
    plain = getattr(harness, preset)(ignore_nan={"total_energy": False})(preds, target)
    assert plain["weighted_sum"].isnan()


@pytest.mark.parametrize("preset", PRESETS)
def test_extra_metrics(preset):
    extra = [{"field": "forces", "metric": harness.HuberLoss(), "coeff": 3, "per_type": True}]
    manager = getattr(harness, preset)(type_names=TYPES, extra_metrics=extra)
    assert manager.given_coeffs == {**DEFAULTS[preset], "F_huber": 3}
    assert "F_huber_C" in manager(*batch())
    assert "F_huber" not in getattr(harness, preset)().entries


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("argument", ["coeffs", "ignore_nan"])
def test_unknown_keys_list_the_valid_ones(preset, argument):
    valid = "total_energy"
    if argument == "coeffs" and preset not in LOSSES:
        valid = "total_energy_rmse, total_energy_mae, total_energy_maxabserr, per_atom_energy_rmse"
    with pytest.raises(ValueError, match=f"`{argument}`.*'force'.*{valid}"):
        getattr(harness, preset)(**{argument: {"force": True}})
    with pytest.raises(TypeError, match=f"`{argument}`.*dictionary"):
        getattr(harness, preset)(**{argument: [1]})


@pytest.mark.parametrize("preset", PRESETS)
def test_no_mutable_defaults(preset):
    for parameter in inspect.signature(getattr(harness, preset)).parameters.values():
        assert parameter.default is None or isinstance(parameter.default, bool | str)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_gives_gradients_to_every_field_in_the_sum(preset):
    features, target = oracle.draw(0, [2, 3, 1])
    theta = oracle.parameters()
    getattr(harness, preset)()(oracle.predict(features, theta), target)["weighted_sum"].backward()
    assert theta.grad.abs().sum() > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_from_yaml(preset):
    config = OmegaConf.create(
        f"""
        _target_: harness.{preset}
        type_names: [H, C, O]
        ignore_nan: {{total_energy: true}}
        coeffs: {{total_energy{"" if preset in LOSSES else "_rmse"}: 2.5}}
        extra_metrics:
          - {{metric: {{_target_: harness.MeanAbsoluteError}}, field: forces, per_type: true, name: extra}}
        """
    )
    manager = instantiate(config)
    assert 2.5 in manager.given_coeffs.values()
    assert list(manager.entries)[-1] == "extra"
    assert "extra_O" in manager(*batch())
