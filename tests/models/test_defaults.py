"""Configs of models and recipes beside the defaults of the packages that are installed, and flags in the documents."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.commands import ROOT
from support.configs import composed
from support.other_models import INSTALLED, PACKAGES

from harness.config.resolvers import register_resolvers
from harness.support.guest import guest

register_resolvers()


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{PACKAGES[name]} is not installed")


def section(*overrides: str, name: str = "model") -> dict[str, Any]:
    """A section of the config, resolved."""
    found: Any = OmegaConf.to_container(composed(*overrides)[name], resolve=True)
    return found


def mace_parser() -> Any:
    with guest():
        from mace.tools import build_default_arg_parser
    return build_default_arg_parser()


MODEL_FLAGS = {
    "max_ell": "max_ell",
    "num_interactions": "num_interactions",
    "correlation": "correlation",
    "num_bessel": "num_radial_basis",
    "num_polynomial_cutoff": "num_cutoff_basis",
    "mlp_irreps": "MLP_irreps",
    "gate": "gate",
    "interaction": "interaction",
}
"""Settings of ``model=mace`` and the flags of ``mace_run_train`` that they are."""


@needs("mace")
def test_the_recipe_of_mace_is_the_defaults_of_mace_run_train() -> None:
    from mace.tools import check_args

    with guest():
        theirs, _ = check_args(mace_parser().parse_args(["--name=x", "--train_file=x"]))
    overrides = ("experiment=mace_recipe", "data=file", "data.train=x", "schedule=two_stage")
    ours = composed(*overrides)
    model = section(*overrides)
    assert {name: model[name] for name in MODEL_FLAGS} == {
        name: getattr(theirs, flag) for name, flag in MODEL_FLAGS.items()
    }
    assert str(theirs.hidden_irreps).replace(" ", "") == "{0}x0e+{0}x1o".format(model["channels"])
    assert model["max_L"] == 1
    assert str(model["radial_mlp"]) == theirs.radial_MLP
    # as mace_run_train chooses it for its default model, whatever --interaction_first says
    assert (theirs.model, model["interaction_first"]) == ("MACE", "RealAgnosticInteractionBlock")
    assert (theirs.scaling, model["energy_scales"]) == ("rms_forces_scaling", "force_rms")
    assert model["stress"] == theirs.compute_stress
    assert theirs.compute_avg_num_neighbors
    assert model["avg_num_neighbors"] is None
    assert (ours.cutoff, ours.precision, ours.seed) == (theirs.r_max, theirs.default_dtype, theirs.seed)
    assert ours.max_epochs == theirs.max_num_epochs
    assert (ours.data.batch_size, ours.data.eval_batch_size) == (theirs.batch_size, theirs.valid_batch_size)
    assert ours.data.split == {"val": theirs.valid_fraction, "test": 0}

    assert theirs.loss == "weighted"
    assert ours.loss.coeffs == {"total_energy": theirs.energy_weight, "forces": theirs.forces_weight}
    assert (ours.loss.coefficients, ours.loss.per_atom_energy) == ("as_given", True)
    assert {entry.name: entry.get("coeff") for entry in ours.metrics.extra_metrics} == {
        "per_atom_energy_mse": theirs.energy_weight,
        "forces_mse": theirs.forces_weight,
        "forces_rmse_per_type": None,
    }
    second = ours.schedule.schedules[1]
    assert second.coeffs == {
        "per_atom_energy_mse": theirs.swa_energy_weight,
        "forces_mse": theirs.swa_forces_weight,
    }
    assert second.optimizer == {"lr": theirs.swa_lr}
    assert ours.schedule.boundaries == [theirs.max_num_epochs // 4 * 3]

    assert (theirs.optimizer, ours.optimizer._target_) == ("adam", "torch.optim.Adam")
    assert (ours.optimizer.lr, ours.optimizer.amsgrad) == (theirs.lr, theirs.amsgrad)
    assert theirs.beta == 0.9  # that of torch
    assert [group.weight_decay for group in ours.optimizer.groups] == [theirs.weight_decay]
    assert "weight_decay" not in ours.optimizer  # of the rest
    assert ours.trainer.gradient_clip_val == theirs.clip_grad
    assert theirs.scheduler == "ReduceLROnPlateau"
    plateau = ours.lr_scheduler.scheduler
    assert (plateau.factor, plateau.patience) == (theirs.lr_factor, theirs.scheduler_patience)
    assert (ours.callbacks.ema.decay, ours.callbacks.ema.warm_up) == (theirs.ema_decay, True)


@needs("mace")
def test_every_flag_of_mace_run_train_is_on_its_page() -> None:
    page = (ROOT / "docs" / "migrate" / "mace.md").read_text()
    named = set(re.findall(r"--\w+", page))
    flags = [set(action.option_strings) for action in mace_parser()._actions]
    flags = [names for names in flags if not names & {"-h", "--config"}]
    assert len(flags) > 150
    assert [sorted(names) for names in flags if not names & named] == []
    every = set[str]().union(*flags)
    table = page.partition("## Every flag")[2]
    assert set(
        re.findall(r"--\w+", table.replace("harness-convert --elements", "").replace("--unpickle", ""))
    ) - every <= {
        "--head"  # of harness-convert
    }


def defaults_of_nequip(*path: str) -> dict[str, Any]:
    """Defaults of the arguments of builders of the package, those of the first before those of the last."""
    from importlib import import_module

    found: dict[str, Any] = {}
    for each in reversed(path):
        module, _, name = each.rpartition(".")
        with guest():
            builder = inspect.unwrap(getattr(import_module(module), name))
        parameters = inspect.signature(builder).parameters.values()
        found |= {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    return found


@pytest.mark.parametrize(
    ("name", "builders", "number"),
    [
        pytest.param(
            "nequip",
            ("nequip.model.nequip_models.NequIPGNNModel", "nequip.model.nequip_models.FullNequIPGNNModel"),
            6,
            marks=needs("nequip"),
        ),
        pytest.param(
            "allegro",
            ("allegro.model.allegro_models.AllegroModel", "allegro.model.allegro_models.FullAllegroModel"),
            4,
            marks=needs("allegro"),
        ),
    ],
)
def test_sizes_of_nequip_and_allegro_are_those_of_their_builders(
    name: str, builders: tuple[str, ...], number: int
) -> None:
    theirs, ours = defaults_of_nequip(*builders), section(f"model={name}")
    common = sorted((set(theirs) & set(ours)) - {"avg_num_neighbors"})
    assert len(common) == number
    assert {each: ours[each] for each in common} == {each: theirs[each] for each in common}


@needs("sevennet")
def test_sizes_of_sevennet_are_those_of_its_default_config() -> None:
    with guest():
        from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG as theirs
    ours = section("model=sevennet")
    names = {"channels": "channel", "conv_denominator": None}
    common = {each: names.get(each, each) for each in ours if names.get(each, each) in theirs}
    assert set(common) >= {"cutoff", "channels", "lmax", "is_parity", "num_convolution_layer", "self_connection_type"}
    assert {each: ours[each] for each in common} == {each: theirs[name] for each, name in common.items()}
