"""Values of sets and groups of frames beside the whole: those of the oracle on these frames alone."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.accumulation_cases import TYPES
from support.frames import chosen, weighted
from support.oracle import Component
from support.spawning import spawn

import harness

pytestmark = pytest.mark.filterwarnings("ignore:No data in the whole epoch")

GROUPS, SETS = ("bulk", "surface", "vacancy"), ("crystals", "molecules")
COMPONENTS = [
    Component("total_energy", "mse", 1.0, per_atom=True, ignore_nan=True),
    Component("total_energy", "rmse", None, ignore_nan=True),
    Component("stress", "huber_sum", None, ignore_nan=True),
    Component("forces", "stratified", 1.0, ignore_nan=True),
    Component("forces", "max", None, True, ignore_nan=True),
    Component("forces", "mae", 1.0, True, (1.0, 0.5, 3.0), ignore_nan=True),
]


def manager_of(components=COMPONENTS, names=None, **keys):
    """Manager of components with further keys, of data with groups and sets."""
    entries = [component.entry(TYPES) | keys for component in components]
    return harness.MetricsManager(entries, TYPES, **{"group_names": GROUPS, "set_names": SETS, **(names or {})})


def draw(seed, atoms, unlabelled=0.2):
    """Data of frames in sets and in groups, some in none."""
    features, target = oracle.draw(seed, atoms, unlabelled=unlabelled)
    generator = torch.Generator().manual_seed(seed)
    target["group_index"] = torch.randint(-1, len(GROUPS), (len(atoms),), generator=generator)
    target["set_index"] = torch.randint(0, len(SETS), (len(atoms),), generator=generator)
    return features, target


def values_of(features, target, index, components=COMPONENTS):
    """The oracle's values of the frames whose set or group, by its field, is this one."""
    (name, number), *_ = index.items()
    part = chosen(features, target, (target[name] == number).nonzero()[:, 0].tolist())
    return oracle.values(components, oracle.predict(part[0], oracle.parameters()), part[1], TYPES)


def assert_close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12, err_msg=name)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=7), st.lists(st.integers(0, 7), max_size=3), st.integers(0, 2**31)
)
def test_values_of_sets_and_groups_are_those_of_their_frames(atoms, cuts, seed):
    features, target = draw(seed, atoms)
    preds = oracle.predict(features, oracle.parameters())
    manager = manager_of(per_set=True, per_group=True)
    with torch.no_grad():
        for part, labels in oracle.split(features, target, [min(cut, len(atoms)) for cut in cuts]):
            manager(oracle.predict(part, oracle.parameters()), labels)
    (values,) = harness.compute_together([manager])
    report = values.to_report()
    whole = oracle.values(COMPONENTS, preds, target, TYPES)
    for name, expected in whole.items():
        assert_close(report.values[name], expected, name)
    for field, names in (("set_index", SETS), ("group_index", GROUPS)):
        for number, name in enumerate(names):
            expected = values_of(features, target, {field: number})
            for component in COMPONENTS:
                assert_close(report.values[f"{component.name}@{name}"], expected[component.name], f"{component}{name}")
                if field == "group_index":
                    assert_close(report.by_group[component.name][number], expected[component.name])
    keys = {f"{component.name}@{name}" for component in COMPONENTS for name in (*SETS, *GROUPS)}
    assert set(report.values) == {*whole, *keys}
    assert manager.value_names == list(report.values)


def epoch_on_rank(rank, world_size):
    """Two batches of a rank, one of the second rank's without frames and without fields that only some data have."""
    loss, metrics = manager_of(per_group=True), manager_of(per_set=True)
    metrics.keep_by_group()
    theta = oracle.parameters()
    for number in range(2):
        features, target = draw(10 * rank + number, [[3, 1], [2, 2, 4]][number])
        target |= weighted(10 * rank + number, len(target["num_atoms"]))
        if rank and number:
            features, target = oracle.split(features, target, [0])[0]
            target = {name: value for name, value in target.items() if not name.endswith(("_index", "weight"))}
        values, _ = harness.step_together(loss, metrics, preds=oracle.predict(features, theta), target=target)
        values.weighted_sum.backward()
    reports = [values.to_report() for values in harness.compute_together([loss, metrics])]
    return [(each.values, each.by_group, each.frames_by_group) for each in reports]


