"""Models of users by their configs: what a builder is handed, what is made before it, and what is told of mistakes."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from support.configs import composed
from support.own_builders import Embedding, OfTypes
from torch import nn

from harness.config.bad_input import BAD_INPUT
from harness.config.builders import build
from harness.config.explain import message
from harness.data import DataStatistics
from harness.job import prepare
from harness.job.build import read_schedule
from harness.module.build import build_optimizer

STATISTICS = DataStatistics(("Cu", "O"), torch.tensor([-1.5, -2.0], dtype=torch.float64), 1.7, 12.0, 5, 20)
OFFERED = {"statistics": STATISTICS, "type_names": ["Cu", "O"]}
OWN = "support.own_builders."


def given(target: str, offered: Any = None, **arguments: Any) -> dict[str, Any]:
    section = OmegaConf.create({"model": {"_target_": OWN + target, **arguments}, "cutoff": 4.5}).model
    return build(section, OFFERED if offered is None else offered).given  # type: ignore[no-any-return]


def test_builders_are_handed_objects_by_the_names_of_their_parameters() -> None:
    found = given("by_signature", width=3)
    assert found == {"statistics": STATISTICS, "type_names": ["Cu", "O"], "width": 3}
    assert found["statistics"] is STATISTICS
    assert given("takes_anything") == {}  # which says nothing of what it wants


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (["statistics"], {"statistics": STATISTICS}),
        (["statistics", "type_names"], {"statistics": STATISTICS, "type_names": ["Cu", "O"]}),
        ({"species": "type_names"}, {"species": ["Cu", "O"]}),
        (["statistics.mean_neighbors"], {"mean_neighbors": 12.0}),
        (
            {"avg": "statistics.mean_neighbors", "shifts": "statistics.energy_shifts"},
            {"avg": 12.0, "shifts": {"Cu": -1.5, "O": -2.0}},
        ),
    ],
)
def test_builders_with_keywords_are_handed_what_their_config_needs(needs: Any, expected: dict[str, Any]) -> None:
    found = given("takes_anything", needs=needs, width="${cutoff}")
    assert found == {**expected, "width": 4.5}
    assert all(type(found[name]) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("needs", "offered", "words"),
    [
        (["statistic"], OFFERED, r"asks for statistic, but there is no statistic\. Did you mean statistics\?"),
        (
            ["statistics.mean_neighbor"],
            OFFERED,
            r"has no mean_neighbor\. Did you mean mean_neighbors\? It has .*force_rms",
        ),
        (["statistics"], {**OFFERED, "statistics": None}, "the data have no statistics. It can ask for type_names"),
        ("statistics", OFFERED, r"model\.needs is a list .*such as \[statistics, type_names\].*found 'statistics'"),
        ([1], OFFERED, r"model\.needs is a list"),
    ],
)
def test_what_cannot_be_handed_over_is_told(needs: Any, offered: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        given("takes_anything", offered, needs=needs)


def test_lists_and_dictionaries_are_plain() -> None:
    found = given("takes_anything", sizes=[1, [2]], options={"a": {"b": [3]}})
    assert type(found["sizes"]) is list
    assert type(found["sizes"][1]) is list
    assert type(found["options"]["a"]) is dict
    assert found == {"sizes": [1, [2]], "options": {"a": {"b": [3]}}}
    with pytest.raises(MissingMandatoryValue, match=r"model\.width"):
        given("takes_anything", width="???")


COMPLETE = {"_target_": OWN + "Embedding", "width": 2, "names": ["a"]}
LACKING = {"_target_": OWN + "OfTypes", "width": 2}


def test_nested_sections_are_made_as_they_are_by_hydra() -> None:
    found = given("takes_anything", embed=COMPLETE, parts=[COMPLETE, {"deep": COMPLETE}])
    assert found == {"embed": Embedding(2, ["a"]), "parts": [Embedding(2, ["a"]), {"deep": Embedding(2, ["a"])}]}
    partial = given("takes_anything", embed={**COMPLETE, "_partial_": True})["embed"]
    assert partial(width=3) == Embedding(3, ["a"])
    nested = given("takes_anything", embed={**COMPLETE, "names": [COMPLETE]})["embed"]
    assert nested.names == [Embedding(2, ["a"])]
    assert given("takes_anything", embed={"_target_": OWN + "Embedding", "_args_": [5]})["embed"] == Embedding(5)


def test_what_a_builder_makes_itself_reaches_it_as_a_dictionary() -> None:
    assert given("takes_anything", embed=LACKING)["embed"] == LACKING  # type_names are the builder's to give
    assert isinstance(given("takes_anything", embed={**LACKING, "type_names": ["H"]})["embed"], OfTypes)
    found = given("makes_its_parts", embed=COMPLETE, heads=COMPLETE, other=COMPLETE)
    assert found == {"embed": COMPLETE, "heads": COMPLETE, "other": Embedding(2, ["a"])}
    assert given("makes_its_parts", embed={"mine": COMPLETE})["embed"] == {"mine": Embedding(2, ["a"])}
    own = {**COMPLETE, "_recursive_": False}
    assert given("takes_anything", embed=own)["embed"] == own
    assert given("takes_anything", embed=COMPLETE, _recursive_=False)["embed"] == COMPLETE
    assert given("takes_anything", embed=COMPLETE, _convert_="partial")["embed"] == Embedding(2, ["a"])


def told(target: str, **arguments: Any) -> str:
    with pytest.raises(InstantiationException) as caught:
        given(target, **arguments)
    return message(caught.value)


def test_failures_of_a_builder_are_told_with_their_place() -> None:
    text = told("asserts", size=[1])
    assert "an assertion without words in " in text
    lines = (Path(__file__).parents[1] / "support" / "own_builders.py").read_text().splitlines()
    line = lines.index("    assert len(size) == 2") + 1
    assert f"own_builders.py, line {line} (in call to target '{OWN}asserts')" in text
    assert "two sizes are needed (an assertion in " in told("asserts_with_words", size=[1])
    assert "takes no argument 'widht'. Did you mean width?" in told("by_signature", widht=1)
    text = told("asserts", size={**LACKING, "more": 1})
    assert f"given model.size as a dictionary, since type_names of {OWN}OfTypes is not given in it" in text


def test_the_process_stays_as_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert given("changes_the_process") == {}
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.rand(1), expected)


def test_warnings_of_torchscript_do_not_hide_others() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given("warns")
    assert [str(each.message) for each in caught] == ["mine: look at the units"]


TINY = ("data.num_frames=12", "data.split={val: 2, test: 2}", "data.batch_size=2", "logger=none", "callbacks=none")


def prepared(tmp_path: Path, *overrides: str) -> Any:
    config = composed("~model", *overrides, *TINY, "trainer.accelerator=cpu", "metrics=energy_force_stress")
    config.output_dir = str(tmp_path)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    return prepare(config).module.model


def test_an_own_builder_starts_a_job(tmp_path: Path) -> None:
    sizes = "sizes: {hidden_channels: 4, num_filters: 4, num_gaussians: 4}, layers: [a, b, c]"
    section = f"{{_target_: {OWN}schnet_by_keywords, cutoff: 4.5, {sizes}, needs: {{of_the_data: statistics}}}}"
    model = prepared(tmp_path, f"+model={section}")
    assert len(model.energy_model.energy_model.schnet.interactions) == 3


NEEDS = "needs: {type_names: type_names, avg_num_neighbors: statistics.mean_neighbors, per_type_energy_shifts: "
NEEDS += "statistics.energy_shifts, per_type_energy_scales: statistics.force_rms}"
ZBL = "pair_potential: {_target_: nequip.nn.pair_potential.ZBL, units: metal, chemical_species: [Cu, Pd, Ag, Au]}"


@pytest.mark.skipif(importlib.util.find_spec("nequip") is None, reason="nequip is not installed")
def test_the_builder_of_nequip_is_named_directly(tmp_path: Path) -> None:
    sizes = "num_layers: 1, l_max: 1, num_features: [4, 2], radial_mlp_width: 4"
    section = (
        f"{{_target_: nequip.model.NequIPGNNModel, seed: 0, model_dtype: float32, r_max: 4.5, {sizes}, {ZBL}, {NEEDS}}}"
    )
    model = prepared(tmp_path, f"+model={section}")
    assert type(model).__name__ == "GraphModel"
    assert any(type(part).__name__ == "ZBL" for part in model.modules())
    assert torch.get_default_dtype() == torch.float32
    (scaled,) = [part for part in model.modules() if type(part).__name__ == "PerTypeScaleShift"]
    assert scaled.shifts.numel() == 4


@pytest.mark.skipif(importlib.util.find_spec("allegro") is None, reason="allegro is not installed")
def test_the_builder_of_allegro_makes_its_embedding_itself(tmp_path: Path) -> None:
    sizes = (
        "num_layers: 1, l_max: 1, num_scalar_features: 4, num_tensor_features: 2, allegro_mlp_hidden_layers_width: 4"
    )
    embed = "radial_chemical_embed: {_target_: allegro.nn.TwoBodyBesselScalarEmbed, num_bessels: 4}"
    settings = f"seed: 0, model_dtype: float32, r_max: 4.5, {sizes}, {embed}, {NEEDS}"
    section = f"{{_target_: allegro.model.AllegroModel, {settings}}}"
    assert type(prepared(tmp_path, f"+model={section}")).__name__ == "GraphModel"


def values(name: str, **changes: Any) -> Any:
    """The section of a model in ``conf/model`` with other values, built of statistics."""
    section = composed(f"model={name}", "precision=float32").model
    return build(OmegaConf.merge(section, changes), OFFERED)  # type: ignore[arg-type]


_COUNT, _ORDER = "is a whole number, at least 1, found {!r}.", "is a whole number, at least 0, found {!r}."
WRONG_VALUES = [
    ("schnet", {"num_filters": "two"}, _COUNT),
    ("schnet", {"hidden_channels": 1}, "is a whole number, at least 2, found {!r}."),
    ("schnet", {"cutoff": math.nan}, "is a number above 0, found {!r}."),
    ("schnet", {"stress": "maybe"}, "is true or false, found {!r}."),
    ("schnet", {"seed": "two"}, "is a whole number or null, found {!r}."),
    ("nequip", {"num_layers": "two"}, _COUNT),
    ("nequip", {"l_max": -1}, _ORDER),
    ("nequip", {"num_features": 0}, "is a whole number, at least 1 or a list of which each entry is"),
    ("nequip", {"num_features": [4, "a"]}, "is a whole number, at least 1 or a list of which each entry is"),
    ("nequip", {"avg_num_neighbors": 0}, "is a number above 0 or a mapping in which each value is a number above 0"),
    ("nequip", {"dtype": "float16"}, "is a text: float32 or float64, found {!r}."),
    ("nequip", {"compile_mode": "fast"}, "is a text: eager or compile, found {!r}."),
    ("allegro", {"num_tensor_features": 2.5}, _COUNT),
    ("mace", {"channels": 0}, _COUNT),
    ("mace", {"max_L": None}, _ORDER),
    ("mace", {"radial_mlp": [8, 0]}, "is a list of which each entry is a whole number, at least 1, found {!r}."),
    ("mace", {"correlation": "two"}, "is a whole number, at least 1 or a list"),
    ("mace", {"avg_num_neighbors": "abc"}, "is a number above 0 or null, found {!r}."),
    ("sevennet", {"lmax": "one"}, _ORDER),
    ("sevennet", {"self_connection_type": "other"}, "is a text: nequip, linear or none, found {!r}."),
    ("sevennet", {"weight_nn_hidden_neurons": 64}, "is a list of which each entry is a whole number"),
    ("sevennet", {"cutoff_p": 0}, _COUNT),
    ("sevennet", {"num_bessel": None}, _COUNT),
    ("sevennet", {"conv_denominator": -1}, "is a number above 0 or null, found {!r}."),
    ("allegro", {"l_max": "one"}, _ORDER),
    ("allegro", {"parity": "maybe"}, "is true or false, found {!r}."),
    ("allegro", {"radial_chemical_embed": 8}, "is a mapping"),
]


@pytest.mark.parametrize(("name", "changes", "words"), WRONG_VALUES)
def test_a_wrong_value_of_a_model_is_told_with_its_setting(name: str, changes: dict[str, Any], words: str) -> None:
    """Before the package of the model is imported, which may not be here."""
    ((key, value),) = changes.items()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        values(name, **changes)
    assert message(caught.value).startswith(f"model.{key} {words.format(value)}")
    assert "(target harness.models." in message(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_L": 1, "max_ell": 0}, "model.max_L=1 with model.max_ell=0: .* Expected max_ell of at least 1"),
        ({"correlation": [2, 2, 2]}, r"model.correlation=\[2, 2, 2\] has 3 entries, but model.num_interactions is 2"),
    ],
)
def test_sizes_of_mace_that_do_not_fit_each_other_are_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BAD_INPUT, match=words):
        values("mace", **changes)


def test_what_a_package_of_a_model_says_comes_with_the_settings(tmp_path: Path) -> None:
    text = told("fails_deep_inside", size=0, names=["a"])
    assert "list index out of range (in call to target" in text
    assert "model has size=0, names=['a']." in text
    text = told("fails_deep_inside", size="two", names=["a"])
    assert "model.size is a whole number, found 'two'." in text


_PART, _NOT_NEGATIVE = "is a number above 0, at most 1, found {}.", "is a number, at least 0, found {}."
WRONG_SETTINGS = [
    ("adam", "optimizer.lr", ["abc", -1, math.nan, math.inf, None, [1]], _NOT_NEGATIVE),
    ("adamw", "optimizer.weight_decay", ["abc", -1, math.nan, math.inf, None], _NOT_NEGATIVE),
    ("adamw", "optimizer.groups", [0, "abc"], "is a list of groups such as {{match: ['*.bias']}}, found {}."),
    ("cosine", "lr_scheduler.scheduler.T_max", ["abc", 0, -1, None], "is a number, at least 1, found {}."),
    ("exponential", "lr_scheduler.scheduler.gamma", ["abc", 0, -1, math.nan], "is a number above 0, found {}."),
    ("plateau", "lr_scheduler.scheduler.factor", ["abc", 0, -1, 2, math.nan], _PART),
    ("plateau", "lr_scheduler.scheduler.patience", ["abc", -1, math.nan, None], _NOT_NEGATIVE),
    ("plateau_nequip", "lr_scheduler.scheduler.threshold", ["abc", -1, math.nan], _NOT_NEGATIVE),
    ("plateau_nequip", "lr_scheduler.scheduler.min_lr", [-1, math.nan, [-1]], "is a number, at least 0 or a list of"),
    ("wsd", "lr_scheduler.scheduler.length", ["abc", 0, -1, 1.5], "is a whole number, at least 1, found {}."),
    ("wsd", "lr_scheduler.scheduler.decay", ["abc", 0, 1.5, math.nan, None], _PART),
    ("wsd", "lr_scheduler.scheduler.end", ["abc", -1, 1, math.nan], "is a number, at least 0, below 1, found {}."),
    ("wsd", "lr_scheduler.scheduler.shape", ["abc", 1, None], "is a text: linear, cosine or sqrt, found {}."),
    ("wsd", "lr_scheduler.warm_up.length", ["abc", -1, None], "is a whole number of steps or epochs"),
    ("wsd", "lr_scheduler.warm_up.start", ["abc", 0, 2, None], "is a part of the learning rate, above 0"),
    ("wsd", "lr_scheduler.interval", ["abc", 1, None], "is epoch or step, found {}."),
]


@pytest.mark.parametrize(("choice", "setting", "wrong", "words"), WRONG_SETTINGS)
def test_a_wrong_setting_of_an_optimizer_or_scheduler_is_told(
    choice: str, setting: str, wrong: list[Any], words: str
) -> None:
    """Also one that torch takes, and that would fail, or train nothing, much later."""
    group = setting.partition(".")[0]
    config = composed(f"{group}={choice}")
    parts = (config.optimizer, config.lr_scheduler)
    module = nn.ModuleDict({"model": nn.Linear(1, 1)})
    build_optimizer(module, *parts, lambda pace: 10)
    for value in wrong:
        OmegaConf.update(config, setting, value, merge=False)
        with pytest.raises((ValueError, TypeError)) as caught:
            build_optimizer(module, *parts, lambda pace: 10)
        assert str(caught.value).startswith(f"{setting} {words.format(repr(value))}"), value


WRONG_COEFFICIENTS = ["abc", -1, math.nan, math.inf, None, [1]]


@pytest.mark.parametrize("choice", ["linear", "cosine", "deepmd", "piecewise", "two_stage", "nested"])
def test_every_wrong_number_of_a_schedule_is_told(choice: str) -> None:
    section = composed(f"schedule={choice}").schedule
    numbers = [path for path, value in leaves(section) if isinstance(value, int | float)]
    assert numbers
    for path in numbers:
        for value in WRONG_COEFFICIENTS:
            changed = copy.deepcopy(section)
            node: Any = changed
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            with pytest.raises(BAD_INPUT) as caught:
                read_schedule(changed)
            text = message(caught.value)
            assert str(path[-1]) in text, (path, value, text)
            assert "null" in text or repr(value) in text, (path, value, text)
    with pytest.raises(ValueError, match=r"^schedule\.interval is epoch or step, found 'abc'\.$"):
        read_schedule(OmegaConf.merge(section, {"interval": "abc"}))  # type: ignore[arg-type]
    with pytest.raises(BAD_INPUT) as caught:
        read_schedule(OmegaConf.merge(section, {"boundary": 3}))  # type: ignore[arg-type]
    assert "boundary" in message(caught.value)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Values of a section that are no sections or lists, with their keys."""
    for key in range(len(node)) if OmegaConf.is_list(node) else node:
        value = node[key]
        if OmegaConf.is_config(value):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "schedule=two_stage +schedule.schedules.1.optimizer.eps=-1",
            "schedule: optimizer.eps is a number, at least 0",
        ),
        ("model.energy_scales={Cu:0,Pd:1,Ag:1,Au:1}", "energy_scales are numbers of eV that are not zero"),
        ("model.energy_scales=-1", "energy_scales is a number of eV above 0, or 'force_rms', found -1"),
        ("model.energy_shifts={Cu:abc,Pd:1,Ag:1,Au:1}", "energy_shifts has 'abc' for Cu; expected a finite number"),
        ("optimizer.lr=abc", "optimizer.lr is a number, at least 0, found 'abc'"),
        (
            "lr_scheduler.scheduler.T_max=nonsense",
            "lr_scheduler.scheduler.T_max is a number, at least 1, found 'nonsense'",
        ),
        (
            "lr_scheduler=plateau lr_scheduler.scheduler.factor=two",
            "factor is a number above 0, at most 1, found 'two'",
        ),
        ("callbacks.progress.refresh_rate=two", "callbacks.progress.refresh_rate is a whole number, found 'two'"),
        ("callbacks.best.monitor=[1]", "callbacks.best.monitor is a text or null, found [1]"),
        ("callbacks.best.enable_version_counter=maybe", "enable_version_counter is true or false, found 'maybe'"),
    ],
)
def test_a_wrong_number_is_told_before_training(override: str, words: str, tmp_path: Path) -> None:
    own = [each for each in TINY if each != "callbacks=none"]
    config = composed(*override.split(), *own, "trainer.accelerator=cpu", "dry_step=false")
    config.output_dir = str(tmp_path)
    with pytest.raises(BAD_INPUT) as caught:
        prepare(config)
    assert words in message(caught.value)
