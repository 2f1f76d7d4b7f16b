"""MetricsManager in one process: values, coefficients, types, NaN labels, and what NequIP's callbacks touch."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from support import oracle
from support.oracle import Component
from support.step_cost import Operators

import harness

TYPES = ("H", "C", "O")
PARTS = [
    Component("total_energy", "mse", 1.0, ignore_nan=True, per_atom=True),
    Component("forces", "rmse", 3.0, per_type=True, ignore_nan=True),
    Component("stress", "mae", None, ignore_nan=True),
    Component("forces", "max", None),
]


def as_floats(values):
    return {name: value.item() for name, value in values.items()}


def batch(seed=0, atoms=(2, 3), **options):
    features, target = oracle.draw(seed, atoms, **options)
    return oracle.predict(features, oracle.parameters()), target


def forces(prediction, target, types=None):
    """Two batches of forces alone; the prediction is a leaf with a gradient."""
    preds = {"forces": torch.tensor(prediction, dtype=torch.float64, requires_grad=True)}
    labels = {"forces": torch.tensor(target, dtype=torch.float64)}
    if types is not None:
        labels["atom_types"] = torch.tensor(types)
    return preds, labels


# --- what is reported ---


def test_names_in_the_order_of_the_list():
    values = oracle.manager(PARTS, TYPES)(*batch())
    assert list(values) == [
        "per_atom_total_energy_mse",
        "forces_rmse_by_type_H",
        "forces_rmse_by_type_C",
        "forces_rmse_by_type_O",
        "forces_rmse_by_type",
        "stress_mae",
        "forces_max",
        "weighted_sum",
    ]
    assert all(value.shape == () and value.dtype == torch.float64 for value in values.values())


def test_prefix_and_suffix():
    manager = oracle.manager(PARTS, TYPES)
    plain = list(manager(*batch()))
    decorated = [f"val0_epoch/{name}@1" for name in plain]
    assert list(manager(*batch(), "val0_epoch/", "@1")) == decorated
    assert list(manager(*batch(), prefix="val0_epoch/", suffix="@1")) == decorated
    assert list(manager.compute("val0_epoch/", "@1")) == decorated
    assert manager.value_names == plain


def test_no_weighted_sum_without_coefficients():
    manager = oracle.manager([Component("forces", "mae")])
    assert list(manager(*batch())) == ["forces_mae"]
    assert list(manager.compute()) == ["forces_mae"]
    assert not manager.do_weighted_sum


def test_automatic_names():
    fields = ["total_energy", "forces", "stress", harness.PerAtomModifier("total_energy")]
    metrics = [harness.MeanAbsoluteError, harness.MeanSquaredError, harness.RootMeanSquaredError]
    metrics.append(harness.MaximumAbsoluteError)
    manager = harness.MetricsManager([{"field": f, "metric": m} for f, m in itertools.product(fields, metrics)])
    assert list(manager.entries) == [
        f"{field}_{metric}"
        for field in ("E", "F", "stress", "per_atom_E")
        for metric in ("mae", "mse", "rmse", "max_ae")
    ]


def test_reset_forgets_and_compute_does_not():
    manager = oracle.manager(PARTS, TYPES)
    preds, target = batch()
    first = as_floats(manager(preds, target))
    manager(*batch(1))
    assert as_floats(manager.compute()) == as_floats(manager.compute()) != first
    manager.reset()
    assert all(math.isnan(value) for name, value in as_floats(manager.compute()).items() if name != "weighted_sum")
    manager(preds, target)
    assert as_floats(manager.compute()) == first


def test_an_epoch_of_many_batches():
    batches = [oracle.draw(seed, [1 + seed % 4, 2], unlabelled=0.2) for seed in range(300)]
    manager = oracle.manager(PARTS[:3], TYPES)
    with torch.inference_mode():
        for features, target in batches:
            manager(oracle.predict(features, oracle.parameters()), target)
    features, target = (oracle.join(part) for part in zip(*batches, strict=True))
    expected = oracle.values(PARTS[:3], oracle.predict(features, oracle.parameters()), target, TYPES)
    found = as_floats(manager.compute())
    np.testing.assert_allclose([found[name] for name in expected], list(expected.values()), rtol=1e-12)


def test_accumulated_steps_keep_no_graph():
    manager = oracle.manager(PARTS, TYPES)
    manager(*batch())
    assert not any(value.requires_grad for value in manager.compute().values())
    assert all(isinstance(value, float) for value in manager.metrics_values_step.values())


def test_validation_before_training():
    """Lightning's sanity check runs in inference mode before the first training step."""
    manager = oracle.manager(PARTS, TYPES)
    preds, target = batch()
    with torch.inference_mode():
        manager({key: value.detach() for key, value in preds.items()}, target)
        manager.compute()
    manager(preds, target)["weighted_sum"].backward()
    assert as_floats(manager.compute()).keys() == set(manager.value_names)