def test_ranks_hold_the_values_of_one_process_bitwise():
    ranks = spawn(2, epoch_on_rank)
    assert str(ranks[0]) == str(ranks[1])
    whole = [manager_of(per_group=True), manager_of(per_set=True)]
    whole[1].keep_by_group()
    for rank, number in ((0, 0), (0, 1), (1, 0)):
        features, target = draw(10 * rank + number, [[3, 1], [2, 2, 4]][number])
        target |= weighted(10 * rank + number, len(target["num_atoms"]))
        with torch.no_grad():
            harness.step_together(*whole, preds=oracle.predict(features, oracle.parameters()), target=target)
    for values, (found, by_group, frames) in zip(harness.compute_together(whole), ranks[0], strict=True):
        report = values.to_report()
        for name, expected in report.values.items():
            assert_close(found[name], expected, name)
        for name, expected in report.by_group.items():
            assert_close(by_group[name], expected, name)
        assert frames == report.frames_by_group
    assert [len(frames) for *_, frames in ranks[0]] == [0, len(GROUPS)]  # counted where tables show them


def test_parts_leave_the_gradient_of_the_whole_as_it_is():
    features, target = draw(4, [3, 1, 2, 4])
    gradients = []
    for keys in ({}, {"per_set": True, "per_group": True}):
        theta = oracle.parameters()
        manager_of(**keys)(oracle.predict(features, theta), target)["weighted_sum"].backward()
        gradients.append(theta.grad)
    assert (gradients[0] == gradients[1]).all()


def test_a_component_of_some_sets_counts_their_frames_alone():
    features, target = draw(5, [2, 3, 1, 4])
    target["set_index"] = torch.tensor([0, 1, 1, 0])
    target["forces"][2:6] = math.nan  # of a set that does not count
    theta = oracle.parameters()
    plain = [Component("forces", "mse", 1.0), Component("total_energy", "mae", 1.0, ignore_nan=True)]
    manager = manager_of(plain, sets=["crystals"], per_set=True)
    (values,) = harness.step_together(manager, preds=oracle.predict(features, theta), target=target)
    part = chosen(features, target, [0, 3])
    part[1]["forces"].nan_to_num_(0.5)
    target["forces"][:2].nan_to_num_(0.5), target["forces"][6:].nan_to_num_(0.5)
    (values,) = harness.step_together(manager, preds=oracle.predict(features, theta), target=target)
    expected = oracle.values(plain, oracle.predict(part[0], oracle.parameters()), part[1], TYPES)
    report = values.to_report()
    for component in plain:
        assert_close(report.values[component.name], expected[component.name])
        assert_close(report.values[f"{component.name}@crystals"], expected[component.name])
    assert not any(name.endswith("molecules") for name in report.values)
    assert report.counts["forces_mse"] == 3 * 6
    theta.grad = None
    values.weighted_sum.backward()
    assert_close(theta.grad, oracle.gradient(plain, *part, TYPES))


def test_labels_that_a_set_lacks_are_no_missing_labels_of_the_others():
    features, target = draw(6, [2, 3, 1, 4], unlabelled=0.0)
    target["set_index"] = torch.tensor([0, 1, 1, 0])
    target["forces"][2:6] = math.nan
    plain = [Component("forces", "mse", 1.0), Component("total_energy", "mse", 1.0)]
    labelled = {"total_energy": list(SETS), "forces": ["crystals"]}
    manager = manager_of(plain, {"labelled_sets": labelled}, per_set=True)
    assert set(manager.value_names) >= {"total_energy_mse@molecules", "forces_mse@crystals"}
    assert "forces_mse@molecules" not in manager.value_names
    values = manager(oracle.predict(features, oracle.parameters()), target)
    of_crystals = values_of(features, target, {"set_index": 0}, plain)
    assert_close(values["forces_mse"].item(), of_crystals["forces_mse"])
    target["forces"][0, 0] = math.nan  # a gap in a set that has forces is one that shows
    assert manager(oracle.predict(features, oracle.parameters()), target)["forces_mse"].isnan()
    with pytest.raises(ValueError, match="no frame of the set molecules has forces"):
        manager_of(plain[:1], {"labelled_sets": labelled}, sets=["molecules"])


def test_a_weighted_mean_over_sets_can_be_trained_and_watched():
    features, target = draw(7, [2, 3, 1, 4])
    target["set_index"] = torch.tensor([0, 1, 1, 0])
    mae = Component("total_energy", "mae", 1.0, ignore_nan=True)
    entry = mae.entry(TYPES) | {"per_set_coeffs": {"crystals": 1, "molecules": 3}, "per_group": True}
    manager = harness.MetricsManager([entry], TYPES, group_names=GROUPS, set_names=SETS)
    theta = oracle.parameters()
    values = manager(oracle.predict(features, theta), target)
    values["weighted_sum"].backward()
    parts = [chosen(features, target, indices) for indices in ([0, 3], [1, 2])]
    of_sets = [oracle.values([mae], oracle.predict(part[0], oracle.parameters()), part[1])[mae.name] for part in parts]
    weights = [w for w, value in zip((1, 3), of_sets, strict=True) if not math.isnan(value)]
    known = [value for value in of_sets if not math.isnan(value)]
    assert_close(values[mae.name].item(), np.average(known, weights=weights))
    assert_close([values[f"{mae.name}@{name}"].item() for name in SETS], of_sets)
    assert_close(theta.grad, np.average([oracle.gradient([mae], *part) for part in parts], axis=0, weights=(1, 3)))
    manager.reset()  # a set without data is left out of the mean, as an atom type is
    values = manager(oracle.predict(parts[0][0], oracle.parameters()), parts[0][1])
    assert_close(values[mae.name].item(), of_sets[0])
    assert values[f"{mae.name}@molecules"].isnan()
    window = manager.window([target])  # and gradients of micro-batches add up
    theta.grad = None
    (step,) = harness.step_together(manager, preds=oracle.predict(features, theta), target=target, window=window)
    step.weighted_sum.backward()
    assert_close(theta.grad, np.average([oracle.gradient([mae], *part) for part in parts], axis=0, weights=(1, 3)))


def test_tables_by_group_add_no_values():
    manager, plain = manager_of(), manager_of()
    manager.keep_by_group()
    manager.keep_by_group()  # once is enough
    assert manager.value_names == plain.value_names
    features, target = draw(8, [2, 1, 3])
    preds = oracle.predict(features, oracle.parameters())
    report, without = (
        harness.step_together(each, preds=preds, target=target)[0].to_report() for each in (manager, plain)
    )
    assert str(report.values) == str(without.values)
    assert report.counts == without.counts
    assert without.by_group == {}
    for number in range(len(GROUPS)):
        expected = values_of(features, target, {"group_index": number})
        for component in COMPONENTS:
            assert_close(report.by_group[component.name][number], expected[component.name], component.name)
    with pytest.raises(RuntimeError, match="from the first batch of an epoch on"):
        plain.keep_by_group()
    no_groups = manager_of(names={"group_names": ()})
    no_groups.keep_by_group()
    assert no_groups.evaluate(no_groups.measure(preds, target)).to_report().by_group == {}