# --- coefficients ---


def energy_and_forces():
    parts = [Component("total_energy", "mse", 1.0), Component("forces", "mse", 3.0), Component("stress", "mse", None)]
    return oracle.manager(parts)


def test_coefficients_are_normalised_and_kept_as_given():
    manager = energy_and_forces()
    assert manager.coeffs == {"total_energy_mse": 0.25, "forces_mse": 0.75, "stress_mse": None}
    assert manager.given_coeffs == {"total_energy_mse": 1, "forces_mse": 3, "stress_mse": None}


def test_set_coeffs_changes_one_and_leaves_the_others_as_given():
    manager = energy_and_forces()
    manager.set_coeffs({"forces_mse": 9})
    assert manager.coeffs == {"total_energy_mse": 0.1, "forces_mse": 0.9, "stress_mse": None}
    manager.set_coeffs({"stress_mse": 10})
    assert manager.coeffs == {"total_energy_mse": 0.05, "forces_mse": 0.45, "stress_mse": 0.5}
    manager.set_coeffs({"forces_mse": None, "stress_mse": 1})
    assert manager.coeffs == {"total_energy_mse": 0.5, "forces_mse": None, "stress_mse": 0.5}
    assert manager.given_coeffs == {"total_energy_mse": 1, "forces_mse": None, "stress_mse": 1}


def test_set_coeffs_acts_on_the_next_step_and_on_the_epoch():
    manager = energy_and_forces()
    preds, target = batch()
    values = as_floats(manager(preds, target))
    manager.set_coeffs({"total_energy_mse": 0})
    assert manager(preds, target)["weighted_sum"].item() == pytest.approx(values["forces_mse"], rel=1e-14)
    assert manager.compute()["weighted_sum"].item() == pytest.approx(values["forces_mse"], rel=1e-14)


def test_all_coefficients_may_be_taken_out_and_come_back():
    manager = energy_and_forces()
    manager.set_coeffs(dict.fromkeys(manager.entries))
    assert "weighted_sum" not in manager(*batch())
    manager.set_coeffs({"forces_mse": 2})
    assert manager.coeffs["forces_mse"] == 1
    assert "weighted_sum" in manager(*batch())


@pytest.mark.parametrize(
    ("coeffs", "error", "message"),
    [
        ({"forces_mse": 5, "force_mse": 1}, KeyError, r"'force_mse'.*total_energy_mse, forces_mse, stress_mse"),
        ({"forces_mse": -1}, ValueError, r"'forces_mse'.*not negative.*-1"),
        ({"forces_mse": math.nan}, ValueError, r"'forces_mse'.*finite.*nan"),
        ({"forces_mse": math.inf}, ValueError, r"'forces_mse'.*finite.*inf"),
        ({"total_energy_mse": 0, "forces_mse": 0, "stress_mse": 0}, ValueError, r"above 0"),
        ({"forces_mse": "1"}, TypeError, r"'forces_mse'.*number.*'1'"),
        ({"forces_mse": True}, TypeError, r"'forces_mse'.*number.*True"),
    ],
)
def test_a_bad_set_coeffs_changes_nothing(coeffs, error, message):
    manager = energy_and_forces()
    before = manager.coeffs, manager.given_coeffs, as_floats(manager(*batch()))
    with pytest.raises(error, match=message):
        manager.set_coeffs({"stress_mse": 4, **coeffs})
    assert (manager.coeffs, manager.given_coeffs, as_floats(manager(*batch()))) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("coeff", [0.0, None])