def test_frames_of_groups_are_counted_whatever_counts_in_errors():
    """Their weights, labels and sets, the order of the components, and the batches that they come in."""
    features, target = draw(12, [2, 1, 3, 2, 1], unlabelled=0.0)
    target["group_index"] = torch.tensor([0, 2, 0, -1, 2])
    target["set_index"] = torch.tensor([0, 0, 0, 1, 1])
    target["weight"] = torch.tensor([3.0, 0.0, 3.0, 0.5, 0.0]).double()
    target["total_energy"][2] = math.nan
    energy = Component("total_energy", "mae", ignore_nan=True)
    entries = [
        Component("forces", "rmse").entry(TYPES) | {"per_set": True},
        energy.entry(TYPES) | {"sets": ["molecules"]},
        Component("forces", "max").entry(TYPES) | {"per_group": True},
    ]
    for chosen_entries in (entries, entries[::-1], entries[2:]):
        manager = harness.MetricsManager(chosen_entries, TYPES, group_names=GROUPS, set_names=SETS)
        manager.keep_by_group()
        for part, labels in oracle.split(features, target, [2, 2]):
            with torch.no_grad():
                manager(oracle.predict(part, oracle.parameters()), labels)
        report = harness.compute_together([manager])[0].to_report()
        assert report.frames_by_group == [2, 0, 2]
        assert not math.isnan(report.by_group["forces_max"][0])


def weightless(features, target):
    """Groups and weights: one group of weight 0 alone, without some labels, one with both, and one without frames."""
    target["group_index"] = torch.tensor([0, 2, 0, -1, 2, -1])
    target["set_index"] = torch.tensor([0, 0, 1, 1, 1, 0])
    target["weight"] = torch.tensor([3.0, 0.0, 0.0, 0.5, 0.0, 0.0]).double()
    target["total_energy"][1] = target["stress"][1] = math.nan
    target["forces"][3:6] = math.nan  # of a frame of weight 0 in a group with another one
    return features, target


UNMASKED = [Component(**{**vars(component), "ignore_nan": False}) for component in COMPONENTS]


@pytest.mark.parametrize("of_labels", [False, True])
@pytest.mark.parametrize("shown", [False, True])
def test_a_group_of_weight_0_has_the_values_of_its_frames_once_each(shown, of_labels):
    """In tables, and where values of groups are logged; nothing else changes by these frames."""
    features, target = weightless(*oracle.draw(12, [2, 1, 3, 2, 1, 1]))
    if of_labels:  # the weights of the labels are 0, and not those of the frames
        counts = target["weight"] > 0
        target["weight"] = torch.where(counts, target["weight"], 1.0)
        target |= {f"{label}_weight": counts.double() for label in ("energy", "forces", "stress")}
    manager = manager_of(UNMASKED, per_set=True, per_group=shown)
    manager.keep_by_group()
    in_sums, nowhere = (manager_of(UNMASKED, weights=mode) for mode in ("in_sums", False))
    for other in (in_sums, nowhere):
        other.keep_by_group()
    for part, labels in oracle.split(features, target, [3, 3]):
        with torch.no_grad():
            harness.step_together(
                manager, in_sums, nowhere, preds=oracle.predict(part, oracle.parameters()), target=labels
            )
    report, of_sums, _ = (each.to_report() for each in harness.compute_together([manager, in_sums, nowhere]))
    plain = manager_of(UNMASKED, per_set=True)
    plain(oracle.predict(features, oracle.parameters()), target)
    for name, value in plain.compute().items():
        assert_close(report.values[name], value.item(), name)
    for component in UNMASKED:
        name = component.name
        alone = [4] if "forces" not in component.field else [1, 4]  # the energy and stress of the other are missing
        known = chosen(features, target, alone)
        expected = oracle.values([component], oracle.predict(known[0], oracle.parameters()), known[1], TYPES)[name]
        assert_close(report.by_group[name][2], expected, name)
        first = chosen(features, target, [0] * 3)  # the frame of weight 0 beside it does not count
        expected = oracle.values([component], oracle.predict(first[0], oracle.parameters()), first[1], TYPES)[name]
        assert_close(report.by_group[name][0], expected, name)
        assert math.isnan(report.by_group[name][1])
        assert not of_sums.by_group[name][2] > 0  # sums of weights that are 0
        if shown:
            assert_close(report.values[f"{name}@vacancy"], report.by_group[name][2])
    assert report.frames_by_group == [2, 0, 2]


def test_frames_of_weight_0_have_no_part_in_gradients_and_windows():
    features, target = weightless(*oracle.draw(12, [2, 1, 3, 2, 1, 1]))
    gradients = []
    for keeps in (False, True):
        manager, theta = manager_of(UNMASKED, per_group=True), oracle.parameters()
        if keeps:
            manager.keep_by_group()
        window = manager.window([target])
        (step,) = harness.step_together(manager, preds=oracle.predict(features, theta), target=target, window=window)
        step.weighted_sum.backward()
        gradients.append(theta.grad)
    assert (gradients[0] == gradients[1]).all()
    assert gradients[0].isfinite().all()
    assert gradients[0].any()


def test_metrics_of_others_have_values_of_groups_where_they_are_asked_for():
    entry = {"name": "r2", "field": "total_energy", "metric": torchmetrics.MeanAbsoluteError(), "per_group": True}
    gathered = {"name": "rank", "field": "total_energy", "metric": torchmetrics.SpearmanCorrCoef, "per_group": True}
    manager = harness.MetricsManager([entry, gathered], group_names=GROUPS)
    manager.keep_by_group()
    features, target = draw(9, [1] * 9, unlabelled=0.0)
    target["group_index"] = torch.tensor([0, 0, 1, 1, 1, 0, -1, -1, 0])
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    preds["total_energy"], target["total_energy"] = preds["total_energy"][:, 0], target["total_energy"][:, 0]
    values = manager(preds, target)
    for number, name in enumerate(GROUPS[:2]):
        rows = target["group_index"] == number
        pair = preds["total_energy"][rows], target["total_energy"][rows]
        assert_close(values[f"r2@{name}"].item(), (pair[0] - pair[1]).abs().mean().item())
        assert_close(values[f"rank@{name}"].item(), torchmetrics.functional.spearman_corrcoef(*pair).item())
    assert values["r2@vacancy"].isnan()