@pytest.mark.parametrize("per_type", [False, True])
@pytest.mark.parametrize("error", oracle.METRICS)
def test_a_component_out_of_the_sum_does_not_poison_it(error, per_type, coeff, bad):
    preds, target = batch()
    energy = preds["total_energy"].detach().requires_grad_()
    wrong = preds["forces"].detach().requires_grad_()
    bad_target = {**target, "forces": target["forces"].clone()}
    bad_target["forces"][0, 0] = bad
    parts = [Component("total_energy", "mse", 1.0), Component("forces", error, coeff, per_type)]
    values = oracle.manager(parts, TYPES)({"total_energy": energy, "forces": wrong}, bad_target)
    assert not values[parts[1].name].isfinite()
    values["weighted_sum"].backward()
    assert values["weighted_sum"].item() == values["total_energy_mse"].item()
    assert wrong.grad is None or wrong.grad.abs().sum() == 0  # NaN is not 0
    assert energy.grad.isfinite().all()


# --- types ---


def test_a_type_without_data_is_left_out_of_the_average():
    preds, target = forces([[1.0, 0, 0], [0, 3.0, 0]], [[0.0] * 3] * 2, [0, 2])
    values = oracle.manager([Component("forces", "mse", 1.0, per_type=True)], TYPES)(preds, target)
    assert values["forces_mse_by_type_H"] == 1 / 3
    assert math.isnan(values["forces_mse_by_type_C"].item())
    assert values["forces_mse_by_type_O"] == 3
    assert values["forces_mse_by_type"].item() == pytest.approx(5 / 3, rel=1e-15)
    values["weighted_sum"].backward()
    assert preds["forces"].grad.tolist() == [[pytest.approx(1 / 3), 0, 0], [0, pytest.approx(1), 0]]


def test_type_coefficients_weigh_the_types_that_have_data():
    preds, target = forces([[1.0, 0, 0], [0, 3.0, 0]], [[0.0] * 3] * 2, [0, 2])
    parts = [Component("forces", "mse", 1.0, True, weights=(1.0, 100.0, 3.0))]
    value = oracle.manager(parts, TYPES)(preds, target)["forces_mse_by_type"].item()
    assert value == pytest.approx((1 * 1 / 3 + 3 * 3) / 4, rel=1e-15)