def test_an_epoch_goes_on_with_the_same_groups_only():
    features, target = draw(10, [2, 1, 3])
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    before, after, other = manager_of(), manager_of(), manager_of(names={"group_names": ("bulk", "surface", "other")})
    for manager in (before, after, other):
        manager.keep_by_group()
    before(preds, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.load_state_dict(before.state_dict())
    for manager in (before, after):
        manager(preds, target)
    reports = [harness.compute_together([manager])[0].to_report() for manager in (before, after)]
    assert str(reports[0]) == str(reports[1])
    with pytest.warns(UserWarning, match="was accumulated for other components"):
        other.load_state_dict(before.state_dict())


def test_an_epoch_without_counts_of_frames_does_not_go_on_with_them():
    """The components are the same, and the rows are not."""
    features, target = draw(10, [2, 1, 3])
    before, after = manager_of(weights=False, per_group=True), manager_of(weights=False, per_group=True)
    after.keep_by_group()
    preds = {name: value.detach() for name, value in oracle.predict(features, oracle.parameters()).items()}
    before(preds, target)
    with pytest.warns(UserWarning, match="was accumulated for other components"):
        after.load_state_dict(before.state_dict())
    after(preds, target)
    assert sum(harness.compute_together([after])[0].to_report().frames_by_group) <= 3


MAE = {"name": "mae", "field": "forces", "metric": harness.MeanAbsoluteError}


@pytest.mark.parametrize(
    ("keys", "names", "error", "words"),
    [
        ({"per_group": True}, {"group_names": None}, ValueError, "'mae': `per_group` needs `group_names`"),
        ({"per_set": True}, {"set_names": []}, ValueError, r"'mae': `per_set` needs `set_names`.*data=mixture"),
        ({"sets": ["crystals"]}, {"set_names": None}, ValueError, "`sets` needs `set_names`"),
        (
            {"sets": ["crystal"]},
            {},
            ValueError,
            "unknown set 'crystal'.*Did you mean crystals.*Valid names: crystals, molecules",
        ),
        ({"sets": "crystals"}, {}, TypeError, "`sets` is a list of names of sets, found 'crystals'"),
        ({"sets": []}, {}, TypeError, "`sets` is a list of names of sets"),
        ({"per_set": "yes"}, {}, TypeError, "`per_set` is true or false"),
        ({"per_set_coeffs": {"crystals": 1}}, {}, ValueError, r"each of the sets .*missing: \['molecules'\]"),
        ({"per_set_coeffs": {"crystals": 1, "molecules": 0}}, {}, ValueError, "finite and above 0, found 0"),
        ({"per_set_coeffs": {"crystals": 1, "molecules": "2"}}, {}, TypeError, "is a number, found '2'"),
        ({"per_set_coeffs": [1, 2]}, {}, TypeError, "maps names of sets to weights"),
        ({"per_set_coeffs": {}, "per_type": True}, {}, ValueError, "both `per_type` and `per_set_coeffs`"),
        ({"per_group": True}, {"group_names": ["a", "a"]}, ValueError, "`group_names` repeats a name"),
        ({"per_group": True}, {"group_names": "ab"}, TypeError, "`group_names` is a list of names"),
        ({"per_group": True}, {"group_names": ["a*"]}, ValueError, r"mae@a\* .*pattern of names"),
        ({"per_group": True, "per_set": True}, {"group_names": ["crystals"]}, ValueError, "the name of another value"),
        ({}, {"labelled_sets": {"forces": ["other"]}}, ValueError, "`labelled_sets` maps fields.*'other'"),
        ({"field": None, "metric": torchmetrics.MeanMetric(), "per_set": True}, {}, ValueError, "needs a `field`"),
    ],
)
def test_mistakes_are_told(keys, names, error, words):
    with pytest.raises(error, match=words):
        harness.MetricsManager([MAE | keys], TYPES, **{"group_names": GROUPS, "set_names": SETS, **names})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"group_index": torch.tensor([0, 3])}, ValueError, r"'group_index' has indices from 0 to 3, .* 3 group_names"),
        ({"set_index": torch.tensor([-2, 1])}, ValueError, r"'set_index' has indices from -2 to 1, .* 0 to 1, or -1"),
        ({"set_index": torch.tensor([0.0, 1.0])}, TypeError, "'set_index' has dtype torch.float32; expected integers"),
        ({"group_index": None}, KeyError, "'forces_mae' tells frames apart by their group, but the batch has no"),
    ],
)
def test_batches_that_do_not_fit_are_told(changes, error, words):
    features, target = draw(0, [2, 3])
    target = {name: value for name, value in (target | changes).items() if value is not None}
    manager = manager_of([Component("forces", "mae")], per_set=True, per_group=True)
    with pytest.raises(error, match=words):
        manager(oracle.predict(features, oracle.parameters()), target)


def test_rows_of_edges_belong_to_the_frame_of_their_centre():
    target = {
        "edge_energy": torch.zeros(5, 1),
        "edge_index": torch.tensor([[0, 1, 2, 2, 3], [1, 0, 3, 4, 2]]),
        "batch": torch.tensor([0, 0, 1, 1, 1]),
        "num_atoms": torch.tensor([2, 3]),
        "group_index": torch.tensor([1, 0]),
        "weight": torch.tensor([1.0, 2.0]).double(),
    }
    preds = {"edge_energy": torch.tensor([[1.0], [2.0], [4.0], [5.0], [6.0]])}
    entry = {"name": "mae", "field": "edge_energy", "metric": harness.MeanAbsoluteError(), "per_group": True}
    values = harness.MetricsManager([entry], group_names=GROUPS)(preds, target)
    assert_close(values["mae@bulk"].item(), 5.0)
    assert_close(values["mae@surface"].item(), 1.5)
    assert_close(values["mae"].item(), (1 + 2 + 2 * 15) / 8)