def test_a_type_without_data_in_the_whole_epoch_is_named_once():
    manager = oracle.manager([Component("forces", "mse", 1.0, per_type=True)], TYPES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager(*batch(types=(0, 2)))  # a step says nothing
    with pytest.warns(UserWarning, match=r"forces_mse_by_type_C(?!.*_by_type_H)(?!.*_by_type_O)") as record:
        assert math.isnan(manager.compute()["forces_mse_by_type_C"].item())
    assert len(record) == 1
    manager.reset()
    manager(*batch(types=(0, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.compute()


def test_no_warning_where_every_type_has_data_in_some_batch():
    manager = oracle.manager([Component("forces", "mse", 1.0, per_type=True)], TYPES)
    for kind in range(3):
        manager(*batch(types=(kind,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(math.isnan(value) for value in as_floats(manager.compute()).values())


def test_atom_types_may_come_with_the_predictions_and_as_a_column():
    preds, target = batch()
    manager = oracle.manager([Component("forces", "mse", 1.0, per_type=True)], TYPES)
    expected = as_floats(manager(preds, target))
    types = target.pop("atom_types")
    assert as_floats(manager({**preds, "atom_types": types}, target)) == expected
    assert as_floats(manager(preds, {**target, "atom_types": types.to(torch.int32)[:, None]})) == expected


# --- missing labels ---


@pytest.mark.parametrize("error", oracle.METRICS)
def test_every_pattern_of_missing_labels(error):
    parts = [Component("forces", error, 1.0, ignore_nan=True), Component("forces", error, 2.0, True, ignore_nan=True)]
    features, target = oracle.draw(3, [2], types=(0, 1))
    target["atom_types"] = torch.tensor([0, 2])
    manager = oracle.manager(parts, TYPES)
    for missing in itertools.product([False, True], repeat=6):
        labels = target["forces"].masked_fill(torch.tensor(missing).reshape(2, 3), math.nan)
        theta = oracle.parameters()
        values = manager(oracle.predict(features, theta), {**target, "forces": labels})
        values["weighted_sum"].backward()
        batch_ = features, {**target, "forces": labels}
        expected = oracle.values(parts, oracle.predict(features, theta), batch_[1], TYPES)
        found = as_floats(values)
        np.testing.assert_allclose([found[name] for name in expected], list(expected.values()), rtol=1e-12)
        np.testing.assert_allclose(theta.grad, oracle.gradient(parts, *batch_, TYPES), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("error", [error for error in oracle.METRICS if not error.startswith("stratified")])
@pytest.mark.parametrize("field", ["total_energy", "forces", "stress"])
def test_a_field_without_any_label_is_nan_and_contributes_nothing(field, error):
    other = "stress" if field == "forces" else "forces"
    parts = [Component(field, error, 1.0, ignore_nan=True), Component(other, "mse", 1.0)]
    preds, target = batch()
    preds = {key: value.detach().requires_grad_() for key, value in preds.items()}
    target[field] = torch.full_like(target[field], math.nan)
    values = oracle.manager(parts)(preds, target)
    values["weighted_sum"].backward()
    assert math.isnan(values[parts[0].name].item())
    assert values["weighted_sum"].item() == values[parts[1].name].item() / 2
    assert preds[field].grad.abs().sum() == 0
    assert preds[other].grad.abs().sum() > 0


def test_nothing_but_missing_labels_gives_a_loss_of_zero_that_can_be_differentiated():
    preds, target = forces([[1.0, 2.0, 3.0]], [[math.nan] * 3])
    value = oracle.manager([Component("forces", "rmse", 1.0, ignore_nan=True)])(preds, target)["weighted_sum"]
    value.backward()
    assert value.item() == 0
    assert preds["forces"].grad.tolist() == [[0, 0, 0]]


def test_a_nan_prediction_of_a_labelled_element_is_seen():
    preds, target = forces([[1.0, math.nan, 3.0]], [[0.0, 0.0, math.nan]])
    values = oracle.manager([Component("forces", "mse", 1.0, ignore_nan=True)])(preds, target)
    assert math.isnan(values["weighted_sum"].item())


def test_a_nan_prediction_of_an_unlabelled_element_is_not():
    preds, target = forces([[1.0, 2.0, math.nan]], [[0.0, 0.0, math.nan]])
    value = oracle.manager([Component("forces", "rmse", 1.0, ignore_nan=True)])(preds, target)["weighted_sum"]
    value.backward()
    assert value.item() == pytest.approx(math.sqrt(2.5))
    assert preds["forces"].grad.isfinite().all()


def test_a_perfect_rmse_has_no_gradient():
    preds, target = forces([[1.0, 2.0, 3.0]] * 2, [[1.0, 2.0, 3.0]] * 2, [0, 1])
    parts = [Component("forces", "rmse", 1.0), Component("forces", "rmse", 1.0, per_type=True)]
    value = oracle.manager(parts, TYPES)(preds, target)["weighted_sum"]
    value.backward()
    assert value.item() == 0
    assert preds["forces"].grad.tolist() == [[0, 0, 0]] * 2


# --- dtypes ---


def test_float32_predictions_and_float64_targets():
    preds, target = batch()
    narrow = {key: value.detach().float().requires_grad_() for key, value in preds.items()}
    parts = [Component("total_energy", "mse", 1.0, per_atom=True), Component("forces", "rmse", 1.0, True)]
    values = oracle.manager(parts, TYPES)(narrow, target)
    values["weighted_sum"].backward()
    expected = oracle.values(parts, {k: v.detach().double() for k, v in narrow.items()}, target, TYPES)
    np.testing.assert_allclose(values["weighted_sum"].item(), expected["weighted_sum"], rtol=1e-6)
    assert narrow["forces"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_elements_keep_their_dtype_and_rows_are_float64(dtype):
    features, target = oracle.draw(0, [3, 4], dtype=dtype)
    preds = {key: (value[..., 0] * 0.5).requires_grad_() for key, value in features.items()}
    values = oracle.manager([Component("forces", error, 1.0) for error in oracle.METRICS])(preds, target)
    values["weighted_sum"].backward()
    assert values["weighted_sum"].dtype == torch.float64
    assert preds["forces"].grad.dtype == dtype
    exact = oracle.values([Component("forces", error, 1.0) for error in oracle.METRICS], preds, target)
    found = as_floats(values)
    tolerance = 4 * torch.finfo(dtype).eps
    np.testing.assert_allclose([found[name] for name in exact], list(exact.values()), rtol=tolerance)


# --- configuration ---

YAML = """
_target_: harness.MetricsManager
type_names: [H, C, O]
metrics:
  - metric: {_target_: harness.MeanSquaredError}
    field: {_target_: harness.PerAtomModifier, field: total_energy, factor: 1000}
    coeff: 1e-3
  - name: forces_huber
    metric: {_target_: harness.HuberLoss, delta: 0.02, reduction: sum}
    field: forces
    coeff: 10
    per_type: true
    per_type_coeffs: {H: 1, C: 2, O: 3.5}
  - metric: {_target_: harness.StratifiedHuberForceLoss, delta_dict: {0.5: 0.1, 0: 0.2, 1.5: 0.05}}
    field: forces
    ignore_nan: true
  - metric: {_target_: hydra.utils.get_class, path: harness.RootMeanSquaredError}
    field: {_target_: harness.MappedFieldModifier, pred_field: stress, target_field: virial}
    coeff: null
"""


@pytest.mark.parametrize("convert", ["none", "partial", "all", "object"])
def test_hydra_builds_a_manager_from_yaml(convert):
    manager = instantiate(OmegaConf.create(YAML), _convert_=convert)
    names = ["per_atom_E_mse", "forces_huber", "F_stratified huber", "pred_stress_label_virial_rmse"]
    assert list(manager.entries) == names
    assert manager.given_coeffs == dict(zip(names, [1e-3, 10, None, None], strict=True))
    assert manager["forces_huber"].delta == 0.02
    assert manager.entries["forces_huber"].per_type_coeffs == (1, 2, 3.5)
    preds, target = batch()
    target["virial"] = target["stress"]
    values = as_floats(manager(preds, target))
    assert all(math.isfinite(value) for value in values.values())
    restored = pickle.loads(pickle.dumps(manager))
    assert as_floats(restored(preds, target)) == values


def test_omegaconf_containers_are_taken_as_they_are():
    plain = [
        {"field": "forces", "metric": harness.MeanSquaredError, "coeff": 2, "per_type": True, "name": "f"},
        {"field": "total_energy", "metric": harness.MeanSquaredError, "coeff": 1, "name": "e"},
    ]
    plain[0]["per_type_coeffs"] = {"H": 1, "C": 2, "O": 3}
    configured = OmegaConf.create(plain, flags={"allow_objects": True})
    manager = harness.MetricsManager(configured, OmegaConf.create(list(TYPES)))
    expected = harness.MetricsManager(plain, TYPES)
    assert as_floats(manager(*batch())) == as_floats(expected(*batch()))
    manager.set_coeffs(OmegaConf.create({"f": 5}))
    assert manager.given_coeffs == {"f": 5, "e": 1}


# --- what NequIP's module and callbacks touch ---


def test_values_of_the_last_step_and_epoch_are_plain_numbers():
    manager = oracle.manager(PARTS, TYPES)
    assert manager.metrics_values_step == manager.metrics_values_epoch == dict.fromkeys(manager.entries)
    step = as_floats(manager(*batch()))
    manager(*batch(1))
    last = as_floats(manager(*batch(1)))
    epoch = as_floats(manager.compute())
    assert manager.metrics_values_step == {name: last[name] for name in manager.entries} != step
    assert manager.metrics_values_epoch == {name: epoch[name] for name in manager.entries}
    assert all(type(value) is float for value in manager.metrics_values_epoch.values())


def test_nequips_callbacks_find_their_attributes():
    manager = oracle.manager(PARTS, TYPES)
    assert manager.do_weighted_sum is True
    assert manager.entries["per_atom_total_energy_mse"].coeff == 0.25
    assert manager.entries["stress_mae"].coeff is None
    assert list(manager) == list(manager.keys()) == list(manager.entries)
    assert len(manager) == len(manager.values()) == 4
    assert "stress_mae" in manager
    assert dict(manager.items())["stress_mae"] is manager["stress_mae"]
    assert [entry.field.type for entry in manager.entries.values()] == ["graph", "node", "graph", "node"]
    assert manager.entries["per_atom_total_energy_mse"].field.field == "total_energy"
    assert [entry.per_type for entry in manager.entries.values()] == [False, True, False, False]
    assert [entry.ignore_nan for entry in manager.entries.values()] == [True, True, True, False]
    assert manager.type_names == TYPES
    for metric in manager.values():
        metric.dist_sync_on_step = True
    manager(*batch())
    with pytest.raises(KeyError, match="Valid names: per_atom_total_energy_mse"):
        manager["energy"]


def test_step_together_gives_each_manager_its_own_values():
    loss = oracle.manager(PARTS[:2], TYPES)
    metrics = oracle.manager([Component("forces", "max", 1.0, per_type=True)], TYPES)
    alone = [as_floats(copy.deepcopy(manager)(*batch())) for manager in (loss, metrics)]
    both = harness.step_together(loss, metrics, preds=batch()[0], target=batch()[1])
    assert [values.to_host() for values in both] == alone
    assert [as_floats(values.as_dict()) for values in both] == alone
    assert both[0].weighted_sum.requires_grad
    assert not both[1].weighted_sum.requires_grad
    assert [values.to_host("a/", "_b") for values in harness.compute_together([loss, metrics])] == [
        {f"a/{name}_b": value for name, value in values.items()} for values in alone
    ]
    assert harness.compute_together([]) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda manager: pickle.loads(pickle.dumps(manager))])
def test_copies_go_on_by_themselves(copied):
    manager = oracle.manager(PARTS, TYPES)
    manager(*batch())
    manager.set_coeffs({"stress_mae": 2})
    twin = copied(manager)
    for each in (manager, twin):
        each(*batch(1))
    assert as_floats(twin.compute()) == as_floats(manager.compute())
    twin(*batch(2))
    twin.set_coeffs({"stress_mae": None})
    assert as_floats(twin.compute()) != as_floats(manager.compute())
    assert manager.given_coeffs["stress_mae"] == 2
    twin(*batch())["weighted_sum"].backward()


def test_one_metric_may_stand_in_several_components():
    metric = harness.MeanSquaredError()
    manager = harness.MetricsManager([{"field": field, "metric": metric} for field in ("forces", "stress")])
    values = as_floats(manager(*batch()))
    expected = oracle.values([Component("forces", "mse"), Component("stress", "mse")], *batch())
    np.testing.assert_allclose(list(values.values()), list(expected.values()), rtol=1e-12)


def test_entries_of_the_batch_that_are_no_tensors_are_left_alone():
    preds, target = batch()
    managers = [oracle.manager(PARTS, TYPES) for _ in range(2)]
    expected = as_floats(managers[0](preds, target))
    managers[0].reset()
    of_loss, _ = harness.step_together(*managers, preds={"info": ["a"], **preds}, target={"info": ["a"], **target})
    assert of_loss.to_host() == expected


def test_a_metric_of_ones_own():
    class MeanFourthPower(harness.ErrorMetric):
        def measure(self, prediction, target):
            return (prediction - target) ** 4

        def __str__(self):
            return "m4"

    manager = harness.MetricsManager(
        [{"field": "forces", "metric": MeanFourthPower(), "coeff": 1, "per_type": True}], TYPES
    )
    preds, target = forces([[1.0, 1.0, 2.0], [0, 0, 3.0]], [[0.0] * 3] * 2, [0, 1])
    assert manager(preds, target)["F_m4_H"].item() == pytest.approx(6)
    assert manager(preds, target)["weighted_sum"].item() == pytest.approx((6 + 27) / 2)


def test_repr_lists_components_and_coefficients():
    text = repr(oracle.manager(PARTS, TYPES))
    assert "coeff=0.25" in text
    assert "forces_rmse_by_type" in text


def test_the_dictionary_of_a_step_makes_its_entries_when_they_are_asked_for():
    """A training asks for the weighted sum alone; NequIP's module adds to the dictionary, and logs it whole."""
    manager = oracle.manager(PARTS, TYPES)
    features, target = oracle.draw(0, [2, 3])
    preds = oracle.predict(features, oracle.parameters())
    (values,) = harness.step_together(manager, preds=preds, target=target)
    with Operators() as operators:
        named = manager(preds, target, prefix="a/", suffix="_b")
        before = operators.names.total()
        named["a/weighted_sum_b"].detach()
    assert operators.names.total() == before + 1
    expected = values.as_dict("a/", "_b")
    assert list(named) == list(expected)
    assert len(named) == len(expected)
    assert {name: value.item() for name, value in named.items()} == {k: v.item() for k, v in expected.items()}
    assert "weighted_sum" not in named
    assert "a/stress_mae_b" in named
    with pytest.raises(KeyError, match="stress_mae"):
        named["stress_mae"]
    assert repr(named) == repr(dict(named))
    named.update({"more": values.weighted_sum})
    del named["a/weighted_sum_b"]
    assert list(named) == [*list(expected)[:-1], "more"]
